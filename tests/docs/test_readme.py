"""Snippets, settings, links and figures of the README and the docs are valid."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_files import Triple, split_folder

from bench.docs import FILES, README, generated
from bench.forgetting.continual import RESULTS
from rkif.cli import main
from rkif.continual.config import RunConfig, dump_config

TEXT = README.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)


def snippets(language: str) -> list[str]:
    return [code for kind, code in SNIPPETS if kind == language]


@pytest.mark.parametrize("code", [code for code in snippets("python") if "RKIFTrainer" not in code])
def test_python_snippets_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    if "last_report" in code:
        assert capsys.readouterr().out.count("inner_only") == 3


def test_the_trainer_snippet_is_a_valid_call() -> None:
    from rkif.hf import RKIFTrainer

    (code,) = [code for code in snippets("python") if "RKIFTrainer" in code]
    with pytest.raises(TypeError, match="fusion must be a FusionConfig, got str"):
        exec(
            code.replace("rkif.FusionConfig.paper()", "'x'"),
            dict.fromkeys(("model", "training_arguments", "new_task", "memory")) | {"rkif": None},
        )
    assert RKIFTrainer


def test_the_config_is_valid() -> None:
    (code,) = snippets("yaml")
    RunConfig.model_validate(yaml.safe_load(code))


def test_the_documented_gate_and_ledger_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (README.parent / "docs" / "guide" / "ledger.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(code, "ledger.md", "exec"), names)
        assert names["fuser"].round == 0
    assert (tmp_path / "ledgers" / "task-3" / "ledger.jsonl").exists()
    (gate,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (config,) = snippets("yaml")
    settings = RunConfig.model_validate(yaml.safe_load(config) | yaml.safe_load(gate)).gate
    assert settings is not None
    assert [one.name for one in settings.criteria] == ["accuracy", "memory_loss", "revenue"]


def test_both_commands_are_single_lines_that_install_first() -> None:
    demo, tests, *_ = snippets("sh")
    assert demo == "pip install '.[hf,report,tune]' && rkif demo\n"
    assert tests == "pip install -e '.[dev]' && pytest -n logical\n"


def test_the_fuse_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    triple = Triple(tmp_path)
    for name in ("base", "inner", "outer"):
        split_folder(tmp_path / name, getattr(triple, name), 2)
    monkeypatch.chdir(tmp_path)
    (_, _, commands) = snippets("sh")
    for command in commands.splitlines():
        monkeypatch.setattr(sys, "argv", command.split())
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code, capsys.readouterr().err


def test_generated_parts_are_up_to_date() -> None:
    for file, text in generated():
        assert file.read_text(encoding="utf-8") == text, f"{file.name}: run `python -m bench docs`"


def test_op_is_the_mean_of_the_committed_accuracies() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert rows
    for row in rows:
        size = len(row["tasks"])
        final = [row["accuracy"][i][-1] for i in range(size)]
        assert row["op"] == pytest.approx(sum(final) / size, abs=1e-3)


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    written = re.sub(r"<!-- results: .*?<!-- end -->", "", TEXT, flags=re.DOTALL)
    assert len(written.splitlines()) < 150


def test_the_config_page_lists_all_settings_with_their_defaults() -> None:
    text = (README.parent / "docs" / "reference" / "config.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    documented = yaml.safe_load(code)
    required = {
        "model": "some/model",
        "tasks": {"folder": "my-tasks", "order": ["first", "second"]},
        "training": {"epochs": 1},
    }
    assert documented == yaml.safe_load(dump_config(RunConfig.model_validate(required)))
