"""Events of a generation, from the engine's thread to the client's side. Each API writes them in its own form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from offmoe.engine.stats import GenerationStats
from offmoe.sampling.logprobs import TokenLogprobs


@dataclass(frozen=True, slots=True)
class PromptRead:
    """So much of the prompt was read."""

    done_tokens: int
    total_tokens: int
    reused_tokens: int = 0
    disk_bytes: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text of reply `index`. `token_ids` may be empty: text that was held back."""

    index: int
    text: str
    reasoning: bool = False
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    """Call number `number` of reply `index` begins."""

    index: int
    number: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the JSON text that is the call's arguments."""

    index: int
    number: int
    text: str


@dataclass(frozen=True, slots=True)
class ReplyEnd:
    """End of reply `index`. `reason`: stop, length or tool_calls; `stop_reason`: the stop string or id that ended it.

    `stats` is None where the reply was cut by the server's end. `queue_s`: seconds before it began.
    """

    index: int
    reason: str
    stop_reason: int | str | None
    stats: GenerationStats | None
    num_tokens: int
    num_reasoning: int
    queue_s: float = 0.0


Event: TypeAlias = "PromptRead | TextDelta | ToolCallBegin | ToolCallArguments | ReplyEnd"
