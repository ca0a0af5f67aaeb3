"""Instrumented runs: without output, in a temporary folder, with watched fusions and timed methods."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor

from bench.common import rows as store
from bench.common.machine import commit
from rkif.continual.config import RunConfig
from rkif.continual.display.progress import RunProgress
from rkif.continual.run import run
from rkif.fuser import Fuser
from rkif.fuser.state_names import section
from rkif.fusion import FusionReport

CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULT = CONFIGS / "standard-minilm.yaml"


class Sides(NamedTuple):
    """Name -> parameter: before the round, after the inner and after the outer learner."""

    base: dict[str, Tensor]
    inner: dict[str, Tensor]
    outer: dict[str, Tensor]


def recurrent_kif(config: RunConfig, **changes: Any) -> RunConfig:
    """A config with method recurrent_kif, and with other changes."""
    return RunConfig.model_validate(config.model_dump() | {"method": "recurrent_kif", **changes})


def few_dev_records(config: RunConfig) -> RunConfig:
    """A config for a run whose accuracy is not needed."""
    return config.model_copy(update={"tasks": config.tasks.model_copy(update={"dev_limit": 8})})


@contextmanager
def silent_run(config: RunConfig) -> Iterator[tuple[dict[str, Any], Path]]:
    """Run a config without output; yields its metrics, and its folder, which is deleted after the block."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        out = Path(folder) / "run"
        yield run(config, out, progress=RunProgress(Console(file=nowhere))), out


def row(path: Path, config: RunConfig, **measured: Any) -> dict[str, Any]:
    """A row of a run: the name of the config, the model, the measured values, the commit."""
    return {"config": path.stem, "model": Path(config.model).name, **measured, "commit": commit()}


def write_rows(results: Path, rows: Iterable[store.Row], console: Console) -> None:
    """Print each row after its measurement; replace the file at the end."""
    measured = []
    for new in rows:
        measured.append(new)
        console.print(new)
    store.write_all(results, measured)


def means(rounds: Sequence[Mapping[str, float]], keys: Iterable[str]) -> dict[str, float]:
    """Key -> mean over rounds."""
    return {key: fmean(each[key] for each in rounds) for key in keys}


@contextmanager
def watched_fusions(
    measure: Callable[[Fuser, Sides, FusionReport], dict[str, float]],
) -> Iterator[list[dict[str, float]]]:
    """Call ``measure`` after each fusion while the block runs; yields the list of its results."""
    rounds: list[dict[str, float]] = []
    fuse = Fuser.fuse

    def watched(fuser: Fuser) -> FusionReport:
        state = fuser.state_dict()
        outer = {name: parameter.detach().clone() for name, parameter in fuser.parameters.items()}
        report = fuse(fuser)
        rounds.append(measure(fuser, Sides(section(state, "base"), section(state, "inner"), outer), report))
        return report

    with patch.object(Fuser, "fuse", watched):
        yield rounds


@contextmanager
def seconds_by_part(timed: Sequence[tuple[type, str, str]]) -> Iterator[dict[str, float]]:
    """Time methods while the block runs. The time of a method excludes that of timed methods that it calls.

    Args:
        timed: class, name of its method, and name of the part that the method's seconds are added to. Methods
            of objects whose ``has_memory`` is false are not timed: without replay memory there are no rounds.

    Yields:
        Part -> seconds so far.
    """
    spent = {part: 0.0 for _, _, part in timed}
    nested: list[float] = []  # for each call in progress, the seconds of timed calls inside it
    with ExitStack() as stack:
        for kind, name, part in timed:
            stack.enter_context(patch.object(kind, name, _timing(getattr(kind, name), spent, part, nested)))
        yield spent


def _timing(
    call: Callable[..., Any], spent: dict[str, float], part: str, nested: list[float]
) -> Callable[..., Any]:
    def timing(owner: Any, *arguments: Any) -> Any:
        if not getattr(owner, "has_memory", True):
            return call(owner, *arguments)
        _synchronize()
        started = time.perf_counter()
        nested.append(0.0)
        result = call(owner, *arguments)
        _synchronize()
        elapsed = time.perf_counter() - started
        spent[part] += elapsed - nested.pop()
        if nested:
            nested[-1] += elapsed
        return result

    return timing


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
