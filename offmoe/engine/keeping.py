"""Whether and how an engine keeps prompts: where a reading can be gone on from with the bits of a fresh one."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import torch

from offmoe.checkpoint.identity import model_hash
from offmoe.hf.door import transformers_version
from offmoe.kernels.row_blocks import BLOCK_TOKENS
from offmoe.kv.keeper import PromptKeeper
from offmoe.kv.kept_files import KeptFiles
from offmoe.kv.layout import fits
from offmoe.loader.loaded import LoadedModel

DEFAULT_CACHE_BYTES = 16 << 30

# Families whose rows do not depend on how a prompt is cut, if it is computed in blocks: each is tested, in float32 and
# bfloat16 (tests/kv/test_kept_bits.py). Of others prompts are kept up to a border of prefill chunks.
IN_BLOCKS = frozenset({
    "afmoe", "aria_text", "axk1", "beam", "cohere2_moe", "deepseek_ocr2_text", "deepseek_v2", "deepseek_v3", "dots1",
    "ernie4_5_moe", "ernie4_5_vl_moe_text", "exaone_moe", "flex_olmo", "flint", "gemma4_text", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe_text", "glm5_next_text", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "kolibri1", "laguna", "mellum", "mimo_v2_flash", "minimax_m2",
    "minimax_m3_vl_text", "mistral4", "mistral_large4_text", "mixtral", "muse_spark_text", "olmoe", "phimoe",
    "qwen2_moe", "qwen3_moe", "qwen3_omni_moe_text", "qwen3_vl_moe_text", "qwen4_exp_text", "solar_open",
    "unlimited_ocr_text", "zaya",
})  # fmt: skip


class Keeping(TypedDict):
    """Keywords of PrefixCache."""

    grid: int
    in_blocks: bool
    keeper: PromptKeeper | None


def keeping(parts: LoadedModel, folder: Path) -> Keeping:
    """The grid of a loaded model, and the keeper of its prompts, if any memory is planned for it."""
    plan = parts.plan
    if not parts.chunkable or parts.model.config.is_encoder_decoder:
        return {"grid": 0, "in_blocks": False, "keeper": None}
    chunk = plan.prefill_chunk
    in_blocks = (
        parts.device is None
        and parts.serving.cpu_backend is not None
        and parts.model.config.get_text_config().model_type in IN_BLOCKS
        and (chunk % BLOCK_TOKENS == 0 or chunk >= parts.context_length)
    )
    grid = BLOCK_TOKENS if in_blocks else chunk
    keeper = None
    if plan.kept_bytes:
        keeper = PromptKeeper(
            budget_bytes=plan.kept_bytes, block_tokens=grid, identity=_identity(parts, folder, grid, in_blocks),
            files=_files_of(parts, grid),
        )  # fmt: skip
    return {"grid": grid, "in_blocks": in_blocks, "keeper": keeper}


def _files_of(parts: LoadedModel, grid: int) -> KeptFiles | None:
    """The folder of kept prompts, if there is one."""
    config = parts.config
    if config.prompt_cache is None:
        return None
    size = DEFAULT_CACHE_BYTES if config.prompt_cache_size is None else config.prompt_cache_size
    return KeptFiles(
        Path(config.prompt_cache).expanduser(), size_bytes=size, fits=lambda block: fits(block, parts.layout, grid)
    )


def _identity(parts: LoadedModel, folder: Path, grid: int, in_blocks: bool) -> str:
    """All that the bits of a row may depend on beside the tokens before it."""
    model: Any = parts.model
    facts = {
        "model": model_hash(folder, parts.index.stored), "files": _files(folder), "grid": grid, "in_blocks": in_blocks,
        "chunk": 0 if in_blocks else parts.plan.prefill_chunk, "dtype": str(model.dtype),
        "attention": getattr(model.config.get_text_config(), "_attn_implementation", ""),
        "device": "cpu" if parts.device is None else parts.device.name,
        "kernels": str(getattr(parts.serving.cpu_backend, "kernels", "")), "threads": torch.get_num_threads(),
        "placement_invariant": parts.config.placement_invariant, "torch": torch.__version__,
        "transformers": transformers_version(), "offmoe": _version(),
    }  # fmt: skip
    return json.dumps(facts, sort_keys=True)


def _version() -> str:
    try:
        return version("offmoe")
    except PackageNotFoundError:  # a tree that is not installed
        return ""


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files with weights: a model that was trained on has the same shapes."""
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.gguf"))
    return [(path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in paths]
