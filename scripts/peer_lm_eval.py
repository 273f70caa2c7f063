"""lm-evaluation-harness on `engine.model` and on plain transformers with the same weights: equal scores.

Three small tasks made here, without downloads: choices by likelihood, perplexity of texts, and generated answers until
a stop. The model is the bundled one in float32, a quarter of its experts cached. Needs `lm_eval`. Scores go to stderr;
the last line of stdout is the result as JSON. The exit code is 1 when a score differs by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"})

import lm_eval  # type: ignore[import-not-found]
import torch
from benchlib.machine import describe_machine
from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer

import offmoe
from offmoe.checkpoint.locate import demo_model_folder

NOUNS = ("harbour", "engine", "garden", "letter", "river", "window", "captain", "machine", "song", "winter")
VERBS = ("opened", "saw", "found", "left", "wrote about", "walked to", "heard", "forgot")
TOLERANCE = 1e-5
YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
TASKS = {
    "made_choices": (
        "multiple_choice",
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]',
    ),
    "made_texts": (
        "loglikelihood_rolling",
        'doc_to_target: "{{question}}"\nmetric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]',
    ),
    "made_answers": (
        "generate_until",
        'doc_to_target: "{{target}}"\n'
        'generation_kwargs: {until: ["."], do_sample: false, max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]',
    ),
}


def make_tasks(folder: Path, num_docs: int) -> None:
    """A YAML file and a JSON file for each task."""
    picks = random.Random(3)
    docs = []
    for _ in range(num_docs):
        text = " ".join(f"The {picks.choice(NOUNS)} {picks.choice(VERBS)} the {picks.choice(NOUNS)}." for _ in range(4))
        choices = picks.sample(NOUNS, 4)
        docs.append({
            "question": f"{text} Then the", "choices": [f" {noun}" for noun in choices], "answer": picks.randrange(4),
            "target": f" {choices[0]} was there",
        })  # fmt: skip
    data = folder / "docs.json"
    data.write_text("\n".join(map(json.dumps, docs)) + "\n")
    for name, (kind, rest) in TASKS.items():
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, data=data, kind=kind, rest=rest))


def scores(model: Any, tokenizer: Any, tasks: Path, batch_size: int) -> tuple[dict[str, Any], list[Any]]:
    """Metrics by task, and every single answer of the model."""
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=512)
    found = lm_eval.simple_evaluate(
        wrapped, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    metrics = {
        f"{task} {name.partition(',')[0]}": value
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, float)
    }
    return metrics, [sample["resps"] for task in TASKS for sample in found["samples"][task]]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tasks(folder, args.docs)
        tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
        model = AutoModelForCausalLM.from_pretrained(
            demo_model_folder(), dtype=torch.float32, experts_implementation="eager"
        )
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        want, plain_answers = scores(model.eval(), tokenizer, folder, args.batch_size)
        del model
        with offmoe.load(folder / "model", expert_slots=48, ram="6GiB") as engine:
            got, answers = scores(engine.model, engine.tokenizer, folder, args.batch_size)
            totals = engine.stats()
    rows = {name: [want[name], got[name], abs(got[name] - want[name]) / max(1e-9, abs(want[name]))] for name in want}
    worst = max(row[2] for row in rows.values())
    print(json.dumps(rows, indent=1), file=sys.stderr)
    same_texts = answers[2 * args.docs :] == plain_answers[2 * args.docs :]
    print(json.dumps({
        "lm_eval": lm_eval.__version__, "docs": args.docs, "batch_size": args.batch_size, "scores": rows,
        "largest_difference": worst, "same_generated_texts": same_texts,
        "same_likelihoods_to_the_bit": answers == plain_answers, "hit_rate": totals["hit_rate"],
        "evictions": totals["evictions"], "machine": describe_machine(),
    }))  # fmt: skip
    return 0 if worst <= TOLERANCE and same_texts and want.keys() == got.keys() else 1


if __name__ == "__main__":
    sys.exit(main())
