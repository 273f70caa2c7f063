"""The kernels go through Triton's compiler, which needs no device: the interpreter takes what the compiler may refuse.

And what comes out loads weights 16 bytes a lane. Not run where this process interprets.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import slot_cases as cases
import torch

from offmoe.formats.layout import layout_of
from offmoe.kernels.activations import find_activation

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted")

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
# What torch's allocator aligns; index tensors may be pieces of one upload.
ALIGNED = ("in_ptr", "slab_ptr", "out_ptr", "round_ptr")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Compiled:
    """Stands for a kernel: a launch compiles it for `target` and keeps the assembly."""

    def __init__(self, kernel: Any, target: tuple[str, int, int]) -> None:
        self.kernel, self.target = kernel, target
        self.assembly: list[str] = []

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
        self.assembly.append(triton.compile(source, target=GPUTarget(*self.target), options=options).asm["ptx"])


@pytest.mark.parametrize("layout", ["published", "transposed"])
def test_every_kernel_compiles_and_loads_wide(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offmoe.kernels import triton_experts
    from offmoe.kernels.geometry import Tiling, make_tiles
    from offmoe.kernels.triton_launch import LayerKernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = {
        name: Compiled(getattr(triton_experts, name), ("cuda", 80, 32))
        for name in ("choose_rows", "weighted_rows", "tile_rows")
    }
    for name, stand_in in compiled.items():
        monkeypatch.setattr(triton_experts, name, stand_in)
    case = cases.make_case(
        layout=layout, dtype=torch.bfloat16, width_D=256, width_F=128, activate=cases.silu_gate, biases=True
    )
    activation = find_activation(cases.silu_gate, 128, gated=True, device=torch.device("cpu"))
    kernels = LayerKernels(
        case.layer,
        layout_of(case.layer),
        case.math,
        activation,
        case.slab,
        case.slot_bytes,
        Tiling(shared_bytes=99 << 10),
    )
    x_TD, ids_TK, weights_TK = case.rows(1, 2)
    missing = torch.zeros(1, dtype=torch.int32)
    hidden = kernels.choose(x_TD, 2, ids_TK, case.slot_of_E, missing=missing)
    kernels.project_and_sum(hidden, ids_TK, case.slot_of_E, weights_TK, torch.bfloat16, lookup=True)
    kernels.tiles(x_TD, ids_TK[0].int() * 0, ids_TK, *make_tiles(case.slot_of_E[ids_TK[0]], 16, 6))
    for name, stand_in in compiled.items():
        assert stand_in.assembly, name
        wide = r"cp\.async\.cg[\w.:]* .*0x10" if name == "tile_rows" else r"ld\.global[\w.:]*\.v4\.b32"
        assert all(re.search(wide, assembly) for assembly in stand_in.assembly), f"{name} loads narrowly"
