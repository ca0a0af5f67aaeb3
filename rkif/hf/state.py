"""State and settings of the rounds in a checkpoint of a Trainer: two files, or a folder of shards."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rkif.files import (
    load_tensors,
    named_in_errors,
    parse_json,
    read_text,
    remove_temporary,
    replace_file,
    replace_tensors,
    require_object,
    write_text,
)
from rkif.fuser import state as fuser_state
from rkif.fuser.state_names import flatten, section

if TYPE_CHECKING:
    from rkif.hf.rounds import TrainerRounds

FUSER_FILE = "rkif_fuser.safetensors"
OUTER_FILE = "rkif_outer.pt"
SETTINGS_FILE = "rkif_settings.json"
SHARDS = "rkif"  # a folder in place of both files if the parameters are sharded
# Sections of the sharded state: the moments of the outer optimizer, and of both at the start of the round.
SECTIONS = ("outer", "start_inner", "start_outer")
# Settings of the fusion that may change on resume: they change no result, or only replace an error.
FREE = {"pack_inner", "offload", "nonfinite", "missing"}


def save(rounds: TrainerRounds, folder: Path) -> None:
    """Add the state to a checkpoint. If the parameters are sharded, every process must call it.

    Args:
        rounds: the trainer's rounds.
        folder: the checkpoint's folder.
    """
    if rounds.trainer.args.should_save:
        write_text(folder / SETTINGS_FILE, json.dumps(_settings(rounds), indent=2) + "\n")
    progress = {"lr_fraction": rounds.lr_fraction, "memory_position": rounds.memory_position}
    if rounds.fuser.sharded:
        fuser_state.write(rounds.fuser, folder / SHARDS, _sharded_state(rounds, progress))
    elif rounds.trainer.args.should_save:
        outer = {"optimizer": rounds.optimizer.state_dict(), **progress, "start": rounds.start}
        remove_temporary(folder)
        replace_tensors(folder / FUSER_FILE, rounds.fuser.state_dict())
        replace_file(folder / OUTER_FILE, partial(torch.save, outer))


def load(rounds: TrainerRounds, folder: Path) -> None:
    """Restore the state that :func:`save` wrote; the same processes must call it.

    Raises:
        ValueError: the checkpoint has no such state, a damaged one, or that of other parameters or settings.
        OSError: a file cannot be read; it names the file.
    """
    _require_same_settings(rounds, folder)
    if rounds.fuser.sharded and (folder / SHARDS).is_dir():
        _load_shards(rounds, folder / SHARDS)
        return
    if missing := [name for name in (FUSER_FILE, OUTER_FILE) if not (folder / name).is_file()]:
        raise ValueError(
            f"cannot resume from {folder} with a memory: it lacks {' and '.join(missing)}, as "
            "checkpoints of a trainer without a memory or with save_only_model do"
        )
    outer = _read_outer(folder / OUTER_FILE)
    rounds.fuser.load_state_dict(load_tensors(folder / FUSER_FILE))
    rounds.optimizer.load_state_dict(outer["optimizer"])
    rounds.lr_fraction, rounds.memory_position = outer["lr_fraction"], outer["memory_position"]
    rounds.start = outer["start"]


def _read_outer(path: Path) -> dict[str, Any]:
    """The content of ``OUTER_FILE``.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        with named_in_errors(path):
            content = torch.load(path, map_location="cpu", weights_only=True)
        return {key: content[key] for key in ("optimizer", "lr_fraction", "memory_position", "start")}
    except OSError:
        raise
    except Exception as error:  # pickle raises errors of many classes
        raise ValueError(
            f"{path} is damaged: it cannot be read as the state of the outer optimizer"
        ) from error


def _settings(rounds: TrainerRounds) -> dict[str, Any]:
    """The settings that must be the same in a resumed training, as JSON values."""
    trainer = rounds.trainer
    fusion = {name: value for name, value in asdict(trainer.fusion).items() if name not in FREE}
    settings = fusion | {
        "outer_learning_rate": trainer.outer_learning_rate,
        "memory samples": len(rounds.memory),
        "memory digest": rounds.memory_digest,
    }
    return dict(json.loads(json.dumps(settings, default=str)))


def _require_same_settings(rounds: TrainerRounds, folder: Path) -> None:
    """Raise ValueError if the checkpoint's settings differ or are damaged; older checkpoints have none."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return
    now, saved = _settings(rounds), require_object(parse_json(read_text(path), path), path)
    digests = now.pop("memory digest"), saved.pop("memory digest", None)
    if different := [name for name in now if name in saved and saved[name] != now[name]]:
        then, here = (", ".join(f"{name}={row[name]!r}" for name in different) for row in (saved, now))
        raise ValueError(f"cannot resume from {folder}: it was saved with {then}; this trainer has {here}")
    if digests[0] != digests[1]:
        warnings.warn(
            f"memory_dataset has other samples than the memory that {folder} was saved with", stacklevel=2
        )


def _sharded_state(rounds: TrainerRounds, progress: dict[str, float]) -> dict[str, Tensor]:
    """The state as tensors by name. Those of parameters' shapes are sharded like the parameters."""
    state = flatten({"fuser": rounds.fuser.state_dict()})
    moments = [rounds.optimizer.state_dict()["state"], *rounds.start]
    for kind, state_of_index in zip(SECTIONS, moments, strict=False):  # without a gate there is no start
        for index, name in enumerate(_names(rounds)):
            for slot, value in state_of_index.get(index, {}).items():
                state[f"{kind}.{slot}.{name}"] = torch.as_tensor(value)
    return state | {name: torch.tensor(value, dtype=torch.float64) for name, value in progress.items()}


def _load_shards(rounds: TrainerRounds, folder: Path) -> None:
    state = fuser_state.read(rounds.fuser, folder)
    rounds.fuser.load_state_dict(section(state, "fuser"))
    indices = {name: index for index, name in enumerate(_names(rounds))}
    moments: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in SECTIONS}
    for kind, state_of_index in moments.items():
        for key, tensor in section(state, kind).items():
            slot, _, name = key.partition(".")
            state_of_index.setdefault(indices[name], {})[slot] = tensor
    outer, *start = moments.values()
    groups = rounds.optimizer.state_dict()["param_groups"]
    rounds.optimizer.load_state_dict({"state": outer, "param_groups": groups})
    rounds.start = [] if rounds.trainer.gate is None else start
    rounds.lr_fraction, rounds.memory_position = float(state["lr_fraction"]), int(state["memory_position"])


def _names(rounds: TrainerRounds) -> list[str]:
    """The parameters' names in the order of the optimizers."""
    names = {id(parameter): name for name, parameter in rounds.fuser.parameters.items()}
    return [names[id(p)] for group in rounds.optimizer.param_groups for p in group["params"]]
