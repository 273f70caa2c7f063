"""Makes Grok-1 known to transformers' Auto classes, once a process, by its model_type."""

from __future__ import annotations

from functools import cache

from transformers import AutoConfig, AutoModelForCausalLM

from offmoe.hf.grok1.configuration import Grok1Config
from offmoe.hf.grok1.modeling import Grok1ForCausalLM
from offmoe.hf.internals import KeyRule

# linear is the gate's, linear_v the other half, linear_1 the way back (names of the conversion, and of xAI's code).
KEY_RULES = (
    KeyRule(
        ("moe_block.experts.*.linear.weight", "moe_block.experts.*.linear_v.weight"), "moe_block.experts.gate_up_proj"
    ),
    KeyRule(("moe_block.experts.*.linear_1.weight",), "moe_block.experts.down_proj"),
)


@cache
def register_grok1() -> None:
    """From now on AutoConfig and AutoModelForCausalLM take "grok-1" for these classes."""
    AutoConfig.register(Grok1Config.model_type, Grok1Config)
    AutoModelForCausalLM.register(Grok1Config, Grok1ForCausalLM)
