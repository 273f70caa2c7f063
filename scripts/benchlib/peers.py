"""The systems that `scripts/bench systems` can run: each name turned into a command line that prints one JSON line.

Each runs in a process and, where it needs one, an interpreter of its own. All get the same ids, the same split into
prefill and decode, and the same number of threads.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchlib.errors import ScriptError
from benchlib.sizes import format_gb

HERE = Path(__file__).resolve().parent
ACCELERATE_OVERHEAD_BYTES = 2_300_000_000  # Python and torch, and the staged experts of one offloaded layer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Parts of the command lines. `rams`, `prefetches`, `policies`, `packs`: offmoe's flags as typed; empty:
    its defaults.
    """

    model: Path
    ids: Path
    prefill: int
    decode: int
    threads: int
    cap_bytes: int | None
    rams: tuple[str, ...]
    prefetches: tuple[str, ...]
    policies: tuple[str, ...]
    packs: tuple[str, ...]
    warm: bool
    accelerate_bytes: int | None
    llama_python: Path | None
    gguf_dir: Path
    offload_dir: Path


@dataclass(frozen=True, kw_only=True)
class System:
    """One row of the table. `weight_bits` is the size of a weight in the file, its share of scales included."""

    name: str
    weights: str
    weight_bits: float
    command: list[str]


def build_systems(names: list[str], options: Options) -> list[System]:
    """The systems in the order asked. Raises `ScriptError` for an unknown name or a missing requirement."""
    unknown = [name for name in names if name not in BUILDERS]
    if unknown or not names:
        raise ScriptError(f"unknown system {', '.join(unknown) or '(none)'}; known: {', '.join(BUILDERS)}")
    return [system for name in names for system in BUILDERS[name](name, options)]


def _offmoe(name: str, options: Options) -> list[System]:
    """One system for each `--ram`, `--prefetch`, `--policy` and `--pack` value with each of the others.

    "offmoe-int4" is the folder beside the model that `offmoe quantize` has written, with `-int4` added to its name.
    """
    folder, weights, bits = options.model, "as published", 16.0
    if name != "offmoe":
        folder, weights, bits = folder.with_name(folder.name + "-int4"), "int4, group 32", 4.5
        if not folder.exists():
            raise ScriptError(f"{name} needs {folder}: offmoe quantize {options.model} {folder} --expert-format int4")
    command = [sys.executable, "-m", "offmoe", "bench", str(folder), "--ids", str(options.ids)]
    command += ["--prefill", str(options.prefill), "--json", *(["--warm"] if options.warm else [])]
    systems = []
    asked = (options.rams, options.prefetches, options.policies, options.packs)
    for ram, prefetch, policy, pack in product(*(values or ("",) for values in asked)):
        flags, label = list(command), [name]
        for flag, value, word in (
            ("--ram", ram, ""),
            ("--prefetch", prefetch, "prefetch "),
            ("--policy", policy, "policy "),
            ("--pack", pack, "pack "),
        ):
            if value:
                flags += [flag, value]
                label.append(f"{word}{value}")
        systems.append(System(name=" ".join(label), weights=weights, weight_bits=bits, command=flags))
    return systems


def _shared_flags(options: Options) -> list[str]:
    return [
        "--ids", str(options.ids), "--prefill", str(options.prefill),
        "--decode", str(options.decode), "--threads", str(options.threads),
    ]  # fmt: skip


def _hugging_face(name: str, options: Options, *flags: str) -> list[System]:
    script = [sys.executable, str(HERE / "peer_hf.py"), str(options.model)]
    command = [*script, *_shared_flags(options), *flags]
    return [System(name=name, weights="as published", weight_bits=16, command=command)]


def _accelerate(name: str, options: Options) -> list[System]:
    """accelerate with every expert on disk, or with as many layers' in RAM as `accelerate_bytes` holds.

    Offloaded tensors are mapped, so the page cache keeps the experts in use; whole layers held in RAM take that room
    away. Under a 4.0 GB cap on 7.7 GB, one layer of six held: 0.3-0.5 tok/s; none: 0.7-1.4 (busy machine, 16 tokens).
    """
    return _offloading(name, options, "experts", options.accelerate_bytes or 0)


def _accelerate_auto(name: str, options: Options) -> list[System]:
    """accelerate's own device map, given `accelerate_bytes`, or what the cap leaves for weights."""
    keep_bytes = options.accelerate_bytes
    if keep_bytes is None:
        if options.cap_bytes is None:
            raise ScriptError(f"{name} offloads what memory cannot hold: give --cap or --accelerate-ram")
        keep_bytes = options.cap_bytes - ACCELERATE_OVERHEAD_BYTES
    if keep_bytes <= 0:
        overhead = format_gb(ACCELERATE_OVERHEAD_BYTES)
        raise ScriptError(f"{name} needs about {overhead} beside its weights; raise --cap or give --accelerate-ram")
    return _offloading(name, options, "auto", keep_bytes)


def _offloading(name: str, options: Options, mode: str, keep_bytes: int) -> list[System]:
    flags = ["--offload", mode, "--cpu-bytes", str(keep_bytes), "--offload-dir", str(options.offload_dir)]
    return _hugging_face(name, options, *flags)


def _llama(name: str, options: Options, weights: str, bits: float, *flags: str) -> list[System]:
    """llama.cpp over a GGUF of the same weights, which is made on first use, kept, and made again for newer weights."""
    if options.llama_python is None:
        raise ScriptError(f"{name} needs --llama-python, the interpreter of an environment with llama-cpp-python")
    gguf = options.gguf_dir / f"{options.model.name}-{weights}.gguf"
    weights_s = max(path.stat().st_mtime for path in options.model.glob("*.safetensors"))
    if not gguf.exists() or gguf.stat().st_mtime < weights_s:
        print(f"{gguf.name}: converting", file=sys.stderr, flush=True)
        writer = [str(options.llama_python), str(HERE / "gguf_writer.py"), str(options.model), str(gguf)]
        if subprocess.run([*writer, "--type", weights], check=False).returncode != 0:
            raise ScriptError(f"{gguf.name} could not be written; the lines above say why")
    command = [str(options.llama_python), str(HERE / "peer_llama.py"), str(gguf), *_shared_flags(options), *flags]
    return [System(name=name, weights=weights, weight_bits=bits, command=command)]


BUILDERS: dict[str, Callable[[str, Options], list[System]]] = {
    "offmoe": _offmoe,
    "offmoe-int4": _offmoe,
    "transformers": lambda name, options: _hugging_face(name, options, "--experts", "grouped_mm"),
    "transformers-batched": lambda name, options: _hugging_face(name, options, "--experts", "batched_mm"),
    "transformers-eager": lambda name, options: _hugging_face(name, options, "--experts", "eager"),
    "accelerate": _accelerate,
    "accelerate-auto": _accelerate_auto,
    "llama": lambda name, options: _llama(name, options, "f16", 16.0),
    "llama-q4_0": lambda name, options: _llama(name, options, "q4_0", 4.5),
    "llama-q4_0-mapped": lambda name, options: _llama(name, options, "q4_0", 4.5, "--no-repack"),
}
"""Every system by name. llama.cpp repacks q4_0 into memory of its own; `mapped` keeps it in the file's pages."""
