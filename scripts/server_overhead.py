"""Tokens a second through HTTP, beside those of `engine.stream` on the same engine, in turns.

    python scripts/server_overhead.py --rounds 5

The client is a process of its own. Both ways give the same tokens; what is compared is the time from the first to the
last of them, as the one who waits sees it. The bundled model is the worst case: its tokens take 3 ms, those of large
models tens to hundreds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median

PROMPT = "def read_lines(path):\n    "


def through_http(url: str, tokens: int) -> float:
    """Tokens a second of one stream."""
    import httpx

    body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    begin, num_chunks = 0.0, 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                begin = begin or time.perf_counter()
                num_chunks += 1
                end = time.perf_counter()
    assert num_chunks, "no chunk came"
    return (tokens - 1) / (end - begin)


def directly(engine: object, tokens: int) -> float:
    """The same of `engine.stream`."""
    begin = 0.0
    for _ in engine.stream(PROMPT, max_new_tokens=tokens, ignore_eos=True, temperature=0):  # type: ignore[attr-defined]
        begin = begin or time.perf_counter()
        end = time.perf_counter()
    return (tokens - 1) / (end - begin)


def measure(rounds: int, tokens: int) -> None:
    """Both ways in turns, and their medians."""
    import offmoe

    with offmoe.load(ram="2GiB") as engine, engine.serve(port=0, web_page=False) as server:
        command = [sys.executable, __file__, "--url", server.url, "--tokens", str(tokens)]
        direct, http = [], []
        for number in range(rounds + 1):
            found = directly(engine, tokens), float(subprocess.run(command, capture_output=True, check=True).stdout)
            if number:  # the first of each warms up
                direct.append(found[0])
                http.append(found[1])
                print(f"round {number}: direct {found[0]:.1f} tok/s, HTTP {found[1]:.1f} tok/s", flush=True)
    ratio = median(h / d for h, d in zip(http, direct, strict=True))
    record = {"direct_tok_per_s": round(median(direct), 1), "http_tok_per_s": round(median(http), 1)}
    print(json.dumps({**record, "ratio": round(ratio, 3), "rounds": rounds, "tokens": tokens}))


def main() -> None:
    """Measure, or with --url be the client."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--url")
    options = parser.parse_args()
    if options.url:
        print(through_http(options.url, options.tokens))
    else:
        measure(options.rounds, options.tokens)


if __name__ == "__main__":
    main()
