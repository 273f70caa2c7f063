"""Many requests of mixed kinds against a running server, a third of them cancelled at random points.

    python scripts/server_soak.py --requests 10000 --connections 8

Every request has a secret, and its reply is bound by a regular expression to say it: a reply with another secret is a
crossed one. The server runs in this process, the clients in another. Memory, threads and open files of the server are
sampled; at the end its expert slots must be at rest. The last line is JSON; the exit code is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import psutil

PADDING_WORDS = 60
MOST_PATIENCE_S = 120.0


async def ask(client: Any, secret: str, kind: str, dice: random.Random) -> str:
    """One request; the texts of its reply. Raises httpx errors."""
    words = " ".join(dice.choice(("one", "two", "three")) for _ in range(dice.randrange(1, PADDING_WORDS)))
    said = [{"role": "user", "content": f"{secret} {words}"}]
    if kind == "echo":
        body = {"prompt": f"{secret} {words}", "max_tokens": 3, "echo": True, "logprobs": 1}
        answer = await client.post("/v1/completions", json=body)
        return str(answer.json()["choices"][0]["text"])
    if kind == "wrong":
        answer = await client.post("/v1/chat/completions", json={"messages": said, "temperature": -1})
        assert answer.status_code == 400, answer.text
        return secret
    if kind == "messages":
        body = {"messages": said, "max_tokens": 4, "system": "be short"}
        answer = await client.post("/v1/messages", json=body)
        assert answer.json()["type"] == "message", answer.text
        return secret
    body = {"messages": said, "regex": secret, "max_tokens": 40, "n": 2 if kind == "two" else 1, "temperature": 1.0}
    if kind == "stream":
        return await streamed(client, {**body, "stream": True})
    answer = await client.post("/v1/chat/completions", json=body)
    texts = {choice["message"]["content"] for choice in answer.json()["choices"]}
    return " | ".join(texts)


async def streamed(client: Any, body: dict[str, Any]) -> str:
    """The text of a stream."""
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    return text


async def run_clients(url: str, num_requests: int, num_connections: int, seed: int, seconds: float | None) -> None:
    """Ask until all was asked, or the time is over; print what came of it."""
    import httpx

    dice, outcomes, wrong = random.Random(seed), Counter[str](), []
    numbers = iter(range(num_requests))
    end = time.monotonic() + (seconds or 1e9)
    kinds = ("stream", "stream", "whole", "whole", "two", "echo", "messages", "wrong")

    async def work() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=MOST_PATIENCE_S) as client:
            for number in numbers:
                if time.monotonic() > end:
                    return
                secret, kind = f"S{number:05d}x{dice.randrange(10**6):06d}", dice.choice(kinds)
                task = asyncio.ensure_future(ask(client, secret, kind, dice))
                if dice.random() < 1 / 3:
                    done, _ = await asyncio.wait({task}, timeout=dice.random() ** 2 * 0.6)
                    if not done:
                        task.cancel()
                        await asyncio.gather(task, return_exceptions=True)
                        outcomes["cancelled"] += 1
                        continue
                try:
                    text = await task
                except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
                    outcomes["failed"] += 1
                    wrong.append(f"{kind}: {type(error).__name__} {str(error)[:200]}")
                    continue
                is_right = text.startswith(secret) if kind == "echo" else text == secret
                outcomes[kind if is_right else "crossed"] += 1
                if not is_right:
                    wrong.append(f"{kind}: asked {secret}, got {text[:100]!r}")

    await asyncio.gather(*(work() for _ in range(num_connections)))
    print(json.dumps({"outcomes": dict(outcomes), "wrong": wrong[:20]}))


def run_server(options: argparse.Namespace) -> int:
    """Serve, sample, and look at what is left."""
    import offmoe
    from offmoe.engine.parts import parts_of
    from offmoe.server.serve import RunningServer
    from offmoe.server.settings import make_server_settings

    def load(progress: Any) -> Any:
        return offmoe.load(ram=options.ram, expert_slots=options.expert_slots, progress=progress)

    me, samples = psutil.Process(), []
    with RunningServer(make_server_settings(port=0, queue_size=64), load, name="demo") as server:
        server.start()
        server.wait_until_loaded()
        command = [sys.executable, __file__, "--url", server.url, "--requests", str(options.requests)]
        command += ["--connections", str(options.connections), "--seed", str(options.seed)]
        command += ["--seconds", str(options.seconds)] if options.seconds else []
        begin = time.monotonic()
        clients = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while clients.poll() is None:
            time.sleep(1.0)
            if int(time.monotonic() - begin) % 10 == 0:
                samples.append((me.memory_info().rss, me.num_threads(), me.num_fds()))
        seconds = time.monotonic() - begin
        told = json.loads((clients.stdout.read() if clients.stdout else "") or "{}")
        while len(server.served.queue) or server.served.queue.num_running:
            time.sleep(0.1)
        engine = server.served.engine
        cache = parts_of(engine).serving.cache
        cache.settle()
        cache.slots.check_integrity()
        at_rest = ", 0 filling," in repr(cache) and "| 0 held |" in repr(cache)
        stats = engine.stats()
        num_waiting = len(server.served.queue)
    half = samples[len(samples) // 2 :]
    record = {
        **told,
        "asked": sum(told.get("outcomes", {}).values()), "seconds": round(seconds, 1), "slots_at_rest": at_rest,
        "waiting": num_waiting, "ram_bytes": stats.ram_bytes, "peak_rss_growth_bytes": stats.peak_rss_growth_bytes,
        "rss_mib": [round(sample[0] / 2**20) for sample in samples],
        "threads": sorted({sample[1] for sample in half}), "files": sorted({sample[2] for sample in half}),
    }  # fmt: skip
    print(json.dumps(record))
    is_kept = stats.peak_rss_growth_bytes <= stats.ram_bytes
    return int(bool(told.get("wrong", ["no answer"])) or not at_rest or not is_kept)


def main() -> None:
    """Be the server, or with --url the clients."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ram", default="1GiB")
    parser.add_argument("--expert-slots", type=int, default=96)
    parser.add_argument("--seconds", type=float, help="end after so long, whatever was asked by then")
    parser.add_argument("--url")
    options = parser.parse_args()
    if options.url:
        asyncio.run(run_clients(options.url, options.requests, options.connections, options.seed, options.seconds))
    else:
        sys.exit(run_server(options))


if __name__ == "__main__":
    main()
