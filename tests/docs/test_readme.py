"""Snippets, settings, links and figures of the README and the docs are valid."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.docs import FILES, README, generated, with_tables
from bench.forgetting.continual import RESULTS
from rkif.continual.config import RunConfig, dump_config
from rkif.continual.tasks.load import load_tasks

TEXT = README.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)


def snippets(language: str) -> list[str]:
    return [code for kind, code in SNIPPETS if kind == language]


def test_the_quickstart_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = snippets("python")
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "8 rounds: {'inner_only'" in printed
    old, new = map(float, re.findall(r"\[([\d.]+), ([\d.]+)\]", printed)[-1])
    assert max(old, new) < 1.0  # 5.5 before training


def documented_yaml(page: str) -> list[Any]:
    """The content of the YAML blocks of a page in docs/."""
    text = (README.parent / "docs" / page).read_text(encoding="utf-8")
    return [yaml.safe_load(code) for code in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)]


def run_config() -> Any:
    return documented_yaml("guide/experiments.md")[0]


def test_the_config_is_valid() -> None:
    RunConfig.model_validate(run_config())


def test_the_documented_gate_and_ledger_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (README.parent / "docs" / "guide" / "ledger.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(code, "ledger.md", "exec"), names)
        assert names["fuser"].round == 0
    assert (tmp_path / "ledgers" / "task-3" / "ledger.jsonl").exists()
    (gate,) = documented_yaml("guide/ledger.md")
    _, _, harness, _ = documented_yaml("guide/experiments.md")
    settings = RunConfig.model_validate(run_config() | harness | gate).gate
    assert settings is not None
    assert [one.name for one in settings.criteria] == ["accuracy", "memory_loss", "revenue", "hellaswag"]


def test_the_documented_tasks_of_lm_eval_are_valid() -> None:
    _, _, harness_and_gate, _ = documented_yaml("guide/experiments.md")
    settings = RunConfig.model_validate(run_config() | harness_and_gate)
    assert settings.gate is not None
    assert settings.gate.criteria[0].of_harness
    harness = RunConfig.model_validate(run_config() | documented_yaml("reference/config.md")[1])
    assert harness.evaluation.harness is not None
    assert harness.evaluation.harness.metrics == {"hellaswag": "acc_norm"}


def test_the_documented_tasks_and_encoder_are_valid(tmp_path: Path) -> None:
    run, encoder, _, _ = documented_yaml("guide/experiments.md")
    assert RunConfig.model_validate(run | encoder).architecture == "encoder"
    text = (README.parent / "docs" / "guide" / "experiments.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
    (record,) = re.findall(r"line per record: `(.*?)`", text)
    (tmp_path / "tasks.json").write_text(table)
    for split in ("train", "dev"):
        own = json.loads(record) | {"input": split}
        lines = [own, own | {"task": "reviews", "output": "good"}]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [task.name for task in load_tasks(tmp_path, "second")] == ["reviews", "news"]


def test_both_commands_are_single_lines_that_install_first() -> None:
    demo, tests = snippets("sh")
    assert demo == "pip install '.[hf,report,tune]' && rkif demo\n"
    assert tests == "pip install -e '.[dev]' && pytest -n logical\n"


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


def test_the_index_lists_every_page() -> None:
    index = README.parent / "docs" / "index.md"
    links = re.findall(r"\]\(([^)#]+)\)", index.read_text(encoding="utf-8"))
    pages = set((README.parent / "docs").rglob("*.md")) - {index}
    assert pages <= {(index.parent / link).resolve() for link in links}


def test_the_readme_is_short() -> None:
    written = re.sub(r"<!-- results: .*?<!-- end -->\n", "", TEXT, flags=re.DOTALL)
    assert len([line for line in written.splitlines() if not line.startswith("|")]) <= 120


def cells(table: str) -> dict[str, dict[str, str]]:
    """First cell -> heading -> cell of a row; of equal headings the first counts."""
    heading, _, *rows = (
        line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")
    )
    return {row[0]: dict(zip(heading[::-1], row[::-1], strict=True)) for row in rows}


def test_the_short_tables_agree_with_the_full_ones() -> None:
    tables = dict(re.findall(r"<!-- results: (\w+) -->\n(.*?)<!-- end -->", TEXT, flags=re.DOTALL))
    assert tables.keys() == {"continual", "kernels", "paper_summary"}
    assert all(0 < len(table.split("---:")[-1].strip("| \n").splitlines()) <= 8 for table in tables.values())
    full = with_tables("<!-- results: continual_all -->\n<!-- end -->").split("minilm, ")
    (short,) = (cells(table) for table in full if re.match(r"4 tasks .*, 64 steps", table))
    (long,) = (cells(table) for table in full if re.match(r"15 tasks .*, 32 steps", table))
    for method, row in cells(tables["continual"]).items():
        for tasks, suite in ((4, short), (15, long)):
            for key in ("OP", "BWT", "runs"):
                assert row[f"{key}, {tasks} tasks"] == suite[method][key], method
    everything = with_tables("<!-- results: kernels_all -->\n<!-- end -->")
    for line in re.findall(r"^\| (?:observe|threshold|fuse) .*$", tables["kernels"], flags=re.MULTILINE):
        operation, _, ms, share, eager, compiled = line.strip("| ").split(" | ")
        factors = f"{eager} .*{'' if compiled == '-' else compiled}"
        assert re.search(
            rf"^\| {operation} .*\| {ms} \| .*\| {share} \| .*{factors}", everything, re.MULTILINE
        ), line


def test_figures_in_the_text_are_in_the_tables() -> None:
    (section,) = re.findall(r"## When to use it\n(.*?)## Features", TEXT, flags=re.DOTALL)
    prose = re.sub(r"<!-- results.*?<!-- end -->", "", section, flags=re.DOTALL)
    figures = re.findall(r"(?<![\d.])[-+]?\d+\.\d(?! M)", prose)
    assert len(figures) == 14
    every = with_tables("<!-- results: continual_all -->\n<!-- end -->")
    for figure in figures:
        assert f"| {figure} " in every, figure


def test_the_citation_is_of_this_version() -> None:
    root = README.parent
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    (paper,) = citation["references"]
    assert paper["title"] in TEXT
    assert all(author["family-names"] in TEXT for author in paper["authors"])


def test_the_config_page_lists_all_settings_with_their_defaults() -> None:
    documented = documented_yaml("reference/config.md")[0]
    required = {
        "model": "some/model",
        "tasks": {"folder": "my-tasks", "order": ["first", "second"]},
        "training": {"steps": 100},
    }
    assert documented == yaml.safe_load(dump_config(RunConfig.model_validate(required)))
