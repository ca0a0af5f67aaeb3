"""The compiled CPU kernels: boundaries of tiles and threads, and 16-bit conversions."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_cases import NATIVE, Guarded, assert_same_bits, normal, positive

from rkif_kernels import FusionInputs, ImportanceInputs, MergeRule, Scores, Smoothing
from rkif_kernels.backends import native, reference
from rkif_kernels.backends.native import fuse as native_fuse
from rkif_kernels.backends.native.library import library, use_instructions

pytestmark = [NATIVE, pytest.mark.usefixtures("poisoned", "instructions")]
TILE, TILES_A_THREAD = 4096, 8
INSTRUCTIONS = range(use_instructions(0) if library() is not None else 1)
WEIGHTS = ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5))


@pytest.fixture(params=INSTRUCTIONS, ids=lambda which: f"instructions {which}")
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every instruction set of this processor, from the widest to portable C++."""
    use_instructions(request.param)
    yield
    use_instructions(0)


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
def test_tiles_are_distributed_over_threads(threads: int, sizes: list[int]) -> None:
    torch.set_num_threads(threads)
    base, inner, outer = (normal(sizes, torch.float32, seed) for seed in range(3))
    s, u = positive(sizes, torch.float32, 4), positive(sizes, torch.float32, 5)
    out = Guarded([torch.full_like(b, torch.nan) for b in base], "cpu")
    expected = [torch.empty_like(b) for b in base]
    limits = tuple(torch.tensor([limit]) for limit in (0.3, 0.7))
    arguments = (base, inner, outer, Scores(s, u), Scores(u))
    settings = {"thresholds": limits, "rule": MergeRule(WEIGHTS, "inner")}
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
    smoothing = Smoothing(0.85, 0.55)
    bad, expected_bad = torch.zeros(2, 1, dtype=torch.int64)
    inner[-1][-1] = torch.inf
    native.update_importance_(
        ImportanceInputs(base, inner, *(state.tensors for state in states)), smoothing, bad
    )
    reference.update_importance_(ImportanceInputs(base, inner, s, u), smoothing, expected_bad)
    for state, wanted_state in zip(states, (s, u), strict=True):
        assert_same_bits(state.tensors, wanted_state)
        state.assert_edges_untouched()
    assert bad.item() == expected_bad.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flush", [False, True], ids=["", "denormals flushed"])
def test_every_16_bit_number_is_read_exactly(dtype: torch.dtype, flush: bool) -> None:
    """Subnormals of float16 are normal in float32, so a flush-to-zero mode must not change them."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    zero = torch.zeros(every.numel())
    out = [torch.empty(every.numel())]
    keep = ((0.0, 0.0),) * 4
    if flush and (dtype == torch.bfloat16 or not torch.set_flush_denormal(True)):
        pytest.skip("a bfloat16 denormal is one in float32, too, or this processor cannot flush")
    native.fuse_(
        FusionInputs(out, [every], [zero], [zero], Scores([zero]), Scores([zero])),
        (torch.zeros(1), torch.zeros(1)), MergeRule(keep, "inner"),
    )  # fmt: skip
    torch.set_flush_denormal(False)
    # 0 * (0 - w) is added: it does not change finite values, and gives NaN for infinite ones.
    expected = every.float() + 0.0
    expected[every.isinf()] = torch.nan
    assert_same_bits(out, [expected])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_results_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """Random patterns, and all halfway cases with their neighbours."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(1 << 31), (1 << 31) - 1, (200_000,), generator=generator)
    every = torch.arange(0, 1 << 15).to(torch.int16).view(dtype).float().view(torch.int32)
    half = {torch.bfloat16: 1 << 15, torch.float16: 1 << 12}[dtype]
    beside = [every + half + step for step in (-1, 0, 1)]
    subnormal = torch.arange(0, 1 << 12).float().mul(2**-26)  # quarters of the smallest float16
    patterns = torch.cat([random.to(torch.int32), *beside, subnormal.view(torch.int32)])
    values = torch.cat([patterns.view(torch.float32), -patterns.view(torch.float32)])
    zero = torch.zeros(values.numel())
    out = [torch.empty(values.numel(), dtype=dtype)]
    # S <- 0*S + 1*|w*1| would lose the sign; a fusion of the whole tau_in with base 0 keeps it.
    take = ((1.0, 0.0),) * 4
    native.fuse_(
        FusionInputs(out, [zero], [values], [values], Scores([zero]), Scores([zero])),
        (torch.zeros(1), torch.zeros(1)), MergeRule(take, "inner"),
    )  # fmt: skip
    expected = [torch.empty(values.numel(), dtype=dtype)]
    reference.fuse_(
        FusionInputs(expected, [zero], [values], [values], Scores([zero]), Scores([zero])),
        (torch.zeros(1), torch.zeros(1)), MergeRule(take, "inner"),
    )  # fmt: skip
    assert_same_bits(out, expected)


def test_more_threads_than_tiles_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 1000)
    ones, s = torch.ones(70 * TILE), torch.zeros(70 * TILE)
    native.update_importance_(
        ImportanceInputs([ones], [ones], [s], None), Smoothing(0.5), torch.zeros(1, dtype=torch.int64)
    )
    assert (s == 0.5).all()


SELECTED = 1 << 17  # number of elements from which brackets are used


def check_single_pass(
    sizes: list[int],
    scores: Callable[[int], Scores],
    *,
    k: int | None = None,
    dtype: torch.dtype = torch.float32,
    outer_from: str = "inner",
) -> torch.Tensor:
    """Compare the single pass with the reference, bit for bit; returns the squared norms."""
    base, inner, outer = (normal(sizes, dtype, seed) for seed in range(3))
    sides = scores(4), scores(5)
    k = int(0.8 * (sum(sizes) - 1)) if k is None else k
    limits = tuple(reference.score_thresholds(filled(side), ks=[k], per_tensor=False) for side in sides)
    expected = [torch.empty_like(b) for b in base]
    out = Guarded([torch.full_like(b, torch.nan) for b in base], "cpu")
    rule = MergeRule(WEIGHTS, outer_from)
    wanted = reference.fuse_(FusionInputs(expected, base, inner, outer, *sides), limits, rule)
    got = native.select_and_fuse_(FusionInputs(out.tensors, base, inner, outer, *sides), k, rule)
    assert_same_bits(out.tensors, expected)
    out.assert_edges_untouched()
    assert got.counts.tolist() == wanted.counts.tolist()
    for found, limit in zip(got.thresholds, limits, strict=True):
        assert torch.equal(found, limit)
    torch.testing.assert_close(got.squared_norms, wanted.squared_norms, rtol=1e-12, atol=0)
    return got.squared_norms


def filled(scores: Scores) -> Scores:
    return scores.subset(index for index, tensor in enumerate(scores.sensitivity) if tensor.numel())


SIZES = [SELECTED + 3, 0, 1, TILE - 1, TILE, TILE + 1, 17, 5000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["S", "S*U", "distance"])
def test_the_single_pass_has_the_bits_of_the_reference(dtype: torch.dtype, form: str) -> None:
    def scores(seed: int) -> Scores:
        first, second = positive(SIZES, dtype, seed), positive(SIZES, dtype, seed + 10)
        return Scores(first, None if form == "S" else second, distance=form == "distance")

    outer_from = "base" if form == "distance" else "inner"
    check_single_pass(SIZES, scores, dtype=dtype, outer_from=outer_from)


@pytest.mark.parametrize(
    "values",
    [
        lambda n, seed: torch.zeros(n),
        lambda n, seed: torch.ones(n),
        lambda n, seed: (torch.arange(n) % 5 == 0).float(),
        lambda n, seed: (torch.arange(n) * (seed + 3) % 11).float(),
        lambda n, seed: torch.arange(n).float(),
        lambda n, seed: torch.where(torch.arange(n) % 3 == 0, torch.inf, torch.arange(n).float()),
        lambda n, seed: torch.where(torch.arange(n) % 7 == 0, torch.nan, torch.arange(n).float()),
        lambda n, seed: (torch.arange(n) % 1000).float() * 1e-42,
    ],
    ids=["zero", "equal", "two values", "ties", "sorted", "inf", "NaN", "denormal"],
)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_the_single_pass_accepts_every_form_of_score(
    values: Callable[[int, int], torch.Tensor], place: str
) -> None:
    n = SELECTED + TILE + 5
    k = {"first": 0, "middle": int(0.8 * (n - 1)), "last": n - 1}[place]
    check_single_pass([n], lambda seed: Scores([values(n, seed).nan_to_num(0.0, torch.inf)]), k=k)


def test_a_nan_score_counts_as_zero_in_the_single_pass() -> None:
    n = SELECTED + 100
    zeros = Scores([torch.where(torch.arange(n) % 2 == 0, 0.0, torch.arange(n).float())])
    nans = Scores([torch.where(torch.arange(n) % 2 == 0, torch.nan, torch.arange(n).float())])
    results = []
    for scores in (zeros, nans):
        base, inner, outer = (normal([n], torch.float32, seed) for seed in range(3))
        out = [torch.empty(n)]
        stats = native.select_and_fuse_(
            FusionInputs(out, base, inner, outer, scores, scores),
            int(0.8 * n),
            MergeRule(WEIGHTS, "inner"),
        )
        results.append((out, stats.counts.tolist()))
    assert_same_bits(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("bracket", [(0.0, 0.0), (1e30, float("inf"))], ids=["below", "above"])
def test_a_missed_bracket_costs_only_a_pass(
    bracket: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_fuse, "bracket", lambda *_: bracket)
    sizes = [SELECTED + 1]
    check_single_pass(sizes, lambda seed: Scores(positive(sizes, torch.float32, seed)))


def test_too_many_undecided_elements_cost_only_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_fuse, "MAX_UNDECIDED", 10)
    sizes = [SELECTED + 1]
    check_single_pass(sizes, lambda seed: Scores(positive(sizes, torch.float32, seed)))


def test_norms_have_the_same_bits_for_any_threads_and_instructions() -> None:
    sizes = [SELECTED * 3 + 7, 300]
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        use_instructions(threads % len(INSTRUCTIONS))
        found.append(check_single_pass(sizes, lambda seed: Scores(positive(sizes, torch.float32, seed))))
    for norms in found[1:]:
        assert torch.equal(norms, found[0])


def _threshold(scores: torch.Tensor) -> float:
    return native.score_thresholds(Scores([scores]), ks=[1000], per_tensor=False).item()


def test_a_forked_process_starts_its_own_threads() -> None:
    torch.set_num_threads(2)
    scores = positive([SELECTED * 2], torch.float32, 0)[0]
    expected = _threshold(scores)
    with multiprocessing.get_context("fork").Pool(1) as forked:
        assert forked.apply_async(_threshold, (scores,)).get(timeout=60) == expected
    assert _threshold(scores) == expected


def test_too_little_memory_raises_memory_error() -> None:
    """The list of undecided elements cannot grow; the threads of the pool meet the error and survive."""
    code = """
import resource, torch, rkif_kernels
from rkif_kernels.backends.native import fuse
torch.set_num_threads(2)
n = 1 << 21
parts = [torch.randn(n) for _ in range(4)]
scores = rkif_kernels.Scores([torch.rand(n)])
def run():
    return rkif_kernels.select_and_fuse_(
        [parts[0]], [parts[1]], [parts[2]], [parts[3]], scores, scores, density=0.2,
        weights=((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0)), backend="native",
    )
counts = run().counts.tolist()
fuse.bracket = lambda *_: (0.0, 1.0)  # everything is undecided
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), resource.RLIM_INFINITY))
try:
    run()
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert run().counts.tolist() == counts
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "rkif_begin needs more memory than is available\n"


def test_a_library_of_another_version_causes_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkif_kernels.backends.native.library.ABI", 0)
    with pytest.warns(RuntimeWarning, match="was built from another version of rkif.*install rkif again"):
        assert library.__wrapped__() is None
