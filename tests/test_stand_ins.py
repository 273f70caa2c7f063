"""Stand-ins are gone after their call, and never in a module that torch.compile is reading."""

from __future__ import annotations

import threading

import pytest
import torch
from families import build
from patience import PATIENCE_S
from torch import nn

from offmoe.models import routing
from offmoe.models.stand_ins import captured, stand_in


def zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def ones(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x)


@pytest.fixture
def pair() -> nn.Sequential:
    return nn.Sequential(nn.Identity(), nn.Identity())


X = torch.tensor([3.0])


def test_each_module_runs_its_own_forward_and_then_again_what_it_ran(pair: nn.Sequential) -> None:
    vars(pair[1])["forward"] = ones
    with stand_in({pair[0]: zeros, pair[1]: None}) as may:
        assert may
        assert (pair[0](X), pair[1](X)) == (0, 3)
    assert (pair[0](X), pair[1](X)) == (3, 1)
    assert "forward" not in vars(pair[0])


def test_they_go_when_the_call_fails(pair: nn.Sequential) -> None:
    with pytest.raises(ZeroDivisionError), stand_in({pair[0]: zeros}):
        1 / 0  # noqa: B018
    assert pair[0](X) == 3


def test_what_was_taken_away_meanwhile_stays_away(pair: nn.Sequential) -> None:
    vars(pair[0])["forward"] = ones
    with stand_in({pair[0]: zeros}):
        del vars(pair[0])["forward"]
    assert pair[0](X) == 3


def test_a_module_being_captured_has_none_but_others_may(pair: nn.Sequential) -> None:
    other = nn.Identity()
    with captured(pair):
        with stand_in({other: zeros, pair[0]: zeros}) as may:
            assert not may
            assert (pair[0](X), other(X)) == (3, 3)
        with stand_in({other: zeros}) as may:
            assert may and other(X) == 0
    with stand_in({pair[0]: zeros}) as may:
        assert may and pair[0](X) == 0


def test_a_capture_waits_for_the_call_that_has_stand_ins(pair: nn.Sequential) -> None:
    seen: list[float] = []

    def capture() -> None:
        with captured(pair):
            seen.append(float(pair[0](X)))

    thread = threading.Thread(target=capture)
    with stand_in({pair[0]: zeros}):
        thread.start()
        thread.join(0.1)
        assert not seen
    thread.join(PATIENCE_S)
    assert seen == [3.0]


def test_lookahead_goes_without_while_a_model_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers that only their block can be asked for."""
    candidates = routing.candidates
    monkeypatch.setattr(
        routing, "candidates", lambda *given: (found for found in candidates(*given) if found[1] is None)
    )
    model = build("deepseek_v3", seed=3).eval()
    layers = routing.map_routing(model).layers
    state = torch.randn(1, model.config.hidden_size)

    def asked() -> list[torch.Tensor | None]:
        predictors = [layer.predictor for layer in layers if layer.predictor is not None]
        assert predictors
        return [predictor(state) for predictor in predictors]

    before = asked()
    with captured(model):
        assert asked() == [None] * len(before)
    after = asked()
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(before, after, strict=True))
