"""The gate: a fusion is kept only if the user's metrics do not get worse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from rkif_kernels import require_choice, require_number, require_whole_number

Verdict = Literal["keep", "damp", "undo", "stop", "unchecked"]


@dataclass(frozen=True)
class Criterion:
    """A metric that a fusion must not make worse: the loss on the memory, or a metric on held-out records.

    A value after a fusion that is not finite is never acceptable. If the value before it is NaN, no
    worsening can be measured: the fusion is acceptable only if ``tolerance`` is None. An infinite value
    before it is compared like other numbers, so a fusion that makes it finite may be an improvement.

    Attributes:
        name: its name in reports.
        evaluate: measures the model in its current state, and must not change it. It returns a number.
        higher_is_better: whether the higher of two values is the better one.
        floor: the worst acceptable value; a ceiling where lower is better. None for no limit.
        tolerance: by how much one fusion may worsen the value, at least 0. The default 0 allows no worsening
            at all; a metric on few records needs more, because its values scatter. None for any amount.
        samples: number of records that one measurement uses, for the gate's budget.

    Raises:
        ValueError, TypeError: a setting is outside its range, or neither floor nor tolerance is given; the
            message names the setting and the criterion.
    """

    name: str
    evaluate: Callable[[], float]
    higher_is_better: bool = True
    floor: float | None = None
    tolerance: float | None = 0.0
    samples: int = 0

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise TypeError(f"evaluate of criterion {self.name!r} must be callable; got {self.evaluate!r}")
        if self.floor is None and self.tolerance is None:
            raise ValueError(
                f"criterion {self.name!r} has neither floor nor tolerance: every value would pass"
            )
        if self.floor is not None:
            require_number(f"floor of criterion {self.name!r}", self.floor)
        if self.tolerance is not None:
            require_number(f"tolerance of criterion {self.name!r}", self.tolerance, minimum=0)
        require_whole_number(f"samples of criterion {self.name!r}", self.samples, minimum=0)

    def measure(self) -> float:
        """The value now.

        Raises:
            TypeError: ``evaluate`` does not return a number.
        """
        value: Any = self.evaluate()
        try:
            return float(value)
        except (TypeError, ValueError):
            raise TypeError(
                f"evaluate of criterion {self.name!r} must return a number; got {value!r}"
            ) from None

    def objection(self, before: float, after: float) -> str | None:
        """The reason why a value after a fusion is not acceptable; None if it is acceptable.

        Args:
            before: the value before the fusion. If it is NaN, a tolerance cannot be kept.
            after: the value after it. If it is not finite, it is not acceptable.
        """
        if not math.isfinite(after):
            return f"{self.name} is not {'a number' if math.isnan(after) else 'finite'}"
        sign = 1.0 if self.higher_is_better else -1.0
        if self.floor is not None and sign * after < sign * self.floor:
            side = "below" if self.higher_is_better else "above"
            return f"{self.name} {after:.6g} is {side} {self.floor:.6g}"
        worse = sign * (before - after)
        if self.tolerance is not None and math.isnan(before):
            return f"{self.name} was not a number before the fusion"
        if self.tolerance is not None and worse > self.tolerance:
            return f"{self.name} went from {before:.6g} to {after:.6g}; tolerated: {self.tolerance:.6g}"
        return None


def without_values(objection: str) -> str:
    """An objection without the measured values, so that objections of one kind can be counted."""
    text = re.sub(r" \S+ is below (\S+)$", r" below floor \1", objection)
    text = re.sub(r" \S+ is above (\S+)$", r" above ceiling \1", text)
    return re.sub(r" went from \S+ to \S+; tolerated: (\S+)$", r" worse by more than \1", text)


@dataclass(frozen=True)
class Gate:
    """The fusions to check, the criteria, and the consequence if a fusion fails.

    Attributes:
        criteria: the metrics; a fusion passes if all of them accept it.
        ladder: fractions of the step to try, in this order, if the whole step fails; each in (0, 1) and
            smaller than the previous one.
        otherwise: what to do if every fraction fails. "undo": the parameters return to the round's base, and
            training continues. "stop": the same, and training ends.
        every: check every n-th round.
        budget: maximum number of records that all measurements together may use; None for no limit. A round
            whose check might exceed it is not checked.

    Raises:
        TypeError, ValueError: a setting is out of range, or two criteria have the same name.
    """

    criteria: Sequence[Criterion]
    ladder: tuple[float, ...] = (0.5, 0.25)
    otherwise: Literal["undo", "stop"] = "undo"
    every: int = 1
    budget: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.criteria, Sequence):
            raise TypeError(f"criteria must be a list of Criterion; got {type(self.criteria).__name__}")
        for index, criterion in enumerate(self.criteria):
            if not isinstance(criterion, Criterion):
                raise TypeError(f"criteria[{index}] must be a Criterion; got {criterion!r}")
        if not isinstance(self.ladder, Sequence):
            raise TypeError(f"ladder must be a tuple of numbers; got {self.ladder!r}")
        for index, fraction in enumerate(self.ladder):
            require_number(f"ladder[{index}]", fraction)
        names = [criterion.name for criterion in self.criteria]
        if not names:
            raise ValueError("a gate needs at least one criterion")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two criteria are named {name!r}")
        steps = (1.0, *self.ladder)
        if any(not 0 < second < first for first, second in pairwise(steps)):
            raise ValueError(f"ladder must fall from below 1 to above 0; got {self.ladder}")
        require_choice("otherwise", self.otherwise, ["undo", "stop"])
        require_whole_number("every", self.every, minimum=1)
        if self.budget is not None:
            require_whole_number("budget", self.budget, minimum=0)

    @property
    def names(self) -> list[str]:
        return [criterion.name for criterion in self.criteria]

    @property
    def settings(self) -> tuple[Any, ...]:
        """Everything on which a verdict depends, except the measurement of the values."""
        settings = [replace(criterion, evaluate=float) for criterion in self.criteria]
        return settings, self.ladder, self.otherwise, self.every, self.budget

    @property
    def samples(self) -> int:
        """Number of records that one measurement of all criteria uses."""
        return sum(criterion.samples for criterion in self.criteria)


@dataclass(frozen=True)
class Attempt:
    """A fraction of a fusion's step, the values measured after it, and the criteria's objections."""

    factor: float
    figures: dict[str, float]
    objections: list[str]


@dataclass(frozen=True)
class GateReport:
    """The gate's decision on a round.

    Attributes:
        verdict: "keep" (the whole step), "damp" (the fraction ``factor`` of it), "undo", "stop" (undone as
            well), or "unchecked".
        factor: the fraction of the step that was taken: 1, one of the ladder's, or 0.
        before: values at the round's base; empty if nothing was checked.
        attempts: the fractions that were tried, in order.
        samples: number of records that the measurements used.
    """

    verdict: Verdict
    factor: float
    before: dict[str, float] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    samples: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values for JSON; values that are not finite become strings."""
        return {
            "verdict": self.verdict,
            "factor": self.factor,
            "before": _plain(self.before),
            "attempts": [
                {
                    "factor": attempt.factor,
                    "figures": _plain(attempt.figures),
                    "objections": list(attempt.objections),
                }
                for attempt in self.attempts
            ],
            "samples": self.samples,
        }


class Gatekeeper:
    """Applies a gate round after round.

    Args:
        gate: the settings.
        mean: averages values over all processes, so that all of them reach the same verdict.

    Attributes:
        gate: the settings.
        samples: number of records that the measurements have used so far.
    """

    def __init__(self, gate: Gate, mean: Callable[[list[float]], list[float]] = list) -> None:
        self.gate = gate
        self._mean = mean
        self.samples = 0
        self._rounds = 0
        # Values at the next round's base; known only if the last round was checked.
        self._known: dict[str, float] | None = None

    def judge(self, take: Callable[[float], None]) -> GateReport:
        """Decide on a round's step.

        Args:
            take: sets the parameters to a fraction of the step: 1 is the fusion, 0 is the round's base, bit
                for bit. The last call is with the verdict's factor.
        """
        gate, spent = self.gate, self.samples
        self._rounds += 1
        maximum = gate.samples * (1 + len(gate.ladder) + (self._known is None))
        if self._rounds % gate.every or (gate.budget is not None and spent + maximum > gate.budget):
            self._known = None
            take(1.0)
            return GateReport("unchecked", 1.0)
        if self._known is None:
            take(0.0)
            self._known = self._measure()
        before, attempts = self._known, []
        for factor in (1.0, *gate.ladder):
            take(factor)
            values = self._measure()
            objections = [
                objection
                for criterion in gate.criteria
                if (objection := criterion.objection(before[criterion.name], values[criterion.name]))
            ]
            attempts.append(Attempt(factor, values, objections))
            if not objections:
                self._known = values
                verdict: Verdict = "keep" if factor == 1 else "damp"
                return GateReport(verdict, factor, before, attempts, self.samples - spent)
        take(0.0)
        return GateReport(gate.otherwise, 0.0, before, attempts, self.samples - spent)

    def forget(self) -> None:
        """Discard the known values, because something else has changed the parameters."""
        self._known = None

    def _measure(self) -> dict[str, float]:
        self.samples += self.gate.samples
        values = [criterion.measure() for criterion in self.gate.criteria]
        return dict(zip(self.gate.names, self._mean(values), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """The state: name -> tensor."""
        known = self._known or {}
        return {
            "counters": torch.tensor([self._rounds, self.samples]),
            "known": torch.tensor([known[name] for name in self.gate.names if known], dtype=torch.float64),
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that :meth:`tensors` returned.

        Raises:
            ValueError: it is the state of a gate with another number of criteria.
        """
        known = tensors["known"].tolist()
        if known and len(known) != len(self.gate.criteria):
            raise ValueError(
                f"the state is of a gate with {len(known)} criteria, not {len(self.gate.criteria)}"
            )
        self._rounds, self.samples = tensors["counters"].tolist()
        self._known = dict(zip(self.gate.names, known, strict=True)) if known else None


def _plain(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
