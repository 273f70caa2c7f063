"""Compile every Triton kernel to machine code for older and newer GPUs, none of which is needed for it.

    python scripts/triton_architectures.py [--capability 75 ...] [--case "bf16 published" ...]

A row a kernel, as a Markdown table: the most registers, shared memory and spilled bytes that any launch of it takes, by
the assembler that Triton brings (ptxas -v). The last line is JSON. A compiler that LLVM ends (an abort, no exception)
ends only the process of its capability and case. Exit code 1 where more than SPILLED_BYTES spill, the compiler refused,
or a program needs more shared memory than there is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import benchlib.test_helpers  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent

# Shared memory that one program may use, KiB (CUDA C Programming Guide, technical specifications per capability).
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
# Bytes a thread that are spilled without harm: two registers, out and in.
SPILLED_BYTES = 16
WHOLE_CAPABILITY = 80  # as offmoe/kernels/triton/slots.py: below it no bfloat16, and no tiles
PLAIN = ("bf16 published", "bf16 transposed", "fp16 published", "fp32 published")
QUANTISED = ("int4 zeros", "int8", "mxfp4", "fp8", "q4_k", "q6_k", "q8_0")
LEFT_TO_TORCH = "no bfloat16: left to torch"
USED = re.compile(r"Used (\d+) registers")
SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(kw_only=True)
class Row:
    """A kernel on a capability."""

    case: str
    capability: int
    kernel: str = "all"
    launches: int = 0
    registers: int = 0
    shared_kib: float = 0.0
    spilled_bytes: int = 0
    note: str = ""

    @property
    def is_fine(self) -> bool:
        """Whether it would run as meant."""
        refused = bool(self.note) and self.note != LEFT_TO_TORCH
        spills = self.spilled_bytes > SPILLED_BYTES
        return not (refused or spills or self.shared_kib > SHARED_KIB[self.capability])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, action="append", choices=SHARED_KIB)
    parser.add_argument("--case", action="append", choices=[*PLAIN, *QUANTISED])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    capabilities, names = options.capability or list(SHARED_KIB), options.case or [*PLAIN, *QUANTISED]
    if options.worker:
        print(json.dumps([asdict(row) for row in compiled(names[0], capabilities[0])]))
        return 0
    print("| case | capability | kernel | launches | registers | shared KiB | spilled bytes | note |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for name in names:
        for capability in capabilities:
            for row in in_process(name, capability):
                print("| " + " | ".join(str(value) for value in asdict(row).values()) + " |", flush=True)
                rows.append(row)
    print(json.dumps({"fine": all(row.is_fine for row in rows), "rows": len(rows)}))
    return 0 if all(row.is_fine for row in rows) else 1


def in_process(name: str, capability: int) -> list[Row]:
    """Rows of a case on a capability, compiled by a process of its own."""
    if name.startswith("bf16") and capability < WHOLE_CAPABILITY:
        return [Row(case=name, capability=capability, note=LEFT_TO_TORCH)]
    command = [sys.executable, __file__, "--worker", "--capability", str(capability), "--case", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [Row(**found) for found in json.loads(done.stdout.splitlines()[-1])]
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no word"]
    said = next((line for line in lines if "LLVM ERROR" in line or "error:" in line.lower()), lines[-1])
    return [Row(case=name, capability=capability, note=f"exit {done.returncode}: {said[:90]}")]


def compiled(name: str, capability: int, *, tiles: tuple[int, ...] = (16, 128)) -> list[Row]:
    """Compile the kernels of a case as they are launched on the capability, tiles of so many rows if it has any."""
    import pytest
    import torch
    from test_triton_compile import case_of, compile_all

    is_whole = capability >= WHOLE_CAPABILITY
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", folder)
        found = compile_all(
            case_of(name, torch.bfloat16 if is_whole else torch.float16), ("cuda", capability, 32), patch,
            shared_bytes=SHARED_KIB[capability] << 10, tiles=tiles if is_whole else (),
        )  # fmt: skip
        rows = []
        for kernel, stand_in in found.items():
            row = Row(case=name, capability=capability, kernel=kernel, launches=len(stand_in.assembly))
            row.shared_kib = round(stand_in.shared_bytes / 1024, 1)
            measure(row, stand_in.assembly, Path(folder))
            rows.append(row)
        return [row for row in rows if row.launches]


def measure(row: Row, assemblies: list[str], folder: Path) -> None:
    """Assemble every launch, and take down the most."""
    for assembly in assemblies:
        said = assemble(assembly, row.capability, folder)
        row.registers = max(row.registers, *map(int, USED.findall(said)))
        spilled = (int(stores) + int(loads) for stores, loads in SPILLED.findall(said))
        row.spilled_bytes = max(row.spilled_bytes, *spilled)


def assemble(assembly: str, capability: int, folder: Path) -> str:
    """The words of the assembler that Triton uses for the capability."""
    from triton.backends.nvidia.compiler import get_ptxas

    (source := folder / "kernel.ptx").write_text(assembly)
    target = re.search(r"^\.target (sm_\w+)", assembly, re.MULTILINE)
    assert target is not None, "an assembly without a target"
    command: list[Any] = [get_ptxas(capability).path, "-v", f"--gpu-name={target.group(1)}", source, "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr + done.stdout


if __name__ == "__main__":
    sys.exit(main())
