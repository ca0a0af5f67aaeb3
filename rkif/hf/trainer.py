"""The recurrent method in a Hugging Face ``Trainer``. `import rkif` does not import it, nor transformers."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from rkif import Fuser, FusionConfig, Gate
from rkif.files import replace_file
from rkif.fuser import state as fuser_state
from rkif.fuser.state_names import flatten, section
from rkif.optim import AdamW
from rkif.seeding import derive_seed, shuffled

# Relied on beyond the Trainer's documented interface (read and run with transformers 5.0.0 and 5.23.0):
# _maybe_log_save_evaluate (after all callbacks of a step or epoch, before it is logged, measured and saved),
# _evaluate, _save_checkpoint, _save_optimizer_and_scheduler, _load_optimizer_and_scheduler, model_wrapped,
# _get_collator_with_removed_columns, _train_batch_size (auto_find_batch_size lowers it), and
# current_gradient_accumulation_steps (training_step divides by it; the Trainer sets it before every step).

_FUSER_FILE = "rkif_fuser.safetensors"
_OUTER_FILE = "rkif_outer.pt"
_FOLDER = "rkif"  # instead of both, where parameters are spread over processes
_MEMORY_KEY = "__rkif_memory__"
# A gradient scaler halves its scale at each overflow: so many in one round are no matter of scale any more.
_MAX_SKIPPED = 16


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
        self._rkif: _Rounds | None = None

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
        self._rkif = _Rounds(self, prepared.pop(_MEMORY_KEY))
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


class _Rounds(TrainerCallback):  # type: ignore[misc]
    """The rounds of a trainer with a memory: its fuser and its outer learner."""

    fuser: Fuser

    def __init__(self, trainer: RKIFMixin, memory: Any) -> None:
        self.trainer = trainer
        self.memory = memory
        self.checkpoint: str | None = None

    def refuse_unseen_gradients(self) -> None:
        """Raises where a step's gradients are not to be found at the parameters that it changes."""
        trainer = self.trainer
        devices = sorted({str(parameter.device) for parameter in trainer.model.parameters()})
        kinds = {
            "DeepSpeed": trainer.is_deepspeed_enabled,
            "FSDP1 (set fsdp_config={'version': 2})": (
                trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2
            ),
            f"nn.DataParallel on {trainer.args.n_gpu} GPUs": trainer.args.n_gpu > 1,
            f"a model on {', '.join(devices)}": len(devices) > 1,
        }
        if found := ", ".join(kind for kind, present in kinds.items() if present):
            raise RuntimeError(f"a memory needs DDP, FSDP2 or one process on one device, found: {found}")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Starts from the weights as they are, or goes on from the checkpoint being resumed."""
        self.fuser = Fuser(self.trainer.model_wrapped, self.trainer.fusion, gate=self.trainer.gate)
        # Not prepared by the accelerator: its clip_grad_norm_ unscales the gradients of every optimizer it
        # knows, so twice those of parameters that two of them share.
        self.optimizer = self.trainer.create_outer_optimizer()
        for optimizer in self._optimizers():
            if (fused := _fused(optimizer)) is not None:
                fused.fuser = self.fuser
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.lr_fraction = 1.0
        self.memory_position = 0
        checkpoint, self.checkpoint = self.checkpoint, None
        self.start = self._moments()
        if checkpoint is not None:
            self._load(Path(checkpoint))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Observes the inner step about to be taken, and at which fraction of its base rate that is."""
        optimizer = self.trainer.optimizer
        # Where clipping (or measuring the norm) has unscaled the gradients already, the scaler refuses to.
        with contextlib.suppress(RuntimeError):
            self.trainer.accelerator.unscale_gradients(optimizer)
        if self._observe(optimizer):
            group = optimizer.param_groups[0]
            base = group.get("initial_lr", self.trainer.args.learning_rate)
            self.lr_fraction = float(group["lr"] / base) if base else 1.0

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Closes a round that no step's end has closed, unless the best model has been loaded."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            self.close(tail=True)

    def close(self, *, tail: bool) -> None:
        """Runs the outer learner and fuses if the round is full; with `tail`, if it has any inner step."""
        fusion = self.trainer.fusion
        if self.fuser.inner_observed < (1 if tail else fusion.inner_steps):
            return
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_fraction
        self.trainer.model_wrapped.zero_grad()  # training may have stopped between two micro-batches
        skipped = 0
        with self.fuser.outer():
            while self.fuser.outer_observed < fusion.outer_steps:
                skipped += not self._outer_step()
                if skipped > _MAX_SKIPPED:
                    raise RuntimeError(f"{skipped} outer steps of a round had gradients that are not finite")
        self._heed_gate()

    def _heed_gate(self) -> None:
        """Does to the optimizers and to training what the gate did to the parameters."""
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
        self.start = self._moments()

    def _optimizers(self) -> tuple[Any, Any]:
        return self.trainer.optimizer, self.optimizer

    def _moments(self) -> list[Any]:
        """Copies of both optimizers' state; none without a gate, which alone needs them."""
        if self.trainer.gate is None:
            return []
        return [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in self._optimizers()]

    def _outer_step(self) -> bool:
        """Takes one optimizer step on the memory; returns False if the gradient scaler skipped it."""
        trainer, args = self.trainer, self.trainer.args
        model, accelerator = trainer.model_wrapped, trainer.accelerator
        batches = self._memory_batches()
        samples, num_items = trainer.get_batch_samples(batches, args.gradient_accumulation_steps, args.device)
        trainer.current_gradient_accumulation_steps = len(samples)
        for index, inputs in enumerate(samples, start=1):
            last = index == len(samples)
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                trainer.training_step(model, inputs, num_items)
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
        """Observes the step about to be taken; returns False if the gradient scaler is going to skip it.

        An `rkif.optim.AdamW` observes in its own step.
        """
        scaler = self.trainer.accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)
            if not torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm):
                return False
        if _fused(optimizer) is None:
            self.fuser.observe()
        return True

    def _memory_batches(self) -> Iterator[Any]:
        # No DataLoader: it would draw from the global random numbers and, prepared by the accelerator, take
        # part in its gradient state.
        trainer, args = self.trainer, self.trainer.args
        size, seed = trainer._train_batch_size, args.seed if args.data_seed is None else args.data_seed
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="memory")
        walk = memory_walk(len(self.memory), self.memory_position, seed)
        # Every process takes its part of what one with so large a batch would.
        ranks, first = args.world_size, args.process_index * size
        while True:
            self.memory_position += ranks * size
            indices = list(islice(walk, ranks * size))[first : first + size]
            yield collate([self.memory[index] for index in indices])

    def save(self, folder: str) -> None:
        """Adds the state to a checkpoint."""
        progress = {"lr_fraction": self.lr_fraction, "memory_position": self.memory_position}
        if self.fuser.sharded:
            fuser_state.write(self.fuser, Path(folder, _FOLDER), self._spread_state(progress))
        if self.fuser.sharded or not self.trainer.args.should_save:
            return
        outer = {"optimizer": self.optimizer.state_dict(), **progress, "start": self.start}
        save_fuser, save_outer = partial(save_file, self.fuser.state_dict()), partial(torch.save, outer)
        for name, write in ((_FUSER_FILE, save_fuser), (_OUTER_FILE, save_outer)):
            replace_file(Path(folder, name), write)

    def _spread_state(self, progress: dict[str, float]) -> dict[str, torch.Tensor]:
        """The same as tensors by parameter names, those of parameters' shapes spread as they are."""
        state = flatten({"fuser": self.fuser.state_dict()})
        slots = [self.optimizer.state_dict()["state"], *self.start]
        for kind, numbered in zip(("outer", "start_inner", "start_outer"), slots, strict=False):
            for index, name in enumerate(self._names()):
                for slot, value in numbered.get(index, {}).items():
                    state[f"{kind}.{slot}.{name}"] = torch.as_tensor(value)
        return state | {name: torch.tensor(value, dtype=torch.float64) for name, value in progress.items()}

    def _names(self) -> list[str]:
        """The parameters' names in the order of the optimizers."""
        names = {id(parameter): name for name, parameter in self.fuser.parameters.items()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def _load_spread(self, folder: Path) -> None:
        state = fuser_state.read(self.fuser, folder)
        self.fuser.load_state_dict(section(state, "fuser"))
        slots: dict[str, dict[int, dict[str, Any]]] = {"outer": {}, "start_inner": {}, "start_outer": {}}
        indices = {name: index for index, name in enumerate(self._names())}
        for key, tensor in state.items():
            kind, _, rest = key.partition(".")
            slot, _, name = rest.partition(".")
            if kind in slots:
                slots[kind].setdefault(indices[name], {})[slot] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots.pop("outer"), "param_groups": groups})
        self.start = [] if self.trainer.gate is None else list(slots.values())
        self.lr_fraction, self.memory_position = float(state["lr_fraction"]), int(state["memory_position"])

    def _load(self, folder: Path) -> None:
        if self.fuser.sharded and (folder / _FOLDER).is_dir():
            self._load_spread(folder / _FOLDER)
            return
        if missing := [name for name in (_FUSER_FILE, _OUTER_FILE) if not (folder / name).is_file()]:
            raise ValueError(
                f"cannot resume from {folder} with a memory: it lacks {' and '.join(missing)}, as "
                "checkpoints of a trainer without a memory or with save_only_model do"
            )
        self.fuser.load_state_dict(load_file(folder / _FUSER_FILE))
        outer = torch.load(folder / _OUTER_FILE, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(outer["optimizer"])
        self.lr_fraction, self.memory_position = outer["lr_fraction"], outer["memory_position"]
        self.start = outer["start"]


def memory_walk(size: int, start: int, seed: int) -> Iterator[int]:
    """Endless epochs over `size` samples, each in an order of its own by the seed; from `start` on."""
    for epoch in count(start // size):
        yield from shuffled(size, derive_seed(seed, "memory order", epoch))[max(0, start - epoch * size) :]


def _fused(optimizer: Any) -> AdamW | None:
    """The optimizer, without accelerate's wrapper, if its steps take the importance along; else None."""
    plain = getattr(optimizer, "optimizer", optimizer)
    return plain if isinstance(plain, AdamW) else None


def _has_samples(memory: Any) -> bool:
    if memory is None:
        return False
    endless = isinstance(memory, torch.utils.data.IterableDataset)
    if endless or not (hasattr(memory, "__len__") and hasattr(memory, "__getitem__")):
        raise TypeError(f"memory_dataset must have a length and indexing, got {type(memory).__name__}")
    return len(memory) > 0
