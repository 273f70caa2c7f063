"""Hit rate and speed against cache size, for a terminal of any width: a table and a chart in plain characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offmoe.core.units import format_bytes, format_percent
from offmoe.planner.tuning import BOUND, Curves, Point

MIN_WIDTH, MAX_WIDTH = 30, 100
CHART_ROWS = 11
# Drawn in this order, so what comes later is seen where points fall together.
_MARKS = ("B", "L", "A")
COLOURS = {"B": "yellow", "L": "cyan", "A": "green"}


def shown_policies(curves: Curves) -> dict[str, str]:
    """Mark -> policy: LRU, the adopted one (unless that is LRU), Belady's bound."""
    shown = {"L": "lru"}
    if curves.adopted != "lru":
        shown["A"] = curves.adopted
    return {**shown, "B": BOUND}


def table_lines(curves: Curves, width: int) -> list[str]:
    """A row a size; columns are left out, least needed first, until a row fits `width`."""
    rows = [_row(curves, size) for size in curves.sizes]
    names = list(rows[0])
    # What may go, in this order. The slots, the adopted policy's hits and its speed stay.
    dispensable = ["memory", f"{BOUND} tok/s", "lru tok/s", "MB/token", BOUND]
    dispensable += ["lru"] if curves.adopted != "lru" else []
    while True:
        widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
        if sum(widths) + 2 * (len(widths) - 1) <= width:
            break
        gone = next((name for name in dispensable if name in names), None)
        if gone is None:
            break
        names.remove(gone)
    lines = ["  ".join(name.rjust(n) for name, n in zip(names, widths, strict=True))]
    lines += ["  ".join(row[name].rjust(n) for name, n in zip(names, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]


def _row(curves: Curves, size: int) -> dict[str, str]:
    shown = shown_policies(curves)
    points = {name: curves.at(name, size) for name in shown.values()}
    adopted = points[curves.adopted]
    marks = [name for name, at in (("knee", curves.knee), ("fits", curves.fit)) if at == size]
    row = {"slots": str(size), "memory": format_bytes(size * curves.slot_bytes)}
    row |= {name: format_percent(point.hit_rate) for name, point in points.items()}
    row["MB/token"] = f"{adopted.missed_bytes_per_token / 1e6:.4g}"
    for name, point in sorted(points.items(), key=lambda item: item[0] != curves.adopted):
        if point.tok_per_s is not None:
            speed = f"{point.tok_per_s:.1f}" if point.tok_per_s >= 10 else f"{point.tok_per_s:.2f}"
            row["tok/s" if name == curves.adopted else f"{name} tok/s"] = speed
    row[""] = "+".join(marks)
    return row


def chart_lines(
    curves: Curves, width: int, *, colour: Callable[[str, str], str] = lambda text, colour: text
) -> list[str]:
    """Hit rate against slots. `colour(text, name)` paints a mark."""
    width = max(MIN_WIDTH, min(MAX_WIDTH, width))
    num_columns = width - 7
    columns = {size: round(size / curves.num_experts * (num_columns - 1)) for size in curves.sizes}
    grid = [[" "] * num_columns for _ in range(CHART_ROWS)]
    for size in (curves.knee, curves.fit):
        if size is not None:
            for row in grid:
                row[columns[size]] = ":" if size == curves.knee else "|"
    shown = shown_policies(curves)
    for mark in _MARKS:
        if mark in shown:
            _draw(grid, curves.by_policy[shown[mark]], columns, mark)
    lines = []
    for row_idx, row in enumerate(grid):
        share = 1 - row_idx / (CHART_ROWS - 1)
        label = f"{share:>4.0%} " if row_idx % 2 == 0 else "     "
        painted = "".join(colour(mark, COLOURS[mark]) if mark in COLOURS else mark for mark in row)
        lines.append(f"{label}|{painted}".rstrip())
    lines.append("     +" + "-" * num_columns)
    left, right = "0", f"{curves.num_experts} slots"
    lines.append("      " + left + right.rjust(num_columns - len(left)))
    return lines + _legend(curves, shown, width, colour)


def _draw(grid: list[list[str]], points: Sequence[Point], columns: dict[int, int], mark: str) -> None:
    """Straight lines from point to point."""
    for before, after in zip(points, points[1:], strict=False):
        begin, end = columns[before.num_slots], columns[after.num_slots]
        for column in range(begin, end + 1):
            share = (column - begin) / (end - begin) if end > begin else 1.0
            rate = before.hit_rate + share * (after.hit_rate - before.hit_rate)
            grid[round((1 - rate) * (CHART_ROWS - 1))][column] = mark


def _legend(curves: Curves, shown: dict[str, str], width: int, colour: Callable[[str, str], str]) -> list[str]:
    items = [(mark, f"{mark} {name}" + (" (bound)" if name == BOUND else "")) for mark, name in shown.items()]
    items.append((":", f": knee {curves.knee}"))
    if curves.fit is not None and curves.fit != curves.knee:
        items.append(("|", f"| fits {curves.fit}"))
    lines, length = ["      "], 6
    for mark, text in items:
        if length + len(text) > width and length > 6:
            lines.append("      ")
            length = 6
        lines[-1] += (colour(mark, COLOURS[mark]) if mark in COLOURS else mark) + text[1:] + "  "
        length += len(text) + 2
    return [line.rstrip() for line in lines]
