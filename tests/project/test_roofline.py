"""The bounds that measured speeds are held against, on numbers worked out by hand."""

from __future__ import annotations

import pytest
from benchlib.roofline import Bandwidths, TokenBytes, decode_bound, prefill_bound, streamed_share
from hypothesis import given
from hypothesis import strategies as st

# Bytes and speeds in round numbers: 100 dense, 800 routed (2 layers, 4 of 100 each).
TOKEN = TokenBytes(dense_bytes=100, expert_bytes=100, num_layers=2, top_k=4)
SPEEDS = Bandwidths(
    device_bytes_per_s=1000, link_bytes_per_s=100, cpu_bytes_per_s=300, host_bytes_per_s=500, device_flops=1e6
)


def test_all_hits_read_device_memory_alone() -> None:
    bound = decode_bound(TOKEN, SPEEDS, hit_rate=1, miss="auto")
    assert bound.seconds == pytest.approx(0.9)
    assert (bound.limit, bound.link_s, bound.cpu_s, bound.host_s) == ("gpu", 0, 0, 0)


def test_streamed_misses_take_the_link() -> None:
    bound = decode_bound(TOKEN, SPEEDS, hit_rate=0.5, miss="stream")
    assert bound.link_s == pytest.approx(4)
    assert bound.gpu_s == pytest.approx(0.5)  # dense and hits
    assert bound.host_s == pytest.approx(0.8)
    assert (bound.limit, bound.tok_per_s) == ("link", pytest.approx(0.25))


def test_misses_on_the_cpu_leave_link_and_device_alone() -> None:
    bound = decode_bound(TOKEN, SPEEDS, hit_rate=0.5, miss="cpu")
    assert (bound.link_s, bound.cpu_s) == (0, pytest.approx(400 / 300))
    assert bound.gpu_s == pytest.approx(0.5)


def test_the_best_split_ends_link_and_cpu_together() -> None:
    assert streamed_share("auto", SPEEDS) == 0.25
    bound = decode_bound(TOKEN, SPEEDS, hit_rate=0, miss="auto")
    assert bound.link_s == pytest.approx(bound.cpu_s) == pytest.approx(2)


def test_a_layer_costs_something_whatever_it_reads() -> None:
    slow = Bandwidths(**{**SPEEDS.as_dict(), "layer_s": 0.5})
    assert decode_bound(TOKEN, slow, hit_rate=1, miss="auto").seconds == pytest.approx(1.9)


def test_prefill_is_bound_by_the_link_or_by_arithmetic() -> None:
    short = prefill_bound(TOKEN, SPEEDS, num_tokens=10, link_bytes=1000)
    assert (short.limit, short.seconds) == ("link", pytest.approx(10))
    long = prefill_bound(TOKEN, SPEEDS, num_tokens=100_000, link_bytes=1000)
    assert (long.limit, long.seconds) == ("gpu", pytest.approx(2 * 450 * 100_000 / 1e6))


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="known: auto, stream, cpu"):
        streamed_share("never", SPEEDS)
    with pytest.raises(ValueError, match="between 0 and 1"):
        decode_bound(TOKEN, SPEEDS, hit_rate=1.5, miss="auto")


@given(hit_rate=st.floats(0, 1), link=st.floats(1e6, 1e12), cpu=st.floats(1e6, 1e12))
def test_auto_is_never_below_the_better_fixed_choice(hit_rate: float, link: float, cpu: float) -> None:
    """Counting the misses alone: the split is chosen for link and CPU, device memory is far from the limit."""
    speeds = Bandwidths(
        device_bytes_per_s=1e18, link_bytes_per_s=link, cpu_bytes_per_s=cpu, host_bytes_per_s=1e18, device_flops=1
    )
    auto, stream, on_cpu = (
        decode_bound(TOKEN, speeds, hit_rate=hit_rate, miss=miss) for miss in ("auto", "stream", "cpu")
    )
    assert auto.seconds <= min(stream.seconds, on_cpu.seconds) * (1 + 1e-6)
