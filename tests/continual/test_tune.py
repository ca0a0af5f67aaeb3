"""``rkif tune``: the number of trials is exact, and the search can be interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from run_inputs import TASKS
from typer.testing import CliRunner

import rkif.continual.tune
from rkif.cli import app
from rkif.continual.config import RunConfig, load_config
from rkif.continual.config_fusion import fusion_config
from rkif.continual.display.progress import RunProgress
from rkif.continual.tune import tune

Config = Callable[..., RunConfig]


def short(config: Config, **changes: Any) -> RunConfig:
    return config(
        tasks=config().tasks.model_dump() | {"order": TASKS[:2]},
        training={"steps": 4, "batch_size": 4, "learning_rate": 1e-2},
        fusion={"preset": "paper", "inner_steps": 8, "outer_steps": 4},
        **changes,
    )


def test_tune_tries_the_config_first_and_shows_the_best(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(short(config).model_dump(mode="json")))
    out = tmp_path / "study"
    command = ["tune", str(path), "--trials", "3", "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.exception
    lines = [line for line in done.output.splitlines() if line.startswith("trial ")]
    assert len(lines) == 3
    assert "density 0.2, inner_steps 8, outer_rate 1.0, outer_share 0.5" in lines[0]
    assert "OP on the dev split, best first" in done.output
    best = load_config(out / "best.yaml")
    row = done.output.partition("best first")[2].split("outer rate / inner")[1].split("\n")[2].split()
    assert [fusion_config(best.fusion).density, best.fusion["inner_steps"]] == [float(row[4]), int(row[5])]
    assert best.outer.learning_rate == float(row[7]) * best.training.learning_rate
    assert f"rkif run {out / 'best.yaml'}" in done.output
    again = CliRunner().invoke(app, command)
    assert "holds a study; continue with --resume" in str(again.exception)
    more = CliRunner().invoke(app, [*command[:3], "4", *command[4:], "--resume"])
    assert [line for line in more.output.splitlines() if line.startswith("trial ")] != []
    assert sum(line.startswith("trial ") for line in more.output.splitlines()) == 1  # four in all
    printed = json.loads(
        CliRunner().invoke(app, [*command[:3], "4", *command[4:], "--resume", "--json"]).stdout
    )
    assert printed["best"] == str(out / "best.yaml")
    assert len(printed["trials"]) == 4
    assert printed["trials"][0]["op"] == max(trial["op"] for trial in printed["trials"])


def test_trials_are_runs_of_the_config_with_the_searched_settings(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = short(config)
    seen: list[RunConfig] = []

    def run(chosen: RunConfig, folder: Path, *, resume: bool, progress: RunProgress) -> dict[str, Any]:
        seen.append(chosen)
        folder.mkdir()
        # This task scores best with more than half of the parameters and a slow outer learner.
        fusion = fusion_config(chosen.fusion)
        return {"op": 60 + 30 * fusion.density - 1000 * chosen.outer.learning_rate, "bwt": 0.0, "samples": 1}

    monkeypatch.setattr(rkif.continual.tune, "run", run)
    with (tmp_path / "shown").open("w") as shown:
        study = tune(settings, tmp_path / "study", trials=30, resume=False, console=Console(file=shown))
    tried = {tuple(sorted(trial.params.items())) for trial in study.trials}
    assert len(seen) == len(tried) > 20  # no trial is repeated
    assert len(study.trials) == 30
    assert seen[0].outer.learning_rate == settings.training.learning_rate  # the search starts from the config
    assert study.best_trial.params["density"] == 0.8
    assert study.best_trial.params["outer_rate"] == 0.25
    for chosen in seen:
        fusion = fusion_config(chosen.fusion)
        assert fusion.rule == "paper"  # not searched
        assert fusion.outer_steps in {fusion.inner_steps // 4, fusion.inner_steps // 2, fusion.inner_steps}
        assert chosen.training == settings.training


def test_an_interrupted_trial_is_repeated(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = short(config)
    console = Console(file=(tmp_path / "shown").open("w"))

    class Killed(BaseException):
        pass

    advance, steps = RunProgress.advance, [0]

    def dying(self: RunProgress, loss: float) -> None:
        advance(self, loss)
        steps[0] += 1
        if steps[0] == 15:  # in the second trial
            raise Killed

    monkeypatch.setattr(RunProgress, "advance", dying)
    with pytest.raises(Killed):
        tune(settings, tmp_path / "study", trials=3, resume=False, console=console)
    study = tune(settings, tmp_path / "study", trials=3, resume=True, console=console)
    done = [trial for trial in study.trials if trial.value is not None]
    assert len(done) == 3
    interrupted = study.trials[1]
    assert interrupted.value is None
    assert done[1].params == interrupted.params


def test_a_failed_trial_counts_and_settings_are_not_run_twice(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, runs = short(config), [0]
    seen: list[str] = []

    def run(chosen: RunConfig, folder: Path, *, resume: bool, progress: RunProgress) -> dict[str, Any]:
        runs[0] += 1
        seen.append(chosen.model_dump_json())
        if runs[0] == 2:
            raise ValueError("NaN all over")
        folder.mkdir()
        return {"op": 50.0, "bwt": 0.0, "samples": 1}

    monkeypatch.setattr(rkif.continual.tune, "run", run)
    with (tmp_path / "shown").open("w") as shown:
        for trials in (4, 8, 60):  # each call continues the study
            study = tune(
                settings, tmp_path / "study", trials=trials, resume=trials > 4, console=Console(file=shown)
            )
            assert len(study.trials) == trials
    assert "trial 1 failed: NaN all over" in (tmp_path / "shown").read_text()
    assert len(set(seen)) == len(seen)

    def fail(*arguments: Any, **more: Any) -> dict[str, Any]:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(rkif.continual.tune, "run", fail)
    with pytest.raises(ValueError, match="every trial failed; the last error: no memory left"):
        tune(settings, tmp_path / "hopeless", trials=2, resume=False, console=Console(quiet=True))


def test_a_damaged_study_is_reported(config: Config, tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(ValueError, match=r"study\.db is damaged"):
        tune(short(config), tmp_path, trials=1, resume=True, console=Console(quiet=True))


def test_tune_refuses_configs_that_it_cannot_search(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the config has replay"):
        tune(config(method="replay"), tmp_path / "a", trials=1, resume=False, console=Console())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text("other")
    with pytest.raises(ValueError, match="a study of another config"):
        tune(short(config), tmp_path / "b", trials=1, resume=True, console=Console())
