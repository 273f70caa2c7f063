"""Gives the demo model a shared expert in every layer and trains it on: a model to measure lookahead on, not shipped.

    python scripts/train_shared.py --minutes 12 --out checkpoints/demo-shared

The result has GLM-4.5's layers (`glm4_moe`): attention, routers, experts and embeddings begin as the demo model's, the
shared experts at random and without effect. The learning rate falls over wall-clock time.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from demo_corpus import load_documents
from train_demo import Batches
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parent.parent / "offmoe" / "demo_model"
PEAK_LEARNING_RATE, WARMUP_STEPS, LOG_EVERY_STEPS = 1.5e-3, 50, 20


def with_shared_experts(demo: Any) -> Glm4MoeForCausalLM:
    """The demo model's weights in layers that have a shared expert as wide as the others."""
    old = demo.config
    settings: dict[str, Any] = {
        name: getattr(old, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob",
            "tie_word_embeddings", "max_position_embeddings", "rms_norm_eps", "eos_token_id", "pad_token_id",
        )
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": old.rope_parameters["rope_theta"], "partial_rotary_factor": 1.0}
    config = Glm4MoeConfig(
        **settings, n_routed_experts=old.num_experts, n_shared_experts=1, first_k_dense_replace=0, n_group=1,
        topk_group=1, routed_scaling_factor=1.0, use_qk_norm=True, attention_bias=False, rope_parameters=rope,
    )  # fmt: skip
    model_class: Any = Glm4MoeForCausalLM
    model: Glm4MoeForCausalLM = model_class._from_config(config, experts_implementation="grouped_mm")
    missing, unexpected = model.load_state_dict(demo.state_dict(), strict=False)
    assert not unexpected, f"{unexpected=}"
    assert all("shared_experts" in name or "e_score_correction_bias" in name for name in missing), f"{missing=}"
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.shared_experts.down_proj.weight)
    return model


def train(model: Glm4MoeForCausalLM, batches: Batches, *, seconds: float) -> int:
    """Returns the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    model.train()
    begin, step, losses = time.monotonic(), 0, []
    while (share := (time.monotonic() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            warmup = min(1.0, (step + 1) / WARMUP_STEPS)
            group["lr"] = PEAK_LEARNING_RATE * warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        ids = batches.draw(step, length=256, num_tokens=2048)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % LOG_EVERY_STEPS == 0:
            mean = sum(losses[-LOG_EVERY_STEPS:]) / LOG_EVERY_STEPS
            print(f"step {step}  loss {mean:.3f}  {share:.0%}", file=sys.stderr, flush=True)
    return step


def main() -> None:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=12, help="wall-clock length of the training (default: 12)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO)
    model = with_shared_experts(AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32))
    batches = Batches(load_documents(seed=args.seed), tokenizer, seed=args.seed)
    steps = train(model, batches, seconds=60 * args.minutes)
    model.to(torch.bfloat16).save_pretrained(args.out)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, args.out)
    print(f"{steps} steps; wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
