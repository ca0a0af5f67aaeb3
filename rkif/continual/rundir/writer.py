"""The output of a run during training: ledger, states and the folders of learned tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rkif.continual.config import RunConfig
from rkif.continual.rundir.card import write_card
from rkif.continual.rundir.folder import METRICS, RunFolder, metrics_sha256
from rkif.continual.rundir.recorder import Recorder
from rkif.continual.rundir.round_states import RoundStates
from rkif.continual.rundir.state import CHECKPOINT, RunState, write_state
from rkif.continual.tasks.records import Task
from rkif.continual.tasks.replay_memory import ReplayMemory
from rkif.ledger.chain import LEDGER
from rkif.ledger.records import begin_record, parameter_digest


class RunWriter:
    """Writes the output of a run.

    Args:
        folder: the run's folder.
        config: the run's settings.
        parameters: name -> trainable parameter of the run's model.
        model: the model, or an object with its ``save_pretrained``.
        tokenizer: the tokenizer, saved beside the model.
        ledger_records: number of ledger records at the state from which the run continues.

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
        self._identity = {"config": folder.config_sha256(), "seed": config.seed}  # in every record
        self._parameters = parameters
        self._model = model
        self._tokenizer = tokenizer
        self._recorder = Recorder(folder.path / LEDGER, ledger_records)
        self._round_states = RoundStates(folder.path, config.snapshots.budget)

    @property
    def torn_bytes(self) -> int:
        """Number of bytes of an unfinished last line that was moved out of the ledger."""
        return self._recorder.ledger.torn

    @property
    def rounds(self) -> int:
        """Number of recorded rounds, without those that were rolled back."""
        return self._recorder.rounds

    def record(self, content: Mapping[str, Any]) -> None:
        """Append a record to the ledger, or compare it with the one that an earlier process wrote."""
        self._recorder.record({**content, **self._identity})

    def record_begin(self, tasks: Sequence[str]) -> None:
        """Record the run's start: method, tasks, versions and the untrained parameters."""
        self.record(begin_record(self._config.method, tasks, parameter_digest(self._parameters)))

    def write_checkpoint(self, task: int, step: int, samples: int, method: dict[str, Tensor]) -> None:
        """Write the state from which a resumed run continues."""
        write_state(
            self.folder.path / CHECKPOINT,
            self._state(task, step, samples, method),
            lambda sha256: self.record({"event": "state", "files": {CHECKPOINT: sha256}}),
        )

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json``."""
        latest = {name: row["values"][-1] for name, row in metrics.get("harness", {}).items()}
        harness = {"harness": latest} if latest else {}
        self.record({"event": "measured", "files": {METRICS: metrics_sha256(metrics)}, **harness})
        self.folder.write_metrics(metrics)

    def skip_measured(self) -> None:
        """Skip the record of ``metrics.json``, if an earlier process wrote it together with the file."""
        self._recorder.skip_measured()

    def write_round_state(self, task: int, step: int, samples: int, method: dict[str, Tensor]) -> None:
        """Keep the state after the latest round, for a rollback to it."""
        number = self.rounds
        name = self._round_states.path(number).relative_to(self.folder.path).as_posix()
        self._round_states.write(
            number,
            self._state(task, step, samples, method),
            lambda sha256: self.record({"event": "state", "round": number, "files": {name: sha256}}),
        )

    def publish_task(
        self,
        tasks: Sequence[Task],
        *,
        steps: int,
        samples: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        memory: ReplayMemory,
        validation: ReplayMemory,
        trained: str | None,
    ) -> None:
        """Write a learned task's folder with the current parameters, and record it in the ledger.

        Args:
            tasks: the learned tasks in their order; the last one is published.
            steps, samples: number of inner steps of the task, and of records trained on.
            tensors: file name without suffix -> the tensors of the file; see :class:`RunFolder`.
            memory, validation: records of the learned tasks.
            trained: digest of the parameters from which training continues, if an average is published.
        """
        index, name = len(tasks) - 1, tasks[-1].name
        self.folder.publish_task(
            index,
            name,
            save_model=partial(self._save_model, tasks),
            tensors=tensors,
            memory=memory,
            validation=validation,
            summary={"task": name, "steps": steps, "samples": samples},
        )
        self.record(
            {
                "event": "task",
                "task": name,
                "steps": steps,
                "samples": samples,
                "memory": {task: list(ids) for task, ids in memory.ids.items()},
                "files": self.folder.digests(index, name),
                "parameters": {"after": parameter_digest(self._parameters)}
                | ({} if trained is None else {"trained": trained}),
            }
        )

    def _save_model(self, tasks: Sequence[Task], folder: Path) -> None:
        """Save adapter or model with the tokenizer, as ``from_pretrained`` reads them, and the model card."""
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        write_card(folder, self._config, tasks)
        settings = folder / "adapter_config.json"
        if settings.exists():
            # peft writes names of modules from sets, whose order changes from process to process.
            content = json.loads(settings.read_text(encoding="utf-8"))
            for key in ("target_modules", "exclude_modules"):
                if isinstance(content.get(key), list):
                    content[key].sort()
            settings.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")

    def _state(self, task: int, step: int, samples: int, method: dict[str, Tensor]) -> RunState:
        parameters = {name: parameter.detach() for name, parameter in self._parameters.items()}
        # The number includes the record of this state.
        return RunState(task, step, samples, self._recorder.position + 1, parameters, method)
