"""One token's attention at transformers' attention functions: the numbers, what is not taken, and that it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engines import open_tiny, save_tiny
from torch.nn import functional

from offmoe.attention.token import TokenAttention
from offmoe.kernels.cpu.decode import CpuAttention
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.loader import load_cpu_kernels, usable_levels

pytestmark = pytest.mark.skipif(not usable_levels(), reason="the CPU kernels were not built")


@pytest.fixture
def kernels() -> Iterator[CpuKernels]:
    found, _ = load_cpu_kernels(threads=2)
    assert found is not None
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    out = functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2)


def never() -> torch.Tensor:
    raise AssertionError("torch was asked again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(6, 6), (8, 2), (5, 1)])
def test_it_gives_what_torch_gives(kernels: CpuKernels, heads: tuple[int, int], dtype: torch.dtype) -> None:
    query = draw(1, heads[0], 1, 48, dtype=dtype)
    key, value = (draw(1, heads[1], 330, 48, dtype=dtype)[:, :, :301] for _ in range(2))
    ours = TokenAttention(kernels)
    assert ours.takes(query, key, value, None)
    first = ours.attend(query, key, value, 0.2, lambda: fused(query, key, value, 0.2))
    exact = fused(query.double(), key.double(), value.double(), 0.2)
    bound = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype] * exact.abs().max()
    assert first.shape == exact.shape == (1, 1, heads[0], 48)
    assert (first.double() - exact).abs().max() <= bound
    assert torch.equal(ours.attend(query, key, value, 0.2, never), first)


def test_values_may_be_the_begin_of_the_keys(kernels: CpuKernels) -> None:
    query, states = draw(1, 7, 1, 40), draw(1, 1, 20, 40)
    ours = TokenAttention(kernels)
    result = ours.attend(
        query, states, states[..., :24], None, lambda: fused(query, states, states, 40**-0.5)[..., :24]
    )
    assert torch.equal(ours.attend(query, states, states[..., :24], None, never), result)


def test_sinks_take_their_share(kernels: CpuKernels) -> None:
    query, key, value, sinks = draw(1, 4, 1, 16), draw(1, 2, 9, 16), draw(1, 2, 9, 16), draw(4)
    scores = query.view(2, 2, 16) @ key[0].transpose(1, 2) * 0.25
    shares = torch.cat([scores, sinks.view(2, 2, 1)], dim=-1).softmax(-1)[..., :-1]
    expected = (shares @ value[0]).view(1, 1, 4, 16)
    ours = TokenAttention(kernels)
    ours.attend(query, key, value, 0.25, lambda: expected, sinks)
    torch.testing.assert_close(ours.attend(query, key, value, 0.25, never, sinks), expected, rtol=0, atol=1e-6)


def test_what_differs_is_torchs_for_good(kernels: CpuKernels) -> None:
    query, key = draw(1, 2, 1, 16), draw(1, 2, 5, 16)
    ours, others = TokenAttention(kernels), [torch.ones(1, 1, 2, 16), torch.zeros(1, 1, 2, 16)]
    for other in others:
        assert ours.attend(query, key, key, 1.0, lambda other=other: other) is other  # type: ignore[misc]


CASES: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "two tokens": lambda query, key: (query.repeat(1, 1, 2, 1), key),
    "two sequences": lambda query, key: (query.repeat(2, 1, 1, 1), key.repeat(2, 1, 1, 1)),
    "other type": lambda query, key: (query.bfloat16(), key),
    "no kernel's type": lambda query, key: (query.double(), key.double()),
    "rows turned": lambda query, key: (query, key.transpose(2, 3).contiguous().transpose(2, 3)),
    "other width": lambda query, key: (query, key[..., :8]),
    "odd heads": lambda query, key: (query, key.repeat(1, 2, 1, 1)[:, :3]),
}


@pytest.mark.parametrize("case", CASES)
def test_not_taken(kernels: CpuKernels, case: str) -> None:
    ours = TokenAttention(kernels)
    query, key = draw(1, 4, 1, 16), draw(1, 2, 5, 16)
    assert ours.takes(query, key, key, None)
    changed = CASES[case](query, key)
    assert not ours.takes(changed[0], changed[1], changed[1], None)


def test_not_taken_when_closed_or_where_gradients_are_wanted(kernels: CpuKernels) -> None:
    ours = TokenAttention(kernels)
    query, key = draw(1, 4, 1, 16), draw(1, 2, 5, 16)
    with torch.inference_mode(mode=False), torch.enable_grad():
        assert not ours.takes(query, key, key, None)
    ours.close()
    assert not ours.takes(query, key, key, None)


@pytest.mark.parametrize("family", ["qwen3_next", "mistral4", "deepseek_v4", "jamba"])
def test_families_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Transformers' modules run."""
    monkeypatch.setenv("OFFMOE_DECODE", "eager")
    rows: list[int] = []
    attend = CpuAttention.attend

    def counted(self: CpuAttention, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        rows.append(keys.shape[1])
        return attend(self, query, keys, values)

    monkeypatch.setattr(CpuAttention, "attend", counted)
    with open_tiny(save_tiny(tmp_path / family, family)) as engine:
        engine.generate([5, 6, 7], max_new_tokens=4)
    assert {4, 5, 6} <= set(rows)  # what each token sees, its own row with it
