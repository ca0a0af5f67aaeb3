"""Recurrent-KIF in a Hugging Face ``Trainer``. `import rkif` imports neither this nor transformers."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Trainer

from rkif import Fuser, FusionConfig, Gate
from rkif.hf import state
from rkif.hf.card import TAGS, add_to_card
from rkif.hf.memory import (
    accepted_memory,
    require_labels,
    require_no_empty_memory,
    split_memory,
    with_memory,
)
from rkif.hf.requirements import (
    require_constant_ranks,
    require_given_batches,
    require_gradients,
    require_separate_steps,
    require_single_samples,
)
from rkif.hf.rounds import TrainerRounds
from rkif.optim import AdamW

# Used beyond the Trainer's documented interface (checked with transformers 5.0.0 and 5.23.0):
# _maybe_log_save_evaluate (after all callbacks of a step or epoch, before it is logged, measured and saved),
# _evaluate, _save_checkpoint, _save_optimizer_and_scheduler, _load_optimizer_and_scheduler, model_wrapped,
# _get_collator_with_removed_columns, _train_batch_size (auto_find_batch_size lowers it), and
# current_gradient_accumulation_steps (training_step divides by it; the Trainer sets it before every step).


class RKIFMixin(Trainer):  # type: ignore[misc]
    """Mixin that adds an outer learner, which trains on a replay memory, to the ``Trainer`` class after it.

    After every ``fusion.inner_steps`` optimizer steps on the training data, the trainer takes
    ``fusion.outer_steps`` steps on the memory and fuses. It does so before the inner step is logged,
    evaluated or saved. An outer step has as many micro-batches as an inner one, of the same size. It uses the
    trainer's `training_step` and the same clipping. The outer optimizer has the inner one's class and a
    separate state. Its learning rate is ``outer_learning_rate`` times the current factor of the inner
    schedule. A step that a gradient scaler skips does not count. Outer steps are not counted as global steps
    or in ``total_flos``. Without a memory, as on a first task, this is the plain trainer.

    Training may end within a round, at the last step or because a callback stops it. That round is fused with
    the steps it has, before the last step is evaluated and saved. If an evaluation stops training, that
    evaluation has measured the model before the fusion. With ``load_best_model_at_end`` the checkpoint then
    keeps the measured model, because it may be the best; otherwise the round is fused before the checkpoint
    is saved. The best model is loaded last and is not changed. Within a round the model is the inner learner:
    to choose among fused models, evaluate at multiples of ``inner_steps``.

    With ``optimizer="rkif_adamw"`` the steps of both learners also update the importance, in one pass over
    memory. The result has the same bits as ``rkif.optim.AdamW`` with a separate observation.

    Checkpoints contain the round and the outer learner, so a resumed training has the same bits as an
    uninterrupted one. Checkpoints of ``save_only_model`` do not, and training cannot be resumed from them.
    """

    eval_dataset: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any

    def __init__(
        self,
        *args: Any,
        memory_dataset: Any = None,
        fusion: FusionConfig | None = None,
        outer_learning_rate: float = 1e-3,
        gate: Gate | None = None,
        optimizer: Literal["rkif_adamw"] | None = None,
        ledger: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the trainer.

        Args:
            args, kwargs: the arguments of the ``Trainer`` class, in its order or by name.
            memory_dataset: samples of earlier tasks: one dataset in any form that the trainer accepts for
                evaluation, with a length and indexing. None or empty: plain training.
            fusion: settings of the method; `FusionConfig()` by default. Unless its `missing` is "raise", a
                parameter without a gradient in a round takes no part in its fusion, and a warning names it.
            outer_learning_rate: base learning rate of the outer learner.
            gate: checks every fusion before it is kept. If the gate undoes a fusion, parameters, importance
                and the state of both optimizers return to the start of the round, which needs a copy of the
                optimizers' state. Training continues with the next batch; "stop" ends it after that step.
            optimizer: "rkif_adamw" trains both learners with `rkif.optim.AdamW` instead of ``args.optim``,
                with the learning rate, betas, epsilon and weight decay of `args`.
            ledger: a folder for the record of every round, as for `Fuser`: new or empty, or that of the
                training that is resumed. Without a memory there are no fusions: a warning says that nothing
                is recorded, and no folder is made.

        Raises:
            TypeError: `fusion`, `outer_learning_rate` or `gate` has another type; or the memory is several
                datasets, or lacks a length or indexing.
            ValueError: `outer_learning_rate` is not positive and finite; `optimizer` is unknown or given with
                another choice of an optimizer; or a ledger is given with an empty memory. With a memory also:
                it lacks labels that the training data has; an optimizer object is given; the optimizer steps
                within the backward pass or keeps weights of its own; the trainer generates its batches; its
                loss depends on neighbouring samples; or the model's adapter prunes ranks.
        """
        self.fusion = FusionConfig() if fusion is None else fusion
        if not isinstance(self.fusion, FusionConfig):
            raise TypeError(f"fusion must be a FusionConfig, got {type(fusion).__name__}")
        if not isinstance(outer_learning_rate, int | float):
            raise TypeError(f"outer_learning_rate must be a number, got {outer_learning_rate!r}")
        if not 0 < outer_learning_rate < math.inf:
            raise ValueError(f"outer_learning_rate must be positive and finite, got {outer_learning_rate}")
        self.outer_learning_rate = outer_learning_rate
        if gate is not None and not isinstance(gate, Gate):
            raise TypeError(f"gate must be a Gate, got {type(gate).__name__}")
        self.gate = gate
        if optimizer not in (None, "rkif_adamw"):
            raise ValueError(
                f"optimizer must be 'rkif_adamw' or None (args.optim decides), got {optimizer!r}"
            )
        kwargs |= _by_name(type(self), args, kwargs)
        for other in ("optimizers", "optimizer_cls_and_kwargs"):
            if optimizer is not None and kwargs.get(other) not in (None, (None, None)):
                raise ValueError(f"optimizer={optimizer!r} and {other} both choose an optimizer: pass one")
        self._optimizer_name = optimizer
        self.ledger = ledger
        self._rkif: TrainerRounds | None = None

        eval_dataset = kwargs.get("eval_dataset")
        memory = accepted_memory(memory_dataset, kwargs.get("train_dataset"))
        if ledger is not None and memory is None:
            require_no_empty_memory(memory_dataset)
        # The trainer refuses to evaluate without a dataset. The memory as eval_dataset would hide this error.
        refusable = eval_dataset is None and getattr(kwargs.get("args"), "eval_strategy", "no") != "no"
        if refusable or memory is None:
            super().__init__(**kwargs)
            if memory is not None:
                raise ValueError(
                    f"eval_strategy={self.args.eval_strategy.value!r} with a memory_dataset needs an "
                    f"eval_dataset: {type(self).__name__} made one itself, without preparing the memory"
                )
            return
        require_given_batches(type(self))
        super().__init__(**kwargs | {"eval_dataset": with_memory(eval_dataset, memory)})
        memory, self.eval_dataset = split_memory(self, several=isinstance(eval_dataset, dict))
        require_labels(memory, self.train_dataset, self.label_names)
        self._rkif = TrainerRounds(self, memory)
        self.add_callback(self._rkif)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(TAGS))
        require_single_samples(self)
        require_constant_ranks(self.model)
        if optimizer is None and self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            require_separate_steps(self.args.optim)
        own_choice = type(self).create_outer_optimizer is not RKIFMixin.create_outer_optimizer
        if self.optimizer is not None and not own_choice:
            raise ValueError(
                "optimizers=(optimizer, ...) does not define the outer learner's optimizer: pass "
                "optimizer_cls_and_kwargs instead, or override create_outer_optimizer"
            )

    @property
    def fuser(self) -> Fuser | None:
        """The fuser that the current or last `train` has made; None before it, and without a memory."""
        return getattr(self._rkif, "fuser", None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `Trainer.train` does.

        Raises:
            RuntimeError: there is a memory, and the gradients are not in ``grad`` of the model's parameters:
                DeepSpeed, FSDP1, nn.DataParallel, or a model on several devices of one process.
        """
        if self._rkif is not None:
            require_gradients(self)
            self._rkif.release()
        return super().train(*args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Search, as `Trainer.hyperparameter_search` does. `fusion` and the outer rate are not searched.

        Raises:
            ValueError: the trainer has a ledger, which holds the rounds of one training only.
        """
        if self._rkif is not None and self.ledger is not None:
            raise ValueError(
                f"ledger={os.fspath(self.ledger)!r} cannot hold several trials: search without a ledger"
            )
        return super().hyperparameter_search(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the inner learner's optimizer, as `Trainer.create_optimizer` does, or `rkif.optim.AdamW`."""
        if self._optimizer_name is not None:
            # From the current arguments, because a hyperparameter search changes them between trials.
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            settings = {"lr": self.args.learning_rate, "betas": betas, "eps": self.args.adam_epsilon}
            self.optimizer_cls_and_kwargs = (AdamW, settings)
        return super().create_optimizer(*args, **kwargs)

    def create_outer_optimizer(self) -> torch.optim.Optimizer:
        """Make the outer learner's optimizer with `create_optimizer`; override it to choose another.

        The first parameter group gets `outer_learning_rate`. The others keep their ratio to the first.
        """
        inner, self.optimizer = self.optimizer, None
        try:
            outer: torch.optim.Optimizer = self.create_optimizer()
        finally:
            self.optimizer = inner
        first = outer.param_groups[0]["lr"]
        for group in outer.param_groups:
            group["lr"] = self.outer_learning_rate * (group["lr"] / first if first else 1.0)
        return outer

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the trainer's model card, with a section on the method, its settings and the memory."""
        super().create_model_card(*args, **kwargs)
        if self._rkif is not None and self.is_world_process_zero():
            add_to_card(self._rkif, Path(self.args.output_dir, "README.md"))

    def _close_round(self, *, tail: bool) -> None:
        if self._rkif is not None:
            self._rkif.close(tail=tail)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._close_round(tail=self.control.should_training_stop)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        metrics = super()._evaluate(*args, **kwargs)
        self._close_round(tail=self.control.should_training_stop and not self.args.load_best_model_at_end)
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # A callback may save at the end of a step, when a round has all its steps but is not closed. A round
        # with fewer steps stays open: enable_jit_checkpoint saves here and stops, to be resumed later.
        self._close_round(tail=False)
        super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._rkif is not None:
            state.save(self._rkif, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._rkif is not None:
            self._rkif.checkpoint = checkpoint


class RKIFTrainer(RKIFMixin, Trainer):  # type: ignore[misc]
    """``Trainer`` with recurrent knowledge identification and fusion; see `RKIFMixin`."""


def _by_name(kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional arguments by their names in the ``__init__`` of the class after the mixin.

    Raises:
        TypeError: there are too many, or one is given by name as well.
    """
    after = kind.__mro__[kind.__mro__.index(RKIFMixin) + 1 :]
    parameters = next(
        signature
        for base in after
        if "__init__" in vars(base)
        and (signature := list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:])
        and signature[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )
    names = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise TypeError(f"{kind.__name__} takes {len(names)} positional arguments, got {len(args)}")
    named = dict(zip(names, args, strict=False))
    if twice := named.keys() & kwargs.keys():
        raise TypeError(f"{kind.__name__} got {', '.join(sorted(twice))} by position and by name")
    return named
