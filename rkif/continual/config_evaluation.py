"""The settings of evaluation: after each task, and by the gate."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rkif.continual.config_base import Settings
from rkif.continual.spelling import did_you_mean
from rkif.continual.user_metrics import metric_name
from rkif.gate import Criterion, Gate

GATE_METRICS = ("accuracy", "memory_loss")
GATE_RECORDS = 16


class HarnessSettings(Settings):
    """Tasks of lm-eval, measured with the run's own tasks; see :mod:`rkif.continual.evaluation.harness`.

    ``include_path``: a folder with further tasks. ``limit``: maximum number of documents per task.
    ``num_fewshot``: number of examples in a prompt; by default that of the task. ``metrics``: task -> metric;
    by default the first that the task lists.
    """

    tasks: list[str] = Field(min_length=1)
    include_path: str | None = None
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)
    metrics: dict[str, str] = Field({})

    @model_validator(mode="after")
    def _names(self) -> HarnessSettings:
        for name in self.tasks:
            if self.tasks.count(name) > 1 or name in GATE_METRICS:
                raise ValueError(f"tasks: {name!r} is the name of another task or criterion")
        for name in self.metrics:
            if name not in self.tasks:
                raise ValueError(f"metrics: {name!r} is not among tasks{did_you_mean(name, self.tasks)}")
        return self


class EvaluationSettings(Settings):
    """The source of answers: the most likely label, or generated text. Both are scored by exact match.

    ``batch_size`` applies to lm-eval as well. ``harness``: further tasks, which are not learned.
    """

    scoring: Literal["likelihood", "generation"] = "likelihood"
    batch_size: int = Field(16, ge=1)
    max_new_tokens: int = Field(16, ge=1)
    harness: HarnessSettings | None = None


def _is_accuracy(criterion: Any) -> bool:
    return isinstance(criterion, dict) and criterion.get("metric") == "accuracy"


class CriterionSettings(Settings):
    """A metric that a fusion must not make worse.

    ``metric`` is "memory_loss", "accuracy", a task of ``evaluation.harness``, or a ``module:function`` as
    in ``metrics``. ``higher_is_better``: by default a lower loss is better, lm-eval decides for its tasks,
    and a higher value of the others is better. ``tolerance``: by how much one fusion may worsen the value; by
    default two records of a task for accuracy, and 0 for others. ``floor``: the worst acceptable value, which
    is a ceiling if lower is better.
    """

    metric: str
    higher_is_better: bool | None = None
    floor: float | None = None
    tolerance: float | None = 0.0

    @property
    def name(self) -> str:
        return metric_name(self.metric)

    @property
    def is_function(self) -> bool:
        return ":" in self.metric

    @property
    def of_harness(self) -> bool:
        """Whether it is a task of lm-eval."""
        return not self.is_function and self.metric not in GATE_METRICS

    @field_validator("metric")
    @classmethod
    def _function(cls, value: str) -> str:
        if ":" in value:
            require_function(value)
        return value


class GateSettings(Settings):
    """The gate that checks a round's fusion before it is kept; see :mod:`rkif.gate`.

    ``records``: number of records of each earlier task that a measurement uses. The loss uses memory records.
    Accuracy and the user's metrics use training records that are set aside before the task is learned. For a
    task of lm-eval, the last documents are set aside. ``budget``: maximum number of records that all
    measurements during a task may use.
    """

    criteria: list[CriterionSettings] = Field(min_length=1)
    records: int = Field(GATE_RECORDS, ge=1)
    ladder: list[float] = Field([0.5, 0.25])
    otherwise: Literal["undo", "stop"] = "undo"
    every: int = Field(1, ge=1)
    budget: int | None = Field(None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _accuracy_tolerance(cls, value: Any) -> Any:
        """By default accuracy may fall by two records of a task, because single answers change by chance."""
        records = value.get("records", GATE_RECORDS) if isinstance(value, dict) else None
        if not isinstance(records, int) or records < 1 or not isinstance(value.get("criteria"), list):
            return value  # the validation of the fields refuses it
        criteria = [
            {"tolerance": 200 / records, **one} if _is_accuracy(one) else one for one in value["criteria"]
        ]
        return {**value, "criteria": criteria}

    @model_validator(mode="after")
    def _possible(self) -> GateSettings:
        criteria = [
            Criterion(criterion.name, lambda: 0.0, floor=criterion.floor, tolerance=criterion.tolerance)
            for criterion in self.criteria
        ]
        Gate(criteria, ladder=tuple(self.ladder))
        return self

    @property
    def validates(self) -> bool:
        """Whether training records must be set aside."""
        return any(criterion.metric == "accuracy" or criterion.is_function for criterion in self.criteria)


def require_function(spec: str) -> None:
    """Raise ValueError unless ``spec`` has the form ``module:function``."""
    if not re.fullmatch(r".+:[A-Za-z_]\w*", spec):
        raise ValueError(f"expected module:function, got {spec!r}")
