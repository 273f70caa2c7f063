"""Are the ids on the device those of the CPU? With `placement_invariant` every expert is computed in one place.

What can be asked for: on the device, the same ids however many experts its slots hold, in any dtype. And the CPU's ids,
in float32: in bfloat16 the resident weights (attention) round differently on the two, whoever computes the experts.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import offmoe
from benchlib.device_systems import Place, release_device
from benchlib.ledger import Ledger
from offmoe.checkpoint.locate import locate_model


def copy_as_float32(folder: Path, out: Path) -> Path:
    """The same weights in float32, in a folder that is made."""
    out.mkdir(parents=True)
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        save_file(tensors, out / path.name, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    return out


def demo_folder() -> Path:
    """Of the bundled model, which is trained: its logits have no near ties but those of real text."""
    return Path(locate_model(None))


def check_exact(
    ledger: Ledger, name: str, folder: Path, place: Place, *, ids: list[int], num_new: int, shares: tuple[float, ...]
) -> None:
    """Greedy ids on the device at each share of the experts, against each other and against the CPU's."""
    with offmoe.load(folder, device="cpu") as engine:
        expected = _greedy(engine, ids, num_new)
        total, is_float32 = engine.plan.num_experts, engine.model.dtype == torch.float32
    got: dict[float, tuple[int, ...]] = {}
    for share in shares:
        slots = max(1, round(share * total))
        with place.load(folder, expert_slots=slots, placement_invariant=True) as engine:
            got[share] = _greedy(engine, ids, num_new)
        release_device()
        equal = same_ids(got[share], expected)
        alike = same_ids(got[share], got[shares[0]])
        ledger.add(
            "exact", case=name, share=share, dtype="float32" if is_float32 else "as published", num_ids=num_new,
            equal_to_cpu=equal, equal_to_first_share=alike,
            ok=alike == num_new and (equal == num_new or not is_float32),
        )  # fmt: skip


def same_ids(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How many ids agree before the first that does not."""
    for idx, (a, b) in enumerate(zip(left, right, strict=True)):
        if a != b:
            return idx
    return len(left)


def _greedy(engine: offmoe.Engine, ids: list[int], num_new: int) -> tuple[int, ...]:
    return engine.generate(
        ids, max_new_tokens=num_new, temperature=0, repetition_penalty=1.0, ignore_eos=True
    ).token_ids
