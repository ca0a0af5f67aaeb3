"""Where the two learners of Recurrent-KIF go, and what the fusion makes of it: angles and lengths by task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench.common import rows as store
from bench.forgetting.instrument import FEW_DEV_RECORDS, replaced, row, silent_run
from rkif.continual.config import RunConfig, load_config
from rkif.fuser import Fuser

RESULTS = store.RESULTS / "task_vector_angles.jsonl"
FIGURES = {
    "cosine": "cosine of the two task vectors",
    "same_sign": "elements that both move the same way",
    "outer_length": "outer vector, of the inner's length",
    "update_length": "update, of the length of their sum",
    "update_cosine": "cosine of update and sum",
    "either": "selected by either",
}


def measure(path: Path, console: Console) -> None:
    """Run a config, and write a row a task with the means over its rounds."""
    config = load_config(path)
    changes = {"method": "recurrent_kif", "tasks": config.tasks.model_dump() | FEW_DEV_RECORDS}
    config = RunConfig.model_validate(config.model_dump() | changes)
    with _watched() as rounds, silent_run(config) as (metrics, _):
        pass
    tasks = metrics["tasks"][1:]
    size = len(rounds) // len(tasks)
    rows = []
    for place, task in enumerate(tasks):
        figures = _means(rounds[place * size : (place + 1) * size])
        rows.append(row(path, config, order=config.tasks.order, task=task, rounds=size, **figures))
        console.print(rows[-1])
    store.write_all(RESULTS, rows)


def markdown() -> str:
    """The rows as a table."""
    return store.transposed(
        RESULTS,
        _caption,
        lambda row: str(row["task"]),
        FIGURES,
        lambda _, value: f"{value:.2f}",
    )


def _caption(row: store.Row) -> str:
    return (
        f"{row['model']} ({row['config']}, {row['order']}), means over the {row['rounds']} rounds of "
        f"each task, at {store.commit_of(row)}."
    )


def _means(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: round(fmean(each[key] for each in rounds), 4) for key in FIGURES}


@contextmanager
def _watched() -> Iterator[list[dict[str, Any]]]:
    """The figures of every fusion that is made while the block runs."""
    rounds: list[dict[str, Any]] = []
    fuse = Fuser.fuse

    def watched(fuser: Fuser) -> Any:
        state = fuser.state_dict()
        base, inner = (_flat(state[f"{at}.{name}"] for name in fuser.parameters) for at in ("base", "inner"))
        tau_in, tau_out = inner - base, _flat(fuser.parameters.values()) - inner
        report = fuse(fuser)
        update, total = _flat(fuser.base().values()) - base, tau_in + tau_out
        rounds.append(
            {
                "cosine": float(torch.cosine_similarity(tau_in, tau_out, dim=0)),
                "same_sign": float((tau_in * tau_out > 0).float().mean()),
                "outer_length": float(tau_out.norm() / tau_in.norm()),
                "update_length": float(update.norm() / total.norm()),
                "update_cosine": float(torch.cosine_similarity(update, total, dim=0)),
                "either": 1 - report.counts["neither"] / report.numel,
            }
        )
        return report

    with replaced(Fuser, fuse=watched):
        yield rounds


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])
