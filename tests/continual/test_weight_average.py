"""The moving average of the parameters: its definition, and runs that publish it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from run_inputs import TASKS, go, read_parameters, rewrite_ledger
from safetensors.torch import load_file

from rkif.continual import task_sequence
from rkif.continual.config import RunConfig
from rkif.continual.models.weight_average import WeightAverage
from rkif.continual.rundir.folder import task_folder
from rkif.continual.rundir.rollback import rollback
from rkif.continual.rundir.state import read_checkpoint
from rkif.continual.rundir.verify import verify
from rkif.fuser.parameters import parameter_copies, trainable_parameters
from rkif.ledger.chain import LedgerError, read_ledger

Config = Callable[..., RunConfig]
DECAY = 0.75


def test_the_average_is_that_of_the_definition() -> None:
    value = torch.tensor([0.0, 8.0])
    average = WeightAverage(0.5, {"w": value})
    value.copy_(torch.tensor([4.0, 8.0]))
    average.update(1)  # 0.5 * 0 + 0.5 * 4
    value.copy_(torch.tensor([10.0, 0.0]))
    average.update(2)  # 0.25 * 2 + 0.75 * 10, and 0.25 * 8
    with average.published():
        assert value.tolist() == [8.0, 2.0]
    assert value.tolist() == [10.0, 0.0]


def test_the_parameters_return_after_an_error() -> None:
    value = torch.tensor([1.0])
    average = WeightAverage(0.5, {"w": value})
    value.fill_(3.0)
    with pytest.raises(RuntimeError), average.published():
        raise RuntimeError
    assert value.tolist() == [3.0]


def test_a_bfloat16_parameter_has_a_float32_average() -> None:
    value = torch.ones(1, dtype=torch.bfloat16)
    average = WeightAverage(0.999, {"w": value})
    value.fill_(2.0)
    for _ in range(1000):  # each adds less than bfloat16 resolves
        average.update(1)
    with average.published():
        assert value.item() == pytest.approx(2 - 0.999**1000, abs=2**-8)
        assert value.dtype == torch.bfloat16


def test_without_a_decay_nothing_is_kept() -> None:
    value = torch.ones(1)
    average = WeightAverage(0.0, {"w": value})
    average.update(1)
    with average.published():
        assert value.item() == 1.0
    assert average.tensors() == {}


@pytest.mark.parametrize("method", ["replay", "recurrent_kif"])
def test_a_run_trains_as_without_the_average_and_publishes_it(
    config: Config, tmp_path: Path, method: str
) -> None:
    plain = go(config(method=method), tmp_path / "plain")
    averaged = go(config(method=method, ema={"decay": DECAY}), tmp_path / "averaged")
    ends = {name: read_parameters(tmp_path / name) for name in ("plain", "averaged")}
    assert all(torch.equal(ends["averaged"][name], value) for name, value in ends["plain"].items())
    assert averaged["samples"] == plain["samples"]
    state = read_checkpoint(tmp_path / "averaged")
    assert state is not None
    last = task_folder(tmp_path / "averaged", len(TASKS) - 1, TASKS[-1])
    published = sorted(load_file(last / "adapter_model.safetensors").items())
    averages = sorted((name, tensor) for name, tensor in state.method.items() if name.startswith("ema."))
    assert [a.shape for _, a in averages] == [p.shape for _, p in published]
    for (_, average), (_, value) in zip(averages, published, strict=True):
        assert torch.equal(average, value)
    assert verify(tmp_path / "averaged")["tasks"] == len(TASKS)


def test_the_first_rounds_of_a_task_begin_where_training_ended(config: Config, tmp_path: Path) -> None:
    """In the ledger, and after a rollback to the state between two tasks."""
    settings = config(ema={"decay": DECAY})
    run, back = tmp_path / "run", tmp_path / "back"
    go(settings, run)
    records = list(read_ledger(run / "ledger.jsonl"))
    ends = [record for record in records if record["event"] == "task"]
    first = next(record for record in records if record["event"] == "round")
    assert first["parameters"]["before"] == ends[0]["parameters"]["trained"] != ends[0]["parameters"]["after"]
    shutil.copytree(run, back)
    for to in (4, 3, 0):  # within the last task, and before the first round of each
        rollback(back, to)
        verify(back)
        go(settings, back, resume=True)
        verify(back)
        assert (back / "metrics.json").read_bytes() == (run / "metrics.json").read_bytes()
        expected, got = read_checkpoint(run), read_checkpoint(back)
        assert expected is not None
        assert got is not None
        assert all(torch.equal(got.method[name], value) for name, value in expected.method.items())
    rewrite_ledger(run / "ledger.jsonl", lambda record: record["parameters"].pop("trained"), ends[0]["seq"])
    with pytest.raises(LedgerError, match="begins with other parameters than the record before it"):
        verify(run)


def test_only_an_average_has_trained_parameters_beside_the_published(config: Config, tmp_path: Path) -> None:
    go(config(method="sequential"), tmp_path)
    (*_, end) = (record for record in read_ledger(tmp_path / "ledger.jsonl") if record["event"] == "task")
    forged = {"after": "0" * 64, "trained": end["parameters"]["after"]}
    rewrite_ledger(tmp_path / "ledger.jsonl", lambda record: record.update(parameters=forged), end["seq"])
    with pytest.raises(LedgerError, match=r"is forged: it has trained parameters .* says ema\.decay 0"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("method", "updates"), [("replay", [1] * 7), ("recurrent_kif", [3, 3, 1]), ("mer", [4, 3])]
)
def test_the_average_takes_the_parameters_at_the_ends_of_periods(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, updates: list[int]
) -> None:
    taken: list[int] = []
    update = WeightAverage.update

    def counted(average: WeightAverage, steps: int) -> None:
        taken.append(steps)
        update(average, steps)

    monkeypatch.setattr(WeightAverage, "update", counted)
    go(config(method=method, mer={"every": 4}, ema={"decay": DECAY}), tmp_path)
    assert taken == updates * len(TASKS)


def test_the_published_parameters_are_evaluated(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[dict[str, torch.Tensor]] = []

    def evaluate(model: torch.nn.Module, *arguments: object) -> dict[str, float]:
        evaluated.append(parameter_copies(trainable_parameters(model)))
        return {"accuracy": 50.0}

    monkeypatch.setattr(task_sequence, "evaluate", evaluate)
    go(config(method="replay", ema={"decay": DECAY}), tmp_path)
    for index, task in enumerate(TASKS):
        published = load_file(task_folder(tmp_path, index, task) / "adapter_model.safetensors")
        for values in evaluated[(index + 1) * len(TASKS) : (index + 2) * len(TASKS)]:
            pairs = zip(sorted(values.items()), sorted(published.items()), strict=True)
            assert all(torch.equal(value, saved) for (_, value), (_, saved) in pairs)


@pytest.mark.parametrize("method", ["per_task", "tasl"])
def test_methods_that_an_average_would_falsify_are_refused(
    config: Config, tmp_path: Path, method: str
) -> None:
    with pytest.raises(ValueError, match=rf"ema\.decay: method {method}"):
        go(config(method=method, ema={"decay": DECAY}), tmp_path / "run")


def test_two_averages_are_refused(config: Config) -> None:
    with pytest.raises(ValidationError, match=r"merge\.window 0\.5 and ema\.decay 0\.9: each publishes"):
        config(merge={"window": 0.5}, ema={"decay": 0.9})
