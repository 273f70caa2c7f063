"""Memory plans: within the budget or refused, and what a refusal advises works when it is typed back."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from makers import one_line

from offmoe.base.budget import MIN_RESERVE_BYTES, SLACK_BYTES, MemoryPlan, auto_ram, plan_memory
from offmoe.base.errors import BudgetError
from offmoe.base.units import GIB, MIB, format_bytes, parse_size

# A model of 256 experts, 8 a token: 1.5 GiB of fixed parts and 4 MiB an expert.
MODEL: dict[str, Any] = {
    "runtime_bytes": 300 * MIB, "resident_bytes": GIB, "kv_bytes": 100 * MIB,
    "workspace_bytes": 112 * MIB - SLACK_BYTES,
    "slot_bytes": 4 * MIB, "num_experts": 256, "top_k": 8, "experts": None, "prefill_chunk": 64,
}  # fmt: skip
FIXED_BYTES = 1536 * MIB


def plan(ram_bytes: int, **changed: Any) -> MemoryPlan:
    return plan_memory(ram_bytes=ram_bytes, **(MODEL | changed))


def refusal(ram_bytes: int, **changed: Any) -> str:
    with pytest.raises(BudgetError) as caught:
        plan(ram_bytes, **changed)
    return one_line(caught)


def advised_ram(message: str) -> int:
    """The bytes of the --ram that the message advises, as the command line would read them."""
    found = re.search(r"--ram (\w+)", message)
    assert found, message
    return parse_size(found.group(1))


def test_slots_are_what_the_fixed_parts_leave() -> None:
    made = plan(2 * GIB)
    assert (made.fixed_bytes, made.num_slots) == (FIXED_BYTES, 128)
    assert (made.pool_bytes, made.total_bytes) == (512 * MIB, 2 * GIB)
    assert plan(2 * GIB - 1).num_slots == 127


def test_no_more_slots_than_experts() -> None:
    made = plan(100 * GIB)
    assert (made.num_slots, made.total_bytes) == (256, FIXED_BYTES + GIB)


@pytest.mark.parametrize(("experts", "num_slots"), [(8, 8), (100, 100), (128, 128), (256, 256), (1000, 256)])
def test_as_many_slots_as_asked_for(experts: int, num_slots: int) -> None:
    assert plan(100 * GIB, experts=experts).num_slots == num_slots


def test_the_smallest_budget_has_one_layer_of_one_token() -> None:
    smallest = FIXED_BYTES + 8 * 4 * MIB
    assert plan(smallest).num_slots == 8
    message = refusal(smallest - 1)
    assert "ram is 1.53 GiB" in message and "8 experts of 4.0 MiB" in message
    for part in ("libraries 300.0 MiB", "resident weights 1.00 GiB", "KV cache 100.0 MiB", "workspace 112.0 MiB"):
        assert part in message
    # What libraries take differs from run to run by a few MiB: the advice is a little more, not much.
    assert smallest <= advised_ram(message) <= smallest + 32 * MIB


@pytest.mark.parametrize("ram_bytes", [0, 1, GIB, FIXED_BYTES])
def test_far_too_little_gets_the_same_advice(ram_bytes: int) -> None:
    assert plan(advised_ram(refusal(ram_bytes))).num_slots >= 8


def test_more_experts_than_there_is_room_for() -> None:
    message = refusal(2 * GIB, experts=200)
    assert "--experts 200 needs" in message and "ram is 2.00 GiB with room for 128" in message
    assert plan(2 * GIB, experts=128).num_slots == 128
    assert "--experts 128 or" in message
    assert plan(advised_ram(message), experts=200).num_slots == 200


def test_more_experts_than_there_are_need_room_for_all() -> None:
    message = refusal(2 * GIB, experts=1000)
    assert plan(advised_ram(message), experts=1000).num_slots == 256


@pytest.mark.parametrize("experts", [1, 7])
@pytest.mark.parametrize("ram_bytes", [0, 100 * GIB])
def test_fewer_experts_than_a_token_uses(ram_bytes: int, experts: int) -> None:
    message = refusal(ram_bytes, experts=experts)
    assert message == f"experts is {experts}, one token needs 8 in a layer; use --experts 8 or more"


def test_the_line_for_people() -> None:
    assert plan(2 * GIB).line() == (
        "128 of 256 experts in RAM (512.0 MiB), resident 1.00 GiB, KV 100.0 MiB, "
        f"workspace {format_bytes(112 * MIB - SLACK_BYTES)}, libraries 300.0 MiB; budget 2.00 GiB"
    )


sizes = st.integers(0, 40 * GIB)
models = st.fixed_dictionaries({
    "runtime_bytes": sizes, "resident_bytes": sizes, "kv_bytes": sizes, "workspace_bytes": sizes,
    "slot_bytes": st.integers(4096, 500 * MIB), "num_experts": st.integers(8, 20_000), "top_k": st.integers(1, 8),
    "experts": st.none() | st.integers(1, 30_000), "prefill_chunk": st.just(1),
})  # fmt: skip


@given(model=models, ram_bytes=st.integers(0, 400 * GIB))
def test_a_plan_keeps_its_budget_and_advice_works(model: dict[str, Any], ram_bytes: int) -> None:
    """At most three refusals: fewer experts than a token uses, too little for these, too little for those asked for."""
    for _ in range(4):
        try:
            made = plan_memory(ram_bytes=ram_bytes, **model)
            break
        except BudgetError as error:
            message = str(error)
            assert message.isprintable()
            if (fewest := re.search(r"use --experts (\d+) or more", message)) is not None:
                model["experts"] = int(fewest.group(1))
            else:
                assert advised_ram(message) > ram_bytes
                ram_bytes = advised_ram(message)
    else:
        pytest.fail(f"the advice did not work: {message}")
    assert made.total_bytes <= made.ram_bytes == ram_bytes
    assert model["top_k"] <= made.num_slots <= model["num_experts"]
    if model["experts"] is not None:
        assert made.num_slots == min(model["experts"], model["num_experts"])


@given(available=st.integers(0, 1 << 45))
def test_auto_never_takes_everything(available: int) -> None:
    taken = auto_ram(available)
    assert 0 <= taken <= max(0, available - MIN_RESERVE_BYTES)
    assert taken <= available * 9 // 10 + 1


@given(available=st.integers(0, 1 << 45), more=st.integers(0, 1 << 40))
def test_auto_takes_more_where_more_is_free(available: int, more: int) -> None:
    assume(more)
    assert auto_ram(available) <= auto_ram(available + more)


def test_auto_on_common_machines() -> None:
    assert [auto_ram(free * GIB) // MIB for free in (0, 1, 2, 8, 30, 100)] == [0, 0, 1024, 7168, 27648, 92160]
