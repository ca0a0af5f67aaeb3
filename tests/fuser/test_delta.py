"""Adapters fused in delta-weight space, compared with a dense fusion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from torch import Tensor

import rkif
from rkif.config import RULES

SHAPES = {"q": (6, 9), "v": (12, 5), "wide": (3, 40)}


def adapter(
    seed: int, rank: int = 2, dtype: torch.dtype = torch.float32, **more: Tensor
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(more)
    for name, (out, into) in SHAPES.items():
        tensors[f"model.{name}.lora_A.weight"] = torch.randn(rank, into, generator=generator).to(dtype)
        tensors[f"model.{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator).to(dtype)
    return tensors


def updates(tensors: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Dense updates by module, and tensors without factors by name."""
    found = {
        name.removesuffix(".lora_A.weight"): (
            tensors[name.replace("lora_A", "lora_B")].float() @ t.float() * scaling
        )
        for name, t in tensors.items()
        if "lora_A" in name
    }
    return found | {name: t for name, t in tensors.items() if "lora" not in name}


def best(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank, by a full singular value decomposition."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).float()


def dense(
    sets: list[dict[str, Tensor]], scaling: float, **settings: Any
) -> tuple[dict[str, Tensor], rkif.FusionReport]:
    """The fusion of all updates in memory by rkif.fuse."""
    base, inner, outer = (updates(tensors, scaling) for tensors in sets)
    origin = base if settings.get("outer_from") == "base" else inner
    moved_in = {name: (inner[name].float() - base[name].float()).abs() for name in base}
    moved_out = {name: (outer[name].float() - origin[name].float()).abs() for name in base}
    found = rkif.fuse(base, inner, outer, moved_in, moved_out, **settings)
    return found.params, found.report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0.2},
        {"density": 0.5, "rule": "release"},
        {"density": 0.3, "scope": "tensor"},
        {"density": 0.3, "outer_from": "base"},
        {"density": 0},
        {"density": 1, "rule": "release"},
    ],
)
def test_the_result_is_that_of_a_dense_fusion(settings: dict[str, Any], dtype: torch.dtype) -> None:
    head = {f"head{seed}": torch.randn(7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)}
    sets = [adapter(seed, dtype=dtype, head=head[f"head{seed}"]) for seed in range(3)]
    expected, report = dense(sets, 0.5, **settings)
    found = rkif.fuse_delta(*sets, scaling=0.5, **settings)
    assert {name: (t.shape, t.dtype) for name, t in found.params.items()} == {
        name: (t.shape, t.dtype) for name, t in sets[0].items()
    }
    assert found.report.counts == report.counts
    assert found.report.thresholds == report.thresholds
    assert found.report.numel == report.numel
    assert torch.equal(found.params["head"], expected["head"])
    got = updates(found.params, 0.5)
    rounding = 1e-4 if dtype == torch.float32 else 3e-2
    for module, wanted in expected.items():
        if module == "head":
            continue
        nearest = best(wanted, 2)
        error = (got[module] - wanted).norm() / wanted.norm()
        least = (nearest - wanted).norm() / wanted.norm()
        assert error <= 1.02 * least + rounding
        assert abs(found.truncation[module] - least) <= 0.02 * least + 1e-4


@pytest.mark.parametrize("rule", ["paper", rkif.MergeWeights((1, 0), (1, 0), (1, 0), (1, 0))])
def test_an_update_within_the_rank_is_not_truncated(rule: Any) -> None:
    """With density 1, the paper's rule gives the outer result, and the second rule the inner result."""
    sets = [adapter(seed) for seed in range(3)]
    found = rkif.fuse_delta(*sets, scaling=2.0, density=1, rule=rule)
    wanted = updates(sets[2] if rule == "paper" else sets[1], 2.0)
    for module, tensor in updates(found.params, 2.0).items():
        torch.testing.assert_close(tensor, wanted[module], rtol=1e-4, atol=1e-4)
    assert max(found.truncation.values()) < 1e-5
    for name in SHAPES:
        a, b = (found.params[f"model.{name}.lora_{factor}.weight"] for factor in "AB")
        torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-3, atol=1e-3)  # balanced


@given(st.integers(1, 4), st.floats(0.05, 0.95), st.sampled_from(sorted(RULES)), st.booleans())
def test_the_truncation_is_optimal_for_any_rank_and_density(
    rank: int, density: float, rule: str, ties: bool
) -> None:
    sets = [adapter(seed, rank) for seed in range(3)]
    if ties:
        sets = [{name: t.round() for name, t in tensors.items()} for tensors in sets]
    expected, report = dense(sets, 1.0, density=density, rule=rule)
    found = rkif.fuse_delta(*sets, scaling=1.0, density=density, rule=rule)
    assert found.report.counts == report.counts
    for module, tensor in updates(found.params, 1.0).items():
        least = (best(expected[module], rank) - expected[module]).norm()
        assert (tensor - expected[module]).norm() <= 1.05 * least + 1e-3


def test_a_zero_update_gives_zero_factors() -> None:
    sets = [{name: torch.zeros_like(t) for name, t in adapter(0).items()} for _ in range(3)]
    found = rkif.fuse_delta(*sets, scaling=1.0)
    assert not any(tensor.any() for tensor in found.params.values())
    assert set(found.truncation.values()) == {0.0}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_is_that_of_peft(rslora: bool) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"^model.layers.1.self_attn.v_proj": 2, "^v_proj": 3},
        alpha_pattern={r"layers\.0\.self_attn\.q_proj": 10},
    )
    model = get_peft_model(tiny_llama(40, 0), config)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = rkif.lora_scaling(config.to_dict(), names)
    wanted = {
        name: module.scaling["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    assert found == wanted
    assert len(set(found.values())) == 3


def test_a_model_with_fused_factors_has_the_fused_update() -> None:
    """The fused factors in the model add the fused update to its weights."""
    config = LoraConfig(r=2, lora_alpha=6, use_rslora=True, target_modules=["q_proj"])
    model = get_peft_model(tiny_llama(40, 0), config)
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    sets = [
        {name: torch.randn(p.shape, generator=generator) for name, p in factors.items()} for _ in range(3)
    ]
    scaling = rkif.lora_scaling(config.to_dict(), list(factors))
    found = rkif.fuse_delta(*sets, scaling=scaling, density=1)
    with torch.no_grad():
        for name, parameter in factors.items():
            parameter.copy_(found.params[name])
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (sets[2][f"{name}.lora_{factor}.default.weight"] for factor in "AB")
            torch.testing.assert_close(module.get_delta_weight("default"), scaling[name] * b @ a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"model.q.lora_magnitude_vector": torch.ones(6)}, "DoRA's update depends"),
        (lambda t: {n: v for n, v in t.items() if n != "model.q.lora_B.weight"}, "but not 'model.q.lora_B"),
        (lambda t: {"w": torch.ones(3)}, "has no LoRA factors"),
        (lambda t: t | {"model.q.lora_A.weight": torch.ones(2, 9, 1, 1)}, "factors are matrices"),
    ],
)
def test_refuses_unsupported_adapters_with_the_reason(change: Any, message: str) -> None:
    tensors = change(adapter(0))
    with pytest.raises(ValueError, match=message):
        rkif.fuse_delta(tensors, tensors, tensors, scaling=1.0)
    with pytest.raises(ValueError, match="DoRA"):
        rkif.lora_scaling({"use_dora": True}, [])


def test_refuses_inconsistent_inputs() -> None:
    tensors = adapter(0)
    with pytest.raises(ValueError, match=r"scaling lacks 'model\.v'"):
        rkif.fuse_delta(tensors, tensors, tensors, scaling={"model.q": 1.0})
    with pytest.raises(ValueError, match=r"inner\['model\.q\.lora_A\.weight'\] has shape \(3, 9\)"):
        rkif.fuse_delta(tensors, adapter(0, rank=3), tensors, scaling=1.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 9, dtype=torch.int64), "has dtype int64; supported: float32, bfloat16, float16"),
        (7, "must be a tensor; got int"),
    ],
)
@pytest.mark.parametrize("argument", ["base", "inner", "outer"])
def test_refuses_values_that_are_no_float_tensors(argument: str, value: Any, message: str) -> None:
    sets = {name: adapter(0) for name in ("base", "inner", "outer")}
    sets[argument]["model.q.lora_A.weight"] = value
    with pytest.raises(TypeError, match=rf"{argument}\['model\.q\.lora_A\.weight'\] {message}"):
        rkif.fuse_delta(**sets, scaling=1.0)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, TypeError, "config: lora_alpha of 'model.q' must be a number; got None"),
        (
            {"lora_alpha": 8},
            ValueError,
            "config: r of 'model.q' must be a whole number of at least 1; got None",
        ),
        ({"lora_alpha": "8", "r": 2}, TypeError, "config: lora_alpha of 'model.q' must be a number; got '8'"),
        ({"lora_alpha": 8, "r": 0}, ValueError, "config: r of 'model.q' must be a whole number .*; got 0"),
    ],
)
def test_a_scaling_that_is_not_in_the_config_is_named(
    config: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rkif.lora_scaling(config, list(adapter(0)))


@pytest.mark.parametrize("density", [0, 0.5, 1])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_an_empty_module_changes_no_other(scope: Any, density: float) -> None:
    empty = {"model.empty.lora_A.weight": torch.ones(2, 0), "model.empty.lora_B.weight": torch.ones(3, 2)}
    settings = {"scaling": 1.0, "scope": scope, "density": density}
    alone = rkif.fuse_delta(*(adapter(seed) for seed in range(3)), **settings)
    found = rkif.fuse_delta(*(empty | adapter(seed) for seed in range(3)), **settings)
    assert found.report.counts == alone.report.counts
    assert all(torch.equal(found.params[name], tensor) for name, tensor in alone.params.items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_nonfinite_values(value: float) -> None:
    base, inner = adapter(0), adapter(1)
    inner["model.q.lora_A.weight"][0, 0] = value
    with pytest.raises(ValueError, match=r"inner\['model\.q\.lora_A\.weight'\] has NaN or infinite elements"):
        rkif.fuse_delta(base, inner, base, scaling=1.0)
    inner["model.q.lora_A.weight"][0, 0] = 3e38
    with pytest.raises(ValueError, match=r"the fused update of 'model\.q' overflows float32"):
        rkif.fuse_delta(base, inner, inner, scaling=1e10, density=1)
