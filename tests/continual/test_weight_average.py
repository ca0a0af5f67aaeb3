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

from rkif.continual.config import RunConfig
from rkif.continual.models.weight_average import WeightAverage
from rkif.continual.rundir.folder import task_folder
from rkif.continual.rundir.rollback import rollback
from rkif.continual.rundir.state import read_checkpoint
from rkif.continual.rundir.verify import verify
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


def test_two_averages_are_refused(config: Config) -> None:
    with pytest.raises(ValidationError, match=r"merge\.window 0\.5 and ema\.decay 0\.9: each publishes"):
        config(merge={"window": 0.5}, ema={"decay": 0.9})
