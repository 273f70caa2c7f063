"""Logits that are numbers: a check of each token's, and the search for the layer in which others began."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from offmoe.core.errors import NonFiniteError
from offmoe.hf.door import PreTrainedModel


class NoTokenError(Exception):
    """Logits that no token can be chosen from. The loop that made them says where that began."""


def is_finite(logits: torch.Tensor) -> bool:
    """Whether there is no NaN and no plus infinity. Minus infinity is how models rule out single tokens; of all tokens
    it is no answer.
    """
    return bool(logits.amax().isfinite())


def non_finite_error(model: PreTrainedModel, num_tokens: int, run: Callable[[], object]) -> NonFiniteError:
    """The error for logits that are not finite after `num_tokens` tokens.

    `run` computes the same again, module by module, while every module's output is looked at.
    """
    where = _first_module(model, run)
    found = (
        f"they begin in {where}: weights there are damaged, or too large for "
        f"{str(model.dtype).removeprefix('torch.')}; "
        "check the files against the publisher's, or try another variant of the model"
        if where
        else "computed again, layer by layer, all are finite: please report this as a fault of offmoe"
    )
    return NonFiniteError(f"the model's logits are NaN or infinite after {num_tokens} tokens; {found}")


def _first_module(model: PreTrainedModel, run: Callable[[], object]) -> str:
    """The layer that first gives something else than finite numbers, and the module in it; empty where none does."""
    bad: list[str] = []
    layers = _layers(model)
    done: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not done and not all(is_finite(tensor) for tensor in _tensors(output)):
                bad.append(name)
                if name in layers or not any(name.startswith(f"{layer}.") for layer in layers):
                    done.append(name)  # what a layer gives, the next ones only pass on

        return hook

    names = [(name, module) for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)]
    hooks = [module.register_forward_hook(watch(name)) for name, module in names]
    try:
        with torch.inference_mode():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if not done:
        return ""
    # Inside a layer, numbers that nobody uses may be infinite: only the layer's own output counts.
    inside = next((name for name in bad if name.startswith(f"{done[0]}.")), "")
    if done[0] not in layers:
        return done[0]
    return f"layer {layers[done[0]]}" + (f" ({inside})" if inside else "")


def _layers(model: PreTrainedModel) -> dict[str, int]:
    """Names of the modules that the outermost lists hold, and their places in it."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return {f"{name}.{idx}": idx for name in outermost for idx in range(len(model.get_submodule(name)))}


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from _tensors(item)
