"""The demo model's text and tokenizer, made of what every Python installation carries.

Four kinds of documents come out of the standard library: `code` (source files), `prose` (docstrings under their names),
`topics` (the pages behind `help("topic")`) and `chat` (docstrings and topics as questions and answers). The split into
training and held-out text is by file, so that no held-out docstring stands in a file the model saw.

This file knows nothing about models.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics as help_topics
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, USER, ASSISTANT, SYSTEM, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, SYSTEM, END)
VOCAB_SIZE = 4096
KINDS = ("prose", "code", "topics", "chat")
HELD_OUT_PERCENT = 5

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SYSTEM_PROMPTS = ("You explain the Python standard library.", "You are a helpful assistant.", "Answer briefly.")
NAME_QUESTIONS = (
    "What does {} do?",
    "What is {}?",
    "Explain {}.",
    "Describe {} in Python.",
    "How do I use {}?",
    "Tell me about {}.",
    "Show me the documentation of {}.",
    "help({})",
)
TOPIC_QUESTIONS = (
    "Explain {} in Python.",
    "Tell me about {} in Python.",
    "What does the Python manual say about {}?",
    "What is {}?",
    'help("{}")',
)

# Directories and files without text worth learning: tests, tables, vendored wheels, and build settings of this machine.
SKIPPED_DIRECTORIES = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "encodings",
    "pydoc_data",
    "_bundled",
    "turtledemo",
    "__pycache__",
}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize", "test_")
MAX_ANSWER_CHARS = 900


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of one kind; `held_out` texts are never trained on, not even by the tokenizer."""

    kind: str
    text: str
    held_out: bool


@dataclass(frozen=True, kw_only=True)
class Described:
    """A name and what the standard library says about it."""

    name: str
    text: str
    signature: str
    held_out: bool
    is_topic: bool = False


def is_held_out(key: str) -> bool:
    """The same answer on every machine: a hash of the name decides."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def stdlib_sources(root: Path) -> Iterator[tuple[str, str]]:
    """Yields (path relative to `root`, source) in sorted order."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_DIRECTORIES & set(relative.parts) or any(
            part.startswith(SKIPPED_PREFIXES) for part in relative.parts
        ):
            continue
        try:
            yield relative.as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def module_name(relative: str) -> str:
    name = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return "os.path" if name == "posixpath" else name


def docstrings(source: str, *, module: str, held_out: bool) -> Iterator[Described]:
    """Yields every docstring of a source file under its dotted name."""

    def visit(node: ast.AST, name: str) -> Iterator[Described]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                child_name = f"{name}.{child.name}"
                signature = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                text = ast.get_docstring(child)
                if text:
                    yield Described(name=child_name, text=text, signature=signature, held_out=held_out)
                yield from visit(child, child_name)

    tree = ast.parse(source)
    text = ast.get_docstring(tree)
    if text:
        yield Described(name=module, text=text, signature="", held_out=held_out)
    yield from visit(tree, module)


def builtin_docstrings() -> Iterator[Described]:
    """Yields the docstrings of modules written in C, which have no source file to read."""
    for module in sorted(sys.builtin_module_names):
        if module == "__main__":
            continue
        prefix = "" if module == "builtins" else f"{module}."
        for name, value in sorted(vars(import_module(module)).items()):
            if name.startswith("_") or not callable(value):
                continue
            members = sorted(vars(value).items()) if isinstance(value, type) else []
            for full_name, member in [
                (name, value),
                *((f"{name}.{n}", m) for n, m in members if not n.startswith("_")),
            ]:
                text = inspect.getdoc(member)
                if text:
                    yield Described(
                        name=prefix + full_name, text=text, signature="", held_out=is_held_out(module + name)
                    )


def described(sources: list[tuple[str, str]]) -> list[Described]:
    """All names with their texts, each text once; a text seen in training never counts as held out."""
    found = [
        Described(name=name, text=text.strip(), signature="", held_out=is_held_out(f"help({name})"), is_topic=True)
        for name, text in sorted(help_topics.items())
    ]
    found.extend(builtin_docstrings())
    for relative, source in sources:
        found.extend(docstrings(source, module=module_name(relative), held_out=is_held_out(relative)))
    once: dict[str, Described] = {}
    for item in sorted(found, key=lambda item: item.held_out):
        if len(item.text) >= 30:
            once.setdefault(item.text, item)
    return list(once.values())


def shortened(text: str) -> str:
    """Whole paragraphs up to `MAX_ANSWER_CHARS`, at least the first."""
    kept, *rest = text.split("\n\n")
    for paragraph in rest:
        if len(kept) + len(paragraph) > MAX_ANSWER_CHARS:
            break
        kept += "\n\n" + paragraph
    return kept.rstrip()


def chat_turn(item: Described, rng: random.Random) -> str:
    name = item.name.replace("-", " ") if item.is_topic else item.name
    if not item.is_topic and name.count(".") >= 2 and rng.random() < 0.3:
        name = ".".join(name.split(".")[-2:])
    question = rng.choice(TOPIC_QUESTIONS if item.is_topic else NAME_QUESTIONS).format(name)
    return f"{USER}\n{question}{END}\n{ASSISTANT}\n{shortened(item.text)}{END}\n"


def chats(items: list[Described], *, rng: random.Random, num_rounds: int) -> Iterator[Document]:
    """Yields each item `num_rounds` times as a conversation; some open with a system prompt, some have two turns."""
    for _ in range(num_rounds):
        for i in rng.sample(range(len(items)), len(items)):
            text = chat_turn(items[i], rng)
            if rng.random() < 0.15:
                other = rng.choice(items)
                if other.held_out == items[i].held_out:
                    text = chat_turn(other, rng) + text
            if rng.random() < 0.2:
                text = f"{SYSTEM}\n{rng.choice(SYSTEM_PROMPTS)}{END}\n{text}"
            yield Document(kind="chat", text=text, held_out=items[i].held_out)


def load_documents(*, seed: int) -> list[Document]:
    """Reads the running Python's standard library; the same seed and Python version give the same documents."""
    sources = list(stdlib_sources(Path(sysconfig.get_paths()["stdlib"])))
    items = described(sources)
    rng = random.Random(seed)
    documents = [Document(kind="code", text=source, held_out=is_held_out(relative)) for relative, source in sources]
    for item in items:
        text = item.text if item.is_topic else f"{item.name}{item.signature}\n\n{item.text}"
        documents.append(Document(kind="topics" if item.is_topic else "prose", text=text, held_out=item.held_out))
    documents.extend(chats(items, rng=rng, num_rounds=2))
    rng.shuffle(documents)
    return documents


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` entries, special tokens first (ids 0 to 4)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in documents if not document.held_out and document.kind != "chat")
    bpe.train_from_iterator(texts, trainer)
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = tokenizer_class(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM, END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    return tokenizer
