"""Chat and completions over HTTP: what comes is what the engine gives, in OpenAI's forms."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from http_servers import HI, MODEL, chat, connect, events, refused, serving

import offmoe
from offmoe.server.serve import RunningServer


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with connect(server) as opened:
        yield opened


@pytest.fixture(scope="module")
def direct() -> Iterator[offmoe.Engine]:
    """The same model, used directly."""
    with offmoe.load(ram="1GiB", expert_slots=48) as engine:
        yield engine


def test_a_chat_is_the_engines(client: httpx.Client, direct: offmoe.Engine) -> None:
    got = chat(client, max_tokens=8)
    expected = direct.chat(HI, max_new_tokens=8)
    choice = got["choices"][0]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason == "length"
    assert got["model"] == MODEL
    assert got["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert got["usage"]["completion_tokens"] == 8
    assert got["usage"]["total_tokens"] == expected.prompt_tokens + 8


def test_a_stream_has_the_same_text_and_always_a_choice(client: httpx.Client) -> None:
    whole = chat(client, max_tokens=8)
    chunks, comments = events(client, "/v1/chat/completions", messages=HI, max_tokens=8)
    assert comments
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert [delta["finish_reason"] for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["timings"]["predicted_n"] == 8


def test_usage_comes_last_where_it_is_asked_for(client: httpx.Client) -> None:
    chunks, _ = events(
        client, "/v1/chat/completions", messages=HI, max_tokens=4, stream_options={"include_usage": True}
    )
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])


def test_a_repeated_prompt_says_what_was_kept(client: httpx.Client) -> None:
    prompt = [{"role": "user", "content": "a prompt that comes twice"}]
    first, second = chat(client, prompt), chat(client, prompt)
    assert first["choices"] == second["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert second["timings"]["cache_n"] == second["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_several_replies_have_seeds_one_after_another(client: httpx.Client) -> None:
    fields = {"temperature": 1.0, "max_tokens": 12}
    both = chat(client, n=2, seed=5, **fields)
    alone = [chat(client, seed=seed, **fields) for seed in (5, 6)]
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    texts = [choice["message"]["content"] for choice in both["choices"]]
    assert texts == [reply["choices"][0]["message"]["content"] for reply in alone]
    assert both["usage"]["completion_tokens"] == sum(reply["usage"]["completion_tokens"] for reply in alone)


def test_streams_of_several_replies_name_theirs(client: httpx.Client) -> None:
    chunks, _ = events(client, "/v1/chat/completions", messages=HI, max_tokens=3, n=2)
    reasons = [(choice["index"], choice["finish_reason"]) for chunk in chunks for choice in chunk["choices"]]
    assert [reason for reason in reasons if reason[1]] == [(0, "length"), (1, "length")]


def test_stop_ends_a_reply_and_is_no_part_of_it(client: httpx.Client) -> None:
    text = chat(client, max_tokens=8)["choices"][0]["message"]["content"]
    stop = text[4:6]
    reply = chat(client, max_tokens=8, stop=stop)
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["choices"][0]["message"]["content"] == text[: text.index(stop)]


def test_logprobs_of_a_chat(client: httpx.Client, direct: offmoe.Engine) -> None:
    reply = chat(client, max_tokens=5, logprobs=True, top_logprobs=3)
    content = reply["choices"][0]["logprobs"]["content"]
    expected = direct.chat(HI, max_new_tokens=5, logprobs=3)
    assert expected.logprobs is not None
    assert len(content) == 5
    assert "".join(entry["token"] for entry in content) == reply["choices"][0]["message"]["content"]
    for entry, token_id, found in zip(content, expected.token_ids, expected.logprobs, strict=True):
        assert entry["logprob"] == pytest.approx(found[token_id].logprob, abs=0.05)
        assert len(entry["top_logprobs"]) == 3
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_a_completion_goes_on_from_text_and_ids(client: httpx.Client, direct: offmoe.Engine) -> None:
    expected = direct.generate("def f(x):", max_new_tokens=6)
    ids = client.post("/tokenize", json={"prompt": "def f(x):"}).json()["tokens"]
    for prompt in ("def f(x):", ids, ["def f(x):"], [ids]):
        got = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 6}).json()
        assert got["choices"][0]["text"] == expected.text, prompt
        assert got["object"] == "text_completion"


def test_many_prompts_have_replies_in_their_order(client: httpx.Client) -> None:
    prompts = ["def f(x):", "import os", "class A"]
    fields = {"max_tokens": 4, "temperature": 0}
    together = client.post("/v1/completions", json={"prompt": prompts, "n": 2, **fields}).json()["choices"]
    alone = [client.post("/v1/completions", json={"prompt": each, **fields}).json() for each in prompts]
    assert [choice["index"] for choice in together] == list(range(6))
    texts = [reply["choices"][0]["text"] for reply in alone]
    assert [choice["text"] for choice in together] == [text for text in texts for _ in range(2)]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_the_prompt(client: httpx.Client, stream: bool) -> None:
    fields = {"prompt": "def f(x):", "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    if stream:
        chunks, _ = events(client, "/v1/completions", **fields)
        parts = [chunk["choices"][0] for chunk in chunks]
        text = "".join(part["text"] for part in parts)
        lists = [part["logprobs"] for part in parts if part["logprobs"]]
        tokens = [token for part in lists for token in part["tokens"]]
        values = [value for part in lists for value in part["token_logprobs"]]
    else:
        choice = client.post("/v1/completions", json=fields).json()["choices"][0]
        text, tokens, values = choice["text"], choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
    assert text.startswith("def f(x):") and "".join(tokens) == text
    assert values[0] is None and all(value < 0 for value in values[1:])
    assert len(tokens) == 6


def test_echo_without_a_new_token(client: httpx.Client) -> None:
    fields = {"prompt": "def f(x):", "max_tokens": 0, "echo": True, "logprobs": 0}
    got = client.post("/v1/completions", json=fields).json()
    assert got["choices"][0]["text"] == "def f(x):"
    assert len(got["choices"][0]["logprobs"]["token_logprobs"]) == got["usage"]["prompt_tokens"]
    assert got["usage"]["completion_tokens"] == 0


def test_models_health_and_metrics(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert listed["data"][0]["context_length"] == 2048
    assert client.get(f"/v1/models/{MODEL}").json() == listed["data"][0]
    assert client.get("/health").json()["status"] == "ok"
    before = _counter(client, "offmoe_generated_tokens_total")
    chat(client, max_tokens=5)
    assert _counter(client, "offmoe_generated_tokens_total") == before + 5
    assert _counter(client, "offmoe_time_to_first_token_seconds_count") > 0
    assert _counter(client, "offmoe_engine_experts_total") == 192


def _counter(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.split()[0] == name))


def test_tokenize_counts_a_chats_prompt(client: httpx.Client) -> None:
    found = client.post("/tokenize", json={"messages": HI}).json()
    assert found["count"] == len(found["tokens"]) == chat(client)["usage"]["prompt_tokens"]


def test_assistant_prefill_is_continued(client: httpx.Client, direct: offmoe.Engine) -> None:
    messages = [*HI, {"role": "assistant", "content": "Sure, the answer"}]
    got = chat(client, messages, continue_final_message=True, add_generation_prompt=False)
    assert got["choices"][0]["message"]["content"] == direct.chat(
        messages, continue_final_message=True, max_new_tokens=8
    ).text  # fmt: skip


UNSUPPORTED = {
    "functions": [{"name": "f"}], "function_call": "auto", "audio": {"voice": "x"}, "prediction": {"type": "content"},
    "web_search_options": {},
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(client: httpx.Client, name: str) -> None:
    error = refused(client, "/v1/chat/completions", 400, messages=HI, **{name: UNSUPPORTED[name]})
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"unheard_of": 1}, "unheard_of"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 7}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"seed": -1}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": [""]}, "stop[0]"),
        ({"stream_options": {"other": 1}}, "stream_options.other"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "mood": "bad"}]}, "messages[0].mood"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0]"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)  # fmt: skip
def test_mistakes_name_their_field(client: httpx.Client, fields: dict[str, object], param: str) -> None:
    error = refused(client, "/v1/chat/completions", 400, **{"messages": HI, **fields})
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"


def test_a_prompt_over_the_context_has_both_numbers(client: httpx.Client) -> None:
    error = refused(client, "/v1/chat/completions", 400, messages=[{"role": "user", "content": "word " * 5000}])
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"] and any(len(word) == 4 or len(word) == 5 for word in error["message"].split())


def test_an_unknown_model_lists_the_known(client: httpx.Client) -> None:
    error = refused(client, "/v1/chat/completions", 404, messages=HI, model="gpt-9")
    assert error["code"] == "model_not_found" and MODEL in error["message"]
    assert client.get("/v1/models/gpt-9").status_code == 404


def test_null_is_not_given(client: httpx.Client) -> None:
    nothing = dict.fromkeys(("temperature", "stop", "tools", "response_format", "seed", "logit_bias", "user", "n"))
    assert chat(client, **nothing)["choices"] == chat(client)["choices"]


def test_fields_of_replies_may_come_back_in_messages(client: httpx.Client) -> None:
    said = {
        "role": "assistant",
        "content": "hello",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": None,
    }
    chat(client, [*HI, said, {"role": "user", "content": [{"type": "text", "text": "and?"}]}])


def test_addresses_that_are_none(client: httpx.Client) -> None:
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert client.get("/v1/chat/completions").status_code == 405
    assert (
        client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}).status_code
        == 400
    )
