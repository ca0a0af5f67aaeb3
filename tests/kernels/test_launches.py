"""Launches and tables for a list of tensors, and kernels with offsets beyond 32 bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import triton.language as tl
from kernel_cases import CHUNK, CONFIG, assert_same_bits, normal, on, positive

import rkif
from rkif_kernels import FusionInputs, ImportanceInputs, MergeRule, Scores, Smoothing
from rkif_kernels.backends import reference
from rkif_kernels.backends import triton as kernels
from rkif_kernels.backends.triton import (
    bracket,
    count,
    fuse,
    importance,
    radix,
    single_pass,
    table,
    thresholds,
    undecided,
    whole,
)
from rkif_kernels.backends.triton.launch import LaunchConfig
from rkif_kernels.backends.triton.launches import default_bracketing
from rkif_kernels.backends.triton.table import aligned, tables

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = replace(default_bracketing(), min_numel=1, sample_stride=2, run=1)
RULE = MergeRule(((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5)), "inner")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Kernel -> number of launches."""
    counter: Counter[str] = Counter()

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel, self.arg_names = name, kernel, kernel.arg_names

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            counter[self.name] += 1
            launcher: Callable[..., Any] = self.kernel[grid]
            return launcher

    def watch(module: ModuleType) -> None:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))

    for module in (bracket, count, fuse, importance, radix, single_pass, thresholds, undecided, whole):
        watch(module)
    return counter


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of elements of each uploaded table."""
    sizes: list[int] = []
    upload = table.upload

    def spy(host: torch.Tensor, device: torch.device) -> torch.Tensor:
        sizes.append(host.numel())
        return upload(host, device)

    monkeypatch.setattr(table, "upload", spy)
    return sizes


def adapter(tensors: int) -> dict[str, Any]:
    """Parameters and scores of a list of small tensors in two dtypes, some empty."""
    sizes = [index % 7 for index in range(tensors)]
    dtypes = [torch.float32 if index % 2 else torch.bfloat16 for index in range(tensors)]
    parts = {
        name: [
            t.to(dtype).to(DEVICE)
            for t, dtype in zip(normal(sizes, torch.float32, seed), dtypes, strict=True)
        ]
        for seed, name in enumerate(("out", "base", "inner", "outer"))
    }
    scores = {name: Scores(on(DEVICE, positive(sizes, torch.float32, 9))) for name in ("s_in", "s_out")}
    return parts | scores


def everything(a: dict[str, Any]) -> None:
    """One of each operation, on a list of tensors."""
    s = a["s_in"].sensitivity
    zero = torch.zeros((), dtype=torch.int64, device=DEVICE)
    kernels.update_importance_(
        ImportanceInputs(a["base"], a["inner"], s, None),
        Smoothing(0.5),
        zero,
        config=CONFIG,
    )
    numel = sum(t.numel() for t in s)
    filled = Scores([t for t in s if t.numel()])
    kernels.score_thresholds(filled, ks=[numel // 2], per_tensor=False, config=CONFIG)
    kernels.score_thresholds(
        filled, ks=[t.numel() // 2 for t in filled.sensitivity], per_tensor=True, config=CONFIG
    )
    kernels.both_thresholds(
        filled,
        filled,
        ks=[t.numel() // 2 for t in filled.sensitivity],
        per_tensor=True,
        config=CONFIG,
        bracketing=replace(SMALL, first_samples=2),
        whole=LaunchConfig(2, 1, 4),
    )
    limits = (torch.zeros(1, device=DEVICE),) * 2
    kernels.fuse_(FusionInputs(*a.values()), limits, RULE, config=CONFIG)
    for bracketing in (SMALL, default_bracketing()):
        kernels.select_and_fuse_(
            FusionInputs(*a.values()), numel // 2, RULE, config=CONFIG, bracketing=bracketing
        )
    kernels.count_scores_(
        torch.zeros(6, dtype=torch.int64, device=DEVICE), a["s_in"], low=0, shift=9, config=CONFIG
    )
    assert kernels.all_valid(s, config=CONFIG)


def test_launches_do_not_grow_with_the_number_of_tensors(launched: Counter[str]) -> None:
    everything(adapter(8))
    few = Counter(launched)
    launched.clear()
    everything(adapter(48))
    assert launched == few
    assert few["_update_importance_kernel"] == 2  # one for each combination of dtypes
    assert few["_whole_kernel"] == 2


def test_both_thresholds_of_each_tensor_take_seven_launches(launched: Counter[str]) -> None:
    """Those of tensors that are small enough take one."""
    sizes = [4, 70, 20, 300]
    sides = [Scores(on(DEVICE, positive(sizes, torch.float32, seed))) for seed in (3, 5)]
    kernels.both_thresholds(*sides, ks=[size // 2 for size in sizes], per_tensor=True)
    assert launched == {"_whole_kernel": 1}
    launched.clear()
    settings: dict[str, Any] = {"config": CONFIG, "bracketing": SMALL, "whole": LaunchConfig(16, 1, 4)}
    kernels.both_thresholds(*sides, ks=[size // 2 for size in sizes], per_tensor=True, **settings)
    assert sum(launched.values()) == 7


def test_nothing_is_uploaded_for_tensors_that_stay_where_they_are(uploads: list[int]) -> None:
    tensors = adapter(12)
    everything(tensors)
    assert uploads
    uploads.clear()
    everything(tensors)
    assert uploads == []
    tensors["base"][3] = tensors["base"][3].clone()
    everything(tensors)
    assert uploads, "a tensor that moved needs another table"


def test_a_step_reads_gradients_at_their_current_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """zero_grad(set_to_none=True) frees gradients; the next ones may be anywhere, also at old addresses."""
    monkeypatch.setattr("rkif_kernels.backends.choose.available", lambda device: ["triton"])
    parameter = torch.nn.Parameter(torch.ones(CHUNK, device=DEVICE))
    other = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    fuser = rkif.Fuser([("a", parameter), ("b", other)], rkif.FusionConfig.paper(beta1=0.0))
    kept = []
    for step in range(1, 6):
        parameter.grad = torch.full_like(parameter, step)
        other.grad = torch.full_like(other, -step)
        kept.append(parameter.grad if step % 2 else None)  # every second address is reused
        fuser.observe()
        scores = fuser.scores("inner")
        assert (scores["a"] == step).all()
        assert (scores["b"] == step).all()
        parameter.grad = other.grad = None


FAR = 1 << 33  # elements: 32 GiB of float32, as an index beyond 32 bits


def shifted(tables: tuple[table.Table, ...]) -> tuple[table.Table, ...]:
    """The same memory, addressed from FAR elements before it, so that every offset in a kernel is huge."""
    moved = []
    for one in tables:
        widths = [0 if dtype is None else tl.dtype(dtype).primitive_bitwidth // 8 for dtype in one.dtypes]
        back = torch.tensor(widths, device=one.pointers.device)[:, None] * FAR
        layout = replace(
            one.layout, numels=one.layout.numels + FAR, chunk_starts=one.layout.chunk_starts + FAR
        )
        moved.append(replace(one, pointers=one.pointers - back, layout=layout, firsts=one.firsts))
    return tuple(moved)


def test_offsets_beyond_32_bits_are_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses are shifted back and offsets forward; only 64-bit arithmetic reaches the memory."""
    sizes = [CHUNK + 5, 40]
    base, inner, outer = (normal(sizes, torch.float32, seed) for seed in range(3))
    scores = Scores(positive(sizes, torch.float32, 3), positive(sizes, torch.float32, 4))
    (limit,) = reference.score_thresholds(scores, ks=[100], per_tensor=False)
    limits = (limit[None], limit[None])
    expected = [torch.empty_like(b) for b in base]
    reference.fuse_(FusionInputs(expected, base, inner, outer, scores, scores), limits, RULE)
    states = on("cpu", scores.sensitivity)
    bad = torch.zeros((), dtype=torch.int64)
    reference.update_importance_(ImportanceInputs(base, inner, states, None), Smoothing(0.5), bad)

    tables_of = table.tables
    for module in (fuse, importance, radix, thresholds):
        monkeypatch.setattr(module, "tables", lambda *a, **k: shifted(tables_of(*a, **k)))
    moved = [on(DEVICE, part) for part in (base, inner, outer)]
    there = Scores(on(DEVICE, scores.sensitivity), on(DEVICE, scores.uncertainty))
    found = kernels.score_thresholds(there, ks=[100], per_tensor=False, config=CONFIG)
    assert found.item() == limit.item()
    out = [torch.full_like(b, torch.nan) for b in moved[0]]
    kernels.fuse_(FusionInputs(out, *moved, there, there), (found, found), RULE, config=CONFIG)
    assert_same_bits(out, expected)
    kernels.update_importance_(
        ImportanceInputs(moved[0], moved[1], there.sensitivity, None),
        Smoothing(0.5),
        bad.to(DEVICE),
        config=CONFIG,
    )
    assert_same_bits(there.sensitivity, states)


@pytest.mark.parametrize("before", [FAR, 2**31 - 100], ids=["all", "some"])
def test_single_pass_positions_beyond_32_bits_are_correct(
    before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions in the list and starts of tensors, as if FAR elements of other tensors preceded them."""
    sizes = [CHUNK + 5, 40, 2 * CHUNK]
    base, inner, outer = (on(DEVICE, normal(sizes, torch.float32, seed)) for seed in range(3))
    scores = Scores(on(DEVICE, positive(sizes, torch.float32, 3)))
    tables_of = table.tables
    results = []
    for far in (0, before):
        monkeypatch.setattr(
            single_pass,
            "tables",
            lambda *a, far=far: tuple(replace(one, firsts=one.firsts + far) for one in tables_of(*a)),
        )
        out = [torch.full_like(b, torch.nan) for b in base]
        stats = kernels.select_and_fuse_(
            FusionInputs(out, base, inner, outer, scores, scores),
            200,
            RULE,
            config=CONFIG,
            bracketing=SMALL,
        )
        results.append(([t.cpu() for t in out], stats.counts.tolist()))
    assert_same_bits(results[1][0], results[0][0])
    assert results[1][1] == results[0][1]
    assert results[0][1][2] > 0


@pytest.mark.gpu
def test_nothing_waits_for_the_device_and_a_graph_can_be_captured() -> None:
    sizes = [5_000_000, 300, 40_000]
    generator = torch.Generator("cuda").manual_seed(0)
    fresh = lambda: [torch.randn(n, generator=generator, device="cuda") for n in sizes]  # noqa: E731
    base, inner, outer, s, u = fresh(), fresh(), fresh(), fresh(), fresh()
    scores = Scores([t.abs_() for t in s], [t.abs_() for t in u])
    out = [torch.empty_like(b) for b in base]
    nonfinite = torch.zeros((), dtype=torch.int64, device="cuda")

    def step() -> Any:
        kernels.update_importance_(ImportanceInputs(base, inner, s, u), Smoothing(0.85, 0.85), nonfinite)
        stats = kernels.select_and_fuse_(
            FusionInputs(out, base, inner, outer, scores, scores), 4_000_000, RULE
        )
        ks = [size // 3 for size in sizes]
        return stats, kernels.both_thresholds(scores, scores, ks=ks, per_tensor=True)

    step()
    torch.cuda.synchronize()
    before = [t.clone() for t in (*s, *u)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats, limits = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, counts = [t.clone() for t in out], stats.counts.clone()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, found = step()
    for tensor, old in zip((*s, *u), before, strict=True):
        tensor.copy_(old)
    for tensor in out:
        tensor.fill_(torch.nan)
    graph.replay()
    assert_same_bits(out, [t.cpu() for t in expected])
    assert torch.equal(captured.counts, counts)
    assert all(map(torch.equal, found, limits))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements_are_fused() -> None:
    """bfloat16, so that 2^31 elements and more of seven streams fit a device of 80 GiB."""
    n = (1 << 31) + 4099
    generator = torch.Generator("cuda").manual_seed(0)
    base, inner, outer, s_in, s_out = (
        torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_(generator=generator) for _ in range(5)
    )
    s_in, s_out = Scores([s_in.abs_()]), Scores([s_out.abs_()])
    out = torch.full_like(base, torch.nan)
    k = int(0.8 * (n - 1))
    stats = kernels.select_and_fuse_(FusionInputs([out], [base], [inner], [outer], s_in, s_out), k, RULE)
    for limit, scores in zip(stats.thresholds, (s_in, s_out), strict=True):
        below = sum(int((part.float() < limit).sum()) for part in scores.sensitivity[0].split(1 << 28))
        upto = sum(int((part.float() <= limit).sum()) for part in scores.sensitivity[0].split(1 << 28))
        assert below <= k < upto
    for start in (0, n // 2, (1 << 31) - 2048, n - 4096):
        part = slice(start, start + 4096)
        expected = [torch.empty(4096, dtype=torch.bfloat16)]
        reference.fuse_(
            FusionInputs(
                expected,
                *([t[part].cpu()] for t in (base, inner, outer)),
                *(Scores([s.sensitivity[0][part].cpu()]) for s in (s_in, s_out)),
            ),
            tuple(limit.cpu() for limit in stats.thresholds),
            RULE,
        )
        assert_same_bits([out[part]], expected)
    assert int(stats.counts.sum()) == n
    assert not out.isnan().any()


def test_addresses_are_aligned() -> None:
    memory = torch.arange(100.0)
    rows = aligned(([memory[1:40], memory[44:80]], [memory[:39], None]))
    found = tables(rows, chunk=16)
    assert sorted(built.indices.tolist() for built in found) == [[0], [1]]
    for built in found:
        for row, tensors in zip(built.pointers.tolist(), rows, strict=True):
            for address, index in zip(row, built.indices.tolist(), strict=True):
                tensor = tensors[index]
                assert address % 16 == 0
                assert address == (0 if tensor is None else tensor.data_ptr())
        assert built.layout.chunk_starts.tolist() == [0, 16, 32]


def test_tables_are_cached_until_memory_moves() -> None:
    tensors = [torch.rand(40), torch.rand(9)]
    (first,) = tables(aligned((tensors,)), chunk=16)
    assert tables(aligned((tensors,)), chunk=16)[0] is first
    tensors[1] = tensors[1].clone()
    (moved,) = tables(aligned((tensors,)), chunk=16)
    assert moved.pointers.tolist() == [[tensor.data_ptr() for tensor in tensors]]
    assert moved.pointers.tolist() != first.pointers.tolist()
    assert moved.layout is first.layout
    tensors[1] = tensors[1].resize_(20)
    assert tables(aligned((tensors,)), chunk=16)[0].layout.numels.tolist() == [40, 20]
