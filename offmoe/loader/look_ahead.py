"""Prefetching of a loaded model: lookahead, one prefetcher a tier, and their settings."""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedModel

from offmoe.cache.expert_cache import ExpertCache
from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.core.config import EngineConfig
from offmoe.prefetch.ahead import PrefetchCoordinator
from offmoe.prefetch.controller import PrefetchController, PrefetchMode
from offmoe.prefetch.lookahead import Lookahead
from offmoe.prefetch.two_tiers import BelowDevice, TwoTierPrefetcher
from offmoe.routers.routing import InstalledHooks, map_routing

# Of the slots, the share that may be on their way ahead of time; and of what a token needs in a layer. Over a link two
# layers' worth even out misses that come in bursts, and an urgent copy overtakes after one chunk. On a drive more than
# half a layer only stood in the way of demand (8.4-9.2 tok/s with two layers' worth, 8.8-10.2 with half of one).
MAX_AHEAD_SHARE, MAX_AHEAD_LAYERS, MAX_AHEAD_LAYERS_DISK = 0.25, 2, 0.5
MIN_AHEAD = 2
# Layers ahead that routers are asked about: misses may come from a drive, which may be idle when they are answered.
FURTHEST_DISK, FURTHEST_LINK = 3, 1


def look_ahead(
    model: PreTrainedModel, experts: ExpertIndex, cache: ExpertCache, host: ExpertCache, config: EngineConfig
) -> tuple[PrefetchCoordinator, InstalledHooks] | str | None:
    """Make the lookahead, and the hooks to remove at the end; None where nothing is to be fetched ahead, or a reason.

    It tells routers' guesses to `cache`, and to `host` below it where that is another tier without room for everything.

    With a fixed distance the link's prefetcher has the routers' whole answer, and brings it from disk as well.
    """
    if config.prefetch == "off" or cache.num_slots >= experts.num_experts:
        return None
    if model.config.is_encoder_decoder:
        return "prefetch is off: it does not look ahead in encoder-decoder models"
    routing = map_routing(model)
    if not routing.order or not any(routing.predictors):
        return "no router of this model could be asked ahead of time: prefetch is off"
    mode = cast("PrefetchMode", config.prefetch)
    from_disk = cache is host
    prefetcher = _prefetcher(cache, experts, mode, from_disk=from_disk)
    whole: PrefetchController | TwoTierPrefetcher = prefetcher
    furthest = FURTHEST_DISK if from_disk else FURTHEST_LINK
    if not from_disk and mode == "auto" and host.num_slots < experts.num_experts:
        below = _prefetcher(BelowDevice(host, cache), experts, mode, from_disk=True)
        whole = TwoTierPrefetcher(prefetcher, below, host=host, counters=cache.counters)
        furthest = FURTHEST_DISK
    wide = [None if predictor is None else predictor.ranked for predictor in routing.predictors]
    lookahead = Lookahead(
        routing.predictors, whole, order=routing.order, distance=mode if isinstance(mode, int) else furthest,
        num_experts=[layer.num_experts for layer in experts.layers],
        wide=wide if mode == "auto" else None,
    )  # fmt: skip
    return PrefetchCoordinator(lookahead, whole, order=routing.order), routing.install(lookahead)


def _prefetcher(
    cache: ExpertCache | BelowDevice, experts: ExpertIndex, mode: PrefetchMode, *, from_disk: bool
) -> PrefetchController:  # fmt: skip
    """Make the controller of one tier."""
    num_ahead = most_ahead(len(cache.slots), experts.top_k, from_disk=from_disk)
    expert_bytes = max(layer.expert_bytes for layer in experts.layers)
    return PrefetchController(
        cache, budget_bytes=num_ahead * expert_bytes, mode=mode, furthest=FURTHEST_DISK if from_disk else FURTHEST_LINK,
        far_when_idle=from_disk,
    )  # fmt: skip


def most_ahead(num_slots: int, top_k: int, *, from_disk: bool) -> int:
    """Experts that may be on their way ahead of time at once."""
    wanted = int((MAX_AHEAD_LAYERS_DISK if from_disk else MAX_AHEAD_LAYERS) * top_k)
    return max(1, min(int(MAX_AHEAD_SHARE * num_slots), max(MIN_AHEAD, wanted)))
