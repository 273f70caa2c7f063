"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from cpu_cases import LEVELS, open_kernels
from hypothesis import HealthCheck, settings
from logs import collected
from makers import LAYOUTS, Measured, TinyExperts, make_tiny_experts

from offmoe.kernels.cpu.kernels import CpuKernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    import offmoe

# A busy machine is no failure. The same examples in every run: `--hypothesis-profile search` looks for others.
_either = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("search", **_either)
settings.register_profile("offmoe", derandomize=True, **_either)
settings.load_profile("offmoe")


# pytest's worker processes are told the width of its own terminal; the terminals in tests have sizes of their own.
for variable in ("COLUMNS", "LINES"):
    os.environ.pop(variable, None)

# A runner in the background ignores Ctrl-C, and every child would inherit that: the tests send it and mean it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the engine keeps from run to run is kept from one test to the next no more than it comes from the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"))


@pytest.fixture(autouse=True)
def _no_other_warning() -> Iterator[None]:
    """A warning in the package's log is a failure, as every warning of Python is, unless the test expects it."""
    with collected() as messages:
        yield
    assert not messages, messages


@pytest.fixture(scope="session", autouse=True)
def _own_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the settings and measurements of whoever runs it, nor do programs that outlive a test."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_CONFIG_HOME", "APPDATA", "XDG_CACHE_HOME"):
            patch.setenv(variable, str(tmp_path_factory.mktemp("settings")))
        patch.setenv("OFFMOE_RUN", str(tmp_path_factory.mktemp("run") / "offmoe"))
        patch.delenv("OFFMOE_CACHE", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices here are tiny: with as many threads as busy cores, each product waits milliseconds for the others."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """`measured(family, form, logits, expected)`: equal within 1e-5 of the largest logit; noted for the models table
    (scripts/models_table.py). `form`: what was read, or where it ran.
    """

    def check(family: str, form: str, logits: torch.Tensor, expected: torch.Tensor) -> None:
        difference = float((logits - expected).abs().max() / expected.abs().max())
        record_property("measured", f"{family}|{form}|{difference:.1e}")
        assert difference < 1e-5, f"{family} as {form}: {difference:.1e}"

    return check


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyExperts:
    """Two layers of eight experts, each expert's matrices side by side. Nobody writes to it."""
    return make_tiny_experts(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", params=LAYOUTS)
def tiny_of_layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyExperts:
    """The same experts, once in each layout. Nobody writes to them."""
    return make_tiny_experts(tmp_path_factory.mktemp("tiny"), layout=request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen3-MoE, where a test file has no model of its own under this name."""
    from engines import save_tiny  # transformers, which few test files need

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[offmoe.Engine]:
    """That model, opened with room for a quarter of its experts."""
    from engines import open_tiny

    with open_tiny(folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(folder: Path) -> PreTrainedModel:
    """That model in transformers' hands."""
    from engines import plain_model

    return plain_model(folder)


@pytest.fixture(params=LEVELS or ["none"])
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    """At every level that this processor has."""
    opened = open_kernels(request.param)
    yield opened
    opened.close()
