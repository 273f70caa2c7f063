"""The policy "auto": whichever of all policies fetches least on what is asked for here and now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from offmoe.cache.policy import KeepAllPolicy, Policy, hand_over, make_policy, needs_quota
from offmoe.cache.race import PER_LAYER, Race
from offmoe.cache.ranking import IsEvictable
from offmoe.cache.usage import Usage
from offmoe.core.keys import ExpertKey


class AutoPolicy:
    """Does as the policy that leads `race`. A change moves no expert: the new policy takes over the keys and usage.

    With `listens` the race is told of the layer calls that the policy itself sees: what was used or fetched since the
    last one. Else somebody tells it (ExpertCache.begin_layer), which includes experts that were computed elsewhere.
    """

    def __init__(
        self, race: Race, make: Callable[[str, Usage], Policy], usage: Usage | None = None, *, listens: bool = False
    ) -> None:  # fmt: skip
        self.race, self._make = race, make
        self._choice = race.choice
        self._policy = make(race.choice, usage if usage is not None else Usage())
        self._listens, self._heard = listens, dict[ExpertKey, None]()

    def __repr__(self) -> str:
        return f"<AutoPolicy [{self._policy!r} | {self.race.num_switches} switches]>"

    @property
    def name(self) -> str:
        """The leader's, as the race calls it."""
        return self._choice

    @property
    def usage(self) -> Usage:
        """The same whichever policy leads."""
        return self._policy.usage

    def inserted(self, key: ExpertKey, *, cold: bool) -> None:
        """Passed on to the leader."""
        self._policy.inserted(key, cold=cold)
        if not cold:
            self.race.fetched()
            if self._listens:
                self._heard[key] = None

    def touched(self, key: ExpertKey) -> None:
        """Passed on to the leader."""
        self._policy.touched(key)
        if self._listens:
            self._heard[key] = None

    def removed(self, key: ExpertKey) -> None:
        """Passed on to the leader."""
        self._policy.removed(key)

    def token_pass(self) -> None:
        """Time passes; here the leader may change."""
        self._tell_heard()
        self._policy.token_pass()
        self.race.token_pass()
        if self.race.choice != self._choice:
            self._choice = self.race.choice
            policy = self._make(self.race.choice, self.usage)
            hand_over(self._policy, policy)
            self._policy = policy

    def layer_call(self, layer_idx: int, ids: Sequence[int] | None) -> None:
        """A layer call begins, in which tokens chose `ids`; None where only what follows will tell."""
        if ids is not None:
            self.race.call(layer_idx, ids)
        else:
            self._tell_heard()

    def recover(self) -> None:
        """Make the race's records whole again after a call that was broken off between any two lines."""
        self.race.recover()

    def _tell_heard(self) -> None:
        heard, self._heard = self._heard, {}
        for layer_idx in dict.fromkeys(key.layer_idx for key in heard):
            self.race.call(layer_idx, sorted(key.expert_idx for key in heard if key.layer_idx == layer_idx))

    def victim(self, is_evictable: IsEvictable, layer_idx: int | None = None) -> ExpertKey | None:
        """Passed on to the leader."""
        return self._policy.victim(is_evictable, layer_idx)

    def drain(self) -> tuple[list[ExpertKey], list[ExpertKey]]:
        """Passed on to the leader."""
        return self._policy.drain()

    def restored(self, key: ExpertKey, *, cold: bool) -> None:
        """Passed on to the leader."""
        self._policy.restored(key, cold=cold)


def choose_policy(
    name: str, num_slots: int, experts_per_layer: Sequence[int], expert_bytes: Sequence[int], top_k: int, *,
    usage: Usage | None = None, listens: bool = False,
) -> Policy:  # fmt: skip
    """The policy of a cache by its name in the settings, "auto" included, with a share for each layer where that is
    better. Where everything fits there is nothing to choose. `expert_bytes`: of one expert, for each layer.
    """
    num_layers = len(experts_per_layer)
    if num_slots >= sum(experts_per_layer):
        return KeepAllPolicy()
    quota = needs_quota(num_slots, num_layers, top_k)

    def make(name: str, usage: Usage | None) -> Policy:
        return make_policy(
            name.removesuffix(PER_LAYER), usage, num_slots=num_slots, num_layers=num_layers,
            quota=quota or name.endswith(PER_LAYER),
        )  # fmt: skip

    if name != "auto":
        return make(name, usage)
    return AutoPolicy(Race(num_slots, expert_bytes, quota=quota), make, usage, listens=listens)


def policy_facts(policy: Policy) -> dict[str, Any]:
    """For statistics: the policy in use, and of "auto" how often it changed and what each would have fetched.

    The bytes are those of the sample that was watched.
    """
    if not isinstance(policy, AutoPolicy):
        return {"policy": policy.name}
    race = policy.race
    return {"policy": policy.name, "policy_switches": race.num_switches, "policy_sample_bytes": dict(race.total_bytes)}
