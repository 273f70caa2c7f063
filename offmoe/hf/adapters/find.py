"""The factory: which adapter a model needs, told by the class names of its modules."""

from __future__ import annotations

from torch import nn

from offmoe.hf.adapters import dbrx, jetmoe, llama4, longcat_flash, nllb_moe, step3p7, switch_transformers
from offmoe.hf.adapters.base import Adapter
from offmoe.hf.grok1.modeling import Grok1ForCausalLM
from offmoe.hf.grok1.register import KEY_RULES
from offmoe.hf.internals import add_key_rules

# Folder of transformers' models -> adapter.
ADAPTERS: dict[str, Adapter] = {
    "dbrx": dbrx.ADAPTER,
    "jetmoe": jetmoe.ADAPTER,
    "llama4": llama4.ADAPTER,
    "longcat_flash": longcat_flash.ADAPTER,
    "nllb_moe": nllb_moe.ADAPTER,
    "step3p7": step3p7.ADAPTER,
    "switch_transformers": switch_transformers.ADAPTER,
}


def adapt_experts(model: nn.Module) -> None:
    """Put the experts of every MoE block that has an adapter behind the door. `model` is without weights."""
    if isinstance(model, Grok1ForCausalLM):
        add_key_rules(model, KEY_RULES)
    by_block = {adapter.block: adapter for adapter in ADAPTERS.values()}
    found = [(by_block[type(block).__name__], block) for block in model.modules() if type(block).__name__ in by_block]
    for adapter, block in found:
        adapter.adapt(block)
    for adapter in {id(adapter): adapter for adapter, _ in found}.values():
        add_key_rules(model, adapter.keys)
