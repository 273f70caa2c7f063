"""`offmoe list`, `pull`, `rm` and `run`, links of the hub, and names of GGUF files by their format."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from commands import fail, last_json, run, succeed
from engines import save_tiny
from gguf_makers import make_model, save_gguf
from hub_server import FakeHub, serve

from offmoe.checkpoint.hub.files import is_tagged
from offmoe.checkpoint.locate import plain_name
from offmoe.core.errors import UsageError

NAME = "someone/tiny"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = save_tiny(tmp_path / "model")
    with serve(folder, hub_id=NAME) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_a_model_is_pulled_listed_and_removed(hub: FakeHub, cache: Path) -> None:
    assert succeed("list").stdout.split() == ["demo", *succeed("list").stdout.split()[1:3], "bundled"]
    folder = Path(succeed("pull", f"https://huggingface.co/{NAME}/tree/main").stdout.strip())
    assert (folder / "config.json").is_file()
    [_, row] = succeed("list").stdout.splitlines()
    assert row.startswith(f"{NAME} ") and "part" not in row
    found = last_json(succeed("list", "--json").stdout)
    assert found["models"][1]["model"] == NAME and found["models"][1]["whole"]
    assert found["models"][1]["bytes"] == sum(
        path.stat().st_size for path in cache.rglob("*") if path.is_file() and not path.is_symlink()
    )
    assert fail("rm", NAME) == "rm asks before it removes, and there is nobody to ask; use --yes"
    assert succeed("rm", "--yes", f"hf.co/{NAME}").stdout.startswith(f"removed {NAME}, ")
    assert not any(cache.glob("models--*")) and len(succeed("list").stdout.splitlines()) == 1
    assert fail("rm", "-y", NAME).startswith(f"{NAME} is not in the cache ")


def test_a_model_that_lacks_weights_is_listed_as_such(hub: FakeHub, cache: Path) -> None:
    folder = Path(succeed("pull", NAME).stdout.strip())
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    assert succeed("list").stdout.splitlines()[1].endswith("in part")


@pytest.mark.parametrize("name", ["..", "../somewhere", "someone", "/etc", "someone/../..", ""])
def test_nothing_outside_the_cache_is_removed(name: str, cache: Path, tmp_path: Path) -> None:
    keep = tmp_path / "somewhere" / "keep"
    keep.parent.mkdir()
    keep.touch()
    cache.mkdir()
    assert "is not in the cache" in fail("rm", "--yes", name)
    assert keep.exists() and cache.exists()


def test_a_link_out_of_the_cache_is_not_followed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "keep").touch()
    cache.mkdir()
    (cache / "models--some--one").symlink_to(tmp_path / "elsewhere")
    assert "is not in the cache" in fail("rm", "--yes", "some/one")
    assert (tmp_path / "elsewhere" / "keep").exists()


@pytest.mark.parametrize(
    ("link", "name"),
    [
        ("hf.co/a/b", "a/b"), ("https://huggingface.co/a/b", "a/b"), ("https://huggingface.co/a/b/", "a/b"),
        ("https://www.huggingface.co/a/b?library=x#y", "a/b"), ("https://huggingface.co/a/b/tree/main", "a/b"),
        ("https://huggingface.co/a/b/blob/main/b-Q4_K_M.gguf", "a/b/b-Q4_K_M.gguf"), ("hf.co/a/b:Q4_K_M", "a/b:Q4_K_M"),
        ("a/b", "a/b"), ("./hf.co/a/b", "./hf.co/a/b"), ("https://example.com/a/b", "https://example.com/a/b"),
    ],
)  # fmt: skip
def test_links_of_the_hub_are_names(link: str, name: str) -> None:
    assert plain_name(link) == name


def test_a_link_of_a_revision_says_the_flag() -> None:
    with pytest.raises(UsageError, match="use a/b with --revision v2"):
        plain_name("https://huggingface.co/a/b/tree/v2")


def test_a_gguf_file_is_named_by_its_format(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_tagged("sub/Qwen3-30B-A3B-Q4_K_M.gguf", ":q4_k_m") and not is_tagged("a-IQ4_K_M.gguf", ":Q4_K_M")
    assert is_tagged("a.Q8_0.gguf", ":Q8_0") and not is_tagged("a-Q8_0.gguf", ":Q8") and not is_tagged("ab.gguf", ":a.")
    folder = tmp_path / "gguf"
    folder.mkdir()
    save_gguf(folder / "tiny-F32.gguf", "qwen3moe", make_model("qwen3moe"), {})
    shutil.copy(folder / "tiny-F32.gguf", folder / "tiny-Q8_0.gguf")
    with serve(folder, hub_id=NAME) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        assert "2 GGUF files" in fail("pull", NAME)
        assert succeed("pull", f"{NAME}:q8_0").stdout.strip().endswith("tiny-Q8_0.gguf")
        assert "no file :Q2_K on the hub; its GGUF files: " in fail("pull", f"{NAME}:Q2_K")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert succeed("pull", f"{NAME}:q8_0").stdout.strip().endswith("tiny-Q8_0.gguf")
    assert not succeed("list").stdout.splitlines()[1].endswith("in part")


def test_run_answers_once() -> None:
    limits = ("--max-new-tokens", 3, "--temperature", 0, "--ram", "4GiB")
    asked = succeed("run", "demo", "what", "is", *limits)
    assert asked.stdout.strip() and asked.stdout == succeed("chat", "-", *limits, stdin="what is").stdout
    assert succeed("run", "demo", "what", "-", *limits, stdin="is").stdout == asked.stdout
    assert succeed("run", "demo", *limits, stdin="what is\n").stdout == asked.stdout
    assert [line for line in asked.stderr.splitlines() if "tok/s | first token" in line]
    quiet = succeed("run", "demo", "what", "is", "-q", *limits)
    assert (quiet.stdout, quiet.stderr) == (asked.stdout, "")
    loud = succeed("run", "demo", "what", "is", "-v", *limits)
    assert "| hits " in loud.stderr and "memory: peak" in loud.stderr and "hits" not in asked.stderr
    assert fail("run", "demo", " ", *limits) == "the question is empty; give one"


def test_short_flags_in_a_process_of_its_own() -> None:
    done = run("generate", "-p", "import", "-n", "2", "--ram", "4GiB", "-q")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()
