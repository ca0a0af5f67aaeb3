"""``rkif reproduce``: trains a round of a run again, and compares the result with the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkif.continual.config import load_config
from rkif.continual.display.progress import RunProgress
from rkif.continual.methods import method_of
from rkif.continual.run import open_run
from rkif.continual.rundir.folder import RunReader
from rkif.continual.rundir.recorded import read_recorded_state
from rkif.continual.rundir.recorder import NOT_REPRODUCED
from rkif.continual.rundir.round_states import RoundStates
from rkif.continual.rundir.state import RunState
from rkif.files import file_sha256
from rkif.ledger.chain import LedgerRecord
from rkif.ledger.records import find_round


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a repeated round with the ledger.

    Attributes:
        record: the ledger's record of the round.
        start: the round after whose state training started.
        differences: key -> (value in the ledger, value now); empty if all bits are the same.
    """

    record: LedgerRecord
    start: int
    differences: dict[str, tuple[Any, Any]]


def reproduce(run: Path, number: int, progress: RunProgress) -> Reproduction:
    """Train again from the latest state before a round to its fusion, and compare the record.

    It needs the run's model and data, and a machine with the same rounding. Nothing is written.

    Args:
        run: the run's folder.
        number: number of the round in the ledger, from 1.
        progress: shows the progress.

    Raises:
        ValueError: there is no such run or round, or no earlier state of the round's task was kept.
        LedgerError: the ledger's chain is broken.
    """
    reader = RunReader(run)
    ledger = reader.ledger()
    recorded = find_round(ledger, number, run)
    if recorded["task"] is None:
        raise ValueError(f"{run} is the ledger of a training loop, which rkif cannot repeat")
    index = ledger[0]["tasks"].index(recorded["task"])
    start, state = _nearest(run, ledger, number, index)
    config = load_config(run / "config.yaml")
    try:
        method_class = method_of(config)
    except ValueError as error:
        raise ValueError(f"{run / 'config.yaml'}: {error}") from None
    with open_run(config, method_class, run, index, progress) as sequence:
        sequence.set_parameters(state.parameters)
        new_records: list[Mapping[str, Any]] = []
        context = sequence.context(index, new_records.append)
        method = sequence.method(context, state)
        step = state.step
        progress.task(index, recorded["steps"][1], step)
        while len(new_records) < number - start:
            progress.advance(method.train_step(step))
            step += 1
    identity = {"config": file_sha256(run / "config.yaml"), "seed": config.seed}
    repeated = {**identity, **new_records[-1], "round": number}
    keys = sorted((set(recorded) | set(repeated)) - set(NOT_REPRODUCED))
    differences = {
        key: (recorded.get(key), repeated.get(key)) for key in keys if recorded.get(key) != repeated.get(key)
    }
    return Reproduction(recorded, start, differences)


def _nearest(run: Path, ledger: Sequence[LedgerRecord], number: int, task: int) -> tuple[int, RunState]:
    """The latest round before ``number`` with a kept state of the same task, and the state."""
    round_states = RoundStates(run)
    for start in reversed([kept for kept in round_states.rounds() if kept < number]):
        state = read_recorded_state(run, ledger, start)
        if state.task == task:
            return start, state
    kept = ", ".join(map(str, round_states.rounds())) or "none"
    raise ValueError(f"no state of the task was kept from before round {number}; kept states: {kept}")
