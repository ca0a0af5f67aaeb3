"""The ledger of a training loop: the records of `rkif run`, except for what a fuser does not know."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Rkif
from fuser_loop import Loop, make_model
from run_inputs import rewrite_ledger

from rkif import Criterion, Fuser, FusionConfig, Gate
from rkif.continual.rundir.folder import RunReader
from rkif.continual.rundir.verify import verify
from rkif.ledger.chain import LedgerError
from rkif.ledger.records import parameter_digest

ROUND = 7  # events


def loop(folder: Path, **changes: Any) -> Loop:
    made = Loop(FusionConfig.paper(density=0.3, **changes))
    made.fuser = Fuser(made.model, made.fuser.config, ledger=folder)
    return made


def records(folder: Path) -> list[dict[str, Any]]:
    return RunReader(folder).ledger()


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_record_has_what_the_round_did(tmp_path: Path, scope: str) -> None:
    made = loop(tmp_path / "ledger", scope=scope)
    made.run(range(6))
    base, inner, outer = made.fuser.base(), made.fuser.scores("inner"), made.fuser.scores("outer")
    report = made.fuser.fuse()
    made.run(range(7, 14))
    begin, first, second = records(tmp_path / "ledger")
    assert (begin["event"], begin["tasks"], begin["method"]) == ("begin", [], "recurrent_kif")
    assert begin["parameters"]["after"] == first["parameters"]["before"] == parameter_digest(base)
    assert first["parameters"]["after"] == second["parameters"]["before"]
    assert second["parameters"]["after"] == parameter_digest(made.fuser.parameters)
    assert [(r["round"], r["steps"], r["applied"]) for r in (first, second)] == [
        (1, [0, 3], True),
        (2, [3, 6], True),
    ]
    assert {key: first[key] for key in ("numel", "counts", "norms", "applied")} == {
        key: value
        for key, value in report.to_dict().items()
        if key in ("numel", "counts", "norms", "applied")
    }
    after = dict(zip(made.fuser.parameters, made.weights(), strict=True))
    moved = 0.0
    for index, (name, effect) in enumerate(first["modules"].items()):
        low, high = (t if isinstance(t, float) else t[name] for t in report.thresholds)
        in_, out = inner[name] > low, outer[name] > high
        cases = (in_ & ~out, out & ~in_, in_ & out, ~(in_ | out))
        assert effect["counts"] == [int(case.sum()) for case in cases], index
        assert effect["importance"] == pytest.approx([float(inner[name].mean()), float(outer[name].mean())])
        assert effect["numel"] == after[name].numel()
        moved += effect["moved"] ** 2
    assert moved**0.5 == pytest.approx(report.norms["update"], rel=1e-5)


def test_the_commands_read_the_ledger_of_a_loop(tmp_path: Path, rkif: Rkif) -> None:
    folder = tmp_path / "ledger"
    loop(folder).run(range(2 * ROUND))
    status, shown, _ = rkif("log", folder)
    assert status == 0
    rounds = [line.split()[:2] for line in shown.splitlines() if "-" in line.split()]
    assert rounds == [["1", "1-3"], ["2", "4-6"]]
    status, shown, _ = rkif("log", folder, "--verify")
    assert status == 0
    assert "3 records in an unbroken chain" in shown
    status, shown, _ = rkif("log", folder, "--explain", "2.weight")
    assert status == 0
    assert "rounds that changed '2.weight'" in shown
    assert "gate -: no gate checked the round" in " ".join(shown.split())
    for arguments, message in (
        (("log", "--task", "x"), "--task: this is the ledger of a training loop, whose rounds have no task"),
        (("log", "--explain", "nope"), "no parameter's name has 'nope' as whole parts; names are '0"),
        (("rollback", "--to", "1"), f"{folder} is the ledger of a training loop, which has no states"),
    ):
        status, _, errors = rkif(arguments[0], folder, *arguments[1:])
        assert (status, errors.count("\n")) == (1, 1)
        assert message in errors
    status, shown, _ = rkif("log", folder, "--json")
    assert [json.loads(line)["event"] for line in shown.splitlines()] == ["begin", "round", "round"]
    assert rkif("report", folder)[0] == 0
    page = (folder / "report.html").read_text()
    assert "recurrent_kif in a training loop" in page
    assert "<b>2</b>fusions kept" in page
    assert "Change by tensor" in page
    for command in (("rollback", folder, "--to", 1), ("reproduce", folder, "--round", 1)):
        status, _, errors = rkif(*command)
        assert (status, errors.count("\n")) == (1, 1), command
        assert "Traceback" not in errors


def test_a_changed_record_is_found_and_not_continued(tmp_path: Path, rkif: Rkif) -> None:
    loop(tmp_path).run(range(2 * ROUND))
    path = tmp_path / "ledger.jsonl"
    path.write_text(path.read_text().replace('"round":1', '"round":3'))
    status, _, errors = rkif("log", tmp_path, "--verify")
    assert status == 1
    assert "record 1 was changed" in errors
    with pytest.raises(LedgerError, match="record 1 was changed"):
        loop(tmp_path)


def test_a_forged_method_is_found(tmp_path: Path, rkif: Rkif) -> None:
    loop(tmp_path).run(range(ROUND))
    rewrite_ledger(tmp_path / "ledger.jsonl", lambda record: record.update(method="replay"), 0)
    status, _, errors = rkif("log", tmp_path, "--verify")
    assert (status, errors.count("\n")) == (1, 1)
    assert "record 0 is forged: its method is 'replay'" in errors


def test_a_resumed_loop_continues_the_chain(tmp_path: Path) -> None:
    straight = loop(tmp_path / "straight")
    straight.run(range(4 * ROUND))
    killed = loop(tmp_path / "killed")
    killed.run(range(ROUND + 2))
    state = {name: tensor.clone() for name, tensor in killed.fuser.state_dict().items()}
    saved = [m.state_dict() for m in (killed.model, killed.inner, killed.outer)]
    saved = [copy.deepcopy(part) for part in saved]
    killed.run(range(ROUND + 2, 3 * ROUND))  # two rounds after the state was saved
    resumed = loop(tmp_path / "killed")
    for part, content in zip((resumed.model, resumed.inner, resumed.outer), saved, strict=True):
        part.load_state_dict(content)
    resumed.fuser.load_state_dict(state)
    resumed.run(range(ROUND + 2, 4 * ROUND))
    found = records(tmp_path / "killed")
    assert [r["event"] for r in found] == ["begin", *["round"] * 3, "rollback", *["round"] * 3]
    assert (found[4]["to"], found[4]["parameters"]["after"]) == (1, found[1]["parameters"]["after"])
    kept = [r for i, r in enumerate(found) if r["event"] == "round" and i not in (2, 3)]
    expected = [r for r in records(tmp_path / "straight") if r["event"] == "round"]
    differing = ("seq", "previous", "hash", "time")
    assert [{k: v for k, v in r.items() if k not in differing} for r in kept] == [
        {k: v for k, v in r.items() if k not in differing} for r in expected
    ]
    verify(tmp_path / "killed")


def test_a_discarded_or_skipped_round_is_recorded(tmp_path: Path) -> None:
    made = loop(tmp_path, nonfinite="skip")
    made.run(range(2))
    made.fuser.rollback()
    made.run(range(5))
    made.fuser._nonfinite[0] = 3
    made.run(range(5, 7))
    _, given_up, refused = records(tmp_path)
    for record in (given_up, refused):
        assert not record["applied"]
        assert record["parameters"]["before"] == record["parameters"]["after"]
        assert all(module["moved"] == 0 for module in record["modules"].values())
    assert (given_up["steps"], refused["steps"]) == ([0, 2], [2, 5])
    assert (given_up["nonfinite"], refused["nonfinite"]) == (0, 3)


def test_the_verdicts_of_a_gate(tmp_path: Path, rkif: Rkif) -> None:
    made = Loop(FusionConfig())
    values = iter([1.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    gate = Gate([Criterion("kpi", lambda: next(values), tolerance=0.5)], ladder=(0.5,))
    made.fuser = Fuser(made.model, made.fuser.config, gate=gate, ledger=tmp_path)
    made.run(range(2 * ROUND))
    _, kept, undone = records(tmp_path)
    assert (kept["gate"]["verdict"], undone["gate"]["verdict"]) == ("keep", "undo")
    assert sum(undone["counts"].values()) == undone["numel"]
    assert sum(sum(module["counts"]) for module in undone["modules"].values()) == undone["numel"]
    assert '"name": "kpi"' in (tmp_path / "config.yaml").read_text()
    assert "undo" in rkif("log", tmp_path)[1]


def test_a_folder_that_is_not_the_ledgers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"ledger='.*other' is not empty and does not hold a ledger"):
        loop(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]
    loop(tmp_path / "ledger").run(range(ROUND))
    with pytest.raises(ValueError, match=r"ledger='.*' was written with other settings: see .*config\.yaml"):
        loop(tmp_path / "ledger", beta1=0.1)
    again = loop(tmp_path / "ledger")
    again.run(range(3))
    with pytest.raises(LedgerError, match="has 1 rounds, and this fuser has ended 0: load the state"):
        again.fuser.begin_outer()
    with pytest.raises(ValueError, match="pack_inner=True discards"):
        loop(tmp_path / "packed", pack_inner=True)
    with pytest.raises(ValueError, match=r"ledger='.*other/file' must be a folder, not a file"):
        Fuser(make_model(), ledger=tmp_path / "other" / "file")


def other_start(folder: Path) -> Loop:
    """A loop with another untrained model."""
    made = Loop(FusionConfig.paper(density=0.3))
    made.model.load_state_dict(make_model(1).state_dict())
    made.fuser = Fuser(made.model, made.fuser.config, ledger=folder)
    return made


def test_a_round_that_does_not_follow_the_ledger_is_refused(tmp_path: Path) -> None:
    """A training that was killed in its first round begins again from other parameters."""
    loop(tmp_path).run(range(3))
    again = other_start(tmp_path)
    again.run(range(6))
    before = again.weights()
    for end in (again.fuser.fuse, again.fuser.rollback):
        with pytest.raises(LedgerError, match="other parameters than the ledger has after round 0"):
            end()
    assert all(map(torch.equal, before, again.weights()))
    assert (again.fuser.round, again.fuser.phase, len(records(tmp_path))) == (0, "outer", 1)


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    loop(tmp_path / "ledger").run(range(2 * ROUND))
    other = other_start(tmp_path / "other")
    other.run(range(ROUND))
    made = loop(tmp_path / "ledger")
    made.model.load_state_dict(other.model.state_dict())
    made.fuser.load_state_dict(other.fuser.state_dict())
    made.run(range(ROUND, 2 * ROUND - 1))
    with pytest.raises(LedgerError, match="began with other parameters than the ledger has after round 1"):
        made.fuser.fuse()
    assert len(records(tmp_path / "ledger")) == 3


def test_a_second_fuser_on_a_ledger_is_refused(tmp_path: Path) -> None:
    first, second = loop(tmp_path), loop(tmp_path)
    first.run(range(ROUND))
    second.run(range(ROUND - 1))
    before = second.weights()
    with pytest.raises(LedgerError, match="was changed by another process"):
        second.fuser.fuse()
    assert all(map(torch.equal, before, second.weights()))
    verify(tmp_path)


def test_a_record_that_cannot_be_written_is_written_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, plain = loop(tmp_path), Loop(FusionConfig.paper(density=0.3))
    made.run(range(ROUND))
    state, weights = copy.deepcopy(made.fuser.state_dict()), copy.deepcopy(made.model.state_dict())
    made.run(range(ROUND, 2 * ROUND))
    made.model.load_state_dict(weights)
    made.fuser.load_state_dict(state)  # so that the second round is rolled back
    made.run(range(ROUND, 2 * ROUND - 1))

    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left on device"):
            made.fuser.fuse()
    assert (made.fuser.round, len(records(tmp_path))) == (2, 3)
    made.run(range(2 * ROUND, 3 * ROUND))
    found = [(r["event"], r.get("round")) for r in records(tmp_path)]
    ends = [("round", 1), ("round", 2), ("rollback", None), ("round", 2), ("round", 3)]
    assert found == [("begin", None), *ends]
    verify(tmp_path)
    plain.run(range(ROUND))
    assert records(tmp_path)[1]["parameters"]["after"] == parameter_digest(plain.fuser.parameters)


def test_files_left_by_a_kill_at_the_start_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml.tmp").write_text("{")
    loop(tmp_path).run(range(ROUND))
    verify(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        loop(tmp_path)


def test_a_ledger_changes_no_bit(tmp_path: Path) -> None:
    made, plain = loop(tmp_path), Loop(FusionConfig.paper(density=0.3))
    for one in (made, plain):
        one.run(range(2 * ROUND))
    assert all(map(torch.equal, made.weights(), plain.weights()))
