"""Measures the demo model on held-out text: loss by kind of document and how the routers spread tokens.

Shape suffixes: T tokens, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from demo_corpus import END_OF_TEXT, KINDS, Document
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

WINDOW = 512
MAX_TOKENS_PER_KIND = 65_536
MAX_ANSWER_TOKENS = 96
QUESTIONS = ("What does os.path.join do?", "Explain the with statement in Python.", "What does json.dumps do?")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Mean loss over `num_tokens` predicted tokens, which stand for `num_bytes` of text."""

    num_tokens: int
    num_bytes: int
    nats: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(1, self.num_tokens)

    @property
    def nats_per_byte(self) -> float:
        return self.nats / max(1, self.num_bytes)

    @property
    def bits_per_byte(self) -> float:
        return self.nats_per_byte / math.log(2)


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """One layer's router on held-out tokens; a fair share is `1 / num_experts` of the assignments."""

    busiest_over_fair: float
    quietest_over_fair: float
    num_experts_for_80_percent: int


def windows(tokenizer: PreTrainedTokenizerFast, documents: list[Document], kind: str) -> Iterator[torch.Tensor]:
    """Yields held-out ids [1, <= WINDOW] of one kind, in order, without overlap."""
    texts = [document.text for document in documents if document.held_out and document.kind == kind]
    backend: Any = tokenizer.backend_tokenizer
    ids = backend.encode(END_OF_TEXT + END_OF_TEXT.join(texts)).ids[:MAX_TOKENS_PER_KIND]
    for start in range(0, len(ids) - 1, WINDOW):
        yield torch.tensor([ids[start : start + WINDOW]])


@torch.inference_mode()
def measure(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> tuple[dict[str, Loss], list[LayerRouting]]:
    """Returns the loss of each kind and of `all` (token by token), and each layer's routing over all kinds."""
    num_experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    counts_LE = torch.zeros(model.config.num_hidden_layers, num_experts)
    losses: dict[str, Loss] = {}
    for kind in KINDS:
        nats, num_tokens, num_bytes = 0.0, 0, 0
        for ids in windows(tokenizer, documents, kind):
            output = model(input_ids=ids, output_router_logits=True)
            logits_TV = output.logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits_TV, ids[0, 1:], reduction="sum").item()
            num_tokens += ids.shape[1] - 1
            num_bytes += len(decode(tokenizer, ids[0, 1:]).encode())
            for layer_idx, logits_TE in enumerate(output.router_logits):
                chosen = logits_TE.topk(top_k, dim=-1).indices.flatten()
                counts_LE[layer_idx] += torch.bincount(chosen, minlength=num_experts)
        losses[kind] = Loss(num_tokens=num_tokens, num_bytes=num_bytes, nats=nats)
    losses["all"] = Loss(
        num_tokens=sum(loss.num_tokens for loss in losses.values()),
        num_bytes=sum(loss.num_bytes for loss in losses.values()),
        nats=sum(loss.nats for loss in losses.values()),
    )
    return losses, [layer_routing(counts_E) for counts_E in counts_LE]


def layer_routing(counts_E: torch.Tensor) -> LayerRouting:
    shares_E = (counts_E / counts_E.sum()).sort(descending=True).values
    return LayerRouting(
        busiest_over_fair=shares_E[0].item() * len(shares_E),
        quietest_over_fair=shares_E[-1].item() * len(shares_E),
        num_experts_for_80_percent=int((shares_E.cumsum(0) < 0.8).sum()) + 1,
    )


def decode(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))


@torch.inference_mode()
def sample_answers(model: Any, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Returns (question, greedy answer) pairs, asked through the chat template."""
    answers = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        answers.append((question, decode(tokenizer, output[0, prompt["input_ids"].shape[1] :])))
    return answers
