"""The values in records of rounds: digests of parameters, effects by tensor, and reports as JSON."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rkif.fusion import FusionReport, Thresholds
from rkif.ledger.chain import LedgerRecord
from rkif_kernels import CASES

FORMAT = 2  # version of the files of a run; version 1 had no digests of states and metrics


def now() -> str:
    """The current time in UTC, in ISO 8601, with seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def begin_record(method: str, tasks: Sequence[str], parameters: str) -> dict[str, Any]:
    """The content of a ledger's first record; ``parameters`` is their digest before training."""
    return {
        "event": "begin",
        "format": FORMAT,
        "method": method,
        "tasks": list(tasks),
        "versions": {name: importlib.metadata.version(name) for name in ("rkif", "torch")},
        "parameters": {"after": parameters},
    }


def not_rolled_back(records: Iterable[LedgerRecord]) -> list[LedgerRecord]:
    """The records in order, without the rounds, states, tasks and measurements that a rollback undid."""
    kept: list[LedgerRecord] = []
    for record in records:
        if record["event"] == "rollback":
            tasks = 0
            remaining = []
            for earlier in kept:
                tasks += earlier["event"] == "task"
                late = earlier["event"] in ("round", "state") and earlier.get("round", 0) > record["to"]
                late |= earlier["event"] in ("task", "measured") and tasks > record["finished"]
                if not late:
                    remaining.append(earlier)
            kept = remaining
        kept.append(record)
    return kept


def find_round(records: Iterable[LedgerRecord], number: int, run: object) -> LedgerRecord:
    """The record of a round that was not rolled back.

    Raises:
        ValueError: there is none; it names ``run``.
    """
    records = list(records)
    rounds = {record["round"]: record for record in not_rolled_back(records) if record["event"] == "round"}
    if number not in rounds:
        has = f"has the rounds 1 to {max(rounds)}" if rounds else "has no rounds"
        since = (
            " since it was rolled back" if any(record["event"] == "rollback" for record in records) else ""
        )
        raise ValueError(f"no round {number}: {run} {has}{since}")
    return rounds[number]


def parameter_digest(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        tensor = parameters[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def movement(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Name -> L2 norm of a parameter's change."""
    return {name: float((after[name].float() - before[name].float()).norm()) for name in before}


def report_values(report: FusionReport) -> dict[str, Any]:
    """A report as JSON values; inf, -inf and NaN become strings."""
    return {key: _finite(value) for key, value in report.to_dict().items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def selection(
    inner: Mapping[str, Tensor], outer: Mapping[str, Tensor], report: FusionReport
) -> tuple[Tensor, Tensor]:
    """The mean importance of each tensor, and the number of its elements in each of the four cases.

    Args:
        inner, outer: name -> float32 scores of the learner before the fusion.
        report: the report of the fusion.

    Returns:
        float32 [tensors, 2], inner and outer, 0 for an empty tensor; and int64 [tensors, 4], zeros if nothing
        was selected. Both on the CPU, in the order of ``inner``.
    """
    pairs = ((scores, outer[name]) for name, scores in inner.items())
    means = [torch.stack([t.mean() if t.numel() else t.sum() for t in pair]) for pair in pairs]
    counts = torch.zeros(len(inner), len(CASES), dtype=torch.int64)
    if report.applied or report.gate is not None:  # a gate decides after the selection
        counts = case_counts(inner, outer, report.thresholds)
    return torch.stack(means).cpu(), counts


def case_counts(
    inner: Mapping[str, Tensor], outer: Mapping[str, Tensor], thresholds: tuple[Thresholds, Thresholds]
) -> Tensor:
    """The number of elements of each tensor in each of the four cases.

    A fusion reports these counts only as sums over all tensors, so they are counted again here. Its kernels
    work on one flat list of blocks. Counts by tensor would need a counter for each tensor in every backend,
    for this report alone.

    Args:
        inner, outer: name -> float32 scores of the learner.
        thresholds: of both learners, as in a report.

    Returns:
        int64 [tensors, 4] on the CPU, in the order of ``inner``.
    """
    selected = []
    for name, scores in inner.items():
        first, second = (
            values > (threshold[name] if isinstance(threshold, dict) else threshold)
            for values, threshold in zip((scores, outer[name]), thresholds, strict=True)
        )
        selected.append(torch.stack([mask.count_nonzero() for mask in (first, second, first & second)]))
    n_inner, n_outer, both = torch.stack(selected).cpu().T  # one copy from a GPU, not one per tensor
    numel = torch.tensor([scores.numel() for scores in inner.values()])
    return torch.stack([n_inner - both, n_outer - both, both, numel - n_inner - n_outer + both], dim=1)
