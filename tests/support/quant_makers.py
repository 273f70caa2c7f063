"""Tiny quantised checkpoints, written by the libraries whose formats they are, and read back by transformers.

compressed-tensors quantises and packs what it packs in published checkpoints; fp8 is transformers' own quantiser; mxfp4
has no writer that runs here, so its codes are drawn at random: every byte is a valid one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from families import build, save_layout
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel
from transformers.utils.quantization_config import CompressedTensorsConfig

WIDTHS: dict[str, object] = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96}
FP8_BLOCK = [16, 32]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """compressed-tensors' words. `group` None is a scale for a whole row."""

    bits: int
    group: int | None
    symmetric: bool = True
    storage: str = "pack-quantized"
    activations: bool = False
    # "float" is e4m3, with `block` (rows, columns) a scale or, without one, a scale for a whole row.
    kind: str = "int"
    block: list[int] | None = None
    # Bits of everything but the experts, where they differ; None leaves it unquantised.
    dense_bits: int | None = None
    # Attributes of the family's config. As they are, models are 48 wide and experts 20, which few groups divide.
    overrides: dict[str, object] = field(default_factory=lambda: WIDTHS)

    @property
    def multiple(self) -> int:
        """Widths that are quantised are multiples of this."""
        return self.group or 32 // min(self.bits, self.dense_bits or self.bits)


def save_compressed(folder: Path, name: str, scheme: Scheme, *, dtype: torch.dtype = torch.float32) -> None:
    """The family's tiny model with quantised experts, and other linear layers too where the scheme says so."""
    from compressed_tensors.quantization import QuantizationConfig

    tensors = _save_plain(folder, name, dtype, scheme.overrides)
    experts, dense = _schemes(scheme)
    groups = {f"group_{idx}": group for idx, group in enumerate((experts, dense)) if group is not None}
    written = {}
    for key, tensor in tensors.items():
        chosen = experts if ".experts." in key else dense
        if chosen is None or not _is_linear(key, tensor) or tensor.shape[1] % scheme.multiple:
            written[key] = tensor
            continue
        written |= {f"{key.removesuffix('weight')}{part}": value for part, value in _compress(tensor, chosen).items()}
    config = QuantizationConfig(
        config_groups=groups, format=scheme.storage, quantization_status="compressed", ignore=["lm_head"]
    )
    _write(folder, written, config.model_dump(mode="json"))


def save_fp8(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **overrides: object) -> None:
    """Every linear layer that whole blocks cover, as DeepSeek-V3 is published."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = FineGrainedFP8Config(weight_block_size=FP8_BLOCK)
    quantise = Fp8Quantize(type("Holder", (), {"quantization_config": config}))
    written = {}
    for key, tensor in _save_plain(folder, name, dtype, WIDTHS | overrides).items():
        written |= quantise._quantize_one(key, tensor) if _is_linear(key, tensor) else {key: tensor}
    _write(folder, written, {"quant_method": "fp8", "weight_block_size": FP8_BLOCK, "activation_scheme": "dynamic"})


def save_mxfp4(folder: Path, name: str = "gpt_oss", *, dtype: torch.dtype = torch.float32, **overrides: object) -> None:
    """gpt-oss's experts as published: `gate_up_proj_blocks` and `gate_up_proj_scales`."""
    generator = torch.Generator().manual_seed(3)
    written = {}
    for key, tensor in _save_plain(folder, name, dtype, {**WIDTHS, "intermediate_size": 32, **overrides}).items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            written[key] = tensor
            continue
        num_experts, width, num_out = tensor.shape
        shape = (num_experts, num_out, width // 32, 16)
        written[f"{key}_blocks"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        written[f"{key}_scales"] = torch.randint(121, 124, shape[:-1], generator=generator, dtype=torch.uint8)
    _write(folder, written, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def dequantised_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint as transformers dequantises it, whole and eager."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    kinds: dict[str, Any] = {
        "compressed-tensors": CompressedTensorsConfig, "fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config,
    }  # fmt: skip
    how = kinds[config["quant_method"]](dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager", attn_implementation="eager", quantization_config=how
    )
    assert isinstance(model, PreTrainedModel)
    return model.to(dtype).eval()  # transformers 5.20 leaves mxfp4 in bfloat16: the same values


def decompressed_tensors(folder: Path, scheme: Scheme) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint, those that are packed as compressed-tensors unpacks them."""
    from compressed_tensors.compressors import BaseCompressor

    schemes = _schemes(scheme)
    tensors = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    modules = {key.rpartition(".")[0] for key in tensors if key.endswith(".weight_scale")}
    plain = {
        key: tensor for key, tensor in tensors.items()
        if key.rpartition(".")[0] not in modules or not key.rpartition(".")[2].startswith("weight")
    }  # fmt: skip
    for module in modules:
        chosen = schemes[0] if ".experts." in module else schemes[1]
        state = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == module}
        compressor = BaseCompressor.get_value_from_registry(chosen.format)
        plain[f"{module}.weight"] = compressor.decompress(state, chosen)["weight"]
    return plain


def decompressed_model(
    folder: Path, scheme: Scheme, dtype: torch.dtype = torch.float32, *, added: dict[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """The checkpoint as compressed-tensors unpacks it: transformers does that for packed symmetric experts only.
    `added`: tensors that transformers wants beyond those.
    """
    config = json.loads((folder / "config.json").read_text())
    plain = decompressed_tensors(folder, scheme)
    plain |= added or {}
    target = folder / "decompressed"
    target.mkdir()
    save_file({key: t.contiguous() for key, t in plain.items()}, target / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class.from_pretrained(target, dtype=dtype, attn_implementation="eager")
    assert isinstance(model, PreTrainedModel)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def edit(folder: Path, change: Any) -> None:
    """Rewrite the checkpoint after `change(tensors, quantization_config)`, which may alter both."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def _save_plain(folder: Path, name: str, dtype: torch.dtype, overrides: dict[str, object]) -> dict[str, torch.Tensor]:
    save_layout(build(name, dtype=dtype, overrides=overrides), folder, "published")
    return load_file(folder / "model.safetensors")


def _is_linear(key: str, tensor: torch.Tensor) -> bool:
    """The weights of nn.Linear that published checkpoints quantise: no routers, no embeddings, no output head."""
    wanted = ".experts." in key or key.endswith(("proj.weight", "_proj_with_mqa.weight"))
    return wanted and key.endswith(".weight") and tensor.dim() == 2


def _schemes(scheme: Scheme) -> tuple[Any, Any]:
    """The experts' group, and that of other linear layers or None."""
    from compressed_tensors.quantization import QuantizationScheme

    experts = QuantizationScheme(
        targets=["re:.*experts.*"], weights=_args(scheme, scheme.bits), format=scheme.storage,
        input_activations=_activation_args() if scheme.activations else None,
    )  # fmt: skip
    if scheme.dense_bits is None:
        return experts, None
    weights = _args(scheme, scheme.dense_bits)
    return experts, QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")


def _args(scheme: Scheme, bits: int) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    how: dict[str, Any] = {"strategy": "channel"}
    if scheme.block is not None:
        how = {"strategy": "block", "block_structure": scheme.block}
    elif scheme.group is not None:
        how = {"strategy": "group", "group_size": scheme.group}
    return QuantizationArgs(num_bits=bits, type=scheme.kind, symmetric=scheme.symmetric, **how)


def _activation_args() -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True)


def _compress(weight: torch.Tensor, scheme: Any) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    rows, columns = scheme.weights.block_structure or (1, scheme.weights.group_size or weight.shape[1])
    grouped = weight.view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
    scale, zero = calculate_qparams(grouped.amin((1, 3)), grouped.amax((1, 3)), scheme.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    compressed: dict[str, torch.Tensor] = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)
    return compressed


def _write(folder: Path, tensors: dict[str, torch.Tensor], quantisation: dict[str, Any]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
