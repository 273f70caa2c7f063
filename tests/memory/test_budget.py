"""Memory plans: within the budget or refused, and what a refusal advises works when it is typed back."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from makers import one_line

from offmoe.core.errors import BudgetError
from offmoe.core.units import GIB, MIB, format_bytes, parse_size
from offmoe.memory.budget import (
    MIN_RESERVE_BYTES,
    MIN_VRAM_RESERVE_BYTES,
    SLACK_BYTES,
    DevicePlan,
    MemoryPlan,
    auto_ram,
    auto_vram,
    plan_device,
    plan_memory,
)

# A model of 256 experts, 8 a token: 1.5 GiB of fixed parts and 4 MiB an expert.
MODEL: dict[str, Any] = {
    "runtime_bytes": 300 * MIB, "resident_bytes": GIB, "kv_bytes": 100 * MIB,
    "workspace_bytes": 112 * MIB - SLACK_BYTES,
    "slot_bytes": 4 * MIB, "num_experts": 256, "top_k": 8, "expert_slots": None, "prefill_chunk": 64,
}  # fmt: skip
FIXED_BYTES = 1536 * MIB


def plan(ram_bytes: int, **changed: Any) -> MemoryPlan:
    return plan_memory(ram_bytes=ram_bytes, **(MODEL | changed))


def refusal(ram_bytes: int, **changed: Any) -> str:
    with pytest.raises(BudgetError) as caught:
        plan(ram_bytes, **changed)
    return one_line(caught)


def advised_ram(message: str, flag: str = "--ram") -> int:
    """The bytes that the message advises for `flag`, as the command line would read them."""
    found = re.search(rf"{flag} (\w+)", message)
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
    assert plan(100 * GIB, expert_slots=experts).num_slots == num_slots


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
    message = refusal(2 * GIB, expert_slots=200)
    assert "--expert-slots 200 needs" in message and "ram is 2.00 GiB with room for 128" in message
    assert plan(2 * GIB, expert_slots=128).num_slots == 128
    assert "--expert-slots 128 or" in message
    assert plan(advised_ram(message), expert_slots=200).num_slots == 200


def test_more_experts_than_there_are_need_room_for_all() -> None:
    message = refusal(2 * GIB, expert_slots=1000)
    assert plan(advised_ram(message), expert_slots=1000).num_slots == 256


@pytest.mark.parametrize("experts", [1, 7])
@pytest.mark.parametrize("ram_bytes", [0, 100 * GIB])
def test_fewer_experts_than_a_token_uses(ram_bytes: int, experts: int) -> None:
    message = refusal(ram_bytes, expert_slots=experts)
    assert message == f"expert_slots is {experts}, one token needs 8 in a layer; use --expert-slots 8 or more"


def test_the_line_for_people() -> None:
    assert plan(2 * GIB).line() == (
        "128 of 256 experts in RAM (512.0 MiB), resident 1.00 GiB, KV 100.0 MiB, "
        f"workspace {format_bytes(112 * MIB - SLACK_BYTES)}, libraries 300.0 MiB; budget 2.00 GiB"
    )


sizes = st.integers(0, 40 * GIB)
models = st.fixed_dictionaries({
    "runtime_bytes": sizes, "resident_bytes": sizes, "kv_bytes": sizes, "workspace_bytes": sizes,
    "slot_bytes": st.integers(4096, 500 * MIB), "num_experts": st.integers(8, 20_000), "top_k": st.integers(1, 8),
    "expert_slots": st.none() | st.integers(1, 30_000), "prefill_chunk": st.just(1),
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
            if (fewest := re.search(r"use --expert-slots (\d+) or more", message)) is not None:
                model["expert_slots"] = int(fewest.group(1))
            else:
                assert advised_ram(message) > ram_bytes
                ram_bytes = advised_ram(message)
    else:
        pytest.fail(f"the advice did not work: {message}")
    assert made.total_bytes <= made.ram_bytes == ram_bytes
    assert model["top_k"] <= made.num_slots <= model["num_experts"]
    if model["expert_slots"] is not None:
        assert made.num_slots == min(model["expert_slots"], model["num_experts"])


@given(available=st.integers(0, 1 << 45))
def test_auto_never_takes_everything(available: int) -> None:
    taken = auto_ram(available)
    assert 0 <= taken <= max(available - MIN_RESERVE_BYTES, available * 2 // 3)
    assert taken <= available * 9 // 10 + 1


@given(available=st.integers(0, 1 << 45), more=st.integers(0, 1 << 40))
def test_auto_takes_more_where_more_is_free(available: int, more: int) -> None:
    assume(more)
    assert auto_ram(available) <= auto_ram(available + more)


def test_auto_on_common_machines() -> None:
    assert [auto_ram(free * GIB) // MIB for free in (0, 1, 2, 3, 8, 30, 100)] == [
        0,
        682,
        1365,
        2048,
        7168,
        27648,
        92160,
    ]


# The same model on a device of 8 GiB of which 7 are free beside the context: 1.5 GiB of fixed parts again.
ON_DEVICE: dict[str, Any] = {
    "free_bytes": 7 * GIB, "context_bytes": 300 * MIB, "resident_bytes": GIB, "kv_bytes": 100 * MIB,
    "workspace_bytes": 80 * MIB, "slack_bytes": 32 * MIB, "slot_bytes": 4 * MIB, "num_experts": 2560, "top_k": 8,
    "expert_slots": None,
}  # fmt: skip


def device_plan(vram_bytes: int | None, **changed: Any) -> DevicePlan:
    return plan_device(vram_bytes=vram_bytes, **(ON_DEVICE | changed))


def device_refusal(vram_bytes: int | None, **changed: Any) -> str:
    with pytest.raises(BudgetError) as caught:
        device_plan(vram_bytes, **changed)
    return one_line(caught)


def test_device_slots_are_what_the_fixed_parts_leave() -> None:
    made = device_plan(2 * GIB)
    assert (made.fixed_bytes, made.num_slots, made.total_bytes) == (FIXED_BYTES, 128, 2 * GIB)
    assert made.coming_bytes == (100 + 80 + 32) * MIB
    assert device_plan(2 * GIB - 1).num_slots == 127
    assert device_plan(2 * GIB, expert_slots=100).num_slots == 100


def test_what_is_not_free_is_not_planned_with() -> None:
    made = device_plan(100 * GIB)
    assert made.vram_bytes == made.total_bytes == 7 * GIB + 300 * MIB


def test_auto_leaves_some_of_the_device() -> None:
    made = device_plan(None)
    assert made.vram_bytes == auto_vram(7 * GIB + 300 * MIB) == 7 * GIB + 300 * MIB - 512 * MIB


def test_the_smallest_vram_has_one_layer_of_one_token() -> None:
    smallest = FIXED_BYTES + 8 * 4 * MIB
    assert device_plan(smallest).num_slots == 8
    message = device_refusal(smallest - 1)
    assert "vram is 1.53 GiB" in message and "8 experts of 4.0 MiB" in message
    for part in ("driver 300.0 MiB", "resident weights 1.00 GiB", "KV cache 100.0 MiB", "workspace 112.0 MiB"):
        assert part in message
    assert smallest <= advised_ram(message, "--vram") <= smallest + 32 * MIB
    assert message.endswith("a lower --context-length or --device cpu")


def test_a_device_that_is_too_small_gets_no_vain_advice() -> None:
    message = device_refusal(None, free_bytes=GIB)
    assert message.endswith("; 1.29 GiB can be had; use a lower --context-length or --device cpu")
    assert "--vram" not in message
    message = device_refusal(2 * GIB, expert_slots=2000)
    assert message.endswith("use --expert-slots 128") and device_plan(2 * GIB, expert_slots=128).num_slots == 128
    message = device_refusal(2 * GIB, expert_slots=200)
    assert device_plan(advised_ram(message, "--vram"), expert_slots=200).num_slots == 200


def test_ram_beside_a_device() -> None:
    """Libraries, workspace and staging; loading needs more for a moment than running with few slots."""
    fixed = {"resident_bytes": 0, "kv_bytes": 0, "staging_bytes": 88 * MIB, "load_bytes": 512 * MIB}
    made = plan(2 * GIB, device=device_plan(2 * GIB), **fixed)
    assert (made.fixed_bytes, made.num_slots) == (500 * MIB, 256)
    assert made.line() == (
        "128 of 2560 experts on the device (512.0 MiB), resident 1.00 GiB, KV 100.0 MiB, workspace 80.0 MiB; vram "
        "2.00 GiB; 256 of 256 experts in RAM (1.00 GiB), libraries 300.0 MiB; ram 2.00 GiB"
    )
    loading = 300 * MIB + 512 * MIB + SLACK_BYTES
    assert plan(loading, device=device_plan(2 * GIB), **fixed).total_bytes == loading
    message = refusal(loading - 1, device=device_plan(2 * GIB), **fixed)
    assert "loading this model needs" in message and "512.0 MiB of weights on their way" in message
    assert plan(advised_ram(message), device=device_plan(2 * GIB), **fixed).num_slots >= 8
    message = refusal(500 * MIB, device=device_plan(2 * GIB), **(fixed | {"load_bytes": 0}))
    assert "staging 88.0 MiB" in message and "resident" not in message and "--context-length" not in message
    assert plan(advised_ram(message), device=device_plan(2 * GIB), **(fixed | {"load_bytes": 0})).num_slots >= 8


devices = st.fixed_dictionaries({
    "free_bytes": st.integers(0, 100 * GIB), "context_bytes": st.sampled_from([0, 512 * MIB]), "resident_bytes": sizes,
    "kv_bytes": sizes, "workspace_bytes": sizes, "slack_bytes": sizes, "slot_bytes": st.integers(4096, 500 * MIB),
    "num_experts": st.integers(8, 20_000), "top_k": st.integers(1, 8),
    "expert_slots": st.none() | st.integers(1, 30_000),
})  # fmt: skip


@given(model=devices, vram_bytes=st.none() | st.integers(0, 200 * GIB))
def test_a_device_plan_keeps_its_budget_and_advice_works(model: dict[str, Any], vram_bytes: int | None) -> None:
    most = model["free_bytes"] + model["context_bytes"]
    for _ in range(4):
        try:
            made = plan_device(vram_bytes=vram_bytes, **model)
            break
        except BudgetError as error:
            message = str(error)
            if (vram := re.search(r"--vram \w+", message)) is not None:
                vram_bytes = advised_ram(vram.group(), "--vram")
                assert vram_bytes <= most
            elif (experts := re.search(r"use --expert-slots (\d+)", message)) is not None:
                model["expert_slots"] = int(experts.group(1))
            else:
                assert "can be had" in message
                return
    else:
        pytest.fail(f"the advice did not work: {message}")
    assert made.total_bytes <= made.vram_bytes <= most
    assert made.vram_bytes <= (auto_vram(most) if vram_bytes is None else vram_bytes)
    assert model["top_k"] <= made.num_slots <= model["num_experts"]


@given(available=st.integers(0, 1 << 45))
def test_auto_never_takes_the_whole_device(available: int) -> None:
    assert 0 <= auto_vram(available) <= max(0, available - MIN_VRAM_RESERVE_BYTES)
