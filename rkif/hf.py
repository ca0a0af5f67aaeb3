"""Recurrent knowledge identification and fusion inside a Hugging Face ``Trainer``.

``import rkif`` does not import this module, so that it needs no transformers.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from rkif import Fuser, FusionConfig
from rkif.seeding import derive_seed

# What is used beyond the documented interfaces (read and run with transformers 5.0 and 5.23):
#   Trainer._maybe_log_save_evaluate    runs after all callbacks of a step or an epoch, before anything is logged,
#                                       measured or saved: a round is closed here
#   Trainer._evaluate, _save_checkpoint, _save_optimizer_and_scheduler, _load_optimizer_and_scheduler
#   Trainer._get_collator_with_removed_columns, _train_batch_size (auto_find_batch_size lowers it),
#   current_gradient_accumulation_steps (training_step divides by it)
#   AcceleratedOptimizer, GradientState._set_sync_gradients

_FUSER_FILE = "rkif_fuser.safetensors"
_OUTER_FILE = "rkif_outer.pt"
_MEMORY_KEY = "__rkif_memory__"
# A gradient scaler halves the scale at each overflow: this many in a row are no longer a matter of scale.
_MAX_SKIPPED = 16


class RKIFMixin(Trainer):  # type: ignore[misc]
    """Gives any ``Trainer`` an outer learner on a memory of earlier tasks, and the fusion with it.

    Put it in front: ``class RKIFSFTTrainer(RKIFMixin, SFTTrainer): pass``.

    After every ``fusion.inner_steps`` optimizer steps on the training data come ``fusion.outer_steps`` optimizer
    steps on the memory and the fusion, before anything of that step is logged, evaluated or saved. An outer step
    takes as many micro-batches of the same size as an inner one, through the trainer's own `training_step`, and
    clips as it does. It has an optimizer of its own, of the kind the training arguments ask for, at
    ``outer_learning_rate`` times the inner schedule's current fraction of its base rate. A step that a gradient
    scaler skips is observed by nobody and counts for neither learner. Outer steps count neither as global steps
    nor in ``total_flos``. Without a memory (the first task has none) it trains as the plain trainer does.

    When training ends with a round under way, be it at the last step or because a callback stops it, that round
    is fused with the steps it has, before the last evaluation and checkpoint. Only if it is an evaluation that
    stops training (early stopping) has the model been measured already. With ``load_best_model_at_end`` the
    checkpoint of that step then keeps the weights that were measured, for it may be the best; else the round is
    fused before it is saved. The best model is loaded after all fusions and stays as it was measured; evaluate
    every multiple of ``inner_steps`` to choose among fused models, for within a round the model is the inner
    learner. Resuming from the last checkpoint of a finished run goes on from its fused weights, in a new round.

    Checkpoints hold the state of the round and of the outer learner: a resumed run has the same bits as one that
    was not interrupted. With ``save_only_model`` they hold neither, and cannot be resumed.

    Attributes:
        fusion: the configuration of the method.
        outer_learning_rate: the outer learner's base learning rate.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        memory_dataset: Any = None,
        fusion: FusionConfig | None = None,
        outer_learning_rate: float = 1e-3,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        """Builds the trainer; what is not listed here goes to it as it is.

        Args:
            model: as in the trainer.
            args: as in the trainer.
            memory_dataset: samples of earlier tasks, of the kind the trainer takes for evaluation (it is prepared
                like that), with a length and indexing. None or empty: plain training.
            fusion: the configuration of the method, by default `FusionConfig()`.
            outer_learning_rate: the base learning rate of the outer learner.
            eval_dataset: as in the trainer.
            **kwargs: as in the trainer.

        Raises:
            TypeError: `fusion` is no `FusionConfig`, or the memory has no length or no indexing.
            ValueError: `outer_learning_rate` is not positive and finite.
        """
        fusion = FusionConfig() if fusion is None else fusion
        if not isinstance(fusion, FusionConfig):
            raise TypeError(f"fusion must be a FusionConfig, got {type(fusion).__name__}")
        if not (0 < outer_learning_rate < math.inf):
            raise ValueError(f"outer_learning_rate must be positive and finite, got {outer_learning_rate}")
        self.fusion = fusion
        self.outer_learning_rate = outer_learning_rate
        self._rounds: _Rounds | None = None
        self._checkpoint: str | None = None

        if not _has_samples(memory_dataset):
            super().__init__(model=model, args=args, eval_dataset=eval_dataset, **kwargs)
            return
        if eval_dataset is None and getattr(args, "eval_strategy", "no") != "no":
            # The memory would hide from the trainer that it has nothing to evaluate: let it say so.
            super().__init__(model=model, args=args, eval_dataset=None, **kwargs)
            raise ValueError(f"eval_strategy is {args.eval_strategy} but there is no eval_dataset")
        # Trainers that tokenize or pack do it to their evaluation sets too: the memory goes in among these.
        single = eval_dataset is not None and not isinstance(eval_dataset, dict)
        named = {"eval": eval_dataset} if single else dict(eval_dataset or {})
        super().__init__(model=model, args=args, eval_dataset={**named, _MEMORY_KEY: memory_dataset}, **kwargs)
        prepared = dict(self.eval_dataset)
        memory = prepared.pop(_MEMORY_KEY)
        if all(prepared[name] is named[name] for name in named):
            self.eval_dataset = eval_dataset
        else:
            self.eval_dataset = prepared["eval"] if single else prepared
        self._rounds = _Rounds(self, memory, inner_optimizer_given=self.optimizer is not None)
        self.add_callback(self._rounds)

    @property
    def fuser(self) -> Fuser | None:
        """The fuser of the current or last `train`; None before, and without a memory."""
        return self._rounds.fuser if self._rounds is not None else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the trainer does, in rounds if there is a memory. Each call starts a new fuser.

        Raises:
            RuntimeError: training with a memory is spread over several devices or processes.
        """
        if self._rounds is not None:
            self._refuse_parallel()
        self._checkpoint = None
        return super().train(*args, **kwargs)

    def create_outer_optimizer(self) -> torch.optim.Optimizer:
        """Returns a new optimizer for the outer learner; override it to choose another.

        It is what `create_optimizer` makes for the inner learner (class, arguments, parameter groups), with all
        learning rates in proportion such that the first group's is `outer_learning_rate`.

        Raises:
            ValueError: the inner optimizer came ready-made, so that there is no recipe for a second one.
        """
        assert self._rounds is not None
        if self._rounds.inner_optimizer_given:
            raise ValueError(
                "optimizers=(optimizer, ...) cannot be copied for the outer learner: pass "
                "optimizer_cls_and_kwargs instead, or override create_outer_optimizer"
            )
        inner, self.optimizer = self.optimizer, None
        try:
            outer: torch.optim.Optimizer = self.create_optimizer()
        finally:
            self.optimizer = inner
        first = outer.param_groups[0]["lr"]
        for group in outer.param_groups:
            group["lr"] = self.outer_learning_rate * (group["lr"] / first if first else 1.0)
        return outer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as the trainer does, and beside the training loss the figures of the last fusion."""
        if "loss" in logs and self.fuser is not None and self.fuser.last_report is not None:
            logs.update(_figures(self.fuser))
        super().log(logs, *args, **kwargs)

    def _refuse_parallel(self) -> None:
        devices = sorted({str(parameter.device) for parameter in self.model.parameters()})
        unsupported = {
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP": self.is_fsdp_enabled,
            f"{self.accelerator.num_processes} processes": self.accelerator.num_processes > 1,
            f"nn.DataParallel over {self.args.n_gpu} GPUs": self.args.n_gpu > 1,
            f"a model on {', '.join(devices)}": len(devices) > 1,
        }
        if any(unsupported.values()):
            found = ", ".join(name for name, present in unsupported.items() if present)
            raise RuntimeError(
                f"training with a memory is supported in one process on one device so far, found: {found}"
            )

    def _close_round(self, *, tail: bool) -> None:
        if self._rounds is not None:
            self._rounds.close(tail=tail)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._close_round(tail=self.control.should_training_stop)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._close_round(tail=self.control.should_training_stop)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        metrics = super()._evaluate(*args, **kwargs)
        if not self.args.load_best_model_at_end:
            self._close_round(tail=self.control.should_training_stop)
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # A callback may save at the end of a step, where a round may be full but not closed. An unfinished one is
        # left: the callback of enable_jit_checkpoint stops training to have it resumed from here.
        self._close_round(tail=False)
        super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._rounds is not None:
            self._rounds.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._checkpoint = checkpoint


class RKIFTrainer(RKIFMixin, Trainer):
    """The plain ``Trainer`` with recurrent knowledge identification and fusion. See `RKIFMixin`."""


class _Rounds(TrainerCallback):  # type: ignore[misc]
    """The rounds of a trainer with a memory: the outer learner and its fuser."""

    def __init__(self, trainer: RKIFMixin, memory: Any, *, inner_optimizer_given: bool) -> None:
        self.trainer = trainer
        self.memory = memory
        self.inner_optimizer_given = inner_optimizer_given
        self.fuser: Fuser | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Starts the first round from the weights as loaded, or goes on with the checkpoint's."""
        trainer = self.trainer
        args = trainer.args
        seed = args.seed if args.data_seed is None else args.data_seed
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="memory")
        self.fuser = Fuser(trainer.model, trainer.fusion)
        self.batches = MemoryBatches(self.memory, trainer._train_batch_size, collate, seed)
        # Kept from Accelerator.prepare: clip_grad_norm_ unscales the gradients of every optimizer registered
        # there, hence once for each of two over the same parameters.
        self.optimizer = AcceleratedOptimizer(
            trainer.create_outer_optimizer(), device_placement=False, scaler=trainer.accelerator.scaler
        )
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.lr_fraction = 1.0
        if trainer._checkpoint is not None:
            self.load(trainer._checkpoint)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Observes the inner step, and at which fraction of its base rate it is taken."""
        accelerator, optimizer = self.trainer.accelerator, self.trainer.optimizer
        # A gradient scaler refuses to unscale twice, which says that clipping, or measuring the norm, has done it.
        with contextlib.suppress(RuntimeError):
            accelerator.unscale_gradients(optimizer)
        if self.observe():
            group = optimizer.param_groups[0]
            base = group.get("initial_lr", self.trainer.args.learning_rate)
            self.lr_fraction = float(group["lr"] / base) if base else 1.0

    def observe(self) -> bool:
        """Observes the step about to be taken; returns False if the gradient scaler is going to skip it."""
        assert self.fuser is not None
        scaler = self.trainer.accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            if not torch.isfinite(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)):
                return False
        self.fuser.observe()
        return True

    def close(self, *, tail: bool) -> None:
        """Runs the outer learner and fuses if the round is full, or with `tail` if it has any inner step."""
        if self.fuser is None or self.fuser.inner_observed < (1 if tail else self.trainer.fusion.inner_steps):
            return
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_fraction
        self.trainer.model_wrapped.zero_grad()  # training may have stopped between two micro-batches
        self.trainer.accelerator.gradient_state._set_sync_gradients(True)
        skipped = 0
        with self.fuser.outer():
            while self.fuser.outer_observed < self.trainer.fusion.outer_steps:
                if not self.step():
                    skipped += 1
                if skipped > _MAX_SKIPPED:
                    raise RuntimeError(f"{skipped} outer steps of one round had gradients that are not finite")

    def step(self) -> bool:
        """Takes one optimizer step on the memory; returns False if the gradient scaler skipped it."""
        trainer, args = self.trainer, self.trainer.args
        model = trainer.model_wrapped
        micro_batches, num_items = trainer.get_batch_samples(
            self.batches, args.gradient_accumulation_steps, args.device
        )
        trainer.current_gradient_accumulation_steps = len(micro_batches)
        for inputs in micro_batches:
            trainer.training_step(model, inputs, num_items)
        trainer.accelerator.unscale_gradients(self.optimizer)
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        taken = self.observe()
        self.optimizer.step()
        model.zero_grad()
        return taken

    def save(self, folder: str) -> None:
        """Adds the state to a checkpoint."""
        assert self.fuser is not None
        fuser, outer = self.fuser.state_dict(), {
            "optimizer": self.optimizer.state_dict(),
            "lr_fraction": self.lr_fraction,
            "memory_position": self.batches.position,
        }
        _replace(Path(folder, _FUSER_FILE), lambda path: save_file(fuser, path))
        _replace(Path(folder, _OUTER_FILE), lambda path: torch.save(outer, path))

    def load(self, folder: str) -> None:
        """Restores the state from a checkpoint."""
        assert self.fuser is not None
        for name in (_FUSER_FILE, _OUTER_FILE):
            if not Path(folder, name).is_file():
                raise ValueError(
                    f"cannot resume from {folder} with a memory: it has no {name}. It was saved by a trainer "
                    "without memory, or with save_only_model"
                )
        self.fuser.load_state_dict(load_file(Path(folder, _FUSER_FILE)))
        outer = torch.load(Path(folder, _OUTER_FILE), map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(outer["optimizer"])
        self.lr_fraction = outer["lr_fraction"]
        self.batches.position = outer["memory_position"]


class MemoryBatches:
    """Endless batches of the memory, epoch after epoch, each a new order of all samples.

    The order depends on the seed alone, so that the position is the whole state. There is no `DataLoader`: it
    would draw from the global random numbers and, prepared by accelerate, take part in its gradient state.

    Attributes:
        position: the number of samples drawn so far.
    """

    def __init__(self, dataset: Any, batch_size: int, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.collate = collate
        self.seed = seed
        self.position = 0

    def __next__(self) -> Any:
        size = len(self.dataset)
        places = (divmod(self.position + i, size) for i in range(self.batch_size))
        samples = [self.dataset[_epoch_order(size, self.seed, epoch)[place]] for epoch, place in places]
        self.position += self.batch_size
        return self.collate(samples)


@lru_cache(maxsize=2)
def _epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    return random.Random(derive_seed(seed, "memory order", epoch)).sample(range(size), size)


def _has_samples(memory: Any) -> bool:
    if memory is None:
        return False
    iterable = isinstance(memory, torch.utils.data.IterableDataset)
    if iterable or not (hasattr(memory, "__len__") and hasattr(memory, "__getitem__")):
        raise TypeError(f"memory_dataset must have a length and indexing, got {type(memory).__name__}")
    return len(memory) > 0


def _figures(fuser: Fuser) -> dict[str, float]:
    report = fuser.last_report
    assert report is not None
    figures: dict[str, float] = {"rkif/round": fuser.round}
    for name in ("both", "neither"):
        figures[f"rkif/share_{name}"] = report.counts[name] / report.numel
    for name, norm in report.norms.items():
        figures[f"rkif/norm_{name}"] = norm
    return figures


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)
