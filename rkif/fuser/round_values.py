"""The values of a round as numbers by name, for the logs of a Trainer and for experiment trackers."""

from __future__ import annotations

import math

from rkif.fusion import FusionReport, Thresholds
from rkif.gate import Gate


def round_values(report: FusionReport, gate: Gate | None) -> dict[str, float]:
    """The values of a round by the names that docs/guide/trainer.md lists, without "rkif/".

    All are numbers, because most trackers drop text. Values that are not finite are left out, because JSON
    has no names for them.
    """
    values: dict[str, float] = {"applied": int(report.applied), "nonfinite": report.nonfinite}
    values["missing"] = len(report.missing)
    for learner, threshold in zip(("inner", "outer"), report.thresholds, strict=True):
        values |= {f"threshold_{learner}{end}": value for end, value in _ends(threshold).items()}
    values |= {f"share_{case}": count / report.numel for case, count in report.counts.items()}
    values |= {f"norm_{name}": norm for name, norm in report.norms.items()}
    if gate is not None and report.gate is not None:
        values |= {"gate_factor": report.gate.factor, "gate_samples": report.gate.samples}
        values["gate_stop"] = int(report.gate.verdict == "stop")
        for criterion in gate.criteria if report.gate.attempts else ():
            name, before = criterion.name, report.gate.before[criterion.name]
            figures = [attempt.figures[name] for attempt in report.gate.attempts]
            values |= {f"gate_before/{name}": before, f"gate_after/{name}": figures[-1]}
            values[f"gate_objections/{name}"] = sum(
                criterion.objection(before, figure) is not None for figure in figures
            )
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _ends(threshold: Thresholds) -> dict[str, float]:
    """Suffix of the name -> threshold: one for all, or the smallest and the largest of the tensors'."""
    if not isinstance(threshold, dict):
        return {"": threshold}
    finite = [value for value in threshold.values() if math.isfinite(value)]
    return {"_min": min(finite), "_max": max(finite)} if finite else {}
