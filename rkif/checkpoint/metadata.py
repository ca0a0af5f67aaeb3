"""The files of an output beside its weights: index, companions of the base, model card and manifest."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rkif.checkpoint.card import copy_companions, write_card
from rkif.checkpoint.digests import EMPTY
from rkif.checkpoint.manifest import content_digest, write_manifest
from rkif.checkpoint.output import OUT
from rkif.checkpoint.preflight import Plan
from rkif.files import fsync_file, write_text


class _Totals(NamedTuple):
    """Sums over all chunks: counts, squared norms, and SHA-256 by argument and tensor."""

    counts: list[int]
    squared_norms: list[float]
    digests: dict[str, dict[str, str]]

    def digest(self, argument: str, name: str) -> str:
        return self.digests.get(argument, {}).get(name, EMPTY)


def write_metadata(
    plan: Plan,
    folder: Path,
    records: Iterable[Mapping[str, Any]],
    thresholds: Tensor | None,
    truncation: Mapping[str, float],
) -> None:
    """Write the metadata files beside the finished weights in ``folder``; remove all other files.

    Args:
        plan: the plan of the fusion.
        folder: the folder of the weights.
        records: of all processes, as :class:`rkif.checkpoint.output.OutputWriter` makes them.
        thresholds: float32 [models, 1] or [models, tensors]; None for a method without thresholds.
        truncation: module -> error of its factorised update; empty unless updates are factorised.
    """
    base, method = plan.base, plan.request.method
    _remove_leftovers(plan, folder)
    if plan.layout.index is not None:
        write_text(folder / f"{base.stem}.safetensors.index.json", json.dumps(plan.layout.index, indent=2))
    copy_companions(base, folder)

    totals = _sum(plan, records)
    inputs = {}
    for argument, checkpoint in plan.checkpoints.items():
        content = {name: (entry, totals.digest(argument, name)) for name, entry in checkpoint.tensors.items()}
        inputs[argument] = {"name": checkpoint.name, "content_sha256": content_digest(content)}
    tensors = {
        tensor.name: (tensor.target, totals.digest(OUT, tensor.name)) for tensor in plan.layout.tensors
    }
    settings, report = plan.request.settings, _report(plan, totals, thresholds)
    if truncation:
        report["truncation"] = {module: float(f"{share:.6g}") for module, share in truncation.items()}
    write_card(folder, base, inputs, method.name, settings, report, content_digest(tensors))
    header = {
        "rkif": importlib.metadata.version("rkif"),
        "method": method.name,
        "settings": settings,
        "inputs": inputs,
        "report": report,
        "identity_sha256": plan.identity,
    }
    write_manifest(folder, tensors, header)


def _remove_leftovers(plan: Plan, folder: Path) -> None:
    """Flush the weights to disk; remove other files of an earlier attempt, which may be incomplete."""
    for path in folder.iterdir():
        if path.name in plan.layout.sizes:
            fsync_file(path)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sum(plan: Plan, records: Iterable[Mapping[str, Any]]) -> _Totals:
    """The sum over the chunks in the order of their indices, so it does not depend on the processes."""
    counts, squared_norms = [0] * len(plan.request.cases), [0.0] * len(plan.request.norms)
    digests: dict[str, dict[str, str]] = {}
    by_chunk = {record["chunk"]: record for record in records if "chunk" in record}
    for _, record in sorted(by_chunk.items()):
        counts = [a + b for a, b in zip(counts, record["counts"], strict=True)]
        squared_norms = [a + b for a, b in zip(squared_norms, record["squared_norms"], strict=True)]
        for argument, by_tensor in record["digests"].items():
            digests.setdefault(argument, {}).update(by_tensor)
    return _Totals(counts, squared_norms, digests)


def _report(plan: Plan, totals: _Totals, thresholds: Tensor | None) -> dict[str, Any]:
    """A :class:`rkif.FusionReport` as JSON. Norms have six digits, because further ones depend on the chunks.

    Except for two models, counts are by the number of models that select an element, thresholds by model, and
    norms by the model's name.
    """
    names = [tensor.name for tensor in (plan.updates or plan.layout).tensors]
    sides: list[Any] = [None] * plan.request.method.models
    if thresholds is not None:
        for side, row in enumerate(thresholds.tolist()):
            values = [value if math.isfinite(value) else None for value in row]
            by_tensor = dict(zip(names, values, strict=False))
            sides[side] = values[0] if plan.request.method.scope == "global" else by_tensor
    norms = [float(f"{math.sqrt(value):.6g}") for value in totals.squared_norms]
    return {
        "numel": plan.numel,
        "thresholds": sides,
        "counts": dict(zip(plan.request.cases, totals.counts, strict=True)),
        "norms": dict(zip(plan.request.norms, norms, strict=True)),
    }
