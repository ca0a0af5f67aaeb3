"""What 16-bit importance costs: masks from it beside masks from float32, of the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench.common import rows as store
from bench.forgetting.instrument import FEW_DEV_RECORDS, replaced, row, silent_run
from rkif.continual.config import RunConfig, load_config
from rkif.fuser.fuser import Fuser, Learner
from rkif.fuser.importance import Importance
from rkif_kernels import score_thresholds

RESULTS = store.RESULTS / "state_precision.jsonl"
PRESETS = ("paper", "release")
FIGURES = {
    "inner_equal": "inner mask, equal bits",
    "inner_jaccard": "inner, selected by both of either",
    "outer_equal": "outer mask, equal bits",
    "outer_jaccard": "outer, selected by both of either",
    "cases_equal": "elements of the same case",
}


def measure(path: Path, console: Console) -> None:
    """Run a config with either preset, and write a row a preset with the means over all rounds."""
    config = load_config(path)
    rows = []
    for preset in PRESETS:
        tasks = config.tasks.model_dump() | FEW_DEV_RECORDS
        changes = {"method": "recurrent_kif", "tasks": tasks, "fusion": {"preset": preset}}
        chosen = RunConfig.model_validate(config.model_dump() | changes)
        with _shadowed() as rounds, silent_run(chosen):
            pass
        figures = {key: fmean(each[key] for each in rounds) for key in FIGURES}
        figures["worst"] = min(each["cases_equal"] for each in rounds)
        rows.append(row(path, chosen, preset=preset, rounds=len(rounds), **figures))
        console.print(rows[-1])
    store.write_all(RESULTS, rows)


def markdown() -> str:
    """The rows as a table."""
    return store.transposed(
        RESULTS,
        _caption,
        lambda row: f"{row['preset']} preset",
        FIGURES | {"worst": "the same, in the worst round"},
        lambda _, value: f"{100 * value:.2f} %",
    )


def _caption(row: store.Row) -> str:
    return (
        f"{row['model']} with LoRA ({row['config']}), means over {row['rounds']} rounds, at "
        f"{store.commit_of(row)}: S and U in bfloat16 against float32, under the same gradients."
    )


@contextmanager
def _shadowed() -> Iterator[list[dict[str, float]]]:
    """While the block runs every fuser has a second importance in bfloat16; the agreement of each fusion."""
    rounds: list[dict[str, float]] = []
    shadows: dict[Fuser, dict[Learner, Importance]] = {}
    observe, fuse = Fuser.observe, Fuser.fuse

    def watched_observe(fuser: Fuser) -> None:
        if fuser not in shadows:
            config = replace(fuser.config, state_dtype=torch.bfloat16)
            shadows[fuser] = {
                "inner": Importance(fuser.parameters, config),
                "outer": Importance(fuser.parameters, config),
            }
        parameters = list(fuser.parameters.values())
        gradients = [parameter.grad for parameter in parameters]
        shadows[fuser][fuser.phase].update(parameters, gradients, torch.zeros(1, dtype=torch.int64))
        observe(fuser)

    def watched_fuse(fuser: Fuser) -> Any:
        pairs = {
            learner: (_mask(fuser, fuser._importance[learner]), _mask(fuser, shadow))
            for learner, shadow in shadows[fuser].items()
        }
        figures: dict[str, float] = {}
        same = torch.ones_like(pairs["inner"][0])
        for learner, (exact, rounded) in pairs.items():
            figures[f"{learner}_equal"] = float((exact == rounded).float().mean())
            figures[f"{learner}_jaccard"] = float((exact & rounded).sum() / (exact | rounded).sum())
            same &= exact == rounded
        rounds.append(figures | {"cases_equal": float(same.float().mean())})
        report = fuse(fuser)
        for learner, cleared in (("inner", fuser.config.clear_inner), ("outer", fuser.config.clear_outer)):
            if cleared:
                shadows[fuser][learner].clear()
        return report

    with replaced(Fuser, observe=watched_observe, fuse=watched_fuse):
        yield rounds


def _mask(fuser: Fuser, importance: Importance) -> Tensor:
    threshold = score_thresholds(importance.scores, density=fuser.config.density, scope="global")
    return torch.cat([score.flatten() for score in importance.score_copies().values()]) > threshold
