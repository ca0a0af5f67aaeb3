"""The memory that a CUDA graph reads is kept while it can be replayed. Simulated captures execute at once."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from kernel_cases import BLOCK, CHUNK, CONFIG, normal, positive
from simulated_capture import Captures
from torch import Tensor

from rkif_kernels import FusionInputs, FusionPlan, ImportancePlan, MergeRule, Scores, Smoothing
from rkif_kernels.backends.triton import groups, plan, single_pass, table
from rkif_kernels.backends.triton.launch import Bracketing
from rkif_kernels.backends.triton.radix import radix_threshold

SIZES = [BLOCK + 1, 3, 0, CHUNK + 5]
BRACKETING = Bracketing(min_numel=1, sample_stride=2, max_samples=1 << 20, sigmas=2.5, list_slack=1.5)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Captures:
    captures = Captures()
    for module in (table, plan):
        monkeypatch.setattr(module, "capturing", lambda _device: captures.active)
    monkeypatch.setattr(table, "upload", lambda host, _device: host.clone())
    monkeypatch.setattr(table, "_captured", weakref.WeakKeyDictionary())
    forget_caches()
    return captures


def forget_caches() -> None:
    for cached in (table._tables, table._layout, table._constant):
        cached.cache_clear()
    gc.collect()


def tensors(seed: int = 0) -> list[Tensor]:
    return normal(SIZES, torch.float32, seed)


def kept() -> int:
    return len({id(used) for held in table._captured.values() for used in held.values()})


def test_tables_outlive_the_caches_and_not_the_tensors(capture: Captures) -> None:
    params, grads = tensors(), tensors(1)
    with capture():
        pointers = weakref.ref(table.tables([params, grads], CHUNK)[0].pointers)
    forget_caches()
    views = [tensor[1:] for tensor in params]
    del params, grads
    gc.collect()
    assert pointers() is not None
    assert kept() == 1
    del views
    gc.collect()
    assert pointers() is None
    assert kept() == 0


def test_any_tensor_of_a_capture_keeps_its_tables(capture: Captures) -> None:
    params, grads = tensors(), tensors(1)
    with capture():
        pointers = weakref.ref(table.tables([params, grads], CHUNK)[0].pointers)
    forget_caches()
    last = grads[-1]
    del params, grads
    gc.collect()
    assert pointers() is not None
    del last
    gc.collect()
    assert pointers() is None


def test_nothing_is_kept_without_a_capture(capture: Captures) -> None:
    params = tensors()
    pointers = weakref.ref(table.tables([params], CHUNK)[0].pointers)
    assert pointers() is not None
    forget_caches()
    assert pointers() is None
    assert kept() == 0


def test_repeated_captures_of_the_same_tensors_add_nothing(capture: Captures) -> None:
    scores = Scores(positive(SIZES, torch.float32, 0))
    for _ in range(3):
        with capture():
            radix_threshold(scores, 4, CONFIG)
    assert kept() == 2  # the table, and the constant k
    assert all(len(held) <= 2 for held in table._captured.values())


def test_the_parts_of_a_search_live_as_long_as_its_tables(capture: Captures) -> None:
    params = tensors()
    with capture():
        grouped = table.tables([params, [None] * len(params)], CHUNK)
        found = groups.find_groups(grouped, [7], False, 1, BRACKETING, CONFIG)
    parts = [weakref.ref(found.arguments[0]["groups_ptr"])]
    parts += [weakref.ref(layout) for layout in (*found.samples, *found.counts, *found.pieces)]
    del found, grouped
    forget_caches()
    assert all(part() is not None for part in parts)
    del params
    gc.collect()
    assert all(part() is None for part in parts)


def test_a_fusion_outlives_its_plan(capture: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    monkeypatch.setitem(single_pass.prepared_fusion.__kwdefaults__, "bracketing", BRACKETING)
    fusion_of = single_pass.BracketedFusion

    def spy(*args: Any) -> Any:
        fusion = fusion_of(*args)
        made.append(weakref.ref(fusion))
        return fusion

    monkeypatch.setattr(single_pass, "BracketedFusion", spy)
    rule = MergeRule(((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)))
    fuse = FusionPlan(density=0.3, rule=rule, backend="triton")
    scores = Scores(positive(SIZES, torch.float32, 4))
    out = tensors(3)
    inputs = FusionInputs(out, tensors(), tensors(1), tensors(2), scores, scores)
    fuse.fuse(inputs)
    with capture():
        fuse.fuse(inputs)
        fuse.fuse(inputs)
    assert kept() == 1
    del fuse
    forget_caches()
    assert [fusion() is not None for fusion in made] == [True]
    del inputs, scores
    gc.collect()
    assert [fusion() is not None for fusion in made] == [True]  # `out` is left
    del out
    gc.collect()
    assert [fusion() is not None for fusion in made] == [False]


class Steps:
    """A plan of one tensor, without smoothing: S is the importance of the last step."""

    def __init__(self) -> None:
        self.weight, self.state = torch.ones(8), torch.zeros(8)
        nonfinite = torch.zeros(1, dtype=torch.int64)
        self.plan = ImportancePlan(
            [self.state], smoothing=Smoothing(0.0), nonfinite=nonfinite, backend="triton"
        )

    def step(self, gradient: Tensor) -> None:
        self.plan.update([self.weight], [gradient])
        assert torch.equal(self.state, gradient.abs())

    @property
    def sources(self) -> list[Tensor]:
        return [source for _, sources in self.plan._captured.values() for source in sources]


def test_captured_steps_with_the_same_addresses_share_their_memory(capture: Captures) -> None:
    steps, gradients = Steps(), [torch.rand(8) for _ in range(2)]
    steps.step(torch.rand(8))
    for _ in range(5):
        with capture():
            for gradient in gradients:
                steps.step(gradient)
                gradient.mul_(2)
    assert len(steps.sources) == 2
    steps.step(gradients[0])  # the table outside of captures follows
    memory = [weakref.ref(source) for source in steps.sources]
    del steps
    gc.collect()
    assert all(source() is None for source in memory)


def test_a_capture_has_a_limited_number_of_new_addresses(capture: Captures) -> None:
    steps, gradients = Steps(), [torch.rand(8) for _ in range(2 * plan.SPARES + 1)]
    for part in (gradients[: plan.SPARES], gradients[plan.SPARES : -1]):
        steps.step(part[0])
        with capture():
            for gradient in part:
                steps.step(gradient)
    assert len({source.data_ptr() for source in steps.sources}) == 2 * plan.SPARES
    for source, gradient in zip(steps.sources, gradients, strict=False):
        assert source[plan.GRADIENTS].tolist() == [gradient.data_ptr()]
    before = steps.state.clone()
    with capture(), pytest.raises(RuntimeError, match="take a step outside, then capture again"):
        steps.step(gradients[-1])
    assert torch.equal(steps.state, before)
    steps.step(gradients[-1])


def test_captured_steps_outlive_another_preparation(capture: Captures) -> None:
    steps = Steps()
    gradient = torch.rand(8)
    steps.step(gradient)
    with capture():
        steps.step(gradient)
    ((tables, _),) = steps.plan._captured.values()
    memory = [weakref.ref(tensor) for one in tables for tensor in one.memory]
    del tables
    steps.step(gradient.bfloat16())
    steps.step(gradient)
    forget_caches()
    assert all(tensor() is not None for tensor in memory)
    with capture():
        steps.step(gradient)
    assert len(steps.sources) == 2


def test_a_step_after_a_capture_reads_the_gradients_of_the_capture(capture: Captures) -> None:
    """A capture uploads no addresses to the table of other steps, whose gradients have not moved since."""
    steps, gradient = Steps(), torch.rand(8)
    steps.step(torch.rand(8))
    with capture():
        steps.step(gradient)
    gradient.mul_(2)
    steps.step(gradient)
