"""Methods side by side on a task sequence: one row a run in ``bench/results/continual.jsonl``."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from bench.common import rows as store
from bench.common.machine import commit, device_name
from bench.forgetting.instrument import CONFIGS, seconds_by_part
from rkif.continual.config import RunConfig, dump_config, load_config
from rkif.continual.display.progress import RunProgress
from rkif.continual.methods import METHODS, RecurrentKIF
from rkif.continual.models.device import run_device
from rkif.continual.run import run

RESULTS = store.RESULTS / "continual.jsonl"
KEY = ("config", "order", "method", "seed")  # of a row
SUITES = {suite: tuple(f"{suite}-{number}" for number in (1, 2, 3)) for suite in ("standard", "long")}
# Every method but one, which is an ablation, and Recurrent-KIF's presets.
MAIN = (*(name for name in METHODS if name != "adaptive"), "recurrent_kif_paper", "recurrent_kif_release")

# Seconds of a run's rounds: all steps on the new task and on the memory, and what of them the fuser takes.
TIMED: tuple[tuple[type, str, str], ...] = (
    (RecurrentKIF, "observe", "fuser"),
    (RecurrentKIF, "begin_outer", "fuser"),
    (RecurrentKIF, "end_round", "fuser"),
    (RecurrentKIF, "train_step", "steps"),
)

# What a row says in fields of its own, or what is a matter of the machine.
NAMED: Any = {"model": True, "method": True, "seed": True, "tasks": {"folder", "order"}}


@dataclass(frozen=True)
class Job:
    """One run: a config file, and what is changed in it."""

    config: Path
    suite: str
    order: str
    method: str
    seed: int
    out: Path

    def settings(self) -> RunConfig:
        """The config with the order, the seed and the method's or variant's settings put in.

        Raises:
            ValueError: no method and no variant has that name.
        """
        variants: dict[str, Any] = yaml.safe_load((CONFIGS / "variants.yaml").read_text(encoding="utf-8"))
        if self.method not in METHODS and self.method not in variants:
            raise ValueError(f"no such method or variant: {self.method!r}; see {CONFIGS / 'variants.yaml'}")
        changes = variants.get(self.method, {"method": self.method})
        base = load_config(self.config).model_dump()
        base["tasks"]["order"] = self.order
        return RunConfig.model_validate(_merged(base, {**changes, "seed": self.seed}))

    @property
    def folder(self) -> Path:
        """Where the run is kept: another one for other settings."""
        settings = hashlib.sha256(dump_config(self.settings()).encode()).hexdigest()[:8]
        return self.out / self.config.stem / self.order / f"{self.method}-{self.seed}-{settings}"


def compare(jobs: Sequence[Job], processes: int, console: Console) -> None:
    """Do runs, each in a process of its own, and write a row for each.

    Interrupted and called again it goes on: what has a row is passed over, half-finished runs are resumed
    (what was measured of their time and memory is then of a part, and left out).

    Raises:
        ValueError: settings that are wrong, before anything is run; or runs that failed, when the others
            have been done.
    """
    for job in jobs:
        job.settings()
    todo = [job for job in jobs if not _has_row(job)]
    console.print(f"{len(jobs) - len(todo)} of {len(jobs)} runs have been done")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        futures = {pool.submit(_run, job): job for job in todo}
        failed = []
        for done in as_completed(futures):
            job = futures[done]
            try:
                row = done.result()
            except Exception as error:  # the others have been paid for
                failed.append(f"{job.order} {job.method} seed {job.seed}: {type(error).__name__}: {error}")
                console.print(failed[-1], style="red", markup=False, highlight=False)
                continue
            store.write(RESULTS, row, KEY)
            console.print(
                f"{row['order']} {row['method']} seed {row['seed']}: OP {row['op']} BWT {row['bwt']}"
                f" ({row['wall_s']} s)",
                highlight=False,
            )
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} runs failed, the first: {failed[0]}")


def _run(job: Job) -> dict[str, Any]:
    config = job.settings()
    resumed = job.folder.exists()
    started = time.monotonic()
    with seconds_by_part(TIMED) as spent, open(os.devnull, "w") as nowhere:
        metrics = run(config, job.folder, resume=resumed, progress=RunProgress(Console(file=nowhere)))
    wall = None if resumed else time.monotonic() - started
    return _row(job, config, metrics, wall, spent)


def _row(
    job: Job, config: RunConfig, metrics: Mapping[str, Any], wall: float | None, spent: Mapping[str, float]
) -> dict[str, Any]:
    on = run_device(config)
    peak = torch.cuda.max_memory_allocated(on) if on.type == "cuda" else _peak_of_process()
    return {
        "suite": job.suite,
        "order": job.order,
        "method": job.method,
        "seed": job.seed,
        **{
            key: metrics[key] if metrics[key] is None else round(metrics[key], 3)
            for key in ("op", "bwt", "fwt")
        },
        "samples": metrics["samples"],
        "steps": metrics["steps"],
        "wall_s": wall if wall is None else round(wall, 1),
        "model": Path(config.model).name,
        "trainable": metrics["trainable"],
        "split": metrics["split"],
        "device": device_name(on),
        "commit": commit(),
        "config": job.config.stem,
        "peak_mib": None if wall is None else round(peak / 2**20),
        # Of the time that steps on the new task and on the memory take, what observing, fusing and keeping
        # the round's history take.
        "rkif_share": round(spent["fuser"] / spent["steps"], 5) if spent["fuser"] and wall else None,
        "tasks": metrics["tasks"],
        "records": metrics["records"],
        "initial": metrics["initial"],
        "accuracy": metrics["accuracy"],
        "settings": config.model_dump(mode="json", exclude=NAMED),
    }


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with ``changes`` put in, section by section; "x2" stands for twice what is there."""
    merged = dict(settings)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merged(old, value)
        elif isinstance(old, float) and isinstance(value, str):
            merged[key] = old * float(value.removeprefix("x"))
        else:
            merged[key] = value
    return merged


def rows() -> list[store.Row]:
    """What has been measured."""
    return store.read(RESULTS)


def _has_row(job: Job) -> bool:
    config = job.settings()
    wanted = (job.config.stem, job.order, job.method, job.seed, Path(config.model).name)
    keys = ("config", "order", "method", "seed", "model")
    found = [row for row in rows() if tuple(row.get(key) for key in keys) == wanted]
    return any(_settings(row, config) == config for row in found)


def _settings(row: Mapping[str, Any], config: RunConfig) -> RunConfig:
    """What a row's run was set to. Settings that came later have the default they were given."""
    stored = row["settings"]
    named = config.model_dump(include={"model", "method", "seed"})
    where = config.tasks.model_dump(include={"folder", "order"})
    return RunConfig.model_validate({**stored, **named, "tasks": {**stored["tasks"], **where}})
