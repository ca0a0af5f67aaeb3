"""Methods at several learning rates: the chosen rate, the tables, and the figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_rows import continual_row as row
from typer.testing import CliRunner

from bench.__main__ import app
from bench.forgetting import continual, rates, tables


def at(rate: float, method: str, order: str, op: float, seed: int = 1, **more: Any) -> dict[str, Any]:
    settings = {
        "architecture": "causal",
        "text": {"prompt": "{instruction} {input}"},
        "training": {"steps": 10, "batch_size": 8, "learning_rate": 2e-3 * rate},
        "adapter": {"r": 4},
        "precision": "float32",
        "distillation": more.pop("distillation", {"memory": 0, "inputs": 0}),
    }
    return row(method, order, seed, op, rate=rate, steps=20, settings=settings, **more)


ROWS = [
    at(1.0, "replay", "s-1", 60.0),
    at(0.5, "replay", "s-1", 62.0),
    at(0.5, "replay", "s-1", 64.0, seed=2),
    at(0.5, "replay", "s-2", 50.0),
    at(1.0, "replay", "s-2", 70.0),  # better, but not on the order that chooses
    at(2.0, "recurrent_kif", "s-1", 66.0, distillation={"memory": 0.0, "inputs": 1.0}, samples=240),
    at(1.0, "recurrent_kif", "s-1", 65.0),
    at(2.0, "recurrent_kif", "s-2", 54.0, distillation={"memory": 0.0, "inputs": 1.0}, samples=240),
    at(1.0, "multi_task", "s-1", 67.0, bwt=None),
    at(1.0, "multi_task", "s-2", 55.0, bwt=None),
]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(continual, "RESULTS", tmp_path / "rows.jsonl")
    continual.RESULTS.write_text("".join(json.dumps(item) + "\n" for item in ROWS))
    return tmp_path


@pytest.mark.usefixtures("measured")
def test_a_method_is_compared_at_the_best_rate_of_the_first_order() -> None:
    (methods,) = tables.by_rate().values()
    assert {method: rates.best_rate(runs) for method, runs in methods.items()} == {
        "replay": 0.5,
        "recurrent_kif": 2.0,
        "multi_task": 1.0,
    }
    text = tables.everything()
    assert "| method | rate | OP | BWT | FWT | OP against replay | BWT | gap closed | samples |" in text
    # Replay at half the rate: 62, 64 and 50. Differences to it: 66 - 62 and 54 - 50. The bound is 5 above it.
    assert "| replay | x 0.5 | 58.7 ± 7.6 | -1.3 ± 7.6 | +1.0 ± 0.0 | - | - | - | 1,000 | 1.00 | 3 |" in text
    kif = (
        "| recurrent_kif | x 2 | 60.0 ± 8.5 | +0.0 ± 8.5 | +1.0 ± 0.0 | +4.0 ± 0.0 | +4.0 ± 0.0 | 80% | 240 |"
    )
    # Of 240 samples 80 are the second task's; these are also 80 questions, and the model before the task
    # answers both.
    assert f"{kif} 2.00 | 2 |" in text


@pytest.mark.parametrize(
    ("method", "distillation", "answered"),
    [
        ("recurrent_kif", {"memory": 0.0, "inputs": 1.0}, 80),  # the batches of the new task
        ("recurrent_kif", {"memory": 1.0, "inputs": 0.0}, 60),  # those of the memory
        ("recurrent_kif", {"memory": 1.0, "inputs": 0.0, "answers": "kept"}, 0),
        ("recurrent_kif", {"memory": 1.0, "inputs": 1.0}, 140),
        ("replay", {"memory": 0.0, "inputs": 1.0}, 140),  # every batch has records of both
        ("replay", {"memory": 1.0, "inputs": 0.0}, 140),
        ("replay", {"memory": 1.0, "inputs": 0.0, "answers": "kept"}, 0),
        ("replay", {"memory": 1.0, "inputs": 1.0, "answers": "kept"}, 140),
        ("replay", {"memory": 0.0, "inputs": 0.0}, 0),
    ],
)
def test_forward_passes_are_those_of_the_batches_with_a_divergence(
    method: str, distillation: dict[str, Any], answered: int
) -> None:
    """220 samples: 80 of the first task, 80 of the second, 60 of the memory."""
    run = at(1.0, method, "s-1", 66.0, distillation=distillation, samples=220)
    questions = 80 if distillation["inputs"] else 0
    assert tables.forward_passes(run) == pytest.approx(1 + (answered + 2 * questions) / 220)
    run["settings"] |= {"architecture": "encoder"}
    assert tables.forward_passes(run) == pytest.approx(1 + (answered + 2 * questions) / 220)
    run["settings"] |= {"text": {"prompt": "{input}"}}  # a record and its question are one text
    assert tables.forward_passes(run) == pytest.approx(1 + answered / 220)


@pytest.mark.parametrize("most", [5, None])
def test_an_input_that_is_a_question_of_several_tasks_has_as_many_passes(most: int | None) -> None:
    """80 samples of each of three tasks: questions of none, one and two earlier tasks."""
    distillation = {"memory": 0.0, "inputs": 1.0, "questions": most}
    run = at(1.0, "recurrent_kif", "s-1", 66.0, distillation=distillation, samples=240)
    run |= {"tasks": ["a", "b", "c"], "steps": 30}
    assert tables.forward_passes(run) == pytest.approx(1 + (160 + 2 * (80 + 160)) / 240)


def test_rates_are_compared_over_the_seeds_that_all_have() -> None:
    runs = {
        1.0: {("s-1", 1): at(1.0, "replay", "s-1", 60.0), ("s-1", 2): at(1.0, "replay", "s-1", 90.0)},
        2.0: {("s-1", 1): at(2.0, "replay", "s-1", 61.0), ("s-2", 1): at(2.0, "replay", "s-2", 10.0)},
    }
    assert rates.on_first_order(runs, "op") == {1.0: 60.0, 2.0: 61.0}
    assert rates.best_rate(runs) == 2.0
    apart = {
        1.0: {("s-1", 2): at(1.0, "replay", "s-1", 60.0)},
        2.0: {("s-1", 1): at(2.0, "replay", "s-1", 59.0)},
    }
    assert rates.on_first_order(apart, "op") == {1.0: 60.0, 2.0: 59.0}


@pytest.mark.usefixtures("measured")
def test_suites_of_the_papers_length_have_a_table_of_their_own() -> None:
    assert tables.paper_regime() == ""
    row = at(1.0, "distill_inputs", "s-1", 66.0, config="paper-s-m")
    continual.RESULTS.write_text(continual.RESULTS.read_text() + json.dumps(row) + "\n")
    assert "| distill_inputs | 66.0 |" in tables.paper_regime()
    assert "| replay |" not in tables.paper_regime()
    assert "distill_inputs" not in tables.everything() + tables.tuned() + tables.ablations()


@pytest.mark.usefixtures("measured")
def test_the_summary_of_these_suites_has_differences_over_the_runs_of_both_methods() -> None:
    assert tables.paper_summary() == ""
    more = [
        at(1.0, "replay", "s-1", 60.0, config="paper-s-m"),
        at(1.0, "replay", "s-2", 70.0, config="paper-s-m"),
        at(1.0, "rkif", "s-1", 64.0, config="paper-s-m"),
        at(1.0, "ewc", "s-1", 64.0, config="paper-s-m"),  # not in the summary
    ]
    continual.RESULTS.write_text("".join(json.dumps(item) + "\n" for item in more))
    text = tables.paper_summary()
    assert "| replay | 65.0 ± 7.1 | +5.0 ± 7.1 | - | - | 2 |" in text
    assert "| rkif | 64.0 | +4.0 | +4.0 | +4.0 | 1 |" in text
    assert "ewc" not in text


@pytest.mark.usefixtures("measured")
def test_the_table_shows_each_rate_of_the_first_order() -> None:
    text = tables.learning_rates()
    assert text.startswith("s-m, s-1: OP / BWT at multiples of the learning rate 0.002.\n\n")
    assert "| method | x 0.5 | x 1 | x 2 |" in text
    assert "| replay | **62.0 / +2.0** | 60.0 / +0.0 | - |" in text
    assert "| recurrent_kif | - | 65.0 / +5.0 | **66.0 / +6.0** |" in text
    assert "multi_task" not in text  # one rate


@pytest.mark.usefixtures("measured")
def test_a_method_that_has_not_run_on_the_first_order_has_no_line_at_its_rates() -> None:
    late = [at(rate, "ewc", "s-2", 60.0) for rate in (1.0, 2.0)]
    continual.RESULTS.write_text("".join(json.dumps(item) + "\n" for item in [*ROWS, *late]))
    assert "ewc" not in tables.learning_rates()
    assert "| ewc | x 1 | 60.0 |" in tables.everything()


def test_an_ablation_is_compared_with_the_preset_at_its_own_rate(measured: Path) -> None:
    runs = [
        at(1.0, "recurrent_kif", "s-1", 60.0),
        at(2.0, "recurrent_kif", "s-1", 64.0),
        at(1.0, "density_0", "s-1", 61.0),
        at(0.5, "density_0.5", "s-1", 59.0),
    ]
    continual.RESULTS.write_text("".join(json.dumps(item) + "\n" for item in runs))
    text = tables.ablations()
    assert "| change | rate | OP | BWT | OP against release | BWT against release | samples |" in text
    assert "| recurrent_kif | x 2 | 64.0 | +4.0 | - | - | 1,000 | 1 |" in text
    assert "| density_0 | x 1 | 61.0 | +1.0 | +1.0 | +1.0 | 1,000 | 1 |" in text
    assert "| density_0.5 | x 0.5 | 59.0 | -1.0 | - | - | 1,000 | 1 |" in text


def test_equal_rates_choose_the_lowest() -> None:
    runs = {rate: {("s-1", 1): at(rate, "replay", "s-1", 60.0)} for rate in (2.0, 1.0)}
    assert rates.best_rate(runs) == 1.0


def test_the_rates_are_drawn(measured: Path) -> None:
    out = measured / "docs" / "rates.png"
    shown = CliRunner().invoke(app, ["rates", "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert out.read_bytes().startswith(b"\x89PNG")
    continual.RESULTS.write_text("")
    assert "no suite has runs at several" in str(CliRunner().invoke(app, ["rates"]).exception)
