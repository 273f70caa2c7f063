"""A GGUF file's metadata as numbers that are checked, with a record of the keys that were read.

A key under the architecture's name that nobody reads may change the model's numbers. So `refuse_unread` names it,
unless it is listed here as harmless. No torch.
"""

from __future__ import annotations

import re
from typing import Any

from offmoe.checkpoint.gguf.header import GgufHeader
from offmoe.core.errors import CheckpointError, UnsupportedModelError

MAX_SIZE = 1 << 40
_OF_A_LAYER = re.compile(r"blk\.(\d{1,5})\.(.+)")
_EXPERT_OF_A_LAYER = re.compile(r"blk\.\d{1,5}\.ffn_gate\.(\d{1,5})\.weight")
# Keys that say nothing new: sizes that the tensors have, which layers are dense (they lack experts), the context that a
# published model was tuned with, the order of q and k (an architecture has one), an epsilon of norms the model lacks.
HARMLESS = frozenset({
    "vocab_size", "feed_forward_length", "expert_feed_forward_length", "expert_shared_feed_forward_length",
    "expert_shared_count", "leading_dense_block_count", "rope.scaling.finetuned", "tensor_data_layout",
    "attention.layer_norm_epsilon", "nextn_predict_layers", "moe_every_n_layers", "interleave_moe_layer_step",
    "decoder_start_token_id",
})  # fmt: skip
# Keys that change numbers unless they have one of these values, the usual ones.
_USUAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "use_parallel_residual": (False,), "pooling_type": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_group_count": (0, 1), "expert_group_used_count": (0, 1), "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,), "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0), "attention.scale": (0.0,), "final_logit_softcapping": (0.0,),
    "attn_logit_softcapping": (0.0,), "router_logit_softcapping": (0.0,), "swin_norm": (False,),
    "attention.temperature_scale": (0.0,), "attention.temperature_length": (0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0), "rope.scaling.yarn_attn_factor": (-1.0, 1.0),
    "rope.scaling.alpha": (0.0,), "rope.scaling.yarn_log_multiplier": (0.0,),
}  # fmt: skip


class GgufFacts:
    """Metadata under the architecture's prefix, and shapes. Every key that is asked for counts as read."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is stored, or `default`."""
        self._read.add(key)
        return self.header.metadata.get(f"{self.header.architecture}.{key}", default)

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number from 0; a list that says one number for every layer counts as that number."""
        value = self.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int or not 0 <= value < MAX_SIZE:
            raise CheckpointError(f"the GGUF file says {key} {value!r}; a whole number is needed")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1."""
        found = self.number(key, default)
        if not found:
            raise CheckpointError(f"the GGUF file says {key} 0; at least 1 is needed")
        return found

    def numbers(self, key: str, count: int, default: int | None = None) -> list[int]:
        """One whole number a layer, from a list of at least `count` or one number for all."""
        value = self.get(key, default)
        listed = value if isinstance(value, list) else [value] * count
        if len(listed) < count or any(type(item) is not int or not 0 <= item < MAX_SIZE for item in listed):
            raise CheckpointError(f"the GGUF file says {key} {value!r}; {count} whole numbers are needed")
        return listed[:count]

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"the GGUF file says {key} {value!r}; true or false is needed")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        found = self.real(key, default)
        if found <= 0:
            raise CheckpointError(f"the GGUF file says {key} {found!r}; a number above 0 is needed")
        return found

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
            raise CheckpointError(f"the GGUF file says {key} {value!r}; a number is needed")
        return float(value)

    def expect(self, key: str, *allowed: Any) -> None:
        """Raise UnsupportedModelError where the key is there with another value than `allowed`."""
        value = self.get(key)
        if value is not None and value not in allowed:
            usual = " or ".join(map(repr, allowed))
            raise UnsupportedModelError(
                f"the GGUF file says {self.header.architecture}.{key} {value!r}, which changes the model's numbers and "
                f"is not read yet{f' ({usual} is)' if usual else ''}; use the safetensors version of the model"
            )

    def expect_usual(self, key: str, *allowed: Any) -> None:
        """Check a key that the architecture did not read, as `expect` does."""
        if key not in self._read:
            self.expect(key, *allowed)

    def refuse_unread(self) -> None:
        """Raise UnsupportedModelError naming the first key that was not read and is not known to be harmless."""
        prefix = f"{self.header.architecture}."
        for name in sorted(self.header.metadata):
            key = name.removeprefix(prefix)
            if key == name or key in self._read or key in HARMLESS:
                continue
            self.expect(key, *_USUAL.get(key, ()))

    def rows(self, name: str) -> int:
        """Rows of a tensor, or of one expert's matrix. `*` is the first layer that has it."""
        return self.shape(name)[-2]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a matrix, or of a stack of them for `_exps`."""
        found = self.find(name)
        if len(found) != (3 if "_exps." in name else 2):
            raise CheckpointError(
                f"the GGUF file has no tensor {name}, or one of shape {list(found)}; its architecture "
                f"{self.header.architecture} has such a matrix, so get another conversion of the model"
            )
        return found

    def find(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, () without one. `*` is the first layer that has it."""
        pattern = re.compile(re.escape(name).replace(r"\*", r"\d{1,5}"))
        return next((tensor.shape for key, tensor in self.header.tensors.items() if pattern.fullmatch(key)), ())

    def has(self, name: str) -> bool:
        """True where the file has the tensor; `*` is any layer."""
        return bool(self.find(name))

    def has_qkv_biases(self) -> bool:
        """True where queries have biases, in a tensor of their own or with those of keys and values."""
        return self.has("blk.*.attn_q.bias") or self.has("blk.*.attn_qkv.bias")

    def layers_with(self, leaf: str) -> set[int]:
        """Numbers of the layers that have a tensor whose name in the layer begins with `leaf`."""
        found = (_OF_A_LAYER.fullmatch(name) for name in self.header.tensors)
        return {int(match[1]) for match in found if match and match[2].startswith(leaf)}

    def num_layers(self) -> int:
        """The layers that are run: `block_count` without heads that predict further tokens.

        Such heads lie behind the other layers, counted by `nextn_predict_layers` or not. Raises CheckpointError where
        a layer has no tensors, or where tensors lie behind the last layer that are not of such a head.
        """
        said, extra = self.size("block_count"), self.number("nextn_predict_layers", 0)
        present, heads = self.layers_with(""), self.layers_with("nextn.")
        count = min([said - extra, *heads])
        missing = set(range(count)) - present if count <= len(present) else {len(present)}
        if count < 1 or missing:
            raise CheckpointError(
                f"the GGUF file says block_count {said}, and has no tensors of layer {min(missing, default=0)}; it is "
                "not the whole model"
            )
        beyond = sorted(layer for layer in present if layer >= max(said, count) and layer not in heads)
        if beyond:
            raise CheckpointError(
                f"the GGUF file says block_count {said}, and has tensors of layer {beyond[0]}, which is no head for "
                "further tokens (nextn); get another conversion of the model"
            )
        return count

    def experts(self) -> tuple[int, int]:
        """(experts of a layer, rows of one's gate), by whichever layout the file has."""
        stated = self.number("expert_count")
        if stacked := self.find("blk.*.ffn_gate_exps.weight"):
            found, rows = self._stack("blk.*.ffn_gate_exps.weight", stacked)
        elif fused := self.find("blk.*.ffn_gate_up_exps.weight"):
            found, rows = self._stack("blk.*.ffn_gate_up_exps.weight", fused)
            rows //= 2
        else:
            numbers = (_EXPERT_OF_A_LAYER.fullmatch(name) for name in self.header.tensors)
            found = max((int(match[1]) for match in numbers if match), default=-1) + 1
            rows = self.rows("blk.*.ffn_gate.0.weight" if found else "blk.*.ffn_gate_exps.weight")
        if found != stated:
            raise CheckpointError(
                f"the GGUF file says expert_count {stated}, its tensors hold {found}; get another conversion of the "
                "model"
            )
        return found, rows

    def _stack(self, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
        if len(shape) != 3:
            raise CheckpointError(f"the GGUF file has {name} of shape {list(shape)}; experts are stacked in three")
        return shape[0], shape[1]
