"""Eviction policies: one contract for every name a user may give, then what LRU promises besides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from makers import one_line

from offmoe.cache.policy import POLICY_NAMES, LruPolicy, Policy, make_policy
from offmoe.core.errors import UsageError
from offmoe.core.keys import ExpertKey

A, B, C, D = (ExpertKey(0, idx) for idx in range(4))
KEYS = [ExpertKey(layer, expert) for layer in range(3) for expert in range(3)]


@pytest.fixture(params=POLICY_NAMES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return make_policy(request.param)


def insert(policy: Policy, *keys: ExpertKey, cold: bool = False) -> None:
    for key in keys:
        policy.inserted(key, cold=cold)


def evict_all(policy: Policy) -> list[ExpertKey]:
    """The keys in the order in which the policy lets go of them."""
    order = []
    while (key := policy.victim(lambda key: True)) is not None:
        policy.removed(key)
        order.append(key)
    return order


def test_nothing_to_evict_at_first(policy: Policy) -> None:
    assert policy.victim(lambda key: True) is None


def test_every_key_goes_once(policy: Policy) -> None:
    insert(policy, *KEYS)
    for key in KEYS[::2]:
        policy.touched(key)
    assert sorted(evict_all(policy)) == sorted(KEYS)


def test_none_when_all_are_refused(policy: Policy) -> None:
    insert(policy, A, B)
    insert(policy, C, cold=True)
    assert policy.victim(lambda key: False) is None


@pytest.mark.parametrize("only", [A, B, C])
def test_the_only_one_that_may_go(policy: Policy, only: ExpertKey) -> None:
    insert(policy, A, B)
    insert(policy, C, cold=True)
    policy.touched(A)
    assert policy.victim(lambda key: key == only) == only


def test_a_cold_key_goes_before_keys_in_use(policy: Policy) -> None:
    insert(policy, A, B)
    insert(policy, C, cold=True)
    policy.touched(A)
    policy.touched(B)
    assert policy.victim(lambda key: True) == C


def test_a_removed_key_may_come_back(policy: Policy) -> None:
    insert(policy, A)
    policy.removed(A)
    insert(policy, A)
    assert evict_all(policy) == [A]


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(data=st.data())
def test_victims_are_always_present_and_allowed(name: str, data: st.DataObject) -> None:
    policy, present = make_policy(name), set[ExpertKey]()
    for key, cold, held in data.draw(
        st.lists(st.tuples(st.sampled_from(KEYS), st.booleans(), st.sets(st.sampled_from(KEYS))), max_size=30)
    ):
        if key in present:
            policy.touched(key)
        else:
            policy.inserted(key, cold=cold)
            present.add(key)
        victim = policy.victim(lambda candidate: candidate not in held)  # noqa: B023 - called at once
        assert (victim is None) == (present <= held)
        if victim is not None:
            assert victim in present - held
            policy.removed(victim)
            present.remove(victim)
    assert set(evict_all(policy)) == present


def test_lru_lets_the_oldest_go() -> None:
    policy = LruPolicy()
    insert(policy, A, B, C)
    assert evict_all(policy) == [A, B, C]


def test_lru_counts_a_use_as_new() -> None:
    policy = LruPolicy()
    insert(policy, A, B, C)
    policy.touched(A)
    policy.touched(B)
    assert evict_all(policy) == [C, A, B]


def test_lru_skips_the_oldest_when_it_is_held() -> None:
    policy = LruPolicy()
    insert(policy, A, B, C)
    assert policy.victim(lambda key: key != A) == B
    assert evict_all(policy) == [A, B, C]


def test_lru_asking_changes_nothing() -> None:
    policy = LruPolicy()
    insert(policy, A, B)
    assert [policy.victim(lambda key: True) for _ in range(3)] == [A, A, A]


def test_lru_newest_cold_key_goes_first() -> None:
    policy = LruPolicy()
    insert(policy, A, B)
    insert(policy, C, D, cold=True)
    assert evict_all(policy) == [D, C, A, B]


def test_lru_a_cold_key_that_is_used_again_is_cold_no_more() -> None:
    policy = LruPolicy()
    insert(policy, A)
    insert(policy, B, cold=True)
    policy.touched(B)
    assert evict_all(policy) == [A, B]


def test_lru_shows_its_size() -> None:
    policy = LruPolicy()
    insert(policy, A, B)
    policy.removed(A)
    assert repr(policy) == "<LruPolicy [1 keys]>"


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError) as caught:
        make_policy("mru")
    assert one_line(caught) == f"policy is 'mru'; known: {', '.join(POLICY_NAMES)}"
