"""A planned fusion equals the operation, also if tensors move between rounds."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

import pytest
import torch
from kernel_cases import BLOCK, CHUNK, CONFIG, NATIVE, assert_same_bits, normal, on, positive
from torch import Tensor

import rkif
from rkif_kernels import FusionInputs, FusionPlan, MergeRule, Scores, Views, magnitudes, select_and_fuse_
from rkif_kernels.backends.triton import both_thresholds, single_pass
from rkif_kernels.backends.triton.launch import Bracketing, LaunchConfig
from rkif_kernels.backends.triton.undecided import Undecided
from rkif_kernels.ops import fusion_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [BLOCK + 1, 3, 0, CHUNK + 5]
SMALL = Bracketing(min_numel=1, sample_stride=2, max_samples=1 << 20, sigmas=2.5, list_slack=1.5)
SETTINGS: dict[str, Any] = {
    "density": 0.3, "weights": ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5)), "outer_from": "base"
}  # fmt: skip
PLANNED: dict[str, Any] = {
    "density": SETTINGS["density"], "rule": MergeRule(SETTINGS["weights"], SETTINGS["outer_from"])
}  # fmt: skip
BACKENDS = [
    "triton",
    "torch" if DEVICE == "cpu" else pytest.param("torch", marks=pytest.mark.gpu),
    pytest.param("native", marks=[NATIVE, pytest.mark.skipif(DEVICE == "cuda", reason="for CPU tensors")]),
]
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[FusionInputs]:
    """The inputs of Triton's prepared launches; small inputs are prepared as well."""
    calls: list[FusionInputs] = []
    prepare = single_pass.prepared_fusion

    def spy(inputs: FusionInputs, *args: Any) -> Any:
        launch = prepare(inputs, *args, bracketing=SMALL)
        calls.extend([inputs] * (launch is not None))
        return launch

    monkeypatch.setattr("rkif_kernels.backends.triton.prepared_fusion", spy)
    return calls


def lists(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    return [on(DEVICE, normal(SIZES, dtype, seed + part)) or [] for part in range(3)]


def sides(seed: int = 3) -> tuple[Scores, Scores]:
    parts = [on(DEVICE, positive(SIZES, torch.float32, seed + part)) for part in range(4)]
    return Scores(parts[0], parts[1]), Scores(parts[2], parts[3])


def check(plan: FusionPlan, backend: Any, inputs: list[Any], out: list[Tensor] | None = None) -> list[Tensor]:
    """Compare the bits of a fusion by the plan and by the operation; returns the plan's output."""
    got = [torch.full_like(tensor, torch.nan) for tensor in inputs[0]] if out is None else out
    expected = [torch.full_like(tensor, torch.nan) for tensor in inputs[0]]
    wanted = select_and_fuse_(expected, *inputs, **SETTINGS, backend=backend)
    stats = plan.fuse(FusionInputs(got, *inputs))
    assert_same_bits(got, on("cpu", expected) or [])
    assert torch.equal(stats.counts, wanted.counts)
    torch.testing.assert_close(stats.squared_norms, wanted.squared_norms, rtol=1e-12, atol=0)
    for found, limit in zip(stats.thresholds, wanted.thresholds, strict=True):
        assert torch.equal(found, limit)
    return got


@backends
def test_a_plan_serves_alternating_copies(backend: str, prepared: list[FusionInputs]) -> None:
    plan = FusionPlan(**PLANNED, backend=backend)
    base, inner, outer = lists()
    spare = [torch.empty_like(tensor) for tensor in base]
    scores = sides()
    for _ in range(6):
        out = check(plan, backend, [base, inner, outer, *scores], spare)
        base, inner, spare = out, base, inner
    assert len(plan._bound) == 3
    assert len(prepared) == (3 if backend == "triton" else 0)


def test_a_plan_finds_a_threshold_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    bracketed = {"config": CONFIG, "bracketing": SMALL, "whole": LaunchConfig(16, 1, 4)}
    monkeypatch.setattr(both_thresholds, "__kwdefaults__", bracketed)
    plan = FusionPlan(**PLANNED, scope="tensor", backend="triton")
    inputs = [*lists(), *sides()]
    for _ in range(2):
        got, expected = ([torch.full_like(tensor, torch.nan) for tensor in inputs[0]] for _ in range(2))
        stats = plan.fuse(FusionInputs(got, *inputs))
        wanted = select_and_fuse_(expected, *inputs, **SETTINGS, scope="tensor", backend="torch")
        assert_same_bits(got, on("cpu", expected) or [])
        assert torch.equal(stats.counts, wanted.counts)
        assert all(map(torch.equal, stats.thresholds, wanted.thresholds))
        inputs[4].sensitivity[3].mul_(-3).abs_()


@backends
def test_a_plan_reads_the_current_values(backend: str) -> None:
    plan = FusionPlan(**PLANNED, backend=backend)
    inputs = [*lists(), *sides()]
    out = check(plan, backend, inputs)
    for tensors in inputs[:3]:
        for tensor in tensors:
            tensor.mul_(-3)
    inputs[4].sensitivity[0].zero_()
    check(plan, backend, inputs, out)


def test_a_known_round_is_not_prepared_again(prepared: list[FusionInputs]) -> None:
    plan = FusionPlan(**PLANNED, backend="triton")
    inputs = [*lists(), *sides()]
    out = check(plan, "triton", inputs)
    for _ in range(3):
        check(plan, "triton", inputs, out)
    assert len(prepared) == 1


@backends
def test_another_dtype_or_shape_at_the_same_address_is_validated(backend: str) -> None:
    plan = FusionPlan(**PLANNED, backend=backend)
    inputs = [*lists(), *sides()]
    out = check(plan, backend, inputs)
    turned = [[t.view(-1, 1) if t.numel() else t for t in tensors] for tensors in (out, *inputs[:3])]
    with pytest.raises(ValueError, match=r"has shape"):
        plan.fuse(FusionInputs(turned[0], *inputs))
    with pytest.raises(TypeError, match=r"dtype int32"):
        plan.fuse(FusionInputs([t.view(torch.int32) for t in out], *inputs))
    check(plan, backend, inputs, out)


def test_only_a_few_launches_are_kept() -> None:
    plan = FusionPlan(**PLANNED, backend="torch")
    kept = [[*lists(seed), *sides()] for seed in range(6)]
    for inputs in kept:
        check(plan, "torch", inputs)
    assert len(plan._bound) == fusion_plan._MAX_LAUNCHES


@pytest.mark.parametrize("target", [0, 1, 2])
def test_a_plan_writes_over_one_of_its_inputs(target: int, prepared: list[FusionInputs]) -> None:
    plan = FusionPlan(**PLANNED, backend="triton")
    inputs = [*lists(), *sides()]
    expected = [torch.empty_like(tensor) for tensor in inputs[0]]
    select_and_fuse_(expected, *inputs, **SETTINGS, backend="torch")
    plan.fuse(FusionInputs(inputs[target], *inputs))
    assert_same_bits(inputs[target], on("cpu", expected) or [])
    assert not prepared


def test_copies_and_distances_are_not_prepared(prepared: list[FusionInputs]) -> None:
    plan = FusionPlan(**PLANNED, backend="triton")
    base, inner, outer = lists()
    shifted = [torch.zeros(t.numel() + 1, device=DEVICE)[1:].copy_(t) for t in inner]
    check(plan, "triton", [base, shifted, outer, *sides()])
    check(plan, "triton", [base, inner, outer, magnitudes(inner, base), magnitudes(outer, inner)])
    assert not prepared


def test_the_same_tensors_in_other_roles_are_prepared_again() -> None:
    plan = FusionPlan(**PLANNED, backend="triton")
    flat = torch.randn(CHUNK, device=DEVICE)
    views, (own, inner, outer, s, u, t) = Views.of(flat, [flat]), torch.rand(6, CHUNK, device=DEVICE)[:, None]
    scores = Scores([*s], [*u]), Scores([*t], [*u])
    check(plan, "triton", [views, [*inner], [*outer], *scores], [*own])
    check(plan, "triton", [[*own], [*inner], [*outer], *scores], views)
    check(plan, "triton", [[*inner], [*own], [*outer], Scores([*s], [*u]), Scores([*t])], views)
    check(plan, "triton", [[*inner], [*own], [*outer], Scores([*s]), Scores([*u], [*t])], views)
    distances = magnitudes([*s], [*u]), magnitudes([*t], [*u])
    check(plan, "triton", [[*own], [*inner], [*outer], *distances], views)


def test_views_in_other_memory_are_prepared_again(prepared: list[FusionInputs]) -> None:
    plan = FusionPlan(**PLANNED, backend="triton")
    flat = torch.zeros(CHUNK, device=DEVICE)
    views, rows = Views.of(flat, [flat]), torch.rand(7, CHUNK, device=DEVICE)[:, None]
    inputs = [*map(list, rows[:3]), Scores([*rows[3]], [*rows[4]]), Scores([*rows[5]], [*rows[6]])]
    for _ in range(2):
        check(plan, "triton", inputs, views)
        assert len(prepared) == 1
    address = flat.data_ptr()
    flat.untyped_storage().resize_(2 * flat.untyped_storage().nbytes())  # moves the views, too
    assert flat.data_ptr() != address
    check(plan, "triton", inputs, views)
    assert len(prepared) == 2


def test_the_memory_of_a_launch_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[weakref.ref[Tensor]] = []
    allocate = Undecided.allocate

    def spy(*args: Any) -> dict[str, Tensor]:
        memory = allocate(*args)
        allocated.extend(map(weakref.ref, memory.values()))
        return memory

    monkeypatch.setattr(Undecided, "allocate", spy)
    plan = FusionPlan(**PLANNED, backend="triton")
    inputs = [*lists(), *sides()]
    out = [torch.empty_like(tensor) for tensor in inputs[0]]
    for _ in range(2):
        plan.fuse(FusionInputs(out, *inputs))
    assert len(allocated) == 8
    assert all(memory() is None for memory in allocated)


def test_invalid_inputs_are_refused_and_nothing_is_written() -> None:
    plan = FusionPlan(**PLANNED, names=["a", "b", "c", "d"])
    inputs = [*lists(), *sides()]
    out = [torch.full_like(tensor, 7.0) for tensor in inputs[0]]
    out[1] = out[0][:3]
    with pytest.raises(ValueError, match=r"out\['b'\] and out\['a'\] share memory"):
        plan.fuse(FusionInputs(out, *inputs))
    assert all((tensor == 7).all() for tensor in out)
    for entry, found in (
        (1, "must be a tensor; got int"),
        (None, "got NoneType"),
        (inputs[0][0].to_sparse(), "dense"),
    ):
        with pytest.raises(TypeError, match=rf"inner\['a'\].*{found}"):
            plan.fuse(FusionInputs(out, inputs[0], [entry, *inputs[1][1:]], *inputs[2:]))
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\]"):
        FusionPlan(density=1.5, rule=PLANNED["rule"])


def test_outputs_of_inference_mode_are_refused_outside_of_it() -> None:
    plan = FusionPlan(**PLANNED, names=["a", "b", "c", "d"])
    inputs = [*lists(), *sides()]
    with torch.inference_mode():
        out = [torch.full_like(tensor, 7.0) for tensor in inputs[0]]
        plan.fuse(FusionInputs(out, *inputs))
    before = [tensor.tolist() for tensor in out]
    with pytest.raises(ValueError, match=r"out\['a'\] was made in inference mode"):
        plan.fuse(FusionInputs(out, *inputs))
    assert [tensor.tolist() for tensor in out] == before


def test_a_copied_plan_fuses_like_the_plan() -> None:
    plan = FusionPlan(**PLANNED, backend="torch")
    inputs = [*lists(), *sides()]
    check(plan, "torch", inputs)
    copied = copy.deepcopy(plan)
    assert not copied._bound
    check(copied, "torch", inputs)


def test_autograd_detects_the_write() -> None:
    inputs = [*lists(), *sides()]
    out = [torch.zeros_like(tensor) for tensor in inputs[0]]
    versions = [tensor._version for tensor in out]
    FusionPlan(**PLANNED).fuse(FusionInputs(out, *inputs))
    assert all(tensor._version > before for tensor, before in zip(out, versions, strict=True))


def test_a_plan_is_safe_for_several_threads() -> None:
    plan = FusionPlan(**PLANNED, backend="triton")
    rounds = [[*lists(seed), *sides(seed)] for seed in range(3)]
    outs = [[torch.empty_like(tensor) for tensor in inputs[0]] for inputs in rounds]
    failures: list[BaseException] = []

    def work(out: list[Tensor], inputs: list[Any]) -> None:
        try:
            for _ in range(3):
                plan.fuse(FusionInputs(out, *inputs))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(outs, rounds, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for out, inputs in zip(outs, rounds, strict=True):
        check(plan, "triton", inputs, out)


def test_a_fuser_alternates_between_its_snapshots() -> None:
    weight = torch.nn.Parameter(torch.arange(32.0, device=DEVICE))
    fuser = rkif.Fuser([("w", weight)])
    seen = set()
    for _ in range(7):
        weight.grad = torch.ones_like(weight)
        fuser.observe()
        with fuser.outer():
            fuser.observe()
        seen.add(fuser._base.tensors[0].data_ptr())
    assert len(seen) <= 3


@pytest.mark.gpu
def test_a_round_is_captured_and_replayed() -> None:
    plan = FusionPlan(**PLANNED)
    inputs = [*lists(), *sides()]
    out = [torch.empty_like(tensor) for tensor in inputs[0]]
    plan.fuse(FusionInputs(out, *inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = plan.fuse(FusionInputs(out, *inputs))
    for seed in range(3):
        for tensors, fresh in zip(inputs[:3], lists(10 * seed), strict=True):
            for tensor, value in zip(tensors, fresh, strict=True):
                tensor.copy_(value)
        graph.replay()
        expected = [torch.empty_like(tensor) for tensor in out]
        wanted = select_and_fuse_(expected, *inputs, **SETTINGS)
        assert_same_bits(out, on("cpu", expected) or [])
        assert torch.equal(stats.counts, wanted.counts)
