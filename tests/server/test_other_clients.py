"""Clients that bring many packages, in an environment of their own: scripts/server_clients makes it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_servers import HI, MODEL, serving
from patience import PATIENCE_S

import offmoe
from offmoe.checkpoint.locate import demo_model_folder
from offmoe.server.serve import RunningServer

CLIENTS = Path(__file__).parents[2] / ".venv-clients"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CLIENTS / "bin" / "lm_eval").exists(), reason="needs scripts/server_clients"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def direct() -> Iterator[offmoe.Engine]:
    with offmoe.load(ram="1GiB", expert_slots=48) as engine:
        yield engine


def run(*args: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(arg) for arg in args], capture_output=True, text=True, timeout=PATIENCE_S, cwd=cwd, check=False,
        env={"PATH": "/usr/bin:/bin", "OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "HOME": str(cwd or "/tmp")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


LITELLM = """
import json, sys, litellm
url, key = sys.argv[1], {"api_key": "none", "max_tokens": 8}
ask = {"messages": [{"role": "user", "content": "hi"}], **key}
whole = litellm.completion(model="openai/demo_model", api_base=url + "/v1", **ask)
parts = litellm.completion(model="openai/demo_model", api_base=url + "/v1", stream=True, **ask)
text = "".join(part.choices[0].delta.content or "" for part in parts)
other = litellm.completion(model="anthropic/demo_model", api_base=url, **ask)
print(json.dumps([whole.choices[0].message.content, text, other.choices[0].message.content,
                  whole.choices[0].finish_reason, whole.usage.completion_tokens]))
"""


def test_litellm(server: RunningServer, direct: offmoe.Engine, tmp_path: Path) -> None:
    told = json.loads(run(CLIENTS / "bin" / "python", "-c", LITELLM, server.url, cwd=tmp_path).splitlines()[-1])
    expected = direct.chat(HI, max_new_tokens=8)
    assert told == [expected.text, expected.text, expected.text, "length", 8]


NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const ask = { model: "demo_model", messages: [{ role: "user", content: "hi" }], max_tokens: 8 };
const whole = await client.chat.completions.create(ask);
let text = "";
for await (const part of await client.chat.completions.create({ ...ask, stream: true })) {
  text += part.choices[0].delta.content ?? "";
}
const asked = { model: "demo_model", input: "hi", max_output_tokens: 8, store: false };
const response = await client.responses.create(asked);
let param = null;
try { await client.chat.completions.create({ ...ask, temperature: -1 }); } catch (error) { param = error.param; }
console.log(JSON.stringify([whole.choices[0].message.content, text, response.output_text, param]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_openai_for_node(server: RunningServer, direct: offmoe.Engine) -> None:
    folder = CLIENTS / "node"
    if not folder.exists():
        pytest.skip("needs npm")
    (folder / "ask.mjs").write_text(NODE)
    told = json.loads(run("node", "ask.mjs", server.url, cwd=folder).splitlines()[-1])
    text = direct.chat(HI, max_new_tokens=8).text
    assert told == [text, text, text, "temperature"]


QUESTIONS = [
    ("def add(a, b):\n    return a +", [" b", " the", " print"], 0),
    ("import os\nimport", [" sys", " x)", " =="], 0),
    ("for i in range(10", [" import", "):", " class"], 1),
    ("class A:\n    def __init__(", ["self", "import", "1"], 0),
    ("if x is not", [" None", " def", " for"], 0),
    ("while", [" True", " ):", " import"], 0),
    ("try:\n    pass\nexcept", [" x +", " ValueError", " of"], 1),
    ("return", [" None", " class", " =="], 0),
]
CHOICE_TASK = """
task: offmoe_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
TEXT_TASK = """
task: offmoe_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{expected}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 8, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def score(kind: str, url: str, task: str, rows: list[dict[str, Any]], tmp_path: Path, *more: str) -> dict[str, Any]:
    """Results of lm-evaluation-harness on a task of our own."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(task.format(data=data))
    name = next(line.split(": ")[1] for line in task.splitlines() if line.startswith("task: "))
    model = f"model={MODEL},base_url={url},num_concurrent=2,max_retries=1,tokenizer={demo_model_folder()}"
    run(
        CLIENTS / "bin" / "lm_eval", "run", "--model", kind, "--model_args", model, "--tasks", name, "--include_path",
        tmp_path, "--output_path", tmp_path / "out", *more, cwd=tmp_path,
    )  # fmt: skip
    found = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"][name]
    assert isinstance(found, dict)
    return found


def test_lm_eval_scores_choices_as_the_engine_does(
    server: RunningServer, direct: offmoe.Engine, tmp_path: Path
) -> None:
    rows = [{"text": text, "choices": choices, "label": label} for text, choices, label in QUESTIONS]
    found = score("local-completions", f"{server.url}/v1/completions", CHOICE_TASK, rows, tmp_path)
    right = 0
    for text, choices, label in QUESTIONS:
        sums = [_loglikelihood(direct, text, choice) for choice in choices]
        right += sums.index(max(sums)) == label
    assert found["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert found["acc,none"] > 0.3


def _loglikelihood(engine: offmoe.Engine, text: str, choice: str) -> float:
    before, whole = engine.tokenize(text), engine.tokenize(text + choice)
    reply = engine.generate(whole, prompt_logprobs=0, max_new_tokens=0)
    assert reply.prompt_logprobs is not None
    pairs = zip(whole[len(before) :], reply.prompt_logprobs[len(before) :], strict=True)
    return sum(of[token_id].logprob for token_id, of in pairs if of is not None)


def test_lm_eval_has_the_texts_of_the_engine(server: RunningServer, direct: offmoe.Engine, tmp_path: Path) -> None:
    """Half of what is expected is what the engine says, the other half is not."""
    rows = []
    for number, (text, _, _) in enumerate(QUESTIONS):
        said = direct.chat([{"role": "user", "content": text}], max_new_tokens=8, stop="\n\n").text
        rows.append({"text": text, "expected": said if number % 2 else "something else"})
    url = f"{server.url}/v1/chat/completions"
    found = score("local-chat-completions", url, TEXT_TASK, rows, tmp_path, "--apply_chat_template")
    assert found["exact_match,none"] == pytest.approx(0.5)
