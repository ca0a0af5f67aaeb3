"""The program of the tests of the trainer on several processes: `hf_ranks_program.py KIND FOLDER`.

On a CPU, accelerate wraps every model in DDP. For "fsdp" this is prevented, and the model is sharded
beforehand, as transformers does when it loads a model.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from hf_helpers import InOrderTrainer, rows, trainer
from ranks_program import end_well
from safetensors.torch import save_file
from tiny import tiny_llama
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rkif.gate import Criterion, Gate
from rkif.hf.state import load, save

WORLD = int(os.environ.get("WORLD_SIZE", "1"))


class FailingTrainer(InOrderTrainer):
    """Fails on rank 1 in its first outer step."""

    def training_step(self, model: Any, *args: Any) -> Tensor:
        if self.fuser is not None and self.fuser.phase == "outer" and self.args.process_index == 1:
            raise OSError("the disk with the memory is gone")
        return super().training_step(model, *args)


def make(how: str, folder: Path, **changes: Any) -> Any:
    """Steps of two micro-batches of six records, for any number of processes."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 6 // WORLD,
        "gradient_accumulation_steps": 2,
        "train_dataset": rows(60, seed=1),
        "memory_dataset": rows(9, seed=2),
        "max_steps": 8,
        "logging_strategy": "steps",
        "logging_steps": 4,
        "ddp_find_unused_parameters": False,
    }
    if how in ("full", "fsdp"):
        settings["model"] = tiny_llama(40, 0)
    run = trainer(folder, kind=changes.pop("kind", InOrderTrainer), **(settings | changes))
    if how == "fsdp":
        for layer in run.model.model.layers:
            fully_shard(layer)
        fully_shard(run.model)
        accelerate.Accelerator.prepare_model = lambda self, model, *args, **kwargs: model
    return run


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def end(run: Any) -> dict[str, Tensor]:
    """The parameters and the logged losses of the memory, which must be equal on every process."""
    found = {name: whole(p) for name, p in run.fuser.parameters.items()}
    losses = (log.get("rkif/outer_loss") for log in run.state.log_history)
    found["outer losses"] = torch.tensor([loss for loss in losses if loss is not None])
    every: list[Any] = [None] * WORLD
    if WORLD > 1:
        dist.all_gather_object(every, found)
    for other in every[1:]:
        assert all(torch.equal(other[name], found[name]) for name in found)
    return found | {"rounds": torch.tensor(run.fuser.round)}


def keep(run: Any, path: Path, tensors: dict[str, Tensor]) -> None:
    if run.args.process_index == 0:
        save_file(tensors, path)


def trains(kind: str, folder: Path) -> None:
    run = make(kind, folder / "run")
    run.train()
    keep(run, folder / f"{kind}-{WORLD}.safetensors", end(run))


def resumes(folder: Path) -> None:
    """Resume from the middle of a round, under DDP."""
    run = make("ddp", folder / "run", save_strategy="steps", save_steps=5)
    run.train()
    expected = end(run)
    again = make("ddp", folder / "again")
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-5"))
    found = end(again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    keep(run, folder / "resumed.safetensors", found)


def keeps_shards(folder: Path) -> None:
    """A sharded checkpoint has the trainer's state, with a gate, which also keeps moments."""
    gate = Gate([Criterion("always", lambda: 1.0)])
    run = make("fsdp", folder / "run", gate=gate)
    run.train()
    rounds = run._rkif
    folder.mkdir(exist_ok=True)
    save(rounds, folder)
    position, fraction = rounds.memory_position, rounds.lr_fraction
    expected = {name: whole(tensor) for name, tensor in _state(rounds).items()}
    assert all(tensor.any() for tensor in expected.values())
    for tensor in _state(rounds).values():
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    rounds.memory_position, rounds.lr_fraction = 0, 0.0
    load(rounds, folder)
    assert (rounds.memory_position, rounds.lr_fraction) == (position, fraction)
    found = {name: whole(tensor) for name, tensor in _state(rounds).items()}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    keep(run, folder / "shards.safetensors", found)


def _state(rounds: Any) -> dict[str, Tensor]:
    """Tensors of the outer learner and of the round's start that are not zero, not copies."""
    states = {"outer": rounds.optimizer.state_dict()["state"]}
    states |= dict(zip(("start_inner", "start_outer"), rounds.start, strict=True))
    tensors = {
        f"{kind}.{number}.{slot}": tensor
        for kind, numbered in states.items()
        for number, slots in numbered.items()
        for slot, tensor in slots.items()
    }
    base = zip(rounds.fuser.parameters, rounds.fuser._base.tensors, strict=True)
    return tensors | {f"base.{name}": tensor for name, tensor in base}


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen, where = sys.argv[1], Path(sys.argv[2])
    if chosen == "fails":
        make("ddp", where, kind=FailingTrainer).train()
    elif chosen in ("resumes", "keeps_shards"):
        globals()[chosen](where)
    else:
        trains(chosen, where)
    if WORLD > 1:
        end_well()
