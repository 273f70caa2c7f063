"""The public names of transformers that rooms above use: classes of models, tokenizers, caches and logits processors.

Each name is imported from transformers when it is first asked for, so importing this module costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import *  # noqa: F403

_NAMES = {
    "DynamicCache", "GenerationConfig", "PreTrainedModel", "PreTrainedTokenizerBase", "LogitsProcessor",
    "LogitsProcessorList", "RepetitionPenaltyLogitsProcessor", "SequenceBiasLogitsProcessor",
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "NoBadWordsLogitsProcessor", "NoRepeatNGramLogitsProcessor",
    "SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor", "ForcedBOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty", "MinNewTokensLengthLogitsProcessor",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("transformers"), name)


def transformers_version() -> str:
    """Return the version of transformers that is installed."""
    return str(importlib.import_module("transformers").__version__)


def log_errors_only() -> None:
    """Silence transformers' warnings and advice, which would mix with a reply. Its errors are raised, not logged."""
    importlib.import_module("transformers").utils.logging.set_verbosity_error()
