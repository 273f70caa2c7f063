"""Plans from config and headers: sizes of published models to the byte, verdicts at the edge, settings with reasons."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import last_json, succeed
from engines import open_tiny, save_tiny
from makers import one_line
from published import GPT_OSS_120B, TOTAL_BYTES, write_published

from offmoe.checkpoint.hub.headers import locate_headers
from offmoe.cli.main import main
from offmoe.core.config import make_config
from offmoe.core.errors import CheckpointError, ModelNotFoundError, UsageError
from offmoe.core.units import GIB, MIB
from offmoe.memory.auto import AutoFacts, complete_config
from offmoe.memory.budget import CUDA_CONTEXT_BYTES, DevicePlan, MemoryPlan
from offmoe.planner.hit_rates import published_curve
from offmoe.planner.machines import NAMES, find_machine
from offmoe.planner.model_facts import ModelFacts, read_facts
from offmoe.planner.plan import Plan, make_plan

LIBRARIES = 400 * MIB
# What the hub's file tree adds up to; it counts the shards' headers as well, the index does not.
DEEPSEEK_V3_FILE_BYTES = 688_586_727_753


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for name in (*TOTAL_BYTES, "deepseek-v3"):
        write_published(name, root / name)
    return root


@cache
def facts_of(folders: Path, name: str) -> ModelFacts:
    return read_facts(folders / name, direct=True)


def plan(facts: ModelFacts, known: AutoFacts, **options: object) -> Plan:
    curve = published_curve(facts.model_type, num_experts=facts.sizes.num_experts, per_token=facts.num_moe_layers)
    return make_plan(
        facts, make_config(**options), known, record=None, libraries_bytes=LIBRARIES, curve=curve, drive=None,
        prompt_tokens=None,
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(TOTAL_BYTES))
def test_published_models_to_the_byte(name: str, folders: Path) -> None:
    facts = facts_of(folders, name)
    assert facts.total_bytes == TOTAL_BYTES[name]
    assert facts.experts_total_bytes + facts.resident_disk_bytes == facts.total_bytes
    assert facts.unused_bytes == 0
    expected = {
        "mixtral-8x7b": (256, 2, 3 * 4096 * 14336 * 2), "qwen3-30b-a3b": (6144, 8, 3 * 2048 * 768 * 2),
        "gpt-oss-120b": (4608, 4, 3 * 2880 * 2880 * 17 // 32),
    }  # fmt: skip
    assert (facts.sizes.num_experts, facts.sizes.top_k, facts.expert_bytes) == expected[name]


def test_deepseek_v3_without_its_last_block(folders: Path) -> None:
    """61 layers, 58 with experts; the 62nd guesses a token ahead and is not loaded."""
    facts = facts_of(folders, "deepseek-v3")
    headers = sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") if path.stat().st_size < 4096 else _header_bytes(path)
        for path in (folders / "deepseek-v3").glob("*.safetensors")
    )
    assert facts.total_bytes < DEEPSEEK_V3_FILE_BYTES < facts.total_bytes + 2 * headers
    assert (facts.sizes.num_experts, facts.num_moe_layers, facts.sizes.top_k) == (58 * 256, 58, 8)
    weights = 3 * 7168 * 2048
    assert facts.expert_bytes == weights + 4 * weights // 128**2
    assert facts.experts_total_bytes + facts.resident_disk_bytes + facts.unused_bytes == facts.total_bytes
    assert facts.unused_bytes > 256 * facts.expert_bytes
    assert facts.device_resident_bytes > 1.8 * facts.sizes.resident_bytes - 4 * 129280 * 7168


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("name", [*sorted(TOTAL_BYTES), "deepseek-v3"])
def test_the_verdict_turns_at_one_slot(name: str, folders: Path) -> None:
    """The smallest budget of top-k slots fits, a byte less does not; each slot's bytes more are one slot more."""
    facts = facts_of(folders, name)
    here = AutoFacts(has_device=False, longest_context=facts.longest_context, ram_bytes=4000 * GIB)
    options = {"device": "cpu", "prefill_chunk": 64, "kept_prompts": 0}
    found = plan(facts, here, **options)
    whole, sizes = memory(found), found.facts.sizes
    assert whole.num_slots == sizes.num_experts
    least = whole.fixed_bytes + sizes.top_k * sizes.slot_bytes
    assert memory(plan(facts, here, ram=least, **options)).num_slots == sizes.top_k
    assert memory(plan(facts, here, ram=least + sizes.slot_bytes, **options)).num_slots == sizes.top_k + 1
    assert memory(plan(facts, here, ram=whole.total_bytes - 1, **options)).num_slots == whole.num_slots - 1
    refused = plan(facts, here, ram=least - 1, **options)
    assert refused.memory is None and refused.prediction is None
    assert refused.line().startswith("does not fit: ram is ") and "this model needs" in refused.line()


@pytest.mark.parametrize("name", sorted(TOTAL_BYTES))
def test_the_verdict_on_a_device_turns_at_one_slot(name: str, folders: Path) -> None:
    facts = facts_of(folders, name)
    here = AutoFacts(
        has_device=True, longest_context=facts.longest_context, ram_bytes=4000 * GIB, vram_bytes=4000 * GIB
    )
    whole = device(plan(facts, here, prefill_chunk=64))
    least = whole.fixed_bytes + facts.sizes.top_k * facts.sizes.device_slot_bytes
    assert device(plan(facts, here, prefill_chunk=64, vram=least)).num_slots == facts.sizes.top_k
    assert plan(facts, here, prefill_chunk=64, vram=least - 1).memory is None


def memory(found: Plan) -> MemoryPlan:
    assert found.memory is not None, found.refusal
    return found.memory


def device(found: Plan) -> DevicePlan:
    part = memory(found).device
    assert part is not None
    return part


def test_experts_as_int4(folders: Path) -> None:
    facts = facts_of(folders, "mixtral-8x7b")
    smaller = facts.with_experts_as("int4")
    assert smaller.expert_bytes == 3 * 4096 * 14336 * 9 // 16
    assert smaller.sizes.slot_bytes >= smaller.expert_bytes
    assert smaller.total_bytes == facts.resident_disk_bytes + 256 * smaller.expert_bytes
    assert smaller.expert_kind == "int4"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_the_loader_divides_the_same(name: str, tmp_path: Path) -> None:
    """From headers alone: what the loader finds when the model is built and has run."""
    folder = save_tiny(tmp_path / name, name)
    with open_tiny(folder, context_length=128, device="cpu") as engine:
        loaded, sizes = engine.plan, read_facts(folder, direct=engine.stats()["io"] == "direct").sizes
        here = AutoFacts(has_device=False, longest_context=256, ram_bytes=8 * GIB)
        found = memory(plan(read_facts(folder, direct=engine.stats()["io"] == "direct"), here, context_length=128,
                            ram="4GiB", expert_slots=4))  # fmt: skip
    assert (sizes.slot_bytes, sizes.num_experts) == (loaded.slot_bytes, loaded.num_experts)
    assert found.kv_bytes == loaded.kv_bytes
    assert found.workspace_bytes == loaded.workspace_bytes
    assert found.prefill_chunk == loaded.prefill_chunk
    assert found.resident_bytes == pytest.approx(loaded.resident_bytes, rel=0.02)


def test_auto_is_settled_with_reasons() -> None:
    here = AutoFacts(has_device=False, longest_context=2048, ram_bytes=20 * GIB, direct_reads=True)
    done = complete_config(make_config(), here)
    assert (done.config.device, done.config.context_length, done.config.io) == ("cpu", 2048, "direct")
    assert done.config.ram == 18 * GIB and done.config.vram is None
    assert done.config.compile == "off" and done.config.miss == "auto"
    assert "2.00 GiB left to the system" in done.reasons["ram"]
    with_device = replace(here, has_device=True, vram_bytes=8 * GIB)
    assert complete_config(make_config(), with_device).config.vram == 8 * GIB - 512 * MIB
    assert complete_config(make_config(placement_invariant=True), with_device).config.miss == "stream"


def test_what_is_set_stays_or_is_refused() -> None:
    here = AutoFacts(has_device=True, longest_context=2048, ram_bytes=20 * GIB, vram_bytes=8 * GIB, direct_reads=True)
    given = make_config(ram="5GiB", io="buffered", device="cpu", context_length=77, compile="on", prefetch=2)
    done = complete_config(given, here)
    assert done.config == replace(given, miss="auto")
    assert done.reasons["ram"] == done.reasons["io"] == "as set"
    with pytest.raises(UsageError, match="the model was made for 2048"):
        complete_config(make_config(context_length=2049), here)
    with pytest.raises(UsageError) as caught:
        complete_config(make_config(miss="cpu", placement_invariant=True), here)
    assert "leave out one of the two" in one_line(caught)


def test_experts_of_no_kind_are_refused() -> None:
    result = CliRunner().invoke(main, ["plan", "--expert-format", "int3"], catch_exceptions=False)
    assert result.exit_code == 2
    assert "'--expert-format': 'int3' is not one of 'int4', 'int8'" in result.stderr


def test_the_old_flag_of_experts_still_works_and_says_so(folders: Path) -> None:
    """--experts was a number of slots or a format, by its value."""
    asked = ("plan", str(folders / "qwen3-30b-a3b"), "--for", "rtx 4060 laptop", "--json")
    for value, name in (("int4", "expert-format"), ("300", "expert-slots")):
        old = CliRunner().invoke(main, [*asked, "--experts", value], catch_exceptions=False)
        new = CliRunner().invoke(main, [*asked, f"--{name}", value], catch_exceptions=False)
        assert (old.exit_code, old.stdout) == (0, new.stdout) and new.stderr == ""
        assert old.stderr == f"--experts is called --{name} now; the next release drops the old name\n"


def test_another_machine(folders: Path) -> None:
    asked = [str(folders / "qwen3-30b-a3b"), "--for", "rtx 4060 laptop", "--json"]
    found = json.loads(run("plan", *asked, "--expert-format", "int4"))
    assert found["fits"] and found["machine"]["name"] == "RTX 4060 laptop"
    assert found["memory"]["device"]["total_bytes"] <= 8 * GIB - 512 * MIB
    assert found["memory"]["device"]["context_bytes"] == CUDA_CONTEXT_BYTES
    assert found["prediction"]["decode_tok_per_s"] > json.loads(run("plan", *asked))["prediction"]["decode_tok_per_s"]
    steps = found["prediction"]["decode_steps"]
    assert sum(step["seconds"] for step in steps) == pytest.approx(1 / found["prediction"]["decode_tok_per_s"])
    less = json.loads(run("plan", *asked, "--ram", "12GiB", "--vram", "6GiB", "--context", "2048"))
    assert less["config"]["context_length"] == 2048 and less["memory"]["ram_bytes"] == 12 * GIB


def test_an_unknown_machine_lists_the_known(folders: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find_machine("RTX 4060 labtop")
    message = one_line(caught)
    assert "did you mean 'RTX 4060 laptop'?" in message
    assert all(name in message for name in NAMES)
    result = CliRunner().invoke(main, ["plan", "--for", "a toaster"])
    assert result.exit_code == 2 and "known: RTX 4060 laptop" in result.stderr


def test_does_not_fit_is_said_plainly(folders: Path) -> None:
    result = CliRunner().invoke(main, ["plan", str(folders / "deepseek-v3"), "--for", "RTX 4060 laptop"])
    assert result.exit_code == 1
    text = result.stdout
    assert "does not fit: vram is" in text and "this model needs" in text
    assert "14.36 GiB of layers that guess tokens ahead" in text


def test_no_torch_and_a_second_at_most_for_text(folders: Path) -> None:
    code = "import sys; from offmoe.cli.main import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    asked = [sys.executable, "-c", code, "plan", str(folders / "mixtral-8x7b"), "--for", "RTX 4090 desktop"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


class Hub(BaseHTTPRequestHandler):
    """Serves a folder as the hub does: ranges, and redirects to another path for shards."""

    folder: Path
    ranges = True
    sent = 0

    def __init__(self, folder: Path, *args: object) -> None:
        self.folder = folder
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        path = self.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        if name.endswith(".safetensors") and "/resolve/" in self.path:
            self.send_response(302)
            self.send_header("Location", f"/elsewhere/{name}")
            self.end_headers()
            return
        self._send(path)

    def _send(self, path: Path) -> None:
        size = path.stat().st_size
        asked = self.headers.get("Range") if Hub.ranges else None
        begin, end = 0, size
        if asked is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(size, int(last) + 1)
        with path.open("rb") as file:
            file.seek(begin)
            data = file.read(min(end - begin, 2 << 20))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - begin if Hub.ranges else size))
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.end_headers()
        Hub.sent += len(data)
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folders / "mixtral-8x7b"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Hub.ranges, Hub.sent = True, 0
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_id_needs_headers_only(hub: type[Hub], folders: Path) -> None:
    expected = facts_of(folders, "mixtral-8x7b")
    with locate_headers("someone/mixtral-8x7b") as folder:
        found = read_facts(folder, direct=True)
    assert not folder.exists()
    assert replace(found, path=None) == replace(expected, path=None)
    assert hub.sent < 64 << 20


def test_a_hub_that_fails_says_so(hub: type[Hub]) -> None:
    hub.ranges = False
    with pytest.raises(CheckpointError, match="does not send ranges"), locate_headers("someone/mixtral-8x7b"):
        pass
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    with pytest.raises(ModelNotFoundError, match="the hub is out of reach"), locate_headers("someone/other"):
        pass


def test_what_a_config_says_wrongly(tmp_path: Path) -> None:
    """Numbers of absurd size and odd types are refused or ignored, never a crash."""
    write_published("gpt-oss-120b", tmp_path)
    config = {**GPT_OSS_120B, "layer_types": "all", "sliding_window": "far", "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = plan(read_facts(tmp_path, direct=True), AutoFacts(has_device=False, ram_bytes=64 * GIB))
    assert found.kv.num_bytes == 36 * 4096 * 2 * 8 * (2880 // 64) * 2


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("rtx 4090", "RTX 4090 desktop"), ("4090", "RTX 4090 desktop"), ("RTX4060", "RTX 4060 laptop"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090 desktop"), ("rtx 3060", "RTX 3060 12GB desktop"),
        ("laptop without gpu, 16 gb", "laptop without GPU, 16 GB"),
    ],
)  # fmt: skip
def test_cards_by_short_names(name: str, known: str) -> None:
    assert find_machine(name).name == known


def test_a_machine_in_numbers() -> None:
    machine = find_machine("RAM=32GB, vram=8GB,link=13GB/s,cores=6,disk=2.5GB/s,ram_rate=60,vram_rate=0.3TB/s")
    assert (machine.ram_bytes, machine.vram_bytes, machine.num_cores) == (32 << 30, 8 << 30, 6)
    assert (machine.link_pinned_bytes_per_s, machine.device_bytes_per_s) == (13e9, 300e9)
    assert machine.drives[""].direct_bytes_per_s == 2.5e9 and machine.read_bytes_per_s == 60e9
    without = find_machine("ram=16GB")
    assert without.vram_bytes is None and without.ram_bytes == 16 << 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ram=32GB,vrm=8GB", "'vrm=8GB' is none of ram, vram"), ("ram=much", "ram is 'much'; use a number as in ram"),
        ("ram=0GB", "use a number as in ram=32GB"), ("vram=8GB", "says no ram"), ("ram=8GB,link=3GB/s", "no vram"),
        ("ram=32GB,", "'' is none of"), ("ram=1e999GB", "use a number"), ("ram=-3GB", "use a number"),
        ("laptop", "or numbers, such as"),
    ],
)  # fmt: skip
def test_a_machine_that_is_none(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        find_machine(text)


def test_a_table_of_formats_against_budgets(folders: Path) -> None:
    lines = succeed("plan", folders / "mixtral-8x7b", "--for", "rtx 4060", "--formats").stdout.splitlines()
    heads = re.split(r"\s{2,}", lines[1].strip())
    assert heads[:2] == ["experts as", "on disk"] and heads[-1] == "64 GiB"
    rows = {cells[0]: cells for cells in (re.split(r"\s{2,}", line.strip()) for line in lines[2:])}
    assert set(rows) == {"bf16", "int8", "int4"} and all(len(cells) == len(heads) for cells in rows.values())
    whole = float(succeed_plan(folders / "mixtral-8x7b", "--for", "rtx 4060", "--ram", "24GiB"))
    assert float(rows["bf16"][heads.index("24 GiB")]) == pytest.approx(whole, abs=0.06)
    assert float(rows["int4"][-1]) > float(rows["bf16"][-1])
    record = last_json(succeed("plan", folders / "mixtral-8x7b", "--for", "rtx 4060", "--formats", "--json").stdout)
    assert [row["expert_format"] for row in record["formats"]] == list(rows)


def succeed_plan(*args: object) -> str:
    found = last_json(succeed("plan", *args, "--json").stdout)
    return str(found["prediction"]["decode_tok_per_s"])
