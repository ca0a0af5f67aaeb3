"""What a config changes of the preset that it names."""

from __future__ import annotations

from dataclasses import asdict

from rkif.continual.config import DistillationSettings, RunConfig
from rkif.continual.config_fusion import PRESETS, RKIF_DISTILLATION, fusion_config


def preset_changes(config: RunConfig) -> str:
    """A line with the settings that replace those of the preset; "" without a preset, or without changes.

    A copied example has explicit values, which silently replace those of a preset that is added to it.
    """
    name = config.fusion.get("preset")
    if name is None:
        return ""
    given, preset = asdict(fusion_config(config.fusion)), asdict(PRESETS[name]())
    pairs = {f"fusion.{key}": (given[key], value) for key, value in preset.items()}
    if name == "rkif" and config.method == "recurrent_kif":
        distillation, defaults = config.distillation, DistillationSettings.model_validate(RKIF_DISTILLATION)
        pairs |= {f"distillation.{key}": (getattr(distillation, key), value) for key, value in defaults}
    changes = [f"{key} {new} (preset: {old})" for key, (new, old) in pairs.items() if new != old]
    return f"Preset {name}, changed: {', '.join(changes)}" if changes else ""
