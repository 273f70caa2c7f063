"""A checkpoint's word that it is quantised: config.json's `quantization_config`, checked. No torch.

What cannot be told from the tensors themselves is read here, and what offmoe does not read yet is refused by name.
Which tensors are quantised, and in groups of how many columns, the tensors' names and shapes say (`quantised.py`):
a config may be wrong about them, and its patterns are not run as regular expressions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from offmoe.core.errors import CheckpointError, UnsupportedModelError

Method = Literal["compressed-tensors", "fp8", "mxfp4"]
METHODS: tuple[Method, ...] = ("compressed-tensors", "fp8", "mxfp4")
# compressed-tensors' storage formats that hold integers and scales, or e4m3 numbers and scales.
INT_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
FLOAT_FORMATS = ("float-quantized", "naive-quantized")
_KEYS = ("quantization_config", "compression_config")
CHANNEL = -1
_INSTEAD = "use the bfloat16 version, or a compressed-tensors, fp8 or mxfp4 one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """Quantisation in config.json: `num_bits` of integers and `groups`, all that occur; a group of -1 is a whole row.

    `block` is fp8's (rows, columns) that share a scale, None where none are named. `quantises_activations`: other
    engines would round what goes into a product as well; offmoe does not.
    """

    method: Method
    num_bits: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    block: tuple[int, int] | None = None
    quantises_activations: bool = False


def read_quantisation(config: dict[str, Any]) -> Quantisation | None:
    """`config` is config.json; None for a checkpoint that is not quantised.

    Raises UnsupportedModelError for what is not read yet, naming it, and CheckpointError for a config of odd shape.
    """
    found = _find(config)
    if isinstance(config.get("quantization"), dict) and "quant_method" not in (found or {}):
        raise _not_read("mlx's own format (the key `quantization` of config.json)")
    if found is None:
        return None
    method = found.get("quant_method", "compressed-tensors" if "config_groups" in found else None)
    if not isinstance(method, str):
        raise CheckpointError("config.json has a quantization_config without a quant_method; download it again")
    match method:
        case "compressed-tensors":
            return _compressed_tensors(found)
        case "fp8":
            return _fp8(found)
        case "mxfp4":
            return Quantisation(method="mxfp4")
        case "gptq" if _given(found.get("dynamic")):
            raise _not_read("'gptq' with rules that differ by layer (`dynamic`)")
        case "gptq" | "awq":
            raise UnsupportedModelError(
                f"the checkpoint is quantised by {method!r}, whose matrices are turned; write it anew once, with "
                f"the same values: offmoe quantize SOURCE TARGET --expert-format int{found.get('bits', 4)}"
            )
        case "bitsandbytes":
            raise UnsupportedModelError(
                "the checkpoint is quantised by bitsandbytes, whose format no other engine reads from disk either; "
                "use the bfloat16 version"
            )
        case _:
            raise UnsupportedModelError(
                f"the checkpoint is quantised by {method!r}, which is not read yet; {_INSTEAD} (known: "
                f"{', '.join(METHODS)})"
            )


def _find(config: dict[str, Any]) -> dict[str, Any] | None:
    for where in (config, config.get("text_config")):
        for key in _KEYS:
            found = where.get(key) if isinstance(where, dict) else None
            if isinstance(found, dict):
                return found
    return None


def _compressed_tensors(config: dict[str, Any]) -> Quantisation:
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        raise UnsupportedModelError(
            f"the checkpoint's quantization_status is {status!r}, only 'compressed' ones are read; {_INSTEAD}"
        )
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise _not_read(f"sparsity format {sparsity['format']!r}")
    if _given(config.get("transform_config")):
        raise _not_read("a transform_config (rotated weights)")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError("config.json's quantization_config has no config_groups; download it again")
    bits: set[int] = set()
    sizes: set[int] = set()
    block: tuple[int, int] | None = None
    activations = False
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise CheckpointError(f"config.json's config group {name!r} is no object; download it again")
        activations |= _given(group.get("input_activations"))
        weights = group.get("weights")
        if weights is None:
            continue
        if not isinstance(weights, dict):
            raise CheckpointError(f"config.json's config group {name!r} describes no weights; download it again")
        is_integer = _is_integer(group.get("format") or config.get("format"), weights)
        if is_integer:
            bits.add(int(weights["num_bits"]))
        if weights.get("strategy") == "block" and not is_integer:
            block = _block(weights.get("block_structure"), "block_structure")
        else:
            sizes.add(_group_size(weights))
    return Quantisation(
        method="compressed-tensors", num_bits=frozenset(bits), groups=frozenset(sizes), block=block,
        quantises_activations=activations,
    )  # fmt: skip


def _is_integer(storage: object, weights: dict[str, Any]) -> bool:
    """False: e4m3. Refuses everything else."""
    if isinstance(storage, str) and "fp4" in storage:
        raise _not_read(f"compressed-tensors format {storage!r} (known: {', '.join((*INT_FORMATS, FLOAT_FORMATS[0]))})")
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)) or isinstance(bits, bool):
        raise _not_read(
            f"compressed-tensors weights of type {kind!r} with {bits!r} bits (known: int with 4 or 8, float with 8)"
        )
    known = FLOAT_FORMATS if kind == "float" else INT_FORMATS
    if storage not in known:
        raise _not_read(f"compressed-tensors format {storage!r} of {kind!r} weights (known: {', '.join(known)})")
    if weights.get("actorder") in ("group", True):
        raise _not_read("compressed-tensors' activation ordering by group (actorder)")
    return bool(kind == "int")


def _group_size(weights: dict[str, Any]) -> int:
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "channel" if size == CHANNEL else "tensor" if size is None else "group"
    if strategy == "channel":
        return CHANNEL
    if strategy != "group":
        raise _not_read(f"compressed-tensors strategy {strategy!r} (known: group, channel)")
    if type(size) is not int or size < 1:
        raise CheckpointError(f"config.json says groups of {size!r} columns; a positive whole number is needed")
    return size


def _fp8(config: dict[str, Any]) -> Quantisation:
    block = config.get("weight_block_size")
    if block is None:
        raise _not_read("fp8 without weight_block_size (one scale a tensor)")
    fmt = config.get("fmt", "e4m3")
    if fmt not in ("e4m3", "float8_e4m3fn"):
        raise _not_read(f"fp8 of format {fmt!r} (known: e4m3)")
    return Quantisation(method="fp8", block=_block(block, "weight_block_size"), quantises_activations=True)


def _block(value: object, name: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or any(type(size) is not int or size < 1 for size in value):
        raise CheckpointError(f"config.json says {name} {value!r}; two positive whole numbers are needed")
    return value[0], value[1]


def _not_read(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the checkpoint is quantised with {what}, which is not read yet; {_INSTEAD}")


def _given(value: object) -> bool:
    return value not in (None, {}, [], False)
