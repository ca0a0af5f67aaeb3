"""Compare methods on task sequences: one row per run in ``bench/results/continual.jsonl``."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from bench.common import rows as store
from bench.common.machine import commit, device_name
from bench.forgetting.instrument import CONFIGS, seconds_by_part
from bench.forgetting.perplexity import perplexities
from rkif.continual.config import RunConfig, dump_config, load_config
from rkif.continual.display.progress import RunProgress
from rkif.continual.methods import METHODS, RecurrentKIF
from rkif.continual.models.device import run_device
from rkif.continual.run import run

RESULTS = store.RESULTS / "continual.jsonl"
KEY = ("config", "order", "method", "rate", "seed")  # of a row
ORDERS = {tasks: tuple(f"{tasks}-{number}" for number in (1, 2, 3)) for tasks in ("standard", "long")}
SUITES = ORDERS | {f"paper-{tasks}": orders for tasks, orders in ORDERS.items()}  # suite -> its orders
# Every method except the ablation "adaptive", and Recurrent-KIF's presets.
MAIN = (*(name for name in METHODS if name != "adaptive"), "recurrent_kif_paper", "recurrent_kif_release")

# The timed methods: all steps on the new task and on the memory, and the calls of the fuser within them.
TIMED: tuple[tuple[type, str, str], ...] = (
    (RecurrentKIF, "observe", "fuser"),
    (RecurrentKIF, "begin_outer", "fuser"),
    (RecurrentKIF, "end_round", "fuser"),
    (RecurrentKIF, "train_step", "steps"),
)

# Settings that are not in a row's "settings", because they have separate fields or are paths of the machine.
NAMED: Any = {"model": True, "method": True, "seed": True, "tasks": {"folder", "order"}}


@dataclass(frozen=True)
class Job:
    """One run: a config file, and changes to it.

    Attributes:
        rate: factor of the learning rates of both learners, besides the variant's factors.
        timed: whether the row has the wall time. It would be wrong where the machine does other work.
    """

    config: Path
    suite: str
    order: str
    method: str
    seed: int
    out: Path
    rate: float = 1.0
    timed: bool = True

    def settings(self) -> RunConfig:
        """The config with the order, the seed, and the settings of the method or variant.

        Raises:
            ValueError: no method and no variant has that name.
        """
        if self.method not in METHODS and self.method not in variants():
            raise ValueError(f"no such method or variant: {self.method!r}; see {CONFIGS / 'variants.yaml'}")
        changes = variants().get(self.method, {"method": self.method})
        base = load_config(self.config).model_dump()
        base["tasks"]["order"] = self.order
        base["training"]["learning_rate"] *= self.rate
        base["outer"]["learning_rate"] *= self.rate
        return RunConfig.model_validate(_merged(base, {**changes, "seed": self.seed}))

    @property
    def folder(self) -> Path:
        """The run's folder; different settings have different folders."""
        settings = hashlib.sha256(dump_config(self.settings()).encode()).hexdigest()[:8]
        return self.out / self.config.stem / self.order / f"{self.method}-{self.seed}-{settings}"


@cache
def variants() -> dict[str, Any]:
    """Name of a variant -> its changes to a config."""
    content: dict[str, Any] = yaml.safe_load((CONFIGS / "variants.yaml").read_text(encoding="utf-8"))
    return content


def compare(jobs: Sequence[Job], processes: int, console: Console) -> None:
    """Run the jobs, each in a separate process, and write a row for each.

    Call it again after an interruption: jobs with a row are skipped, and unfinished runs are resumed. Times
    and memory of a resumed run are left out of its row, because they were measured for a part only.

    Raises:
        ValueError: settings are invalid (raised before any run), or runs failed (raised after all others).
    """
    for job in jobs:
        job.settings()
    todo = [job for job in jobs if not _has_row(job)]
    console.print(f"{len(jobs) - len(todo)} of {len(jobs)} runs have been done")
    # A server process imports everything once, and forks itself for every job.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(processes, mp_context=server, max_tasks_per_child=1) as pool:
        futures = {pool.submit(_run, job): job for job in todo}
        failed = []
        for done in as_completed(futures):
            job = futures[done]
            try:
                row = done.result()
            except Exception as error:  # keep the results of the other runs
                name = f"{job.order} {job.method} rate {job.rate:g} seed {job.seed}"
                failed.append(f"{name}: {type(error).__name__}: {error}")
                console.print(failed[-1], style="red", markup=False, highlight=False)
                continue
            store.write(RESULTS, row, KEY)
            took = "" if row["wall_s"] is None else f" ({row['wall_s']} s)"
            console.print(
                f"{row['order']} {row['method']} rate {row['rate']:g} seed {row['seed']}: "
                f"OP {row['op']} BWT {row['bwt']}{took}",
                highlight=False,
            )
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} runs failed, the first: {failed[0]}")


def _run(job: Job) -> dict[str, Any]:
    config = job.settings()
    resumed = job.folder.exists()
    started, started_cpu = time.monotonic(), time.process_time()
    with seconds_by_part(TIMED) as spent, open(os.devnull, "w") as nowhere:
        metrics = run(config, job.folder, resume=resumed, progress=RunProgress(Console(file=nowhere)))
    cost = {} if resumed else _cost(config, spent, time.process_time() - started_cpu)
    cost |= {"wall_s": None if resumed or not job.timed else round(time.monotonic() - started, 1)}
    row = _row(job, config, metrics) | cost
    if config.architecture == "causal":
        before, after = perplexities(config, job.folder, metrics["tasks"])
        row["perplexity"] = [round(before, 3), round(after, 3)]
    return row


def _row(job: Job, config: RunConfig, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "suite": job.suite,
        "order": job.order,
        "method": job.method,
        "rate": job.rate,
        "seed": job.seed,
        **{
            key: metrics[key] if metrics[key] is None else round(metrics[key], 3)
            for key in ("op", "bwt", "fwt")
        },
        "samples": metrics["samples"],
        "steps": metrics["steps"],
        "model": Path(config.model).name,
        "trainable": metrics["trainable"],
        "split": metrics["split"],
        "device": device_name(run_device(config)),
        "commit": commit(),
        "config": job.config.stem,
        "tasks": metrics["tasks"],
        "records": metrics["records"],
        "initial": metrics["initial"],
        "accuracy": metrics["accuracy"],
        "settings": config.model_dump(mode="json", exclude=NAMED),
    }


def _cost(config: RunConfig, spent: Mapping[str, float], cpu_s: float) -> dict[str, Any]:
    """CPU time in seconds, peak memory, and the share of observing, fusing and recording in the steps."""
    on = run_device(config)
    peak = torch.cuda.max_memory_allocated(on) if on.type == "cuda" else _peak_of_process()
    share = round(spent["fuser"] / (spent["fuser"] + spent["steps"]), 5) if spent["fuser"] else None
    return {"cpu_s": round(cpu_s, 1), "peak_mib": round(peak / 2**20), "rkif_share": share}


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with ``changes``, section by section; the change "x2" doubles a float."""
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
    """The rows measured so far."""
    return store.read(RESULTS)


def _has_row(job: Job) -> bool:
    config = job.settings()
    wanted = (job.config.stem, job.order, job.method, job.rate, job.seed, Path(config.model).name)
    same_run = [row for row in rows() if tuple(row.get(key) for key in (*KEY, "model")) == wanted]
    return any(_settings(row, config) == config for row in same_run)


def _settings(row: Mapping[str, Any], config: RunConfig) -> RunConfig:
    """The settings of a row's run. Settings that are newer than the row have their defaults."""
    stored = row["settings"]
    named = config.model_dump(include={"model", "method", "seed"})
    where = config.tasks.model_dump(include={"folder", "order"})
    return RunConfig.model_validate({**stored, **named, "tasks": {**stored["tasks"], **where}})
