"""The recurrent method inside a custom training loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from rkif.config import FusionConfig
from rkif.distributed.shards import ShardedParameters
from rkif.fuser.gated_step import KeptImportance, restore, take_gated_step
from rkif.fuser.importance import Importance
from rkif.fuser.observed_steps import Learner, ObservedSteps
from rkif.fuser.outside_graph import outside_graph
from rkif.fuser.parameters import trainable_parameters, unwrapped
from rkif.fuser.round_fusion import (
    fuse_round,
    fusion_plan,
    learner_thresholds,
    require_complete,
    require_inner_phase,
    require_no_capture,
    skip_round,
)
from rkif.fuser.round_ledger import RoundLedger, recorded
from rkif.fuser.snapshot import Snapshot, SnapshotPool
from rkif.fuser.state import load_state, read, state_of, write
from rkif.fuser.watch import ParameterWatch
from rkif.fusion import FusionReport
from rkif.gate import Gate, Gatekeeper


class Fuser:
    """Measures the importance of trainable parameters for two learners, and fuses their task vectors.

    A round starts from ``base``, the parameters at construction or at the end of the last round::

        for batch in new_task:                                  # inner learner, Q steps
            loss.backward(); fuser.observe(); optimizer.step(); optimizer.zero_grad()
        with fuser.outer():                                     # outer learner, M steps; leaving fuses
            for batch in memory:
                loss.backward(); fuser.observe(); outer_optimizer.step(); outer_optimizer.zero_grad()

    Gradients must be those of the optimizer's step: accumulated, unscaled, clipped. Memory in addition to
    the model: one copy of the parameters in the inner phase, two in the outer phase, three during a fusion;
    and S, and U if it is used, of each learner. docs/guide/memory.md lists settings that reduce it.

    Wrapped models (DDP, FSDP2's ``fully_shard``, tensor parallelism, ``torch.compile``) are passed as they
    are. If parameters are sharded over processes, every method except :meth:`observe` must be called by all
    of them; a call that fails on one fails on all, with the cause. See docs/guide/distributed.md.

    Args:
        parameters: a module, or an iterable of (name, parameter); the trainable ones take part. A replaced
            parameter is detected only in a module.
        config: settings; ``FusionConfig()`` by default.
        gate: checks every fusion before it is kept; see :class:`rkif.Gate`. After the verdict "undo" or
            "stop", parameters and importance return to the start of the round, which needs a copy of the
            importance. The caller restores the optimizers.
        ledger: a folder for a record of every round (docs/guide/ledger.md): a new one, or that of a fuser
            whose state is loaded next. A record needs temporary copies of parameters and scores.

    Attributes:
        config: the settings.
        parameters: name -> trainable parameter.
        sharded: whether they are sharded over processes.
        phase: "inner" or "outer": the learner that trains now.
        round: number of rounds that have ended, by a fusion or a rollback.
        inner_observed, outer_observed: number of observed steps of each learner in this round.
        last_report: report of the last fusion, or None.

    Raises:
        TypeError, ValueError: nothing is trainable, parameters on several devices, unsupported dtypes, or a
            model that is sharded in a way that hides its gradients (DeepSpeed, FSDP1).
        RuntimeError: settings, parameters or gate differ between ranks; or an adapter is merged into its
            layer (``merge_adapter`` of peft), which the start of each phase and the end of a round check too.
        ValueError, OSError: ``ledger`` has other files or settings, is damaged, or cannot be written.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
        config: FusionConfig | None = None,
        *,
        gate: Gate | None = None,
        ledger: str | os.PathLike[str] | None = None,
    ) -> None:
        self.config = FusionConfig() if config is None else config
        if not isinstance(self.config, FusionConfig):
            raise TypeError(f"config must be a FusionConfig; got {type(config).__name__}")
        if gate is not None and not isinstance(gate, Gate):
            raise TypeError(f"gate must be a Gate; got {type(gate).__name__}")
        self.parameters = trainable_parameters(parameters)
        self._shards = ShardedParameters(parameters, self.parameters)
        module = unwrapped(parameters) if isinstance(parameters, nn.Module) else None
        self._watch = ParameterWatch(module, self.parameters, self._shards.invalidate_gathered)
        self._shards.require_agreement(self.config, None if gate is None else gate.settings)
        self._gatekeeper = None
        if gate is not None:
            self._gatekeeper = Gatekeeper(gate, self._shards.processes.mean)
        parts = self._shards.parts()
        named = dict(zip(self.parameters, parts, strict=True))
        self._importance: dict[Learner, Importance] = {
            "inner": Importance(named, self.config),
            "outer": Importance(named, self.config),
        }
        self._dtypes = [part.dtype for part in parts]
        masters = [torch.promote_types(dtype, torch.float32) for dtype in self._dtypes]
        self._base_dtypes = masters if self.config.fp32_master else self._dtypes
        self._snapshots = SnapshotPool(offload=self.config.offload)
        self._base = self._snapshot(self._base_dtypes, parts)
        self._inner: Snapshot | None = None  # the inner learner's result; only in the outer phase
        self._kept = KeptImportance(self._importance, self.config, gated=gate is not None)
        # Elements with non-finite importance: of the tensors that this process counts, and of its replicas.
        self._nonfinite = torch.zeros(2, dtype=torch.int64, device=parts[0].device)
        self._counters = torch.split(self._nonfinite, 1)
        self._plan = fusion_plan(self.config, list(self.parameters))
        self._steps = ObservedSteps(parts[0].device)
        self._outer_settled = False  # refresh_outer=False: whether a fusion has used the outer importance
        self._observer: int | None = None  # id of the observer of this phase
        self.phase: Learner = "inner"
        self.round = 0
        self.last_report: FusionReport | None = None
        self._ledger = None if ledger is None else RoundLedger(Path(ledger), self)

    @property
    def sharded(self) -> bool:
        return self._shards.sharded

    @property
    def inner_observed(self) -> int:
        self._steps.add_replayed()
        return self._steps.counts["inner"]

    @property
    def outer_observed(self) -> int:
        self._steps.add_replayed()
        return self._steps.counts["outer"]

    @outside_graph
    def observe(self) -> None:
        """Update the importance of every parameter from ``parameter.grad``, before the optimizer's step.

        The importance is that of the current phase's learner. A missing gradient counts as zero. Elements
        with non-finite importance are not updated; they are counted.

        Raises:
            RuntimeError: an optimizer with this fuser observes in this phase; no parameter has a gradient;
                or the model has replaced a parameter since the fuser was made.
        """
        self.observe_with(self, Importance.update)

    def observe_with(self, observer: object, update: Callable[..., None]) -> None:
        """As :meth:`observe`, for an optimizer whose step also updates the importance.

        Args:
            observer: the optimizer. A phase has one observer, because two would count every step twice.
            update: called like :meth:`Importance.update`, in its place; it may write to the parameters.

        Raises:
            RuntimeError: another observer has observed in this phase; or as in :meth:`observe`.
        """
        if self._observer not in (None, id(observer)):
            raise RuntimeError(
                f"this {type(observer).__name__} is the second observer of this {self.phase} phase: steps "
                "would count twice; call either observe(), or the step() of one optimizer that has this fuser"
            )
        self._watch.require_held(phase_begins=self._observer is None)
        gradients = self._shards.gradients()
        if all(gradient is None for gradient in gradients):
            raise RuntimeError("no parameter has a gradient: observe after backward() and before zero_grad()")
        parts, learner = self._shards.parts(), self._importance[self.phase]
        frozen = self.phase == "outer" and self._outer_settled
        for snapshot in (self._base, self._inner):
            if snapshot is not None:
                snapshot.wait_stream()  # the step may overwrite parameters that are still being copied
        for count, indices in zip(self._counters, self._shards.owned_and_others, strict=True):
            if indices:
                update(learner, parts, gradients, count, indices, frozen=frozen)
        self._observer = id(observer)
        self._steps.add(self.phase, self.parameters, gradients)

    @outside_graph
    def begin_outer(self) -> None:
        """End the inner phase: the parameters are now the inner learner's result.

        Raises:
            RuntimeError: the outer phase has begun already; a parameter or the layer that holds it was
                replaced, or has another dtype, shape or device; other parameters are trainable now; or a CUDA
                graph is being captured.
            ValueError: the memory of a parameter is freed, or shared with another one.
        """
        require_inner_phase(self)
        if self.config.pack_inner:
            thresholds = learner_thresholds(self, "inner")
        inner = self._snapshot(self._dtypes, self._shards.parts())
        if self.config.pack_inner:
            self._importance["inner"].pack(thresholds)
        self._inner = inner
        self._observer = None
        self.phase = "outer"

    @outside_graph
    @recorded
    def fuse(self) -> FusionReport:
        """End the round: replace the parameters by the fusion, which is the next round's ``base``.

        Raises:
            RuntimeError: the outer phase has not begun; a learner was never observed; an importance was not
                finite (``nonfinite="raise"``); or another cause, as in :meth:`begin_outer`.
            ValueError: a parameter had no gradient in any step of the round (``missing="raise"``); or the
                ledger is not that of this fuser's rounds. After these errors, parameters, importance and
                round are unchanged; :meth:`rollback` abandons the round.
            OSError: the round has ended, but its record cannot be written to the ledger. The end of the next
                round writes it first.
        """
        nonfinite = require_complete(self)
        with self._shards.processes.propagate_failure():
            report = skip_round(self, nonfinite) if nonfinite else self._finish_round()
        self._outer_settled |= report.applied and not self.config.refresh_outer
        self._end_round()
        self.last_report = report
        return report

    @contextmanager
    def outer(self) -> Iterator[Fuser]:
        """Context manager of the outer phase: entering calls :meth:`begin_outer`, leaving :meth:`fuse`.

        If the block raises, nothing is fused and the outer phase continues. The exception is raised on the
        other ranks too, which may be waiting for this one.
        """
        self.begin_outer()
        with self._shards.processes.propagate_failure():
            yield self
        self.fuse()

    @outside_graph
    @recorded
    def rollback(self) -> None:
        """Abandon the round: the parameters return to ``base``, bit for bit, and a new round begins.

        The outer importance keeps this round's steps, as after a fusion, unless the config clears it.

        Raises:
            RuntimeError, ValueError, OSError: an adapter is merged, a CUDA graph is being captured, or the
                ledger cannot record the round.
        """
        require_no_capture(self, "rollback")
        self._watch.require_unmerged()
        restore(self._shards, self._base)
        self._end_round()

    def scores(self, learner: Learner) -> dict[str, Tensor]:
        """Name -> importance scores so far: float32 copies of the parameters' shapes, sharded like them.

        Raises:
            ValueError: ``learner`` is neither "inner" nor "outer".
            RuntimeError: the inner scores have been packed into a mask (``pack_inner``).
        """
        if learner not in self._importance:
            raise ValueError(f"learner must be 'inner' or 'outer'; got {learner!r}")
        if self._importance[learner].packed:
            raise RuntimeError("pack_inner=True keeps only a mask of the inner scores in the outer phase")
        return self._shards.to_dtensors(self._importance[learner].score_copies())

    def base(self) -> dict[str, Tensor]:
        """Name -> copy of the parameter at the start of the round, in its dtype, sharded like it."""
        copies = [torch.empty_like(part) for part in self._shards.parts()]
        self._base.copy_to(copies)
        return self._shards.to_dtensors(dict(zip(self.parameters, copies, strict=True)))

    def state_dict(self) -> dict[str, Tensor]:
        """The state to resume from, at any point of a round. The parameters are not part of it.

        Returns:
            Name -> tensor. They are copies and share no memory, as safetensors requires. Those of parameters'
            shapes are sharded like the parameters, as ``torch.distributed.checkpoint`` requires.
        """
        return state_of(self)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a :meth:`state_dict`. The caller restores the parameters.

        Tensors may be whole or sharded in any way; every process takes its part.

        Raises:
            TypeError: a value is not a tensor.
            ValueError: names, shapes or dtypes differ from this fuser's. Nothing has been changed then.
        """
        load_state(self, state)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write :meth:`state_dict` into a folder, with ``torch.distributed.checkpoint``: safetensors files.

        The folder must hold nothing else. An earlier state in it is replaced.

        Raises:
            ValueError: the folder holds something else.
            RuntimeError, OSError: it could not be written. An earlier state is kept then.
        """
        write(self, folder, self.state_dict())

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Resume from a folder that :meth:`save` wrote, on any number of processes.

        Raises:
            FileNotFoundError, RuntimeError: it could not be read.
            ValueError: see :meth:`load_state_dict`.
        """
        self.load_state_dict(read(self, folder))

    def _snapshot(self, dtypes: Sequence[torch.dtype], values: Sequence[Tensor] | None = None) -> Snapshot:
        return self._snapshots.take(self._shards.parts(), dtypes, values)

    def _finish_round(self) -> FusionReport:
        """Fuse, let the gate judge, and make the result the next round's base."""
        # The result is written to separate memory, which becomes the next base: one pass over memory.
        with self._shards.processes.raise_on_any_failure():
            fused = self._snapshot(self._base_dtypes)
        with self._snapshots.put_back_on_failure(fused):
            report = fuse_round(self, fused)
            if self._gatekeeper is None:
                restore(self._shards, fused)
            else:
                report = self._apply_gate(self._gatekeeper, fused, report)
        if report.applied:
            self._snapshots.put_back(self._base)
            self._base = fused
        else:
            self._snapshots.put_back(fused)
            self._kept.restore()
        return report

    def _apply_gate(self, gatekeeper: Gatekeeper, fused: Snapshot, report: FusionReport) -> FusionReport:
        outer = self._snapshot(self._dtypes, self._shards.parts())
        try:
            return take_gated_step(
                gatekeeper, self._shards, report, base=self._base, fused=fused, outer=outer
            )
        finally:
            self._snapshots.put_back(outer)

    def _end_round(self) -> None:
        if self.config.clear_inner:
            self._importance["inner"].clear()
        if self.config.clear_outer:
            self._importance["outer"].clear()
        self._kept.store()
        self._snapshots.put_back(self._inner)
        self._inner = None
        self._nonfinite.zero_()
        self._steps.clear()
        self._observer = None
        self.phase = "inner"
        self.round += 1
