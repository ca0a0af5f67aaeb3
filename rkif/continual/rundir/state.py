"""The state of a run between two steps, on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rkif.checkpoint.buffers import as_bytes
from rkif.continual.rundir.schema import StateHeader
from rkif.files import file_sha256, parse_json, remove_temporary, replace_tensors, validated
from rkif.fuser.state_names import flatten, section

CHECKPOINT = "checkpoint.safetensors"
POSITION = ("task", "step", "samples", "ledger_records")


@dataclass(frozen=True)
class RunState:
    """The position of a run, and the state on which its next step depends.

    Attributes:
        task: index of the current task.
        step: number of inner steps taken on it.
        samples: number of records trained on in this task.
        ledger_records: number of ledger records written at that time.
        parameters: name -> trainable parameter.
        method: the method's state between two steps.
    """

    task: int
    step: int
    samples: int
    ledger_records: int
    parameters: dict[str, Tensor]
    method: dict[str, Tensor]


def read_checkpoint(run: Path) -> RunState | None:
    """Read a run's checkpoint; None if there is none yet.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / CHECKPOINT
    return read_state(path) if path.exists() else None


def write_state(path: Path, state: RunState, record: Callable[[str], object] | None = None) -> None:
    """Write a state, under a temporary name first.

    Args:
        path: the file.
        state: the state; equal tensors are stored once.
        record: called with the file's SHA-256 before the file is renamed.
    """
    stored, metadata = _stored(state)
    written = None if record is None else lambda temporary: record(file_sha256(temporary))
    remove_temporary(path.parent)
    replace_tensors(path, stored, metadata, written)


def state_sha256(state: RunState) -> str:
    """SHA-256 of the file that :func:`write_state` writes."""
    return hashlib.sha256(save(*_stored(state))).hexdigest()


def _stored(state: RunState) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a state's file.

    Of equal tensors, only the first is stored. Many are equal: after a round the base equals the parameters,
    and cleared importance is zero.
    """
    tensors = flatten({"parameters": state.parameters, "method": state.method})
    # A tensor, because safetensors writes several entries of metadata in an order that varies between files.
    tensors["position"] = torch.tensor([getattr(state, name) for name in POSITION])
    stored: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    same = {}
    for name, tensor in storable(tensors).items():
        content = hashlib.blake2b(as_bytes(tensor.view(-1)), digest_size=32).digest()
        original = first.setdefault((tensor.dtype, tensor.shape, content), name)
        if original == name:
            stored[name] = tensor
        else:
            same[name] = original
    return stored, {"same": json.dumps(same, sort_keys=True)}


def state_bytes(state: RunState) -> int:
    """An upper bound of a state's size on disk in bytes, without the file's header."""
    return sum(tensor.nbytes for tensor in (*state.parameters.values(), *state.method.values()))


def read_state(path: Path) -> RunState:
    """Read a file that :func:`write_state` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            same = parse_json((file.metadata() or {})["same"], "metadata")
        position = tensors.pop("position")
        if position.shape != (len(POSITION),) or position.dtype != torch.int64:
            raise ValueError(f"'position' is {position.dtype} {tuple(position.shape)}")
        header = dict(zip(POSITION, position.tolist(), strict=True))
        validated(StateHeader, header | {"same": same}, "its header")
        tensors |= {name: tensors[original].clone() for name, original in same.items()}
        parameters, method = section(tensors, "parameters"), section(tensors, "method")
        if len(parameters) + len(method) < len(tensors):
            raise ValueError("it holds tensors of an unknown section")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return RunState(**header, parameters=parameters, method=method)


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies on the CPU: safetensors needs contiguous tensors that share no memory."""
    return {
        name: t.detach().clone(memory_format=torch.contiguous_format).cpu() for name, t in tensors.items()
    }
