"""The cost of ledger, round states and gate, as shares of the time of a round's steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from bench.common import rows as store
from bench.common.machine import device_name
from bench.forgetting.instrument import few_dev_records, row, seconds_by_part, silent_run
from rkif.continual.config import RunConfig, load_config
from rkif.continual.methods import RecurrentKIF
from rkif.continual.models.device import run_device
from rkif.continual.rundir.recorder import Recorder
from rkif.continual.rundir.round_states import RoundStates
from rkif.gate import Gatekeeper

RESULTS = store.RESULTS / "ledger.jsonl"
# The timed methods, and the part that their time belongs to. One method makes a record or state, another
# writes it.
TIMED: tuple[tuple[type, str, str], ...] = (
    (RecurrentKIF, "train_step", "steps"),
    (RecurrentKIF, "_round_record", "ledger"),
    (Recorder, "record", "ledger"),
    (RecurrentKIF, "tensors", "snapshots"),
    (RoundStates, "write", "snapshots"),
    (Gatekeeper, "judge", "gate"),
)
MEMORY_LOSS = {"metric": "memory_loss", "tolerance": 0.5}
ACCURACY = {"metric": "accuracy", "tolerance": 20.0}
GATES: Mapping[str, dict[str, Any] | None] = {
    "nothing": None,
    "loss, every round": {"criteria": [MEMORY_LOSS], "records": 16},
    "loss, every fourth round": {"criteria": [MEMORY_LOSS], "records": 16, "every": 4},
    "loss and accuracy, every round": {
        "criteria": [MEMORY_LOSS, ACCURACY],
        "records": 16,
    },
}


def measure(path: Path, rounds: int, console: Console) -> None:
    """Run two tasks with each gate in turn, ``rounds`` times, and write a row per gate with medians."""
    runs_of_gate: dict[str, list[dict[str, Any]]] = {name: [] for name in GATES}
    for _ in range(rounds):
        for name, gate in GATES.items():
            runs_of_gate[name].append(_measured(_settings(path, gate)))
            console.print(f"{name}: {runs_of_gate[name][-1]}", highlight=False, markup=False)
    config = _settings(path, None)
    machine = {"device": device_name(run_device(config)), "torch": torch.__version__}
    rows = [
        row(path, config, checked=name, **_medians(runs), runs=len(runs), **machine)
        for name, runs in runs_of_gate.items()
    ]
    store.write_all(RESULTS, rows)


def _medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: median(run[key] for run in runs) for key in runs[0]}


def markdown() -> str:
    """The rows as a table."""
    rows = store.read(RESULTS)
    first = rows[0]
    lines = [
        f"{first['model']} ({first['config']}), {first['trainable']:,.0f} trained parameters, two tasks, "
        f"{first['rounds']:.0f} rounds, medians of {first['runs']} runs, on {first['device']}, "
        f"torch {first['torch']}, at {store.commit_of(first)}. "
        f"A state takes {first['state_mib']:.1f} MiB.",
        "",
        "| checked by | ledger | snapshots | gate | seconds a round |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for each in rows:
        shares = [f"{100 * each[part]:.2f}%" for part in ("ledger", "snapshots", "gate")]
        lines.append(f"| {each['checked']} | {' | '.join(shares)} | {each['round_s']:.2f} |")
    return "\n".join(lines) + "\n"


def _settings(path: Path, gate: dict[str, Any] | None) -> RunConfig:
    """The config with its first two tasks, and with few dev records, because evaluation is not timed."""
    config = few_dev_records(load_config(path))
    order = json.loads((Path(config.tasks.folder) / "tasks.json").read_text())["orders"]
    tasks = config.tasks.model_dump() | {"order": order[config.tasks.order][:2]}
    return RunConfig.model_validate(config.model_dump() | {"tasks": tasks, "gate": gate})


def _measured(config: RunConfig) -> dict[str, Any]:
    with seconds_by_part(TIMED) as spent, silent_run(config) as (metrics, out):
        states = [path.stat().st_size for path in (out / "snapshots").iterdir()]
    rounds = len(states) - 1  # one state is from before the first round
    return {
        **{part: spent[part] / spent["steps"] for part in ("ledger", "snapshots", "gate")},
        "round_s": spent["steps"] / rounds,
        "rounds": rounds,
        "state_mib": median(states) / 2**20,
        "trainable": metrics["trainable"],
    }
