"""The same curves as a picture, PNG or SVG, by matplotlib where that is installed."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from offmoe.core.errors import OutputError, UsageError
from offmoe.core.files import check_output, write_whole
from offmoe.core.units import format_bytes
from offmoe.planner.tuning import BOUND, Curves
from offmoe.report.curves import shown_policies

SUFFIXES = (".png", ".svg")
_MARK = "offmoe, by matplotlib"
# Told apart without colour too: by dashes and markers.
_LOOKS: dict[str, dict[str, Any]] = {
    "L": {"color": "#3b75af", "marker": "o"},
    "A": {"color": "#2a8a4a", "marker": "s"},
    "B": {"color": "#c07a00", "marker": "^", "linestyle": "--"},
}


def check_plot(path: Path, *, overwrite: bool = False) -> None:
    """Raise UsageError now, not after minutes, for a file that could not be plotted."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path} is neither .png nor .svg; choose one of the two")
    check_output(path, "a plot of offmoe's", _is_plot, overwrite=overwrite)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "--plot needs matplotlib: pip install 'offmoe[plot]'; the chart in the terminal needs nothing"
        ) from None


def _is_plot(path: Path) -> bool:
    """A picture that offmoe has drawn: its name is among the first lines."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return _MARK.encode() in file.read(1 << 12)
    return False


def write_plot(curves: Curves, title: str, path: Path) -> None:
    """Hit rate, and where it is known speed, against the memory for expert slots. Raises OutputError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    has_speed = curves.by_policy[BOUND][0].tok_per_s is not None
    figure = Figure(figsize=(11 if has_speed else 6.5, 4.6), layout="constrained")
    axes = figure.subplots(1, 2 if has_speed else 1, squeeze=False)[0]
    _draw(axes[0], curves, lambda point: point.hit_rate)
    axes[0].set_ylim(0, 1.03)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0].set_title("Hit rate while decoding", fontsize=11)
    if has_speed:
        _draw(axes[1], curves, lambda point: point.tok_per_s)
        axes[1].set_ylim(bottom=0)
        axes[1].set_title("Predicted tokens a second, without prefetching", fontsize=11)
    for ax in axes:
        ax.set_xlim(0, curves.num_experts)
        ax.set_xlabel(f"expert slots (of {curves.num_experts}, {format_bytes(curves.slot_bytes)} each)")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(loc="lower right", frameon=True, framealpha=0.95, edgecolor="none", fontsize=9)
    figure.suptitle(title, fontsize=12)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = io.BytesIO()
        kind = path.suffix.lower().removeprefix(".")
        figure.savefig(drawn, dpi=150, format=kind, metadata={"Creator" if kind == "svg" else "Software": _MARK})
        write_whole(path, drawn.getvalue())
    except OSError as error:
        raise OutputError(f"the plot {path} cannot be written: {error.strerror or error}") from None


def _draw(ax: Any, curves: Curves, value: Any) -> None:
    for mark, name in shown_policies(curves).items():
        points = curves.by_policy[name]
        label = "Belady (no policy can do better)" if name == BOUND else name
        ax.plot(
            [point.num_slots for point in points], [value(point) for point in points], label=label,
            markersize=4, linewidth=1.6, clip_on=False, zorder=3, **_LOOKS[mark],
        )  # fmt: skip
    ax.axvline(curves.knee, color="#888888", linestyle=":", linewidth=1.4, label=f"knee: {curves.knee} slots")
    if curves.fit is not None and curves.fit != curves.knee:
        ax.axvline(curves.fit, color="#b03030", linewidth=1.4, label=f"fits: {curves.fit} slots")
