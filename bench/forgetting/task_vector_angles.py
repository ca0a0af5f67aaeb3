"""Angles and lengths of the two learners' task vectors and of the fusion's update, task by task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.common import rows as store
from bench.forgetting import instrument
from bench.forgetting.instrument import Sides
from rkif.continual.config import load_config
from rkif.fuser import Fuser
from rkif.fusion import FusionReport

RESULTS = store.RESULTS / "task_vector_angles.jsonl"
OF_ROUNDS = {
    "cosine": "cosine of the two task vectors",
    "same_sign": "elements with the same sign in both",
    "outer_length": "length of the outer vector / inner vector",
    "update_length": "length of the update / sum of both vectors",
    "update_cosine": "cosine of the update and the sum",
    "either": "elements selected by either learner",
}


def measure(path: Path) -> Iterator[store.Row]:
    """Run a config, and yield a row per task with the means over its rounds."""
    config = instrument.recurrent_kif(instrument.few_dev_records(load_config(path)))
    with instrument.watched_fusions(_angles) as rounds, instrument.silent_run(config) as (metrics, _):
        tasks = metrics["tasks"][1:]  # the first task has no memory, so no rounds
    size = len(rounds) // len(tasks)
    for place, task in enumerate(tasks):
        measured = instrument.means(rounds[place * size : (place + 1) * size], OF_ROUNDS)
        yield instrument.row(path, config, order=config.tasks.order, task=task, rounds=size, **measured)


def markdown() -> str:
    """The rows as a table."""
    return store.transposed(
        RESULTS, _caption, lambda row: str(row["task"]), OF_ROUNDS, lambda _, value: f"{value:.2f}"
    )


def _caption(row: store.Row) -> str:
    return (
        f"{row['model']} ({row['config']}, {row['order']}), means over the {row['rounds']} rounds of "
        f"each task, at {store.commit_of(row)}."
    )


def _angles(fuser: Fuser, sides: Sides, report: FusionReport) -> dict[str, float]:
    base, inner, outer = (_flat(tensors.values()) for tensors in sides)
    tau_in, tau_out = inner - base, outer - inner
    update, total = _flat(fuser.base().values()) - base, tau_in + tau_out
    return {
        "cosine": float(torch.cosine_similarity(tau_in, tau_out, dim=0)),
        "same_sign": float((tau_in * tau_out > 0).float().mean()),
        "outer_length": float(tau_out.norm() / tau_in.norm()),
        "update_length": float(update.norm() / total.norm()),
        "update_cosine": float(torch.cosine_similarity(update, total, dim=0)),
        "either": 1 - report.counts["neither"] / report.numel,
    }


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().float() for tensor in tensors])
