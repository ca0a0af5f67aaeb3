"""The compiled CPU kernels where their own tiles and threads begin and end, and their 16-bit conversions."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import NATIVE, Guarded, assert_same_bits, normal, positive

from rkif_kernels import FusionInputs, ImportanceInputs, Scores
from rkif_kernels.backends import native, reference

pytestmark = [NATIVE, pytest.mark.usefixtures("poisoned")]
TILE, TILES_A_THREAD = 1024, 32
WEIGHTS = ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "sizes",
    [
        [TILE - 1],
        [TILE + 1],
        [2 * TILES_A_THREAD * TILE - 1],
        [4 * TILES_A_THREAD * TILE + 5],
        [1, 0, TILE, 3 * TILES_A_THREAD * TILE + 1, 0, TILE + 1, 17],
        [500] * 300,
    ],
    ids=str,
)
def test_tiles_are_shared_out_among_threads(threads: int, sizes: list[int]) -> None:
    torch.set_num_threads(threads)
    base, inner, outer = (normal(sizes, torch.float32, seed) for seed in range(3))
    s, u = positive(sizes, torch.float32, 4), positive(sizes, torch.float32, 5)
    out = Guarded([torch.full_like(b, torch.nan) for b in base], "cpu")
    expected = [torch.empty_like(b) for b in base]
    limits = tuple(torch.tensor([limit]) for limit in (0.3, 0.7))
    arguments = (base, inner, outer, Scores(s, u), Scores(u))
    settings = {"thresholds": limits, "weights": WEIGHTS, "outer_from": "inner"}
    wanted = reference.fuse_(FusionInputs(expected, *arguments), **settings)
    got = native.fuse_(FusionInputs(out.tensors, *arguments), **settings)
    assert_same_bits(out.tensors, expected)
    out.assert_edges_untouched()
    assert got.counts.tolist() == wanted.counts.tolist()
    torch.testing.assert_close(got.squared_norms, wanted.squared_norms, rtol=1e-12, atol=0)

    ks = [int(0.8 * (sum(sizes) - 1))]
    filled = Scores([t for t in s if t.numel()], [t for t in u if t.numel()])
    assert torch.equal(
        native.score_thresholds(filled, ks=ks, per_tensor=False),
        reference.score_thresholds(filled, ks=ks, per_tensor=False),
    )

    states = [Guarded(s, "cpu"), Guarded(u, "cpu")]
    betas = {"beta1": 0.85, "beta2": 0.55, "order": "first"}
    bad, expected_bad = torch.zeros(2, 1, dtype=torch.int64)
    inner[-1][-1] = torch.inf
    native.update_importance_(
        ImportanceInputs(base, inner, *(state.tensors for state in states)), nonfinite=bad, **betas
    )
    reference.update_importance_(ImportanceInputs(base, inner, s, u), nonfinite=expected_bad, **betas)
    for state, wanted_state in zip(states, (s, u), strict=True):
        assert_same_bits(state.tensors, wanted_state)
        state.assert_edges_untouched()
    assert bad.item() == expected_bad.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flush", [False, True], ids=["", "denormals flushed"])
def test_every_16_bit_number_is_read_as_it_is(dtype: torch.dtype, flush: bool) -> None:
    """A half's subnormals are no denormals in float32, and no business of a mode that flushes those."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    zero = torch.zeros(every.numel())
    out = [torch.empty(every.numel())]
    keep = ((0.0, 0.0),) * 4
    if flush and (dtype == torch.bfloat16 or not torch.set_flush_denormal(True)):
        pytest.skip("a bfloat16 denormal is one in float32, too, or this processor cannot flush")
    native.fuse_(
        FusionInputs(out, [every], [zero], [zero], Scores([zero]), Scores([zero])),
        thresholds=(torch.zeros(1), torch.zeros(1)), weights=keep, outer_from="inner",
    )  # fmt: skip
    torch.set_flush_denormal(False)
    # 0 * (0 - w) is added: no change to a finite number, NaN for an infinite one.
    expected = every.float() + 0.0
    expected[every.isinf()] = torch.nan
    assert_same_bits(out, [expected])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_results_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """Random patterns, and all halfway cases with the patterns beside them."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(1 << 31), (1 << 31) - 1, (200_000,), generator=generator)
    every = torch.arange(0, 1 << 15).to(torch.int16).view(dtype).float().view(torch.int32)
    half = {torch.bfloat16: 1 << 15, torch.float16: 1 << 12}[dtype]
    beside = [every + half + step for step in (-1, 0, 1)]
    subnormal = torch.arange(0, 1 << 12).float().mul(2**-26)  # quarters of the least half
    patterns = torch.cat([random.to(torch.int32), *beside, subnormal.view(torch.int32)])
    values = torch.cat([patterns.view(torch.float32), -patterns.view(torch.float32)])
    zero = torch.zeros(values.numel())
    out = [torch.empty(values.numel(), dtype=dtype)]
    # S <- 0*S + 1*|w*1| would lose the sign; a fusion that takes all of tau_in from base 0 keeps it.
    take = ((1.0, 0.0),) * 4
    native.fuse_(
        FusionInputs(out, [zero], [values], [values], Scores([zero]), Scores([zero])),
        thresholds=(torch.zeros(1), torch.zeros(1)), weights=take, outer_from="inner",
    )  # fmt: skip
    expected = [torch.empty(values.numel(), dtype=dtype)]
    reference.fuse_(
        FusionInputs(expected, [zero], [values], [values], Scores([zero]), Scores([zero])),
        thresholds=(torch.zeros(1), torch.zeros(1)), weights=take, outer_from="inner",
    )  # fmt: skip
    assert_same_bits(out, expected)


def test_more_threads_than_there_is_work_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 1000)
    ones, s = torch.ones(70 * TILE), torch.zeros(70 * TILE)
    settings = {"beta1": 0.5, "beta2": 0.0, "order": "first"}
    native.update_importance_(
        ImportanceInputs([ones], [ones], [s], None), nonfinite=torch.zeros(1, dtype=torch.int64), **settings
    )
    assert (s == 0.5).all()
