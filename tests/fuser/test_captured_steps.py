"""Captured steps count when a CUDA graph replays them. Without a GPU a capture executes at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated_capture import Captures

import rkif
from rkif.fuser import observed_steps, round_fusion
from rkif.fuser.observed_steps import ObservedSteps

NAMES = ["a", "b", "c"]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Captures:
    captures = Captures()
    for module in (observed_steps, round_fusion):
        monkeypatch.setattr(module, "capturing", lambda _device: captures.active)
    return captures


def replay(steps: ObservedSteps, inner: int, outer: int) -> None:
    """What replays of captured steps do."""
    steps._replayed += torch.tensor([inner, outer])


def test_replays_are_counted_with_the_gradients_of_their_capture(capture: Captures) -> None:
    steps = ObservedSteps(torch.device("cpu"))
    steps.add("inner", NAMES, [None, 1, None])
    with capture():
        steps.add("inner", NAMES, [1, None, None])
        steps.add("outer", NAMES, [None, None, 1])
        steps.add_replayed()  # nothing can be read now
    assert (steps.counts, steps.with_gradient) == ({"inner": 1, "outer": 0}, {"b"})
    steps._replayed.zero_()  # a real capture has run nothing
    for _ in range(2):
        steps.add_replayed()
        assert (steps.counts, steps.with_gradient) == ({"inner": 1, "outer": 0}, {"b"})
    replay(steps, 3, 0)
    for _ in range(2):
        steps.add_replayed()
        assert (steps.counts, steps.with_gradient) == ({"inner": 4, "outer": 0}, {"a", "b"})
    steps.clear()
    assert (steps.counts, steps.with_gradient) == ({"inner": 0, "outer": 0}, set())
    replay(steps, 1, 2)
    steps.add_replayed()
    assert (steps.counts, steps.with_gradient) == ({"inner": 1, "outer": 2}, {"a", "c"})
    replay(steps, 1, 1)
    steps.load({"inner": 5, "outer": 6}, ["b"])
    steps.add_replayed()
    assert (steps.counts, steps.with_gradient) == ({"inner": 5, "outer": 6}, {"b"})


def fuser_of(parameter: torch.nn.Parameter) -> rkif.Fuser:
    with torch.no_grad():
        parameter.copy_(torch.linspace(-1, 1, 64))
    return rkif.Fuser([("p", parameter)], rkif.FusionConfig.release())


def test_rounds_of_captured_steps_are_those_of_other_steps(capture: Captures) -> None:
    """In the second round every step is replayed, without Python; the fusion still counts the steps."""
    parameter = torch.nn.Parameter(torch.empty(64))
    results = []
    for captured in (False, True):
        fuser = fuser_of(parameter)
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        for _ in range(3):
            for learner in ("inner", "outer"):
                if learner == "outer":
                    fuser.begin_outer()
                for _ in range(2):
                    parameter.grad = parameter.detach().cos()
                    capture.active = captured
                    fuser.observe()
                    capture.active = False
                    optimizer.step()
            assert (fuser.inner_observed, fuser.outer_observed) == (2, 2)
            assert fuser.state_dict()["with_gradient"].tolist() == [True]
            fuser.fuse()
            assert fuser.inner_observed == 0
        results.append(parameter.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("method", ["begin_outer", "fuse", "rollback"])
def test_a_phase_does_not_end_in_a_capture(capture: Captures, method: str) -> None:
    parameter = torch.nn.Parameter(torch.empty(64))
    fuser = fuser_of(parameter)
    parameter.grad = torch.ones(64)
    fuser.observe()
    if method == "fuse":
        fuser.begin_outer()
        fuser.observe()
    before, phase = parameter.tolist(), fuser.phase
    with (
        capture(),
        pytest.raises(RuntimeError, match=rf"{method}\(\) was called while a CUDA graph is captured"),
    ):
        getattr(fuser, method)()
    assert (parameter.tolist(), fuser.phase, fuser.round) == (before, phase, 0)
    getattr(fuser, method)()


@pytest.mark.gpu
def test_a_captured_step_is_replayed_in_every_round() -> None:
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 32, device="cuda"))
        data = torch.randn(16, 32, device="cuda")
        fuser = rkif.Fuser([("w", weight)], rkif.FusionConfig.release())
        optimizer = torch.optim.SGD([weight], lr=0.1)

        def step(
            weight: Any = weight, data: Any = data, fuser: Any = fuser, optimizer: Any = optimizer
        ) -> None:
            optimizer.zero_grad(set_to_none=True)
            (data @ weight.T).square().mean().backward()
            fuser.observe()
            optimizer.step()

        graphs: dict[str, Any] = {}
        for turn in range(4):
            for learner in ("inner", "outer"):
                if learner == "outer":
                    fuser.begin_outer()
                if turn == 0 or not captured:
                    for _ in range(3):
                        step()
                    continue
                if learner not in graphs:
                    optimizer.zero_grad(set_to_none=True)
                    graphs[learner] = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graphs[learner]):
                        step()
                for _ in range(3):
                    graphs[learner].replay()
            assert (fuser.inner_observed, fuser.outer_observed) == (3, 3)
            fuser.fuse()
        results.append(weight.detach().cpu())
    assert torch.equal(*results)
