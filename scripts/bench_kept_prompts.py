"""Time to the first token of a second turn, with the prompt kept in RAM and on disk, beside the new tokens alone.

    python scripts/bench_kept_prompts.py [MODEL] [--tokens 4000] [--new 200] [--rounds 3]

The last line is JSON. Every reading is repeated, and the least of each is told: others use the machine, too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import offmoe


def first_token_s(engine: offmoe.Engine, ids: list[int], **options: Any) -> tuple[float, int]:
    began = time.perf_counter()
    reply = engine.generate(ids, max_new_tokens=1, ignore_eos=True, temperature=0, **options)
    return time.perf_counter() - began, reply.stats.reused_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[str, Any] = {"tokens": asked.tokens, "new": asked.new}
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "context_length": asked.tokens + asked.new + 8, "prompt_cache": folder, "kept_prompts": "1GiB"
        }  # fmt: skip
        with offmoe.load(asked.model, **options) as engine:
            prompt = [(i * 37 + i // 11) % engine.vocab_size for i in range(asked.tokens)]
            turn = [(i * 31 + 7) % engine.vocab_size for i in range(asked.new)]
            first_token_s(engine, turn, reuse=False)  # warm
            fresh = [first_token_s(engine, [*prompt, *turn], reuse=False)[0] for _ in range(asked.rounds)]
            alone = [first_token_s(engine, turn, reuse=False)[0] for _ in range(asked.rounds)]
            first_token_s(engine, prompt)
            second, between = [], []
            for number in range(asked.rounds):
                first_token_s(engine, [number, *turn])  # another request in between
                seconds, reused = first_token_s(engine, [*prompt, *turn[number:], *turn[:number]])
                second.append(seconds)
                between.append(reused)
            found |= {
                "fresh_s": min(fresh), "new_alone_s": min(alone), "second_turn_s": min(second), "reused": min(between),
                "second_over_alone": min(second) / min(alone), "kept": engine.stats().kept_prompts,
            }  # fmt: skip
        after = []
        for _ in range(asked.rounds):
            with offmoe.load(asked.model, **options) as engine:
                first_token_s(engine, turn[:64], reuse=False)  # warm
                seconds, reused = first_token_s(engine, [*prompt, *turn[50:], *turn[:50]])
                after.append(seconds)
                found["reused_after_restart"] = reused
        found |= {"after_restart_s": min(after), "fresh_over_restart": min(fresh) / min(after)}
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}))


if __name__ == "__main__":
    main()
