"""The tokenizer of a GGUF file, made from its metadata by the tokenizers library: no config class, no converter.

Byte pairs with merges (`gpt2`), sentencepiece's pairs by score (`llama`) and byte pairs on plain text (`gemma4`) give
the ids of llama.cpp. Control and user-defined tokens are found in a text before anything else, whatever letters they
have.
"""

from __future__ import annotations

import itertools
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from offmoe.checkpoint.gguf.splits import Splitting, find_splitting
from offmoe.checkpoint.gguf.vocabulary import BYTE, CONTROL, USER_DEFINED, Vocabulary
from offmoe.core.errors import CheckpointError, UnsupportedModelError

KINDS = ("gpt2", "llama", "gemma4")
_SPACE = "\u2581"


class GgufTokenizer(PreTrainedTokenizerFast):
    """A tokenizer around one that is made already. (`tokenizer_object=` would copy it through a text of megabytes.)

    `end_ids`: the tokens that end a reply. `literal`: tokens whose letters the byte-level decoder would take for bytes,
    such as the letters that DeepSeek-Coder has beside its bytes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        made, self.end_ids = kwargs.pop("made", None), kwargs.pop("end_ids", [])
        self.literal: dict[int, str] = kwargs.pop("literal", {})
        if made is not None:
            self._tokenizer = made
        super().__init__(*args, **kwargs)

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the text of ids; user-defined tokens are written as they are."""
        if self.literal and isinstance(token_ids, list) and not self.literal.keys().isdisjoint(token_ids):
            runs = itertools.groupby(token_ids, key=lambda idx: idx if idx in self.literal else None)
            texts = [
                super(GgufTokenizer, self).decode(list(run), *args, **kwargs)
                if idx is None
                else self.literal[idx] * len(list(run))
                for idx, run in runs
            ]
            return "".join(texts)
        return super().decode(token_ids, *args, **kwargs)


def make_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """The tokenizer of `vocabulary`. Raises UnsupportedModelError for an algorithm or a splitting rule that is not
    known, and CheckpointError for a vocabulary that contradicts itself.
    """
    if vocabulary.kind not in KINDS:
        raise UnsupportedModelError(
            f"{vocabulary.path} has a tokenizer of kind {vocabulary.kind!r}, which is not read (known: "
            f"{', '.join(KINDS)}); use the safetensors version of the model"
        )
    special = vocabulary.special_types()
    if vocabulary.kind == "llama":
        tokenizer, add_bos = _sentencepiece(vocabulary, special), True
    else:
        splitting = find_splitting("gemma4" if vocabulary.kind == "gemma4" else vocabulary.splitting)
        tokenizer, add_bos = _byte_pairs(vocabulary, splitting), splitting.add_bos
    _add_special(tokenizer, vocabulary, special)
    _check_special(tokenizer, vocabulary, special)
    literal = _literal(tokenizer, vocabulary, special)
    names = _named_tokens(vocabulary)
    _add_ends(tokenizer, vocabulary, names, add_bos=add_bos)
    return GgufTokenizer(
        made=tokenizer, end_ids=vocabulary.end_ids(), literal=literal, chat_template=vocabulary.chat_template,
        clean_up_tokenization_spaces=False,
        **{name: vocabulary.tokens[idx] for name, idx in names.items()},
    )  # fmt: skip


def _byte_pairs(vocabulary: Vocabulary, splitting: Splitting) -> Tokenizer:
    pairs = []
    for number, merge in enumerate(vocabulary.merges):
        space = merge.find(" ", 1)  # the first letter may be a space
        if space < 0:
            raise _contradicts(vocabulary, f"merge {number} is {merge!r}, two parts with a space between are needed")
        pairs.append((merge[:space], merge[space + 1 :]))
    if not pairs and len(vocabulary.tokens) > 1:
        raise _contradicts(vocabulary, "it has no tokenizer.ggml.merges")
    model = _model(
        vocabulary, pairs, ignore_merges=splitting.whole_words, byte_fallback=splitting.is_raw, fuse_unk=False
    )
    tokenizer = Tokenizer(model)
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    if splitting.is_raw:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.decoder = _plain_decoder(strips=False)
    else:
        cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary, special: dict[int, int]) -> Tokenizer:
    if not vocabulary.scores:
        raise _contradicts(vocabulary, "it has no tokenizer.ggml.scores")
    tokenizer = Tokenizer(_model(vocabulary, _pairs_by_score(vocabulary, special), byte_fallback=True, fuse_unk=True))
    prefix = vocabulary.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    tokenizer.decoder = _plain_decoder(strips=prefix)
    return tokenizer


def _pairs_by_score(vocabulary: Vocabulary, special: dict[int, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others: sentencepiece joins the pair whose token has the highest score."""
    ids, scores = vocabulary.ids, vocabulary.scores
    made = []
    for idx, token in enumerate(vocabulary.tokens):
        if len(token) < 2 or idx in special or vocabulary.types[idx] == BYTE:
            continue
        for cut in range(len(token) - 1, 0, -1):  # of equal ones the pair that begins with more letters first
            if token[:cut] in ids and token[cut:] in ids:
                made.append((-scores[idx], token[:cut], token[cut:]))
    made.sort(key=lambda pair: pair[0])
    return [(left, right) for _, left, right in made]


def _model(vocabulary: Vocabulary, pairs: list[tuple[str, str]], **options: bool) -> BPE:
    unknown = vocabulary.token_id("unknown_token_id")
    if unknown is None and vocabulary.kind == "llama":
        unknown = 0
    try:
        return BPE(
            vocabulary.ids, pairs, unk_token=vocabulary.tokens[unknown] if unknown is not None else None, **options
        )
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception
        raise _contradicts(vocabulary, " ".join(str(error).split())) from None


def _plain_decoder(*, strips: bool) -> Any:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)


def _add_special(tokenizer: Tokenizer, vocabulary: Vocabulary, special: dict[int, int]) -> None:
    # Phi-3's control tokens take the blanks after them along; files do not say it (llama.cpp knows it by the name).
    is_phi3 = any(name in vocabulary.model_name.lower() for name in ("phi-3", "phi3"))
    tokenizer.add_tokens([
        AddedToken(
            vocabulary.tokens[idx], special=kind == CONTROL, normalized=False,
            rstrip=is_phi3 and vocabulary.tokens[idx] not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for idx, kind in special.items()
    ])  # fmt: skip


def _check_special(tokenizer: Tokenizer, vocabulary: Vocabulary, special: dict[int, int]) -> None:
    """Raise CheckpointError unless every control and user-defined token is read as itself."""
    for idx in special:  # one by one: a batch would start threads, which a process that forks later is warned of
        found = tokenizer.encode(vocabulary.tokens[idx], add_special_tokens=False).ids
        if found != [idx]:
            raise _contradicts(vocabulary, f"the token {vocabulary.tokens[idx]!r} ({idx}) is read as {found}")


def _literal(tokenizer: Tokenizer, vocabulary: Vocabulary, special: dict[int, int]) -> dict[int, str]:
    if vocabulary.kind != "gpt2":
        return {}
    texts = {idx: vocabulary.tokens[idx] for idx, kind in special.items() if kind == USER_DEFINED}
    return {idx: text for idx, text in texts.items() if tokenizer.decode([idx]) != text}


def _named_tokens(vocabulary: Vocabulary) -> dict[str, int]:
    """Tokens by transformers' names for what they do."""
    keys = {
        "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id", "sep_token": "seperator_token_id", "mask_token": "mask_token_id",
    }  # fmt: skip
    found = {name: idx for name, key in keys.items() if (idx := vocabulary.token_id(key)) is not None}
    if vocabulary.kind == "llama":  # sentencepiece's own, where a file names none
        for name, idx in (("unk_token", 0), ("bos_token", 1), ("eos_token", 2)):
            if f"{name}_id".replace("unk", "unknown") not in vocabulary.settings and idx < len(vocabulary.tokens):
                found.setdefault(name, idx)
    return found


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary, names: dict[str, int], *, add_bos: bool) -> None:
    """Put the tokens that begin and end a text around every text, where the file says so."""
    begins = vocabulary.flag("add_bos_token", add_bos) and "bos_token" in names
    ends = vocabulary.flag("add_eos_token", False) and "eos_token" in names
    if vocabulary.kind == "gemma4":
        begins = "bos_token" in names
    around = [name for name, used in (("bos_token", begins), ("eos_token", ends)) if used]
    template = ["bos_token"] * begins + ["$A"] + ["eos_token"] * ends
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        pair=[*template, *(part.replace("$A", "$B") for part in template)],
        special_tokens=[
            {"id": name, "ids": [names[name]], "tokens": [vocabulary.tokens[names[name]]]} for name in around
        ],
    )


def _contradicts(vocabulary: Vocabulary, what: str) -> CheckpointError:
    return CheckpointError(
        f"{vocabulary.path} has a tokenizer that cannot be read: {what}; get another file of the model"
    )
