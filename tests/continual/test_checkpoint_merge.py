"""The merge of a task's last checkpoints, compared with the decay that it emulates."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_inputs import go, one_task, read_parameters

from rkif.continual.config import CheckpointMergeSettings, RunConfig
from rkif.continual.methods import METHODS, Replay
from rkif.continual.models.checkpoint_merge import CheckpointMerge

Config = Callable[..., RunConfig]


def settings(window: float, checkpoints: int, shape: str = "linear") -> CheckpointMergeSettings:
    return CheckpointMergeSettings.model_validate(
        {"window": window, "checkpoints": checkpoints, "shape": shape}
    )


@pytest.mark.parametrize(
    ("window", "checkpoints", "steps", "period", "expected"),
    [
        (0.5, 4, 8, 1, {4: 0.2, 5: 0.2, 6: 0.2, 7: 0.2, 8: 0.2}),
        (0.5, 2, 8, 1, {4: 1 / 3, 6: 1 / 3, 8: 1 / 3}),
        (0.5, 99, 8, 1, {4: 0.2, 5: 0.2, 6: 0.2, 7: 0.2, 8: 0.2}),
        (0.5, 4, 8, 3, {6: 0.6, 8: 0.4}),  # rounds of three steps, and a tail
        (0.5, 4, 8, 99, {8: 1.0}),
        (0.01, 4, 8, 1, {8: 1.0}),  # no step: the last checkpoint alone
        (0.99, 1, 8, 1, {1: 0.5, 8: 0.5}),
        (0.5, 3, 1, 1, {1: 1.0}),
    ],
)
def test_checkpoints_are_taken_at_equal_distances(
    window: float, checkpoints: int, steps: int, period: int, expected: dict[int, float]
) -> None:
    merge = CheckpointMerge(settings(window, checkpoints), steps, period, {})
    assert merge.weights == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "rate"),
    [
        ("linear", lambda x: 1 - x),
        ("1-sqrt", lambda x: 1 - math.sqrt(x)),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
def test_the_merge_gives_updates_the_weights_of_the_decay(shape: str, rate: Callable[[float], float]) -> None:
    value = torch.zeros(6)
    merge = CheckpointMerge(settings(0.5, 5, shape), 10, 1, {"w": value})
    for step in range(10):
        if step >= 5:
            value[step - 5] += 1.0  # the update of step 5 + i is the unit vector i
        else:
            value[5] += 1.0
        merge.add(step + 1)
    merge.finish()
    expected = [rate(index / 6) for index in range(1, 6)]
    torch.testing.assert_close(value, torch.tensor([*expected, 5.0]))


@pytest.mark.parametrize("method", ["replay", "recurrent_kif"])
def test_a_run_publishes_the_merged_parameters(config: Config, tmp_path: Path, method: str) -> None:
    plain = config(method=method)
    go(plain, tmp_path / "plain")
    go(config(method=method, merge={"window": 0.8}), tmp_path / "merged")
    go(config(method=method, merge={"window": 0.01}), tmp_path / "last")
    ends = {name: read_parameters(tmp_path / name) for name in ("plain", "merged", "last")}
    assert all(torch.equal(ends["last"][name], value) for name, value in ends["plain"].items())
    assert not any(torch.equal(ends["merged"][name], value) for name, value in ends["plain"].items())


def test_rounds_merge_fused_parameters_only(config: Config, inputs: Path) -> None:
    method = one_task(config(merge={"window": 0.8}), inputs, METHODS["recurrent_kif"])
    assert method.checkpoint_merge is not None
    assert set(method.checkpoint_merge.weights) == {3, 6, 7}  # Q = 3 in 7 steps


def test_a_constant_rate_warms_up_in_the_first_task_only(config: Config, inputs: Path) -> None:
    training = {"steps": 6, "warmup_steps": 3, "schedule": "constant"}
    second = one_task(config(training=training), inputs, Replay)
    assert [second.lr_fraction(step) for step in range(6)] == [1.0] * 6
    context = second.context
    first = Replay(type(context)(**{**vars(context), "index": 0}))
    assert [first.lr_fraction(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
