"""The recurrent method inside a training loop of one's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from rkif.config import FusionConfig, merge_weights
from rkif.fusion import FusionReport, Thresholds, fuse_lists
from rkif.gate import Gate, Gatekeeper
from rkif.importance import Importance
from rkif.params import trainable_parameters
from rkif_kernels.types import CASES

Learner = Literal["inner", "outer"]


class Fuser:
    """Follows an inner and an outer learner over a model's trainable parameters and fuses what they did.

    A round starts from ``base``, the parameters when the fuser was made or last fused::

        for batch in new_task:                                  # inner learner, Q steps
            loss.backward(); fuser.observe(); optimizer.step(); optimizer.zero_grad()
        with fuser.outer():                                     # outer learner, M steps; leaving fuses
            for batch in memory:
                loss.backward(); fuser.observe(); outer_optimizer.step(); outer_optimizer.zero_grad()

    Gradients must be those the step will use: accumulated, unscaled, clipped. Memory beside the model: a copy
    of the parameters from the start, a second one in the outer phase, a third while they are fused; and S,
    perhaps U, for either learner.

    Args:
        parameters: a module, or an iterable of (name, parameter); the trainable ones take part.
        config: settings; the default is :class:`FusionConfig`'s.
        gate: what every fusion is checked by before it is kept; see :mod:`rkif.gate`. After a verdict of
            "undo" or "stop" parameters and importance are as at the start of the round (which takes a copy
            of the importance); the optimizers' state is the caller's.

    Attributes:
        config: the settings.
        phase: "inner" or "outer", whose turn it is.
        round: rounds that have ended, by a fusion or a rollback.
        inner_observed, outer_observed: calls of :meth:`observe` in this round.
        last_report: report of the last fusion, or None.

    Raises:
        TypeError, ValueError: nothing is trainable, parameters on several devices, unsupported dtypes.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
        config: FusionConfig | None = None,
        *,
        gate: Gate | None = None,
    ) -> None:
        self.config = FusionConfig() if config is None else config
        if not isinstance(self.config, FusionConfig):
            raise TypeError(f"config must be a FusionConfig; got {type(config).__name__}")
        if gate is not None and not isinstance(gate, Gate):
            raise TypeError(f"gate must be a Gate; got {type(gate).__name__}")
        self._gatekeeper = None if gate is None else Gatekeeper(gate)
        self._parameters = trainable_parameters(parameters)
        self._importance: dict[Learner, Importance] = {
            "inner": Importance(self._parameters, self.config),
            "outer": Importance(self._parameters, self.config),
        }
        self._base = [parameter.detach().clone() for parameter in self._parameters.values()]
        self._inner: list[Tensor] = []  # parameters where the inner learner stopped; only in the outer phase
        # Importance at the start of the round, which a gate may return to; empty without one.
        self._start = {name: t.clone() for name, t in self._known_importance().items() if gate is not None}
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=self._base[0].device)
        self._with_gradient: set[str] = set()
        self._observed: dict[Learner, int] = {"inner": 0, "outer": 0}
        self.phase: Learner = "inner"
        self.round = 0
        self.last_report: FusionReport | None = None

    @property
    def inner_observed(self) -> int:
        return self._observed["inner"]

    @property
    def outer_observed(self) -> int:
        return self._observed["outer"]

    def observe(self) -> None:
        """Take the importance of every parameter from ``parameter.grad``, before the optimizer's step.

        It goes to the learner whose phase it is. A parameter without a gradient counts as one with a zero
        gradient. Elements with a non-finite importance are left as they were, and counted.
        """
        gradients = [parameter.grad for parameter in self._parameters.values()]
        if self.phase == "inner" or self.config.refresh_outer or self.round == 0:
            self._importance[self.phase].update(list(self._parameters.values()), gradients, self._nonfinite)
        self._observed[self.phase] += 1
        if len(self._with_gradient) < len(self._parameters):
            self._with_gradient.update(
                name
                for name, gradient in zip(self._parameters, gradients, strict=True)
                if gradient is not None
            )

    def begin_outer(self) -> None:
        """End the inner phase: what the parameters are now is what the inner learner made of them.

        Raises:
            RuntimeError: the outer phase has begun already.
        """
        if self.phase == "outer":
            raise RuntimeError(
                "begin_outer() was called twice in a round; end the round with fuse() or rollback()"
            )
        with torch.inference_mode(False):
            self._inner = [parameter.detach().clone() for parameter in self._parameters.values()]
        self.phase = "outer"

    def fuse(self) -> FusionReport:
        """End the round: replace the parameters by the fusion, which is the next round's ``base``.

        Raises:
            RuntimeError: not in the outer phase, a learner was never observed, or a non-finite importance
                was seen and the config says "raise".
            ValueError: a parameter had no gradient in any step of the round.
                Parameters, importance and the round are as before then: call :meth:`rollback` to give
                the round up.
        """
        if self.phase != "outer":
            raise RuntimeError(
                "fuse() was called in the inner phase; call begin_outer() first, or use `with outer()`"
            )
        for learner, observed in self._observed.items():
            if observed == 0:
                raise RuntimeError(f"observe() was never called for the {learner} learner in this round")
        for name in self._parameters:
            if name not in self._with_gradient:
                raise ValueError(f"parameter {name!r} had no gradient in any observe() of this round")
        nonfinite = int(self._nonfinite)
        if nonfinite and self.config.nonfinite == "raise":
            raise RuntimeError(
                f"{nonfinite} elements had a non-finite importance |w*g| in this round (NaN or infinite "
                "gradients or weights); nothing was fused. rollback() returns to the round's start"
            )
        report = self._refused(nonfinite) if nonfinite else self._fused()
        self._end_round()
        self.last_report = report
        return report

    @contextmanager
    def outer(self) -> Iterator[Fuser]:
        """The outer phase as a block; leaving it fuses.

        An exception in the block leaves the round as it is.
        """
        self.begin_outer()
        yield self
        self.fuse()

    def rollback(self) -> None:
        """Give the round up: the parameters return to ``base``, bit for bit, and a new round begins.

        What the outer learner has observed stays in its importance, as after a fusion, unless the config
        clears it.
        """
        self._return_to_base()
        self._end_round()

    def scores(self, learner: Learner) -> dict[str, Tensor]:
        """Name -> importance scores so far: float32 copies of the parameters' shapes.

        Raises:
            ValueError: ``learner`` is neither "inner" nor "outer".
        """
        if learner not in self._importance:
            raise ValueError(f"learner must be 'inner' or 'outer'; got {learner!r}")
        return self._importance[learner].score_copies()

    def base(self) -> dict[str, Tensor]:
        """Name -> the parameters at the start of the round, as copies."""
        return {name: t.clone() for name, t in zip(self._parameters, self._base, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on from here, at any point of a round, beside the parameters themselves.

        Returns:
            A flat dict of tensors that share no memory, as safetensors wants them.
        """
        state = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in self._tensors(with_inner=bool(self._inner)).items()
        }
        if self._gatekeeper is not None:
            state |= {f"gate.{name}": tensor for name, tensor in self._gatekeeper.tensors().items()}
        state["nonfinite"] = self._nonfinite.clone()
        state["phase"] = torch.tensor(["inner", "outer"].index(self.phase))
        state["round"] = torch.tensor(self.round)
        state["inner_observed"] = torch.tensor(self.inner_observed)
        state["outer_observed"] = torch.tensor(self.outer_observed)
        state["with_gradient"] = torch.tensor(
            [name in self._with_gradient for name in sorted(self._parameters)]
        )
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where :meth:`state_dict` was taken. The parameters must be restored by the caller.

        Raises:
            ValueError: other names, shapes or dtypes than this fuser's; nothing has been changed then.
        """
        scalars = {"nonfinite", "phase", "round", "inner_observed", "outer_observed", "with_gradient"}
        gate = {"gate.counters", "gate.known"} if self._gatekeeper is not None else set()
        for name in sorted((scalars | gate) - set(state)):
            raise ValueError(f"the state lacks {name!r}")
        for name in sorted(scalars - {"with_gradient"}):
            number = state[name]
            if number.numel() != 1 or number.is_floating_point() or int(number) < 0:
                raise ValueError(f"state[{name!r}] must be one whole number; got {number!r}")
        in_outer = bool(state["phase"])
        if in_outer:
            inner = [torch.empty_like(base) for base in self._base]
        expected = self._tensors(with_inner=False)
        if in_outer:
            expected |= {f"inner.{name}": t for name, t in zip(self._parameters, inner, strict=True)}
        for name in sorted(set(state) - scalars - gate ^ set(expected)):
            which = "lacks" if name in expected else "has, unlike this fuser,"
            raise ValueError(f"the state {which} {name!r}")
        for name, tensor in expected.items():
            given = state[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise ValueError(
                    f"state[{name!r}] is {given.dtype} {tuple(given.shape)}; "
                    f"this fuser has {tensor.dtype} {tuple(tensor.shape)}"
                )
        if state["with_gradient"].shape != (len(self._parameters),):
            raise ValueError(f"state['with_gradient'] must have {len(self._parameters)} elements")

        if self._gatekeeper is not None:
            stored = {name: state[f"gate.{name}"] for name in ("counters", "known")}
            self._gatekeeper.load_tensors(stored)
        for name, tensor in expected.items():
            tensor.copy_(state[name])
        self._inner = inner if in_outer else []
        self._nonfinite.copy_(state["nonfinite"])
        self.phase = "outer" if in_outer else "inner"
        self.round = int(state["round"])
        self._observed = {"inner": int(state["inner_observed"]), "outer": int(state["outer_observed"])}
        flags = zip(sorted(self._parameters), state["with_gradient"].tolist(), strict=True)
        self._with_gradient = {name for name, flag in flags if flag}

    def _tensors(self, *, with_inner: bool) -> dict[str, Tensor]:
        """The tensors of the state by name, not copies."""
        tensors = {f"base.{name}": t for name, t in zip(self._parameters, self._base, strict=True)}
        if with_inner:
            tensors |= {f"inner.{name}": t for name, t in zip(self._parameters, self._inner, strict=True)}
        return tensors | self._known_importance() | {f"start.{name}": t for name, t in self._start.items()}

    def _known_importance(self) -> dict[str, Tensor]:
        return {
            f"{learner}_importance.{name}": tensor
            for learner, importance in self._importance.items()
            for name, tensor in importance.tensors().items()
        }

    def _fused(self) -> FusionReport:
        parameters = [parameter.detach() for parameter in self._parameters.values()]
        # Into memory of its own, which is the next base: so one pass over memory is enough.
        with torch.inference_mode(False):  # whatever the caller's mode is, later rounds write to it
            fused = [torch.empty_like(base) for base in self._base]
        report = fuse_lists(
            list(self._parameters),
            self._base,
            self._inner,
            parameters,
            self._importance["inner"].scores,
            self._importance["outer"].scores,
            out=fused,
            density=self.config.density,
            weights=merge_weights(self.config.rule),
            scope=self.config.scope,
        )
        if self._gatekeeper is None:
            torch._foreach_copy_(parameters, fused)
            self._base = fused
            return report
        return self._gated(self._gatekeeper, parameters, fused, report)

    def _gated(
        self, gatekeeper: Gatekeeper, parameters: list[Tensor], fused: list[Tensor], report: FusionReport
    ) -> FusionReport:
        """Let the gate decide how much of the step from base to ``fused`` is taken."""

        @torch.no_grad()
        def take(factor: float) -> None:
            for parameter, base, end in zip(parameters, self._base, fused, strict=True):
                if factor in (0.0, 1.0):
                    parameter.copy_(end if factor else base)
                else:
                    start = base.float()
                    parameter.copy_(start + factor * (end.float() - start))

        # The criteria may fail: then nothing has been fused, and the round can be given up.
        outer, state = [parameter.clone() for parameter in parameters], gatekeeper.tensors()
        try:
            verdict = gatekeeper.judge(take)
        except BaseException:
            torch._foreach_copy_(parameters, outer)
            gatekeeper.load_tensors(state)
            raise
        if verdict.factor == 0:
            for name, tensor in self._known_importance().items():
                tensor.copy_(self._start[name])
        moved = [(p.float() - b.float()).norm().double() for p, b in zip(parameters, self._base, strict=True)]
        norms = report.norms | {"update": float(torch.stack(moved).norm())}
        torch._foreach_copy_(fused, parameters)
        self._base = fused
        return replace(report, norms=norms, applied=verdict.factor > 0, gate=verdict)

    @torch.no_grad()
    def _return_to_base(self) -> None:
        for parameter, base in zip(self._parameters.values(), self._base, strict=True):
            parameter.copy_(base)

    def _refused(self, nonfinite: int) -> FusionReport:
        self._return_to_base()
        per_tensor = self.config.scope == "tensor"
        unknown: Thresholds = dict.fromkeys(self._parameters, math.nan) if per_tensor else math.nan
        return FusionReport(
            numel=sum(base.numel() for base in self._base),
            thresholds=(unknown, unknown),
            counts=dict.fromkeys(CASES, 0),
            norms={"inner": math.nan, "outer": math.nan, "update": 0.0},
            nonfinite=nonfinite,
            applied=False,
        )

    def _end_round(self) -> None:
        if self.config.clear_inner:
            self._importance["inner"].clear()
        if self.config.clear_outer:
            self._importance["outer"].clear()
        for name, tensor in self._start.items():
            tensor.copy_(self._known_importance()[name])
        self._inner = []
        self._nonfinite.zero_()
        self._with_gradient.clear()
        self._observed = {"inner": 0, "outer": 0}
        self.phase = "inner"
        self.round += 1
