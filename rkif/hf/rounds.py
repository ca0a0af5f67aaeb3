"""The rounds of a Trainer: its fuser, its outer learner, and when both learners are fused."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from transformers import IntervalStrategy, TrainerCallback

from rkif import Fuser
from rkif.fuser.round_values import round_values
from rkif.hf import state as rounds_state
from rkif.hf.logs import figures_set_aside
from rkif.hf.memory import memory_digest
from rkif.hf.requirements import require_gradients
from rkif.optim import AdamW
from rkif.seeding import derive_seed, shuffled

if TYPE_CHECKING:
    from rkif.hf.trainer import RKIFMixin

logger = logging.getLogger(__name__)

# A gradient scaler halves its scale at each overflow. After so many overflows, the scale is not the cause.
MAX_SKIPPED = 16
NAMED = 5  # maximum number of parameters that a warning names
_SAID = {  # log level and text of the gate's verdicts that change a fusion
    "damp": (logging.INFO, "took a part of the fusion"),
    "undo": (logging.INFO, "undid the fusion"),
    "stop": (logging.WARNING, "undid the fusion and stops training"),
}


class TrainerRounds(TrainerCallback):  # type: ignore[misc]
    """The rounds of a trainer with a memory.

    Args:
        trainer: the trainer; its training steps are those of the inner learner.
        memory: the samples that the outer learner trains on, with a length and indexing.

    Attributes:
        memory, memory_digest: the samples, and a digest that detects another memory.
        checkpoint: the folder to resume from at the next start of training, or None.
        fuser: the fuser of the current or last training.
        optimizer: the outer learner's optimizer.
        start: with a gate, copies of the state of both optimizers at the start of the round; else empty.
        lr_fraction: the learning rate of the last inner step as a fraction of the base learning rate.
        memory_position: number of samples that all processes together have drawn from the memory.
        loss: sum of the losses of the outer steps of the last round, in this process.
        warned: whether this training has warned of parameters without a gradient.
    """

    fuser: Fuser
    optimizer: torch.optim.Optimizer
    start: list[Any]
    lr_fraction: float
    memory_position: int
    loss: torch.Tensor
    warned: bool

    def __init__(self, trainer: RKIFMixin, memory: Any) -> None:
        self.trainer = trainer
        self.memory = memory
        self.memory_digest = memory_digest(memory)
        self.checkpoint: str | None = None

    def release(self) -> None:
        """Free the fuser and the outer optimizer of an earlier training."""
        for name in ("fuser", "optimizer", "start"):
            self.__dict__.pop(name, None)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start from the current weights, or continue from the checkpoint that training resumes from."""
        trainer = self.trainer
        require_gradients(trainer)  # again: `model_init` may have made the model since `train` was called
        # A round may use only some parts of a model, such as some experts. pack_inner needs all gradients.
        lenient = trainer.fusion.missing is None and not trainer.fusion.pack_inner
        fusion = replace(trainer.fusion, missing="zero") if lenient else trainer.fusion
        self.warned = False
        self.fuser = Fuser(trainer.model_wrapped, fusion, gate=trainer.gate, ledger=trainer.ledger)
        # Not prepared by the accelerator: its clip_grad_norm_ unscales the gradients of every prepared
        # optimizer, so it would unscale gradients of parameters that two optimizers share twice.
        self.optimizer = self.trainer.create_outer_optimizer()
        for optimizer in self._optimizers():
            if (observing := _observing(optimizer)) is not None:
                observing.fuser = self.fuser
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.lr_fraction = 1.0
        self.memory_position = 0
        self.start = self._moments()
        checkpoint, self.checkpoint = self.checkpoint, None
        if checkpoint is not None:
            rounds_state.load(self, Path(checkpoint))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Observe the inner step that follows, and store its learning rate as a fraction of the base rate."""
        optimizer = self.trainer.optimizer
        # The scaler raises if clipping, or measuring the norm, has unscaled the gradients already.
        with contextlib.suppress(RuntimeError):
            self.trainer.accelerator.unscale_gradients(optimizer)
        if self._observe(optimizer):
            group = optimizer.param_groups[0]
            base = group.get("initial_lr", self.trainer.args.learning_rate)
            self.lr_fraction = float(group["lr"] / base) if base else 1.0

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Close a round that is still open, unless the best model has been loaded."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            self.close(tail=True)

    def close(self, *, tail: bool) -> None:
        """Train the outer learner and fuse if the round has all inner steps; with `tail`, if it has any."""
        fusion = self.trainer.fusion
        if self.fuser.inner_observed < (1 if tail else fusion.inner_steps):
            return
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_fraction
        trainer = self.trainer
        training = trainer.model.training
        trainer.model_wrapped.zero_grad()  # training may have stopped between two micro-batches
        self.loss, skipped = torch.zeros((), device=trainer.args.device), 0
        with figures_set_aside(trainer), _callbacks_paused(trainer), self.fuser.outer():
            while self.fuser.outer_observed < fusion.outer_steps:
                skipped += not self._outer_step()
                if skipped > MAX_SKIPPED:
                    raise RuntimeError(f"{skipped} outer steps of a round had gradients that are not finite")
        trainer.model.train(training)  # a gate may have evaluated it
        self._apply_verdict()
        self._warn_of_missing()
        self._log(steps=fusion.outer_steps + skipped)
        self._call_listeners()

    def _log(self, *, steps: int) -> None:
        """Log the values that docs/guide/trainer.md lists. They do not replace the log of the step."""
        trainer, report = self.trainer, self.fuser.last_report
        if report is None or trainer.args.logging_strategy == IntervalStrategy.NO:
            return
        loss = trainer.accelerator.gather(self.loss).mean().item() / steps
        values = {"round": self.fuser.round, "outer_loss": loss}
        values["outer_learning_rate"] = self.optimizer.param_groups[0]["lr"]
        values |= round_values(report, trainer.gate)
        wanted = trainer.control.should_log  # a log clears it
        with figures_set_aside(trainer):  # trl's trainers add their metrics to each log and clear them
            trainer.log({f"rkif/{name}": value for name, value in values.items()})
        trainer.control.should_log = wanted

    def _call_listeners(self) -> None:
        """Call ``on_fusion`` of the callbacks that have it, with the arguments of every event."""
        trainer = self.trainer
        listeners = copy.copy(trainer.callback_handler)
        listeners.callbacks = [each for each in listeners.callbacks if hasattr(each, "on_fusion")]
        trainer.control = listeners.call_event(
            "on_fusion", trainer.args, trainer.state, trainer.control, report=self.fuser.last_report
        )

    def _warn_of_missing(self) -> None:
        """Name the parameters that took no part in a fusion, once in a training."""
        report = self.fuser.last_report
        assert report is not None
        if not report.missing or self.warned or not self.trainer.is_world_process_zero():
            return
        self.warned = True
        names = ", ".join(report.missing[:NAMED])
        more = f" and {len(report.missing) - NAMED} more" if len(report.missing) > NAMED else ""
        warnings.warn(
            f"round {self.fuser.round} had no gradient of {names}{more}: they took no part in its fusion; "
            "FusionConfig(missing='raise') makes this an error",
            stacklevel=2,
        )

    def _apply_verdict(self) -> None:
        """Apply the gate's verdict to the optimizers and to training; the fuser applied it to the model."""
        report = self.fuser.last_report
        assert report is not None
        if report.gate is None:
            return
        if report.gate.factor == 0:
            for optimizer, state in zip(self._optimizers(), self.start, strict=True):
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": state, "param_groups": groups})
        if report.gate.verdict == "stop":
            self.trainer.control.should_training_stop = True
        if report.gate.verdict in _SAID and self.trainer.is_world_process_zero():
            level, said = _SAID[report.gate.verdict]
            reasons = "; ".join(report.gate.attempts[0].objections)
            logger.log(level, "round %d: the gate %s: %s", self.fuser.round, said, reasons)
        self.start = self._moments()

    def _optimizers(self) -> tuple[Any, Any]:
        return self.trainer.optimizer, self.optimizer

    def _moments(self) -> list[Any]:
        """Copies of the state of both optimizers; empty without a gate, because only a gate restores them."""
        if self.trainer.gate is None:
            return []
        return [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in self._optimizers()]

    def _outer_step(self) -> bool:
        """Take one optimizer step on the memory. Returns False if the gradient scaler skipped it."""
        trainer, args = self.trainer, self.trainer.args
        model, accelerator = trainer.model_wrapped, trainer.accelerator
        batches = self._memory_batches()
        samples, num_items = trainer.get_batch_samples(batches, args.gradient_accumulation_steps, args.device)
        trainer.current_gradient_accumulation_steps = len(samples)
        for index, inputs in enumerate(samples, start=1):
            last = index == len(samples)
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                self.loss += trainer.training_step(model, inputs, num_items)
        accelerator.unscale_gradients(self.optimizer)
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        taken = self._observe(self.optimizer)
        if accelerator.scaler is None:
            self.optimizer.step()
        else:
            accelerator.scaler.step(self.optimizer)
            accelerator.scaler.update()
        model.zero_grad()
        return taken

    def _observe(self, optimizer: Any) -> bool:
        """Observe the step that follows. Returns False if the gradient scaler will skip it.

        A `rkif.optim.AdamW` observes in its step.
        """
        scaler = self.trainer.accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)
            if not torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm):
                return False
        if _observing(optimizer) is None:
            self.fuser.observe()
        return True

    def _memory_batches(self) -> Iterator[Any]:
        """Micro-batches of the memory, without end; each process gets its share of the global batch."""
        # No DataLoader: it would draw from the global random numbers, and one that the accelerator prepared
        # would change the accelerator's gradient state.
        trainer, args = self.trainer, self.trainer.args
        size, seed = trainer._train_batch_size, args.seed if args.data_seed is None else args.data_seed
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="memory")
        walk = memory_walk(len(self.memory), self.memory_position, seed)
        ranks, first = args.world_size, args.process_index * size
        while True:
            self.memory_position += ranks * size
            indices = list(islice(walk, ranks * size))[first : first + size]
            yield collate([self.memory[index] for index in indices])


@contextlib.contextmanager
def _callbacks_paused(trainer: RKIFMixin) -> Iterator[None]:
    """Hide the evaluations of a gate from callbacks, control flags and log history.

    A gate may call `trainer.evaluate`. Otherwise these evaluations would count for early stopping, and would
    clear the flags that make the trainer log, evaluate and save the step.
    """
    handler, history = trainer.callback_handler, trainer.state.log_history
    callbacks, flags, logged = handler.callbacks, dict(trainer.control.__dict__), len(history)
    handler.callbacks = []
    try:
        yield
    finally:
        handler.callbacks = callbacks
        trainer.control.__dict__.update(flags)
        del history[logged:]


def memory_walk(size: int, start: int, seed: int) -> Iterator[int]:
    """Endless indices of `size` samples in random order, from position `start`; each epoch is reshuffled."""
    for epoch in count(start // size):
        yield from shuffled(size, derive_seed(seed, "memory order", epoch))[max(0, start - epoch * size) :]


def _observing(optimizer: Any) -> AdamW | None:
    """The `rkif.optim.AdamW` inside accelerate's wrapper, or None if it is another optimizer."""
    plain = getattr(optimizer, "optimizer", optimizer)
    return plain if isinstance(plain, AdamW) else None
