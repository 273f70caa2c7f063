"""Models by their name on the hub: what is fetched, in which order, from whom, and what is said where it cannot be."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from commands import fail, last_json, succeed
from engines import PROMPT, save_tiny
from gguf_makers import make_model, save_gguf
from hub_server import COMMIT, FakeHub, digest, serve
from logs import logs_warning

import offmoe
from offmoe.checkpoint.hub import download
from offmoe.checkpoint.index import INDEX_NAME, QUANT_CONFIG_NAME
from offmoe.checkpoint.locate import locate_model
from offmoe.core.errors import ModelNotFoundError, OutputError, UnsupportedModelError, UsageError

NAME = "someone/tiny"
# Copies of the weights in other forms, and files that no run needs.
NEEDLESS = (
    "original/consolidated.00.pth", "original/params.json", "consolidated.safetensors", "onnx/model.safetensors",
    "onnx/config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tiny-Q4_K_M.gguf",
    "README.md", "modeling_tiny.py", "figures/speed.png",
)  # fmt: skip
NEEDLESS_BYTES = 3 << 20


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as repositories have it: shards, and beside them what is not needed."""
    folder = save_tiny(tmp_path_factory.mktemp("hub"), layout="shards")
    assert (folder / INDEX_NAME).is_file()
    for name in NEEDLESS:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0" * NEEDLESS_BYTES)
    (folder / "chat_template.jinja").write_text("")
    return folder


@pytest.fixture
def hub(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(download, "_WAIT_S", 0.0)
    with serve(whole, hub_id=NAME) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def copied(whole: Path, tmp_path: Path, **config: Any) -> Path:
    """The model with another config."""
    folder = tmp_path / "changed"
    shutil.copytree(whole, folder)
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(held | config))
    return folder


def needed_bytes(whole: Path) -> int:
    return sum(path.stat().st_size for path in whole.iterdir() if path.is_file() and path.name not in NEEDLESS)


def cached_names(tmp_path: Path) -> set[str]:
    folder = tmp_path / "cache" / "models--someone--tiny" / "snapshots" / COMMIT
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_fetched_once_without_copies(hub: FakeHub, whole: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with offmoe.load(NAME, ram="4GiB", tell=None, progress=lambda *args: seen.append(args)) as engine:
        ids = engine.generate(PROMPT, max_new_tokens=4).token_ids
    with offmoe.load(whole, ram="4GiB", tell=None) as engine:
        assert engine.generate(PROMPT, max_new_tokens=4).token_ids == ids
    assert cached_names(tmp_path).isdisjoint(NEEDLESS)
    assert set(hub.asked()).isdisjoint(NEEDLESS)
    assert hub.asked()[0] == "config.json"
    need = needed_bytes(whole)
    headers = sum(int(request.range is not None) for request in hub.requests)
    assert need <= hub.sent_bytes < need + headers * (1 << 20) + 8192, "weights once, headers before them"
    steps = [(done, total) for stage, done, total in seen if stage == "download"]
    assert steps[-1] == (need, need) and steps == sorted(steps)
    count = len(hub.requests)
    assert locate_model(NAME).name == COMMIT
    assert [request.path for request in hub.requests[count:]] == [f"/api/models/{NAME}/revision/main"]


def test_the_cache_is_the_hubs_own(hub: FakeHub, whole: Path) -> None:
    folder = locate_model(NAME)
    found = huggingface_hub.try_to_load_from_cache(
        NAME, "config.json", cache_dir=str(folder.parent.parent.parent), revision="main"
    )
    assert found == str(folder / "config.json")
    shard = next(path for path in folder.glob("*.safetensors"))
    assert shard.is_symlink() and shard.resolve().name == digest(whole / shard.name)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "own code": (
        {"model_type": "tiny_own", "auto_map": {"AutoConfig": "configuration_tiny.TinyConfig"}},
        "brings its own Python code",
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "aqlm", "bits": 2}}, "quantised",
    ),
    "unknown": ({"model_type": "no_such_type"}, "does not know the architecture"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_config_refuses_costs_one_small_file(kind: str, hub: FakeHub, whole: Path, tmp_path: Path) -> None:
    config, message = REFUSED[kind]
    hub.folder = copied(whole, tmp_path, **config)
    with pytest.raises(UnsupportedModelError, match=message):
        offmoe.load(NAME, tell=None)
    assert hub.asked() == ["config.json"]
    assert cached_names(tmp_path) == {"config.json"}


def test_modelopt_is_refused_before_headers_and_weights(hub: FakeHub, whole: Path, tmp_path: Path) -> None:
    """ModelOpt tells its quantisation in a file of its own, beside a config.json that is that of the model before."""
    hub.folder = copied(whole, tmp_path)
    (hub.folder / QUANT_CONFIG_NAME).write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    for command in ("inspect", "plan"):
        assert "'modelopt NVFP4'" in fail(command, NAME)
    with pytest.raises(UnsupportedModelError, match="'modelopt NVFP4'"):
        offmoe.load(NAME, tell=None)
    assert hub.asked() == ["config.json", QUANT_CONFIG_NAME]
    assert cached_names(tmp_path) == {"config.json", QUANT_CONFIG_NAME}


def test_a_dense_model_is_refused_by_its_headers(hub: FakeHub, whole: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    hub.folder = tmp_path / "dense"
    hub.folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 64,
        "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40000,
    }  # fmt: skip
    (hub.folder / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": torch.zeros(40000, 64)}, hub.folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="is a dense model"):
        offmoe.load(NAME, tell=None)
    assert hub.sent_bytes < 2 << 20 and "model.safetensors" not in cached_names(tmp_path)


def test_inspect_and_plan_read_headers_alone(hub: FakeHub, whole: Path, tmp_path: Path) -> None:
    expected = last_json(succeed("inspect", whole, "--json").stdout)
    assert last_json(succeed("inspect", NAME, "--json").stdout) == expected
    assert all(request.range for request in hub.requests if request.host == "store")
    small = ("config.json", QUANT_CONFIG_NAME, INDEX_NAME)
    assert sorted(hub.asked()) == sorted([*small, *(p.name for p in whole.glob("model-*"))])
    found = last_json(succeed("plan", NAME, "--ram", "4GiB", "--json").stdout)
    assert found["fits"] and found["sizes"]["total_bytes"] == expected["total_bytes"]
    assert not (tmp_path / "cache").exists(), "nothing is kept"


def test_a_download_goes_on_where_it_stopped(hub: FakeHub, whole: Path, tmp_path: Path) -> None:
    """At every break a part of a file stays, and the next request asks for the rest."""

    def begin_to_break(stage: str, done: int, total: int) -> None:
        hub.break_after = 5_000 if done == total or stage == "download" else None

    folder = locate_model(NAME, progress=begin_to_break)
    for path in whole.glob("model-*"):
        assert digest(folder / path.name) == digest(path)
    asked = [request.range for request in hub.requests if request.host == "store"]
    assert "bytes=5000-" in asked and "bytes=10000-" in asked
    assert hub.sent_bytes < 2 * needed_bytes(whole)


def test_a_part_that_an_earlier_run_left_is_not_fetched_again(hub: FakeHub, whole: Path, tmp_path: Path) -> None:
    shard = max(whole.glob("model-*"), key=lambda path: path.stat().st_size)
    part = tmp_path / "cache" / "models--someone--tiny" / "blobs" / f"{digest(shard)}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(shard.read_bytes()[:-1000])
    seen: list[tuple[int, int]] = []
    folder = locate_model(NAME, progress=lambda stage, *sizes: seen.append(sizes) if stage == "download" else None)
    assert digest(folder / shard.name) == digest(shard)
    assert hub.sent_bytes < needed_bytes(whole) - shard.stat().st_size + (1 << 20)
    assert seen[0][0] >= shard.stat().st_size - 1000, "progress begins with what is there"


def test_a_hub_that_always_breaks_off_says_where(hub: FakeHub) -> None:
    def break_off(stage: str, done: int, total: int) -> None:
        hub.break_after = 0 if done == total or stage == "download" else None

    message = r"the download of model-\S+ of someone/tiny broke off at 0 of \d+ bytes: .*; the same command goes on"
    with pytest.raises(ModelNotFoundError, match=message):
        locate_model(NAME, progress=break_off)
    hub.break_after = None
    assert locate_model(NAME).is_dir()


def test_a_full_disk_is_told_before_weights(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.used, 50_000))
    with pytest.raises(OutputError, match=r"someone/tiny needs .* more in .*, where 48\.8 KiB are free"):
        locate_model(NAME)
    assert not [request for request in hub.requests if request.host == "store"]


@pytest.mark.parametrize("source", ["environment", "file"])
def test_the_token_goes_to_the_hub_alone(
    source: str, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    if source == "environment":
        monkeypatch.setenv("HF_TOKEN", hub.token)
    else:
        (tmp_path / "token").write_text(hub.token + "\n")
    succeed("plan", NAME, "--json")
    locate_model(NAME)
    assert {request.token for request in hub.requests if request.host == "hub"} == {"Bearer hf_secret"}
    assert {request.token for request in hub.requests if request.host == "store"} == {None}


def test_a_revision_is_a_model_of_its_own(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.revision = "v1.0"
    assert last_json(succeed("inspect", NAME, "--revision", "v1.0", "--json").stdout)["model_type"] == "qwen3_moe"
    with offmoe.load(NAME, ram="4GiB", revision="v1.0") as engine:
        assert engine.folder.name == COMMIT and engine.config.revision == "v1.0"
    refs = tmp_path / "cache" / "models--someone--tiny" / "refs"
    assert {path.name: path.read_text() for path in refs.iterdir()} == {"v1.0": COMMIT}
    with pytest.raises(ModelNotFoundError, match=r"someone/tiny has no revision 'main' on the hub \(HTTP 404\)"):
        offmoe.load(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert locate_model(NAME, revision="v1.0").name == locate_model(NAME, revision=COMMIT).name == COMMIT
    assert f"HF_HUB_OFFLINE is set and {NAME} is not in the local cache" in fail("plan", NAME)
    assert last_json(succeed("plan", NAME, "--revision", "v1.0", "--json").stdout)["fits"]


@pytest.mark.parametrize("value", ["../up", "", "a b", "-x", 7])
def test_a_revision_that_is_none(value: Any, hub: FakeHub, whole: Path) -> None:
    with pytest.raises(UsageError, match="use a branch, tag or commit of the model on the hub"):
        offmoe.load(NAME, revision=value)
    with pytest.raises(UsageError, match="which is no name on the hub; leave revision out"):
        offmoe.load(whole, revision="main")
    assert not hub.requests


def test_a_token_that_is_given_goes_to_the_hub_alone(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_mine"
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with offmoe.load(NAME, ram="4GiB", token="hf_mine") as engine:
        assert "hf_mine" not in str(engine.config.as_dict())
    assert {request.token for request in hub.requests if request.host == "hub"} == {"Bearer hf_mine"}
    assert {request.token for request in hub.requests if request.host == "store"} == {None}
    with pytest.raises(ModelNotFoundError, match=r"is gated \(HTTP 401\)"):
        offmoe.load(NAME, token=False)


@pytest.mark.parametrize("command", [("plan", NAME), ("inspect", NAME), ("generate", NAME, "--prompt", "x")])
def test_a_gated_model(command: tuple[str, ...], hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    message = fail(*command)
    assert f"{NAME} is gated (HTTP 401): accept its terms on {hub.url}/{NAME}" in message and "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "gated (HTTP 403)" in (message := fail(*command)) and "the token that was sent has no access" in message


@pytest.mark.parametrize("command", [("plan",), ("inspect",), ("generate", "--prompt", "x")])
def test_a_name_that_is_not_there(command: tuple[str, ...], hub: FakeHub) -> None:
    message = fail(command[0], "someone/tiyn", *command[1:])
    assert "no folder someone/tiyn, and no such model on the hub (HTTP 404); check the name" in message


def test_a_model_that_has_another_name_now(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.former_id = "someone/old"
    with logs_warning("someone/old is called someone/tiny on the hub now"):
        folder = locate_model("someone/old")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert locate_model("someone/old").resolve() == locate_model(NAME) == folder
    assert last_json(succeed("inspect", "someone/old", "--json").stdout)["model_type"] == "qwen3_moe"


@pytest.mark.parametrize("how", ["forbidden", "no network"])
def test_what_is_in_the_cache_works_offline(
    how: str, hub: FakeHub, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locate_model(NAME)
    count = len(hub.requests)
    if how == "forbidden":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{_closed_port()}")
    expected = last_json(succeed("inspect", whole, "--json").stdout)
    assert last_json(succeed("inspect", NAME, "--json").stdout) == expected
    assert last_json(succeed("plan", NAME, "--json").stdout)["fits"]
    with offmoe.load(NAME, ram="4GiB", tell=None) as engine:
        assert engine.generate(PROMPT, max_new_tokens=2).stats.new_tokens == 2
    assert len(hub.requests) == count


def _closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("command", [("plan",), ("inspect",), ("generate", "--prompt", "x")])
def test_offline_what_is_not_here_whole_is_said(
    command: tuple[str, ...], hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *rest = command
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"HF_HUB_OFFLINE is set and {NAME} is not in the local cache" in fail(name, NAME, *rest)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = locate_model(NAME)
    shard = sorted(folder.glob("model-*"))[0]
    shard.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"the local cache lacks 1 of its files, first {shard.name}" in fail(name, NAME, *rest)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{_closed_port()}")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "the hub is out of reach: " in fail(name, NAME, *rest)


def test_a_mirror_that_lists_no_sizes(hub: FakeHub, whole: Path) -> None:
    hub.sizes = False
    folder = locate_model(NAME)
    for path in whole.glob("model-*"):
        assert (folder / path.name).resolve().name == digest(path) == digest(folder / path.name)


def test_code_comes_only_when_it_is_trusted(hub: FakeHub, tmp_path: Path) -> None:
    locate_model(NAME, code=True)
    assert cached_names(tmp_path) & set(NEEDLESS) == {"modeling_tiny.py"}


def test_gguf_files_are_asked_for_by_name(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.folder = tmp_path / "ggufs"
    hub.folder.mkdir()
    path, other = hub.folder / "tiny-Q8_0.gguf", hub.folder / "tiny-F16.gguf"
    save_gguf(path, "qwen3moe", make_model("qwen3moe"), {})
    shutil.copyfile(path, other)
    (hub.folder / "mmproj-F16.gguf").write_bytes(b"GGUF")
    for command in (("inspect", NAME), ("generate", NAME, "--prompt", "x")):
        message = fail(*command)
        assert f"2 GGUF files and no safetensors; name one: {NAME}/{other.name}, {NAME}/{path.name}" in message
    found = last_json(succeed("inspect", f"{NAME}/{path.name}", "--json").stdout)
    assert found == last_json(succeed("inspect", path, "--json").stdout)
    other.unlink()
    assert locate_model(NAME).read_bytes() == path.read_bytes(), "the only one needs no name"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert locate_model(f"{NAME}/tiny-Q8_0.gguf").read_bytes() == path.read_bytes()


def test_pickles_and_incomplete_uploads_are_named(hub: FakeHub, whole: Path, tmp_path: Path) -> None:
    hub.folder = copied(whole, tmp_path)
    first = sorted(hub.folder.glob("model-*"))[0]
    first.unlink()
    for command in (("inspect", NAME), ("generate", NAME, "--prompt", "x")):
        assert "lacks 1 of" in (message := fail(*command)) and first.name in message
    for path in [*hub.folder.glob("*.safetensors"), hub.folder / INDEX_NAME]:
        path.unlink()
    shutil.rmtree(hub.folder / "onnx")
    for command in (("inspect", NAME), ("generate", NAME, "--prompt", "x")):
        assert "holds only pickle files" in fail(*command)


def test_ctrl_c_ends_a_download_and_keeps_its_parts(hub: FakeHub, whole: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "download":
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        locate_model(NAME, progress=interrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("offmoe-download")]
    assert threading.active_count() <= before + len(hub.requests)
    assert digest(locate_model(NAME) / "config.json") == digest(whole / "config.json")
