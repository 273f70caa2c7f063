"""Sizes as people write them, and numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from makers import one_line

from offmoe.core.errors import UsageError
from offmoe.core.units import (
    GIB,
    KIB,
    MIB,
    format_bandwidth,
    format_bytes,
    format_percent,
    format_seconds,
    format_traffic,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0), ("123", 123), ("123B", 123), ("1k", 1000), ("1KB", 1000), ("1KiB", 1024), ("2m", 2_000_000),
        ("2MB", 2_000_000), ("2MiB", 2 * MIB), ("6GiB", 6 * GIB), ("6gib", 6 * GIB), ("6GB", 6 * 10**9),
        ("6g", 6 * 10**9), ("1TB", 10**12), ("1TiB", 1024 * GIB), ("1.5GiB", 3 * GIB // 2), ("1.GiB", GIB),
        (" 6 GiB ", 6 * GIB), ("0.5KiB", 512), (7, 7), (0, 0),
    ],
)  # fmt: skip
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes
    assert type(parse_size(text)) is int


@pytest.mark.parametrize(
    "text",
    ["", " ", "GiB", "six", "6 GiB RAM", "6XB", "-1", "-1GiB", "1e9", "6,5GiB", "1_000", "0x10", ".5GiB", "inf", "nan",
     "6GiB\n6", "9" * 400, "9" * 5000, None, 1.5, True, b"6GiB", [6]],
)  # fmt: skip
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text, name="ram")
    message = one_line(caught)  # what is very long is cut in the middle
    assert message.startswith(f"ram is {text!r}"[:60]) and message.endswith(
        ', not a size; write it like "6GiB" or "6GB"'
    )


def test_negative_bytes() -> None:
    with pytest.raises(UsageError, match="vram is -5 bytes; a size cannot be negative"):
        parse_size(-5, name="vram")


@given(count=st.integers(0, 1 << 40))
def test_whole_units_are_exact(count: int) -> None:
    """A budget that an error message names must mean the same when it is typed back."""
    assert parse_size(f"{count}") == count
    assert parse_size(f"{count}MiB") == count * MIB


@given(text=st.text(max_size=12))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except UsageError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"), (9, "9 B"), (1023, "1023 B"), (KIB, "1.0 KiB"), (1536, "1.5 KiB"), (MIB, "1.0 MiB"),
        (312 * MIB, "312.0 MiB"), (GIB, "1.00 GiB"), (3 * GIB // 2, "1.50 GiB"), (4096 * GIB, "4096.00 GiB"),
        (-2 * MIB, "-2.0 MiB"),
    ],
)  # fmt: skip
def test_capacity_is_binary(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(1.2e9, "1.20 GB/s"), (1e9, "1.00 GB/s"), (85e6, "85.0 MB/s"), (0, "0.0 MB/s")]
)
def test_bandwidth_is_decimal(rate: float, text: str) -> None:
    assert format_bandwidth(rate) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(1.31e9, "1.31 GB"), (70.2e6, "70.2 MB"), (1e6, "1.0 MB"), (1500, "1.5 kB"), (0, "0.0 kB")]
)
def test_traffic_is_decimal(num_bytes: float, text: str) -> None:
    assert format_traffic(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.085, "85 ms"),
        (1, "1.0 s"),
        (3.24, "3.2 s"),
        (60, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3600, "60 min 00 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("share", "text"), [(0, "0.0%"), (0.8421, "84.2%"), (1, "100.0%")])
def test_shares(share: float, text: str) -> None:
    assert format_percent(share) == text
