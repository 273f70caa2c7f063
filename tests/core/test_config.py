"""What a user may set: each option's accepted values, and a line that says so for all others."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from engines import save_tiny
from hypothesis import given
from hypothesis import strategies as st
from makers import one_line

import offmoe
from offmoe.cache.policy import POLICY_NAMES
from offmoe.core.config import OPTION_NAMES, EngineConfig, make_config
from offmoe.core.errors import UsageError
from offmoe.tiers.disk import IO_MODES

COUNTS = ("context_length", "expert_slots", "prefill_chunk")
DEFAULTS = EngineConfig()


def test_nothing_set_is_all_auto() -> None:
    assert make_config() == DEFAULTS
    assert {DEFAULTS.as_dict()[name] for name in ("ram", "vram", *COUNTS)} == {None}


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_none_and_auto_leave_every_choice_to_offmoe(name: str) -> None:
    assert make_config(**{name: None}) == make_config(**{name: "auto"}) == DEFAULTS


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("ram", "6GiB", 6 << 30), ("ram", 1 << 21, 1 << 21),
        ("expert_slots", 7, 7), ("expert_slots", "7", 7), ("expert_slots", 7.0, 7),
        ("context_length", 1 << 20, 1 << 20), ("prefill_chunk", 1, 1), ("policy", "lru", "lru"),
        ("vram", "1.5GiB", 3 << 29), ("device", "cpu", "cpu"), ("device", "cuda", "cuda"),
        ("device", "cuda:1", "cuda:1"),
        ("miss", "stream", "stream"), ("miss", "cpu", "cpu"), ("prefetch", "off", "off"), ("prefetch", 1, 1),
        ("prefetch", "3", 3), ("compile", "on", "on"), ("compile", "off", "off"), ("placement_invariant", True, True),
        ("io", "direct", "direct"), ("io", "buffered", "buffered"), ("trust_remote_code", True, True),
        ("trust_remote_code", False, False),
    ],
)  # fmt: skip
def test_values_that_are_kept(name: str, value: Any, kept: Any) -> None:
    config = make_config(**{name: value})
    assert config.as_dict() == DEFAULTS.as_dict() | {name: kept}
    assert type(config.as_dict()[name]) is type(kept)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fast_activations": True}, "fast_activations is gone: it was not faster; leave it out, products are exact"),
        ({"policy": "s3fifo"}, "policy s3fifo is gone: it read up to 21% more than lfru or decayed; use lfru, "),
        ({"policy": "static"}, "policy static is gone: it read up to 69% more than lfru or decayed; use lfru, "),
    ],
)
def test_what_is_gone_names_what_to_use(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_config(**options)
    assert one_line(caught).startswith(said)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 1.5, "many", "", True, [1], float("nan"), float("inf"), 10**400, "9" * 5000])
def test_counts_are_whole_numbers_of_at_least_one(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        make_config(**{name: value})
    message = one_line(caught)
    assert message.startswith(f"{name} is ") and "whole number of at least 1" in message


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("policy", ("auto", *POLICY_NAMES)), ("io", IO_MODES), ("device", ("auto", "cpu", "cuda", "cuda:N")),
        ("miss", ("auto", "stream", "cpu")), ("compile", ("auto", "off", "on")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["best", "", 5, ["lru"], Decimal(1)])
def test_choices_list_what_is_known(name: str, known: tuple[str, ...], value: Any) -> None:
    """The same names that the policies and the disk tier have."""
    with pytest.raises(UsageError) as caught:
        make_config(**{name: value})
    assert one_line(caught) == f"{name} is {value!r}; known: {', '.join(known)}"


@pytest.mark.parametrize("name", ["trust_remote_code", "placement_invariant"])
@pytest.mark.parametrize("value", ["yes", 1, 0, []])
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is .*use True or False"):
        make_config(**{name: value})


@pytest.mark.parametrize("name", ["ram", "vram"])
@pytest.mark.parametrize("value", ["lots", -1, 2.5])
def test_budgets_are_sizes(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{name} is "):
        make_config(**{name: value})


@pytest.mark.parametrize("value", [0, 4, -1, "0", "on", "", True, 1.5, [1], None.__class__])
def test_prefetch_is_a_distance(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^prefetch is .*; known: auto, off, or how many layers ahead: 1 to 3$"):
        make_config(prefetch=value)


@pytest.mark.parametrize("value", ["cuda:", "cuda:-1", "cuda:x", "cuda:1000", "CUDA", "cpu:0", "cuda:1\n"])
def test_devices_are_written_one_way(value: str) -> None:
    with pytest.raises(UsageError, match=r"known: auto, cpu, cuda, cuda:N"):
        make_config(device=value)


def test_no_device_memory_without_a_device() -> None:
    with pytest.raises(UsageError, match=r"^vram is set and device is cpu.*leave out one"):
        make_config(vram="1GiB", device="cpu")
    assert make_config(vram="1GiB", device="auto").vram == 1 << 30


@pytest.mark.parametrize(
    ("name", "near"),
    [("contxt_length", "context_length"), ("expert_slot", "expert_slots"), ("polcy", "policy"), ("rams", "ram")],
)
def test_an_unknown_option_is_an_error_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_config(**{name: 1})
    message = one_line(caught)
    assert message.startswith(f"unknown option {name!r}; did you mean {near!r}?")
    assert all(known in message for known in OPTION_NAMES)


def test_an_unknown_option_like_no_other() -> None:
    with pytest.raises(UsageError) as caught:
        make_config(zzzzzz=1)
    assert one_line(caught) == f"unknown option 'zzzzzz'; known: {', '.join(OPTION_NAMES)}"


def test_every_option_is_described() -> None:
    lines = (EngineConfig.__doc__ or "").splitlines()
    assert [line.split()[0] for line in lines if line.strip().startswith(OPTION_NAMES)] == list(OPTION_NAMES)


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.lists(st.integers(), max_size=2)
)


@given(options=st.dictionaries(st.sampled_from(OPTION_NAMES) | st.text(max_size=5), values, max_size=3))
def test_any_options_are_a_config_or_a_usage_error(options: dict[str, Any]) -> None:
    try:
        config = make_config(**options)
    except UsageError as error:
        assert str(error).isprintable()
    else:
        assert all(getattr(config, name) is None or getattr(config, name) >= 1 for name in COUNTS)
        assert config.ram is None or config.ram >= 0


def test_the_old_name_of_expert_slots_still_works_and_says_so(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    with pytest.warns(DeprecationWarning, match=r"load\(experts=...\) is expert_slots= now"):
        engine = offmoe.load(folder, ram="4GiB", experts=5)
    with engine:
        assert engine.plan.num_slots == 5 == engine.config.expert_slots
