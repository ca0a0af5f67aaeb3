"""The importance update and the thresholds: every implementation has the bits of the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    CHUNK,
    PARAMETER_DTYPES,
    SIZES,
    STATE_DTYPES,
    Guarded,
    adversarial,
    assert_same_bits,
    check_thresholds,
    normal,
    on,
    positive,
)
from torch import Tensor

from rkif_kernels import ImportanceInputs, Scores, Smoothing, magnitudes
from rkif_kernels.backends import reference
from rkif_kernels.backends import torch as torch_backend

pytestmark = pytest.mark.usefixtures("poisoned")
sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def check_update(implementation: Any, params, grads, s, u, order="first", beta1=0.85, beta2=0.55) -> int:
    """Run one update by the implementation and by the reference; returns the non-finite count."""
    smoothing = Smoothing(beta1, beta2, order)
    expected_s, expected_u = on("cpu", s), on("cpu", u)
    expected_bad = torch.zeros((), dtype=torch.int64)
    reference.update_importance_(
        ImportanceInputs(params, grads, expected_s, expected_u), smoothing, expected_bad
    )

    device = implementation.device
    got_s, got_u = Guarded(s, device), Guarded(u or [], device)
    bad = torch.zeros((), dtype=torch.int64, device=device)
    implementation.update_importance_(
        ImportanceInputs(
            on(device, params), on(device, grads), got_s.tensors, got_u.tensors if u is not None else None
        ),
        smoothing,
        bad,
    )
    assert_same_bits(got_s.tensors, expected_s)
    assert_same_bits(got_u.tensors, expected_u or [])
    got_s.assert_edges_untouched()
    got_u.assert_edges_untouched()
    assert bad.item() == expected_bad.item()
    return int(bad)


@sizes
@pytest.mark.parametrize("order", ["first", "second", "mixed"])
@pytest.mark.parametrize("with_uncertainty", [True, False], ids=["S and U", "S"])
def test_update_importance(implementation: Any, sizes: list[int], order: str, with_uncertainty: bool) -> None:
    params, grads = normal(sizes, torch.float32, 0), normal(sizes, torch.float32, 1)
    s = positive(sizes, torch.float32, 2)
    u = positive(sizes, torch.float32, 3) if with_uncertainty else None
    assert check_update(implementation, params, grads, s, u, order) == 0


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
def test_update_importance_dtypes(implementation: Any, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    sizes = [CHUNK + 7, 3]
    params, grads = normal(sizes, dtype, 0), normal(sizes, torch.float32, 1)
    check_update(
        implementation, params, grads, positive(sizes, state_dtype, 2), positive(sizes, state_dtype, 3)
    )


def test_update_importance_of_mixed_dtypes_and_missing_gradients(implementation: Any) -> None:
    dtypes = [*PARAMETER_DTYPES, torch.float32, torch.bfloat16]
    params = [normal([CHUNK + i], dtype, i)[0] for i, dtype in enumerate(dtypes)]
    grads: list[Tensor | None] = [normal([CHUNK + i], torch.float32, 9 + i)[0] for i in range(len(dtypes))]
    grads[1] = grads[3] = None
    s = [positive([p.numel()], torch.float32, 20)[0] for p in params]
    check_update(implementation, params, grads, s, [t.clone() for t in s])


@pytest.mark.parametrize("beta1", [0.0, 0.55, 1.0])
def test_update_importance_keeps_the_state_of_nonfinite_elements(implementation: Any, beta1: float) -> None:
    sizes = [CHUNK + 5, 2]
    params, grads = normal(sizes, torch.float32, 0), normal(sizes, torch.float32, 1)
    grads[0][0], grads[0][CHUNK] = float("nan"), float("inf")
    params[0][7], grads[0][9] = float("-inf"), -float("inf")
    params[1][1], grads[1][1] = 1e30, 1e30  # overflows in the product
    s, u = positive(sizes, torch.float32, 2), positive(sizes, torch.float32, 3)
    assert check_update(implementation, params, grads, s, u, beta1=beta1) == 5


def test_update_importance_keeps_denormals(implementation: Any) -> None:
    tiny = torch.full((CHUNK + 1,), 1e-41)
    ones = torch.ones(CHUNK + 1)
    s = [torch.full((CHUNK + 1,), 3e-42)]
    check_update(implementation, [tiny], [ones], s, [s[0].clone()])
    assert (reference.select.score_values(Scores(s))[0] > 0).all()


@settings(max_examples=15)
@example(sizes=[CHUNK, 1], beta1=1.0, beta2=1.2e-38, order="mixed", seed=0)  # U is denormal
@given(
    sizes=st.lists(st.integers(0, 2 * CHUNK), min_size=1, max_size=4),
    beta1=st.floats(0, 1),
    beta2=st.floats(0, 1),
    order=st.sampled_from(["first", "second", "mixed"]),
    seed=st.integers(0, 10**6),
)
def test_update_importance_on_random_inputs(
    implementation: Any,
    sizes: list[int],
    beta1: float,
    beta2: float,
    order: str,
    seed: int,
) -> None:
    params, grads = normal(sizes, torch.float32, seed), normal(sizes, torch.bfloat16, seed + 1)
    s, u = positive(sizes, torch.float32, seed + 2), positive(sizes, torch.bfloat16, seed + 3)
    if implementation.interpreted:
        assume(not leaves_bfloat16_denormals(params, grads, s, u, order, beta1, beta2))
    check_update(implementation, params, grads, s, u, order, beta1, beta2)


def leaves_bfloat16_denormals(params, grads, s, u, order, beta1, beta2) -> bool:
    """Whether the new bfloat16 U has denormals, which the interpreter does not convert correctly."""
    u = on("cpu", u)
    reference.update_importance_(
        ImportanceInputs(params, grads, on("cpu", s), u),
        Smoothing(beta1, beta2, order),
        torch.zeros((), dtype=torch.int64),
    )
    return any(((tensor != 0) & (tensor.abs() < torch.finfo(tensor.dtype).tiny)).any() for tensor in u)


def ks_of_interest(numel: int) -> set[int]:
    return {0, min(1, numel - 1), numel // 2, int(0.8 * (numel - 1)), max(numel - 2, 0), numel - 1}


@sizes
@pytest.mark.parametrize("with_uncertainty", [True, False], ids=["S*U", "S"])
def test_global_threshold(implementation: Any, sizes: list[int], with_uncertainty: bool) -> None:
    sizes = [size for size in sizes if size]
    u = positive(sizes, torch.float32, 1) if with_uncertainty else None
    scores = Scores(positive(sizes, torch.float32, 0), u)
    for k in ks_of_interest(sum(sizes)):
        check_thresholds(implementation, scores, [k], per_tensor=False)


@pytest.mark.parametrize("dtypes", list(itertools.product(PARAMETER_DTYPES, repeat=2)), ids=str)
def test_threshold_of_magnitudes(implementation: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    sizes = [CHUNK + 3, 1, 40]
    scores = magnitudes(normal(sizes, dtypes[0], 0), normal(sizes, dtypes[1], 1))
    for k in ks_of_interest(sum(sizes)):
        found = check_thresholds(implementation, scores, [k], per_tensor=False)
        distances = [
            (a.float() - b.float()).abs() for a, b in zip(scores.sensitivity, scores.uncertainty, strict=True)
        ]
        assert found.item() == torch.cat(distances).sort().values[k].item()
    check_thresholds(implementation, scores, [CHUNK // 2, 0, 30], per_tensor=True)


def test_thresholds_of_each_tensor(implementation: Any) -> None:
    sizes = [1, 40, CHUNK + 1, 2 * CHUNK]
    scores = Scores(positive(sizes, torch.float32, 0), positive(sizes, torch.bfloat16, 1))
    for pick in (min, max, lambda ks: sorted(ks)[len(ks) // 2]):
        check_thresholds(implementation, scores, [pick(ks_of_interest(n)) for n in sizes], per_tensor=True)


@pytest.mark.parametrize("name", adversarial(4).keys())
def test_threshold_of_adversarial_scores(implementation: Any, name: str) -> None:
    scores = adversarial(2 * CHUNK + 9)[name]
    for k in ks_of_interest(scores.numel()):
        check_thresholds(implementation, Scores([scores]), [k], per_tensor=False)


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=str)
def test_threshold_of_other_dtypes(implementation: Any, dtype: torch.dtype) -> None:
    scores = Scores(positive([CHUNK + 3, 10], dtype, 0), positive([CHUNK + 3, 10], torch.float32, 1))
    check_thresholds(implementation, scores, [100], per_tensor=False)


@pytest.mark.parametrize("name", adversarial(4).keys())
def test_a_useless_sample_ends_in_bisection(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With useless samples the search in blocks becomes a bisection, which must end."""
    for setting, value in {"SHORT": 4, "SMALL": 4, "SAMPLED_PASSES": 0}.items():
        monkeypatch.setattr(f"rkif_kernels.selection.sampled.{setting}", value)
    passes = []
    reader = torch_backend.select._BlockReader
    split = reader.split
    monkeypatch.setattr(reader, "split", lambda *a: passes.append(a) or split(*a))
    scores = adversarial(300)[name]
    for k in ks_of_interest(300):
        passes.clear()
        found = torch_backend.score_thresholds(Scores([scores]), ks=[k], per_tensor=False)
        assert found.item() == scores.sort().values[k].item()
        assert len(passes) <= 32


def test_a_nan_product_counts_as_zero(implementation: Any) -> None:
    s = torch.ones(CHUNK)
    u = torch.ones(CHUNK)
    s[: CHUNK // 2], u[: CHUNK // 2] = torch.inf, 0.0
    for k, value in ((CHUNK // 2 - 1, 0.0), (CHUNK // 2, 1.0)):
        assert check_thresholds(implementation, Scores([s], [u]), [k], per_tensor=False).item() == value


@settings(max_examples=30)
@given(
    st.lists(
        st.lists(
            st.sampled_from([0.0, -0.0, 1.0, 1.0000001, 2.0, 1e-45, 3e38, float("inf")])
            | st.floats(0, 2, width=32),
            min_size=1,
            max_size=80,
        ),
        min_size=1,
        max_size=3,
    ),
    st.floats(0, 1),
)
def test_threshold_on_random_inputs(implementation: Any, groups: list[list[float]], fraction: float) -> None:
    scores = Scores([torch.tensor(group) for group in groups])
    numel = sum(map(len, groups))
    check_thresholds(implementation, scores, [int(fraction * (numel - 1))], per_tensor=False)
    ks = [int(fraction * (len(group) - 1)) for group in groups]
    check_thresholds(implementation, scores, ks, per_tensor=True)
