"""The records of `scripts/bench device` as tables for people. Pure: knows records, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchlib.report import number

Record = dict[str, Any]
LEGEND = (
    "decode tok/s: median over tokens of all rounds, systems in turns; bound: bytes over bandwidths measured alone "
    "(scripts/benchlib/roofline.py), at the share of needed experts that had not to move (kept); share: of that bound; "
    "auto: prefetch and miss as by default, not compiled; to auto: how many times faster than that in the same rounds; "
    "link: bytes copied to the device; peak: the most that torch had reserved, and what the driver's context takes. "
    "Weights are random, ids are those of real text, so routing is that of random routers; shapes and bytes are true."
)


def device_tables(records: Sequence[Record]) -> list[str]:
    """Markdown lines: bandwidths, memory, decode, prefill, exactness, and what failed or was left out."""
    lines = [*_bandwidths(records), *_models(records)]
    lines += _section("Decode", DECODE, [_decode_row(record) for record in _of(records, "decode")])
    lines += _section("Prefill", PREFILL, [_prefill_row(record) for record in _of(records, "prefill")])
    lines += _section("Peak VRAM", MEMORY, [_memory_row(record) for record in _of(records, "memory")])
    lines += _section("Same ids as the CPU", EXACT, [_exact_row(record) for record in _of(records, "exact")])
    lines += targets(records)
    for kind, title in (("failure", "Failed"), ("skipped", "Left out")):
        found = _of(records, kind)
        if found:
            lines += ["", f"### {title}", ""]
            lines += [f"- {record['where']}: {record.get('error') or record.get('why')}" for record in found]
    return lines


DECODE = (
    "model", "experts in VRAM", "system", "tok/s", "to auto", "bound", "share", "limit", "hits", "kept",
    "link MB/token", "CPU experts/token", "syncs/token",
)  # fmt: skip
PREFILL = ("model", "experts in VRAM", "system", "tokens", "tok/s", "bound", "share", "link GB", "link busy")
MEMORY = ("model", "experts in VRAM", "slots", "budget MiB", "planned MiB", "peak MiB", "torch allocated MiB",
          "driver says MiB", "within")  # fmt: skip
EXACT = ("case", "dtype", "experts in VRAM", "ids", "as on the CPU", "as at the first size", "as must be")


def targets(records: Sequence[Record]) -> list[str]:
    """What was aimed for, and whether it was reached."""
    lines: list[str] = []
    best: dict[tuple[str, float], float] = {}
    fastest: dict[tuple[str, float], float] = {}
    for record in _of(records, "decode"):
        if "counts" in record:
            key = (record["model"], record["share"])
            best[key] = max(best.get(key, 0.0), record["roofline_share"])
            fastest[key] = max(fastest.get(key, 0.0), record["tok_per_s"])
    for (model, share), reached in best.items():
        lines.append(_target(f"{model} {share:.0%}: share of the decode bound, best setting", reached, 0.75, ""))
    for record in _of(records, "decode"):
        if "counts" not in record:  # a peer: against the fastest of our settings in the same rounds
            faster = fastest[record["model"], record["share"]] / record["tok_per_s"]
            wanted = 20 if "accelerate" in record["setting"] else 2
            lines.append(_target(f"{record['model']} {record['share']:.0%}: faster than {record['setting']}",
                                 faster, wanted, "x"))  # fmt: skip
    for record in _of(records, "prefill"):
        if record["setting"] == "auto" and record["limit"] == "link":
            what = f"{record['model']} {record['share']:.0%}: share of the link bound, prefill of {record['tokens']}"
            lines.append(_target(what, record["roofline_share"], 0.85, ""))
    return ["", "### Targets", "", *lines] if lines else []


def _target(what: str, reached: float, wanted: float, unit: str) -> str:
    return f"- {what}: {reached:.2f}{unit} of {wanted:g}{unit}, {'reached' if reached >= wanted else 'NOT reached'}"


def _of(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _section(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = ["", f"### {title}", "", "| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _bandwidths(records: Sequence[Record]) -> list[str]:
    found = _of(records, "bandwidths")
    if not found:
        return []
    speeds = found[0]
    return [
        f"Measured alone: device copy {speeds['device_bytes_per_s'] / 1e9:.0f} GB/s (read plus written), link "
        f"{speeds['link_bytes_per_s'] / 1e9:.1f} GB/s, experts on the CPU {speeds['cpu_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"host memory {speeds['host_bytes_per_s'] / 1e9:.1f} GB/s, bfloat16 products "
        f"{speeds['device_flops'] / 1e12:.0f} TFLOP/s, a round trip to the device {speeds['layer_s'] * 1e6:.0f} us."
    ]


def _models(records: Sequence[Record]) -> list[str]:
    return [
        f"- {r['model']}: {r['layers']} layers, {r['dtype']}, {r['experts']} experts a layer, top-{r['top_k']}, "
        f"{r['all_experts_bytes'] / 1e9:.2f} GB of experts, {r['resident_bytes'] / 1e9:.2f} GB resident"
        for r in _of(records, "model")
    ]


def _decode_row(record: Record) -> list[str]:
    link, counts = record.get("link_bytes_per_token"), record.get("counts", {})
    syncs = counts["syncs"] / record["num_tokens"] if "syncs" in counts else None
    return [
        record["model"], f"{record['share']:.0%}", record["setting"], number(record["tok_per_s"], 1),
        number(record["speed_to_first"], 2), number(record.get("bound_tok_per_s"), 1),
        number(record.get("roofline_share"), 2), record.get("limit", "-"), number(record.get("hit_rate"), 3),
        number(record.get("kept_rate"), 3), number(None if link is None else link / 1e6, 1),
        number(record.get("cpu_experts_per_token"), 1), number(syncs, 1),
    ]  # fmt: skip


def _prefill_row(record: Record) -> list[str]:
    ours = bool(record["counts"])
    return [
        record["model"], f"{record['share']:.0%}", record["setting"], str(record["tokens"]),
        number(record["tok_per_s"], 0), number(record["bound_tok_per_s"] if ours else None, 0),
        number(record["roofline_share"] if ours else None, 2), number(record["link_bytes"] / 1e9 if ours else None, 2),
        number(record["link_share"] if ours else None, 2),
    ]  # fmt: skip


def _memory_row(record: Record) -> list[str]:
    def mib(name: str) -> str:
        return number(None if record[name] is None else record[name] / (1 << 20), 0)

    return [
        record["model"], f"{record['share']:.0%}", str(record["device_slots"]), mib("vram_bytes"), mib("planned_bytes"),
        mib("peak_bytes"), mib("allocated_bytes"), mib("driver_used_bytes"), "yes" if record["ok"] else "NO",
    ]  # fmt: skip


def _exact_row(record: Record) -> list[str]:
    return [
        record["case"], record["dtype"], f"{record['share']:.0%}", str(record["num_ids"]), str(record["equal_to_cpu"]),
        str(record["equal_to_first_share"]), "yes" if record["ok"] else "NO",
    ]  # fmt: skip
