"""MER and FOREVER, methods that replay at intervals, compared with their definitions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_inputs import one_task, parameters_of
from torch import Tensor

from rkif.continual.config import RunConfig
from rkif.continual.methods.forever import Forever, review_day, update_norm
from rkif.continual.methods.mer import Mer
from rkif.continual.methods.replay import Replay
from rkif.continual.models.learner import BatchLearner

Config = Callable[..., RunConfig]


def test_mer_keeps_a_share_of_the_update_of_every_few_steps(config: Config, inputs: Path) -> None:
    settings = config(training={"steps": 5, "batch_size": 4}, mer={"every": 2, "rate": 0.25})
    mer, replay = one_task(settings, inputs, Mer), one_task(settings, inputs, Replay)
    start = parameters_of(mer)
    for step in range(2):
        assert mer.train_step(step) == replay.train_step(step)  # the same batches
    for name, end in parameters_of(replay).items():
        torch.testing.assert_close(parameters_of(mer)[name], start[name] + 0.25 * (end - start[name]))
    second = parameters_of(mer)
    mer.train_step(2)
    assert all(not torch.equal(second[name], value) for name, value in parameters_of(mer).items())
    mer.train_step(3)
    fourth = parameters_of(mer)
    # The task's last interpolation follows one step: its update is a quarter of the optimizer's.
    full = one_task(
        settings.model_copy(update={"mer": settings.mer.model_copy(update={"rate": 1.0})}), inputs, Mer
    )
    full.load_tensors({name: tensor.clone() for name, tensor in mer.tensors().items()})
    with torch.no_grad():
        for name, parameter in full.inner.parameters.items():
            parameter.copy_(fourth[name])
    mer.train_step(4)
    full.train_step(4)
    for name, end in parameters_of(full).items():
        torch.testing.assert_close(
            parameters_of(mer)[name] - fourth[name], 0.25 * (end - fourth[name]), rtol=1e-3, atol=1e-7
        )


def test_the_norm_of_an_update_is_that_of_the_factors_product() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    before = {"m.lora_A.weight": random(3, 7), "m.lora_B.weight": random(5, 3), "norm.weight": random(4)}
    after = {name: tensor + 0.1 * random(*tensor.shape) for name, tensor in before.items()}
    product = after["m.lora_B.weight"] @ after["m.lora_A.weight"]
    product -= before["m.lora_B.weight"] @ before["m.lora_A.weight"]
    plain = after["norm.weight"] - before["norm.weight"]
    expected = float((product.square().sum() + plain.square().sum()).sqrt())
    assert update_norm(before, after) == pytest.approx(expected, rel=1e-5)
    assert update_norm(before, before) == pytest.approx(0.0, abs=1e-6)
    rescaled = {
        name: {
            key: value * {"m.lora_A.weight": 10.0, "m.lora_B.weight": 0.1}.get(key, 1.0)
            for key, value in one.items()
        }
        for name, one in (("before", before), ("after", after))
    }
    assert update_norm(**rescaled) == pytest.approx(expected, rel=1e-5)


def test_forever_replays_after_1_2_4_7_15_30_60_days(
    config: Config, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [review_day(index) for index in range(8)] == [1, 2, 4, 7, 15, 30, 60, 120]
    settings = config(
        training={"steps": 12, "batch_size": 4}, outer={"batch_size": 4}, forever={"day": 1, "epochs": 2}
    )
    method = one_task(settings, inputs, Forever)
    moved: list[float] = []
    replayed: list[int] = []
    memory = len(method.context.memory)
    per_replay = -(-2 * memory // 4) * 4
    batches: list[int] = []
    sound = method.context.memory.batch

    def batch(index: int, size: int, *, seed: int) -> Any:
        batches.append(index)
        return sound(index, size, seed=seed)

    monkeypatch.setattr(method.context.memory, "batch", batch)
    for step in range(12):
        before, samples = parameters_of(method), method.samples
        method.train_step(step)
        replays = (method.samples - samples - 4) // per_replay
        assert method.samples - samples == 4 + replays * per_replay
        moved.append(float(method.tensors()["clock"][1]))
        replayed.append(replays)
        since = method.tensors()["clock"][2:4].tolist()
        assert since == [0.0, 0.0] if replays else min(since) > 0  # time and steps since the last replay
        if not replays:
            assert moved[-1] - (moved[-2] if step else 0) == pytest.approx(
                update_norm(before, method.inner.parameters)
            )
    day = moved[0]
    expected, replays = [], 0
    for time in moved:
        due = time >= (1, 2, 4, 7, 15, 30)[replays] * day
        expected.append(int(due))
        replays += due
    assert replayed == expected
    assert sum(replayed) >= 3
    assert batches == list(range(sum(replayed) * per_replay // 4))  # each continues the walk of the last


@pytest.mark.parametrize(("ratio", "clipped"), [(1.0, 1.0), (1.5, 2.0), (0.1, 0.5), (9.0, 3.0)])
def test_forever_pulls_to_the_parameters_before_the_task(
    config: Config, inputs: Path, ratio: float, clipped: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(
        training={"steps": 9, "batch_size": 4}, forever={"day": 2, "epochs": 1, "pull": 0.5, "gamma": 2.0}
    )
    method = one_task(settings, inputs, Forever)
    anchor = parameters_of(method)
    with torch.no_grad():
        for parameter in method.inner.parameters.values():
            parameter.add_(1.0)
    # The first day has 2 a step. The mocked step moves nothing: 2 * ratio in each of the 4 steps since then.
    clock = torch.tensor([4.0, 9.0, 8.0 * ratio, 3.0, 0.0], dtype=torch.float64)
    method.load_tensors(method.tensors() | {"clock": clock})
    pulled = []

    def step(learner: BatchLearner, items: Any, *, before_clip: Callable[[], None], **more: Any) -> float:
        for parameter in learner.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        before_clip()
        pulled.append({name: p.grad for name, p in learner.parameters.items()})
        return 0.0

    monkeypatch.setattr(BatchLearner, "step", step)
    method.train_step(5)
    assert all(not grad.any() for grad in pulled[0].values())  # the step on the new task
    for name, grad in pulled[1].items():
        torch.testing.assert_close(grad, 2 * 0.5 * clipped * torch.ones_like(anchor[name]))
