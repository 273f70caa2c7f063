"""One token's attention to latents by the library: against the expanded keys and values in float64."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_cases import needs_library, open_kernels
from test_cpu_decode import DTYPES, assert_near, draw, normed

from offmoe.kernels.cpu.decode import CpuNorm
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.latent import ROTATIONS, CpuLatentAttention, LatentShape, Rotation

pytestmark = needs_library


class Case:
    """One token's attention, and its result in float64."""

    def __init__(
        self, *, dtype: torch.dtype, rotation: Rotation = "apart", num_heads: int = 5, num_rows: int = 50,
        key_width: int = 20, rotated: int = 12, latent: int = 40, value_width: int = 24,
    ) -> None:  # fmt: skip
        self.rotation = rotation
        self.shape = shape = LatentShape(
            num_heads=num_heads, key_width=key_width, rotated=rotated, latent=latent, value_width=value_width,
            scale=(key_width + rotated) ** -0.5, dtype=dtype,
        )  # fmt: skip
        self.query = draw(num_heads * (key_width + rotated), dtype=dtype)
        self.compressed = draw(latent + rotated, dtype=dtype, seed=1)
        self.weight = draw(num_heads * (key_width + value_width), latent, dtype=dtype, seed=2) * latent**-0.5
        self.norm = draw(latent, dtype=dtype, seed=3) + 1
        cache = draw(1, 1, num_rows + 3, latent + rotated, dtype=dtype, seed=4)[:, :, :num_rows]
        self.latents, self.rotated = cache.split([shape.latent, shape.rotated], dim=-1)
        angles = draw(rotated // 2, dtype=torch.float32)
        self.cos, self.sin = angles.cos().to(dtype).float(), angles.sin().to(dtype).float()

    def run(self, kernels: CpuKernels) -> torch.Tensor:
        norm = CpuNorm(kernels, self.norm, eps=1e-6, kind="weight_last")
        assert self.shape.fits(self.weight, norm)
        attention = CpuLatentAttention(kernels, self.shape, norm, self.weight)
        assert attention.takes(self.latents, self.rotated)
        self.latents[..., -1, :] = self.rotated[..., -1, :] = math.nan  # the new row is written, not read
        return attention(self.query, self.compressed, self.cos, self.sin, self.latents, rotation=self.rotation)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        pairs = x.unflatten(-1, (2, -1)) if self.rotation == "halves" else x.unflatten(-1, (-1, 2)).transpose(-1, -2)
        first, second = pairs.unbind(-2)
        cos, sin = self.cos.double(), self.sin.double()
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)
        return (turned.transpose(-1, -2) if self.rotation == "pairs" else turned).flatten(-2)

    def exact(self) -> torch.Tensor:
        """After `run`: rows before the last are as they were."""
        shape = self.shape
        own = self.compressed.double()
        latents, rotated = self.latents[0, 0].double().clone(), self.rotated[0, 0].double().clone()
        latents[-1] = normed(self.compressed[: shape.latent], self.norm, 1e-6, "weight_last")
        rotated[-1] = self.turned(own[shape.latent :])
        both = self.weight.double().view(shape.num_heads, -1, shape.latent)
        keys, values = (latents @ part.transpose(1, 2) for part in both.split([shape.key_width, shape.value_width], 1))
        plain, turning = self.query.double().view(shape.num_heads, -1).split([shape.key_width, shape.rotated], -1)
        scores = torch.einsum("hn,hsn->hs", plain, keys) + self.turned(turning) @ rotated.t()
        return torch.einsum("hs,hsv->hv", (scores * shape.scale).softmax(-1), values).flatten()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        *({"rotation": rotation} for rotation in ROTATIONS),
        {"num_rows": 1}, {"num_heads": 1}, {"num_heads": 16, "num_rows": 600},
        {"num_heads": 3, "key_width": 128, "rotated": 64, "latent": 512, "value_width": 128, "num_rows": 300},
        {"latent": 600, "rotated": 8}, {"value_width": 520},
    ],
    ids=str,
)  # fmt: skip
def test_attention_of_one_token(kernels: CpuKernels, dtype: torch.dtype, options: dict[str, object]) -> None:
    case = Case(dtype=dtype, **options)  # type: ignore[arg-type]
    output = case.run(kernels)
    assert_near(output, case.exact())
    assert not case.latents[..., -1, :].isnan().any()
    assert_near(case.rotated[0, 0, -1], case.turned(case.compressed[case.shape.latent :].double()))
    assert output.shape == (case.shape.num_heads * case.shape.value_width,)


def test_the_number_of_threads_changes_no_bit() -> None:
    outputs = []
    for threads in (1, 2):
        kernels = open_kernels(threads=threads)
        outputs.append(Case(dtype=torch.bfloat16, num_heads=16, num_rows=900).run(kernels))
        kernels.close()
    assert torch.equal(*outputs)


def test_what_lies_or_is_otherwise_is_not_taken() -> None:
    kernels, case = open_kernels(), Case(dtype=torch.float32)
    norm = CpuNorm(kernels, case.norm, eps=1e-6, kind="weight_last")
    attention = CpuLatentAttention(kernels, case.shape, norm, case.weight)
    assert not attention.takes(case.latents.clone(), case.rotated)
    assert not attention.takes(case.latents, case.rotated[..., 1:])
    assert not attention.takes(case.latents.double(), case.rotated.double())
    assert not case.shape.fits(case.weight[1:], norm)
    assert not case.shape.fits(case.weight.bfloat16(), norm)
    assert not case.shape.fits(case.weight.t().contiguous().t(), norm)
