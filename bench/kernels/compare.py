"""Another commit and this checkout, measured in turn on the same machine."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

from bench.common import rows
from bench.common.machine import commit
from bench.kernels.run import ROOT, Selection, run
from bench.kernels.tables import milliseconds

Case = tuple[str, str, str, str]


def compare(ref: str, selection: Selection, rounds: int) -> Table:
    """Measure both in turn, ``rounds`` times, with the benchmarks of this checkout.

    The table shows medians of the rounds' medians.

    Raises:
        ValueError: ``ref`` is not a commit.
        RuntimeError: the suite failed on one of them.
    """
    with worktree(ref) as (other, name), tempfile.TemporaryDirectory() as folder:
        times: tuple[dict[Case, list[float]], dict[Case, list[float]]] = ({}, {})
        for number in range(rounds):
            for side, root in enumerate((other, ROOT)):
                file = run(selection, Path(folder) / f"{number}-{side}.jsonl", root)
                for row in rows.read(file):
                    case = (row["op"], row["shape"], row["dtype"], row["implementation"])
                    times[side].setdefault(case, []).append(row["ms_median"])
    return _table(times, name, commit())


@contextmanager
def worktree(ref: str) -> Iterator[tuple[Path, str]]:
    """A checkout of ``ref`` with this checkout's benchmarks and its own native kernels, and its commit.

    Raises:
        ValueError: ``ref`` is not a commit.
    """
    resolved = _git("rev-parse", "--verify", "--quiet", "--short=12", f"{ref}^{{commit}}")
    if resolved.returncode:
        raise ValueError(f"not a commit: {ref!r}")
    name = resolved.stdout.strip()
    with tempfile.TemporaryDirectory(prefix="rkif-compare-") as folder:
        root = Path(folder) / name
        added = _git("worktree", "add", "--detach", str(root), name)
        if added.returncode:
            raise RuntimeError(f"git worktree add: {added.stderr.strip()}")
        try:
            shutil.rmtree(root / "bench", ignore_errors=True)
            shutil.copytree(
                ROOT / "bench", root / "bench", ignore=shutil.ignore_patterns("__pycache__", "results")
            )
            _build(root)
            yield root, name
        finally:
            _git("worktree", "remove", "--force", str(root))


def _build(root: Path) -> None:
    """Build the checkout's extension; without a compiler nothing is built, as on installation."""
    script = "from setuptools import setup; setup()"
    command = [sys.executable, "-c", script, "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=root, env=os.environ, capture_output=True, check=False)


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def _table(times: tuple[dict[Case, list[float]], dict[Case, list[float]]], old: str, new: str) -> Table:
    table = Table(
        title=f"{old} against {new}", caption="ms, medians of the rounds' medians; above 1: now faster"
    )
    for heading in ("operation", "shape", "dtype", "implementation"):
        table.add_column(heading)
    for heading in (old, new, "ratio"):
        table.add_column(heading, justify="right")
    for case in {**times[0], **times[1]}:
        before, after = (statistics.median(side[case]) if case in side else None for side in times)
        ratio = f"{before / after:.2f}" if before and after else "-"
        table.add_row(*case, *(milliseconds(ms) if ms else "-" for ms in (before, after)), ratio)
    return table
