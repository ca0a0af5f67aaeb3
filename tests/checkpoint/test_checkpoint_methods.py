"""The other merge methods: their formulas, and mergekit's results if it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import Triple, floats, load_folder, noisy
from safetensors.torch import load_file
from torch import Tensor

from rkif.checkpoint import preflight as planning
from rkif.checkpoint.methods import SETTINGS, TaskArithmetic, make_method, settings_of
from rkif.checkpoint.tiles import Tile

# Python of an environment with mergekit; this environment if it has mergekit.
MERGEKIT = os.environ.get("RKIF_MERGEKIT") or (
    sys.executable if importlib.util.find_spec("mergekit") else None
)


@pytest.fixture
def triple(tmp_path: Path) -> Triple:
    return Triple(tmp_path)


def expected(triple: Triple, combine: Any) -> dict[str, Tensor]:
    """``combine(base, inner, outer)`` in float32 of every tensor, in the base's dtype."""
    return {
        name: combine(value.float(), triple.inner[name].float(), triple.outer[name].float()).to(value.dtype)
        for name, value in floats(triple.base).items()
    }


def close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


def kept(vector: Tensor, density: float) -> Tensor:
    k = max(1, int(density * vector.numel() + 1e-9))
    mask = torch.zeros(vector.numel(), dtype=torch.bool)
    mask[vector.abs().view(-1).argsort(descending=True)[:k]] = True
    return vector * mask.view(vector.shape) if vector.numel() else vector


@pytest.mark.parametrize("cut", [None, 512], ids=["whole", "cut"])
@pytest.mark.parametrize("normalize", [True, False])
def test_each_method_follows_its_formula(
    triple: Triple, normalize: bool, cut: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 no two magnitudes are equal here; ties at the threshold have a separate test."""
    if cut:
        monkeypatch.setattr(planning, "MAX_SLOT", cut)
        monkeypatch.setattr(planning, "MIN_SLOT", 64)
        monkeypatch.setattr(planning, "TILE", 100)
    triple.base = {
        name: value.float() if value.is_floating_point() else value for name, value in triple.base.items()
    }
    triple.inner, triple.outer = noisy(triple.base, 1), noisy(triple.base, 2)
    for name in ("base", "inner", "outer"):
        triple.save(name)
    a, b, d = 0.4, 0.7, 0.3
    total = a + b if normalize else 1.0

    def ties(base: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        first, second = a * kept(inner - base, d), b * kept(outer - base, d)
        sign = torch.where(first + second >= 0, 1.0, -1.0)
        agree, also = first.sign() == sign, second.sign() == sign
        merged = first * agree + second * also
        divisor = a * agree + b * also if normalize else torch.ones_like(base)
        return base + 0.9 * merged / torch.where(divisor == 0, 1.0, divisor)

    cases = {
        "linear": lambda base, inner, outer: (a * inner + b * outer) / total,
        "task_arithmetic": lambda base, inner, outer: (
            base + 0.9 * (a * (inner - base) + b * (outer - base)) / total
        ),
        "magnitude_prune": lambda base, inner, outer: (
            base + 0.9 * (a * kept(inner - base, d) + b * kept(outer - base, d)) / total
        ),
        "ties": ties,
    }
    for method, combine in cases.items():
        settings = {"weight": (a, b), "normalize": normalize, "lambda": 0.9, "density": d}
        chosen = {name: value for name, value in settings.items() if name in SETTINGS[method]}
        out = triple.folder / method
        triple.fuse(method=method, out=out, **chosen)
        close(load_folder(out), expected(triple, combine))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_at_random_and_keeps_the_norm(triple: Triple, method: str) -> None:
    summary = triple.fuse(method=method, density=0.3, out=triple.folder / "first", weight=(1.0, 0.0))
    counts = summary.report["counts"]
    chosen = counts["inner_only"] + counts["both"]
    numel = summary.report["numel"]
    assert abs(chosen / numel - 0.3) < 5 * (0.3 * 0.7 / numel) ** 0.5
    assert abs(counts["both"] / numel - 0.09) < 0.02  # the sides are independent
    got = load_folder(triple.folder / "first")
    for name in ("embed.weight", "layer.1.weight"):
        base, inner = triple.base[name].float(), triple.inner[name].float()
        moved = got[name].float() - base
        assert moved.abs().sum() == pytest.approx((inner - base).abs().sum().item(), rel=0.03)
    triple.fuse(method=method, density=0.3, out=triple.folder / "again", weight=(1.0, 0.0))
    triple.fuse(method=method, density=0.3, out=triple.folder / "other", weight=(1.0, 0.0), seed=1)
    again, other = load_folder(triple.folder / "again"), load_folder(triple.folder / "other")
    assert all(torch.equal(got[name], again[name]) for name in got)
    assert not torch.equal(got["embed.weight"], other["embed.weight"])


def test_random_drops_do_not_depend_on_chunks() -> None:
    method = make_method("dare_linear", {"density": 0.5})
    assert isinstance(method, TaskArithmetic)

    def keeps(start: int, stop: int) -> Tensor:
        part = [torch.zeros(stop - start)]
        draws = method.draws(Tile([3], [start], part, part, [part, part], None, ["x"]))
        return draws.keeps(0, 0, 0, stop - start)

    whole = keeps(0, 1000)
    for start, stop in ((0, 1), (1, 17), (7, 8), (8, 16), (500, 1000), (333, 777)):
        assert torch.equal(keeps(start, stop), whole[start:stop])


def test_random_drops_do_not_depend_on_files(triple: Triple) -> None:
    for out, size in (("one", 10**9), ("many", 5_000)):
        triple.fuse(method="dare_linear", out=triple.folder / out, max_shard_size=size)
    one, many = (load_folder(triple.folder / out) for out in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_ties_at_the_threshold_are_dropped(triple: Triple) -> None:
    for name in ("inner", "outer"):
        for key, value in floats(triple.base).items():
            getattr(triple, name)[key] = value + 1.0
            getattr(triple, name)[key].view(-1)[:1] += 1.0
    for key, value in floats(triple.base).items():
        triple.base[key] = torch.zeros_like(value)
        for name in ("inner", "outer"):
            getattr(triple, name)[key] = torch.ones_like(value)
            getattr(triple, name)[key].view(-1)[:1] = 2.0
    for name in ("base", "inner", "outer"):
        triple.save(name)
    triple.fuse(method="ties", density=0.5)
    for name, value in floats(load_folder(triple.folder / "out")).items():
        if value.numel() > 1:
            assert value.view(-1)[0] == 2.0, name
            assert not value.view(-1)[1:].any(), name


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("nonsense", {}, "method must be one of recurrent_kif, linear"),
        ("linear", {"density": 0.2}, "density is not a setting of linear, which has weight, normalize"),
        ("ties", {"rule": "paper"}, "rule is not a setting of ties"),
        ("recurrent_kif", {"weight": (1, 1)}, "weight is not a setting of recurrent_kif"),
        ("ties", {"density": 1.5}, r"density must be in \[0, 1\]"),
        ("ties", {"weight": (1.0, float("nan"))}, "weight must be finite numbers"),
        ("ties", {"lambda": float("nan")}, "lambda must be a number that is finite in float32; got nan"),
        ("task_arithmetic", {"lambda": 1e300}, r"lambda must be a number .* got 1e\+300"),
        ("linear", {"weight": (1.0, -1.0)}, "weight must not sum to zero"),
        ("recurrent_kif", {"rule": "none"}, "rule must be one of paper, release"),
        ("dare_ties", {"seed": -1}, r"seed must be a whole number of at least 0 and below 2\^63; got -1"),
        ("dare_linear", {"seed": 2**63}, "seed must be .* got 9223372036854775808"),
    ],
)
def test_invalid_settings_are_refused(name: str, settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make_method(name, settings)


def test_settings_can_be_written_as_json() -> None:
    for name in SETTINGS:
        found = settings_of(make_method(name, {}))
        assert tuple(found) == (*SETTINGS[name], *(["weight"] if name == "wsm" else []))
        json.dumps(found)


MERGE = """
import json, sys, torch
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file, save_file
folder, cases = sys.argv[1], json.loads(sys.argv[2])
models = {name: {k: v for k, v in load_file(f"{folder}/{name}.safetensors").items() if v.is_floating_point()}
          for name in ("base", "inner", "outer")}
models = {name: {k: v for k, v in model.items() if v.numel()} for name, model in models.items()}
for method, parameters in cases.items():
    kept = models if method != "linear" else {name: models[name] for name in ("inner", "outer")}
    with torch.no_grad():
        merged = merge_state_dicts(kept, method, parameters=parameters,
                                   **({} if method == "linear" else {"base": "base"}))
    save_file({k: v.contiguous() for k, v in merged.items()}, f"{folder}/mergekit-{method}.safetensors")
"""


@pytest.mark.skipif(
    MERGEKIT is None, reason="mergekit is not installed (RKIF_MERGEKIT names a Python that has it)"
)
def test_results_are_those_of_mergekit(triple: Triple) -> None:
    """Deterministic methods in float32: equal within the rounding of a few operations."""
    assert MERGEKIT is not None
    triple.base = {
        name: value.float() if value.is_floating_point() else value for name, value in triple.base.items()
    }
    triple.inner, triple.outer = noisy(triple.base, 1), noisy(triple.base, 2)
    for name in ("base", "inner", "outer"):
        triple.save(name)
    by_model = {"weight": {"inner": 0.4, "outer": 0.7}}
    sparse = {**by_model, "density": {"inner": 0.3, "outer": 0.3}}
    cases: dict[str, dict[str, Any]] = {
        "linear": by_model,
        "task_arithmetic": by_model | {"lambda": 0.9},
        "ties": sparse | {"lambda": 0.9},
        # Nothing is dropped, because random drops cannot be compared.
        "dare_linear": by_model | {"density": {"inner": 1.0, "outer": 1.0}},
        "dare_ties": by_model | {"density": {"inner": 1.0, "outer": 1.0}},
    }
    subprocess.run(
        [MERGEKIT, "-c", MERGE, str(triple.folder), json.dumps(cases)],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    for method, parameters in cases.items():
        settings: dict[str, Any] = {"weight": (0.4, 0.7)}
        settings |= {"density": parameters["density"]["inner"]} if "density" in parameters else {}
        settings |= {"lambda": parameters["lambda"]} if "lambda" in parameters else {}
        out = triple.folder / method
        triple.fuse(method=method, out=out, **settings)
        wanted = load_file(triple.folder / f"mergekit-{method}.safetensors")
        close(load_folder(out), wanted)
        assert len(wanted) == len([v for v in floats(triple.base).values() if v.numel()])


@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_method_behaves_as_it_declares(name: str, density: float) -> None:
    settings = {"density": density} if "density" in SETTINGS[name] else {}
    method = make_method(name, settings)
    assert method.needs_threshold == (method.threshold_k(7) is not None)
    assert method.needs_threshold == (name in ("recurrent_kif", "ties", "magnitude_prune") and density == 0.3)
    assert method.rescales == name.startswith("dare")
    assert method.streams == (name not in ("linear", "wsm"))
    assert method.accepts_importance == (name == "recurrent_kif")
    if method.rescales:
        assert not make_method(name, {**settings, "rescale": False}).rescales
