"""Trains the bundled demo model: a small Qwen3-MoE on the text of the running Python's standard library.

The learning rate follows elapsed wall-clock time, so a busy machine gives fewer steps and never a cut-off schedule.
Training goes through checkpoints outside the repository; the model folder is written at once, at the end, together with
a card whose every figure was measured by this script.
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from demo_card import Recipe
from demo_corpus import END, END_OF_TEXT, KINDS, SPECIAL_TOKENS, VOCAB_SIZE, Document, load_documents, train_tokenizer
from demo_export import export
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

log = logging.getLogger("train_demo")

PEAK_LEARNING_RATE, FINAL_FRACTION, WARMUP_STEPS, WEIGHT_DECAY = 3e-3, 0.05, 100, 0.1
# (progress from which it holds, window length, tokens per step): short windows first, then what a user will meet.
# Half the batch from 47% on: on busy cores the run makes 900 tokens/s, and under 1,000 steps of 4,096 learn too little.
SCHEDULE = ((0.0, 256, 4096), (0.47, 256, 2048), (0.80, 512, 2048), (0.92, 1024, 2048))
KIND_SHARES = {"prose": 0.36, "code": 0.32, "topics": 0.10, "chat": 0.22}
CHECKPOINT_EVERY_S = 300.0
LOG_EVERY_STEPS = 20
PROBE_EVERY_STEPS = 20


@dataclass(kw_only=True)
class Progress:
    """How far the run is; stored with every checkpoint."""

    num_steps: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0
    planned_s: float = 0.0

    @property
    def fraction(self) -> float:
        return min(1.0, self.elapsed_s / self.planned_s) if self.planned_s else 1.0


class Batches:
    """Draws training windows from one long token stream per kind; step n's batch depends on the seed and n alone."""

    def __init__(self, documents: list[Document], tokenizer: PreTrainedTokenizerFast, *, seed: int) -> None:
        self._seed = seed
        self._streams: dict[str, NDArray[np.uint16]] = {}
        self._starts: dict[str, NDArray[np.int64]] = {}
        for kind in KINDS:
            texts = [document.text for document in documents if document.kind == kind and not document.held_out]
            # END_OF_TEXT stands before each document too, so that a window may start with it.
            rows = [row.ids for row in tokenizer.backend_tokenizer.encode_batch([END_OF_TEXT + text for text in texts])]
            self._streams[kind] = np.concatenate([np.asarray(row, dtype=np.uint16) for row in rows])
            self._starts[kind] = np.concatenate([[0], np.cumsum([len(row) for row in rows])[:-1]])

    @property
    def num_unique_tokens(self) -> int:
        return sum(len(stream) for stream in self._streams.values())

    def draw(self, step: int, *, length: int, num_tokens: int) -> torch.Tensor:
        """Returns ids [num_tokens / length, length]; half the windows, and all chat ones, begin with a document."""
        rng = np.random.default_rng((self._seed, step))
        rows = []
        for kind in rng.choice(KINDS, size=num_tokens // length, p=[KIND_SHARES[kind] for kind in KINDS]):
            stream = self._streams[kind]
            start = int(rng.integers(len(stream) - length))
            if kind == "chat" or rng.random() < 0.5:
                starts = self._starts[kind]
                start = min(int(starts[np.searchsorted(starts, start, side="right") - 1]), len(stream) - length)
            rows.append(stream[start : start + length])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def new_model() -> Qwen3MoeForCausalLM:
    """A freshly initialised fp32 model."""
    stop_ids = [SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(END)]
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 192,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        # With theta 1000 most rotation periods close within the 1024 positions trained on, so later ones are known.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        "eos_token_id": stop_ids,
        "pad_token_id": stop_ids[0],
        "bos_token_id": None,
    }
    model_class: Any = Qwen3MoeForCausalLM
    model: Qwen3MoeForCausalLM = model_class._from_config(
        Qwen3MoeConfig(**settings), experts_implementation="grouped_mm"
    )
    return model


def make_optimizer(model: Qwen3MoeForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def learning_rate(progress: Progress) -> float:
    """Linear warmup by steps, then a cosine over wall-clock time down to `FINAL_FRACTION` of the peak."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress.fraction))
    warmup = min(1.0, (progress.num_steps + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warmup * (FINAL_FRACTION + (1.0 - FINAL_FRACTION) * cosine)


def save_checkpoint(path: Path, model: Qwen3MoeForCausalLM, optimizer: torch.optim.AdamW, progress: Progress) -> None:
    """Replaces `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": vars(progress)}
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
    log.info("checkpoint at step %d: %s", progress.num_steps, path)


class Stop:
    """Turns SIGTERM and SIGINT into a flag, so that a stopped run still saves and exports."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class ThreadChooser:
    """Uses all threads while that is faster than one, and one while other programs hold the cores.

    Two threads wait for each other at the end of every kernel; when a neighbour takes one's core, both crawl: 3,900
    tokens/s became 400, where one thread alone still made 1,300.
    """

    def __init__(self, num_threads: int) -> None:
        self._most, self._now = num_threads, 1
        self._single_s, self._many_s, self._num_steps_single = 0.0, 0.0, 0
        torch.set_num_threads(1)

    def observe(self, step_s: float) -> None:
        """Takes the last step's duration and sets the threads for the next one."""
        if self._now == 1:
            self._single_s = 0.7 * self._single_s + 0.3 * step_s if self._single_s else step_s
            self._num_steps_single += 1
            if self._most > 1 and self._num_steps_single >= PROBE_EVERY_STEPS:
                self._now, self._many_s = self._most, 0.8 * self._single_s
        else:
            self._many_s = 0.5 * (self._many_s + step_s)
            if self._many_s > self._single_s:
                self._now, self._num_steps_single = 1, 0
        torch.set_num_threads(self._now)

    def __repr__(self) -> str:
        return f"{self._now} of {self._most} threads"


def balance_loss(router_logits: tuple[torch.Tensor, ...], config: Qwen3MoeConfig) -> torch.Tensor:
    """The load balancing loss of Switch Transformers (arXiv:2101.03961, 2.2), layer by layer: top-k when all even.

    transformers pools the layers before it compares shares, so a layer may starve an expert that another one overuses:
    after 242 steps 9 of 32 experts took 80% of most layers' tokens, and every layer had dead ones.
    """
    per_layer = [
        torch.as_tensor(load_balancing_loss_func((logits_TE,), config.num_experts, config.num_experts_per_tok))
        for logits_TE in router_logits
    ]
    return torch.stack(per_layer).mean()


def train_step(model: Qwen3MoeForCausalLM, optimizer: torch.optim.AdamW, ids: torch.Tensor) -> tuple[float, float]:
    """Returns (cross entropy in nats per token, load balancing loss before its coefficient)."""
    # bf16 autocast over fp32 weights: 3,700 against 2,800 tokens/s on two AVX-512 cores, same loss to three digits.
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=ids, use_cache=False, output_router_logits=True)
    logits = output.logits[:, :-1].flatten(0, 1).float()
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    balance = balance_loss(output.router_logits, model.config)
    total: Any = loss + model.config.router_aux_loss_coef * balance
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), balance.item()


def train(
    model: Qwen3MoeForCausalLM,
    optimizer: torch.optim.AdamW,
    batches: Batches,
    progress: Progress,
    checkpoint: Path,
    threads: ThreadChooser,
) -> None:
    """Trains until the planned wall-clock time is used up or the process is asked to stop; checkpoints on the way."""
    stop = Stop()
    model.train()
    last_saved_s, marked_s, marked_tokens, losses = progress.elapsed_s, progress.elapsed_s, progress.num_tokens, []
    started = time.monotonic() - progress.elapsed_s
    while progress.elapsed_s < progress.planned_s and not stop.asked:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        _, length, num_tokens = max(phase for phase in SCHEDULE if progress.fraction >= phase[0])
        ids = batches.draw(progress.num_steps, length=length, num_tokens=num_tokens)
        losses.append(train_step(model, optimizer, ids))
        progress.num_steps += 1
        progress.num_tokens += num_tokens
        threads.observe(time.monotonic() - started - progress.elapsed_s)
        progress.elapsed_s = time.monotonic() - started
        if progress.num_steps % LOG_EVERY_STEPS == 0:
            loss, aux = np.mean(losses, axis=0)
            tokens_per_s = (progress.num_tokens - marked_tokens) / (progress.elapsed_s - marked_s)
            log.info(
                "step %d  loss %.3f  aux %.3f  lr %.2e  windows %d  %.0f tokens/s  %r  %.1f min left",
                *(progress.num_steps, loss, aux, learning_rate(progress), length, tokens_per_s, threads),
                (progress.planned_s - progress.elapsed_s) / 60,
            )
            marked_s, marked_tokens, losses = progress.elapsed_s, progress.num_tokens, []
        if progress.elapsed_s - last_saved_s >= CHECKPOINT_EVERY_S:
            save_checkpoint(checkpoint, model, optimizer, progress)
            last_saved_s = progress.elapsed_s
    save_checkpoint(checkpoint, model, optimizer, progress)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=75.0, help="wall-clock length of the training (default 75)")
    parser.add_argument(
        "--out", type=Path, default=Path("offmoe/demo_model"), help="the model folder to write or replace"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="for weights, conversations and batches (default 0)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument(
        "--export-only", action="store_true", help="train no further: write the checkpoint in --work to --out"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "offmoe-demo-training",
        help="checkpoint and log go here",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    log_name = "export.log" if arguments.export_only else "train.log"
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(arguments.work / log_name)]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    documents = load_documents(seed=arguments.seed)
    tokenizer_folder = arguments.work / "tokenizer"
    if arguments.resume or arguments.export_only:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    else:
        tokenizer = train_tokenizer(documents)
        tokenizer.save_pretrained(tokenizer_folder, save_jinja_files=False)
    model = new_model()
    optimizer = make_optimizer(model)
    progress = Progress(planned_s=arguments.minutes * 60)
    checkpoint = arguments.work / "checkpoint.pt"
    if arguments.resume or arguments.export_only:
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        planned_s = state["progress"]["planned_s"] if arguments.export_only else progress.planned_s
        progress = Progress(**{**state["progress"], "planned_s": planned_s})
    if not arguments.export_only:
        batches = Batches(documents, tokenizer, seed=arguments.seed)
        log.info("%d documents, %d unique training tokens", len(documents), batches.num_unique_tokens)
        train(model, optimizer, batches, progress, checkpoint, ThreadChooser(arguments.threads))
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(
        seed=arguments.seed,
        num_threads=arguments.threads,
        kind_shares=KIND_SHARES,
        schedule=SCHEDULE,
        peak_learning_rate=PEAK_LEARNING_RATE,
        **vars(progress),
    )
    export(model, tokenizer, documents, recipe, arguments.out)


if __name__ == "__main__":
    main()
