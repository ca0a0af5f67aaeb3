"""What a run writes while it trains: ledger, states and the folders of learned tasks."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rkif.continual.config import RunConfig, dump_config
from rkif.continual.rundir.folder import RunFolder
from rkif.continual.rundir.ledger import LEDGER
from rkif.continual.rundir.recorder import Recorder, parameter_digest
from rkif.continual.rundir.round_states import RoundStates
from rkif.continual.rundir.state import RunState
from rkif.continual.tasks.replay_memory import ReplayMemory


class LearnedTask(Protocol):
    """What is published of a learned task: part of :class:`rkif.continual.methods.Sequential`."""

    samples: int

    def task_state(self) -> dict[str, Tensor]: ...
    def rounds(self) -> dict[str, Tensor]: ...
    def importance(self) -> dict[str, Tensor]: ...


class RunWriter:
    """Writes one run's output.

    Args:
        folder: the run's folder.
        config: the run's settings.
        parameters: name -> trainable parameter of the run's model.
        model: the model, or what has its ``save_pretrained``.
        tokenizer: saved beside the model.
        ledger_records: ledger records that the state to continue from accounts for.

    Raises:
        LedgerError: the ledger's chain is broken, or it has fewer records than ``ledger_records``.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        parameters: Mapping[str, Tensor],
        model: Any,
        tokenizer: Any,
        ledger_records: int,
    ) -> None:
        self.folder = folder
        self._config = config
        self._parameters = parameters
        self._model = model
        self._tokenizer = tokenizer
        self._recorder = Recorder(folder.path / LEDGER, ledger_records)
        self._round_states = RoundStates(folder.path, config.snapshots.budget)

    @property
    def torn_bytes(self) -> int:
        """Bytes of an unfinished last line that were moved out of the ledger."""
        return self._recorder.ledger.torn

    @property
    def rounds(self) -> int:
        """Rounds recorded so far, without those that were rolled back."""
        return self._recorder.rounds

    def record(self, content: Mapping[str, Any]) -> None:
        """Append a record to the ledger, or compare it with the one that an earlier process wrote."""
        self._recorder.record({**content, **run_identity(self._config)})

    def record_begin(self, tasks: Sequence[str]) -> None:
        """Record the run's start: method, tasks, versions and the untrained parameters."""
        self.record(
            {
                "event": "begin",
                "method": self._config.method,
                "tasks": list(tasks),
                "versions": {name: importlib.metadata.version(name) for name in ("rkif", "torch")},
                "parameters": {"after": parameter_digest(self._parameters)},
            }
        )

    def write_checkpoint(self, task: int, step: int, samples: int, method: dict[str, Tensor]) -> None:
        """Write the state that a resumed run continues from."""
        self.folder.write_checkpoint(self._state(task, step, samples, method))

    def write_round_state(self, task: int, step: int, samples: int, method: dict[str, Tensor]) -> None:
        """Keep the state after the latest round, for a rollback to it."""
        self._round_states.write(self.rounds, self._state(task, step, samples, method))

    def publish_task(
        self,
        index: int,
        name: str,
        method: LearnedTask,
        *,
        steps: int,
        memory: ReplayMemory,
        validation: ReplayMemory,
    ) -> None:
        """Write a learned task's folder, record it in the ledger and write the checkpoint after it."""
        self.folder.publish_task(
            index,
            name,
            save_model=self._save_model,
            tensors={
                "importance": method.importance(),
                "handed_on": method.task_state(),
                "rounds": method.rounds(),
            },
            memory=memory,
            validation=validation,
            summary={"task": name, "steps": steps, "samples": method.samples},
        )
        self.record(
            {
                "event": "task",
                "task": name,
                "steps": steps,
                "samples": method.samples,
                "memory": {task: list(ids) for task, ids in memory.ids.items()},
                "files": self.folder.digests(index, name),
                "parameters": {"after": parameter_digest(self._parameters)},
            }
        )
        self.write_checkpoint(index + 1, 0, method.samples, {})

    def _save_model(self, folder: Path) -> None:
        """Adapter or model, with the tokenizer, as ``from_pretrained`` reads them."""
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def _state(self, task: int, step: int, samples: int, method: dict[str, Tensor]) -> RunState:
        parameters = {name: parameter.detach() for name, parameter in self._parameters.items()}
        return RunState(task, step, samples, self._recorder.position, parameters, method)


def run_identity(config: RunConfig) -> dict[str, Any]:
    """What every ledger record says of its run: the SHA-256 of its settings, and its seed."""
    settings = hashlib.sha256(dump_config(config).encode()).hexdigest()
    return {"config": settings, "seed": config.seed}
