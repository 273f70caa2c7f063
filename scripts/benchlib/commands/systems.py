"""Run the same work on offmoe and its peers, side by side, and write what came out under benchmarks/.

    scripts/bench systems --model checkpoints/qwen3-6l --systems offmoe,transformers
    scripts/bench systems --model checkpoints/qwen3-6l --systems offmoe,accelerate,llama \
        --cap 4.0GB --ram 2GiB --rounds 3 --llama-python ~/llama/bin/python

Every system runs in a process of its own and gets the same ids: the first ones in one prefill, the rest one at a time
as given, so all do the same work. Rounds take the systems in turn (A B A B). With --cap a process and the page cache
it fills are held in a cgroup (Linux, root), and the page cache is emptied first. scripts/make_checkpoint.py makes the
model and its ids.json. Progress goes to stderr; the last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchlib.cgroup import drop_page_cache, memory_group, run_measured
from benchlib.command_line import make_parser
from benchlib.errors import ScriptError
from benchlib.machine import describe_machine, describe_model, describe_versions, num_cores
from benchlib.peers import BUILDERS, Options, System, build_systems
from benchlib.report import Facts, render
from benchlib.results import Round, Summary, decode_ratios, read_round
from benchlib.sizes import format_gb, parse_bytes

ROOT = Path(__file__).resolve().parents[3]


def main(argv: Sequence[str]) -> int:
    """Command line entry; returns the exit code."""
    args = parse_args(argv)
    # An exit and not a sudden end, so that the group, the scratch folder and the running system go too.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        print(json.dumps(bench(args)))
    except (ScriptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--systems", required=True, help=f"comma-separated, of: {', '.join(BUILDERS)}")
    parser.add_argument("--prefill", type=int, default=128, help="ids in the prefill (default: 128)")
    parser.add_argument("--decode", type=int, default=64, help="ids decoded one at a time after it (default: 64)")
    parser.add_argument("--rounds", type=int, default=1, help="times each system runs (default: 1)")
    parser.add_argument("--cap", help="memory cap on process and page cache, such as 4.0GB (default: none)")
    parser.add_argument("--ram", nargs="+", default=[], help="offmoe's --ram; several values are several systems")
    parser.add_argument("--prefetch", nargs="+", default=[], help="offmoe's --prefetch, likewise")
    parser.add_argument("--policy", nargs="+", default=[], help="offmoe's --policy, likewise")
    parser.add_argument("--pack", nargs="+", default=[], help="offmoe's --pack, likewise")
    parser.add_argument("--warm", action="store_true", help="offmoe goes through the ids once before it is timed")
    parser.add_argument("--accelerate-ram", help="weights accelerate keeps in RAM (default: all but experts)")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of every system (default: the cores)")
    parser.add_argument("--ids", type=Path, help="JSON list of token ids (default: MODEL/ids.json)")
    parser.add_argument("--llama-python", type=Path, help="interpreter with llama-cpp-python and gguf")
    parser.add_argument("--gguf-dir", type=Path, help="where GGUF files are kept (default: beside MODEL)")
    parser.add_argument("--scratch", type=Path, help="for accelerate's offloaded weights (default: beside MODEL)")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/DATE-side-by-side-MODEL.md)")
    return parser.parse_args(argv)


def bench(args: argparse.Namespace) -> dict[str, object]:
    """Run all rounds, write the result file, return the JSON object. Raises `ScriptError` for bad options."""
    cap_bytes = parse_bytes(args.cap) if args.cap else None
    for flag in ("prefill", "decode", "rounds", "threads"):
        if getattr(args, flag) < 1:
            raise ScriptError(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    model_facts = describe_model(args.model)
    model = args.model.resolve()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.scratch or model.parent) as scratch:
        ids = Path(scratch) / "ids.json"
        ids.write_text(json.dumps(read_ids(args.ids or model / "ids.json", count=args.prefill + args.decode)))
        options = Options(
            model=model, ids=ids, prefill=args.prefill, decode=args.decode, threads=args.threads, cap_bytes=cap_bytes,
            rams=tuple(args.ram), prefetches=tuple(args.prefetch),
            policies=tuple(args.policy), packs=tuple(args.pack), warm=args.warm,
            accelerate_bytes=parse_bytes(args.accelerate_ram) if args.accelerate_ram else None,
            llama_python=args.llama_python, gguf_dir=args.gguf_dir or model.parent,
            offload_dir=Path(scratch) / "offload",
        )  # fmt: skip
        systems = build_systems([name for name in args.systems.split(",") if name], options)
        check_cap(cap_bytes)
        summaries = run_rounds(systems, options, num_rounds=args.rounds)
    if all(summary.failure for summary in summaries):
        reasons = ", ".join(f"{summary.system.name} {summary.failure}" for summary in summaries)
        raise ScriptError(f"no system finished: {reasons}")
    facts = Facts(
        date=datetime.date.today().isoformat(), command=["scripts/bench", *sys.argv],
        model_name=model.name, model=model_facts,
        machine=describe_machine(), versions=describe_versions(ROOT), prefill=args.prefill, decode=args.decode,
        rounds=args.rounds, threads=args.threads, cap_bytes=cap_bytes,
    )  # fmt: skip
    out = args.out or default_out(facts)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(facts, summaries))
    progress(f"wrote {out}")
    return to_json(facts, summaries)


def read_ids(path: Path, *, count: int) -> list[int]:
    """The first `count` ids. Raises `ScriptError` if the file is not a list of that many ids."""
    try:
        ids = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ScriptError(f"{path} is not a JSON list of token ids: {error}") from error
    if not isinstance(ids, list) or not all(isinstance(token_id, int) for token_id in ids):
        raise ScriptError(f"{path} is not a JSON list of token ids")
    if len(ids) < count:
        raise ScriptError(f"{path} holds {len(ids)} ids, prefill and decode take {count}; lower them")
    return ids[:count]


def check_cap(cap_bytes: int | None) -> None:
    """Fail before the first run rather than in it."""
    if cap_bytes is not None:
        drop_page_cache()
        with memory_group(cap_bytes):
            pass


def run_rounds(systems: Sequence[System], options: Options, *, num_rounds: int) -> list[Summary]:
    """All systems in turn, `num_rounds` times; one that failed is not run again."""
    rounds: dict[str, list[Round]] = {system.name: [] for system in systems}
    for round_idx in range(num_rounds):
        for system in systems:
            done = rounds[system.name]
            if done and done[-1].failure:
                continue
            progress(f"round {round_idx + 1} of {num_rounds}: {system.name}")
            done.append(run_once(system, options))
            progress(f"  {outcome(done[-1])}")
    return [Summary(system=system, rounds=tuple(rounds[system.name])) for system in systems]


def run_once(system: System, options: Options) -> Round:
    """One run; accelerate's offloaded weights are removed, however it ended."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    try:
        finished = run_measured(system.command, cap_bytes=options.cap_bytes, cwd=ROOT, environment=environment)
    finally:
        shutil.rmtree(options.offload_dir, ignore_errors=True)
    return read_round(finished, cap_bytes=options.cap_bytes)


def outcome(round_: Round) -> str:
    """One line about a run."""
    if round_.failure:
        return round_.failure
    prefill, decode = round_.report["prefill_tok_per_s"], round_.report["decode_tok_per_s"]
    return f"prefill {prefill:.1f} tok/s, decode {decode:.2f} tok/s, {round_.finished.elapsed_s:.0f} s in all"


def default_out(facts: Facts) -> Path:
    """A file of its own for each day, model and cap."""
    cap = f"-cap-{format_gb(facts.cap_bytes).replace(' ', '')}" if facts.cap_bytes else ""
    return ROOT / "benchmarks" / f"{facts.date}-side-by-side-{facts.model_name}{cap}.md"


def to_json(facts: Facts, summaries: Sequence[Summary]) -> dict[str, object]:
    """The last stdout line."""
    return {
        "bench": "side-by-side", "date": facts.date, "model": facts.model_name, "model_facts": facts.model,
        "machine": facts.machine, "versions": facts.versions, "prefill": facts.prefill, "decode": facts.decode,
        "threads": facts.threads, "cap_bytes": facts.cap_bytes,
        "systems": {summary.system.name: summary.as_json() for summary in summaries},
        "decode_ratios": decode_ratios(summaries),
    }  # fmt: skip


def progress(line: str) -> None:
    """One line on stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)
