"""The engine: a loaded model, its tokenizer, and the calls a program makes on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from offmoe.chat.template import Message
from offmoe.checkpoint.gguf.file import is_gguf
from offmoe.checkpoint.index import read_config
from offmoe.core.config import EngineConfig
from offmoe.core.errors import DeviceError, EngineClosedError
from offmoe.core.forks import OneProcess
from offmoe.core.progress import Progress
from offmoe.decode.compiled import make_compiler
from offmoe.decode.paths import DecodePaths
from offmoe.engine.call import Request, answer, translate
from offmoe.engine.conversation import Conversation
from offmoe.engine.ends import end_ids
from offmoe.engine.engine_stats import EngineStats, engine_stats
from offmoe.engine.keeping import keeping
from offmoe.engine.live_server import LiveServer, start_server
from offmoe.engine.prefill_chunk import PrefillChunk
from offmoe.engine.prompt import chat_prompt, encode_prompt, is_list_of_prompts
from offmoe.engine.reasoning import split_reasoning, with_marks
from offmoe.engine.reply import Reply, collect
from offmoe.engine.reply_lock import ReplyLock
from offmoe.engine.request import make_call
from offmoe.engine.stats import Totals
from offmoe.engine.stream import Stream
from offmoe.engine.tracing import record_trace
from offmoe.hf.device_failures import explained
from offmoe.hf.door import PreTrainedModel
from offmoe.kv.cache import make_kv_cache
from offmoe.kv.prefix import PrefixCache
from offmoe.loader.load import load_model
from offmoe.loader.loaded import LoadedModel
from offmoe.memory.budget import MemoryPlan
from offmoe.sampling.grammar import GrammarCompiler
from offmoe.sampling.params import ChatOptions, ChatPromptOptions, RequestOptions, seeds_of
from offmoe.sampling.processors import not_followed
from offmoe.trace.file import TraceWriter
from offmoe.trace.recorder import TraceEvent

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from offmoe.tiers.device import Device


class Engine:
    """Generates with a model whose experts come through the cache. Made by `offmoe.load`; close it or use `with`.

    One generation at a time: a second call while one runs raises EngineBusyError.
    """

    def __init__(
        self, folder: Path, config: EngineConfig, *, baseline_bytes: int, progress: Progress,
        device: Device | None = None,
    ) -> None:  # fmt: skip
        self.folder = folder
        # What was predicted before loading, by who knows the machine's speeds: to be held against what is measured.
        self.predicted: dict[str, float] | None = None
        # Given the last statistics when the engine is closed by its user.
        self.at_close: Callable[[EngineStats], None] = lambda totals: None
        self._baseline_bytes = baseline_bytes
        with explained(device):  # RAM may run out at any moment of it
            loaded = load_model(folder, config, baseline_bytes=baseline_bytes, device=device, progress=progress)
        self._loaded: LoadedModel | None = loaded
        self.config = loaded.config
        try:
            with explained(loaded.device):
                self._make_parts(loaded, progress)
        except BaseException:
            loaded.close()
            raise

    def _make_parts(self, loaded: LoadedModel, progress: Progress) -> None:
        """Parts around the loaded model."""
        self._halving_chunk = (
            None if loaded.device is None
            else PrefillChunk(loaded.plan.prefill_chunk, loaded.device, divisible=loaded.chunkable)
        )  # fmt: skip
        self.tokenizer = loaded.tokenizer
        # What a GGUF file says of ends is in the generation config already.
        stated = {} if is_gguf(self.folder) else read_config(self.folder)
        self._end_ids = end_ids(loaded.model.generation_config, stated, loaded.tokenizer)
        vocab_size = int(loaded.model.config.get_text_config().vocab_size)
        self._grammars = GrammarCompiler(loaded.tokenizer, vocab_size=vocab_size, end_ids=self._end_ids)
        has_text = loaded.tokenizer is not None
        if (note := not_followed(loaded.model.generation_config, has_text=has_text)) is not None:
            loaded.serving.notes.append(note)
        self._process = OneProcess()
        self._lock = ReplyLock(lambda: self._loaded is not None, self._give_up)
        self._totals = Totals()
        compiler = make_compiler(loaded.model, loaded.context_length, self.config, progress)
        self._decode = compiler or DecodePaths(loaded)
        self._kept = PrefixCache(
            loaded.model,
            compiler.empty_cache if compiler else lambda: make_kv_cache(loaded.model, loaded.context_length),
            divisible=loaded.chunkable, **keeping(loaded, self.folder),
        )  # fmt: skip

    def __repr__(self) -> str:
        if self._loaded is None:
            return f"<Engine {self.folder.name} [closed]>"
        return f"<Engine {self.folder.name} [{self._loaded.cache!r}]>"

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model itself: its forward and `.generate()` go through the cache too."""
        return self._parts.model

    @property
    def plan(self) -> MemoryPlan:
        """The plan of memory."""
        return self._parts.plan

    @property
    def context_length(self) -> int:
        """Tokens of prompt plus reply that memory was set aside for."""
        return self._parts.context_length

    @property
    def _parts(self) -> LoadedModel:
        if self._loaded is None:
            raise EngineClosedError("the engine is closed; load the model again")
        self._process.check()
        return self._loaded

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def top_k(self) -> int:
        """The most experts that one token uses in one layer."""
        return self._parts.experts.top_k

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """Within: every expert is read from disk for every use and nothing is kept. Slow; the oracle of `verify`."""
        with self._parts.uncached():
            yield

    @contextmanager
    def trace(
        self, path: str | Path, *, prompts: dict[str, Any] | None = None, guesses: bool = True, overwrite: bool = False
    ) -> Iterator[TraceWriter]:
        """Within: what every layer's router chooses is written to `path`, for `offmoe tune` and `offmoe replay`.

        The file is in its place at the end; after Ctrl-C with what there is, marked as incomplete. `prompts` is kept in
        its header. `guesses`: what the routers would have said one to three layers before, too, which costs time.
        `overwrite`: over a file that is no trace, too. Raises OutputError, and UsageError for such a file and where all
        experts are on a device: there nobody sees the choices.
        """
        with record_trace(
            self._parts, self.folder, Path(path), prompts=prompts or {}, guesses=guesses, overwrite=overwrite
        ) as writer:
            yield writer

    def recent_routing(self) -> list[TraceEvent]:
        """The layer calls of the last tokens, the oldest first; kept always. Between two calls of the engine."""
        return self._parts.serving.recorder.recent()

    def stats(self) -> EngineStats:
        """Totals since load: counters, means of a decoded token, settings in force, and memory against its budget."""
        return engine_stats(
            self._parts, self._kept, self._totals, self._decode, baseline_bytes=self._baseline_bytes,
            predicted=self.predicted,
        )  # fmt: skip

    @overload
    def generate(self, prompt: str | Sequence[int], **options: Unpack[RequestOptions]) -> Reply: ...

    @overload
    def generate(self, prompt: str | Sequence[int], *, n: int, **options: Unpack[RequestOptions]) -> list[Reply]: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...] | Sequence[Sequence[int]],
        *,
        n: int | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Reply]: ...

    def generate(self, prompt: Any, *, n: int | None = None, **options: Unpack[RequestOptions]) -> Reply | list[Reply]:
        """Return the reply to `prompt` (text or token ids), or one for each of a list. Options as in `stream`.

        `n`: that many replies to each prompt, which is read once; their seeds are `seed`, `seed` + 1, ...
        """
        asked = seeds_of(n, options)
        if not is_list_of_prompts(prompt) and asked is None:
            return collect(self.stream(prompt, **options))
        prompts = prompt if is_list_of_prompts(prompt) else [prompt]
        # A wrong one is refused before the first is answered.
        calls = [self._call(each, {**options, **change}) for each in prompts for change in asked or [{}]]
        return [collect(self._begin(call)) for call in calls]

    def tokenize(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids that `stream` reads for `prompt`. Raises UsageError. From any thread, also during a reply."""
        return encode_prompt(prompt, self.tokenizer, vocab_size=self.vocab_size)

    def tokenize_chat(self, messages: Sequence[Message], **options: Unpack[ChatPromptOptions]) -> list[int]:
        """Token ids that `stream_chat` reads for `messages`; options as there. From any thread, also during a reply."""
        return chat_prompt(self.model, self.tokenizer, messages, options, folder=self.folder)

    def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Reply:
        """The model's next turn, through the tokenizer's chat template. Options as in `stream_chat`."""
        return collect(self.stream_chat(messages, **options))

    def stream_chat(
        self, messages: Sequence[Message], *, chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False, continue_final_message: bool = False, raw: bool = False,
        **options: Unpack[RequestOptions],
    ) -> Stream:  # fmt: skip
        """Stream the reply of `chat`, chunk by chunk; `chunk.reasoning` tells what the model thinks from what it says.

        `continue_final_message`: the last message is the model's own, and the reply goes on from its end. `raw`: the
        text as the model wrote it, reasoning and the spelling of control tokens with it.
        `chat_template_kwargs` and `allow_control_tokens` as in `chat.chat_ids`, other options as in `stream`.
        """
        ids = self.tokenize_chat(
            messages, chat_template_kwargs=chat_template_kwargs, allow_control_tokens=allow_control_tokens,
            continue_final_message=continue_final_message,
        )  # fmt: skip
        assert self.tokenizer is not None
        given: RequestOptions = {"own_text": not continue_final_message, "after_reasoning": True, **options}
        chunks = self.stream(ids, **given)
        parts = with_marks(chunks, self.tokenizer) if raw else split_reasoning(chunks, self.tokenizer, ids)
        return Stream(parts, chunks.closed, prompt_ids=ids)

    def serve(self, **options: Any) -> LiveServer:
        """Serve this engine's model over HTTP, on a thread of its own, until the server is closed; the engine stays.

        `options`: those of `offmoe serve`, such as port (8000; 0: any free one), by the names of ServerSettings.
        """
        return start_server(self, options)

    def conversation(
        self, *, system: str | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
    ) -> Conversation:  # fmt: skip
        """A chat that remembers what was said; options as of `stream_chat`. Raises UsageError without a tokenizer."""
        return Conversation(
            self, system=system, chat_template_kwargs=chat_template_kwargs, allow_control_tokens=allow_control_tokens
        )

    def stream(self, prompt: str | Sequence[int], **options: Unpack[RequestOptions]) -> Stream:
        """Chunks of the reply as they come; the last one says why it ended and what it cost.

        `prompt` is text or token ids. Options are the fields of SamplingParams by name, or `sampling`: one as a
        whole; a field that is given by name too wins. What is set nowhere comes from the model's generation_config.
        `on_prefill(done, total)` is told of the prompt's progress, in tokens that have to be read, `on_progress` of
        the same with bytes, as PrefillProgress. `choose` replaces sampling by a function (ids, logits) -> id.
        `own_text`: the reply does not continue the prompt's text, and begins without the space before its first word.
        `queued`: only the first `next` finds out whether the engine is busy.

        `reuse`: the begin of the prompt that is kept from earlier calls is not read again. Default: as far as it has
        the bits of a fresh reading. True: the longest common prefix with the last call, its reply included, which in 16
        bits rounds differently. False: nothing, and nothing is kept. `cache_salt`: what is kept of prompts with one
        salt serves no others.

        Raises UsageError (unknown or impossible option), ContextLengthError (the prompt leaves no room for a token) and
        EngineBusyError at the call. At any step CheckpointError from a failed read and BudgetError from full RAM or a
        full device, after which the engine is usable, and DeviceError from a lost one, after which it is closed.
        """
        return self._begin(self._call(prompt, options))

    def _call(self, prompt: str | Sequence[int], options: RequestOptions) -> Request:
        parts = self._parts
        if not options.get("queued"):
            self._lock.check()
        return make_call(
            parts, prompt, options, end_ids=self._end_ids, vocab_size=self.vocab_size, grammars=self._grammars
        )

    def _begin(self, call: Request) -> Stream:
        parts = self._parts
        begin = partial(answer, call, parts, self._totals, self._kept, self._decode, self._halving_chunk)
        if parts.model.config.is_encoder_decoder:
            begin = partial(translate, call, parts, self._totals)
        return Stream(self._lock.hold(lambda: self._parts.device, begin, call.closed), call.closed, prompt_ids=call.ids)

    def close(self) -> None:
        """Release threads, files and memory. A second close does nothing; in a forked child the copy is forgotten."""
        if self._loaded is not None and self._process.is_here:
            self.at_close(self.stats())
        loaded, self._loaded = self._loaded, None
        if loaded is not None and self._process.is_here:
            self._kept.close()
            self._decode.close()
            loaded.close()

    def _give_up(self) -> None:
        """Close, when the device is lost: whatever is released on it may fail too, and that says nothing new."""
        with contextlib.suppress(RuntimeError, DeviceError):
            self.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
