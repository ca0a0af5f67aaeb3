"""Every command refuses a run with damaged or malicious files with one line, and changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import Rkif
from run_inputs import go, make_config, rewrite_ledger

from rkif.continual.config import RunConfig
from rkif.continual.rundir.rollback import rollback
from rkif.ledger.chain import read_ledger

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with three rounds each; every second round is undone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    loss = {"metric": "memory_loss", "floor": -1, "tolerance": None}
    go(make_config(inputs, gate={"criteria": [loss], "every": 2, "ladder": []}), folder)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "parent" / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(rkif: Rkif, run: Path, *arguments: object) -> str:
    """The one-line error of a failed command, which changed nothing."""
    before = contents(run.parent)
    status, _, errors = rkif(*arguments)
    assert (status, errors.count("\n")) == (1, 1), errors
    assert errors.startswith("rkif: error: ")
    assert contents(run.parent) == before
    return errors


def change_json(path: Path, edit: Edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content, indent=2) + "\n")


def seq_of(run: Path, event: str) -> int:
    return next(r["seq"] for r in read_ledger(run / "ledger.jsonl") if r["event"] == event)


READERS = {
    "rollback": ("--to", 1),
    "report": (),
    "log": ("--verify",),
    "reproduce": ("--round", 2),
}


def commands(run: Path) -> list[tuple[object, ...]]:
    """Every command that reads a run."""
    reading = [(command, run, *arguments) for command, arguments in READERS.items()]
    return [*reading, ("run", run / "config.yaml", "--out", run, "--resume")]


@pytest.mark.parametrize(
    "name", ["place/../../../victim", "../victim", "..", ".", "/etc", "a\\b", "a\0b", "\ud800", "é" * 101, ""]
)
def test_a_task_name_outside_the_run_is_refused(rkif: Rkif, run: Path, name: str) -> None:
    victim = run.parent / "victim"
    victim.mkdir()
    (victim / "precious").write_text("not the run's")
    change_json(run / "metrics.json", lambda m: m["tasks"].__setitem__(2, name))
    for command in commands(run):
        errors = refused(rkif, run, *command)
        assert "metrics.json is damaged: tasks.2: " in errors
    assert (victim / "precious").exists()


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (lambda m: m.update(accuracy=None), "accuracy: "),
        (lambda m: m.update(accuracy=[]), "accuracy: it must be a matrix of 3 rows and 0 columns"),
        (lambda m: m["accuracy"].pop(), "accuracy: it must be a matrix of 3 rows and 3 columns"),
        (lambda m: m["accuracy"][1].pop(), "accuracy: it must be a matrix of 3 rows and 3 columns"),
        (lambda m: m["accuracy"][1].__setitem__(0, "high"), "accuracy.1.0: "),
        (lambda m: m.update(initial=[1.0]), "initial: it has 1 entries for 3 tasks"),
        (lambda m: m.update(records=["8", 8, 8]), "records.0: "),
        (lambda m: m.update(tasks="place"), "tasks: "),
        (lambda m: m["tasks"].pop(), "data: its tasks are not those of 'tasks'"),
        (lambda m: m["tasks"].__setitem__(0, m["tasks"][1]), "tasks: a task is listed twice"),
        (lambda m: m.update(metrics=[]), "metrics: "),
        (lambda m: m.update(metrics={"x": {"initial": [1.0], "matrix": []}}), "metrics.x: "),
        (lambda m: m.update(op="high"), "op: "),
        (lambda m: m.update(samples=-1), "samples: "),
        (lambda m: m.update(trainable=True), "trainable: "),
        (lambda m: m.update(extra=1), "extra: "),
        (lambda m: m.pop("steps"), "it lacks 'steps'"),
    ],
)
def test_wrong_metrics_are_named_and_nothing_is_changed(rkif: Rkif, run: Path, edit: Edit, key: str) -> None:
    change_json(run / "metrics.json", edit)
    for command in commands(run):
        errors = refused(rkif, run, *command)
        assert "metrics.json is damaged" in errors
        assert key in errors


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"tasks"', "\ufeff{}", "null"])
def test_metrics_that_are_not_an_object_are_refused(rkif: Rkif, run: Path, text: str) -> None:
    (run / "metrics.json").write_text(text)
    for command in commands(run):
        assert "metrics.json is damaged" in refused(rkif, run, *command)


@pytest.mark.parametrize(
    ("event", "edit", "key"),
    [
        ("begin", lambda r: r.pop("versions"), "it lacks 'versions'"),
        ("begin", lambda r: r.pop("time"), "it lacks 'time'"),
        ("begin", lambda r: r.update(tasks=["../victim"]), "tasks.0: "),
        ("begin", lambda r: r.update(event="end"), "event: it must be one of begin, round"),
        ("begin", lambda r: r.pop("event"), "event: it must be one of begin, round"),
        ("begin", lambda r: r.update(event=[]), "event: it must be one of begin, round"),
        ("round", lambda r: r.pop("modules"), "it lacks 'modules'"),
        ("round", lambda r: r.pop("parameters"), "it lacks 'parameters'"),
        ("round", lambda r: r["parameters"].pop("after"), "it lacks 'parameters.after'"),
        ("round", lambda r: next(iter(r["modules"].values())).pop("numel"), ".numel'"),
        ("round", lambda r: r["modules"].popitem(), "record 7 is damaged: modules: "),
        ("round", lambda r: next(iter(r["modules"].values())).update(numel=10**400), ".numel: "),
        ("round", lambda r: r.update(steps=[0]), "steps: "),
        ("round", lambda r: r.update(round="1"), "round: "),
        ("round", lambda r: r.update(round=7), "round: 7 does not follow round 0"),
        ("round", lambda r: r.update(gate={}), "it lacks 'gate.verdict'"),
        ("round", lambda r: r.update(task="place"), "task: 'place' is not the task that follows"),
        ("task", lambda r: r.pop("files"), "it lacks 'files'"),
        ("task", lambda r: r.update(files={"../x": "0" * 64}), "files.../x"),
        ("task", lambda r: r.update(files={"x": "0"}), "files.x: "),
        ("task", lambda r: r.update(event="rollback"), "it lacks 'to'"),
    ],
)
def test_invalid_records_with_a_valid_chain_are_refused(
    rkif: Rkif, run: Path, event: str, edit: Edit, key: str
) -> None:
    if "record 7" in key:  # the modules of the second round differ from those of the first
        second = [r["seq"] for r in read_ledger(run / "ledger.jsonl") if r["event"] == "round"][1]
        key = f"record {second} is damaged: modules: "
    rewrite_ledger(run / "ledger.jsonl", edit, seq_of(run, event))
    for command in commands(run):
        if command[0] == "report":  # the page reports it
            assert rkif(*command)[0] == 0
            assert "The ledger is broken" in (run / "report.html").read_text()
            (run / "report.html").unlink()
        else:
            errors = refused(rkif, run, *command)
            assert "ledger.jsonl: record" in errors
            assert key in errors


@pytest.mark.parametrize(
    ("event", "edit", "message"),
    [
        ("measured", lambda r: r.pop("config"), "is of other settings than"),
        ("begin", lambda r: r.update(method="replay"), "record 0 is forged: its method is 'replay', and "),
        ("begin", lambda r: r.update(seed=4), "record 0 is forged: its seed is 4, and "),
        ("begin", lambda r: r.pop("seed"), "record 0 is forged: its seed is None, and "),
        ("round", lambda r: r.update(seed=4), "is forged: its seed is 4, and "),
        (
            "rollback",
            lambda r: r["parameters"].update(after="0" * 64),
            "does not return to the parameters after round 2",
        ),
    ],
)
def test_records_that_contradict_each_other_are_found(
    rkif: Rkif, run: Path, event: str, edit: Edit, message: str
) -> None:
    rollback(run, 2)
    assert rkif("log", run, "--verify")[0] == 0
    rewrite_ledger(run / "ledger.jsonl", edit, seq_of(run, event))
    for command in (("log", run, "--verify"), ("run", run / "config.yaml", "--out", run, "--resume")):
        assert message in refused(rkif, run, *command)


@pytest.mark.parametrize("line", [b'{"seq":0,"previous":NaN,"hash":1}', b"[" * 100_000, b'{"hash": 1e999}'])
def test_lines_that_are_not_records_are_refused(rkif: Rkif, run: Path, line: bytes) -> None:
    (run / "ledger.jsonl").write_bytes(line + b"\n")
    assert "ledger.jsonl: record 0 " in refused(rkif, run, "log", run)


def test_a_report_can_be_written_after_a_rollback(rkif: Rkif, run: Path) -> None:
    rollback(run, 2)
    assert rkif("report", run)[0] == 0
    page = (run / "report.html").read_text()
    assert "1 rollbacks" in page
    assert json.loads((run / "ledger.jsonl").read_text().splitlines()[-1])["time"] in page


def test_a_rollback_without_metrics_changes_nothing(rkif: Rkif, run: Path) -> None:
    (run / "metrics.json").unlink()
    assert "metrics.json is missing" in refused(rkif, run, "rollback", run, "--to", 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--module", "zzz"),
        ("--module", "zzz", "--json"),
        ("--module", "zzz", "--task", "review"),
        ("--module", "zzz", "--verdict", "stop"),
        ("--explain", "zzz"),
        ("--explain", "zzz", "--json"),
    ],
)
def test_an_unknown_module_is_reported_by_every_option(
    rkif: Rkif, run: Path, arguments: tuple[str, ...]
) -> None:
    assert "no parameter's name has 'zzz' as whole parts; names are 'layers.0" in refused(
        rkif, run, "log", run, *arguments
    )


@pytest.mark.parametrize("stray", ["notes.safetensors", "1.safetensors", "-00001.safetensors", ".DS_Store"])
def test_an_unknown_file_in_snapshots_is_not_deleted(rkif: Rkif, run: Path, stray: str) -> None:
    (run / "snapshots" / stray).write_text("not a state")
    assert rkif("rollback", run, "--to", 3)[0] == 0
    assert (run / "snapshots" / stray).exists()


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "a\0b", "\ud800", "n" * 201, "line\nfeed"])
def test_bad_task_names_are_refused_by_the_config(config: Callable[..., RunConfig], name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be used as the name of a folder|unicode"):
        config(tasks=config().tasks.model_dump() | {"order": ["review", name]})


def test_a_state_that_is_no_file_is_found(rkif: Rkif, run: Path) -> None:
    state = run / "snapshots" / "000001.safetensors"
    state.unlink()
    state.mkdir()
    assert "000001.safetensors is not a state that the run kept" in refused(rkif, run, "log", run, "--verify")


@pytest.mark.parametrize("name", ["metrics.json.tmp", "checkpoint.safetensors.tmp"])
def test_a_folder_in_the_place_of_a_file_is_named(rkif: Rkif, run: Path, name: str) -> None:
    (run / name).mkdir()
    for command in commands(run):
        assert f"{run / name} is a link or a folder" in refused(rkif, run, *command)


@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "metrics.json", "ledger.jsonl", "checkpoint.safetensors", "ledger.jsonl.torn"),
        *("metrics.json.tmp", "tasks", "tasks/01-review", "tasks/01-review/added", "tasks/09-added"),
        *("snapshots", "snapshots/000001.safetensors", "snapshots/added"),
    ],
)
def test_a_link_to_elsewhere_is_named(rkif: Rkif, run: Path, name: str) -> None:
    """Commands must neither write nor delete there, and must find files that were added there."""
    elsewhere = run.parent / "elsewhere"
    if (run / name).exists():
        (run / name).rename(elsewhere)
    else:
        elsewhere.mkdir()
        (elsewhere / "file").write_text("not the run's")
    (run / name).symlink_to(elsewhere)
    for command in commands(run):
        assert f"{run / name} is a link" in refused(rkif, run, *command)


def test_a_file_in_the_place_of_a_folder_is_named(rkif: Rkif, run: Path) -> None:
    shutil.rmtree(run / "snapshots")
    (run / "snapshots").write_text("x")
    for command in commands(run):
        assert f"{run / 'snapshots'} is a file" in refused(rkif, run, *command)


@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
def test_other_line_ends_in_the_settings_are_found(rkif: Rkif, run: Path, end: bytes) -> None:
    config = run / "config.yaml"
    config.write_bytes(config.read_bytes().replace(b"\n", end))
    assert "is of other settings than" in refused(rkif, run, "log", run, "--verify")


def test_files_of_the_user_with_similar_names_are_kept(rkif: Rkif, run: Path) -> None:
    (run / ".tmp-my-notes").write_text("x")
    (run / ".tmpdir").mkdir()
    assert rkif("rollback", run, "--to", 1)[0] == 0
    assert (run / ".tmp-my-notes").exists()
    assert (run / ".tmpdir").exists()


def test_a_temporary_file_of_safetensors_does_not_stop_a_run(rkif: Rkif, run: Path) -> None:
    """safetensors writes under a name of its own first, which a kill leaves."""
    left = run / "snapshots" / ".tmpAbCdEf"
    left.write_bytes(b"half a state")
    assert rkif("log", run, "--verify")[0] == 0
    rollback(run, 1)
    assert rkif("run", run / "config.yaml", "--out", run, "--resume")[0] == 0
    assert not left.exists()
