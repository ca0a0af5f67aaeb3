"""The settings of a run's fusions, and the presets that name them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rkif.config import FusionConfig, MergeWeights
from rkif.continual.spelling import did_you_mean
from rkif_kernels import require_choice

# The settings of a fusion that `preset` names.
PRESETS = {"paper": FusionConfig.paper, "release": FusionConfig.release, "rkif": FusionConfig.rkif}
# The distillation of a run with the preset "rkif", where its config does not say otherwise.
RKIF_DISTILLATION = {"memory": 4.0, "inputs": 4.0}


def fusion_config(settings: dict[str, Any]) -> FusionConfig:
    """The settings of a fusion from a mapping: the ``preset`` (a name in :data:`PRESETS`) and changes to it.

    Raises:
        ValueError, TypeError: unknown keys or values out of range.
    """
    changes = dict(settings)
    preset = changes.pop("preset", None)
    known = [field.name for field in fields(FusionConfig)]
    for key in changes:
        if key not in known:
            names = ", ".join(["preset", *known])
            suggestion = did_you_mean(key, known)
            raise ValueError(f"a fusion setting must be one of {names}; got {key!r}{suggestion}")
        default = getattr(FusionConfig, key)
        if isinstance(changes[key], bool) and not isinstance(default, bool):
            raise ValueError(f"{key} must be like {default!r}; got {changes[key]}")
    rule = changes.get("rule")
    if isinstance(rule, dict):
        cases = [field.name for field in fields(MergeWeights)]
        if sorted(rule) != sorted(cases):
            raise ValueError(
                f"rule must give weights for {', '.join(cases)}; got {', '.join(map(str, rule))}"
            )
        changes["rule"] = MergeWeights(**rule)
    if preset is None:
        return FusionConfig(**changes)
    require_choice("preset", preset, list(PRESETS))
    return PRESETS[preset](**changes)
