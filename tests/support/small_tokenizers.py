"""Small tokenizers of the two forms that published models have: byte-level BPE, and sentencepiece's BPE with letters
spelt in bytes.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog; and then it sleeps. What is a list? It is a row of things.",
    "user system assistant You are a helpful assistant. Hello world, hello again! Count to three: one two three.",
    "<|im_start|>user im_end im_start end of turn [INST] [/INST] think",
] * 4
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def byte_level(*, special: tuple[str, ...] = SPECIAL, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """As Qwen's and GPT's: every byte is a token, control tokens are added behind the vocabulary."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>" if "<|endoftext|>" in special else None,
        chat_template=template,
    )  # fmt: skip


def sentencepiece(*, legacy: bool = False, template: str | None = INST) -> PreTrainedTokenizerFast:
    """As Llama's and Mixtral's: words begin with a mark for the space before, unknown letters are spelt in bytes.

    `legacy`: the mark is put before every stretch of text between control tokens, and not before the first one only.
    """
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learnt = trained.get_vocab()
    tokens += [token for token in sorted(learnt, key=learnt.__getitem__) if token not in tokens]
    merges = [
        (left, right) for left, right in _merges(trained) if {left, right, left + right} <= set(tokens)
    ]  # fmt: skip
    backend = Tokenizer(
        BPE(
            {token: idx for idx, token in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def _merges(trained: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
