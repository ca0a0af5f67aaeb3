"""``rkif run``: bad settings are refused in one line; changes of settings, and configs that a run records."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Rkif
from config_files import changed, write

from rkif.continual.config import RunConfig, dump_config, load_config
from rkif.continual.display.preset import preset_changes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1\nmodel: x\nseed: 2\n",
            "config.yaml: not valid YAML: line 3, column 1: key 'seed' is given twice\n",
        ),
        (
            "training:\n  steps: 1\n  'steps': 2\n",
            "config.yaml: not valid YAML: line 3, column 3: key 'steps' is given twice\n",
        ),
        (
            "model: x\ntasks: {folder: y\nseed: 1\n",
            "not valid YAML: line 3, column 5: expected ',' or '}', but got",
        ),
        ("a: " + "[" * 20_000, "not valid YAML: it is nested too deeply"),
        ("seed: 2024-13-45\n", "config.yaml: not valid YAML: month must be in 1..12"),
    ],
)
def test_duplicate_keys_and_invalid_yaml_are_refused(
    rkif: Rkif, tmp_path: Path, text: str, message: str
) -> None:
    status, _, errors = rkif("run", write(tmp_path / "config.yaml", text), "--out", tmp_path / "out")
    assert (status, errors.count("\n")) == (1, 1)
    assert message in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"fusion": {"preset": "rkif"}}, ""),
        ({"fusion": {"rule": "sum"}}, ""),
        (
            {"fusion": {"preset": "rkif", "rule": "release"}, "distillation": {"memory": 0.0}},
            "Preset rkif, changed: fusion.rule release (preset: sum), distillation.memory 0.0 (preset: 4.0)",
        ),
        ({"fusion": {"preset": "paper"}, "distillation": {"memory": 2.0}}, ""),
    ],
)
def test_a_changed_preset_is_said(settings: dict[str, Any], changes: dict[str, Any], line: str) -> None:
    assert preset_changes(RunConfig.model_validate(settings | changes)) == line


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("lerning_rate", 1, "config.yaml: lerning_rate: unknown setting\n"),
        ("training.lerning_rate", 1, "training.lerning_rate: unknown setting; did you mean 'learning_rate'?"),
        ("adapter.alhpa", 1, "adapter.alhpa: unknown setting; did you mean 'alpha'?"),
        (
            "gate.criteria",
            [{"metric": "accuracy", "flor": 1}],
            "flor: unknown setting; did you mean 'floor'?",
        ),
        (
            "gate.criteria",
            [{"metric": "acuracy"}],
            "gate.criteria.0.metric: must be accuracy, memory_loss or module:function; got 'acuracy'; "
            "did you mean 'accuracy'?",
        ),
        ("memory.fraction", 2, "memory.fraction: must be less than or equal to 1; got 2\n"),
        ("training.learning_rate", "fast", "training.learning_rate: must be a number; got 'fast'\n"),
        ("training.epochs", 3, "training: give either steps or epochs; got steps 2 and epochs 3.0\n"),
        ("training", {"batch_size": 2}, "training: give either steps or epochs; got neither\n"),
        ("training.steps", 0, "training.steps: must be greater than or equal to 1; got 0\n"),
        ("method", "magic", "method: must be 'sequential', 'replay', 'replay_equal_steps', "),
        (
            "method",
            "rkif",
            "method: 'rkif' is a preset of recurrent_kif; set fusion.preset=rkif",
        ),
        ("method", "recurent_kif", "; got 'recurent_kif'; did you mean 'recurrent_kif'?"),
        ("fusion.density", 2, "fusion: density must be in [0, 1]; got 2"),
        ("fusion.denstiy", 0.2, "fusion: a fusion setting must be one of preset, density"),
        ("fusion.denstiy", 0.2, "got 'denstiy'; did you mean 'density'?"),
        ("fusion.preset", "papers", "fusion: preset must be one of paper, release, rkif; got 'papers'"),
        (
            "fusion.rule",
            {"both": [1, 1]},
            "fusion: rule must give weights for inner_only, outer_only, both, neit",
        ),
        ("text.prompt", "{question}", "text: prompt template '{question}' lacks the placeholder {input}"),
        ("tasks.folder", "nowhere", "tasks.folder: no such folder:"),
        ("tasks.order", ["review", "sums"], "tasks.order: task 'sums' is not in"),
        ("tasks.order", ["revue", "tense"], "; did you mean 'review'?\n"),
        ("tasks.order", "standard-9", "tasks.order: order 'standard-9' is not in"),
        ("training", 3, "training: must be settings, such as {steps: ...}; got 3\n"),
        ("seed", True, "seed: must be a number; got True\n"),
        ("tasks.dev_limit", False, "tasks.dev_limit: must be a number; got False\n"),
        ("fusion.density", True, "fusion: density must be like 0.2; got True\n"),
        ("model", "nowhere/at-all", "model 'nowhere/at-all' cannot be loaded: there is no such folder, and "),
        (
            "adapter.target_modules",
            ["q_proj", "v_prj"],
            "no module 'v_prj'; its linear layers are down",
        ),
        ("model", "../tinyy", "/../tinyy\n"),
        ("architecture", "seq2seq", "but that of the config is 'seq2seq'; set architecture: causal"),
        ("device", "cuda:17", "device 'cuda:17' cannot be used:"),
        ("device", "toaster", "device must be auto, cpu, cuda, or one GPU such as cuda:1; got 'toaster'\n"),
        ("text.max_length", 32, "max_length must hold"),
    ],
)
def test_bad_settings_are_one_clear_line(
    rkif: Rkif, settings: dict[str, Any], tmp_path: Path, path: str, value: Any, message: str
) -> None:
    if path == "text.max_length":  # the length holds only the answer
        settings["text"] = {"max_length": 32, "target": " {output}" * 20}
    config = write(tmp_path / "config.yaml", changed(settings, path, value))
    status, _, errors = rkif("run", config, "--out", tmp_path / "out")
    assert status == 1
    assert errors.startswith("rkif: error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert path == "text.max_length" or not (tmp_path / "out").exists()  # found while it measures


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "expected settings as `key: value`, got list"),
        ("model: x", "tasks: this setting is required; training: this setting is required"),
    ],
)
def test_bad_files_are_one_clear_line(rkif: Rkif, tmp_path: Path, content: str, message: str) -> None:
    status, _, errors = rkif("run", write(tmp_path / "config.yaml", content))
    assert (status, errors.count("\n")) == (1, 1)
    assert message in errors


def test_a_misspelt_model_folder_is_named_before_the_tasks_are_read(
    rkif: Rkif, settings: dict[str, Any], inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs / "model", tmp_path / "models" / "tiny")
    settings |= {"model": "models/tinny", "tasks": {"folder": "nowhere", "order": ["review"]}}
    status, _, errors = rkif("run", write(tmp_path / "config.yaml", settings), "--out", tmp_path / "out")
    assert status == 1
    folder = tmp_path / "models" / "tinny"
    assert errors == f"rkif: error: model: no such folder: {folder}; did you mean 'tiny'?\n"


def test_a_name_that_the_hub_does_not_answer_is_one_line(
    rkif: Rkif,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)  # the library's default

    def unreachable(*_: Any) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    config = write(tmp_path / "config.yaml", settings | {"model": "someone/some-model"})
    status, _, errors = rkif("run", config, "--out", tmp_path / "out", "--quiet")
    assert (status, errors) == (
        1,
        "rkif: error: model 'someone/some-model' cannot be loaded: there is no such folder, and as a name on "
        "the hub: We couldn't connect to the hub.\n",
    )
    assert "Retrying" not in caplog.text


def test_set_changes_settings_of_the_config(rkif: Rkif, settings: dict[str, Any], tmp_path: Path) -> None:
    config, out = write(tmp_path / "config.yaml", settings), tmp_path / "out"
    changes = ("--set", "training.steps=1", "--set", "fusion.density=0.5", "--set", "tasks.order=[review]")
    status, output, _ = rkif("run", config, "--out", out, "--json", *changes)
    assert status == 0
    assert json.loads(output) == json.loads((out / "metrics.json").read_text())
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert (written["training"]["steps"], written["fusion"]["density"]) == (1, 0.5)
    assert written["tasks"]["order"] == ["review"]
    status, output, errors = rkif("run", config, "--out", out, "--resume", "--quiet", *changes)
    assert (status, output, errors) == (0, "", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.steps", "--set must be KEY=VALUE, such as training.steps=20; got 'training.steps'"),
        ("=3", "--set must be KEY=VALUE"),
        ("training..steps=3", "--set must be KEY=VALUE"),
        ("training.steps=[1", "--set training.steps: not valid YAML: line 1"),
        ("training.stepps=3", "training.stepps: unknown setting; did you mean 'steps'?"),
        ("training.steps=many", "training.steps: must be an integer; got 'many'"),
        ("seed.x=1", "seed: must be an integer; got {'x': 1}"),
    ],
)
def test_changes_are_validated_as_the_file_is(
    rkif: Rkif, settings: dict[str, Any], tmp_path: Path, change: str, message: str
) -> None:
    config = write(tmp_path / "config.yaml", settings)
    status, _, errors = rkif("run", config, "--out", tmp_path / "out", "--set", change)
    assert (status, errors.count("\n")) == (1, 1)
    assert message in errors


def test_a_missing_config_is_named(rkif: Rkif, tmp_path: Path) -> None:
    assert rkif("run", tmp_path / "no.yaml") == (
        1,
        "",
        f"rkif: error: no such config file: {tmp_path / 'no.yaml'}\n",
    )


def test_settings_can_be_corrected_before_training_begins(
    rkif: Rkif, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = write(tmp_path / "config.yaml", changed(settings, "adapter.target_modules", ["q_prj"]))
    assert rkif("run", config, "--out", tmp_path / "out")[0] == 1
    write(config, settings)
    assert rkif("run", config, "--out", tmp_path / "out")[0] == 0


def test_a_recorded_config_loads_unchanged(settings: dict[str, Any], tmp_path: Path) -> None:
    rule = {"inner_only": [1, 0], "outer_only": [0, 1], "both": [0.3, 0.7], "neither": [0, 0]}
    settings["fusion"] = {"preset": "paper", "rule": rule, "state_dtype": "bfloat16", "density": 0.1}
    first = load_config(write(tmp_path / "a.yaml", settings))
    text = dump_config(first)
    second = load_config(write(tmp_path / "b.yaml", text))
    assert dump_config(second) == text
    assert second.fusion["rule"] == rule
    assert second.fusion["beta1"] == 0.55
    assert second.fusion["state_dtype"] == "bfloat16"


def test_relative_folders_start_at_the_config(inputs: Path, settings: dict[str, Any]) -> None:
    relative = settings | {"model": "model", "tasks": {"folder": "tasks", "order": ["review"]}}
    config = load_config(write(inputs / "relative.yaml", relative))
    assert config.model == str(inputs / "model")
    assert config.tasks.folder == str(inputs / "tasks")
    hub = load_config(write(inputs / "hub.yaml", settings | {"model": "someone/some-model"}))
    assert hub.model == "someone/some-model"
    assert isinstance(hub, RunConfig)
