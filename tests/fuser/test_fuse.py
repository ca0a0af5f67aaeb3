"""``rkif.fuse``: the stateless call."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rkif

NAMES = ("layer.weight", "layer.bias")


def arguments(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((7, 5), (5,))

    def tensors(low: float) -> dict[str, torch.Tensor]:
        return {
            name: (torch.rand(shape, generator=generator) + low).to(dtype)
            for name, shape in zip(NAMES, shapes, strict=True)
        }

    made = {name: tensors(-0.5) for name in ("base", "inner", "outer")}
    return made | {name: tensors(0.0) for name in ("inner_importance", "outer_importance")}


def brute_force(
    a: dict[str, Any], density: float, rule: str, scope: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """The method in plain Python, for each element, on float32 values."""
    weights = {
        "paper": {(1, 0): (1, 0), (0, 1): (0, 1), (1, 1): (1, 1), (0, 0): (0, 0)},
        "release": {(1, 0): (1, 0), (0, 1): (0, 1), (1, 1): (0.4, 0.6), (0, 0): (0.5, 0.5)},
    }[rule]

    def threshold(scores: list[float]) -> float:
        return sorted(scores)[int((1 - Fraction(str(density))) * (len(scores) - 1))]

    def thresholds(importance: dict[str, torch.Tensor]) -> dict[str, float]:
        if scope == "tensor":
            return {name: threshold(t.flatten().tolist()) for name, t in importance.items()}
        return dict.fromkeys(
            importance, threshold([v for t in importance.values() for v in t.flatten().tolist()])
        )

    limits = thresholds(a["inner_importance"]), thresholds(a["outer_importance"])
    counts = {"inner_only": 0, "outer_only": 0, "both": 0, "neither": 0}
    case_names = {(1, 0): "inner_only", (0, 1): "outer_only", (1, 1): "both", (0, 0): "neither"}
    result = {}
    for name, base in a["base"].items():
        values = []
        rows = [
            a[key][name].flatten()
            for key in ("base", "inner", "outer", "inner_importance", "outer_importance")
        ]
        for b, i, o, s_in, s_out in zip(*rows, strict=True):
            case = (int(s_in > limits[0][name]), int(s_out > limits[1][name]))
            counts[case_names[case]] += 1
            w_in, w_out = (torch.tensor(w, dtype=torch.float32) for w in weights[case])
            values.append((b + w_in * (i - b)) + w_out * (o - i))
        result[name] = torch.stack(values).view(base.shape)
    return result, counts


@pytest.mark.parametrize("rule", ["paper", "release"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.03])
def test_the_result_is_that_of_plain_python(rule: str, scope: str, density: float) -> None:
    a = arguments()
    result = rkif.fuse(**a, density=density, rule=rule, scope=scope)
    expected, counts = brute_force(a, density, rule, scope)
    assert list(result.params) == list(NAMES)
    for name in NAMES:
        assert torch.equal(result.params[name], expected[name])
    report = result.report
    assert report.counts == counts
    assert report.numel == 40
    for side, (key, index) in {"inner": ("inner_importance", 0), "outer": ("outer_importance", 1)}.items():
        found = report.thresholds[index]
        if scope == "tensor":
            assert set(found) == set(NAMES), side
            assert all(found[name] in a[key][name] for name in NAMES)
        else:
            assert any(found in a[key][name] for name in NAMES)


@pytest.mark.parametrize("out", [None, "base", "inner", "outer"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("outer_from", ["inner", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_importance_the_scores_are_magnitudes_of_change(
    dtype: torch.dtype, outer_from: Any, scope: Any, out: str | None
) -> None:
    a = arguments(dtype=dtype)
    rows = {role: a[role] for role in ("base", "inner", "outer")}
    start = rows["base" if outer_from == "base" else "inner"]
    magnitudes = [
        {name: (end[name].float() - begin[name].float()).abs() for name in NAMES}
        for end, begin in ((rows["inner"], rows["base"]), (rows["outer"], start))
    ]
    settings: dict[str, Any] = {"density": 0.3, "rule": "release", "scope": scope, "outer_from": outer_from}
    expected = rkif.fuse(**rows, inner_importance=magnitudes[0], outer_importance=magnitudes[1], **settings)
    found = rkif.fuse(**rows, **settings, out=rows.get(out) if out else None)
    assert all(torch.equal(found.params[name], expected.params[name]) for name in NAMES)
    assert found.report == expected.report


@pytest.mark.parametrize("role", ["base", "inner", "outer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_without_importance_parameters_must_be_finite(role: str, value: float) -> None:
    rows = {name: tensors for name, tensors in arguments().items() if "importance" not in name}
    rows[role]["layer.bias"][2] = value
    message = rf"{role}\['layer.bias'\] has NaN or infinite elements; without importance"
    with pytest.raises(ValueError, match=message):
        rkif.fuse(**rows)


def test_one_importance_alone_is_refused() -> None:
    a = arguments()
    del a["outer_importance"]
    with pytest.raises(ValueError, match="inner_importance and outer_importance belong together"):
        rkif.fuse(**a)


def test_the_report_has_norms_and_can_be_written_as_json() -> None:
    a = arguments()
    result = rkif.fuse(**a)

    def norm(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
        return torch.cat([(left[n].double() - right[n].double()).flatten() for n in NAMES]).norm().item()

    norms = result.report.norms
    assert norms["inner"] == pytest.approx(norm(a["inner"], a["base"]), rel=1e-6)
    assert norms["outer"] == pytest.approx(norm(a["outer"], a["inner"]), rel=1e-6)
    assert norms["update"] == pytest.approx(norm(result.params, a["base"]), rel=1e-6)
    assert json.loads(json.dumps(result.report.to_dict()))["counts"] == result.report.counts


def test_inputs_are_not_touched_and_out_is_written_in_place() -> None:
    a = arguments()
    before = {key: {name: t.clone() for name, t in value.items()} for key, value in a.items()}
    expected = rkif.fuse(**a).params
    assert all(torch.equal(a[key][name], before[key][name]) for key in a for name in NAMES)

    out = {name: torch.full_like(a["base"][name], torch.nan) for name in NAMES}
    result = rkif.fuse(**a, out=out)
    assert all(result.params[name] is out[name] for name in NAMES)
    assert all(torch.equal(out[name], expected[name]) for name in NAMES)

    rkif.fuse(**a, out=a["outer"])
    assert all(torch.equal(a["outer"][name], expected[name]) for name in NAMES)


def test_parameters_of_a_model_can_be_fused_in_place() -> None:
    model = torch.nn.Linear(4, 3)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    inner = {name: p + 1 for name, p in base.items()}
    ones = {name: torch.ones_like(p) for name, p in base.items()}
    rkif.fuse(
        base, inner, dict(model.named_parameters()), ones, ones, density=1, out=dict(model.named_parameters())
    )
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        # both select everything: base + (inner - base) + (outer - inner); outer is the old weights
        assert torch.equal(parameter, (base[name] + (inner[name] - base[name])) + (base[name] - inner[name]))


@pytest.mark.parametrize("density", [0, 1])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_density_zero_selects_nothing_and_one_everything(density: int, scope: str) -> None:
    a = arguments()
    report = rkif.fuse(**a, density=density, scope=scope).report
    expected = dict.fromkeys(("inner_only", "outer_only", "both", "neither"), 0)
    assert report.counts == expected | {"both" if density else "neither": 40}


def test_all_scores_equal_selects_nothing() -> None:
    a = arguments()
    for key in ("inner_importance", "outer_importance"):
        a[key] = {name: torch.ones_like(t) for name, t in a[key].items()}
    result = rkif.fuse(**a)
    assert result.report.counts["neither"] == 40
    assert all(torch.equal(result.params[name], a["base"][name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_computed_in_float32(dtype: torch.dtype) -> None:
    a = arguments(dtype=dtype)
    wide = {key: {name: t.float() for name, t in value.items()} for key, value in a.items()}
    expected = rkif.fuse(**wide, rule="release").params
    for name, tensor in rkif.fuse(**a, rule="release").params.items():
        assert torch.equal(tensor, expected[name].to(dtype))


def test_custom_weights_and_outer_from_base() -> None:
    a = arguments()
    rule = rkif.MergeWeights(inner_only=(0, 0), outer_only=(0, 0), both=(0, 0), neither=(0, 1))
    result = rkif.fuse(**a, density=0, rule=rule, outer_from="base")
    for name in NAMES:
        b, o = a["base"][name], a["outer"][name]
        assert torch.equal(result.params[name], b + (o - b))


@given(st.permutations(range(4)), st.integers(0, 1000))
def test_the_order_of_parameters_changes_nothing(order: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = ["a", "b", "c", "d"]
    rows = [{n: (torch.rand(6, generator=generator) * 4).floor() for n in parts} for _ in range(5)]
    shuffled = [{parts[i]: row[parts[i]] for i in order} for row in rows]
    one, other = rkif.fuse(*rows), rkif.fuse(*shuffled)
    assert one.report.thresholds == other.report.thresholds
    assert one.report.counts == other.report.counts
    assert all(torch.equal(one.params[name], other.params[name]) for name in parts)


def altered(key: str, name: str, value: Any) -> Any:
    def change(a: dict[str, Any]) -> None:
        a[key] = dict(a[key]) | {name: value}

    return change


def dropped(key: str, name: str) -> Any:
    def change(a: dict[str, Any]) -> None:
        a[key] = {n: t for n, t in a[key].items() if n != name}

    return change


def setting(**values: Any) -> Any:
    return lambda a: a.update(values)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dropped("inner", "layer.bias"), ValueError, "inner lacks 'layer.bias'"),
        (altered("outer", "extra", torch.ones(1)), ValueError, "outer has 'extra', which base lacks"),
        (
            altered("inner", "layer.bias", torch.ones(6)),
            ValueError,
            r"inner\['layer.bias'\] has shape \(6,\)",
        ),
        (
            altered("outer", "layer.bias", torch.ones(5, device="meta")),
            ValueError,
            r"outer\['layer.bias'\] is on meta",
        ),
        (
            altered("base", "layer.bias", torch.ones(5, dtype=torch.int32)),
            TypeError,
            r"base\['layer.bias'\] has dtype int32",
        ),
        (altered("base", "layer.bias", 3.0), TypeError, r"base\['layer.bias'\] must be a tensor; got float"),
        (
            altered("inner_importance", "layer.bias", torch.tensor([1.0, 2, -0.5, 4, 5])),
            ValueError,
            r"inner_importance\['layer.bias'\] must not be negative or NaN; its minimum is -0.5",
        ),
        (
            altered("outer_importance", "layer.bias", torch.tensor([1.0, 2, torch.nan, 4, 5])),
            ValueError,
            r"outer_importance\['layer.bias'\] must not be negative or NaN; its minimum is nan",
        ),
        (setting(base={}), ValueError, "base is empty"),
        (setting(base=[1]), TypeError, "base must map names to tensors; got list"),
        (setting(density=1.5), ValueError, "density must be in .*; got 1.5"),
        (setting(density=-0.1), ValueError, "density must be in .*; got -0.1"),
        (setting(rule="mean"), ValueError, "rule must be one of paper, release, sum; got 'mean'"),
        (setting(scope="layer"), ValueError, "scope must be one of global, tensor; got 'layer'"),
        (setting(outer_from="x"), ValueError, "outer_from must be one of inner, base; got 'x'"),
        (setting(out={"layer.weight": torch.ones(7, 5)}), ValueError, "out lacks 'layer.bias'"),
        (
            setting(backend="numpy"),
            ValueError,
            "backend must be one of auto, triton, native, torch; got 'nu",
        ),
    ],
)
def test_errors_name_the_argument_and_change_nothing(
    change: Any, error: type[Exception], message: str
) -> None:
    a: dict[str, Any] = arguments()
    a["out"] = {name: torch.full_like(t, 7.0) for name, t in a["base"].items()}
    out = a["out"]
    change(a)
    with pytest.raises(error, match=message):
        rkif.fuse(**a)
    assert all((tensor == 7).all() for tensor in out.values())


def test_empty_parameters_are_refused_only_if_all_are_empty() -> None:
    empty = {"a": torch.ones(0)}
    with pytest.raises(ValueError, match="base is empty"):
        rkif.fuse(empty, empty, empty, empty, empty)
    some = empty | {"b": torch.arange(4.0)}
    assert rkif.fuse(some, some, some, some, some, scope="tensor").report.numel == 4


@pytest.mark.parametrize("pair", [(1,), (1, float("nan")), (1e39, 0), "ab", 3])
def test_merge_weights_are_pairs_of_finite_numbers(pair: Any) -> None:
    with pytest.raises(ValueError, match="both must be two finite numbers"):
        rkif.MergeWeights(inner_only=(1, 0), outer_only=(0, 1), both=pair, neither=(0, 0))


def test_a_report_as_text_is_one_line() -> None:
    base = {"w": torch.zeros(10)}
    inner, outer = {"w": torch.ones(10)}, {"w": torch.full((10,), 3.0)}
    scores = {"w": torch.arange(10.0)}
    report = rkif.fuse(
        base, inner, outer, scores, {"w": scores["w"].flip(0)}, density=0.2, rule="paper"
    ).report
    text = "10 parameters: inner only 20.0%, outer only 20.0%, both 0.0%, neither 60.0%; update 3.162"
    assert str(report) == text
    assert str(dataclasses.replace(report, applied=False)) == f"{text}; skipped"
    gate = rkif.GateReport("undo", 0.0)
    assert str(dataclasses.replace(report, applied=False, gate=gate)) == f"{text}; gate: undo"
