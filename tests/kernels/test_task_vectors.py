"""Task arithmetic: values computed by hand, and the same bits from C++ as from PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import NATIVE, Guarded, assert_same_bits, normal
from torch import Tensor

from rkif_kernels import Draws, TaskVectorRule, absolute_sums, merge_task_vectors_
from rkif_kernels.backends.native.library import library, use_instructions

TILE = 4096  # of the native backend
SIZES = [1, 0, 17, TILE - 1, TILE + 5, 70_001]  # the last one takes two blocks of PyTorch
DTYPES = {
    "float32": (torch.float32,) * 4,
    "bfloat16": (torch.bfloat16,) * 4,
    "float16": (torch.float16,) * 4,
    "mixed": (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16),  # out, base, inner, outer
}
RULES = {
    "sum": TaskVectorRule((0.4, 0.6), -0.7),
    "consensus": TaskVectorRule((0.4, -0.6), 0.9, consensus=True),
    "normalized": TaskVectorRule((0.3, 0.7), 1.0, consensus=True, normalize=True),
}


@pytest.fixture(params=range(use_instructions(0) if library() is not None else 1))
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every instruction set of this processor."""
    if library() is not None:
        use_instructions(request.param)
    yield
    if library() is not None:
        use_instructions(0)


def parameters(dtypes: Sequence[torch.dtype] = DTYPES["float32"]) -> list[list[Tensor]]:
    """out, base, inner and outer, with equal elements, zeros of both signs and denormals among them."""
    _, base, inner, outer = (normal(SIZES, torch.float32, seed) for seed in range(4))
    for start, *ends in zip(base, inner, outer, strict=True):
        for every, value in ((5, 0.0), (7, -0.0), (11, 1e-40)):
            start[::every] = value
        for step, end in enumerate(ends):
            end[step :: 3 + step] = start[step :: 3 + step]
    out = [torch.full_like(part, torch.nan) for part in base]
    return [
        [part.to(dtype) for part in row] for row, dtype in zip((out, base, inner, outer), dtypes, strict=True)
    ]


def draws(density: float = 0.3, starts: Sequence[int] = (0, 5, 3, 8, 12_345, 2**40 + 1)) -> Draws:
    return Draws(density, 2**63 - 25, [f"tensor {index}" for index in range(len(SIZES))], starts)


def selections() -> dict[str, dict[str, Any]]:
    limits = torch.linspace(0.2, 1.5, 2 * len(SIZES)).view(2, -1)
    return {
        "everything": {},
        "one threshold": {"thresholds": torch.tensor([[0.5], [0.9]])},
        "thresholds": {"thresholds": limits, "scales": limits.double() / 3},
        "draws": {"draws": draws(), "scales": limits.double() + 1},
    }


@NATIVE
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("selection", list(selections()))
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("dtypes", list(DTYPES))
def test_native_has_the_bits_of_torch(dtypes: str, rule: str, selection: str) -> None:
    expected, *inputs = parameters(DTYPES[dtypes])
    out = Guarded(parameters(DTYPES[dtypes])[0], "cpu")
    settings = selections()[selection]
    wanted = merge_task_vectors_(expected, *inputs, RULES[rule], backend="torch", **settings)
    got = merge_task_vectors_(out.tensors, *inputs, RULES[rule], backend="native", **settings)
    assert_same_bits(out.tensors, expected)
    out.assert_edges_untouched()
    assert got.counts.tolist() == wanted.counts.tolist()
    torch.testing.assert_close(got.squared_norms, wanted.squared_norms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=NATIVE)])
def test_a_merge_is_that_computed_by_hand(backend: Any) -> None:
    base, inner = [torch.tensor([1.0, 1, 1, 1, 1])], [torch.tensor([2.0, 3, 1, -1, 1.5])]
    outer = [torch.tensor([3.0, -3, 0, -3, 1])]
    out = [torch.empty(5)]
    limits = torch.tensor([[0.5], [1.5]])
    # The kept parts are 1, 2, 0, -2, 0 and 2, -4, 0, -4, 0; the signs of the sums are +, -, +, -, +.
    for rule, wanted in (
        (TaskVectorRule((1.0, 1.0), 0.5), [2.5, 0.0, 1.0, -2.0, 1.0]),
        (TaskVectorRule((1.0, 1.0), consensus=True), [4.0, -3.0, 1.0, -5.0, 1.0]),
        (TaskVectorRule((1.0, 3.0), consensus=True, normalize=True), [2.75, -3.0, 1.0, -2.5, 1.0]),
    ):
        stats = merge_task_vectors_(out, base, inner, outer, rule, thresholds=limits, backend=backend)
        assert out[0].tolist() == wanted
        assert stats.counts.tolist() == [0, 0, 3, 2]
        assert stats.squared_norms[0] == 9.25


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=NATIVE)])
@pytest.mark.usefixtures("instructions")
def test_random_numbers_are_those_of_numpy(backend: Any) -> None:
    chosen = draws()
    zeros = [torch.zeros(size) for size in SIZES]
    ones = [torch.ones(size) for size in SIZES]
    sums = absolute_sums(zeros, ones, ones, chosen, backend=backend)
    assert sums[0].tolist() == [SIZES, SIZES]
    for side in range(2):
        out = [torch.empty(size) for size in SIZES]
        rule = TaskVectorRule((1.0 - side, float(side)))
        merge_task_vectors_(out, zeros, ones, ones, rule, draws=chosen, backend=backend)
        for index, kept in enumerate(out):
            key = chosen.keys[side, index]
            counter, skipped = divmod(chosen.starts[index], 8)
            stream = np.random.Generator(np.random.Philox(key=key, counter=counter))
            numbers = torch.from_numpy(stream.random(skipped + len(kept), dtype=np.float32)[skipped:])
            assert torch.equal(kept.bool(), numbers < 0.3)
            assert sums[1, side, index] == kept.sum()


def test_sides_and_tensors_are_drawn_independently() -> None:
    chosen = draws(0.5)
    streams = [chosen.keeps(side, index, 0, 10_000) for side in range(2) for index in range(2)]
    for index, one in enumerate(streams):
        for other in streams[:index]:
            assert 4_700 < int((one == other).sum()) < 5_300


def test_the_result_may_overwrite_an_input() -> None:
    expected, base, inner, outer = parameters()
    merge_task_vectors_(expected, base, inner, outer, RULES["consensus"])
    for backend in ("torch", "auto"):
        for role in range(3):
            inputs = [[part.clone() for part in row] for row in (base, inner, outer)]
            merge_task_vectors_(inputs[role], *inputs, RULES["consensus"], backend=backend)
            assert_same_bits(inputs[role], expected)


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    out, base, inner, outer = parameters()
    rule = RULES["sum"]
    with pytest.raises(ValueError, match="inner has 5 tensors, out has 6"):
        merge_task_vectors_(out, base, inner[1:], outer, rule)
    with pytest.raises(TypeError, match=r"outer\['x'\] has dtype int64"):
        merge_task_vectors_(out[:1], base[:1], inner[:1], [torch.ones(1).long()], rule, names=["x"])
    with pytest.raises(ValueError, match=r"thresholds must be \[2, 1\] or \[2, 6\]; got \(2, 3\)"):
        merge_task_vectors_(out, base, inner, outer, rule, thresholds=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="share memory"):
        merge_task_vectors_([out[2]] * 2, [base[2]] * 2, [inner[2]] * 2, [outer[2]] * 2, rule)
    with pytest.raises(ValueError, match="outer has 5 tensors, base has 6"):
        absolute_sums(base, inner, outer[1:], draws())
    few = Draws(0.5, 0, ["a"], [0])
    with pytest.raises(ValueError, match="draws has 1 names, out has 6 tensors"):
        merge_task_vectors_(out, base, inner, outer, rule, draws=few)
    with pytest.raises(ValueError, match="draws has 1 names, base has 6 tensors"):
        absolute_sums(base, inner, outer, few)
    assert all(part.isnan().all() for part in out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 1.5}, r"density must be in \[0, 1\]; got 1.5"),
        ({"seed": -1}, r"seed must be a whole number of at least 0 and below 2\^63; got -1"),
        ({"seed": 2**63}, "seed must be .* got 9223372036854775808"),
        ({"seed": 2**64}, "seed must be .* got 18446744073709551616"),
        ({"seed": 1.0}, "seed must be .* got 1.0"),
        ({"starts": [0]}, "starts has 1 indices, names has 2 names"),
        ({"starts": [0, -5]}, r"starts\['b'\] must be a whole number of at least 0 and below 2\^62; got -5"),
        ({"starts": [2**62, 0]}, r"starts\['a'\] must be"),
        ({"starts": [0.5, 0]}, r"starts\['a'\] must be .* got 0.5"),
    ],
    ids=str,
)
def test_invalid_draws_are_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"density": 0.5, "seed": 0, "names": ["a", "b"], "starts": [0, 5]}
    with pytest.raises(ValueError, match=message):
        Draws(**given | changes)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (TaskVectorRule((float("nan"), 1.0)), r"rule.weight must be two finite numbers .* got \(nan, 1.0\)"),
        (TaskVectorRule((1e39, 1.0)), "rule.weight must be"),
        (TaskVectorRule((1.0,)), "rule.weight must be"),  # type: ignore[arg-type]
        (TaskVectorRule(("1", "2")), "rule.weight must be"),  # type: ignore[arg-type]
        (TaskVectorRule(1.0), "rule.weight must be"),  # type: ignore[arg-type]
        (TaskVectorRule((1.0, 1.0), float("inf")), "rule.factor must be a number that is finite in float32"),
        (TaskVectorRule((1.0, 1.0), 10**400), "rule.factor must be"),
    ],
)
def test_invalid_rules_are_refused(rule: TaskVectorRule, message: str) -> None:
    out, *inputs = parameters()
    with pytest.raises(ValueError, match=message):
        merge_task_vectors_(out, *inputs, rule)
    assert all(part.isnan().all() for part in out)
