"""What tests of the executor share: layers' arithmetic, calls, and a disk whose reads come late.

Shapes: T tokens, K experts a token, D model width, F expert width, E experts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from makers import NUM_EXPERTS, NUM_LAYERS, TOP_K, WIDTH_D, RecordingDisk, TinyExperts

from offmoe.checkpoint.expert_index import ReadPlan
from offmoe.core.keys import ExpertKey
from offmoe.kernels.reference import ExpertMath
from offmoe.tiers.copier import Ticket

if TYPE_CHECKING:
    from offmoe.hf.seam import ExpertsExecutor

PADDING = NUM_EXPERTS


def gated(up_N2F: torch.Tensor) -> torch.Tensor:
    gate, up = up_N2F.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def interleaved(up_N2F: torch.Tensor) -> torch.Tensor:
    """As gpt-oss has it: gate and up alternate, and the sigmoid is of a fresh array of all rows."""
    gate, up = up_N2F[..., ::2], up_N2F[..., 1::2]
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def make_math(
    activate: Callable[[torch.Tensor], torch.Tensor] = gated,
    *,
    biased: bool = False,
    width_F: int = 64,
    dtype: torch.dtype = torch.float32,
) -> ExpertMath:
    generator = torch.Generator().manual_seed(3)
    return ExpertMath(
        activate=activate,
        up_bias_EF=torch.randn(NUM_EXPERTS, 2 * width_F, generator=generator).to(dtype) if biased else None,
        down_bias_ED=torch.randn(NUM_EXPERTS, WIDTH_D, generator=generator).to(dtype) if biased else None,
        post_norm=(lambda y_ND: y_ND / (1 + y_ND.abs().amax(-1, keepdim=True))) if biased else None,
        transposed=False,
        dtype=dtype,
    )


MATH, BIASED = make_math(), make_math(biased=True)
BFLOAT16 = make_math(biased=True, dtype=torch.bfloat16)


class Call:
    """What the model hands to one layer."""

    def __init__(self, layer_idx: int, num_tokens: int, seed: int = 0, *, top_k: int = TOP_K) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layer_idx = layer_idx
        self.x_TD = torch.randn(num_tokens, WIDTH_D, generator=generator)
        self.ids_TK = torch.randint(0, NUM_EXPERTS, (num_tokens, top_k), generator=generator)
        self.weights_TK = torch.rand(num_tokens, top_k, generator=generator)

    def choosing(self, *ids: list[int]) -> Call:
        """The same with given experts, a list for each token."""
        self.ids_TK = torch.tensor(ids)
        return self

    @property
    def experts(self) -> set[ExpertKey]:
        return {ExpertKey(self.layer_idx, idx) for idx in self.ids_TK.unique().tolist() if 0 <= idx < NUM_EXPERTS}

    def run(self, executor: ExpertsExecutor, math: ExpertMath = MATH) -> torch.Tensor:
        return executor.run_layer(self.layer_idx, math, NUM_EXPERTS, self.x_TD, self.ids_TK, self.weights_TK)

    def eager(self, tiny: TinyExperts, math: ExpertMath = MATH) -> torch.Tensor:
        """The formula, token by token, in float64."""
        y_TD = torch.zeros_like(self.x_TD, dtype=torch.float64)
        for token, (ids, weights) in enumerate(zip(self.ids_TK.tolist(), self.weights_TK.tolist(), strict=True)):
            for idx, weight in zip(ids, weights, strict=True):
                if 0 <= idx < NUM_EXPERTS:
                    y_TD[token] += weight * self._expert(tiny, math, idx, self.x_TD[token].double())
        return y_TD.float()

    def _expert(self, tiny: TinyExperts, math: ExpertMath, idx: int, x_D: torch.Tensor) -> torch.Tensor:
        gate, up, down = (matrix.double() for matrix in tiny.matrices(ExpertKey(self.layer_idx, idx)))
        up_2F = torch.cat([gate @ x_D, up @ x_D])
        up_2F += 0 if math.up_bias_EF is None else math.up_bias_EF[idx].double()
        y_D = down @ math.activate(up_2F[None])[0]
        y_D += 0 if math.down_bias_ED is None else math.down_bias_ED[idx].double()
        return y_D if math.post_norm is None else math.post_norm(y_D[None])[0]


def calls_of(seed: int, count: int = 6) -> list[Call]:
    """Decode and prefill, layer by layer, as a model runs."""
    order = random.Random(seed)
    return [Call(idx % NUM_LAYERS, order.choice([1, 1, 1, 2, 9, 40]), seed=seed + idx) for idx in range(count)]


class LateTicket:
    """A read that ends when chance has it, or when it is waited for."""

    def __init__(self, read: Callable[[], None], chance: random.Random) -> None:
        self._read, self._chance, self._ended = read, chance, False

    def done(self) -> bool:
        if not self._ended and self._chance.random() < 0.3:
            self.wait()
        return self._ended

    def wait(self) -> None:
        if not self._ended:
            self._read()
            self._ended = True


class LateDisk(RecordingDisk):
    """Reads arrive late and in another order each time; until then the slot holds NaN."""

    chance = random.Random(0)

    def read(self, plan: ReadPlan, slot: memoryview, *, urgent: bool = True) -> Ticket:
        slot[:] = b"\xff" * len(slot)
        return LateTicket(lambda: super(LateDisk, self).read(plan, slot).wait(), self.chance)
