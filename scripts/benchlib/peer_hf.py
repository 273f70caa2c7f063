"""Runs transformers, in RAM or offloaded to disk by accelerate, over given ids; prints one JSON line.

    python scripts/benchlib/peer_hf.py CHECKPOINT --ids ids.json --prefill 128 --decode 64 --experts grouped_mm

Imports nothing of this project. Teacher-forced: the first ids in one forward, the rest one at a time as given,
logits for the last position only. `next_ids` are the greedy choices, to compare systems; they are never fed back.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache


def main() -> None:
    """Load, run, print."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    ids = json.loads(args.ids.read_text())[: args.prefill + args.decode]
    started_s = time.perf_counter()
    model = load(args)
    load_s = time.perf_counter() - started_s
    print(f"loaded in {load_s:.0f} s", file=sys.stderr, flush=True)
    result = run(model, ids, num_prefill=args.prefill)
    result |= {"load_s": load_s, "settings": describe(model, args)}
    print(json.dumps(result))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ids", type=Path, required=True, help="JSON list of token ids")
    parser.add_argument("--prefill", type=int, required=True, help="ids in the first forward")
    parser.add_argument("--decode", type=int, required=True, help="ids fed one at a time after it")
    parser.add_argument("--experts", default="grouped_mm", help="transformers' experts_implementation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--offload", choices=["none", "auto", "experts"], default="none",
                        help="auto: accelerate's own device map; experts: only expert tensors leave RAM")  # fmt: skip
    parser.add_argument("--cpu-bytes", type=int, default=0, help="weights accelerate may keep in RAM, in bytes")
    parser.add_argument("--offload-dir", type=Path, help="empty folder for offloaded weights; the caller removes it")
    return parser.parse_args()


def load(args: argparse.Namespace) -> Any:
    """The model in its own dtype, on CPU, with or without weights on disk."""
    options: dict[str, Any] = {"dtype": "auto", "experts_implementation": args.experts}
    if args.offload == "auto":
        options |= {"device_map": "auto", "max_memory": {"cpu": args.cpu_bytes}, "offload_folder": args.offload_dir}
    elif args.offload == "experts":
        options |= {"device_map": experts_map(args), "offload_folder": args.offload_dir}
    return AutoModelForCausalLM.from_pretrained(args.checkpoint, **options)


def experts_map(args: argparse.Namespace) -> dict[str, str]:
    """A device map that keeps all but experts in RAM, and of those the first layers that `--cpu-bytes` holds."""
    config = AutoConfig.from_pretrained(args.checkpoint)
    from_config: Any = AutoModelForCausalLM.from_config  # untyped in transformers
    with torch.device("meta"):
        model = from_config(config, dtype=config.dtype)
    experts = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    room_bytes = args.cpu_bytes - weight_bytes(model) + sum(weight_bytes(module) for module in experts.values())
    device_map: dict[str, str] = {}
    for name, module in model.named_modules():
        if name in experts:
            device_map[name] = "cpu" if weight_bytes(module) <= room_bytes else "disk"
            room_bytes -= weight_bytes(module)
        elif not any(module.children()) and not name.startswith(tuple(f"{expert}." for expert in experts)):
            device_map[name] = "cpu"
    return device_map


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of all weights under `module`."""
    return sum(weight.nbytes for weight in module.parameters())


@torch.inference_mode()
def run(model: Any, ids: list[int], *, num_prefill: int) -> dict[str, Any]:
    """Prefill, then one forward per remaining id. Times in seconds, one entry a token in `decode_s`."""
    cache = DynamicCache(config=model.config)
    prefill_s, next_id = step(model, ids[:num_prefill], cache)
    next_ids, decode_s = [next_id], []
    for token_id in ids[num_prefill:]:
        elapsed_s, next_id = step(model, [token_id], cache)
        decode_s.append(elapsed_s)
        next_ids.append(next_id)
    return {
        "prefill_tok_per_s": num_prefill / prefill_s,
        "decode_tok_per_s": len(decode_s) / sum(decode_s),
        "ttft_s": prefill_s,
        "decode_s": decode_s,
        "next_ids": next_ids,
    }


def step(model: Any, ids: list[int], cache: DynamicCache) -> tuple[float, int]:
    """One forward over `ids`; its seconds and the greedy next id."""
    started_s = time.perf_counter()
    logits = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits
    elapsed_s = time.perf_counter() - started_s
    return elapsed_s, int(logits[0, -1].argmax())


def describe(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What ran, for the report."""
    devices = getattr(model, "hf_device_map", {})
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "experts_implementation": args.experts,
        "attn_implementation": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "offload": args.offload,
        "on_disk": sorted(name for name, device in devices.items() if device == "disk"),
    }


if __name__ == "__main__":
    main()
