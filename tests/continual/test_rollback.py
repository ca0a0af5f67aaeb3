"""A run that is rolled back and resumed ends with the same bits as the original run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from disk_states import disk_states
from hypothesis import given
from hypothesis import strategies as st
from run_inputs import files, go
from typer.testing import CliRunner

from rkif.cli import app
from rkif.continual.config import RunConfig
from rkif.continual.rundir.rollback import rollback
from rkif.continual.rundir.round_states import RoundStates, next_to_drop
from rkif.continual.rundir.state import RunState, read_checkpoint
from rkif.continual.rundir.verify import verify
from rkif.files import claimed
from rkif.ledger.chain import read_ledger
from rkif.ledger.records import not_rolled_back

Config = Callable[..., RunConfig]
ROUNDS = 6  # of these runs: two tasks with three rounds each


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    from run_inputs import make_config

    folder = tmp_path_factory.mktemp("whole") / "run"
    config = make_config(inputs)
    go(config, folder)
    return config, folder


def without_ledger(found: dict[str, bytes]) -> dict[str, bytes]:
    """The files, without the ledger, which records the rollback, and without checkpoints' record count."""
    dropped = ("ledger.jsonl", "checkpoint.safetensors")
    return {
        name: content
        for name, content in found.items()
        if name not in dropped and not name.startswith("snapshots/")
    }


def assert_same_end(run: Path, expected: Path) -> None:
    got, wanted = without_ledger(files(run)), without_ledger(files(expected))
    assert set(got) == set(wanted)
    assert [name for name in wanted if got[name] != wanted[name]] == []
    ends = [read_checkpoint(folder) for folder in (run, expected)]
    assert ends[0] is not None
    assert ends[1] is not None
    for part in ("parameters", "method"):
        one, other = getattr(ends[0], part), getattr(ends[1], part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("to", range(ROUNDS + 1))
def test_a_run_resumed_from_any_round_ends_with_the_same_bits(
    whole: tuple[RunConfig, Path], tmp_path: Path, to: int
) -> None:
    config, original = whole
    shutil.copytree(original, tmp_path / "run")
    run = tmp_path / "run"
    before = list(read_ledger(run / "ledger.jsonl"))
    rollback(run, to)
    state, kept = read_checkpoint(run), RoundStates(original).read(to)
    assert state is not None
    assert (state.task, state.step) == (kept.task, kept.step)
    assert all(torch.equal(state.parameters[name], value) for name, value in kept.parameters.items())
    assert max(RoundStates(run).rounds()) == to
    assert len(list((run / "tasks").iterdir())) == kept.task
    assert go(config, run, resume=True) == json.loads((original / "metrics.json").read_text())
    assert_same_end(run, original)
    after = list(read_ledger(run / "ledger.jsonl"))
    assert after[: len(before)] == before
    assert after[len(before)]["event"] == "rollback"
    again = [record for record in not_rolled_back(after) if record["event"] == "round"]
    assert [record["round"] for record in again] == list(range(1, ROUNDS + 1))
    first = [record for record in before if record["event"] == "round"]
    assert [r["parameters"] for r in again] == [r["parameters"] for r in first]


def test_an_unfinished_run_can_be_rolled_back_twice(
    config: Config, whole: tuple[RunConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rkif.continual.methods import RecurrentKIF

    settings, original = whole
    step = RecurrentKIF.train_step

    def killed(self: RecurrentKIF, number: int) -> float:
        if self.context.index == 2 and number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(RecurrentKIF, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            go(settings, tmp_path)
    rollback(tmp_path, 3)
    rollback(tmp_path, 1)
    with pytest.raises(ValueError, match="no round 2"):
        rollback(tmp_path, 2)
    go(settings, tmp_path, resume=True)
    assert_same_end(tmp_path, original)


def test_a_rollback_killed_at_any_event_is_completed(whole: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """The next resume completes the rollback."""
    config, original = whole
    run = shutil.copytree(original, tmp_path / "run")
    calls = [(os, "replace"), (shutil, "rmtree"), (os, "unlink"), (os, "write")]
    with disk_states(run, tmp_path / "states", calls) as states:
        rollback(run, 2)
    assert len(states) > 5
    verify(states[-1])
    unfinished = 0
    for state in states:
        last = list(read_ledger(state / "ledger.jsonl"))[-1]
        if last["event"] == "rollback" and state is not states[-1]:
            unfinished += 1
            with pytest.raises(
                ValueError, match=f"record {last['seq']} is of a rollback that was not completed"
            ):
                verify(state)
        go(config, state, resume=True)
        assert_same_end(state, original)
        verify(state)
    assert unfinished > 0


def test_rounds_without_a_valid_state_are_refused(
    whole: tuple[RunConfig, Path], tmp_path: Path, config: Config
) -> None:
    _, original = whole
    run = tmp_path / "run"
    shutil.copytree(original, run)
    shutil.rmtree(run / "snapshots")
    untouched = files(run)
    for arguments, message in (
        ([str(run), "--to", "99"], "no round 99:"),
        ([str(run), "--to", "2"], "the state after round 2 was not kept; kept states: none"),
        ([str(tmp_path / "nowhere"), "--to", "2"], "no such folder: "),
    ):
        failed = CliRunner().invoke(app, ["rollback", *arguments])
        assert failed.exit_code == 1
        assert message in str(failed.exception)
    assert files(run) == untouched
    shutil.copytree(original / "snapshots", run / "snapshots")
    for number in (0, 2):
        shutil.copy(run / "snapshots/000001.safetensors", run / f"snapshots/{number:06d}.safetensors")
    with pytest.raises(ValueError, match="of round 0 differs from the ledger"):
        rollback(run, 0)
    with pytest.raises(ValueError, match="of round 2 differs from the ledger"):
        rollback(run, 2)


def test_a_later_state_that_is_a_folder_is_refused_before_anything_is_changed(
    whole: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    state = run / "snapshots" / "000003.safetensors"
    state.unlink()
    (state / "file").mkdir(parents=True)
    before = files(run)
    with pytest.raises(ValueError, match=r"000003.safetensors is damaged: it is not a file"):
        rollback(run, 1)
    assert files(run) == before
    assert (state / "file").is_dir()


def test_a_run_in_use_by_another_process_is_refused(whole: tuple[RunConfig, Path], tmp_path: Path) -> None:
    settings, finished = whole
    run = shutil.copytree(finished, tmp_path / "run")
    before = files(run)
    with claimed(run):
        again = [lambda: go(settings, run, resume=True), lambda: go(settings, run)]
        for attempt in (lambda: rollback(run, 1), *again):
            with pytest.raises(RuntimeError, match="another process is working in "):
                attempt()
    assert files(run) == before
    assert rollback(run, 1)["to"] == 1


def test_the_command_rolls_back_and_reports(whole: tuple[RunConfig, Path], tmp_path: Path) -> None:
    _, original = whole
    shutil.copytree(original, tmp_path / "run")
    done = CliRunner().invoke(app, ["rollback", str(tmp_path / "run"), "--to", "4"])
    assert done.exit_code == 0, done.exception
    assert "is as it was after round 4, and continues in task place; " in done.output
    assert (
        "deleted: snapshots/000005.safetensors, snapshots/000006.safetensors, tasks/03-place\n" in done.output
    )
    again = CliRunner().invoke(app, ["rollback", str(tmp_path / "run"), "--to", "5"])
    expected = f"no round 5: {tmp_path / 'run'} has the rounds 1 to 4 since it was rolled back"
    assert str(again.exception) == expected
    third = json.loads(
        CliRunner().invoke(app, ["rollback", str(tmp_path / "run"), "--to", "3", "--json"]).output
    )
    assert third["record"]["to"] == 3
    assert third["deleted"] == ["snapshots/000004.safetensors"]


def state(size: int) -> RunState:
    values = torch.arange(size, dtype=torch.float32)
    return RunState(1, 2, 3, 4, {"w": values, "v": -values}, {"base.w": values, "m": values + 1})


def test_states_are_read_as_written_and_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    snapshots = RoundStates(tmp_path, 10**6)
    snapshots.write(5, state(1000))
    found = snapshots.read(5)
    assert (found.task, found.step, found.samples, found.ledger_records) == (1, 2, 3, 4)
    for part in ("parameters", "method"):
        for name, tensor in getattr(state(1000), part).items():
            assert torch.equal(getattr(found, part)[name], tensor)
    assert (tmp_path / "snapshots/000005.safetensors").stat().st_size < 3.3 * 4000
    found.parameters["w"].zero_()
    assert found.method["base.w"].any()  # no memory is shared


def test_states_stay_within_the_budget(tmp_path: Path) -> None:
    snapshots = RoundStates(tmp_path, 60_000)
    for number in range(1, 41):
        snapshots.write(number, state(1000))
        assert sum(path.stat().st_size for path in (tmp_path / "snapshots").iterdir()) <= 60_000
        assert snapshots.rounds()[-1] == number
    kept = snapshots.rounds()
    assert len(kept) == 4
    gaps = [second - first for first, second in pairwise(kept)]
    assert gaps == sorted(gaps, reverse=True)
    RoundStates(tmp_path / "none", 0).write(1, state(10))
    RoundStates(tmp_path / "none", 100).write(1, state(1000))
    assert not (tmp_path / "none").exists()


@given(st.sets(st.integers(0, 10**6), min_size=2))
def test_the_newest_state_is_never_deleted(numbers: set[int]) -> None:
    ordered = sorted(numbers)
    assert next_to_drop(ordered) in ordered[:-1]
    assert next_to_drop(ordered[:1]) == ordered[0]
