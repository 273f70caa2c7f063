"""Hold what `offmoe plan` predicts against what a run measures: peak RAM, and tok/s while decoding.

    scripts/bench plan --models checkpoints/qwen3-6l checkpoints/olmoe --out benchmarks/DATE-plan.md

Before each model the machine is probed (OFFMOE_CACHE keeps the figures), and the drive and the memory (bfloat16
experts) again right before and right after each run: what they do changes by the minute where others use them too. The
model then runs warm, with all experts in RAM and with slots for half of them; give --prefill a prompt that fills a
prefill chunk, or the predicted peak is not reached. With --rounds the row is of the round whose ratio of predicted to
measured speed is the median.

Hit rates are those of the run's own counters (what was fetched ahead and used counts as a miss), so that the prediction
is held against bandwidths and arithmetic and not against random weights' routing; the prediction with the family's
published hit rates is beside it, and the one with the drive's speed in the run itself, which tells the model's error
from the drive's weather. A table goes to stderr, one JSON object to stdout, last.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchlib.command_line import make_parser
from benchlib.machine import describe_machine, describe_versions
from benchlib.report import without_folders
from offmoe.checkpoint.locate import locate_model
from offmoe.core.config import make_config
from offmoe.kernels.cpu.loader import load_cpu_kernels
from offmoe.machine.record import DriveSpeed, MachineRecord, read_record
from offmoe.planner.hit_rates import HitCurve
from offmoe.planner.make_plan import run_plan
from offmoe.planner.model_facts import ModelFacts, read_facts
from offmoe.planner.predict import predict
from offmoe.probe.probe import largest_file
from offmoe.probe.sample_experts import SampleExperts
from offmoe.probe.speeds import drive_speed

ROOT = Path(__file__).parents[3]
COLUMNS = ("model", "slots", "peak predicted GiB", "measured GiB", "ratio", "hits", "tok/s predicted", "measured",
           "ratio", "all rounds", "memory GB/s probed", "beside the run", "drive", "in the run", "ratio with that",
           "tok/s with published hits")  # fmt: skip
# Smaller experts come at the drive's latency, which is in what a layer that fetches takes, not at a rate.
LEAST_BYTES = 1 << 20
DRIVE_S = 0.7


def main(argv: Sequence[str]) -> int:
    """Command line entry; returns the exit code."""
    command = list(argv)
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="*", default=[], help="folders beside the bundled model")
    parser.add_argument("--shares", default="1.0,0.5", help="of the experts in RAM (default: %(default)s)")
    parser.add_argument("--context-length", type=int, default=2048)
    parser.add_argument("--prefill", type=int, default=1900)
    parser.add_argument("--decode", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1, help="of probe and runs; medians (default: %(default)s)")
    parser.add_argument("--no-demo", action="store_true", help="without the bundled model")
    parser.add_argument("--no-probe", action="store_true", help="with the figures that are kept")
    parser.add_argument("--out", type=Path, help="also write a result file")
    args = parser.parse_args(command)
    found, records = [], []
    for model in (*([] if args.no_demo else [None]), *args.models):
        runs = []
        for _ in range(args.rounds):
            if not args.no_probe:
                offmoe("probe", "--refresh", "--json", *(("--model", model) if model else ()))
            record = read_record()
            if record is None:
                print("error: no figures of this machine; leave out --no-probe", file=sys.stderr)
                return 2
            records.append(record)
            runs += [compare(model, float(share), args, record) for share in args.shares.split(",")]
        found += [middle([run for run in runs if run["slots"] == slots]) for slots in {run["slots"]: 0 for run in runs}]
    print("\n".join(table(found)), file=sys.stderr)
    if args.out is not None:
        args.out.write_text(report(found, records, command))
    machines = [record.as_dict() for record in records]
    print(json.dumps({"bench": "plan", "machines": machines, "records": found}))
    return 0


def middle(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run whose prediction over what was measured is the median, with the ratios of all."""
    ordered = sorted(runs, key=ratio)
    return {**ordered[len(ordered) // 2], "ratios": [round(ratio(run), 3) for run in ordered]}


def ratio(run: dict[str, Any]) -> float:
    """Predicted speed over measured."""
    return float(run["predicted_tok_per_s"] / run["measured_tok_per_s"])


def compare(model: str | None, share: float, args: argparse.Namespace, record: MachineRecord) -> dict[str, Any]:
    """One run, and what was predicted of it."""
    num_experts = read_facts(locate_model(model), direct=True).sizes.num_experts
    slots = max(1, round(share * num_experts))
    options = {"expert_slots": slots, "context_length": args.context_length, "device": "cpu"}
    plan = run_plan(model, make_config(**options), prompt_tokens=min(args.prefill, args.context_length))
    memory = plan.memory
    if memory is None or plan.prediction is None:
        raise SystemExit(f"error: {plan.line()}")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    ids = [] if model is None else [f"--ids={Path(model) / 'ids.json'}"]
    file = largest_file(locate_model(model))
    assert file is not None, "a model has a file"
    before, memory_before = drive_speed(file, most_s=DRIVE_S), memory_speed()
    run = offmoe(
        "bench", *([model] if model else []), *flags, *ids, f"--prefill={args.prefill}", f"--decode={args.decode}",
        "--warm", "--json",
    )  # fmt: skip
    bytes_per_s = fmean((memory_before, memory_speed()))
    drive = mean_speed(before, drive_speed(file, most_s=DRIVE_S))
    near = with_memory(record, bytes_per_s)
    hit_rate = kept_share(run, plan.facts)
    curve = HitCurve(at=lambda num_slots: hit_rate, source="measured")

    def predicted(speed: DriveSpeed) -> float:
        return predict(
            plan.facts, memory, near, curve, drive=speed, direct=make_config().io != "buffered",
            prompt_tokens=args.prefill, context_length=2 * args.prefill + args.decode,
        ).decode_tok_per_s  # fmt: skip

    in_run, by_run = run["disk_bytes_per_s"], None
    if in_run and plan.facts.expert_bytes >= LEAST_BYTES:
        by_run = predicted(DriveSpeed(direct_bytes_per_s=in_run, buffered_bytes_per_s=in_run))
    return {
        "model": plan.facts.name, "slots": options["expert_slots"], "experts": num_experts,
        "predicted_peak_bytes": memory.expected_bytes, "measured_peak_bytes": run["peak_rss_growth_bytes"],
        "hit_rate": hit_rate, "predicted_tok_per_s": predicted(drive), "predicted_with_run_tok_per_s": by_run,
        "measured_tok_per_s": run["decode_tok_per_s"], "published_tok_per_s": plan.prediction.decode_tok_per_s,
        "probed_memory_bytes_per_s": record.cpu_rate("bf16"), "memory_bytes_per_s": bytes_per_s,
        "drive_bytes_per_s": drive.direct_bytes_per_s or drive.buffered_bytes_per_s, "run_bytes_per_s": in_run,
    }  # fmt: skip


def memory_speed() -> float:
    """Bytes a second of bfloat16 experts, by the kernels if there are any."""
    kernels, _ = load_cpu_kernels()
    experts = SampleExperts(None)
    try:
        return experts.bytes_per_s(kernels)
    finally:
        experts.close()
        if kernels is not None:
            kernels.close()


def with_memory(record: MachineRecord, bytes_per_s: float) -> MachineRecord:
    """As if plain experts had been read so fast by the probe, and memory accordingly."""
    share = bytes_per_s / record.cpu_rate("bf16")
    return replace(
        record, read_bytes_per_s=share * record.read_bytes_per_s,
        cpu_bytes_per_s={**record.cpu_bytes_per_s, "bf16": bytes_per_s},
    )  # fmt: skip


def mean_speed(*speeds: DriveSpeed) -> DriveSpeed:
    """Of a drive that was measured several times."""
    direct, buffered = (
        [value for value in values if value]
        for values in zip(*((s.direct_bytes_per_s, s.buffered_bytes_per_s) for s in speeds), strict=True)
    )
    return DriveSpeed(
        direct_bytes_per_s=fmean(direct) if direct else None, buffered_bytes_per_s=fmean(buffered) if buffered else None
    )


def kept_share(run: dict[str, Any], facts: ModelFacts) -> float:
    """Of the experts that a token used, by bytes: those that were in memory and had not been fetched ahead for it."""
    ahead = run["ahead_bytes_per_token"]
    used: float = run["disk_bytes_per_token"] - ahead + (run["prefetch_useful"] or 0.0) * ahead
    return max(0.0, 1 - used / facts.routed_bytes)


def offmoe(*arguments: str) -> dict[str, Any]:
    """The JSON that a command prints last, from a process of its own."""
    done = subprocess.run([sys.executable, "-m", "offmoe", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: offmoe {arguments[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """As Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for one in found:
        peaks = one["predicted_peak_bytes"], one["measured_peak_bytes"]
        measured, with_run = one["measured_tok_per_s"], one["predicted_with_run_tok_per_s"]
        cells = [
            one["model"], f"{one['slots']} of {one['experts']}", f"{peaks[0] / 2**30:.3f}", f"{peaks[1] / 2**30:.3f}",
            f"{peaks[0] / peaks[1]:.3f}", f"{one['hit_rate']:.0%}", f"{one['predicted_tok_per_s']:.1f}",
            f"{measured:.1f}", f"{ratio(one):.2f}", ", ".join(f"{each:.2f}" for each in one["ratios"]),
            f"{one['probed_memory_bytes_per_s'] / 1e9:.1f}", f"{one['memory_bytes_per_s'] / 1e9:.1f}",
            f"{one['drive_bytes_per_s'] / 1e9:.2f}",
            f"{one['run_bytes_per_s'] / 1e9:.2f}" if one["run_bytes_per_s"] else "-",
            f"{with_run / measured:.2f}" if with_run else "-", f"{one['published_tok_per_s']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(found: Sequence[dict[str, Any]], records: Sequence[MachineRecord], command: Sequence[str]) -> str:
    """The result file."""
    return "\n".join([
        "# Plans against runs",
        "",
        f"- command: `{shlex.join(['scripts/bench', 'plan', *without_folders(command)])}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in describe_machine().items())}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in describe_versions(ROOT).items())}",
        *[f"- probe: {probe_line(record)}" for record in records],
        "",
        *table(found),
        "",
    ])  # fmt: skip


def probe_line(record: MachineRecord) -> str:
    """What the predictions stand on."""
    rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in record.cpu_bytes_per_s.items())
    disk = " / ".join(f"{(drive.direct_bytes_per_s or 0) / 1e9:.2f}" for drive in record.drives.values())
    layers = record.layers
    return (
        f"read {record.read_bytes_per_s / 1e9:.1f} GB/s; experts (GB/s) {rates}; drive {disk}; a layer "
        f"{layers.whole_s * 1e3:.3f} ms by the kernels, a token {layers.whole_token_s * 1e3:.3f} beside; "
        f"{layers.modules_s * 1e3:.3f} by modules, {layers.token_s * 1e3:.3f} beside; while experts are missing "
        f"{layers.watched_s * 1e3:.2f} more, a layer that fetches {layers.fetch_s * 1e3:.2f}"
    )
