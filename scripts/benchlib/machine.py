"""What a result depends on besides the code: the machine, the versions, the model. No host or user names."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from benchlib.errors import ScriptError

PACKAGES = ("torch", "transformers", "accelerate")


def describe_machine() -> dict[str, str]:
    """Processor, cores this process may use, memory, system."""
    cpu_info = Path("/proc/cpuinfo").read_text()
    model = next(
        (line.split(":", 1)[1].strip() for line in cpu_info.splitlines() if line.startswith("model name")), "?"
    )
    flags = next((line.split() for line in cpu_info.splitlines() if line.startswith("flags")), [])
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile") if flag in flags]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": f"{model} ({', '.join(wide)})",
        "cores": str(num_cores()),
        "ram": f"{memory_bytes / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def describe_versions(root: Path) -> dict[str, str]:
    """Python, this project's commit, and the packages of this interpreter."""
    versions = {"python": platform.python_version(), "offmoe": _commit(root)}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _commit(root: Path) -> str:
    """The commit checked out in `root`, and whether tracked files differ from it."""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_model(model: Path) -> dict[str, str | int]:
    """Shapes from config.json, and the bytes of all weights and of those one decoded token reads.

    A token reads every weight but the embedding (one row of it) and, of each layer's experts, its top-k.
    Raises `ScriptError` if the folder is not a safetensors checkpoint.
    """
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ScriptError(f"{model} is not a checkpoint folder: {error}") from error
    num_experts = next(
        (config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config), 0
    )
    top_k = config.get("num_experts_per_tok", 0)
    all_bytes = token_bytes = 0.0
    for name, num_bytes in tensor_bytes(model):
        all_bytes += num_bytes
        if ".experts." in name:
            token_bytes += num_bytes * top_k / max(num_experts, 1)
        elif "embed_tokens" not in name or config.get("tie_word_embeddings"):
            token_bytes += num_bytes
    if not all_bytes:
        raise ScriptError(f"{model} holds no safetensors weights")
    return {
        "type": config.get("model_type", "?"),
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "experts": num_experts,
        "top_k": top_k,
        "vocab": config["vocab_size"],
        "weight_bytes": int(all_bytes),
        "token_bytes": int(token_bytes),
    }


def tensor_bytes(model: Path) -> list[tuple[str, int]]:
    """Name and bytes of every tensor, from the shards' headers."""
    sizes = []
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        sizes += [(name, entry["data_offsets"][1] - entry["data_offsets"][0]) for name, entry in header.items()]
    return sizes
