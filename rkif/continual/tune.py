"""``rkif tune``: the settings of Recurrent-KIF that do best on the dev split, within a number of runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from rkif.continual.config import RunConfig, dump_config
from rkif.continual.display.progress import RunProgress, format_number
from rkif.continual.run import run
from rkif.files import write_text
from rkif.seeding import derive_seed

if TYPE_CHECKING:
    from optuna import Study, Trial

DENSITIES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
INNER_STEPS = (4, 8, 16, 32)
OUTER_SHARES = (0.25, 0.5, 1.0)  # M as a share of Q
OUTER_RATES = (0.25, 0.5, 1.0, 2.0)  # of the inner learning rate


def tune(config: RunConfig, out: Path, *, trials: int, resume: bool, console: Console) -> Study:
    """Search density, Q, M and the outer learning rate by optuna's TPE sampler, which models what was seen.

    What it finds was chosen on the dev split: the OP it is shown with is optimistic, the more so the more
    trials there were.

    The first trial is the config as it is, or the nearest that the search knows. A trial is a whole run; its
    record is kept in ``out/study.db``, its folder only while it goes on. One that fails counts; one whose
    settings were tried before has their figures. Interrupted, the search goes on with ``resume``, and the
    interrupted trial with it.

    Args:
        config: of method recurrent_kif; all that is not searched stays.
        out: folder of the study.
        trials: whole runs that it may take, those before an interruption included.
        resume: go on with the study that is there.
        console: where each trial is shown.

    Returns:
        The study; its values are OP.

    Raises:
        ValueError: another method, a study that is there already or is of another config, no OP to search by.
        ImportError: optuna is not installed.
    """
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise ImportError('the search needs optuna: pip install "rkif[tune]"') from error
    if config.method != "recurrent_kif":
        raise ValueError(f"tune searches settings of method recurrent_kif; the config has {config.method}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if (out / "study.db").exists() and not resume:
        raise ValueError(f"{out} holds a study already; go on with --resume, or choose another --out")
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
    # A sampler that begins anew with the seed would draw what it has drawn before the interruption.
    study.sampler = optuna.samplers.TPESampler(
        seed=derive_seed(config.seed, "tune", len(study.trials)) % 2**32
    )
    finished = optuna.trial.TrialState.COMPLETE
    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.RUNNING:  # interrupted: its parameters are tried again
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
    if not study.trials:
        study.enqueue_trial(_start(config))

    def objective(trial: Trial) -> float:
        chosen = _chosen(config, trial)
        for earlier in study.trials:
            if earlier.state == finished and earlier.params == trial.params:
                for key, value in earlier.user_attrs.items():
                    trial.set_user_attr(key, value)
                return float(earlier.value or 0.0)
        folder = out / "trial"
        if (folder / "config.yaml").exists() and (folder / "config.yaml").read_text() != dump_config(chosen):
            shutil.rmtree(folder)
        try:
            with open(os.devnull, "w") as nowhere:
                quiet = RunProgress(Console(file=nowhere))
                metrics = run(chosen, folder, resume=folder.exists(), progress=quiet)
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

    left = trials - sum(trial.state == finished or "error" in trial.user_attrs for trial in study.trials)
    study.optimize(objective, n_trials=max(0, left), catch=(ValueError, RuntimeError))
    if not any(trial.state == finished for trial in study.trials):
        raise ValueError(f"no trial came to its end; the last: {study.trials[-1].user_attrs.get('error')}")
    return study


def _start(config: RunConfig) -> dict[str, Any]:
    """The nearest point of the search to the config."""
    from rkif.continual.config import fusion_config

    fusion = fusion_config(config.fusion)
    wanted = {
        "density": (DENSITIES, fusion.density),
        "inner_steps": (INNER_STEPS, fusion.inner_steps),
        "outer_share": (OUTER_SHARES, fusion.outer_steps / fusion.inner_steps),
        "outer_rate": (OUTER_RATES, config.outer.learning_rate / config.training.learning_rate),
    }
    return {name: min(values, key=lambda v: abs(v - value)) for name, (values, value) in wanted.items()}


def _chosen(config: RunConfig, trial: Trial) -> RunConfig:
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


def best_table(study: Study) -> Table:
    """The trials from best to worst; those that see fewer samples come first among equals."""
    table = Table(box=box.SIMPLE_HEAD, title="OP on the dev split, best first")
    names = ("density", "inner_steps", "outer_share", "outer_rate")
    for heading in ("trial", "OP", "BWT", "samples", "density", "Q", "M / Q", "outer rate / inner"):
        table.add_column(heading, justify="right")
    done = [trial for trial in study.trials if trial.value is not None]
    for trial in sorted(done, key=lambda t: (-(t.value or 0.0), t.user_attrs["samples"])):
        table.add_row(
            str(trial.number),
            format_number(trial.value),
            format_number(trial.user_attrs["bwt"], sign=True),
            f"{trial.user_attrs['samples']:,}",
            *(str(trial.params[name]) for name in names),
        )
    return table
