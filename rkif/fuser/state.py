"""The state of a :class:`rkif.Fuser` by name: collected, validated, loaded, and stored in a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rkif.distributed.checkpoint import read_state, write_state
from rkif.distributed.shards import to_dtensor_like, to_local_like
from rkif.fuser.state_names import flatten, section

if TYPE_CHECKING:
    from rkif.fuser.fuser import Fuser

# Prefixes of parameters' names in a state, see _tensors.
_KIND = re.compile(r"^(base|inner|(start\.)?(inner|outer)_importance\.(sensitivity|uncertainty|mask))\.")


def synchronize(fuser: Fuser) -> None:
    """Wait until the copies of the parameters are complete."""
    for snapshot in (fuser._base, fuser._inner):
        if snapshot is not None:
            snapshot.synchronize()


def state_of(fuser: Fuser) -> dict[str, Tensor]:
    """See :meth:`rkif.Fuser.state_dict`."""
    synchronize(fuser)
    state = {
        name: to_dtensor_like(
            tensor.to(memory_format=torch.contiguous_format, copy=True), _parameter_of(fuser, name)
        )
        for name, tensor in _tensors(fuser).items()
    }
    if fuser._gatekeeper is not None:
        state |= flatten({"gate": fuser._gatekeeper.tensors()})
    if (thresholds := fuser._importance["inner"].thresholds) is not None:
        state["inner_thresholds"] = thresholds.clone()
    if not fuser.config.refresh_outer:
        state["outer_settled"] = torch.tensor(int(fuser._outer_settled))
    state["nonfinite"] = fuser._shards.all_reduce_sum(fuser._nonfinite)[0].clone()
    state["phase"] = torch.tensor(["inner", "outer"].index(fuser.phase))
    state["round"] = torch.tensor(fuser.round)
    state["inner_observed"] = torch.tensor(fuser.inner_observed)
    state["outer_observed"] = torch.tensor(fuser.outer_observed)
    state["with_gradient"] = torch.tensor(
        [name in fuser._steps.with_gradient for name in sorted(fuser.parameters)]
    )
    return state


def load_state(fuser: Fuser, state: Mapping[str, Tensor]) -> None:
    """See :meth:`rkif.Fuser.load_state_dict`."""
    scalars = {"nonfinite", "phase", "round", "inner_observed", "outer_observed", "with_gradient"}
    scalars |= set() if fuser.config.refresh_outer else {"outer_settled"}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state[{name!r}] must be a tensor; got {type(value).__name__}")
    for name in sorted(scalars - set(state)):
        raise ValueError(f"the state lacks {name!r}")
    for name in sorted(scalars - {"with_gradient"}):
        value = state[name]
        if value.numel() != 1 or value.is_floating_point() or int(value) < 0:
            raise ValueError(f"state[{name!r}] must be one whole number; got {value!r}")
    thresholds_a_side = len(fuser.parameters) if fuser.config.scope == "tensor" else 1
    in_outer = bool(state["phase"])
    packed = in_outer and fuser.config.pack_inner
    expected = _expected(fuser, in_outer=in_outer, packed=packed)
    others = {"gate.counters", "gate.known"} if fuser._gatekeeper is not None else set()
    others |= {"inner_thresholds"} if packed else set()
    for name in sorted(set(state) - scalars ^ (set(expected) | others)):
        which = "lacks" if name not in state else "has an entry that this fuser does not have:"
        raise ValueError(f"the state {which} {name!r}")
    for name, dtype in expected.items():
        given, shape = state[name], _parameter_of(fuser, name).shape
        if given.shape != shape or given.dtype != dtype:
            raise ValueError(
                f"state[{name!r}] is {given.dtype} {tuple(given.shape)}; "
                f"this fuser has {dtype} {tuple(shape)}"
            )
    if state["with_gradient"].shape != (len(fuser.parameters),):
        raise ValueError(f"state['with_gradient'] must have {len(fuser.parameters)} elements")
    thresholds = state["inner_thresholds"].to(fuser._nonfinite.device) if packed else None
    if thresholds is not None and thresholds.shape != (thresholds_a_side,):
        raise ValueError(f"state['inner_thresholds'] must have {thresholds_a_side} elements")
    if fuser._gatekeeper is not None:
        counters, known = state["gate.counters"], state["gate.known"]
        if counters.shape != (2,) or counters.is_floating_point() or int(counters.min()) < 0:
            raise ValueError(f"state['gate.counters'] must be two whole numbers; got {counters!r}")
        if known.dim() != 1:
            raise ValueError(f"state['gate.known'] must have one dimension; got shape {tuple(known.shape)}")

    parts = {name: to_local_like(state[name], _parameter_of(fuser, name)) for name in expected}
    if fuser._gatekeeper is not None:
        fuser._gatekeeper.load_tensors(section(state, "gate"))
    for learner, importance in fuser._importance.items():
        of_learner = section(parts, f"{learner}_importance")
        importance.load_tensors(of_learner, thresholds if learner == "inner" else None)
    inner = fuser._snapshot(fuser._dtypes) if in_outer else None
    fuser._snapshots.put_back(fuser._inner)
    fuser._inner = inner
    synchronize(fuser)
    for name, tensor in _tensors(fuser).items():
        if not name.startswith(("inner_importance.", "outer_importance.")):
            tensor.copy_(parts[name])
    # The count is a sum over processes, so one of them loads it.
    fuser._nonfinite.copy_(
        torch.tensor([int(state["nonfinite"]) if fuser._shards.processes.rank == 0 else 0, 0])
    )
    if not fuser._shards.sharded:
        fuser._nonfinite[0] = int(state["nonfinite"])
    if fuser._ledger is not None:
        fuser._ledger.resumed = True
    fuser._observer = None
    fuser.phase = "outer" if in_outer else "inner"
    fuser._outer_settled = bool(state.get("outer_settled", False))
    fuser.round = int(state["round"])
    flags = zip(sorted(fuser.parameters), state["with_gradient"].tolist(), strict=True)
    fuser._steps.load(
        {"inner": int(state["inner_observed"]), "outer": int(state["outer_observed"])},
        (name for name, flag in flags if flag),
    )


def write(fuser: Fuser, folder: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    """Write tensors, those of :func:`state_of` and others, to a folder; all processes must call it."""
    write_state(folder, state, fuser._shards.processes)


def read(fuser: Fuser, folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what :func:`write` wrote. A tensor whose name ends in a parameter's name is sharded like it."""

    def empty_for(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        for parameter_name, parameter in fuser.parameters.items():
            if name.endswith(f".{parameter_name}") and parameter.shape == shape:
                return torch.empty_like(parameter, dtype=dtype)
        return torch.empty(shape, dtype=dtype)

    return read_state(folder, empty_for, fuser._shards.processes)


def _tensors(fuser: Fuser) -> dict[str, Tensor]:
    """Name -> tensor of the state that has a parameter's shape; only packed masks are copies."""
    snapshots = {"base": fuser._base} | ({} if fuser._inner is None else {"inner": fuser._inner})
    sections = {
        kind: dict(zip(fuser.parameters, snapshot.tensors, strict=True))
        for kind, snapshot in snapshots.items()
    }
    for learner, importance in fuser._importance.items():
        sections[f"{learner}_importance"] = importance.tensors()
    return flatten(sections | {"start": fuser._kept.start})


def _expected(fuser: Fuser, *, in_outer: bool, packed: bool) -> dict[str, torch.dtype]:
    """Name -> dtype of the tensors that a state has in a phase."""
    snapshots = {"base": fuser._base_dtypes} | ({"inner": fuser._dtypes} if in_outer else {})
    sections = {kind: dict(zip(fuser.parameters, dtypes, strict=True)) for kind, dtypes in snapshots.items()}
    for learner, importance in fuser._importance.items():
        sections[f"{learner}_importance"] = importance.dtypes(packed=packed and learner == "inner")
    sections["start"] = {name: tensor.dtype for name, tensor in fuser._kept.start.items()}
    return flatten(sections)


def _parameter_of(fuser: Fuser, name: str) -> Tensor:
    """The parameter that a tensor of the state belongs to."""
    return fuser.parameters[_KIND.sub("", name)]
