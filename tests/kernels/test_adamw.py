"""AdamW with importance: every implementation has the bits of the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_cases import (
    CHUNK,
    PARAMETER_DTYPES,
    SIZES,
    STATE_DTYPES,
    Guarded,
    assert_same_bits,
    normal,
    on,
    positive,
)
from torch import Tensor

import rkif_kernels
from rkif_kernels import AdamWInputs, ImportanceInputs, Smoothing, adamw_constants
from rkif_kernels.backends import reference

pytestmark = pytest.mark.usefixtures("poisoned")
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "step": 3}
IMPORTANCE: dict[str, Any] = {"beta1": 0.85, "beta2": 0.55}


def check(
    implementation: Any,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    order: str = "first",
    **changes: Any,
) -> int:
    """Take one step by the implementation and by the reference; returns the non-finite count.

    ``states`` are m, v, and S and U if they are followed.
    """
    constants = adamw_constants(**{**SETTINGS, **changes})
    smoothing = Smoothing(**IMPORTANCE, order=order)
    expected = [on("cpu", params), *(on("cpu", tensors) for tensors in states)]
    expected_bad = torch.zeros((), dtype=torch.int64)
    reference.adamw_(AdamWInputs(expected[0], grads, *expected[1:]), constants, smoothing, expected_bad)

    device = implementation.device
    got = [Guarded(tensors, device) for tensors in (params, *states)]
    bad = torch.zeros((), dtype=torch.int64, device=device)
    implementation.adamw_(
        AdamWInputs(got[0].tensors, on(device, grads), *(guarded.tensors for guarded in got[1:])),
        constants,
        smoothing,
        bad,
    )
    for guarded, wanted in zip(got, expected, strict=True):
        assert_same_bits(guarded.tensors, wanted)
        guarded.assert_edges_untouched()
    assert bad.item() == expected_bad.item()
    return int(bad)


def tensors(
    sizes: list[int],
    followed: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Weights, gradients and states; ``followed`` is the number of tensors with S and U."""
    states = [normal(sizes, state_dtype, 2)]
    states += [positive(sizes, state_dtype, seed) for seed in range(3, 4 + followed)]
    return normal(sizes, dtype, 0), normal(sizes, dtype, 1), states


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("followed", [0, 1, 2], ids=["no importance", "S", "S and U"])
def test_a_step_has_the_bits_of_the_reference(implementation: Any, sizes: list[int], followed: int) -> None:
    assert check(implementation, *tensors(sizes, followed)) == 0


@pytest.mark.parametrize("order", ["second", "mixed"])
def test_every_order_has_the_bits_of_the_reference(implementation: Any, order: str) -> None:
    assert check(implementation, *tensors([CHUNK + 5]), order) == 0


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
def test_every_dtype_has_the_bits_of_the_reference(
    implementation: Any, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    check(implementation, *tensors([CHUNK + 7, 3], dtype=dtype, state_dtype=state_dtype))


def test_mixed_dtypes_have_the_bits_of_the_reference(implementation: Any) -> None:
    rows = [tensors([CHUNK + i], dtype=dtype) for i, dtype in enumerate(PARAMETER_DTYPES)]
    params, grads, states = zip(*rows, strict=True)
    joined = [[row[state][0] for row in states] for state in range(4)]
    check(implementation, [p[0] for p in params], [g[0] for g in grads], joined)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 1},
        {"step": 10_000_000},
        {"lr": 0.0},
        {"weight_decay": 0.0},
        {"betas": (0.0, 0.0)},
        {"eps": 0.0},
    ],
    ids=str,
)
def test_extreme_settings_have_the_bits_of_the_reference(
    implementation: Any, changes: dict[str, Any]
) -> None:
    check(implementation, *tensors([CHUNK + 5]), **changes)


def test_a_nonfinite_element_keeps_its_importance(implementation: Any) -> None:
    params, grads, states = tensors([CHUNK + 5, 2])
    grads[0][0], grads[0][CHUNK] = torch.nan, torch.inf
    params[0][7] = -torch.inf
    params[1][1], grads[1][1] = 1e30, 1e30  # overflows in the product
    assert check(implementation, params, grads, states) == 4


def test_zeros_and_denormals_have_the_bits_of_the_reference(implementation: Any) -> None:
    params, grads, states = tensors([CHUNK + 1])
    grads[0].fill_(1e-41)
    for state in states:
        state[0].fill_(3e-42)
    grads[0][:9] = 0
    states[1][0][:5] = 0
    check(implementation, params, grads, states)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 8191, 8192, 8193, 1 << 20])
def test_the_default_launch_on_a_gpu_has_the_bits_of_the_reference(n: int) -> None:
    compare_default_launch("triton", "cuda", n)


@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 1025, 8193])
def test_the_default_launch_has_the_bits_of_the_reference(n: int) -> None:
    compare_default_launch("auto", "cpu", n)


def compare_default_launch(backend: Any, device: str, n: int) -> None:
    params, grads, states = tensors([n])
    expected = [on("cpu", params), *(on("cpu", state) for state in states)]
    settings = {**SETTINGS, **IMPORTANCE}
    bad = torch.zeros(1, dtype=torch.int64)
    reference.adamw_(
        AdamWInputs(expected[0], grads, *expected[1:]),
        adamw_constants(**SETTINGS),
        Smoothing(**IMPORTANCE),
        bad,
    )
    got = [on(device, params), *(on(device, state) for state in states)]
    rkif_kernels.adamw_(
        got[0], on(device, grads), *got[1:], **settings, nonfinite=bad.to(device), backend=backend
    )
    for found, wanted in zip(got, expected, strict=True):
        assert_same_bits(found, wanted)


def test_importance_is_that_of_an_update_before_the_step(implementation: Any) -> None:
    params, grads, states = tensors([CHUNK + 5])
    device = implementation.device
    s, u = on(device, states[2]), on(device, states[3])
    bad = torch.zeros((), dtype=torch.int64, device=device)
    implementation.update_importance_(
        ImportanceInputs(on(device, params), on(device, grads), s, u),
        Smoothing(**IMPORTANCE),
        bad,
    )
    got = [on(device, state) for state in states]
    inputs = AdamWInputs(on(device, params), on(device, grads), *got)
    implementation.adamw_(inputs, adamw_constants(**SETTINGS), Smoothing(**IMPORTANCE), bad)
    assert torch.equal(got[2][0], s[0])
    assert torch.equal(got[3][0], u[0])
    assert not torch.equal(got[2][0].cpu(), states[2][0])


@pytest.mark.parametrize("layout", ["transposed", "misaligned"])
def test_weights_of_any_layout_are_updated(layout: str) -> None:
    def laid_out(tensor: Tensor) -> Tensor:
        if layout == "transposed":
            return tensor.view(7, 9).T.contiguous().T
        return torch.cat([torch.zeros(1), tensor])[1:]

    params, grads, states = tensors([63])
    shape = (7, 9) if layout == "transposed" else (63,)
    shaped = [[t.view(shape) for t in state] for state in states]
    plain, other = params[0].view(shape).clone(), laid_out(params[0].clone())
    for weights in (plain, other):
        copies = [on("cpu", state) for state in shaped[:2]]
        rkif_kernels.adamw_([weights], [grads[0].view(shape)], *copies, **SETTINGS)
    assert torch.equal(other, plain)
    assert not torch.equal(plain, params[0].view(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr must be a non-negative number, finite in float32"),
        ({"lr": math.nan}, "lr must be .* got nan"),
        ({"lr": torch.tensor(1.0)}, "lr must be .* not a tensor"),
        ({"lr": True}, "lr must be .* got True"),
        ({"lr": 1e300}, r"lr must be .* got 1e\+300"),
        ({"lr": 1e38, "step": 1}, r"lr, betas and weight_decay must give constants .* got lr=1e\+38"),
        ({"lr": 1e30, "weight_decay": 1e30}, r"must give constants .* weight_decay=1e\+30"),
        ({"eps": 10**400}, "eps must be"),
        ({"eps": -1e-8}, "eps must be"),
        ({"weight_decay": math.inf}, "weight_decay must be"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be a number in \[0, 1\).*1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas must be two numbers in \[0, 1\); got \(0.9, 0.99, 0.999\)"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"step": 0}, r"step must be a whole number of at least 1 and below 2\^63; got 0"),
        ({"step": 1.5}, "step must be a whole number .* got 1.5"),
        ({"step": "2"}, "step must be a whole number .* got '2'"),
        ({"step": True}, "step must be a whole number .* got True"),
        ({"step": 2**63}, "step must be a whole number .* got 9223372036854775808"),
        ({"beta1": 1.5}, "beta1 must be in"),
        ({"order": "third"}, "order must be one of"),
        ({"nonfinite": None}, "nonfinite must be given with sensitivity"),
        ({"nonfinite": torch.zeros(2, dtype=torch.int64)}, "nonfinite must be one int64"),
        ({"sensitivity": None}, "uncertainty was given without sensitivity"),
        ({"exp_avg": [torch.zeros(4)]}, r"exp_avg\['w'\] has shape \(4,\)"),
        ({"exp_avg_sq": []}, "exp_avg_sq has 0 tensors, params has 1"),
        ({"names": []}, "names has 0 names, params has 1 tensors"),
        ({"grads": [torch.zeros(5, dtype=torch.float64)]}, None),
        ({"exp_avg": [torch.zeros(10)[::2]]}, "must be contiguous"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused_before_any_write(changes: dict[str, Any], message: str | None) -> None:
    params, grads, states = tensors([5])
    given: dict[str, Any] = {
        "params": params,
        "grads": grads,
        **dict(zip(("exp_avg", "exp_avg_sq", "sensitivity", "uncertainty"), states, strict=True)),
        "nonfinite": torch.zeros(1, dtype=torch.int64),
        "names": ["w"],
        **SETTINGS,
        **IMPORTANCE,
    }
    before = [tensor.clone() for tensor in (*params, *(t for state in states for t in state))]
    with pytest.raises(ValueError if message else TypeError, match=message or "dtype float64"):
        rkif_kernels.adamw_(**{**given, **changes})
    assert_same_bits([*params, *(t for state in states for t in state)], before)


def test_refuses_states_that_share_memory() -> None:
    params, grads, states = tensors([5], followed=0)
    with pytest.raises(ValueError, match=r"exp_avg_sq\[0\] shares memory with exp_avg\[0\]"):
        rkif_kernels.adamw_(params, grads, states[0], states[0], **SETTINGS)
