"""Kernels with one fault each, which the sanitizer must report, and the same kernels without the fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from ttsem.memory import Memory, MemoryFault
from ttsem.sanitize import KernelFault

from rkif_kernels.backends.triton.elements import kernel, load_chunk, load_row
from rkif_kernels.backends.triton.table import aligned, tables
from sanitizer import plugin
from sanitizer.ordering import Clocks
from sanitizer.speed import FastMemory

BLOCK = 16
SIZES = [BLOCK, 5]
PROGRAMS = 4
ORDERS = 8  # of the programs of a launch; a fault is reported in each


@kernel
def _double(
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    n_tensors,
    WRONG: tl.constexpr,
    SHIFT: tl.constexpr,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Doubles each tensor; in the tensor WRONG, it accesses addresses that are shifted by SHIFT elements."""
    tensor, start, numel = load_chunk(
        numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, tl.program_id(0), BLOCK
    )
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < numel
    row_ptr = load_row(pointers_ptr, 0, tensor, n_tensors, DTYPES) + tl.where(tensor == WRONG, SHIFT, 0)
    tl.store(row_ptr + offsets, tl.load(row_ptr + offsets, mask=mask) * 2, mask=mask)


@triton.jit
def _count(count_ptr, ATOMIC: tl.constexpr):
    """Adds one for each program, atomically or not."""
    if ATOMIC:
        tl.atomic_add(count_ptr, 1, sem="relaxed")
    else:
        tl.store(count_ptr, tl.load(count_ptr) + 1)


@triton.jit
def _sum(
    values_ptr,
    count_ptr,
    sum_ptr,
    SEM: tl.constexpr,
    SCOPE: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program stores one value. The program that the counter shows to be the last stores their sum.

    With ALL, every program reads the values, whether or not it is the last.
    """
    programs = tl.num_programs(0)
    tl.store(values_ptr + tl.program_id(0), tl.program_id(0))
    place = tl.atomic_add(count_ptr, 1, sem=SEM, scope=SCOPE)
    if ALL or place == programs - 1:
        values = tl.load(values_ptr + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < programs, other=0)
        if place == programs - 1:
            tl.store(sum_ptr, tl.sum(values))


@triton.jit
def _copy(out_ptr, values_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(values_ptr + offsets))


def double(wrong: int = 0, shift: int = 0) -> list[Tensor]:
    # Views of one storage: the memory beside a tensor is valid, and belongs to no tensor of the table.
    storage = torch.ones(6 * BLOCK)
    tensors = [storage[first : first + size] for first, size in zip((BLOCK, 3 * BLOCK), SIZES, strict=True)]
    (table,) = tables(aligned([tensors]), BLOCK)
    _double[(table.programs,)](**table.arguments, WRONG=wrong, SHIFT=shift, DTYPES=table.dtypes, BLOCK=BLOCK)
    return tensors


def count(atomic: bool) -> Tensor:
    counter = torch.zeros(1, dtype=torch.int32)
    _count[(PROGRAMS,)](counter, ATOMIC=atomic)
    return counter


def sum_of_all(sem: str, scope: str = "gpu", everyone: bool = False) -> Tensor:
    values, total = torch.zeros(PROGRAMS, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    counter = torch.zeros(1, dtype=torch.int32)
    _sum[(PROGRAMS,)](values, counter, total, SEM=sem, SCOPE=scope, ALL=everyone, BLOCK=BLOCK)
    return total


def copy(values: Tensor) -> Tensor:
    out = torch.empty_like(values)
    _copy[(1,)](out, values, BLOCK=BLOCK)
    return out


def assert_reported(kinds: set[str], launch: Callable[[], object]) -> None:
    for _ in range(ORDERS):
        with pytest.raises(KernelFault) as caught:
            launch()
        assert caught.value.fault.kind in kinds


@pytest.fixture
def executed() -> Iterator[None]:
    """A kernel that is not executed has no fault."""
    before = plugin.launches.total()
    yield
    assert plugin.launches.total() > before


@pytest.mark.usefixtures("executed")
def test_kernels_without_a_fault_pass() -> None:
    for _ in range(ORDERS):
        assert torch.equal(torch.cat(double()), torch.full((sum(SIZES),), 2.0))
        assert count(atomic=True).item() == PROGRAMS
        for scope in ("gpu", "sys"):
            assert sum_of_all("acq_rel", scope).item() == sum(range(PROGRAMS))
        assert torch.equal(copy(torch.ones(BLOCK)), torch.ones(BLOCK))


@pytest.mark.parametrize("wrong", range(len(SIZES)))
@pytest.mark.parametrize("shift", [-1, 1])
def test_access_beside_a_tensor_of_the_table_is_reported(wrong: int, shift: int) -> None:
    assert_reported({"oob_read"}, lambda: double(wrong, shift))


def test_a_count_that_is_not_atomic_is_reported() -> None:
    assert_reported({"race"}, lambda: count(atomic=False))


@pytest.mark.parametrize(
    ("sem", "scope"), [("relaxed", "gpu"), ("acquire", "gpu"), ("release", "gpu"), ("acq_rel", "cta")]
)
def test_a_counter_that_orders_no_programs_is_reported(sem: str, scope: str) -> None:
    assert_reported({"race"}, lambda: sum_of_all(sem, scope))


def test_a_program_that_is_not_the_last_and_reads_is_reported() -> None:
    assert_reported({"race"}, lambda: sum_of_all("acq_rel", everyone=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64], ids=str)
def test_read_of_unwritten_memory_is_reported(dtype: Any) -> None:
    assert_reported({"poison"}, lambda: copy(torch.empty(BLOCK, dtype=dtype)))


def test_launches_have_different_orders() -> None:
    seen = set()
    for _ in range(ORDERS):
        counter, order = torch.zeros(1, dtype=torch.int32), torch.zeros(PROGRAMS, dtype=torch.int32)
        _arrive[(PROGRAMS,)](counter, order)
        seen.add(tuple(order.tolist()))
    assert len(seen) > ORDERS // 2


@triton.jit
def _arrive(count_ptr, order_ptr):
    tl.store(order_ptr + tl.program_id(0), tl.atomic_add(count_ptr, 1, sem="relaxed"))


@pytest.mark.parametrize("seed", range(20))
def test_fast_accesses_have_the_results_of_ttsem(seed: int) -> None:
    """Of masked lanes with equal addresses, in one buffer or two; sums wrap around."""
    random = np.random.default_rng(seed)
    dtype = np.dtype(random.choice(["i4", "i8", "u4"]))
    stored = [random.integers(0, 100, size, dtype=dtype) for size in (9, 4)]
    memories = Memory(), FastMemory()
    for memory in memories:
        for base, array in zip((1 << 20, 1 << 10), stored, strict=True):
            memory.register(base, array.copy())
    which, index = random.integers(0, 2, 12) * (seed % 2), random.integers(0, 4, 12)
    addresses = np.where(which, 1 << 10, 1 << 20) + index * dtype.itemsize
    mask = random.random(12) < 0.7
    added = random.integers(0, np.iinfo(dtype).max, 12, dtype=dtype)
    slow, fast = (memory.atomic("add", addresses, added, mask) for memory in memories)
    assert fast.dtype == slow.dtype
    assert np.array_equal(fast, slow)
    for one, other in zip(*(memory.buffers().values() for memory in memories), strict=True):
        assert np.array_equal(one, other)
    for lanes in (mask, np.arange(12) == 5, np.zeros(12, bool), None):
        read, expected = (memory.load(addresses, lanes, 7, dtype) for memory in memories[::-1])
        assert np.array_equal(read, expected)
    for beside in (-dtype.itemsize, 9 * dtype.itemsize, 9 * dtype.itemsize - 1):
        with pytest.raises(MemoryFault):
            memories[1].load(np.array([1 << 20, (1 << 20) + beside]), None, None, dtype)


class Programs:
    """Vector clocks of programs A, B and C, by hand; each begins once."""

    def __init__(self) -> None:
        self.clocks = Clocks()

    def run(self, program: int, *steps: tuple[str, int]) -> tuple[Any, Any]:
        """The program's segments before and after its steps."""
        self.clocks.begin((program, 0, 0))
        before = self.clocks.segment
        for name, address in steps:
            if name == "overwrite":
                self.clocks.overwrite(np.array([address]))
            else:
                getattr(self.clocks, name)([address])
        return before, self.clocks.segment


ACQ_REL = ("acquire", 8), ("release", 8)


def test_a_release_and_an_acquire_of_one_address_order_programs() -> None:
    programs = Programs()
    before, after = programs.run(0, *ACQ_REL)
    early, late = programs.run(1, *ACQ_REL)
    assert late.follows(before)
    assert not late.follows(after), "what A does after its release is not ordered"
    assert not early.follows(before), "what B does before its acquire is not ordered"
    assert late.follows(early)


def test_an_acquire_of_another_address_orders_nothing() -> None:
    programs = Programs()
    before, _ = programs.run(0, ("release", 8))
    assert not programs.run(1, ("acquire", 16))[1].follows(before)


def test_order_is_transitive_and_a_release_sequence_continues() -> None:
    programs = Programs()
    first, _ = programs.run(0, ("release", 8))
    second, _ = programs.run(1, ("acquire", 8), ("release", 16))
    third, _ = programs.run(2, ("release", 16))  # does not acquire; the sequence of program 1 continues
    last = programs.run(3, ("acquire", 16))[1]
    assert all(last.follows(segment) for segment in (first, second, third))
    assert not third.follows(second)


def test_a_store_ends_a_release_sequence() -> None:
    programs = Programs()
    before, _ = programs.run(0, ("release", 8))
    programs.run(1, ("overwrite", 8))
    assert not programs.run(2, ("acquire", 8))[1].follows(before)
