"""The page at `/`, in a real browser where there is one: chatting, stopping, editing, and the picture of experts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_servers import HeldEngine, connect, serving, wait_until
from patience import PATIENCE_S

from offmoe.server.serve import RunningServer
from offmoe.server.settings import make_server_settings

DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving(hold=True, expert_slots=48) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with connect(server) as opened:
        yield opened


def test_the_page_and_its_files_allow_nothing_from_outside(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    names = re.findall(r'(?:src|href)="/static/([\w.]+)"', page.text)
    assert {"app.js", "app.css", "icon.svg"} == set(names)
    for name in [*names, "markdown.js", "experts.js", "sse.js"]:
        found = client.get(f"/static/{name}")
        assert found.status_code == 200 and found.headers["x-content-type-options"] == "nosniff"
        outside = re.findall(r"https?://(?!www\.w3\.org/2000/svg)", found.text)
        assert not outside, name
    assert "style=" not in page.text and "onclick" not in page.text


@pytest.mark.parametrize(
    "name", ["..%2fapp.py", "../settings.py", "%2e%2e/settings.py", "/etc/passwd", "app.js%00", ""]
)
def test_no_other_file_is_served(client: httpx.Client, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


def test_a_server_without_the_page() -> None:
    with serving(settings=make_server_settings(port=0, web_page=False)) as server, connect(server) as client:
        assert client.get("/").status_code == 404
        assert client.get("/static/app.js").status_code == 404


def test_the_picture_has_every_expert(client: httpx.Client) -> None:
    with client.stream("GET", "/offmoe/experts") as watching:
        lines = watching.iter_lines()
        assert next(lines).startswith(":")
        client.post("/v1/completions", json={"prompt": "def f(x):", "max_tokens": 20, "ignore_eos": True})
        views = (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
        view = next(view for view in views if view["hits"] + view["fetched"] >= 6)
    assert [len(layer) for layer in view["layers"]] == [32] * 6
    letters = "".join(view["layers"])
    assert set(letters) <= set("hfas.")
    assert letters.count("h") == view["hits"] and letters.count("f") == view["fetched"]
    assert letters.count("a") == view["ahead"]
    assert 0 < view["in_slots"] <= 48


class Browser:
    """A headless Chromium, driven by the WebDriver protocol."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": flags},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._session = self.call("POST", "/session", capabilities={"alwaysMatch": wanted})["sessionId"]

    def call(self, method: str, path: str, **fields: Any) -> Any:
        body = json.dumps(fields).encode() if method == "POST" else None
        request = urllib.request.Request(
            f"{self._base}{path}", body, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.load(answer)["value"]

    def do(self, method: str, path: str, **fields: Any) -> Any:
        return self.call(method, f"/session/{self._session}{path}", **fields)

    def script(self, text: str, *args: Any) -> Any:
        return self.do("POST", "/execute/sync", script=text, args=list(args))

    def keys(self, text: str) -> None:
        """Type where the focus is."""
        found = self.do("GET", "/element/active")[ELEMENT]
        self.do("POST", f"/element/{found}/value", text=text)

    def click(self, selector: str) -> None:
        found = self.do("POST", "/element", using="css selector", value=selector)[ELEMENT]
        self.do("POST", f"/element/{found}/click")

    def texts(self, selector: str) -> list[str]:
        found = self.script(f"return [...document.querySelectorAll('{selector}')].map((each) => each.innerText)")
        assert isinstance(found, list)
        return found

    def shot(self, name: str) -> None:
        """A screenshot, where somebody wants to look at it."""
        if folder := os.environ.get("OFFMOE_SCREENSHOTS"):
            import base64

            (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(self.do("GET", "/screenshot")))

    def emulate(self, command: str, **params: Any) -> None:
        self.do("POST", "/goog/cdp/execute", cmd=command, params=params)

    def close(self) -> None:
        self.do("DELETE", "")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if DRIVER is None or shutil.which("chromium") is None:
        pytest.skip("needs chromium and chromedriver")
    log = tmp_path_factory.mktemp("driver") / "log"
    with (
        log.open("w") as written,
        subprocess.Popen([DRIVER, "--port=0"], stdout=written, stderr=subprocess.STDOUT) as driver,
    ):
        try:
            wait_until(lambda: "on port" in log.read_text().splitlines()[-1] if log.read_text() else False)
            port = int(re.findall(r"on port (\d+)", log.read_text())[-1])
            opened = Browser(port)
            yield opened
            opened.close()
        finally:
            driver.terminate()


@pytest.fixture
def page(browser: Browser, server: RunningServer) -> Iterator[Browser]:
    engine: Any = server.served.engine
    assert isinstance(engine, HeldEngine)
    engine.before_token = lambda: None
    browser.do("POST", "/url", url=server.url)
    browser.script("sessionStorage.clear()")
    browser.do("POST", "/url", url=server.url)
    wait_until(lambda: "context of 2048" in browser.texts("#model")[0])
    yield browser
    serious = [line for line in browser.do("POST", "/se/log", type="browser") if line["level"] == "SEVERE"]
    assert not serious


def ask(page: Browser, text: str) -> None:
    page.script("document.getElementById('input').focus()")
    page.keys(text + "\ue007")  # Enter


def wait_for_end(page: Browser) -> None:
    wait_until(lambda: page.script("return document.getElementById('stop').hidden") is True)


def short(page: Browser, tokens: int) -> None:
    page.script(f"document.getElementById('max_tokens').value = {tokens}")


def test_a_chat_from_the_keyboard(page: Browser) -> None:
    short(page, 12)
    page.shot("empty")
    ask(page, "hi")
    wait_for_end(page)
    assert page.texts(".message.user .body") == ["hi"]
    assert len(page.texts(".message.assistant .body")[0]) > 3
    assert re.search(r"\d+ tokens · .* tok/s · first token", page.texts(".message.assistant .tools")[0])
    assert page.script("return document.activeElement.id") == "input"
    ask(page, "and more")
    wait_for_end(page)
    assert len(page.texts(".message")) == 4
    page.shot("chat")
    page.do("POST", "/refresh")
    assert len(page.texts(".message")) == 4, "what was said is kept in the tab"
    page.click("#new-chat")
    assert page.texts(".message") == []


def test_retry_and_edit(page: Browser) -> None:
    short(page, 5)
    ask(page, "first words")
    wait_for_end(page)
    reply = page.texts(".message.assistant .body")
    page.script("[...document.querySelectorAll('.tools button')].find((b) => b.innerText === 'Retry').click()")
    wait_for_end(page)
    assert page.texts(".message.assistant .body") == reply, "greedy"
    page.script("[...document.querySelectorAll('.tools button')].find((b) => b.innerText === 'Edit').click()")
    page.script("document.querySelector('.edit').value = ''")
    page.keys("other words\ue007")
    wait_for_end(page)
    assert page.texts(".message.user .body") == ["other words"]
    assert len(page.texts(".message")) == 2


def test_escape_stops(page: Browser, server: RunningServer) -> None:
    engine: Any = server.served.engine
    engine.before_token = lambda: time.sleep(0.02)
    ask(page, "a long story")
    wait_until(lambda: len(page.texts(".message.assistant .body")[0]) > 5)
    page.shot("writing")
    page.do("POST", "/actions", actions=[{"type": "key", "id": "k", "actions": [
        {"type": "keyDown", "value": "\ue00c"}, {"type": "keyUp", "value": "\ue00c"}]}])  # fmt: skip
    wait_for_end(page)
    assert "stopped" in page.texts(".message.assistant .tools")[0]
    wait_until(lambda: server.served.queue.num_running == 0)


def test_markdown_is_shown_and_never_run(page: Browser) -> None:
    text = (
        "# Head\n\nSome **bold**, *thin*, `code` and <img src=x onerror=alert(1)>.\n\n- one\n- two\n  - inner\n\n"
        "1. first\n2. second\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> said\n\n```python\nprint('<b>')\n```\n"
        "[bad](javascript:alert(1)) [good](https://example.org/)"
    )
    page.script(
        "return import('/static/markdown.js').then((m) => { const box = document.createElement('div'); box.id = 'try';"
        "document.getElementById('messages').replaceChildren(box); m.renderMarkdown(arguments[0], box); })", text,
    )  # fmt: skip
    wait_until(lambda: page.script("return document.querySelectorAll('#try a').length") == 1)
    count = "return document.querySelectorAll('#try ' + arguments[0]).length"
    counts = {tag: page.script(count, tag) for tag in ("h3", "strong", "em", "li", "ol", "table", "blockquote", "pre")}
    assert counts == {"h3": 1, "strong": 1, "em": 1, "li": 5, "ol": 1, "table": 1, "blockquote": 1, "pre": 1}
    assert page.script(count, "img") == 0 and page.script(count, "script") == 0
    assert page.texts("#try pre code") == ["print('<b>')"]
    assert page.script("return document.querySelector('#try a').href") == "https://example.org/"
    page.shot("markdown")


def test_the_picture_follows(page: Browser) -> None:
    short(page, 20)
    ask(page, "hi")
    wait_for_end(page)
    wait_until(lambda: "hits" in page.texts("#experts-line")[0])
    assert page.script("return document.getElementById('picture').dataset.layers") == "6"
    painted = page.script(
        "const c = document.getElementById('picture'), seen = new Set();"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "for (let i = 0; i < d.length; i += 4) seen.add(d.slice(i, i + 3).join()); return seen.size"
    )
    assert painted >= 3, "several states are seen"


def test_a_phone_in_the_dark(page: Browser) -> None:
    page.emulate("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    page.emulate("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    try:
        page.do("POST", "/refresh")
        wait_until(lambda: "context" in page.texts("#model")[0])
        short(page, 12)
        ask(page, "hi from a phone, with words enough to fill more than a line of it")
        wait_for_end(page)
        width = page.script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1], "nothing is wider than the screen"
        back = page.script("return getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", back)[:3])) < 150
        page.shot("phone")
        page.click("#toggle-experts")
        page.click("#toggle-settings")
        page.shot("phone-open")
        for selector in ("#send", "#input", "#toggle-settings"):
            assert page.script("return document.querySelector(arguments[0]).getClientRects().length", selector) == 1
    finally:
        page.emulate("Emulation.clearDeviceMetricsOverride")
        page.emulate("Emulation.setEmulatedMedia", features=[])


def test_every_control_has_a_name_and_is_reached_by_tab(page: Browser) -> None:
    page.click("#toggle-settings")
    nameless = page.script(
        "return [...document.querySelectorAll('button, input, textarea')].filter((each) => !each.innerText && "
        "!each.labels?.length && !each.getAttribute('aria-label')).map((each) => each.id)"
    )
    assert nameless == []
    page.script("document.activeElement.blur()")
    reached = set()
    for _ in range(30):
        page.do("POST", "/actions", actions=[{"type": "key", "id": "k", "actions": [
            {"type": "keyDown", "value": "\ue004"}, {"type": "keyUp", "value": "\ue004"}]}])  # fmt: skip
        reached.add(page.script("return document.activeElement.id"))
    assert {
        "new-chat",
        "toggle-settings",
        "toggle-experts",
        "system",
        "temperature",
        "api_key",
        "input",
        "send",
    } <= reached
    page.shot("settings")
