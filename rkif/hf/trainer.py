"""The recurrent method in a Hugging Face ``Trainer``. `import rkif` does not import it, nor transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Trainer

from rkif import Fuser, FusionConfig, Gate
from rkif.hf.rounds import Rounds

# Relied on beyond the Trainer's documented interface (read and run with transformers 5.0.0 and 5.23.0):
# _maybe_log_save_evaluate (after all callbacks of a step or epoch, before it is logged, measured and saved),
# _evaluate, _save_checkpoint, _save_optimizer_and_scheduler, _load_optimizer_and_scheduler, model_wrapped,
# _get_collator_with_removed_columns, _train_batch_size (auto_find_batch_size lowers it), and
# current_gradient_accumulation_steps (training_step divides by it; the Trainer sets it before every step).

_MEMORY_KEY = "__rkif_memory__"


class RKIFMixin(Trainer):  # type: ignore[misc]
    """Gives the ``Trainer`` class that it is put in front of an outer learner on a memory of earlier tasks.

    After every ``fusion.inner_steps`` optimizer steps on the training data come ``fusion.outer_steps`` on the
    memory and the fusion, before anything of that step is logged, evaluated or saved. An outer step has as
    many micro-batches of the same size as an inner one, goes through the trainer's `training_step`, and is
    clipped alike. Its optimizer is of the inner one's kind, with a state of its own, at
    ``outer_learning_rate`` times the fraction of its base rate that the inner schedule is at. Steps that a
    gradient scaler skips count for neither learner; outer steps count neither as global steps nor in
    ``total_flos``. Without a memory, as on a first task, this is the plain trainer.

    A round under way when training ends, at the last step or because a callback stops it, is fused with the
    steps it has, before that step is evaluated and saved. An evaluation that stops training has measured the
    model by then: with ``load_best_model_at_end`` the checkpoint keeps what was measured, as it may be the
    best; otherwise the round is fused before it is saved. The best model is loaded last, and nothing is fused
    into it. Within a round the model is the inner learner: evaluate every multiple of ``inner_steps`` to
    choose among fused models.

    With `optimizer_cls_and_kwargs=(rkif.optim.AdamW, {"lr": ...})` the steps of both learners take the
    importance along in one pass over memory; the bits are those of observing apart.

    Checkpoints hold the round and the outer learner: a resumed run has the same bits as one that was not
    interrupted. With ``save_only_model`` they do not, and cannot be resumed.
    """

    eval_dataset: Any
    optimizer: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        memory_dataset: Any = None,
        fusion: FusionConfig | None = None,
        outer_learning_rate: float = 1e-3,
        gate: Gate | None = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        """Makes the trainer, to which `model`, `args`, `eval_dataset` and all others go as they are.

        Args:
            memory_dataset: samples of earlier tasks, in any form the trainer takes for evaluation, with a
                length and indexing. None or empty: plain training.
            fusion: settings of the method, by default `FusionConfig()`.
            outer_learning_rate: base learning rate of the outer learner.
            gate: what every fusion is checked by before it is kept. Where it undoes one, parameters,
                importance and both optimizers' state are as at the start of the round (they are copied for
                that), and training goes on with the next batch; "stop" ends training after that step.

        Raises:
            TypeError: `fusion` is no `FusionConfig`, `gate` no `Gate`, or the memory has no length or no
                indexing.
            ValueError: `outer_learning_rate` is not positive and finite, or the optimizer comes ready-made.
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
        self._rkif: Rounds | None = None

        # What evaluates without a dataset is for the trainer to refuse: a memory in its place would hide it.
        refusable = eval_dataset is None and getattr(args, "eval_strategy", "no") != "no"
        if refusable or not _has_samples(memory_dataset):
            super().__init__(model=model, args=args, eval_dataset=eval_dataset, **kwargs)
            return
        # Trainers that tokenize or pack do it to their evaluation sets too: the memory goes in among these.
        named = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        sets = {name: dataset for name, dataset in named.items() if dataset is not None}
        super().__init__(model=model, args=args, eval_dataset={**sets, _MEMORY_KEY: memory_dataset}, **kwargs)
        prepared = dict(self.eval_dataset)
        self._rkif = Rounds(self, prepared.pop(_MEMORY_KEY))
        self.add_callback(self._rkif)
        self.eval_dataset = prepared if named is eval_dataset else prepared.get("eval")
        own_choice = type(self).create_outer_optimizer is not RKIFMixin.create_outer_optimizer
        if self.optimizer is not None and not own_choice:
            raise ValueError(
                "optimizers=(optimizer, ...) is no recipe for the outer learner's optimizer: pass "
                "optimizer_cls_and_kwargs instead, or override create_outer_optimizer"
            )

    @property
    def fuser(self) -> Fuser | None:
        """The fuser of the current or last `train`, each of which starts one; None without a memory."""
        return getattr(self._rkif, "fuser", None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the trainer does.

        Raises:
            RuntimeError: with a memory, where the gradients are not those of the parameters: DeepSpeed, the
                first FSDP, nn.DataParallel, or a model over several devices of one process.
        """
        if self._rkif is not None:
            self._rkif.refuse_unseen_gradients()
        return super().train(*args, **kwargs)

    def create_outer_optimizer(self) -> torch.optim.Optimizer:
        """Makes the outer learner's optimizer as `create_optimizer` makes the inner one; override to choose.

        Its first parameter group gets `outer_learning_rate`, and others keep their proportion to that.
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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as the trainer does, with figures of the last fusion beside the training loss."""
        if "loss" in logs and self.fuser is not None and (report := self.fuser.last_report) is not None:
            logs["rkif/round"] = self.fuser.round
            logs |= {f"rkif/share_{case}": report.counts[case] / report.numel for case in ("both", "neither")}
            logs |= {f"rkif/norm_{name}": norm for name, norm in report.norms.items()}
            if report.gate is not None:
                logs["rkif/gate_factor"] = report.gate.factor
        super().log(logs, *args, **kwargs)

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
        # A callback may save at a step's end, when a round can be full but not closed. A tail stays open:
        # enable_jit_checkpoint saves that way, and stops training in order to have it resumed.
        self._close_round(tail=False)
        super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._rkif is not None:
            self._rkif.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._rkif is not None:
            self._rkif.checkpoint = checkpoint


class RKIFTrainer(RKIFMixin, Trainer):  # type: ignore[misc]
    """The plain ``Trainer`` with recurrent knowledge identification and fusion: see `RKIFMixin`."""


def _has_samples(memory: Any) -> bool:
    if memory is None:
        return False
    endless = isinstance(memory, torch.utils.data.IterableDataset)
    if endless or not (hasattr(memory, "__len__") and hasattr(memory, "__getitem__")):
        raise TypeError(f"memory_dataset must have a length and indexing, got {type(memory).__name__}")
    return len(memory) > 0
