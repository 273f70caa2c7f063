"""Torch's threads while a token is computed: one, all for a product of many rows, and as before afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from engines import open_tiny, save_tiny

from offmoe.hf import torch_threads
from offmoe.hf.torch_threads import TorchThreads


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Counting:
    """A step that notes torch's threads."""

    def __init__(self, position: int = 9, work: Callable[[], object] = lambda: None) -> None:
        self.position, self.work, self.seen = position, work, 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen = torch.get_num_threads()
        self.work()
        return ids


def begun(*, unread: dict[int, str] | None = None, attends: bool = False) -> TorchThreads:
    threads = TorchThreads()
    threads.begin({} if unread is None else unread, attends=attends)
    return threads


def seen_by(threads: TorchThreads, position: int = 9) -> int:
    step = Counting(position)
    threads.run_token(step, torch.ones(1, 1))
    assert torch.get_num_threads() == 3
    return step.seen


def test_one_thread_and_back() -> None:
    assert seen_by(begun()) == 1
    threads = begun()
    with pytest.raises(ZeroDivisionError):
        threads.run_token(Counting(work=lambda: 1 // 0), torch.ones(1, 1))
    assert torch.get_num_threads() == 3


def test_all_threads_where_torch_has_the_weights() -> None:
    unread: dict[int, str] = {}
    threads = begun(unread=unread)
    assert seen_by(threads) == 1
    unread[4] = "a layer that the kernels do not read"  # as it turns out later
    assert seen_by(threads) == 3
    assert seen_by(TorchThreads()) == 3
    assert seen_by(begun(), 5000) == 3 and seen_by(begun(attends=True), 5000) == 1


def test_a_product_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = torch_threads.multiply
    monkeypatch.setattr(torch_threads, "MANY_PRODUCTS", 100)
    monkeypatch.setattr(
        torch_threads, "multiply", lambda *args: (seen.append(torch.get_num_threads()), plain(*args))[1]
    )
    threads, weight = begun(), torch.ones(4, 4)
    for rows in (2, 7):
        x = torch.ones(rows, 4)
        threads.run_token(Counting(work=partial(threads.linear, x, weight, None)), torch.ones(1, 1))
    assert threads.linear(torch.ones(2, 4), weight, None).shape == (2, 4)
    assert seen == [1, 3, 3]


def test_an_engine_decodes_on_one_thread_and_reads_prompts_on_all(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with open_tiny(save_tiny(tmp_path), device="cpu") as engine:
        if engine._parts.native is None:
            pytest.skip("no CPU kernels here")
        head = engine.model.get_input_embeddings()
        head.register_forward_hook(lambda _, args, __: seen.append((args[0].shape[1], torch.get_num_threads())))
        engine.generate([5, 7, 9, 11], max_new_tokens=4, ignore_eos=True)
    assert seen[0] == (4, 3) and set(seen[1:]) == {(1, 1)} and len(seen) > 2
    assert torch.get_num_threads() == 3


def test_threads_that_a_program_starts_meanwhile_have_all(tmp_path: Path) -> None:
    """Half of them start within a token, the others between two; each uses torch for the first time in its life."""
    seen: list[int] = []

    def start() -> None:
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()

    inside: list[int] = []
    threads = begun()
    for _ in range(10):
        threads.run_token(Counting(work=lambda: (inside.append(torch.get_num_threads()), start())), torch.ones(1, 1))
        start()
    assert seen == [3] * 20 and inside == [1] * 10


def test_products_of_mkl_are_of_one_thread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that was set by torch is MKL's own: what it was comes back."""
    own = torch_threads._own_thread()
    assert own is not None
    before = own.set(3, 2)
    threads = begun()
    within: list[int] = []

    def look() -> None:
        within.append(own.set(1, 1))

    threads.run_token(Counting(work=look), torch.ones(1, 1))
    after = own.set(3, before)
    assert (within, after) in (([1], 2), ([0], 0))  # the second where torch has no MKL


@pytest.mark.parametrize(("quota", "cores", "number"), [(None, 2, 3), (2.5, 2, 2), (8.0, 8, 3)])
def test_a_quota_bounds_the_threads(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int, number: int
) -> None:
    monkeypatch.setattr(torch_threads, "processor_quota", lambda: quota)
    monkeypatch.setattr(torch_threads, "num_cores", lambda: cores)
    torch_threads.keep_to_quota()
    assert torch.get_num_threads() == number
