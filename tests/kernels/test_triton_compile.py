"""The kernels go through Triton's compiler, which needs no device: the interpreter takes what the compiler may refuse.

And what comes out loads weights 16 bytes a lane. Not run where this process interprets.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import quant_cases
import slot_cases as cases
import torch
from triton_architectures import compiled

from offmoe.formats.layout import layout_of
from offmoe.kernels.activations import find_activation

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted")

TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
    torch.float16: "fp16",
}  # fmt: skip
# What torch's allocator aligns; index tensors may be pieces of one upload.
ALIGNED = ("in_ptr", "slab_ptr", "scale_ptr", "zero_ptr", "out_ptr", "round_ptr")
# What a program may have on consumer cards.
SHARED_BYTES = 99 << 10
WIDE = r"ld\.global[\w.:]*\.v4\.b32"
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Compiled:
    """Stands for a kernel: a launch compiles it for `target` and keeps the assembly."""

    def __init__(self, kernel: Any, target: tuple[str, int, int]) -> None:
        self.kernel, self.target = kernel, target
        self.assembly: list[str] = []
        self.shared_bytes = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *args: Any, **constants: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        names = self.kernel.arg_names
        values = {**dict(zip(names, args, strict=False)), **constants, "WIDEN": False}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        source = ASTSource(
            fn=self.kernel,
            signature={name: "*" + TYPES[tensors[name].dtype] if name in tensors else "constexpr" for name in names},
            constexprs={(idx,): values[name] for idx, name in enumerate(names) if name not in tensors},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED if name in tensors},
        )
        made = triton.compile(source, target=GPUTarget(*self.target), options=options)
        self.assembly.append(made.asm["ptx"])
        self.shared_bytes = max(self.shared_bytes, made.metadata.shared)


@pytest.mark.parametrize("layout", ["published", "transposed"])
def test_every_kernel_compiles_and_loads_wide(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = cases.make_case(
        layout=layout, dtype=torch.bfloat16, width_D=256, width_F=128, activate=cases.silu_gate, biases=True
    )
    for name, stand_in in compile_all(case, ("cuda", 80, 32), monkeypatch).items():
        assert stand_in.assembly, name
        wide = r"cp\.async\.cg[\w.:]* .*0x10" if name == "tile_rows" else WIDE
        assert all(re.search(wide, assembly) for assembly in stand_in.assembly), f"{name} loads narrowly"


@pytest.mark.parametrize(
    ("name", "capability"),
    [("int4 zeros", 89), ("mxfp4", 90), ("fp8", 89), ("int8", 90), ("q4_k", 89), ("q6_k", 90), ("q8_0", 89)],
)
def test_quantised_weights_stay_in_their_lanes(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four words a load, and few barriers: a conversion of the weights' layout would bring one for every register.

    GGUF's blocks of q6_k and q8_0 begin at any two bytes, so two are a load.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = quant_cases.make_quantised(name, dtype=torch.bfloat16, width_D=256, width_F=256, biases=True)
    in_pairs = name in ("q6_k", "q8_0")
    for kernel, stand_in in compile_all(case, ("cuda", capability, 32), monkeypatch).items():
        assert stand_in.assembly, kernel
        assert stand_in.shared_bytes <= SHARED_BYTES
        for assembly in stand_in.assembly:
            assert assembly.count("bar.sync") <= (13 if kernel == "tile_rows" else 25), (
                f"{kernel} moves weights between lanes"
            )
            if kernel != "tile_rows":
                wide = "ld.global.b8" not in assembly if in_pairs else re.search(WIDE, assembly)
                assert wide, f"{kernel} loads narrowly"
            assert ".ftz" not in assembly, "subnormal numbers would be lost"


@pytest.mark.parametrize(("name", "capability", "kernels"), [("fp16 published", 75, 2), ("bf16 published", 120, 3)])
def test_older_and_newer_gpus_have_the_registers_and_the_memory(name: str, capability: int, kernels: int) -> None:
    """Turing computes rows alone and no tiles; scripts/triton_architectures.py does this for every format."""
    rows = compiled(name, capability, tiles=(16,))
    assert [row.kernel for row in rows] == ["choose_rows", "weighted_rows", "tile_rows"][:kernels]
    for row in rows:
        assert row.is_fine, row
        assert 0 < row.registers <= 255


def case_of(name: str, dtype: torch.dtype = torch.bfloat16) -> cases.SlotCase:
    """By name: a type and a layout ("bf16 published"), or a format of quantised weights, computed in `dtype`."""
    plain = next((plain for plain, short in TYPES.items() if name.split(maxsplit=1)[0] == short), None)
    if plain is None:
        return quant_cases.make_quantised(name, dtype=dtype, width_D=256, width_F=256, biases=True)
    return cases.make_case(
        layout=name.split()[1], dtype=plain, width_D=256, width_F=256, activate=cases.silu_gate, biases=True
    )


def compile_all(
    case: cases.SlotCase, target: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch, *,
    shared_bytes: int = SHARED_BYTES, tiles: tuple[int, ...] = (16, 128),
) -> dict[str, Compiled]:  # fmt: skip
    """Every kernel of a layer as it is launched for one token, and for tiles of so many rows."""
    from offmoe.kernels.geometry import Tiling, make_tiles
    from offmoe.kernels.triton import experts as triton_experts
    from offmoe.kernels.triton.launch import LayerKernels

    compiled = {
        name: Compiled(getattr(triton_experts, name), target) for name in ("choose_rows", "weighted_rows", "tile_rows")
    }
    for name, stand_in in compiled.items():
        monkeypatch.setattr(triton_experts, name, stand_in)
    width_F = case.layer.width(case.layer.down[0])
    activation = find_activation(cases.silu_gate, width_F, gated=True, device=torch.device("cpu"))
    layout, tiling = layout_of(case.layer), Tiling(shared_bytes=shared_bytes)
    kernels = LayerKernels(case.layer, layout, case.math, activation, case.slab, case.slot_bytes, tiling)
    x_TD, ids_TK, weights_TK = case.rows(1, 2)
    missing = torch.zeros(1, dtype=torch.int32)
    hidden = kernels.choose(x_TD, 2, ids_TK, case.slot_of_E, missing=missing)
    kernels.project_and_sum(hidden, ids_TK, case.slot_of_E, weights_TK, case.math.dtype, lookup=True)
    for block_rows in tiles:
        kernels.tiles(x_TD, ids_TK[0].int() * 0, ids_TK, *make_tiles(case.slot_of_E[ids_TK[0]], block_rows, 6))
    return compiled
