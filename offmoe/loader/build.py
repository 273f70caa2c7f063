"""From a folder's config to a model without weights, refusing what offmoe does not run before anything is read."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from offmoe.attention.sdpa import save_memory
from offmoe.checkpoint.gguf.file import is_gguf
from offmoe.checkpoint.index import ALIASES, CheckpointIndex, read_config
from offmoe.checkpoint.json_file import read_json
from offmoe.checkpoint.model_dtype import model_dtype
from offmoe.checkpoint.quant_config import Quantisation, read_quantisation
from offmoe.checkpoint.shard_file import read_refused
from offmoe.core.errors import CheckpointError, UnsupportedModelError
from offmoe.formats.dense import TORCH_DTYPES
from offmoe.hf.adapters.find import adapt_experts
from offmoe.hf.frequencies import scale_frequencies
from offmoe.hf.grok1.register import register_grok1
from offmoe.hf.internals import experts_modules, served_families
from offmoe.memory.shape import largest_number

# What a config of impossible numbers makes transformers' constructors raise.
_CONFIG_ERRORS = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, AssertionError, RuntimeError, OSError,
    ImportError,
)  # fmt: skip
# Routings that look at later tokens, and how configs name them.
_NOT_CAUSAL = {"soft MoE": r"(?<!micro)soft[-_ ]?moe", "expert choice": r"experts?[-_ ]?choice"}
# Named when no supported family has a name like the one that was asked for.
_WELL_KNOWN = "mixtral, qwen3_moe, deepseek_v3, gpt_oss"
# Published models have at most 126.
MAX_LAYERS = 1024
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")


def read_model_config(folder: Path, *, trust_remote_code: bool) -> tuple[PreTrainedConfig, Quantisation | None]:
    """config.json as transformers' class, and how the checkpoint is quantised, which the class is not told.

    So the model is built of plain modules, whatever its weights are stored as. Raises UnsupportedModelError naming the
    nearest supported type, or the quantisation that is not read.
    """
    if is_gguf(folder):
        return _gguf_config(folder), None
    register_grok1()
    raw = read_config(folder)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{folder / 'config.json'} has no model_type; it is no Hugging Face model config")
    _refuse_routing(raw)
    if "auto_map" in raw and model_type not in transformers.CONFIG_MAPPING and not trust_remote_code:
        raise UnsupportedModelError(
            f"{model_type!r} brings its own Python code, which offmoe does not run unasked; read it, then use "
            "--trust-remote-code"
        )
    if model_type not in transformers.CONFIG_MAPPING and "auto_map" not in raw:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know the architecture {model_type!r}"
            f"{_nearest(model_type)}; a newer transformers may know it"
        )
    quantisation = read_quantisation(raw)
    try:
        if model_type in ALIASES.values() and read_json(folder / "config.json").get("model_type") in ALIASES:
            config = AutoConfig.for_model(**raw)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            part.__dict__.pop("quantization_config", None)
        return config, quantisation
    except _CONFIG_ERRORS as error:
        raise _bad_config(folder / "config.json", model_type, error) from None
    except Exception as error:  # the hub's strict dataclass errors share no base with the above
        if type(error).__module__.startswith("huggingface_hub"):
            raise _bad_config(folder / "config.json", model_type, error) from None
        raise


def _refuse_routing(raw: dict[str, Any]) -> None:
    """Raises UnsupportedModelError where the config names a routing that no next token can be generated with."""
    architectures = raw.get("architectures")
    names = [raw["model_type"], *(architectures if isinstance(architectures, list) else ())]
    names += [value for key, value in raw.items() if re.search("rout|moe", key)]
    for name in names:
        for routing, pattern in _NOT_CAUSAL.items():
            if isinstance(name, str) and re.search(pattern, name, re.IGNORECASE):
                raise UnsupportedModelError(
                    f"{name!r} is {routing}: there a token's experts depend on tokens that come after it, so "
                    "text cannot be generated token by token; offmoe runs models whose tokens choose their experts, as "
                    f"{_WELL_KNOWN}"
                )


def _gguf_config(path: Path) -> PreTrainedConfig:
    register_grok1()
    values = read_config(path)
    try:
        config = AutoConfig.for_model(**values)
    except Exception as error:  # as above
        if not isinstance(error, _CONFIG_ERRORS) and not type(error).__module__.startswith("huggingface_hub"):
            raise
        raise CheckpointError(f"{path} has metadata that make no {values['model_type']}: {_one_line(error)}") from None
    assert isinstance(config, PreTrainedConfig)
    return config


def _bad_config(path: Path, model_type: str, error: Exception) -> CheckpointError:
    if isinstance(error, OSError) and error.errno is not None:
        return read_refused(path, error)
    return CheckpointError(f"{path} is no valid {model_type} config: {_one_line(error)}")


def _config_path(index: CheckpointIndex) -> Path:
    return index.files[0].path if index.is_gguf else index.folder / "config.json"


def build_on_meta(config: PreTrainedConfig, index: CheckpointIndex, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model with parameters that have shapes but no memory; buffers are real.

    Raises UnsupportedModelError for a dense model, and for an MoE whose experts are not behind transformers' door.
    """
    _refuse_endless(config, index)
    model = _instantiate(config, index, trust_remote_code=trust_remote_code)
    adapt_experts(model)
    if not experts_modules(model):
        if _looks_moe(index) and config.model_type in served_families():
            raise CheckpointError(
                f"{_config_path(index)} asks for no experts, the tensors hold some; config and tensors are of "
                "different models"
            )
        if _looks_moe(index):
            raise UnsupportedModelError(
                f"{type(model).__name__} ({config.model_type}) keeps its experts where offmoe cannot serve them"
                f"{_nearest(config.model_type)}; see docs/models.md"
            )
        raise UnsupportedModelError(
            f"{type(model).__name__} is a dense model: it has no experts to stream; use transformers or llama.cpp"
        )
    model.eval()
    if index.frequencies is not None:
        scale_frequencies(model, index.frequencies)
    save_memory(model)
    if index.sampling and model.generation_config is not None:
        model.generation_config.update(**index.sampling)
    path = index.folder / "generation_config.json"
    if path.is_file() and not index.is_gguf:
        read_json(path)  # or refuse it
        try:
            model.generation_config = GenerationConfig.from_pretrained(index.folder)
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise read_refused(path, error) from None
            raise CheckpointError(f"{path} is not valid: {_one_line(error)}") from None
    return model


def _refuse_endless(config: PreTrainedConfig, index: CheckpointIndex) -> None:
    """Raise CheckpointError for a number of layers that no model has: building them takes for ever."""
    stated = config.to_dict()
    for name in _LAYER_COUNTS:
        if (num_layers := largest_number(stated, name, 0)) > MAX_LAYERS:
            raise CheckpointError(
                f"{_config_path(index)} asks for {num_layers} layers ({name}); models have at most {MAX_LAYERS}"
            )


def _instantiate(config: PreTrainedConfig, index: CheckpointIndex, *, trust_remote_code: bool) -> PreTrainedModel:
    dtype = _gguf_dtype(index) if index.is_gguf else _folder_dtype(index)
    model_class = _model_class(config, index)
    if model_class is None and not trust_remote_code and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(
            f"{config.model_type!r} has no text generation model in transformers{_nearest(config.model_type)}"
        )
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            if model_class is not None:
                return model_class._from_config(config, dtype=dtype)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except _CONFIG_ERRORS as error:
        raise _bad_config(_config_path(index), config.model_type, error) from None


def _model_class(config: PreTrainedConfig, index: CheckpointIndex) -> Any:
    """The class that the checkpoint names, when transformers has it and it generates."""
    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        given = repr(names)[:100]
        raise CheckpointError(f"{_config_path(index)}: architectures is {given}, it must be a list of class names")
    for name in names:
        found: Any = getattr(transformers, name, None)
        if _is_generator(found):
            return found
    return None


def _is_generator(found: Any) -> bool:
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        return False
    generator: Any = found
    return bool(generator.can_generate())


def _folder_dtype(index: CheckpointIndex) -> torch.dtype:
    raw = read_json(index.folder / "config.json")
    return TORCH_DTYPES[model_dtype(raw, index.tensors.values(), is_gguf=False)]


def _gguf_dtype(index: CheckpointIndex) -> torch.dtype:
    return TORCH_DTYPES[model_dtype({}, index.tensors.values(), is_gguf=True)]


def _looks_moe(index: CheckpointIndex) -> bool:
    return any(re.search(r"\bexperts?\b|moe|\bexpert_", name) for name in index.tensors)


def _nearest(model_type: str) -> str:
    served = [name for name in served_families() if name != model_type]
    close = difflib.get_close_matches(model_type, served, n=1, cutoff=0.6)
    return (
        f"; nearest that offmoe runs: {close[0]}" if close else f"; offmoe runs {_WELL_KNOWN} and {len(served)} in all"
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
