"""``rkif log``: the tables it shows, and the changes that ``--verify`` finds."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_inputs import TASKS, files, go, make_config, rewrite_ledger
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rkif.cli import app
from rkif.continual.config import RunConfig, load_config
from rkif.continual.rundir.folder import RunReader
from rkif.continual.rundir.rollback import rollback
from rkif.continual.rundir.round_states import RoundStates
from rkif.continual.rundir.state import read_checkpoint, write_state


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with three rounds each; every second round is undone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    loss = {"metric": "memory_loss", "floor": -1, "tolerance": None}
    go(make_config(inputs, gate={"criteria": [loss], "every": 2, "ladder": []}), folder)
    return folder


def shown(*arguments: Any, columns: int = 160) -> str:
    done = CliRunner().invoke(app, ["log", *map(str, arguments)], env={"COLUMNS": str(columns)})
    assert done.exit_code == 0, done.exception
    return done.output


def refused(*arguments: Any) -> str:
    failed = CliRunner().invoke(app, ["log", *map(str, arguments)])
    assert failed.exit_code == 1
    assert isinstance(failed.exception, ValueError)
    return str(failed.exception)


def rows(text: str) -> list[list[str]]:
    lines = [line.split() for line in text.splitlines()]
    return [cells for cells in lines if cells[1:] and cells[0].isdigit() and cells[1] in TASKS]


def test_the_table_has_every_round_with_its_shares(whole: Path) -> None:
    found = rows(shown(whole))
    records = [record for record in RunReader(whole).ledger() if record["event"] == "round"]
    assert [row[0] for row in found] == ["1", "2", "3", "4", "5", "6"]
    for row, record in zip(found, records, strict=True):
        assert row[1:3] == [record["task"], f"{record['steps'][0] + 1}-{record['steps'][1]}"]
        assert row[3] == record["gate"]["verdict"]
        counts = [record["counts"][case] for case in ("inner_only", "outer_only", "both", "neither")]
        assert row[4:8] == [f"{100 * count / record['numel']:.1f}" for count in counts]
        assert float(row[8]) == pytest.approx(record["norms"]["update"], rel=1e-2)


def test_a_record_has_counts_norms_and_data_ids(whole: Path, inputs: Path) -> None:
    rounds = RunReader(whole).rounds()
    records = [record for record in RunReader(whole).ledger() if record["event"] == "round"]
    for record in records:
        modules = record["modules"].values()
        assert sum(value["numel"] for value in modules) == record["numel"]
        assert [sum(column) for column in zip(*(value["counts"] for value in modules), strict=True)] == [
            record["counts"][case] for case in ("inner_only", "outer_only", "both", "neither")
        ]
        assert math.hypot(*(value["moved"] for value in modules)) == pytest.approx(
            record["norms"]["update"], rel=1e-5
        )
        assert len(record["data"]["inner"]) == 4 * (record["steps"][1] - record["steps"][0])
        assert len(record["data"]["outer"]) == 2 * 4
        earlier = TASKS[: TASKS.index(record["task"])]
        assert {name.partition("/")[0] for name in record["data"]["outer"]} <= set(earlier)
    assert set(rounds) == set(TASKS[1:])


def test_options_filter_the_records(whole: Path) -> None:
    assert [row[0] for row in rows(shown(whole, "--task", "place"))] == ["4", "5", "6"]
    assert [row[0] for row in rows(shown(whole, "--verdict", "undo"))] == ["2", "5"]
    printed = shown(whole, "--json", "--task", "tense", "--module", "layers.1").splitlines()
    records = [json.loads(line) for line in printed]
    assert [record["event"] for record in records] == ["round"] * 3 + ["task"]
    assert all("layers.1" in name for record in records[:3] for name in record["modules"])
    assert [json.loads(line) for line in shown(whole, "--json").splitlines()] == RunReader(whole).ledger()
    first = rows(shown(whole, "--module", "q_proj.lora_A"))[0]
    record = next(record for record in RunReader(whole).ledger() if record["event"] == "round")
    wanted = [value for name, value in record["modules"].items() if "q_proj.lora_A" in name]
    size = sum(value["numel"] for value in wanted)
    assert first[4:8] == [f"{100 * sum(v['counts'][case] for v in wanted) / size:.1f}" for case in range(4)]
    assert float(first[8]) == pytest.approx(math.hypot(*(v["moved"] for v in wanted)), rel=1e-2)


def test_an_undone_round_has_its_reason_and_verdicts_are_counted(whole: Path) -> None:
    text = shown(whole)
    records = [record for record in RunReader(whole).ledger() if record["event"] == "round"]
    first, second = records[0]["gate"], records[1]["gate"]
    assert (first["verdict"], second["verdict"]) == ("unchecked", "undo")
    (reason,) = second["attempts"][0]["objections"]
    assert reason in text
    assert text.count(" is above -1") == 2
    line = text.splitlines()[-1]
    assert line == "gate: 2 undone, 4 unchecked; most often: memory_loss above ceiling -1"
    assert "undone" not in shown(whole, "--verdict", "unchecked").splitlines()[-1]


def test_explain_names_the_rounds_and_learners_that_changed_a_module(whole: Path) -> None:
    text = shown(whole, "--explain", "layers.0.self_attn.v_proj.lora_B")
    records = [record for record in RunReader(whole).ledger() if record["event"] == "round"]
    by_round = rows(text)
    kept = [record for record in records if record["applied"]]
    assert [row[0] for row in by_round] == [str(record["round"]) for record in kept]
    for row, record in zip(by_round, kept, strict=True):
        (value,) = [v for name, v in record["modules"].items() if "layers.0.self_attn.v_proj.lora_B" in name]
        assert float(row[3]) == pytest.approx(value["moved"], rel=1e-2)
        assert row[4:8] == [f"{100 * count / value['numel']:.1f}" for count in value["counts"]]
        assert [float(cell) for cell in row[8:]] == pytest.approx(value["importance"], rel=0.1)
    assert (
        "rounds that changed 'base_model.model.model.layers.0.self_attn.v_proj.lora_B.default.weight'" in text
    )
    assert "by task" in text
    assert [line.split()[0] for line in text.split("by task")[1].splitlines() if "place" in line] == ["place"]


def test_an_explanation_as_json_has_the_values_of_the_tables(whole: Path) -> None:
    explained = json.loads(shown(whole, "--explain", "layers.0", "--task", "place", "--json"))
    table = rows(shown(whole, "--explain", "layers.0", "--task", "place"))
    assert [str(row["round"]) for row in explained["rounds"]] == [row[0] for row in table]
    assert {row["task"] for row in explained["rounds"]} == {"place"}
    assert all("layers.0." in name for name in explained["parameters"])
    record = next(r for r in RunReader(whole).ledger() if r.get("round") == explained["rounds"][0]["round"])
    values = [record["modules"][name] for name in explained["parameters"]]
    assert list(explained["rounds"][0]["counts"].values()) == [
        sum(value["counts"][case] for value in values) for case in range(4)
    ]


def test_modules_are_compared_by_whole_parts_of_names(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")

    def rename(record: dict[str, Any]) -> None:
        if record["event"] == "round":
            modules = {name.replace("layers.0", "layers.10"): v for name, v in record["modules"].items()}
            record["modules"] = modules

    rewrite_ledger(run / "ledger.jsonl", rename)
    explained = json.loads(shown(run, "--explain", "layers.1", "--json"))
    assert len(explained["parameters"]) == 4
    assert not any("layers.10" in name for name in explained["parameters"])
    assert len(json.loads(shown(run, "--explain", "layers", "--json"))["parameters"]) == 8
    assert "did you mean 'layers'?" in refused(run, "--explain", "layer")
    assert "did you mean 'q_proj'?" in refused(run, "--module", "q_prj")


def test_a_narrow_terminal_cuts_nothing_off(whole: Path) -> None:
    def words(text: str) -> list[str]:
        return text.split()

    arguments = (whole, "--explain", "layers.1")
    assert words(shown(*arguments, columns=40)) == words(shown(*arguments, columns=200))
    assert "unchecked" in shown(whole, columns=40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--explain", "q_proj", "--verify"), "--verify and --explain cannot be combined"),
        (("--explain", "q_proj", "--module", "v_proj"), "--explain and --module cannot be combined"),
        (("--head", "--task", "place"), "--head and --task cannot be combined"),
        (("--test-result", "1", "--verdict", "keep"), "--test-result and --verdict cannot be combined"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    whole: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(whole, *arguments)


def test_options_are_of_one_run_not_of_a_folder_of_runs(whole: Path) -> None:
    assert "run" in shown(whole.parent)
    for options in (["--verify"], ["--json"], ["--explain", "q_proj"]):
        assert f"{whole.parent} is not a run" in refused(whole.parent, *options)


def test_the_head_and_the_verification_as_json_have_the_same_hash(whole: Path) -> None:
    head = json.loads(shown(whole, "--head", "--json"))
    verified = json.loads(shown(whole, "--verify", "--json"))
    assert verified == {"records": 34, "tasks": 3, "states": 7, "hash": head["hash"]}
    assert head["hash"] == RunReader(whole).ledger()[-1]["hash"]
    _, _, root, *_ = shown(whole, "--head").splitlines()
    assert f"last hash {head['hash']}, in base64 {root}" in shown(whole, "--verify")


def test_runs_without_rounds_and_rolled_back_runs_are_shown(
    whole: Path, config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    go(config(method="sequential"), tmp_path / "plain")
    assert shown(tmp_path / "plain").count("learned") == 3
    assert "nothing has been fused" in refused(tmp_path / "plain", "--explain", "q_proj")
    assert "20 records in an unbroken chain; 3 tasks' files and 0" in shown(tmp_path / "plain", "--verify")
    shutil.copytree(whole, tmp_path / "run")
    rollback(tmp_path / "run", 1)
    text = shown(tmp_path / "run")
    assert "back to round 1" in text
    marked = [row[0] for row in rows(text) if row[-2:] == ["rolled", "back"]]
    assert marked == ["2", "3", "4", "5", "6"]
    assert text.splitlines()[-1] == "gate: 1 unchecked"
    assert {row[0] for row in rows(shown(tmp_path / "run", "--explain", "q_proj"))} <= {"1"}
    assert "1 tasks' files and 2 kept states" in shown(tmp_path / "run", "--verify")


def change(path: Path, edit: Callable[[dict[str, Any]], None], which: int) -> None:
    lines = path.read_text().splitlines()
    record = json.loads(lines[which])
    edit(record)
    lines[which] = json.dumps(record, sort_keys=True, separators=(",", ":"))
    path.write_text("\n".join(lines) + "\n")


def drop_lines(path: Path, kept: slice) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[kept]))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def other_snapshot(run: Path, number: int = 4) -> None:
    snapshots = RoundStates(run)
    state = snapshots.read(number)
    next(iter(state.parameters.values())).add_(1)
    write_state(run / f"snapshots/{number:06d}.safetensors", state)


def other_adapter(run: Path) -> None:
    path = run / "tasks/03-place/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path)


TASK_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "importance.safetensors",
    "memory.jsonl",
    "README.md",
    "rounds.safetensors",
    "task.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
PARTS = ("task", "step", "samples", "ledger_records", "inner.", "fuser.outer_importance.")


def other_state(run: Path, part: str) -> None:
    """Change the state after round 4: its position by one, or a tensor of the method."""
    state = RoundStates(run).read(4)
    if hasattr(state, part):
        state = replace(state, **{part: getattr(state, part) + 1})
    else:
        next(t for name, t in state.method.items() if name.startswith(part) and t.is_floating_point()).add_(1)
    write_state(run / "snapshots/000004.safetensors", state)


def better_metrics(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["op"] = 100.0
    (run / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def without_last_task(run: Path) -> None:
    """Remove the last task, its records, and the checkpoint that would reveal the removal."""
    shutil.rmtree(run / "tasks/03-place")
    drop_lines(run / "ledger.jsonl", slice(0, 22))
    state = read_checkpoint(run)
    assert state is not None
    write_state(run / "checkpoint.safetensors", replace(state, ledger_records=20))
    for number in (3, 4, 5, 6):
        (run / f"snapshots/{number:06d}.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: change(run / "ledger.jsonl", lambda r: r.update(seed=9), 3), "record 3 was changed"),
        (lambda run: drop_lines(run / "ledger.jsonl", slice(1, None)), "record 0 has seq 1"),
        (lambda run: drop_lines(run / "ledger.jsonl", slice(0, -2)), "record 32 is missing: the checkpoint"),
        (
            lambda run: drop_lines(run / "ledger.jsonl", slice(0, -1)),
            "metrics.json has the accuracies after 3 tasks, and the ledger records 2 of these measurements",
        ),
        (lambda run: drop_lines(run / "ledger.jsonl", slice(0, -1)), "ledger.jsonl: record 33 is missing: "),
        (
            lambda run: rewrite_ledger(
                run / "ledger.jsonl", lambda r: r["parameters"].update(before="0" * 64), 13
            ),
            "record 13 begins with other parameters than the record before it ended with",
        ),
        (
            lambda run: rewrite_ledger(run / "ledger.jsonl", lambda r: r["files"].pop("memory.jsonl"), 5),
            "memory.jsonl was not there when the task was learned",
        ),
        (lambda run: flip(run / "tasks/02-tense/adapter_model.safetensors"), "record 18: "),
        (lambda run: flip(run / "tasks/01-review/memory.jsonl"), "record 5: "),
        (other_adapter, "adapter_model.safetensors is not the file that was written"),
        (
            lambda run: (run / "tasks/02-tense/importance.safetensors").unlink(),
            "importance.safetensors is",
        ),
        (lambda run: shutil.rmtree(run / "tasks/03-place"), "03-place is missing"),
        (other_snapshot, "snapshots/000004.safetensors is not the file that was written"),
        (lambda run: other_snapshot(run, 0), "snapshots/000000.safetensors is not the file that was written"),
        (
            lambda run: (run / "config.yaml").write_text((run / "config.yaml").read_text() + "#"),
            "record 0 is of other settings than",
        ),
        *(
            (lambda run, name=name: flip(run / name), f"{name} is not the file that was written")
            for name in (
                "checkpoint.safetensors",
                *(f"tasks/02-tense/{name}" for name in TASK_FILES),
            )
        ),
        *(
            (lambda run, name=name: (run / name).unlink(), f"its {name} is missing")
            for name in ("checkpoint.safetensors", "metrics.json", "tasks/02-tense/adapter_config.json")
        ),
        (
            lambda run: (run / "tasks/02-tense/chat_template.jinja").write_text("{{ evil }}"),
            "02-tense/chat_template.jinja was not there when the task was learned",
        ),
        (
            lambda run: shutil.copytree(run / "tasks/02-tense", run / "tasks/04-more"),
            "was not there when the task was learned",
        ),
        (
            lambda run: shutil.copy(
                run / "snapshots/000001.safetensors", run / "snapshots/000007.safetensors"
            ),
            "000007.safetensors is not a state that the run kept",
        ),
        *(
            (lambda run, part=part: other_state(run, part), "000004.safetensors is not the file")
            for part in PARTS
        ),
        (better_metrics, "metrics.json is not the file that was written"),
        (without_last_task, "ledger.jsonl: record 22 is missing: "),
        (lambda run: (run / "ledger.jsonl").write_text(""), "holds no record"),
        (lambda run: (run / "ledger.jsonl").unlink(), "ledger.jsonl is missing"),
        (
            lambda run: (run / "ledger.jsonl").write_text((run / "ledger.jsonl").read_text() + '{"half'),
            "record 34 is incomplete",
        ),
    ],
)
def test_the_first_bad_record_is_named(
    whole: Path, tmp_path: Path, harm: Callable[[Path], Any], message: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    assert "34 records in an unbroken chain; 3 tasks' files and 7 kept states" in shown(
        tmp_path / "run", "--verify"
    )
    harm(tmp_path / "run")
    assert message in refused(tmp_path / "run", "--verify")
    kept = contents(tmp_path / "run")
    if "is incomplete" not in message and "ledger.jsonl" not in message and "holds no" not in message:
        with pytest.raises(ValueError, match="run"):  # changed files cannot be resumed from
            go(load_config(whole / "config.yaml"), tmp_path / "run", resume=True)
        assert contents(tmp_path / "run") == kept


def test_the_state_before_a_rollback_to_the_start_is_checked(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    rollback(run, 0)
    assert "1 tasks' files and 1 kept states" in shown(run, "--verify")
    other_snapshot(run, 0)
    assert "snapshots/000000.safetensors is not the file that was written" in refused(run, "--verify")
    with pytest.raises(ValueError, match="the kept state of round 0 differs from the ledger"):
        rollback(run, 0)


def test_a_run_of_an_earlier_format_is_shown_but_not_verified(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    rewrite_ledger(run / "ledger.jsonl", lambda r: r.pop("format"), 0)
    assert [row[0] for row in rows(shown(run))] == ["1", "2", "3", "4", "5", "6"]
    message = "record 0: the run is of format 1; this version of rkif checks and continues runs of format 2"
    assert message in refused(run, "--verify")
    before = files(run)
    for attempt in (
        lambda: rollback(run, 1),
        lambda: go(load_config(whole / "config.yaml"), run, resume=True),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert files(run) == before


def test_invalid_arguments_are_refused(whole: Path, tmp_path: Path) -> None:
    assert "--task must be one of review, tense, place; got 'plaice'; did you mean 'place'?" in refused(
        whole, "--task", "plaice"
    )
    assert "no parameter's name has '[/x]' as whole parts" in refused(whole, "--module", "[/x]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").touch()
    (tmp_path / "empty" / "ledger.jsonl").touch()
    assert "ledger.jsonl holds no record" in refused(tmp_path / "empty")
    assert "--verdict must be one of keep, damp" in refused(whole, "--verdict", "kept")
    assert "no parameter's name has 'layers.9' as whole parts; names are 'layers.0.self" in refused(
        whole, "--module", "layers.9"
    )
    (tmp_path / "other").mkdir()
    assert "is not a run" in refused(tmp_path / "other")
