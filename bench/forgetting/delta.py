"""Factor space or delta-weight space: what the choice does to a run, and to every fusion in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import rkif
from bench.common import rows as store
from bench.forgetting.instrument import replaced, row, silent_run
from rkif.continual.config import RunConfig, load_config
from rkif.fuser import Fuser
from rkif.fuser.snapshot import Snapshot

RESULTS = store.RESULTS / "delta.jsonl"
SPACES = {
    "factors": "factors, by importance",
    "factors_moved": "factors, by magnitude of change",
    "delta": "updates, by magnitude of change",
}
FIGURES = {
    "op": "OP",
    "bwt": "BWT",
    "distance": "distance of the other space's update, of its length",
    "cosine": "cosine of the two updates",
    "truncation": "beyond the rank",
}
Sides = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def measure(path: Path, console: Console) -> None:
    """Run a config once for every space, and write a row each with the means over its rounds."""
    config = load_config(path)
    config = RunConfig.model_validate(config.model_dump() | {"method": "recurrent_kif"})
    assert config.adapter is not None
    scaling = config.adapter.alpha / config.adapter.r
    rows = []
    for space in SPACES:
        with _fused_in(space, scaling) as rounds, silent_run(config) as (metrics, _):
            pass
        means = {key: fmean(each[key] for each in rounds) for key in ("distance", "cosine", "truncation")}
        figures = {"op": metrics["op"], "bwt": metrics["bwt"], **means}
        rows.append(row(path, config, space=space, rounds=len(rounds), **figures))
        console.print(rows[-1])
    store.write_all(RESULTS, rows)


def markdown() -> str:
    """The rows as a table."""
    return store.transposed(
        RESULTS,
        _caption,
        lambda row: SPACES[row["space"]],
        FIGURES,
        lambda key, value: f"{value:.1f}" if key in ("op", "bwt") else f"{value:.3f}",
    )


def _caption(row: store.Row) -> str:
    return (
        f"{row['model']} ({row['config']}), one run each, {row['rounds']} rounds, at {store.commit_of(row)}."
    )


@contextmanager
def _fused_in(space: str, scaling: float) -> Iterator[list[dict[str, float]]]:
    """Fuse in that space while the block runs; yields the distance to what the other space would give."""
    rounds: list[dict[str, float]] = []
    fuse = Fuser.fuse

    def watched(fuser: Fuser) -> Any:
        state = fuser.state_dict()
        base, inner = ({n: state[f"{at}.{n}"] for n in fuser.parameters} for at in ("base", "inner"))
        outer = {name: p.detach().clone() for name, p in fuser.parameters.items()}
        sides: Sides = (base, inner, outer)
        settings = {"density": fuser.config.density, "rule": fuser.config.rule}
        report = fuse(fuser)
        delta = rkif.fuse_delta(*sides, scaling=scaling, **settings)  # type: ignore[arg-type]
        made: dict[str, Callable[[], Mapping[str, Tensor]]] = {
            "factors": fuser.base,
            "factors_moved": lambda: _by_magnitude(sides, settings),
            "delta": lambda: delta.params,
        }
        own = made[space]()
        other = delta.params if space != "delta" else _by_magnitude(sides, settings)
        _put(fuser, own)
        start = _updates(base, scaling)
        moved, moved_elsewhere = (_updates(tensors, scaling) - start for tensors in (own, other))
        rounds.append(
            {
                "distance": float((moved - moved_elsewhere).norm() / moved.norm()),
                "cosine": float(torch.cosine_similarity(moved, moved_elsewhere, dim=0)),
                "truncation": fmean(delta.truncation.values()),
            }
        )
        return report

    with replaced(Fuser, fuse=watched):
        yield rounds


def _by_magnitude(sides: Sides, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    base, inner, outer = sides
    moved_in = {name: (inner[name] - base[name]).abs() for name in base}
    moved_out = {name: (outer[name] - inner[name]).abs() for name in base}
    return rkif.fuse(base, inner, outer, moved_in, moved_out, **settings).params


@torch.no_grad()
def _put(fuser: Fuser, params: Mapping[str, Tensor]) -> None:
    for name, parameter in fuser.parameters.items():
        parameter.copy_(params[name])
    base: Snapshot = fuser._base
    base.copy_from(range(len(params)), [params[name] for name in fuser.parameters])


def _updates(tensors: Mapping[str, Tensor], scaling: float) -> Tensor:
    """All modules' updates in a row."""
    return torch.cat(
        [
            (scaling * tensors[name.replace("lora_A", "lora_B")] @ factor).flatten()
            for name, factor in tensors.items()
            if "lora_A" in name
        ]
    )
