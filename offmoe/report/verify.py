"""Is cached output the uncached output? The same prompt at several cache sizes against an executor without a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from offmoe.core.errors import UsageError
from offmoe.engine.engine import Engine
from offmoe.sampling.sampler import greedy

# Largest difference of logits, relative to the largest logit, that counts as equal. The arithmetic is the same
# instructions on the same bytes, so 0 is expected; the allowance is for a matrix product that splits rows otherwise.
TOLERANCE = 1e-5
# On a GPU sums are taken in another order, and 16-bit types keep 8 to 11 bits of intermediate results. These are the
# allowances of the kernels' own tests under Triton's interpreter, to be checked on a GPU.
DEVICE_TOLERANCES = {torch.float32: 1e-4}
DEVICE_TOLERANCE_16_BIT = 4e-2


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """One cache size against the oracle."""

    slots: int
    ids_equal: bool
    max_relative_difference: float
    tolerance: float
    hit_rate: float

    @property
    def passed(self) -> bool:
        """Logits within the tolerance, and where that is an exact one, the ids chosen from them equal."""
        return self.max_relative_difference <= self.tolerance and (self.ids_equal or self.tolerance > TOLERANCE)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


def cache_sizes(engine: Engine) -> list[int]:
    """Three sizes: one token's experts, a quarter, and all that the budget allows."""
    num_slots, total, top_k = engine.plan.computing_slots, engine.plan.num_experts, engine.top_k
    return sorted({top_k, min(num_slots, max(top_k, total // 4)), num_slots})


def tolerance(engine: Engine) -> float:
    """Largest difference that is allowed: none on the CPU; on a device kernels round otherwise than the oracle."""
    if engine.model.device.type == "cpu":
        return TOLERANCE
    return DEVICE_TOLERANCES.get(engine.model.dtype, DEVICE_TOLERANCE_16_BIT)


def run_and_record(
    engine: Engine, ids: list[int], num_new: int, given: list[int] | None = None
) -> tuple[list[int], torch.Tensor]:
    """Greedy ids and the logits (num_new, V) they were chosen from; `given` ids go on instead of those chosen.

    So one near tie that rounding decides otherwise does not make everything after it another text.
    """
    logits: list[torch.Tensor] = []
    chosen: list[int] = []

    def choose(seen: torch.Tensor, last: torch.Tensor) -> int:
        logits.append(last[0].float().cpu())
        chosen.append(greedy(seen, last))
        return chosen[-1] if given is None else given[len(chosen) - 1]

    engine.generate(ids, max_new_tokens=num_new, choose=choose, ignore_eos=True)
    return chosen, torch.stack(logits)


def verify_output(
    open_engine: Callable[[int | None], Engine], choose_ids: Callable[[Engine], list[int]], num_new: int,
    progress: Callable[[str, int, int], None],
) -> list[VerifyResult]:  # fmt: skip
    """Compare three cache sizes with no cache. `open_engine(slots)` loads with that many slots (None: what fits).

    Raises UsageError for an encoder-decoder model.
    """
    with open_engine(None) as engine:
        if engine.model.config.is_encoder_decoder:
            raise UsageError(
                f"verify goes on from a prompt that the decoder itself reads; {engine.model.config.model_type} is an "
                "encoder-decoder model, whose prompt the encoder reads; compare generate at two --expert-slots instead"
            )
        ids = choose_ids(engine)
        sizes = cache_sizes(engine)
        progress("uncached", 0, 1 + len(sizes))
        with engine.uncached():
            expected_ids, expected = run_and_record(engine, ids, num_new)
    results = []
    for step, slots in enumerate(sizes):
        progress(f"{slots} slots", 1 + step, 1 + len(sizes))
        with open_engine(slots) as engine:
            got_ids, got = run_and_record(engine, ids, num_new, expected_ids)
            difference = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
            results.append(
                VerifyResult(
                    slots=slots, ids_equal=got_ids == expected_ids, max_relative_difference=difference,
                    tolerance=tolerance(engine), hit_rate=engine.stats().hit_rate,
                )
            )  # fmt: skip
    return results
