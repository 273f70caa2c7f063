"""Which known activation an experts module has, found by asking it: by its numbers, not by its name.

A gated expert's (N, 2F) is gate and up, in halves or taking turns, and the activation f(gate) * (up + offset), with
limits on both: SwiGLU, GeGLU, and the clamped kinds of gpt-oss, DeepSeek V4, GLM and Step. Others have f(up) alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

ActivationFunction = Callable[[torch.Tensor], torch.Tensor]

KINDS = ("none", "silu", "gelu", "gelu_tanh", "relu", "relu_squared")
# Larger than any limit a model sets.
_LARGE = 1.0e4
# float32 inside the module, measured in float64.
_TOLERANCE = 1.0e-5
_SEED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """f(gate) * (up + offset), or f(up) where `gated` is false.

    silu is x * sigmoid(alpha * x). `gate_limit` bounds the gate from above, `up_limit` bounds up on both sides, None
    is no limit. To bound f(gate) is to bound the gate elsewhere. `interleaved`: gate and up take turns.
    """

    kind: str
    gated: bool
    interleaved: bool = False
    alpha: float = 1.0
    gate_limit: float | None = None
    up_limit: float | None = None
    offset: float = 0.0

    def apply(self, up: torch.Tensor) -> torch.Tensor:
        """Apply the activation as the kernels do, in torch: (N, 2F) or (N, F) -> (N, F)."""
        if not self.gated:
            return self._curve(up)
        gate, up = (up[..., ::2], up[..., 1::2]) if self.interleaved else up.chunk(2, dim=-1)
        if self.up_limit is not None:
            up = up.clamp(-self.up_limit, self.up_limit)
        if self.gate_limit is not None:
            gate = gate.clamp(max=self.gate_limit)
        return self._curve(gate) * (up + self.offset)

    def _curve(self, x: torch.Tensor) -> torch.Tensor:
        functional = torch.nn.functional
        if self.kind == "silu":
            return x * torch.sigmoid(x * self.alpha)
        if self.kind.startswith("gelu"):
            return functional.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return functional.relu(x) if self.kind == "relu" else functional.relu(x).square()


def find_activation(
    activate: ActivationFunction, width_F: int, *, gated: bool, device: torch.device
) -> Activation | None:
    """The activation that gives what `activate` gives, or None. `device`: where the module's own parameters are."""
    generator = torch.Generator().manual_seed(_SEED)
    shape = (4, 2 * width_F if gated else width_F)
    try:
        for candidate in _candidates(activate, width_F, gated=gated, device=device):
            limits = [limit for limit in (candidate.gate_limit, candidate.up_limit) if limit is not None]
            samples = torch.randn(shape, generator=generator, dtype=torch.float64) * max(3.0, *limits, 0.0)
            samples = samples.to(device)
            got, expected = activate(samples).double(), candidate.apply(samples)
            if got.shape == expected.shape and torch.allclose(got, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
                return candidate
    except (RuntimeError, TypeError, ValueError) as error:  # it takes only its own type, or its own shapes
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):  # says nothing of the activation
            raise
        return None
    return None


def _candidates(
    activate: ActivationFunction, width_F: int, *, gated: bool, device: torch.device
) -> Iterator[Activation]:
    def ask(gate: float, up: float, interleaved: bool) -> float:
        pair = torch.tensor([gate, up], dtype=torch.float64, device=device)
        row = (pair.repeat(width_F) if interleaved else pair.repeat_interleave(width_F))[None, :]
        return float(activate(row)[0, 0])

    if not gated:
        half = activate(torch.full((1, width_F), 0.5, dtype=torch.float64, device=device))
        yield from _curves(Activation(kind="none", gated=False), float(half[0, 0]))
        return
    for interleaved in (False, True):
        at_zero, at_half = ask(0.5, 0.0, interleaved), ask(0.5, 0.5, interleaved)
        curve = 2.0 * (at_half - at_zero)
        if abs(curve) < 1.0e-3:
            continue
        up_limit = _limit(ask(0.5, _LARGE, interleaved) / curve - at_zero / curve)
        base = Activation(
            kind="none", gated=True, interleaved=interleaved, up_limit=up_limit, offset=_neat(at_zero / curve)
        )
        top = ask(_LARGE, 0.5, interleaved) / (0.5 + base.offset)
        for candidate in _curves(base, curve):
            yield replace(candidate, gate_limit=_inverse(candidate, top))


def _curves(base: Activation, at_half: float) -> Iterator[Activation]:
    """Every kind, silu with the slope that `at_half`, f(0.5), speaks of."""
    sigmoid = 2.0 * at_half
    if 0.0 < sigmoid < 1.0:
        yield replace(base, kind="silu", alpha=_neat(2.0 * math.log(sigmoid / (1.0 - sigmoid))))
    for kind in KINDS[2:]:
        yield replace(base, kind=kind)


def _inverse(candidate: Activation, top: float) -> float | None:
    """The gate at which the curve reaches `top`; None where the curve was not limited."""
    low, high = 0.0, _LARGE
    for _ in range(100):
        middle = (low + high) / 2.0
        reached = float(candidate._curve(torch.tensor(middle, dtype=torch.float64)))
        low, high = (middle, high) if reached < top else (low, middle)
    return _limit(high)


def _limit(value: float) -> float | None:
    return None if value > 0.9 * _LARGE else _neat(value)


def _neat(value: float) -> float:
    """Seven digits: 1.702, not 1.7020000001."""
    return float(f"{value:.7g}")
