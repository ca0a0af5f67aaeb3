"""The rounds of a Trainer: when its outer learner trains, and when both are fused."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from rkif import Fuser
from rkif.files import replace_file
from rkif.fuser import state as fuser_state
from rkif.fuser.state_names import flatten, section
from rkif.optim import AdamW
from rkif.seeding import derive_seed, shuffled

if TYPE_CHECKING:
    from rkif.hf.trainer import RKIFMixin

_FUSER_FILE = "rkif_fuser.safetensors"
_OUTER_FILE = "rkif_outer.pt"
_FOLDER = "rkif"  # instead of both, where parameters are spread over processes
# A gradient scaler halves its scale at each overflow: so many in one round are no matter of scale any more.
_MAX_SKIPPED = 16


class Rounds(TrainerCallback):  # type: ignore[misc]
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
