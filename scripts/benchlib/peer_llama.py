"""Runs llama.cpp over given ids through llama-cpp-python's low-level calls; prints one JSON line.

    PYTHON scripts/benchlib/peer_llama.py model.gguf --ids ids.json --prefill 128 --decode 64

PYTHON is the interpreter llama-cpp-python is installed in; nothing of this project is imported. Teacher-forced: the
first ids in one batch, the rest one at a time as given, logits for the last position only. `next_ids` are the greedy
choices, to compare systems; they are never fed back.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

SHOWN_LOG_LEVEL = 4  # ggml's error level


def main() -> None:
    """Load, run, print."""
    args = parse_args()
    ids = json.loads(args.ids.read_text())[: args.prefill + args.decode]
    log_callback = silence()
    started_s = time.perf_counter()
    model, context = load(args, num_tokens=len(ids))
    load_s = time.perf_counter() - started_s
    print(f"loaded in {load_s:.0f} s", file=sys.stderr, flush=True)
    result = run(model, context, ids, num_prefill=args.prefill)
    settings = {
        "llama_cpp_python": llama_cpp.__version__,
        "threads": args.threads,
        "mmap": not args.no_mmap,
        "repack": not args.no_repack,
        "system_info": llama_cpp.llama_print_system_info().decode(),
        "file": args.gguf.name,
    }
    print(json.dumps(result | {"load_s": load_s, "settings": settings}))
    del log_callback


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--ids", type=Path, required=True, help="JSON list of token ids")
    parser.add_argument("--prefill", type=int, required=True, help="ids in the first batch")
    parser.add_argument("--decode", type=int, required=True, help="ids fed one at a time after it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-mmap", action="store_true", help="read the whole file into memory")
    parser.add_argument("--no-repack", action="store_true", help="keep weights as they lie in the file")
    return parser.parse_args()


def silence() -> object:
    """Show llama.cpp's errors only. Keep what is returned: llama.cpp holds no more than its address."""

    def show(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level == SHOWN_LOG_LEVEL:
            print(text.decode(errors="replace"), end="", file=sys.stderr)

    callback: object = llama_cpp.llama_log_callback(show)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def load(args: argparse.Namespace, *, num_tokens: int) -> tuple[Any, Any]:
    """Model and context; the whole prompt is one batch."""
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = not args.no_repack
    if hasattr(model_params, "load_mode"):  # releases since autumn 2026
        mode = "NONE" if args.no_mmap else "MMAP"
        model_params.load_mode = getattr(llama_cpp, f"LLAMA_LOAD_MODE_{mode}")
    else:
        model_params.use_mmap = not args.no_mmap
    model = llama_cpp.llama_model_load_from_file(str(args.gguf).encode(), model_params)
    if not model:
        sys.exit(f"error: llama.cpp could not load {args.gguf}")
    context_params = llama_cpp.llama_context_default_params()
    context_params.n_ctx = num_tokens
    context_params.n_batch = context_params.n_ubatch = max(args.prefill, 32)
    context_params.n_threads = context_params.n_threads_batch = args.threads
    context = llama_cpp.llama_init_from_model(model, context_params)
    if not context:
        sys.exit(f"error: llama.cpp could not make a context of {num_tokens} tokens")
    return model, context


def run(model: Any, context: Any, ids: list[int], *, num_prefill: int) -> dict[str, Any]:
    """Prefill, then one batch per remaining id. Times in seconds, one entry a token in `decode_s`."""
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    prefill_s, next_id = step(context, ids[:num_prefill], vocab_size)
    next_ids, decode_s = [next_id], []
    for token_id in ids[num_prefill:]:
        elapsed_s, next_id = step(context, [token_id], vocab_size)
        decode_s.append(elapsed_s)
        next_ids.append(next_id)
    return {
        "prefill_tok_per_s": num_prefill / prefill_s,
        "decode_tok_per_s": len(decode_s) / sum(decode_s),
        "ttft_s": prefill_s,
        "decode_s": decode_s,
        "next_ids": next_ids,
    }


def step(context: Any, ids: list[int], vocab_size: int) -> tuple[float, int]:
    """Decode one batch; its seconds (until the logits are there) and the greedy next id."""
    tokens = (llama_cpp.llama_token * len(ids))(*ids)
    started_s = time.perf_counter()
    status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    elapsed_s = time.perf_counter() - started_s
    if status != 0:
        sys.exit(f"error: llama_decode returned {status} for a batch of {len(ids)} tokens")
    return elapsed_s, int(np.ctypeslib.as_array(logits, shape=(vocab_size,)).argmax())


if __name__ == "__main__":
    main()
