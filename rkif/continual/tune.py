"""``rkif tune``: searches for the settings of Recurrent-KIF with the best OP on the dev split."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from rkif.continual.config import RunConfig, dump_config
from rkif.continual.config_fusion import fusion_config
from rkif.continual.display.progress import RunProgress, format_number
from rkif.continual.methods import method_of
from rkif.continual.run import run
from rkif.files import write_text
from rkif.seeding import derive_seed

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import BaseTrial, FrozenTrial

DENSITIES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
INNER_STEPS = (4, 8, 16, 32)
OUTER_SHARES = (0.25, 0.5, 1.0)  # M / Q
BEST = "best.yaml"  # in the study's folder
OUTER_RATES = (0.25, 0.5, 1.0, 2.0)  # outer learning rate / inner learning rate


def tune(config: RunConfig, out: Path, *, trials: int, resume: bool, console: Console) -> Study:
    """Search density, Q, M and the outer learning rate with optuna's TPE sampler.

    ``out/best.yaml`` is a config with the best settings. They are chosen on the dev split, so their OP is
    optimistic, and more so with more trials.

    A trial is a complete run. The first one has the settings of the search space nearest to the config.
    Results are kept in ``out/study.db``; a trial's folder is deleted when it ends. Failed trials count. A
    trial with the settings of an earlier one has the same result, without a run. With ``resume``, the search
    and the interrupted trial continue.

    Args:
        config: settings with the method recurrent_kif; those that are not searched are kept.
        out: the study's folder.
        trials: number of trials, including those before an interruption.
        resume: whether to continue the study in ``out``.
        console: shows the result of each trial.

    Returns:
        The study; its objective is OP.

    Raises:
        ValueError: the method is another, the study exists already or has another config, or all trials
            failed.
        ImportError: optuna is not installed.
    """
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise ImportError(
            'the search needs optuna: pip install ".[tune]" in the source folder of rkif'
        ) from error
    method_of(config)
    if config.method != "recurrent_kif":
        raise ValueError(f"tune searches settings of method recurrent_kif; the config has {config.method}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if (out / "study.db").exists() and not resume:
        raise ValueError(f"{out} holds a study; continue with --resume, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    text = dump_config(config)
    settings = out / "config.yaml"
    if settings.exists() and settings.read_text(encoding="utf-8") != text:
        raise ValueError(f"{out} is a study of another config")
    write_text(settings, text)
    try:
        study = optuna.create_study(
            study_name="rkif",
            storage=f"sqlite:///{out / 'study.db'}",
            direction="maximize",
            load_if_exists=True,
        )
    except SQLAlchemyError as error:
        raise ValueError(f"{out / 'study.db'} is damaged: {error}") from error
    # With a constant seed, a resumed sampler would draw the same settings as before the interruption.
    study.sampler = optuna.samplers.TPESampler(
        seed=derive_seed(config.seed, "tune", len(study.trials)) % 2**32
    )
    complete = optuna.trial.TrialState.COMPLETE
    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.RUNNING:  # interrupted: try its parameters again
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
    if not study.trials:
        study.enqueue_trial(_start(config))

    def objective(trial: Trial) -> float:
        chosen = _chosen(config, trial)
        for earlier in study.trials:
            if earlier.state == complete and earlier.params == trial.params:
                for key, value in earlier.user_attrs.items():
                    trial.set_user_attr(key, value)
                return float(earlier.value or 0.0)
        folder = out / "trial"
        if (folder / "config.yaml").exists() and (folder / "config.yaml").read_text() != dump_config(chosen):
            shutil.rmtree(folder)
        try:
            with open(os.devnull, "w") as nowhere:
                silent = RunProgress(Console(file=nowhere))
                metrics = run(chosen, folder, resume=folder.exists(), progress=silent)
        except (ValueError, RuntimeError) as error:
            trial.set_user_attr("error", str(error))
            console.print(f"trial {trial.number} failed: {error}", style="yellow", markup=False)
            raise
        trial.set_user_attr("bwt", metrics["bwt"])
        trial.set_user_attr("samples", metrics["samples"])
        console.print(
            f"trial {trial.number}: OP {format_number(metrics['op'])}, "
            f"BWT {format_number(metrics['bwt'], sign=True)}, {_described(trial.params)}",
            highlight=False,
            soft_wrap=True,
        )
        shutil.rmtree(folder)
        return float(metrics["op"])

    left = trials - sum(trial.state == complete or "error" in trial.user_attrs for trial in study.trials)
    study.optimize(objective, n_trials=max(0, left), catch=(ValueError, RuntimeError))
    if not any(trial.state == complete for trial in study.trials):
        raise ValueError(f"every trial failed; the last error: {study.trials[-1].user_attrs.get('error')}")
    best = optuna.trial.FixedTrial(best_first(study)[0].params)
    write_text(out / BEST, dump_config(_chosen(config, best)))
    return study


def _start(config: RunConfig) -> dict[str, Any]:
    """The point of the search space nearest to the config."""
    fusion = fusion_config(config.fusion)
    candidates = {
        "density": (DENSITIES, fusion.density),
        "inner_steps": (INNER_STEPS, fusion.inner_steps),
        "outer_share": (OUTER_SHARES, fusion.outer_steps / fusion.inner_steps),
        "outer_rate": (OUTER_RATES, config.outer.learning_rate / config.training.learning_rate),
    }
    return {name: min(values, key=lambda v: abs(v - value)) for name, (values, value) in candidates.items()}


def _chosen(config: RunConfig, trial: BaseTrial) -> RunConfig:
    inner_steps = trial.suggest_categorical("inner_steps", INNER_STEPS)
    share = trial.suggest_categorical("outer_share", OUTER_SHARES)
    fusion = {
        "density": trial.suggest_categorical("density", DENSITIES),
        "inner_steps": inner_steps,
        "outer_steps": max(1, round(share * inner_steps)),
    }
    rate = trial.suggest_categorical("outer_rate", OUTER_RATES) * config.training.learning_rate
    changes: dict[str, Any] = {
        "fusion": config.fusion | fusion,
        "outer": config.outer.model_dump() | {"learning_rate": rate},
    }
    return RunConfig.model_validate(config.model_dump() | changes)


def _described(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(parameters.items()))


def best_first(study: Study) -> list[FrozenTrial]:
    """The completed trials from best to worst; ties are ordered by fewer samples."""
    completed = [trial for trial in study.trials if trial.value is not None]
    return sorted(completed, key=lambda trial: (-(trial.value or 0.0), trial.user_attrs["samples"]))


def best_table(study: Study) -> Table:
    """The trials from best to worst."""
    table = Table(box=box.SIMPLE_HEAD, title="OP on the dev split, best first")
    names = ("density", "inner_steps", "outer_share", "outer_rate")
    for heading in ("trial", "OP", "BWT", "samples", "density", "Q", "M / Q", "outer rate / inner"):
        table.add_column(heading, justify="right")
    for trial in best_first(study):
        table.add_row(
            str(trial.number),
            format_number(trial.value),
            format_number(trial.user_attrs["bwt"], sign=True),
            f"{trial.user_attrs['samples']:,}",
            *(str(trial.params[name]) for name in names),
        )
    return table
