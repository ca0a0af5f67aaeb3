"""Runs that are looked into: silent, in a temporary folder, with methods of a class replaced."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.common.machine import commit
from rkif.continual.config import RunConfig
from rkif.continual.display.progress import RunProgress
from rkif.continual.run import run

CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULT = CONFIGS / "standard-minilm.yaml"
FEW_DEV_RECORDS = {"dev_limit": 8}  # changes to `tasks` of a run whose accuracy is not needed


@contextmanager
def silent_run(config: RunConfig) -> Iterator[tuple[dict[str, Any], Path]]:
    """The metrics of a run that says nothing, and its folder, which is gone after the block."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        out = Path(folder) / "run"
        yield run(config, out, progress=RunProgress(Console(file=nowhere))), out


def row(path: Path, config: RunConfig, **figures: Any) -> dict[str, Any]:
    """A row of a run: the config's file, the model, the figures, the commit."""
    return {"config": path.stem, "model": Path(config.model).name, **figures, "commit": commit()}


@contextmanager
def replaced(kind: type, **methods: Callable[..., Any]) -> Iterator[None]:
    """While the block runs a class has other methods."""
    originals = {name: getattr(kind, name) for name in methods}
    for name, method in methods.items():
        setattr(kind, name, method)
    try:
        yield
    finally:
        for name, method in originals.items():
            setattr(kind, name, method)


@contextmanager
def seconds_by_part(timed: Sequence[tuple[type, str, str]]) -> Iterator[dict[str, float]]:
    """Time methods while the block runs.

    Args:
        timed: classes, names of their methods, and the part that a method's seconds are added to. A method of
            an object whose ``has_memory`` is false is not timed: without replay memory there are no rounds.

    Yields:
        Part -> seconds so far.
    """
    spent = {part: 0.0 for _, _, part in timed}
    with ExitStack() as stack:
        for kind, name, part in timed:
            stack.enter_context(replaced(kind, **{name: _timing(getattr(kind, name), spent, part)}))
        yield spent


def _timing(call: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    def timing(owner: Any, *arguments: Any) -> Any:
        if not getattr(owner, "has_memory", True):
            return call(owner, *arguments)
        _synchronize()
        started = time.perf_counter()
        result = call(owner, *arguments)
        _synchronize()
        spent[part] += time.perf_counter() - started
        return result

    return timing


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
