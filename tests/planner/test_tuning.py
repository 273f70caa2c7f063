"""Curves, knee, costs: arithmetic on traces that were made up; and how they are shown at any width."""

from __future__ import annotations

import re
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from makers import one_line

from offmoe.cache.policy import POLICY_NAMES
from offmoe.cache.replay import layer_calls, replay_belady, replay_calls
from offmoe.core.errors import OutputError, TraceError, UsageError
from offmoe.machine.costs import TokenSample
from offmoe.planner.tuning import Curves, TokenCosts, curve_sizes, knee, make_curves, token_costs
from offmoe.report.curves import chart_lines, table_lines
from offmoe.report.plot import check_plot, write_plot
from offmoe.trace.file import Trace, TraceHeader
from offmoe.trace.recorder import TraceEvent

HEADER = TraceHeader(
    model="made up", model_hash="0" * 64, experts_per_layer=(16, 16), top_k=2, expert_bytes=(1_000_000, 1_000_000),
    created="2026-01-01T00:00:00+00:00",
)  # fmt: skip


def made_up(num_tokens: int = 200) -> Trace:
    """Two layers; a few experts are used often, and which ones changes."""
    state, events = 12345, [TraceEvent(layer, 2, True, array("H", [0, 1, 2, 3])) for layer in (0, 1)]
    for token in range(num_tokens):
        for layer_idx in (0, 1):
            ids: list[int] = []
            while len(ids) < 2:
                state = (1103515245 * state + 12345) % 2**31
                near = state % 100 < 70
                idx = (token // 60 * 5 + (state >> 8) % 4) % 16 if near else (state >> 8) % 16
                ids += [idx] if idx not in ids else []
            events.append(TraceEvent(layer_idx, 2, False, array("H", ids)))
    return Trace(header=HEADER, events=events, prompt_starts=[0], is_complete=True)


@pytest.fixture(scope="module")
def curves() -> Curves:
    return make_curves(made_up(), costs=TokenCosts(fixed_s=0.01, fetch_bytes_per_s=1e8, waiting_call_s=0.002), fit=12)


def test_a_token_costs_its_fixed_time_and_what_it_fetches() -> None:
    """Made of 10 ms a token, 1 ms a call that fetches, and 100 kB/s; and one token during which the machine slept."""
    made = [(0, 0), (1000, 1), (3000, 2), (4000, 2)]
    samples = [TokenSample(0.01 + size / 1e5 + calls / 1e3, size / 1e5, size, calls) for size, calls in made]
    costs = token_costs([*samples, TokenSample(9.0, 8.0, 7, 9)])
    assert costs is not None
    assert costs.fixed_s == pytest.approx(0.01) and costs.waiting_call_s == pytest.approx(0.001)
    assert costs.fetch_bytes_per_s == pytest.approx(1e5)
    assert costs.tok_per_s(0) == pytest.approx(100)
    assert costs.tok_per_s(2000, 3) == pytest.approx(1 / (0.01 + 0.02 + 0.003))
    same = token_costs([TokenSample(0.02, 0.01, 1000, 2)] * 3)
    assert same == TokenCosts(fixed_s=pytest.approx(0.01), fetch_bytes_per_s=pytest.approx(1e5))
    steep = token_costs([TokenSample(0.02, 0.01, 1000, 3), TokenSample(0.05, 0.01, 1000, 4)])
    assert steep is not None and steep.fixed_s == pytest.approx(0.01), "never less than the fastest token's work"
    assert steep.tok_per_s(1000, 3.5) == pytest.approx(1 / 0.035)
    assert token_costs([]) is None
    assert token_costs([TokenSample(0.02, 0.0, 0, 0)]) is None


def test_curves_hold_what_replays_give(curves: Curves) -> None:
    calls = layer_calls(made_up().events)
    assert curves.num_tokens == 200 and curves.num_experts == 32 and curves.fit == 12
    assert curves.sizes == curve_sizes(32, top_k=2, fit=12) and {2, 8, 12, 32} <= set(curves.sizes)
    for size in (2, 12, 32):
        found = replay_calls(calls, curves.adopted, size, top_k=2, expert_bytes=HEADER.expert_bytes).decode
        point = curves.at(curves.adopted, size)
        assert point.hit_rate == found.hit_rate and point.missed_bytes_per_token == found.missed_bytes / 200
        waiting_s = found.waiting_calls / 200 * 0.002
        assert point.tok_per_s == pytest.approx(1 / (0.01 + point.missed_bytes_per_token / 1e8 + waiting_s))
        assert curves.at("belady", size).hit_rate == replay_belady(calls, size, HEADER.expert_bytes).decode.hit_rate
    least = {name: replay_calls(calls, name, 12, top_k=2, expert_bytes=HEADER.expert_bytes) for name in POLICY_NAMES}
    assert least[curves.adopted].decode.missed_bytes == min(one.decode.missed_bytes for one in least.values())
    for points in curves.by_policy.values():
        rates = [point.hit_rate for point in points]
        assert rates[-1] > 0.9 and rates[0] < 0.5
    assert curves.knee in curves.sizes and 2 < curves.knee < 32


def test_a_trace_of_prompts_alone_has_no_curve() -> None:
    with pytest.raises(TraceError, match=r"prompts only, no decoded token"):
        make_curves(made_up(0), costs=None)


def test_the_knee_is_where_more_brings_less() -> None:
    assert knee([0, 1, 2, 3, 4], [0, 6, 9, 9.5, 10]) == 2
    assert knee([0, 5, 10], [0.0, 0.5, 1.0]) == 10
    assert knee([0, 5, 10], [0.0, 0.1, 1.0]) == 10
    assert knee([4, 8], [1.0, 1.0]) == 4


@given(st.integers(1, 500), st.integers(1, 16), st.none() | st.integers(1, 600))
def test_sizes_ascend_from_one_layers_choices_to_all(num_experts: int, top_k: int, fit: int | None) -> None:
    sizes = curve_sizes(num_experts, top_k=top_k, fit=fit)
    assert sizes == sorted(set(sizes)) and sizes[-1] == num_experts
    assert fit is None or min(fit, num_experts) in sizes


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_table_and_chart_fit_any_terminal(curves: Curves, width: int) -> None:
    table, chart = table_lines(curves, width), chart_lines(curves, width)
    allowed = max(width, 34)  # below this even the least does not fit
    assert max(map(len, [*table, *chart])) <= allowed, "\n".join([*table, *chart])
    assert len(table) == 1 + len(curves.sizes)
    assert [int(line.split()[0]) for line in table[1:]] == curves.sizes
    assert table[0].split()[0] == "slots" and ("belady" in table[0]) == (
        width >= (40 if curves.adopted == "lru" else 60)
    )
    marked = {word: int(line.split()[0]) for line in table[1:] for word in ("knee", "fits") if word in line}
    assert marked == {"knee": curves.knee, "fits": curves.fit}
    assert all(line.isascii() for line in [*table, *chart])
    assert "B" in chart[0] and "0%" in chart[10] and f"fits {curves.fit}" in " ".join(chart)


def test_colours_are_painted_over_the_same_characters(curves: Curves) -> None:
    painted = chart_lines(curves, 80, colour=lambda text, name: f"<{name}>{text}</>")
    assert "<yellow>B</>" in painted[0]
    assert [re.sub(r"<[^>]*>", "", line) for line in painted] == chart_lines(curves, 80)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_is_drawn(curves: Curves, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot{suffix}"
    check_plot(path)
    write_plot(curves, "made up", path)
    data = path.read_bytes()
    if suffix == ".png":
        assert data.startswith(b"\x89PNG") and len(data) > 20_000
    else:
        assert b"<svg" in data
    with pytest.raises(OutputError, match="cannot be written"):
        write_plot(curves, "made up", path / path.name)


def test_a_picture_of_another_kind_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"neither \.png nor \.svg"):
        check_plot(Path("a.pdf"))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UsageError) as caught:
        check_plot(Path("a.png"))
    assert "pip install 'offmoe[plot]'" in one_line(caught)
