"""`training.optimizer: rkif_adamw`: the steps of both learners also update the importance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from run_inputs import one_task, parameters_of
from torch import Tensor

from rkif.continual.config import RunConfig
from rkif.continual.methods.recurrent_kif import RecurrentKIF
from rkif.continual.methods.sequential import Sequential
from rkif.continual.models.learner import BatchLearner

Config = Callable[..., RunConfig]
TRAINING: dict[str, Any] = {"steps": 7, "batch_size": 4, "learning_rate": 1e-2, "optimizer": "rkif_adamw"}


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def state_of(method: RecurrentKIF) -> dict[str, Tensor]:
    return parameters_of(method) | method.tensors()


@pytest.mark.parametrize("optimizers", ["keep", "reset"])
def test_the_bits_are_those_of_a_separate_observe(
    config: Config, inputs: Path, optimizers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(training=TRAINING, rounds={"optimizers": optimizers})
    along = one_task(settings, inputs)
    calls = [0]
    monkeypatch.setattr(along.fuser, "observe", lambda: calls.__setitem__(0, calls[0] + 1))
    monkeypatch.setattr(BatchLearner, "follow", lambda self, fuser: False)
    apart = one_task(settings, inputs)
    assert along.fuser is not None
    assert apart.fuser is not None
    for step in range(7):
        along.train_step(step)
        apart.train_step(step)
        assert along.fuser.inner_observed == apart.fuser.inner_observed == ((step + 1) % 3 if step < 6 else 0)
        assert_same_bits(state_of(along), state_of(apart))
    assert along.fuser.round == 3
    assert calls == [0]


def test_a_nonfinite_gradient_is_observed_and_not_applied(config: Config, inputs: Path) -> None:
    method = one_task(config(training=TRAINING), inputs)
    before = parameters_of(method)

    def spoil() -> None:
        next(iter(method.inner.parameters.values())).grad.fill_(torch.inf)  # type: ignore[union-attr]

    method.inner.step(method.batch(0), lr_fraction=1.0, seed=0, before_clip=spoil)
    assert_same_bits(parameters_of(method), before)
    assert method.inner.tensors() == {}
    assert method.fuser is not None
    assert method.fuser.inner_observed == 1
    assert method.fuser.state_dict()["nonfinite"] > 0


def test_a_method_without_importance_only_steps(config: Config, inputs: Path) -> None:
    plain = one_task(config(method="sequential"), inputs, Sequential)
    ours = one_task(config(method="sequential", training=TRAINING), inputs, Sequential)
    before = parameters_of(ours)
    plain.train_step(0)
    ours.train_step(0)
    for name, expected in parameters_of(plain).items():
        torch.testing.assert_close(ours.inner.parameters[name].detach(), expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(value, before[name]) for name, value in parameters_of(ours).items())


def test_importance_after_the_step_is_refused(config: Config) -> None:
    with pytest.raises(ValidationError, match=r"rounds\.observe: training\.optimizer rkif_adamw updates"):
        config(training=TRAINING, rounds={"observe": "after"})
    assert config(rounds={"observe": "after"}).training.optimizer == "adamw"
