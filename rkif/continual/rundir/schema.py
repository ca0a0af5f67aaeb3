"""The keys and types in a run's files. All content is validated before use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rkif.checkpoint.manifest import FileContent, FileName, Sha256
from rkif.continual.tasks.records import require_task_name
from rkif.files import validated
from rkif.gate import Verdict
from rkif.ledger.chain import LedgerError
from rkif_kernels import CASES

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = float | Literal["nan", "inf", "-inf"]  # JSON has no names for the last three
TaskName = Annotated[str, AfterValidator(require_task_name)]


class TaskDigests(FileContent):
    """SHA-256 of a task's records."""

    train: Sha256
    dev: Sha256


class MetricMatrix(FileContent):
    """A user's metric: a row per task, a column per task learned."""

    initial: list[float]
    matrix: list[list[float]]


class HarnessRow(FileContent):
    """A task of lm-eval: its value before training and after each task."""

    metric: str
    higher_is_better: bool
    documents: Count
    requests: Sha256
    values: list[float]


class Metrics(FileContent):
    """``metrics.json``; runs without tasks of lm-eval have no ``harness``."""

    method: str
    split: str
    tasks: Annotated[list[TaskName], Field(min_length=1)]
    data: dict[TaskName, TaskDigests]
    records: list[Count]
    trainable: Count
    initial: list[float]
    accuracy: list[list[float]]
    metrics: dict[str, MetricMatrix]
    op: float | None
    bwt: float | None
    fwt: float | None
    steps: Count
    samples: Count
    harness: dict[str, HarnessRow] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _shapes(self) -> Metrics:
        tasks = len(self.tasks)
        if len(set(self.tasks)) < tasks:
            raise ValueError("tasks: a task is listed twice")
        if set(self.data) != set(self.tasks):
            raise ValueError("data: its tasks are not those of 'tasks'")
        if len(self.records) != tasks:
            raise ValueError(f"records: it has {len(self.records)} entries for {tasks} tasks")
        if len(self.initial) not in (0, tasks):
            raise ValueError(f"initial: it has {len(self.initial)} entries for {tasks} tasks")
        matrices = {"accuracy": (self.initial, self.accuracy)}
        matrices |= {f"metrics.{name}": (one.initial, one.matrix) for name, one in self.metrics.items()}
        columns = len(self.accuracy[0]) if self.accuracy else 0
        if columns > (tasks if self.initial else 0):
            raise ValueError(f"accuracy: it has {columns} columns for {tasks} tasks")
        for key, (initial, matrix) in matrices.items():
            if len(initial) != len(self.initial):
                raise ValueError(f"{key}: its initial values are not one for each task")
            if [len(row) for row in matrix] != [columns] * tasks:
                raise ValueError(f"{key}: it must be a matrix of {tasks} rows and {columns} columns")
        measured = columns + 1 if self.initial else 0
        for name, row in self.harness.items():
            if len(row.values) != measured:
                raise ValueError(f"harness.{name}.values: it has {len(row.values)} values, not {measured}")
        return self


class TaskSummary(FileContent):
    """``task.json``."""

    task: TaskName
    steps: Count
    samples: Count


class StateHeader(FileContent):
    """The metadata of a state's file; see :class:`rkif.continual.rundir.state.RunState`.

    ``same``: name of a tensor -> name of the stored tensor that equals it.
    """

    task: Count
    step: Count
    samples: Count
    ledger_records: Count
    same: dict[str, str]


class Record(BaseModel):
    """The keys of every ledger record. Further keys are allowed."""

    model_config = ConfigDict(strict=True, frozen=True)

    time: str | None = None
    config: Sha256 | None = None
    seed: int | None = None


class End(BaseModel):
    """Digest of the parameters after the recorded event."""

    model_config = Record.model_config

    after: Sha256


class TaskEnd(End):
    """Digests of the published parameters and, if those are an average, of the trained ones."""

    trained: Sha256 | None = None


class Change(End):
    """Digests of the parameters before and after."""

    before: Sha256 | None


class Begin(Record):
    """``format``: version of the run's files; older ledgers have none. A training loop has no tasks."""

    format: int | None = None
    method: str
    tasks: list[TaskName]
    versions: dict[str, str]
    config: Sha256
    time: str
    parameters: End


class RoundData(FileContent):
    """The ids of the records on which each learner trained."""

    inner: list[str]
    outer: list[str]


class Module(FileContent):
    """The effect of a round on one parameter."""

    numel: Count
    counts: Annotated[list[Count], Field(min_length=len(CASES), max_length=len(CASES))]
    importance: Annotated[list[float], Field(min_length=2, max_length=2)]
    moved: float


class GateAttempt(FileContent):
    factor: float
    figures: dict[str, Number]
    objections: list[str]


class GateVerdict(FileContent):
    """See :class:`rkif.gate.GateReport`."""

    verdict: Verdict
    factor: float
    before: dict[str, Number]
    attempts: list[GateAttempt]
    samples: Count

    @model_validator(mode="after")
    def _measured(self) -> GateVerdict:
        if self.verdict in ("damp", "undo", "stop") and not self.attempts:
            raise ValueError("attempts: the list is empty")
        if any(set(self.before) - set(attempt.figures) for attempt in self.attempts):
            raise ValueError("attempts: one lacks a value of 'before'")
        return self


class Round(Record):
    round: Annotated[int, Field(ge=1)]
    task: TaskName | None
    steps: Annotated[list[Count], Field(min_length=2, max_length=2)]
    data: RoundData | None
    numel: Count
    thresholds: Annotated[list[Number | dict[str, Number]], Field(min_length=2, max_length=2)]
    counts: dict[str, Count]
    norms: dict[str, Number]
    applied: bool
    gate: GateVerdict | None
    modules: Annotated[dict[str, Module], Field(min_length=1)]
    parameters: Change


class Learned(Record):
    task: TaskName
    steps: Count
    samples: Count
    memory: dict[TaskName, list[str]]
    files: dict[FileName, Sha256]
    parameters: TaskEnd


class Rollback(Record):
    to: Count
    task: TaskName | None
    finished: Count
    files: dict[FileName, Sha256] | None = None  # older ledgers have none
    parameters: Change


class Saved(Record):
    """Files of the run that were written."""

    files: Annotated[dict[FileName, Sha256], Field(min_length=1)]


class Measured(Saved):
    """``metrics.json`` was written; ``harness``: the latest value of each task of lm-eval."""

    harness: dict[str, float] = Field(default_factory=dict)


RECORDS: dict[str, type[Record]] = {
    "begin": Begin,
    "round": Round,
    "task": Learned,
    "rollback": Rollback,
    "state": Saved,
    "measured": Measured,
}


def require_records(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Check that records are valid for a run, in their content and their order.

    Raises:
        LedgerError: a record is not; it names the first one and its key.
    """
    following: list[str | None] = []
    modules: list[str] = []
    learned = rounds = 0
    for seq, record in enumerate(records):
        where, event = f"{path}: record {seq}", record.get("event")
        try:
            if not isinstance(event, str) or event not in RECORDS:
                raise ValueError(f"event: it must be one of {', '.join(RECORDS)}; got {event!r}")
            validated(RECORDS[event], record, where)
            if (event == "begin") != (seq == 0):
                raise ValueError("event: a ledger has one 'begin', its first record")
            if event == "begin":
                following = record["tasks"] or [None]
            elif event in ("round", "task") and [record["task"]] != following[learned : learned + 1]:
                raise ValueError(f"task: {record['task']!r} is not the task that follows")
            if event == "round":
                modules = modules or sorted(record["modules"])
                if record["round"] != rounds + 1:
                    raise ValueError(f"round: {record['round']} does not follow round {rounds}")
                if sorted(record["modules"]) != modules:
                    raise ValueError("modules: they are not those of the rounds before")
                rounds += 1
            elif event == "task":
                learned += 1
            elif event == "rollback":
                if record["to"] > rounds or record["finished"] > learned:
                    raise ValueError(f"to, finished: there are {rounds} rounds and {learned} learned tasks")
                rounds, learned = record["to"], record["finished"]
        except ValueError as error:
            message = str(error)
            raise LedgerError(message if where in message else f"{where} is damaged: {message}") from None
