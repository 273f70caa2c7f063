"""`engine.serve()`: a server around an engine that a program has open, and the command itself."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from commands import command_line, environment, fail
from engines import assert_at_rest
from http_servers import HI, chat
from patience import PATIENCE_S

import offmoe
from offmoe.core.errors import UsageError


def test_an_engine_is_served_and_stays_open() -> None:
    with offmoe.load(ram="1GiB", expert_slots=48) as engine:
        expected = engine.chat(HI, max_new_tokens=8).text
        with engine.serve(port=0, model_name="mine") as server, httpx.Client(base_url=server.url) as client:
            client.timeout = httpx.Timeout(PATIENCE_S)
            reply = chat(client, model="mine")
            assert reply["choices"][0]["message"]["content"] == expected
            stream = engine.stream("a", max_new_tokens=4)
            next(stream)
            busy = client.post("/v1/chat/completions", json={"messages": HI})
            assert (busy.status_code, busy.json()["error"]["code"]) == (503, "engine_busy")
            stream.close()
            chat(client)
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")
        assert engine.chat(HI, max_new_tokens=8).text == expected
        assert_at_rest(engine)
        with pytest.raises(UsageError, match="unknown option 'prot'"):
            engine.serve(prot=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as written:
        args = command_line("serve", "--port", "0", "--ram", "1GiB", "--log-requests")
        process = subprocess.Popen(args, stderr=written, stdout=written, env=environment())
    try:
        end = time.monotonic() + PATIENCE_S
        while "listening on " not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        url = log.read_text().partition("listening on ")[2].split()[0]
        while httpx.get(f"{url}/health").status_code == 503:
            time.sleep(0.1)
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            chat(client)
        process.send_signal(number)
        code = process.wait(PATIENCE_S)
    finally:
        process.kill()
    assert code == (143 if number == signal.SIGTERM else 130), log.read_text()
    assert "POST /v1/chat/completions 200" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_mistakes_of_the_command(tmp_path: Path) -> None:
    assert "--api-key-file" in fail("serve", "--host", "0.0.0.0")
    assert "--api-key-file" in fail("serve", "--api-key-file", tmp_path / "none")
    assert "lots" in fail("serve", "--max-body", "lots")
