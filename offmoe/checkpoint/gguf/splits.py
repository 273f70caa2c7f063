"""Rules that cut a text into words before byte pairs are merged, by the name that a GGUF file gives (`pre`). Data only.

Facts from llama.cpp (src/llama-vocab.cpp and src/unicode.cpp of 0c1e57098), whose ids are the measure: where it departs
from the tokenizer that a model was published with, so do these rules. Written for Oniguruma, in which `\\s`, `\\p{..}`
know all of Unicode and `&&` intersects character classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from offmoe.core.errors import UnsupportedModelError

# 's 't 're 've 'm 'll 'd
_SHORT = r"'(?:[stmd]|[rv]e|ll)"
_SHORT_ANY_CASE = r"'(?:[sStTmMdD]|[rRvV][eE]|[lL][lL])"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_BLANKS_LINE_BY_LINE = r"\s*[\r\n]|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
# Letters as llama.cpp tells capitals from small ones: by the 26 of ASCII.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_UPPER_MARKED, _LOWER_MARKED = r"[[\p{L}\p{M}]&&[^a-z]]", r"[[\p{L}\p{M}]&&[^A-Z]]"
_HAN = (
    r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}\x{2B740}-\x{2B81F}\x{2B820}-\x{2CEAF}"
    r"\x{2CEB0}-\x{2EBEF}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}"
)
# Cased letters, without the scripts that the rule's author left out: Georgian, mathematical letters, and others.
_CASED = (
    r"[[\p{Lu}\p{Ll}\p{Lt}]&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C8F}\x{2D00}-\x{2D2F}\x{A790}-\x{A7FF}"
    r"\x{AB30}-\x{AB68}\x{10570}-\x{105BC}\x{16E40}-\x{16E7F}\x{1D400}-\x{1DFFF}]]"
)
# Chinese, Japanese and what else lies between, and Korean.
_EASTERN = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}&&[^\s]]+"
_CHINESE_JAPANESE = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+"
_ASCII_SYMBOL = r"[!-/:-~&&[^A-Za-z]]"


def _words(letters: str, digits: str, *, short: str = _SHORT_ANY_CASE, after: str = r"[\r\n]*") -> str:
    """The rule of GPT-4's kind: contractions, words with one sign before them, digits, symbols, blanks."""
    return rf"{short}|{letters}|{digits}|{_SYMBOLS}{after}|{_BLANKS}"


def _cased_words(upper: str, lower: str, digits: str, *, short: str = "") -> str:
    """The rule of GPT-4o's kind: a word ends before a capital that follows a small letter."""
    begin = r"[^\r\n\p{L}\p{N}]?"
    return rf"{begin}{upper}*{lower}+{short}|{begin}{upper}+{lower}*{short}|{digits}|{_SYMBOLS}[\r\n/]*|{_BLANKS}"


_GPT2 = rf"{_SHORT}| ?\p{{L}}+| ?\p{{N}}+|{_SYMBOLS}|\s+(?!\S)|\s+"
_LLAMA3 = _words(_LETTERS, r"\p{N}{1,3}")
_QWEN2 = _words(_LETTERS, r"\p{N}")
_GPT4O = _cased_words(_UPPER, _LOWER, r"\p{N}{1,3}", short=f"(?:{_SHORT_ANY_CASE})?")
_DEEPSEEK3 = (
    rf"{_ASCII_SYMBOL}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"
)
# Groups of three digits, counted from the end; the first takes the text before it along.
_THREES = r"\P{N}*(?:\p{N}{1,2}(?=(?:\p{N}{3})*(?!\p{N}))|\p{N}{3})"
_NO_PUNCTUATION = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+"
_LINES = r"[^\n]+|\n+"


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """Regular expressions, each of which cuts what the ones before it left. A match is a word, and so is what lies
    between two. `whole_words`: a word that is a token is that token, whatever the merges say. `add_bos`: where the
    file does not say. `is_raw`: tokens are plain text with U+2581 for spaces, not letters that stand for bytes.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    is_raw: bool = False


def _rule(*patterns: str, whole_words: bool = False, add_bos: bool = False, is_raw: bool = False) -> Splitting:
    return Splitting(patterns=patterns, whole_words=whole_words, add_bos=add_bos, is_raw=is_raw)


# Files of 2023, which name no rule.
DEFAULT = _rule(r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9]{3}")
_DIGIT_BY_DIGIT = _rule(r"\p{N}", _GPT2)
_PLAIN_GPT2 = _rule(_GPT2)
_PLAIN_QWEN2 = _rule(_QWEN2)
_THREE_DIGITS = _rule(r"\p{N}{1,3}", _CHINESE_JAPANESE, _DEEPSEEK3)

# Rule -> the names that mean it.
_NAMES: tuple[tuple[Splitting, str], ...] = (
    (DEFAULT, "default"),
    (
        _rule(_LLAMA3, whole_words=True, add_bos=True),
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    (_rule(_LLAMA3), "dbrx smaug-bpe chatglm-bpe"),
    (_rule(_LLAMA3, whole_words=True), "glm4 glm5"),
    (
        _rule(
            _words(_LETTERS, r"\p{N}{1,3}").removesuffix(r"|\s+(?!\S)|\s+")
            + "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
            + r"|\s"
        ),
        "jais-2",
    ),
    (
        _rule(
            r"[\r\n]",
            rf"\s?{_CASED}+",
            r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}\x{3002}]+",
            r"\s+\z",
            _EASTERN,
            r"\p{N}+",
        ),
        "deepseek-llm",
    ),
    (_rule(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EASTERN, r"\p{N}"), "deepseek-coder"),
    (_THREE_DIGITS, "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (
        _rule(
            r"\p{N}{1,3}",
            _CHINESE_JAPANESE,
            rf"{_ASCII_SYMBOL}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+|[\r\n]|"
            r"\s+(?!\S)|\s+",
            r"\p{N}",
        ),
        "spark2_5",
    ),
    (
        _rule(
            r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}\x{FF1A}"
            r"\x{FF1B}\x{FF0C}\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+|[\x{3105}-\x{312F}]+|"
            r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+",
            rf"{_MARKED_LETTERS}(?:{_SHORT_ANY_CASE})?|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_BLANKS}",
            whole_words=True,
        ),
        "youtu",
    ),
    (_rule(r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9]{3}"), "falcon"),
    (_DIGIT_BY_DIGIT, "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2"),
    (
        _PLAIN_GPT2,
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en "
        "jina-v2-code roberta-bpe mpt olmo jais exaone4 trillion granite-docling",
    ),
    (
        _PLAIN_QWEN2,
        "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2",
    ),
    (
        _rule(rf"{_SHORT_ANY_CASE}|{_MARKED_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"),
        "qwen35",
    ),
    (_rule(rf"{_LETTERS}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_BLANKS}"), "ufakzeka"),
    (_rule(_LINES, _QWEN2), "laguna"),
    (_rule(_NO_PUNCTUATION), "poro-chat bloom gpt3-finnish"),
    (_rule(_NO_PUNCTUATION, r"\p{N}"), "viking"),
    (_rule(_cased_words(_UPPER, _LOWER, r"\p{N}"), whole_words=True, add_bos=True), "tekken"),
    (_rule(_GPT4O), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (
        _rule(
            _cased_words(_UPPER_MARKED, _LOWER_MARKED, r"\p{N}{1,3}", short=f"(?:{_SHORT_ANY_CASE})?"),
            whole_words=True,
        ),
        "granite-embed-multi-97m",
    ),
    (
        _rule(
            _THREES,
            rf"{_MARKED_LETTERS}(?:{_SHORT_ANY_CASE})?|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n/]*|{_BLANKS}",
        ),
        "tiny_aya cohere2moe",
    ),
    (
        _rule(
            rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+(?:{_SHORT_ANY_CASE})?|\p{{N}}{{1,3}}|{_SYMBOLS}"
            rf"[\r\n]*|{_BLANKS}"
        ),
        "kimi-k2",
    ),
    (_rule(r"\p{N}+", r"(?=(?:[0-9]{3})+(?![0-9]))"), "superbpe"),
    (
        _rule(rf"{_SHORT_ANY_CASE}|{_LETTERS}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_BLANKS_LINE_BY_LINE}"),
        "bailingmoe bailingmoe2 llada-moe",
    ),
    (_rule(rf"{_SHORT_ANY_CASE}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}"), "seed-coder"),
    (
        _rule(
            _THREES,
            r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{8C48}-\x{D7FF}\x{E000}-\x{FAFF}\x{3040}-\x{30FF}\x{FF65}-\x{FF9F}\x{2F00}-\x{2FDF}"
            r"\x{E40}-\x{E7F}\x{E80}-\x{EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}\x{A9E0}-\x{A9FF}"
            r"\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}]+",
            _DEEPSEEK3,
        ),
        "afmoe",
    ),
    (
        _rule(
            rf"{_SHORT_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|{_SYMBOLS}"
            rf"[\r\n/]?|{_BLANKS_LINE_BY_LINE}"
        ),
        "exaone-moe",
    ),
    (_rule(r"\p{N}{1,3}", _words(_LETTERS, r"\p{N}+"), whole_words=True), "minicpm5"),
    (
        _rule(
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            r"\p{N}",
            r"[\p{P}$+<=>^~|`]",
            _GPT2,
            add_bos=True,
        ),
        "chameleon",
    ),
    (_rule(_LINES, add_bos=True, is_raw=True), "gemma4 granite-embed-multi-311m"),
    (_rule(_LINES, is_raw=True), "sarvam-moe"),
)
SPLITTINGS: dict[str, Splitting] = {name: rule for rule, names in _NAMES for name in names.split()}


def find_splitting(name: str | None) -> Splitting:
    """The rule called `name`; the one of old files for None. Raises UnsupportedModelError for another name."""
    if name is None:
        return DEFAULT
    if name not in SPLITTINGS:
        raise UnsupportedModelError(
            f"the GGUF file splits text into words by the rule {name!r}, which is not known here, and another one "
            f"would give other tokens; use the safetensors version of the model (known: {', '.join(SPLITTINGS)})"
        )
    return SPLITTINGS[name]
