"""``FusionConfig``: invalid settings and presets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fuser_loop import make_model

from rkif import Fuser, FusionConfig
from rkif.config import merge_weights


def test_a_config_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="config must be a FusionConfig; got dict"):
        Fuser(make_model(), {"density": 0.2})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"density": 2}, ValueError, "density must be in .*; got 2"),
        ({"density": 10**400}, ValueError, "density must be in .*; got 1000"),
        ({"beta1": -1}, ValueError, "beta1 must be in .*; got -1"),
        ({"refresh_outer": False, "clear_outer": True}, ValueError, "it needs clear_outer=False"),
        ({"beta2": "x"}, TypeError, "beta2 must be a number"),
        ({"rule": "mean"}, ValueError, "rule must be one of paper, release"),
        ({"scope": "x"}, ValueError, "scope must be one of global, tensor"),
        ({"importance": "x"}, ValueError, "importance must be one of sensitivity, sensitivity_uncertainty"),
        ({"order": "x"}, ValueError, "order must be one of first, second, mixed"),
        ({"nonfinite": "x"}, ValueError, "nonfinite must be one of raise, skip"),
        ({"inner_steps": 0}, ValueError, "inner_steps must be a whole number of at least 1; got 0"),
        ({"outer_steps": 1.5}, ValueError, "outer_steps must be a whole number"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype must be one of"),
        ({"clear_inner": "no"}, TypeError, "clear_inner must be True or False; got 'no'"),
        ({"state_dtype": "float8"}, ValueError, "state_dtype must be one of"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusionConfig(**settings)


def test_presets_have_the_documented_settings() -> None:
    paper, release = FusionConfig.paper(), FusionConfig.release()
    assert (paper.importance, paper.beta1, paper.rule) == ("sensitivity", 0.55, "paper")
    assert (release.importance, release.beta1, release.beta2) == ("sensitivity_uncertainty", 0.85, 0.85)
    assert release.rule == "release"
    rkif = FusionConfig.rkif()
    assert rkif == FusionConfig.release(rule="sum")
    assert merge_weights("sum").cases == ((1, 0), (0, 1), (1, 1), (1, 1))
    for preset in (paper, release, rkif):
        assert (preset.density, preset.inner_steps, preset.outer_steps) == (0.2, 8, 4)
        assert preset.clear_inner
        assert not preset.clear_outer
    assert FusionConfig.paper(density=0.5).density == 0.5
    assert FusionConfig(state_dtype="bfloat16").state_dtype == torch.bfloat16
    with pytest.raises(AttributeError):
        paper.density = 0.3
