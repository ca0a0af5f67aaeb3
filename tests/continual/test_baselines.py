"""The baselines: each method is compared with its definition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from run_inputs import TASKS, assert_same_files, files, go, one_task, parameters_of, read_parameters
from safetensors.torch import load_file
from torch import Tensor

from rkif.continual.config import RunConfig
from rkif.continual.display.progress import RunProgress
from rkif.continual.methods import METHODS
from rkif.continual.methods.adaptive import Adaptive
from rkif.continual.methods.average import Average
from rkif.continual.methods.dare import Dare
from rkif.continual.methods.ewc import Ewc
from rkif.continual.methods.multi_task import MultiTask
from rkif.continual.methods.o_lora import OLora
from rkif.continual.methods.per_task import PerTask
from rkif.continual.methods.recurrent_kif import RecurrentKIF
from rkif.continual.methods.replay_equal_steps import ReplayEqualSteps
from rkif.continual.methods.sequential import Sequential
from rkif.continual.methods.tasl import Tasl
from rkif.continual.methods.ties import Ties, agreeing_mean
from rkif.continual.models.learner import BatchLearner

Config = Callable[..., RunConfig]


class Killed(BaseException):
    """Not an Exception, so that no handler catches it."""


@pytest.mark.parametrize(
    ("method", "optimizer", "distilled", "window"),
    [
        *((method, "adamw", 0.0, 0.0) for method in METHODS),
        ("recurrent_kif", "rkif_adamw", 0.0, 0.0),
        ("recurrent_kif", "adamw", 1.0, 0.8),
    ],
)
def test_a_killed_and_resumed_run_ends_with_the_same_bytes(
    config: Config, tmp_path: Path, method: str, optimizer: str, distilled: float, window: float
) -> None:
    training = config().training.model_dump() | {"optimizer": optimizer}
    distillation = {"memory": distilled, "inputs": distilled}
    settings = config(
        method=method,
        training=training,
        distillation=distillation,
        merge={"window": window},
        forever={"day": 2},
    )
    go(settings, tmp_path / "straight")
    for last in (10, 14, 19):  # within the second task, at its end, within the third
        with pytest.MonkeyPatch.context() as patch:
            steps = [0]

            def stop(self: RunProgress, loss: float, steps: list[int] = steps, last: int = last) -> None:
                steps[0] += 1
                if steps[0] == last:
                    raise Killed

            patch.setattr(RunProgress, "advance", stop)
            with pytest.raises(Killed):
                go(settings, tmp_path / str(last))
        go(settings, tmp_path / str(last), resume=True)
        assert_same_files(files(tmp_path / str(last)), files(tmp_path / "straight"), f"{method}, step {last}")


@pytest.mark.parametrize("steps", [6, 7])  # full rounds of Q = 3, and a tail
def test_replay_with_equal_steps_takes_the_steps_and_samples_of_recurrent_kif(
    config: Config, inputs: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(training={"steps": steps, "batch_size": 4}, outer={"batch_size": 6})
    seen: dict[str, list[list[str]]] = {}
    rates: dict[str, list[float]] = {}
    original = BatchLearner.step
    for kind in (RecurrentKIF, ReplayEqualSteps):
        batches = seen.setdefault(kind.__name__, [])

        def step(
            self: BatchLearner, items: Any, batches: list[list[str]] = batches, kind: Any = kind, **more: Any
        ) -> float:
            batches.append([record.id for _, record in items])
            rates.setdefault(kind.__name__, []).append(more["lr_fraction"])
            return original(self, items, **more)

        monkeypatch.setattr(BatchLearner, "step", step)
        method = one_task(settings, inputs, kind)
        for index in range(steps):
            method.train_step(index)
        assert method.samples == sum(map(len, batches))
    theirs, ours = seen["RecurrentKIF"], seen["ReplayEqualSteps"]
    assert len(ours) == len(theirs)
    assert Counter(chain(*ours)) == Counter(chain(*theirs))  # the same records, equally often
    assert max(map(len, ours)) - min(map(len, ours)) <= 2
    fractions = rates["ReplayEqualSteps"]
    assert fractions == sorted(fractions, reverse=True)
    assert set(fractions) == {(steps - step) / steps for step in range(steps)}


def test_ewc_of_strength_zero_is_fine_tuning(config: Config, tmp_path: Path) -> None:
    ends = {}
    for name, settings in (
        ("plain", config(method="sequential")),
        ("slack", config(method="ewc", ewc={"strength": 0})),
        ("stiff", config(method="ewc", ewc={"strength": 1e6})),
    ):
        go(settings, tmp_path / name)
        ends[name] = read_parameters(tmp_path / name)
    assert all(torch.equal(ends["slack"][name], value) for name, value in ends["plain"].items())
    assert not all(torch.equal(ends["stiff"][name], value) for name, value in ends["plain"].items())


def test_the_ewc_penalty_is_weighted_by_fisher_information(config: Config, inputs: Path) -> None:
    names = list(parameters_of(one_task(config(method="ewc"), inputs, Ewc)))
    shapes = {name: t.shape for name, t in parameters_of(one_task(config(), inputs, Ewc)).items()}
    fisher = {f"fisher.{name}": torch.rand(shapes[name]) for name in names}
    anchor = {f"anchor.{name}": torch.randn(shapes[name]) for name in names}
    method = one_task(
        config(method="ewc", ewc={"strength": 3.0}), inputs, Ewc, previous_task_state=fisher | anchor
    )
    values = method.inner.parameters
    energy = torch.stack(
        [(fisher[f"fisher.{name}"] * (values[name] - anchor[f"anchor.{name}"]) ** 2).sum() for name in names]
    ).sum()
    expected = torch.autograd.grad(1.5 * energy, [values[name] for name in names])
    for name in names:
        values[name].grad = torch.zeros_like(values[name])
    method.before_clip()
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(values[name].grad, gradient)


def test_ewc_sums_fisher_information_over_tasks(config: Config, inputs: Path) -> None:
    method = one_task(config(method="ewc"), inputs, Ewc)
    method.finish()
    first = method.task_state()
    fisher = torch.cat([t.flatten() for name, t in first.items() if name.startswith("fisher.")])
    assert fisher.min() >= 0
    assert fisher.mean().item() == pytest.approx(1, rel=1e-5)
    # The mean of squared gradients of single records, divided by its mean; the anchor is the task's end.
    other = one_task(config(method="ewc"), inputs, Ewc)
    squares: dict[str, Tensor] = {}
    for number in range(64):
        other.inner.gradient(other.records(number, number + 1), seed=other.seed("fisher", number))
        for name, parameter in other.inner.parameters.items():
            squares[name] = squares.get(name, torch.zeros(())) + parameter.grad**2
        other.inner.zero_grad()
    mean = torch.cat([square.flatten() for square in squares.values()]).mean()
    for name, parameter in other.inner.parameters.items():
        torch.testing.assert_close(first[f"fisher.{name}"], squares[name] / mean)
        assert torch.equal(first[f"anchor.{name}"], parameter)
    again = one_task(config(method="ewc"), inputs, Ewc, previous_task_state=first)
    again.finish()
    for name, tensor in again.task_state().items():
        if name.startswith("fisher."):
            torch.testing.assert_close(tensor, 2 * first[name])


def test_o_lora_trains_only_the_slice_of_the_task(config: Config, inputs: Path) -> None:
    method = one_task(config(method="o_lora", o_lora={"strength": 0.1}), inputs, OLora)
    before = parameters_of(method)
    for step in range(4):
        method.train_step(step)
    for name, after in parameters_of(method).items():
        axis = 0 if "lora_A" in name else 1
        assert after.shape[axis] == 3 * 4
        old, new, later = after.split(4, axis)
        untouched, start, _ = before[name].split(4, axis)
        assert torch.equal(old, untouched)
        assert torch.equal(later, before[name].split(4, axis)[2])
        assert not torch.equal(new, start)


def test_a_slice_of_o_lora_equals_a_separate_adapter(config: Config, inputs: Path) -> None:
    """The scale alpha / r is that of one task's adapter, for any number of slices."""
    sliced = one_task(config(method="o_lora"), inputs, OLora)
    plain = one_task(config(method="sequential"), inputs, Sequential)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in plain.inner.parameters.items():
            parameter.normal_(std=0.1)
            wide = sliced.inner.parameters[name]
            wide.zero_()
            sliced._slice(name, wide).copy_(parameter)
    items = plain.batch(0)
    losses = [method.inner.gradient(items, seed=0) for method in (sliced, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_o_lora_adds_the_gradient_of_the_overlap(config: Config, inputs: Path) -> None:
    method = one_task(config(method="o_lora", o_lora={"strength": 0.25}), inputs, OLora)
    for name, parameter in method.inner.parameters.items():
        if "lora_A" in name:
            leaf = parameter.detach().clone().requires_grad_()
            overlap = (leaf[:4].detach() @ leaf[4:8].T).abs().sum()
            (expected,) = torch.autograd.grad(0.25 * overlap, leaf)
            parameter.grad = torch.zeros_like(parameter)
            method.before_clip()
            torch.testing.assert_close(parameter.grad, expected)
            assert expected.norm() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "o_lora", "adapter": None}, "adapter is null"),
        ({"method": "o_lora", "training": {"steps": 2, "weight_decay": 0.1}}, "must be 0"),
        ({"method": "dare", "fusion": {"density": 0}}, "fusion.density, which is 0"),
        ({"method": "replay_equal_steps", "training": {"steps": 2, "batch_size": 1}}, "1 is too small"),
    ],
)
def test_methods_refuse_invalid_settings(
    config: Config, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        go(config(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tasl_merges_unit_by_unit(config: Config, inputs: Path) -> None:
    history = torch.linspace(0, 1, 8)  # units 6 and 7 (the top fifth of 8) are important to earlier tasks
    method = one_task(config(method="tasl"), inputs, Tasl, previous_task_state={"history": history})
    before = parameters_of(method)
    for step in range(3):
        method.train_step(step)
    learned = parameters_of(method)
    scores = torch.stack([score.mean() for score in method._importance.score_copies().values()])
    method.finish()
    new = scores > scores.sort().values[5]  # floor(0.8 * 7)
    assert new.sum() == 2
    for position, (name, after) in enumerate(parameters_of(method).items()):
        if bool(new[position]) and position < 6:
            expected = learned[name]
        elif bool(new[position]):
            expected = 0.3 * learned[name] + 0.7 * before[name]
        elif position >= 6:
            expected = before[name]
        else:
            expected = (learned[name] + before[name]) / 2
        torch.testing.assert_close(after, expected)
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    mixed = 0.3 * scaled + 0.7 * history
    expected = (mixed - mixed.min()) / (mixed.max() - mixed.min())
    torch.testing.assert_close(method.task_state()["history"], expected)


def test_ties_gives_the_hand_computed_merge() -> None:
    inner = torch.tensor([1.0, -2.0, 3.0, 0.0, -1.0, 2.0])
    outer = torch.tensor([3.0, 1.0, -3.0, 5.0, 0.0, -4.0])
    #      agree      inner wins  a tie: +   one alone  one alone  outer wins
    expected = [2.0, -2.0, 3.0, 5.0, -1.0, -4.0]
    assert agreeing_mean(inner, outer).tolist() == expected


def test_ties_keeps_the_largest_of_each_tensor(config: Config, inputs: Path) -> None:
    method = one_task(config(fusion={"density": 0.25}), inputs, Ties)
    vector = torch.tensor([0.1, -0.8, 0.3, 0.5, -0.2])  # k = floor(0.75 * 4) = 3 is the threshold
    assert method._trimmed(vector).tolist() == pytest.approx([0, -0.8, 0, 0, 0])


def test_dare_keeps_a_share_and_rescales_it(config: Config, inputs: Path) -> None:
    method = one_task(config(fusion={"density": 0.25}), inputs, Dare)
    ones = torch.ones(40_000)
    merged = method.merge("w", ones, ones)
    assert set(merged.tolist()) == {0.0, 2.0, 4.0}  # none, one or both: 1 / (2 * 0.25) each
    assert merged.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(merged, method.merge("w", ones, ones))  # depends on seed, round and name
    assert not torch.equal(merged, method.merge("v", ones, ones))
    method.round += 1
    assert not torch.equal(merged, method.merge("w", ones, ones))


def after_one_round(settings: RunConfig, inputs: Path, kind: type[Sequential]) -> dict[str, Tensor]:
    method = one_task(settings, inputs, kind)
    for step in range(3):
        method.train_step(step)
    return parameters_of(method)


def test_average_is_recurrent_kif_with_halves_everywhere(config: Config, inputs: Path) -> None:
    halves = {case: [0.5, 0.5] for case in ("inner_only", "outer_only", "both", "neither")}
    fused = after_one_round(
        config(fusion={"rule": halves, "inner_steps": 3, "outer_steps": 2}), inputs, RecurrentKIF
    )
    averaged = after_one_round(config(), inputs, Average)
    for name, expected in fused.items():
        torch.testing.assert_close(averaged[name], expected)


def test_soft_weights_lie_between_the_masks_and_the_average(config: Config, inputs: Path) -> None:
    averaged = after_one_round(config(), inputs, Average)
    hot = after_one_round(config(adaptive={"temperature": 1e6}), inputs, Adaptive)
    cold = after_one_round(config(adaptive={"temperature": 1e-6}), inputs, Adaptive)
    for name, expected in averaged.items():
        torch.testing.assert_close(hot[name], expected)
    # At a low temperature weights are 0 or 1: every element takes the task vector of the side with the higher
    # score, after the scores of each side are scaled to [0, 1].
    method = one_task(config(adaptive={"temperature": 1e-6}), inputs, Adaptive)
    base, seen = parameters_of(method), {}
    merge = Adaptive.end_round

    def watched(self: Adaptive, *arguments: Any) -> None:
        seen["inner"], seen["outer"] = (side.score_copies() for side in self._importance)
        seen["stopped"], seen["ended"] = dict(self.stopped), parameters_of(self)
        merge(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adaptive, "end_round", watched)
        for step in range(3):
            method.train_step(step)
    lows, highs = (
        {side: pick(torch.cat([s.flatten() for s in seen[side].values()])) for side in ("inner", "outer")}
        for pick in (torch.min, torch.max)
    )
    picked = 0
    for name, value in cold.items():
        share = {s: (seen[s][name] - lows[s]) / (highs[s] - lows[s]) for s in ("inner", "outer")}
        clear = (share["inner"] - share["outer"]).abs() > 1e-4  # at 1e-6, weights are 0 or 1
        inner = seen["stopped"][name] - base[name]
        outer = seen["ended"][name] - seen["stopped"][name]
        expected = base[name] + torch.where(share["inner"] > share["outer"], inner, outer)
        torch.testing.assert_close(value[clear], expected[clear])
        picked += int(clear.sum())
    assert picked > 10
    one = torch.tensor([0.5])
    method._weights = {"w": torch.tensor([1.0]), "v": torch.tensor([0.25])}
    assert method.merge("w", one, 3 * one).item() == 0.5
    assert method.merge("v", one, 3 * one).item() == 0.25 * 0.5 + 0.75 * 1.5


def test_per_task_evaluates_each_task_with_its_adapter(config: Config, inputs: Path, tmp_path: Path) -> None:
    metrics = go(config(method="per_task"), tmp_path)
    for index, row in enumerate(metrics["accuracy"]):
        assert row[:index] == [metrics["initial"][index]] * index
        assert row[index:] == [row[index]] * (3 - index)
    initial = parameters_of(one_task(config(), inputs, Sequential))
    method = one_task(config(), inputs, Sequential)
    with torch.no_grad():
        for parameter in method.inner.parameters.values():
            parameter.add_(1)
    alone = go(
        config(method="sequential", tasks=config().tasks.model_dump() | {"order": TASKS[1:2]}),
        tmp_path / "alone",
    )
    assert metrics["accuracy"][1][1] == alone["accuracy"][0][0]
    assert read_parameters(tmp_path / "alone").keys() == initial.keys()
    adapters = [
        load_file(path / "adapter_model.safetensors")
        for path in (tmp_path / "tasks/02-tense", tmp_path / "alone/tasks/01-tense")
    ]
    assert all(torch.equal(adapters[0][name], value) for name, value in adapters[1].items())
    again = PerTask(replace(method.context, initial=initial))
    again.begin()
    assert all(torch.equal(value, initial[name]) for name, value in parameters_of(again).items())


def test_multi_task_samples_all_tasks_equally(config: Config, inputs: Path) -> None:
    method = one_task(config(training={"steps": 30, "batch_size": 4}), inputs, MultiTask)
    records = [record for step in range(30) for _, record in method.batch(step)]
    counts = [sum(record.task == task for record in records) for task in TASKS]
    assert sum(counts) == 30 * 4 + 10 * 2 * 4  # and the memory samples of the other methods in ten rounds
    assert max(counts) - min(counts) <= 1
    first_epoch = {(record.task, record.id) for record in records[:120]}
    assert len(first_epoch) == 120  # one epoch over all 120, from the middle of each task's walk
    first = MultiTask(replace(method.context, index=0))
    earlier = [record for step in range(30) for _, record in first.batch(step)]
    assert [r.id for r in earlier] != [r.id for r in records]  # the walk continues from task to task


def test_multi_task_uses_as_many_records_as_replay_without_repeats(config: Config, tmp_path: Path) -> None:
    settings = {"training": {"epochs": 0.5, "batch_size": 4, "learning_rate": 1e-2}}
    seen: list[str] = []
    original = BatchLearner.step

    def step(self: BatchLearner, items: Any, **more: Any) -> float:
        seen.extend(f"{record.task}/{record.id}" for _, record in items)
        return original(self, items, **more)

    replay = go(config(method="replay", **settings), tmp_path / "replay")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchLearner, "step", step)
        together = go(config(method="multi_task", **settings), tmp_path / "together")
    assert together["samples"] == replay["samples"] == len(seen)
    assert len(set(seen)) == len(seen) < 120


@pytest.mark.parametrize("setting", ["observe", "optimizers"])
def test_ablations_change_the_named_step(config: Config, inputs: Path, setting: str) -> None:
    value = {"observe": "after", "optimizers": "reset"}[setting]
    usual = one_task(config(), inputs)
    changed = one_task(config(rounds={setting: value}), inputs)
    for step in range(3):
        usual.train_step(step)
        changed.train_step(step)
    same = [
        torch.equal(a, b)
        for a, b in zip(usual.inner.parameters.values(), changed.inner.parameters.values(), strict=True)
    ]
    if setting == "observe":
        assert not all(same)  # different scores, so different masks
    else:
        assert all(same)  # the first round is the same; the moments are reset at its end
        assert [len(learner.tensors()) > 0 for learner in (usual.inner, usual.outer)] == [True, True]
        assert [len(learner.tensors()) > 0 for learner in (changed.inner, changed.outer)] == [False, False]


def test_static_importance_is_that_of_the_first_round(config: Config, inputs: Path) -> None:
    method = one_task(config(fusion={"inner_steps": 3, "outer_steps": 2, "refresh_outer": False}), inputs)
    assert method.fuser is not None
    found = []
    for step in range(7):
        method.train_step(step)
        if step in (2, 5, 6):
            found.append(method.fuser.scores("outer"))
    assert all(torch.equal(found[0][name], later[name]) for later in found[1:] for name in later)
    assert any(score.max() > 0 for score in found[0].values())
