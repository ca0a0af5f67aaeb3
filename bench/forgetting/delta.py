"""Fusion in factor space compared with fusion in delta-weight space: whole runs, and single fusions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import rkif
from bench.common import rows as store
from bench.forgetting import instrument
from bench.forgetting.instrument import Sides
from rkif.continual.config import load_config
from rkif.fuser import Fuser
from rkif.fuser.snapshot import Snapshot
from rkif.fusion import FusionReport

RESULTS = store.RESULTS / "delta.jsonl"
SPACES = {
    "factors": "factors, by importance",
    "factors_moved": "factors, by magnitude of change",
    "delta": "updates, by magnitude of change",
}
OF_RUNS = {"op": "OP", "bwt": "BWT"}
OF_ROUNDS = {
    "distance": "distance to the other space's update / length of this update",
    "cosine": "cosine of the two updates",
    "truncation": "share lost at the adapter's rank",
}


def measure(path: Path) -> Iterator[store.Row]:
    """Run a config once in every space, and yield a row for each, with the means over its rounds."""
    config = instrument.recurrent_kif(load_config(path))
    assert config.adapter is not None
    compare = partial(_compare, scaling=config.adapter.alpha / config.adapter.r)
    for space in SPACES:
        with (
            instrument.watched_fusions(partial(compare, space)) as rounds,
            instrument.silent_run(config) as (metrics, _),
        ):
            measured = {key: metrics[key] for key in OF_RUNS} | instrument.means(rounds, OF_ROUNDS)
        yield instrument.row(path, config, space=space, rounds=len(rounds), **measured)


def markdown() -> str:
    """The rows as a table."""
    return store.transposed(
        RESULTS,
        _caption,
        lambda row: SPACES[row["space"]],
        OF_RUNS | OF_ROUNDS,
        lambda key, value: f"{value:.1f}" if key in OF_RUNS else f"{value:.3f}",
    )


def _caption(row: store.Row) -> str:
    return (
        f"{row['model']} ({row['config']}), one run each, {row['rounds']} rounds, at {store.commit_of(row)}."
    )


def _compare(space: str, fuser: Fuser, sides: Sides, _: FusionReport, *, scaling: float) -> dict[str, float]:
    """Replace the fuser's result by the fusion in ``space``, and compare it with that in the other space."""
    settings: dict[str, Any] = {"density": fuser.config.density, "rule": fuser.config.rule}
    delta = rkif.fuse_delta(*sides, scaling=scaling, **settings)
    fused: dict[str, Callable[[], Mapping[str, Tensor]]] = {
        "factors": fuser.base,
        "factors_moved": lambda: _by_magnitude(sides, settings),
        "delta": lambda: delta.params,
    }
    here = fused[space]()
    elsewhere = delta.params if space != "delta" else _by_magnitude(sides, settings)
    _set_parameters(fuser, here)
    start = _updates(sides.base, scaling)
    moved, moved_elsewhere = (_updates(tensors, scaling) - start for tensors in (here, elsewhere))
    return {
        "distance": float((moved - moved_elsewhere).norm() / moved.norm()),
        "cosine": float(torch.cosine_similarity(moved, moved_elsewhere, dim=0)),
        "truncation": fmean(delta.truncation.values()),
    }


def _by_magnitude(sides: Sides, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    base, inner, outer = sides
    moved_in = {name: (inner[name] - base[name]).abs() for name in base}
    moved_out = {name: (outer[name] - inner[name]).abs() for name in base}
    return rkif.fuse(base, inner, outer, moved_in, moved_out, **settings).params


@torch.no_grad()
def _set_parameters(fuser: Fuser, params: Mapping[str, Tensor]) -> None:
    """Set the parameters, and the base of the next round."""
    for name, parameter in fuser.parameters.items():
        parameter.copy_(params[name])
    base: Snapshot = fuser._base
    base.copy_from(range(len(params)), [params[name] for name in fuser.parameters])


def _updates(tensors: Mapping[str, Tensor], scaling: float) -> Tensor:
    """The updates of all modules, flattened and concatenated."""
    return torch.cat(
        [
            (scaling * tensors[name.replace("lora_A", "lora_B")] @ factor).flatten()
            for name, factor in tensors.items()
            if "lora_A" in name
        ]
    )
