"""Recurrent knowledge identification and fusion (Feng et al., ACL 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rkif.continual.evaluation.criteria import GateStopped, make_gate
from rkif.continual.evaluation.history import RoundHistory
from rkif.continual.methods.rounds import Rounds
from rkif.continual.methods.sequential import Context
from rkif.fuser import Fuser
from rkif.fuser.round_values import round_values
from rkif.fuser.state_names import flatten, section
from rkif.fusion import FusionReport
from rkif.ledger.records import movement, parameter_digest, report_values


class RecurrentKIF(Rounds):
    """Prunes and merges the two task vectors of a round by the importance that each learner measures."""

    logs_rounds = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.history = RoundHistory()
        settings = context.config.gate
        gate = None
        if settings is not None and self.has_memory:
            gate = make_gate(
                settings,
                context.config,
                context.model,
                context.objective,
                context.tasks,
                context.memory,
                context.validation,
                context.harness,
            )
        self._gate = gate
        self.fuser = Fuser(context.model, self.fusion, gate=gate) if self.has_memory else None
        self._steps_observe = self.fuser is not None and all(
            learner.follow(self.fuser) for learner in (self.inner, self.outer)
        )
        # With a gate: the optimizers' moments at the start of the round, to restore if the gate undoes it.
        self.start: dict[str, Tensor] | None = None if gate is None else {}

    def begin_round(self) -> None:
        if self.start is not None:
            self.start = {name: tensor.clone() for name, tensor in self.moments().items()}

    def observe(self) -> None:
        assert self.fuser is not None
        if not self._steps_observe:
            self.fuser.observe()

    def begin_outer(self) -> None:
        assert self.fuser is not None
        self.fuser.begin_outer()

    def end_round(self, steps: range) -> None:
        assert self.fuser is not None
        base = self.fuser.base()
        inner, outer = self.fuser.scores("inner"), self.fuser.scores("outer")
        report = self.fuser.fuse()
        self.history.add(inner, outer, report)
        self.context.record(self._round_record(steps, base, report))
        self.context.track(round_values(report, self._gate))
        if report.gate is not None and report.gate.factor == 0:
            assert self.start is not None
            self.load_moments(self.start)
            if report.gate.verdict == "stop":
                where = f"round {self.fuser.round} of task {self.context.task.name!r}"
                reasons = "; ".join(report.gate.attempts[-1].objections)
                raise GateStopped(f"the gate stopped the run in {where}: {reasons}")

    def _round_record(self, steps: range, base: Mapping[str, Tensor], report: FusionReport) -> dict[str, Any]:
        """The ledger record of the round with these inner steps."""
        after = {name: parameter.detach() for name, parameter in self.inner.parameters.items()}
        moved, rounds = movement(base, after), self.history.tensors()
        counts, importance = section(rounds, "counts"), section(rounds, "importance")
        modules = {
            name: {
                "numel": base[name].numel(),
                "counts": counts[name][-1].tolist(),
                "importance": importance[name][-1].tolist(),
                "moved": moved[name],
            }
            for name in base
        }
        inner, outer = self.round_batches(steps)
        return {
            "event": "round",
            "task": self.context.task.name,
            "steps": [steps.start, steps.stop],
            "data": {
                "inner": [record.id for _, record in inner],
                "outer": [f"{record.task}/{record.id}" for _, record in outer],
            },
            **report_values(report),
            "modules": modules,
            "parameters": {"before": parameter_digest(base), "after": parameter_digest(after)},
        }

    def tensors(self) -> dict[str, Tensor]:
        state = {} if self.fuser is None else self.fuser.state_dict()
        rounds = self.history.tensors()
        return super().tensors() | flatten({"fuser": state, "rounds": rounds, "start": self.start or {}})

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        if self.fuser is not None:
            self.fuser.load_state_dict(section(tensors, "fuser"))
            self.history.load_tensors(section(tensors, "rounds"))
        if self.start is not None:
            self.start = section(tensors, "start")

    def rounds(self) -> dict[str, Tensor]:
        return self.history.tensors()

    def importance(self) -> dict[str, Tensor]:
        return {} if self.fuser is None else self.fuser.scores("outer")
