"""Tables of `inspect` and others: a table on a terminal, aligned plain text in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from offmoe.core.units import format_bytes
from offmoe.planner.inspect import Inspection
from offmoe.planner.packed_sample import PackedSample


def print_pairs(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A two-column table to stdout."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        for name, value in rows:
            table.add_row(f"[dim]{name}[/dim]", value)
        Console().print(table)
        return
    width = max(len(name) for name, _ in rows)
    lines = [title, *(f"{name:<{width}}  {value}" for name, value in rows)]
    sys.stdout.write("\n".join(lines) + "\n")


def _packed(sample: PackedSample) -> str:
    share = 100 * sample.escape_share
    return f"{sample.bits:.2f} bits a weight without loss, {share:.3f}% escapes (of {sample.num_weights} weights)"


def inspection_rows(inspect_checkpoint: Inspection) -> list[tuple[str, str]]:
    """The lines of `offmoe inspect`."""
    s = inspect_checkpoint
    formats = ", ".join(f"{name} {format_bytes(size)}" for name, size in s.formats.items())
    return [
        ("architecture", f"{s.architecture} ({s.model_type})"),
        ("layers", f"{s.num_layers}, of which {s.num_moe_layers} with experts"),
        ("experts", f"{s.experts_per_layer} a layer, top-{s.top_k}; {s.num_moe_layers * s.experts_per_layer} in all"),
        ("one expert", f"{format_bytes(s.expert_bytes)} ({s.expert_bytes} bytes), {s.layout}"),
        ("all experts", format_bytes(s.experts_total_bytes)),
        ("resident", f"{format_bytes(s.resident_bytes)} (attention, norms, routers, shared experts, embeddings)"),
        *([("not loaded", f"{format_bytes(s.unused_bytes)} (guessing ahead, twice there)")] if s.unused_bytes else []),
        ("read per token", f"{format_bytes(s.bytes_per_token)} of experts when nothing is cached"),
        ("on disk", f"{format_bytes(s.total_bytes)} in {s.num_files} files, {s.num_tensors} tensors"),
        ("formats", formats),
        *([("packed", _packed(s.packed))] if s.packed is not None else []),
        ("context", f"{s.context_length} tokens" if s.context_length else "not stated"),
    ]
