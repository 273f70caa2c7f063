"""The one file that touches transformers' loading internals. When they move, the test of this file names what moved.

What is used, and for what:
- `transformers.conversion_mapping.get_model_conversion_mapping`: which checkpoint key belongs to which parameter;
- `transformers.core_model_loading`: `rename_source_key` (the mapping, applied), `convert_and_load_state_dict_in_model`
  (resident weights), and the conversion operations, read here as strides for the experts;
- `transformers.modeling_utils.LoadStateDictConfig`, and three methods of PreTrainedModel that `from_pretrained` ends
  with (`_get_dtype_plan`, `mark_tied_weights_as_initialized`, `_adjust_missing_and_unexpected_keys`);
- `transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`: the public door by which experts are served from outside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from offmoe.core.errors import UnsupportedModelError
from offmoe.hf.strides import StridedMatrix, StridedPiece, concatenate, deinterleave, transpose

SEAM_NAME = "offmoe"
_RULES_NAME = "_offmoe_key_rules"


def register_experts_function(function: Callable[..., torch.Tensor]) -> None:
    """Make `function` available to every model of this process under the name "offmoe"."""
    ALL_EXPERTS_FUNCTIONS.register(SEAM_NAME, function)


def cache_name(model: PreTrainedModel) -> str:
    """The KV cache's name among the arguments of the model's forward, and in what it returns.

    transformers 5.24 renames `past_key_values` to `cache`.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def experts_modules(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """(name, module) of every module whose forward goes through the door, in the order of the model's layers."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate")
    ]


def brings_own_cache(model: PreTrainedModel) -> bool:
    """True for a model that refuses a DynamicCache and makes its own kind on the first call (MiniMax-Text-01)."""
    return not model._supports_default_dynamic_cache()


def served_families() -> list[str]:
    """Folders of transformers' models whose experts go through the door. Reads source files: for error messages."""
    models = Path(transformers.__file__).parent / "models"
    return sorted({
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    })  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """Target of one checkpoint tensor: the parameter's name, and the converter pattern that took it (None: as is)."""

    param: str
    pattern: str | None


@dataclass(frozen=True, slots=True)
class KeyRule:
    """A family's published keys that transformers does not convert. `*` in a source is the expert, as in its patterns.

    Several sources are rows of one parameter, one after another; `turned`: rows and columns change places.
    """

    sources: tuple[str, ...]
    target: str
    turned: bool = False

    def transform(self) -> WeightConverter | WeightRenaming:
        """The transform in transformers' words."""
        operations: list[Any] = [MergeModulelist(dim=0)] if "*" in self.sources[0] else []
        operations += [Concatenate(dim=1)] if len(self.sources) > 1 else []
        operations += [Transpose(1, 2)] if self.turned else []
        if not operations:
            return WeightRenaming(self.sources[0], self.target)
        return WeightConverter(list(self.sources), self.target, operations=operations)


def add_key_rules(model: torch.nn.Module, rules: Iterable[KeyRule]) -> None:
    """Every KeyMapping of `model` made from now on applies `rules` as well."""
    model.__dict__.setdefault(_RULES_NAME, []).extend(rules)


def ignored_patterns(model: PreTrainedModel) -> list[str]:
    """Regular expressions of the parameters that the model's class leaves out of its checkpoints without a warning."""
    return list(model._keys_to_ignore_on_load_unexpected or ())


class KeyMapping:
    """transformers' own table for this model: checkpoint key -> parameter, and how parts become one tensor."""

    def __init__(self, model: PreTrainedModel) -> None:
        extra = [rule.transform() for rule in getattr(model, _RULES_NAME, ())]
        self.transforms = [*get_model_conversion_mapping(model), *extra]
        self._renamings = [t for t in self.transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in self.transforms if isinstance(t, WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._prefix = model.base_model_prefix
        self.params: dict[str, torch.Tensor] = model.state_dict()

    def targets(self, keys: Iterable[str]) -> dict[str, Target]:
        """Key -> target for every checkpoint key, in the order in which transformers stacks parts."""
        result = {}
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.params)
            if name not in self.params and key in self.params:
                name, pattern = rename_source_key(key, [], [], self._prefix, self.params)
            result[key] = Target(name, pattern)
        return self._divided(result)

    def _divided(self, targets: dict[str, Target]) -> dict[str, Target]:
        """`targets`, where one list of experts fills several parameters in turn: equal shares of it, in order."""
        lists: dict[Target, list[str]] = {}
        for key, target in targets.items():
            if target.pattern is not None and self._divides(target.pattern):
                lists.setdefault(target, []).append(key)
        for target, keys in lists.items():
            assert target.pattern is not None, f"{target=}"
            first, *others = self._by_pattern[target.pattern].target_patterns
            share = -(-len(keys) // (1 + len(others)))
            for idx, key in enumerate(keys):
                if idx >= share:
                    param = target.param.replace(first, others[idx // share - 1])
                    targets[key] = Target(param, target.pattern)
        return targets

    def _divides(self, pattern: str) -> bool:
        return any(isinstance(op, ErnieFuseAndSplitTextVisionExperts) for op in self._by_pattern[pattern].operations)

    def sources(self, pattern: str) -> list[str]:
        """All patterns of the converter that `pattern` belongs to, in the order of concatenation."""
        return list(self._by_pattern[pattern].source_patterns)

    def operations(self, pattern: str) -> list[object]:
        """The converter's operations, in order of application. `targets` has divided lists that fill several
        parameters.
        """
        found: list[object] = []
        for operation in self._by_pattern[pattern].operations:
            if isinstance(operation, ErnieFuseAndSplitTextVisionExperts):
                found += [MergeModulelist(dim=operation.stack_dim), Concatenate(dim=operation.concat_dim)]
            else:
                found.append(operation)
        return found


def expert_matrix(
    shapes: dict[str, tuple[int, int]], order: list[str], operations: list[object], param_shape: tuple[int, int],
    *, where: str,
) -> StridedMatrix:  # fmt: skip
    """Effect of the converter's operations on one expert, as strides. No data is touched.

    `shapes` maps each source pattern to the shape of one expert's tensor, `order` gives the order of concatenation,
    `param_shape` the shape expected. Raises UnsupportedModelError for an operation with no such description.
    """
    state = {
        source: StridedMatrix((StridedPiece(source, 0, shapes[source], (shapes[source][1], 1)),), 0)
        for source in order
        if source in shapes
    }
    for operation in operations:
        state = _apply(operation, state, param_shape, where)
    if len(state) != 1:
        raise UnsupportedModelError(f"{where}: {len(state)} sources are left unmerged; please report this model")
    return next(iter(state.values()))


def refuse_unknown_operations(operations: list[object], *, where: str) -> None:
    """Raise UnsupportedModelError for operations that `expert_matrix` cannot describe."""
    for operation in operations:
        if type(operation) not in (MergeModulelist, Concatenate, Transpose, Interleave):
            raise _unknown_operation(operation, where)


def _unknown_operation(operation: object, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: experts converted by {operation!r} are not read yet; known: MergeModulelist(0), "
        "Concatenate, Transpose and Interleave of one expert's dimensions"
    )


def _apply(
    operation: object, state: dict[str, StridedMatrix], param_shape: tuple[int, int], where: str
) -> dict[str, StridedMatrix]:
    match operation:
        case MergeModulelist(dim=0):
            return state
        case Concatenate(dim=dim) if dim in (1, 2, -1, -2):
            return {next(iter(state)): concatenate(list(state.values()), (dim - 1) % 2 if dim > 0 else dim % 2, where)}
        case Transpose(dim0=dim0, dim1=dim1) if {dim0 % 3, dim1 % 3} == {1, 2}:
            if operation.check_dims and all(matrix.shape == param_shape for matrix in state.values()):
                return state
            return {source: transpose(matrix) for source, matrix in state.items()}
        case Interleave(dim=dim, inverse=False) if dim in (1, 2, -1, -2):
            axis = (dim - 1) % 2 if dim > 0 else dim % 2
            return {source: deinterleave(matrix, axis, where) for source, matrix in state.items()}
        case _:
            raise _unknown_operation(operation, where)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Parameters, by name, that loading the resident weights left open."""

    missing: frozenset[str]
    mismatched: tuple[str, ...]
    errors: tuple[str, ...]


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws one bar a call; offmoe reports its own progress, once."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class ResidentLoader:
    """Loads resident weights group by group through transformers' converter, so that dtype rules are its own."""

    def __init__(self, model: PreTrainedModel, mapping: KeyMapping, dtype: torch.dtype) -> None:
        self._model = model
        self._config = LoadStateDictConfig(
            dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping.transforms
        )
        self._missing = set(model.state_dict())
        self._mismatched: list[str] = []
        self._errors: list[str] = []
        self._last_info: Any = None

    def load(self, tensors: dict[str, Any]) -> None:
        """Put some checkpoint tensors into the model. `tensors` maps keys to lazy slices (`slice[...]` reads).

        All parts of one parameter must be in one call.
        """
        with _without_bars():
            info, _ = convert_and_load_state_dict_in_model(
                model=self._model, state_dict=tensors, load_config=self._config
            )
        self._last_info = info
        self._missing &= set(info.missing_keys)
        self._mismatched += [
            f"{name} is {list(stored)}, config.json asks for {list(asked)}"
            for name, stored, asked in info.mismatched_keys
        ]
        self._errors += [*map(str, info.error_msgs), *map(str, info.conversion_errors.values())]

    def finish(self) -> LoadReport:
        """Tie weights and say what is still open after transformers' own exceptions are taken off."""
        info = self._last_info
        assert info is not None, "load() comes first"
        info.missing_keys = set(self._missing)
        self._model.mark_tied_weights_as_initialized(info)
        self._model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        self._model._adjust_missing_and_unexpected_keys(info)
        return LoadReport(frozenset(info.missing_keys), tuple(self._mismatched), tuple(self._errors))
