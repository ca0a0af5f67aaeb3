"""Tasks of lm-eval are columns of a run's matrix and criteria of its gate."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import Rkif
from pydantic import ValidationError
from run_inputs import assert_same_files, files, go, make_config, read_parameters, write_harness_task
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rkif.continual.config import RunConfig, load_config
from rkif.continual.methods import RecurrentKIF
from rkif.continual.rundir.folder import RunReader
from rkif.continual.rundir.rollback import rollback
from rkif.continual.rundir.verify import verify

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install '.[lm-eval]'"
)
NAMES = ["lm_review", "lm_tense"]


@pytest.fixture(scope="module")
def folder(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two local tasks, of which the second has examples in its prompts, and a group of both."""
    tasks = tmp_path_factory.mktemp("lm_eval")
    write_harness_task(tasks, inputs / "tasks", "review", {"tag": "both"})
    write_harness_task(tasks, inputs / "tasks", "tense", {"tag": "both", "num_fewshot": 2})
    group = {"group": "lm_group", "task": NAMES, "aggregate_metric_list": [{"metric": "acc"}]}
    (tasks / "group.yaml").write_text(yaml.safe_dump(group))
    return tasks


def harness(folder: Path, **changes: Any) -> dict[str, Any]:
    """The setting ``evaluation`` with the local tasks."""
    return {"harness": {"tasks": NAMES, "include_path": str(folder)} | changes}


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own tasks are those of one of its folders: to read all takes 20 seconds."""
    from lm_eval.tasks import manager

    hellaswag = Path(manager.__file__).parent / "hellaswag"
    monkeypatch.setattr(manager, "__file__", str(hellaswag / "manager.py"))


def gate(**changes: Any) -> dict[str, Any]:
    """Some rounds pass, and some are undone or damped."""
    return {"criteria": [{"metric": "lm_review", "floor": 0.5, "tolerance": 0.0}], "records": 3} | changes


@pytest.fixture(scope="module")
def whole(inputs: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    go(make_config(inputs, evaluation=harness(folder), gate=gate(), tracking="tensorboard"), run)
    return run


@needs_lm_eval
def test_the_values_are_those_of_lm_eval_itself(inputs: Path, folder: Path, tmp_path: Path) -> None:
    """lm-eval's own function gives the same values for the folders that the run has published."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    settings = harness(folder, metrics={"lm_tense": "acc_norm"}, limit=7)
    training = {"steps": 20, "batch_size": 8, "learning_rate": 1e-2}
    metrics = go(make_config(inputs, adapter=None, evaluation=settings, training=training), tmp_path / "run")
    rows = metrics["harness"]
    assert [rows[name]["metric"] for name in NAMES] == ["acc,none", "acc_norm,none"]
    assert [rows[name]["documents"] for name in NAMES] == [7, 7]
    for place, model in ((0, inputs / "model"), (2, tmp_path / "run/tasks/02-tense")):
        results = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "dtype": "float32", "device": "cpu"},
            tasks=NAMES,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            batch_size=16,
            limit=7,
            bootstrap_iters=0,
        )["results"]
        for name in NAMES:
            assert rows[name]["values"][place] == results[name][rows[name]["metric"]], (name, place)
    assert len({value for row in rows.values() for value in row["values"]}) > 2


@needs_lm_eval
def test_measuring_changes_no_bit_of_the_model(inputs: Path, folder: Path, tmp_path: Path) -> None:
    go(make_config(inputs), tmp_path / "plain")
    go(make_config(inputs, evaluation=harness(folder)), tmp_path / "measured")
    plain, measured = read_parameters(tmp_path / "plain"), read_parameters(tmp_path / "measured")
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    tokenizer = "tasks/03-place/tokenizer.json"
    assert (tmp_path / "plain" / tokenizer).read_bytes() == (tmp_path / "measured" / tokenizer).read_bytes()


@needs_lm_eval
def test_the_values_are_shown_recorded_and_tracked(whole: Path, rkif: Rkif) -> None:
    rows = RunReader(whole).metrics()["harness"]
    assert [len(rows[name]["values"]) for name in NAMES] == [4, 4]
    assert [rows[name]["documents"] for name in NAMES] == [5, 8], "the gate's documents are not reported"
    columns = [{name: rows[name]["values"][place] for name in NAMES} for place in range(4)]
    recorded = [record["harness"] for record in RunReader(whole).ledger() if record["event"] == "measured"]
    assert recorded == columns
    status, log, _ = rkif("log", whole)
    assert status == 0
    for column in columns:
        assert ", ".join(f"{name} {value:.4g}" for name, value in column.items()) in log
    assert rkif("verify", whole)[0] == 0
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    for name in NAMES:
        tracked = {event.step: event.value for event in events.Scalars(f"harness/{name}")}
        assert tracked == pytest.approx(dict(zip((0, 7, 14, 21), rows[name]["values"], strict=True)))
    assert rkif("report", whole)[0] == 0
    page = (whole / "report.html").read_text()
    assert "<h2>Tasks of lm-eval</h2>" in page
    assert "<tr><th>lm_tense</th><td>acc</td><td>8</td>" in page


@needs_lm_eval
def test_the_run_command_prints_them(inputs: Path, folder: Path, tmp_path: Path, rkif: Rkif) -> None:
    settings = make_config(inputs, method="sequential").model_dump(mode="json")
    (tmp_path / "tasks").symlink_to(folder)
    settings["evaluation"] = {"harness": {"tasks": NAMES, "include_path": "tasks"}}  # beside the config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    status, text, errors = rkif("run", tmp_path / "config.yaml", "--out", tmp_path / "run")
    assert status == 0, errors
    assert errors == "", "lm-eval's own output is not shown"
    assert "sequential: tasks of lm-eval, not learned" in text
    values = json.loads((tmp_path / "run/metrics.json").read_text())["harness"]["lm_review"]["values"]
    assert f"lm_review {values[1]:.4g}" in text  # in the line after the first task
    status, text, _ = rkif(
        "run", tmp_path / "run/config.yaml", "--out", tmp_path / "run", "--resume", "--json"
    )
    assert status == 0
    assert json.loads(text)["harness"]["lm_review"]["values"] == values


@needs_lm_eval
@pytest.mark.parametrize("at", [(1, 4), (2, 2)])
def test_a_resumed_run_has_the_same_bytes(
    inputs: Path,
    folder: Path,
    whole: Path,
    tmp_path: Path,
    at: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(inputs, evaluation=harness(folder), gate=gate(), tracking="tensorboard")
    sound = RecurrentKIF.train_step

    def killed(self: RecurrentKIF, step: int) -> float:
        if (self.context.index, step) == at:
            raise KeyboardInterrupt
        return sound(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(RecurrentKIF, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            go(config, tmp_path / "run")
    go(config, tmp_path / "run", resume=True)

    def written(run: Path) -> dict[str, bytes]:
        return {
            name: content
            for name, content in files(run).items()
            if not name.startswith(("tensorboard", "report"))
        }

    assert_same_files(written(tmp_path / "run"), written(whole))
    verify(tmp_path / "run")


@needs_lm_eval
def test_gated_rounds_are_reproduced_and_rolled_back(whole: Path, tmp_path: Path, rkif: Rkif) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    rounds = [record for record in RunReader(run).ledger() if record["event"] == "round"]
    assert all(set(record["gate"]["before"]) == {"lm_review"} for record in rounds)
    assert {record["gate"]["samples"] // 3 for record in rounds} <= {1, 2, 3, 4}
    assert all(record["gate"]["samples"] % 3 == 0 for record in rounds)
    for number in (2, 6):
        assert rkif("reproduce", run, "--round", number)[0] == 0
    expected = RunReader(run).metrics()["harness"]
    rollback(run, 2)
    rows = RunReader(run).metrics()["harness"]
    assert {name: row["values"] for name, row in rows.items()} == {
        name: row["values"][:2] for name, row in expected.items()
    }
    assert sum("rolled back" in line and "measured" in line for line in rkif("log", run)[1].splitlines()) == 2
    metrics = go(load_config(run / "config.yaml"), run, resume=True)
    assert metrics["harness"] == expected
    verify(run)


@needs_lm_eval
def test_other_documents_are_refused_when_a_run_continues(inputs: Path, folder: Path, tmp_path: Path) -> None:
    tasks = shutil.copytree(folder, tmp_path / "tasks", ignore=shutil.ignore_patterns("cache"))
    for path in tasks.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(folder), str(tasks)))
    go(make_config(inputs, evaluation=harness(tasks), method="sequential"), tmp_path / "run")
    moved = tasks.rename(tmp_path / "moved")
    for path in moved.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(tasks), str(moved)))
    config = make_config(inputs, evaluation=harness(moved), method="sequential")
    go(config, tmp_path / "run", resume=True)  # the same documents in another place
    (moved / "tense.jsonl").write_text((moved / "review.jsonl").read_text())
    with pytest.raises(ValueError, match="documents or prompts of lm-eval's task 'lm_tense' have changed"):
        go(config, tmp_path / "run", resume=True)


@needs_lm_eval
def test_the_documented_task_is_measured(inputs: Path, folder: Path, tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs/guide/experiments.md").read_text(encoding="utf-8")
    (task,) = re.findall(r"```yaml\n(task: .*?)```", guide, flags=re.DOTALL)
    questions = folder / "review.jsonl"
    (tmp_path / "own").mkdir()
    (tmp_path / "own/task.yaml").write_text(task.replace("/data/my-questions.jsonl", str(questions)))
    settings = {"harness": {"tasks": ["my_task"], "include_path": str(tmp_path / "own")}}
    row = go(make_config(inputs, evaluation=settings, method="sequential"), tmp_path / "run")["harness"][
        "my_task"
    ]
    assert (row["metric"], row["documents"]) == ("acc,none", 8)


@needs_lm_eval
@pytest.mark.usefixtures("few_tasks")
def test_a_group_has_one_value_and_a_tag_none(inputs: Path, folder: Path, tmp_path: Path) -> None:
    settings = harness(folder, tasks=["lm_group"])
    criteria = [{"metric": "lm_group", "tolerance": 1}, {"metric": "memory_loss", "tolerance": 10}]
    config = make_config(inputs, evaluation=settings, gate={"criteria": criteria, "records": 3, "ladder": []})
    row = go(config, tmp_path / "run")["harness"]["lm_group"]
    assert row["documents"] == 2 * (8 - 3)
    assert len(row["values"]) == 4
    first = next(record for record in RunReader(tmp_path / "run").ledger() if record["event"] == "round")
    remembered = first["gate"]["samples"] // 2 - 2 * 3
    assert 0 < remembered <= 3  # one measurement of 6 documents and of the memory, before and after
    with pytest.raises(ValueError, match=r"'both' has no score of its own; name its tasks: lm_review"):
        go(make_config(inputs, evaluation=harness(folder, tasks=["both"])), tmp_path / "tag")


@needs_lm_eval
def test_an_encoder_decoder_generates(inputs: Path, tmp_path: Path) -> None:
    free = {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}],
    }
    folder = write_harness_task(tmp_path / "tasks", inputs / "tasks", "review", free)
    config = make_config(
        inputs,
        model=str(inputs / "t5"),
        architecture="seq2seq",
        adapter={"target_modules": ["q", "v"]},
        method="sequential",
        evaluation=harness(folder, tasks=["lm_review"]),
        training={"steps": 1},
    )
    row = go(config, tmp_path / "run")["harness"]["lm_review"]
    assert row["metric"] == "exact_match,first"
    assert len(row["values"]) == 4


@needs_lm_eval
@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["helaswag"]}, "lm-eval has no task 'helaswag' and .* has none; did you mean 'hellaswag'"),
        (
            {"metrics": {"lm_review": "acc_nrm"}},
            "'lm_review' has acc,none, acc_norm,none; got 'acc_nrm'; did you",
        ),
        ({"include_path": "/nowhere"}, "evaluation.harness.include_path: no such folder: /nowhere"),
        (
            {"tasks": ["lm_review", "lm_lost"]},
            "evaluation.harness: 'lm_lost' cannot be loaded: FileNotFoundError",
        ),
    ],
)
def test_a_wrong_task_is_one_line_before_training(
    inputs: Path, folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tasks = shutil.copytree(folder, tmp_path / "tasks", ignore=shutil.ignore_patterns("cache"))
    lost = {"task": "lm_lost", "dataset_kwargs": {"data_files": {"test": "/nowhere.jsonl"}}}
    write_harness_task(tasks, inputs / "tasks", "place", lost)
    with pytest.raises(ValueError, match=message) as error:
        go(make_config(inputs, evaluation=harness(tasks, **changes)), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@needs_lm_eval
def test_the_gate_leaves_documents_to_report(inputs: Path, folder: Path, tmp_path: Path) -> None:
    config = make_config(inputs, evaluation=harness(folder), gate=gate(records=8))
    with pytest.raises(
        ValueError, match=r"gate\.records: setting 8 documents of 'lm_review' aside would leave"
    ):
        go(config, tmp_path / "run")


def test_the_missing_package_is_named_before_training(
    inputs: Path, tmp_path: Path, rkif: Rkif, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_config(inputs, evaluation={"harness": {"tasks": ["hellaswag"]}}).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    status, _, errors = rkif("run", tmp_path / "config.yaml", "--out", tmp_path / "run")
    assert status == 1
    assert errors.startswith('rkif: error: evaluation.harness needs lm-eval: pip install ".[lm-eval]" in the')
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": gate()}, "got 'lm_review'; list tasks of lm-eval in evaluation.harness as well"),
        (
            {"gate": gate(criteria=[{"metric": "lm_revew"}]), "evaluation": {"harness": {"tasks": NAMES}}},
            "accuracy, memory_loss, lm_review, lm_tense or module:function; got 'lm_revew'; did you mean",
        ),
        (
            {"gate": gate(criteria=[{"metric": "lm_tense"}]), "evaluation": {"harness": {"tasks": NAMES}}},
            "gate.criteria.0: lm_tense needs a tolerance or a floor, in the unit of its metric",
        ),
        ({"evaluation": {"harness": {"tasks": ["a", "a"]}}}, "'a' is the name of another task or criterion"),
        ({"evaluation": {"harness": {"tasks": ["a"], "metrics": {"b": "acc"}}}}, "'b' is not among tasks"),
        (
            {"architecture": "encoder", "evaluation": {"harness": {"tasks": ["a"]}}},
            "evaluation.harness: lm-eval needs a language model, which an encoder is not",
        ),
    ],
)
def test_wrong_settings_are_refused(
    config: Callable[..., RunConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as error:
        config(**changes)
    assert message in str(error.value)
