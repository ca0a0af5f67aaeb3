"""The fuzzer finds planted faults: a verifier that accepts, a traceback, a file changed outside."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import rkif
from bench.fuzzing import campaign as campaigns
from bench.fuzzing import cases
from bench.fuzzing.cases import Outcome
from bench.fuzzing.commandline import Ended, command, import_everything
from bench.fuzzing.subjects import Subjects
from rkif import Fuser


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subjects]:
    threads = torch.get_num_threads()
    import_everything()
    yield Subjects(tmp_path_factory.mktemp("subjects"))
    torch.set_num_threads(threads)


def test_cases_of_each_kind_have_no_findings(subjects: Subjects) -> None:
    for kind, count in ((cases.mutation, 4), (cases.call, 60), (cases.kill, 2)):
        for seed in range(count):
            assert kind(seed, subjects)[1] is None, (kind, seed)
    assert sum(cases.kill(seed, subjects).kills for seed in range(3)) > 0


def test_an_accepted_change_is_a_finding(subjects: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "command", lambda *_: Ended(0, "all is well", "", 0.1))
    found = {cases.mutation(seed, subjects)[1] for seed in range(8)}
    assert {"verify: verify accepts it", "log --verify: it is accepted"} <= found


def test_a_traceback_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(self: object, path: Path) -> None:
        raise KeyError("time")

    monkeypatch.setattr("rkif.continual.rundir.folder.RunReader.__init__", broken)
    ended = command("log", tmp_path)
    assert ended.complaint is not None
    assert ended.complaint.startswith("a traceback: ")


def test_a_file_changed_outside_is_a_finding(subjects: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    def deleting(*arguments: Any) -> Ended:
        next(a for a in arguments if isinstance(a, Path)).parent.joinpath("victim").unlink(missing_ok=True)
        return Ended(1, "", "rkif: error: no\n", 0.1)

    monkeypatch.setattr(cases, "command", deleting)
    assert str(cases.mutation(0, subjects)[1]).endswith("a file outside of the run was changed")


def test_a_wrong_result_is_a_finding(subjects: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rkif.fuse

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = right(*arguments, **options)
        for tensor in result.params.values():
            tensor.add_(1)
        return result

    monkeypatch.setattr(rkif, "fuse", wrong)
    found = [cases.call(seed, subjects)[1] for seed in range(20)]
    assert sum("differs from the reference" in str(one) for one in found) > 5


def test_a_fused_round_without_a_gradient_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkif.fuser.fuser.require_complete", lambda fuser: 0)
    found = [str(cases.fuser_call(random.Random(seed), seed).wrong) for seed in range(40)]
    assert sum(one.startswith("a round without a gradient of ") for one in found) > 3
    assert all(one.endswith(" was fused") for one in found if one != "None")


def test_a_missing_parameter_that_is_fused_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse = Fuser.fuse

    def fuse_all(fuser: Fuser) -> Any:
        if fuser.config.missing == "zero":
            fuser._steps.with_gradient.update(fuser.parameters)
        return fuse(fuser)

    monkeypatch.setattr(Fuser, "fuse", fuse_all)
    found = [str(cases.fuser_call(random.Random(seed), seed).wrong) for seed in range(40)]
    assert sum(one.startswith("its ") for one in found) > 3
    assert all(one.startswith("its ") for one in found if one != "None")


@pytest.mark.parametrize(
    ("ended", "complaint"),
    [
        (Ended(None, "", "", 60.0), "it did not end within 60 s"),
        (Ended(1, "", "", 0.1), "0 lines of errors"),
        (Ended(2, "", "Usage: rkif", 0.1), "0 lines of errors"),
        (Ended(1, "", "rkif: error: a\nrkif: error: b\n", 0.1), "2 lines of errors"),
        (Ended(99, "", "what", 0.1), "status 99"),
        (Ended(-11, "", "", 0.1), "status -11"),
    ],
)
def test_an_unclean_end_is_named(ended: Ended, complaint: str) -> None:
    assert str(ended.complaint).startswith(complaint)


def test_a_campaign_counts_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaigns, "Subjects", lambda folder: None)
    monkeypatch.setattr(campaigns, "import_everything", lambda: None)
    monkeypatch.setattr(campaigns, "RESULTS", tmp_path / "fuzz.jsonl")
    seen: list[int] = []

    def kind(seed: int, _: object) -> Outcome:
        seen.append(seed)
        return Outcome("here", "bad" if seed == 6 else None, kills=2)

    monkeypatch.setattr(campaigns, "KINDS", {"mutation": kind, "call": lambda *_: Outcome("", None)})
    console = Console(file=io.StringIO(), width=200)
    findings = campaigns.campaign(60, 5, "", 3, write=True, console=console)
    assert (findings, seen) == (["mutation, seed 6: here: bad"], [5, 6, 7])
    assert "| 3 | 6 | 1 |" in campaigns.markdown()
    with pytest.raises(ValueError, match="--kind"):
        campaigns.campaign(1, 0, "other", None, write=False, console=console)
