"""Masks from bfloat16 importance compared with those from float32, under the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from bench.common import rows as store
from bench.forgetting import instrument
from rkif.continual.config import load_config
from rkif.fuser.fuser import Fuser
from rkif.fuser.importance import Importance
from rkif.fuser.observed_steps import Learner
from rkif.fusion import FusionReport
from rkif_kernels import score_thresholds

RESULTS = store.RESULTS / "state_precision.jsonl"
PRESETS = ("paper", "release")
OF_ROUNDS = {
    "inner_equal": "inner mask, equal bits",
    "inner_jaccard": "inner mask, Jaccard index",
    "outer_equal": "outer mask, equal bits",
    "outer_jaccard": "outer mask, Jaccard index",
    "cases_equal": "elements of the same case",
}


def measure(path: Path) -> Iterator[store.Row]:
    """Run a config with each preset, and yield a row per preset with the means over all rounds."""
    config = instrument.few_dev_records(load_config(path))
    for preset in PRESETS:
        chosen = instrument.recurrent_kif(config, fusion={"preset": preset})
        with _bfloat16_beside() as rounds, instrument.silent_run(chosen):
            worst = min(each["cases_equal"] for each in rounds)
        yield instrument.row(
            path,
            chosen,
            preset=preset,
            rounds=len(rounds),
            **instrument.means(rounds, OF_ROUNDS),
            worst=worst,
        )


def markdown() -> str:
    """The rows as a table."""
    return store.transposed(
        RESULTS,
        _caption,
        lambda row: f"{row['preset']} preset",
        OF_ROUNDS | {"worst": "elements of the same case, worst round"},
        lambda _, value: f"{100 * value:.2f} %",
    )


def _caption(row: store.Row) -> str:
    return (
        f"{row['model']} with LoRA ({row['config']}), means over {row['rounds']} rounds, at "
        f"{store.commit_of(row)}: S and U in bfloat16 against float32, under the same gradients."
    )


@contextmanager
def _bfloat16_beside() -> Iterator[list[dict[str, float]]]:
    """Give every fuser a second importance in bfloat16 while the block runs.

    Yields the list of the masks' agreement at each fusion.
    """
    rounds: list[dict[str, float]] = []
    in_bfloat16: dict[Fuser, dict[Learner, Importance]] = {}
    observe, fuse = Fuser.observe, Fuser.fuse

    def watched_observe(fuser: Fuser) -> None:
        if fuser not in in_bfloat16:
            config = replace(fuser.config, state_dtype=torch.bfloat16)
            in_bfloat16[fuser] = {
                "inner": Importance(fuser.parameters, config),
                "outer": Importance(fuser.parameters, config),
            }
        parameters = list(fuser.parameters.values())
        gradients = [parameter.grad for parameter in parameters]
        in_bfloat16[fuser][fuser.phase].update(parameters, gradients, torch.zeros(1, dtype=torch.int64))
        observe(fuser)

    def watched_fuse(fuser: Fuser) -> FusionReport:
        pairs = {
            learner: (_mask(fuser, fuser._importance[learner]), _mask(fuser, rounded))
            for learner, rounded in in_bfloat16[fuser].items()
        }
        agreement: dict[str, float] = {}
        same = torch.ones_like(pairs["inner"][0])
        for learner, (exact, rounded) in pairs.items():
            agreement[f"{learner}_equal"] = float((exact == rounded).float().mean())
            agreement[f"{learner}_jaccard"] = float((exact & rounded).sum() / (exact | rounded).sum())
            same &= exact == rounded
        rounds.append(agreement | {"cases_equal": float(same.float().mean())})
        report = fuse(fuser)
        for learner, cleared in (("inner", fuser.config.clear_inner), ("outer", fuser.config.clear_outer)):
            if cleared:
                in_bfloat16[fuser][learner].clear()
        return report

    with patch.multiple(Fuser, observe=watched_observe, fuse=watched_fuse):
        yield rounds


def _mask(fuser: Fuser, importance: Importance) -> Tensor:
    threshold = score_thresholds(importance.scores, density=fuser.config.density, scope="global")
    return torch.cat([score.flatten() for score in importance.score_copies().values()]) > threshold
