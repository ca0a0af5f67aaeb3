"""``rkif reproduce``: a round of a run once more, and whether it comes to what the ledger says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkif.continual.config import load_config
from rkif.continual.display.progress import RunProgress
from rkif.continual.run import open_run
from rkif.continual.rundir.folder import RunReader
from rkif.continual.rundir.ledger import Record, read_ledger
from rkif.continual.rundir.recorder import NOT_REPRODUCED, not_rolled_back
from rkif.continual.rundir.round_states import RoundStates
from rkif.continual.rundir.state import RunState
from rkif.continual.rundir.writer import run_identity


@dataclass(frozen=True)
class Reproduction:
    """What came of going through a round again.

    Attributes:
        record: the ledger's.
        start: the round whose state was kept, and from which the round was reached again.
        differences: what differs, field -> (in the ledger, now); empty if all is the same, to the bit.
    """

    record: Record
    start: int
    differences: dict[str, tuple[Any, Any]]


def reproduce(run: Path, number: int, progress: RunProgress) -> Reproduction:
    """Train the round's steps again, from the state kept before it, and fuse.

    Needs the model, the data and the arithmetic of the run: the same machine, or one that rounds alike.
    Nothing is written.

    Args:
        run: the run's folder.
        number: the round, as the ledger numbers them.
        progress: where progress is shown.

    Raises:
        ValueError: no such run or round, or no state of the round's task was kept from before it.
        LedgerError: the ledger does not hold together.
    """
    reader = RunReader(run)
    records = not_rolled_back(read_ledger(run / "ledger.jsonl"))
    rounds = {record["round"]: record for record in records if record["event"] == "round"}
    if number not in rounds:
        raise ValueError(f"no round {number}: {run} has {len(rounds)} of them")
    wanted = rounds[number]
    index = reader.metrics()["tasks"].index(wanted["task"])
    start, state = _nearest(RoundStates(run / "snapshots", 0), number, index)
    config = load_config(run / "config.yaml")
    with open_run(config, run, index, progress) as sequence:
        sequence.set_parameters(state.parameters)
        now: list[Mapping[str, Any]] = []
        context = sequence.context(index, now.append)
        method = sequence.method(context, state)
        step = state.step
        progress.task(index, wanted["steps"][1], step)
        while len(now) < number - start:
            progress.advance(method.train_step(step))
            step += 1
    again = {**run_identity(config), **now[-1], "round": number}
    keys = sorted((set(wanted) | set(again)) - set(NOT_REPRODUCED))
    differences = {
        key: (wanted.get(key), again.get(key)) for key in keys if wanted.get(key) != again.get(key)
    }
    return Reproduction(wanted, start, differences)


def _nearest(snapshots: RoundStates, number: int, task: int) -> tuple[int, RunState]:
    """The latest state from before a round, and how many rounds it has behind it."""
    for start in reversed([kept for kept in snapshots.rounds() if kept < number]):
        state = snapshots.read(start)
        if state.task == task:
            return start, state
    kept = ", ".join(map(str, snapshots.rounds())) or "none"
    raise ValueError(f"no state of the task was kept from before round {number}; there are: {kept}")
