"""Kernels with one fault each, which ttsem must report, and one without: run by ``.ci/run ttsem`` only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
import ttsem_plugin
from torch import Tensor

from rkif_kernels.backends.triton.elements import kernel, load_row
from rkif_kernels.backends.triton.table import aligned, tables

BLOCK = 16
SIZES = [BLOCK, 5]


@kernel
def _double(
    pointers_ptr, numels_ptr, n_tensors, EXTRA: tl.constexpr, DTYPES: tl.constexpr, BLOCK: tl.constexpr
):
    """Doubles each tensor, and EXTRA elements after its end."""
    tensor = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < tl.load(numels_ptr + tensor) + EXTRA
    row_ptr = load_row(pointers_ptr, 0, tensor, n_tensors, DTYPES)
    tl.store(row_ptr + offsets, tl.load(row_ptr + offsets, mask=mask) * 2, mask=mask)


@triton.jit
def _count(count_ptr, ATOMIC: tl.constexpr):
    """Adds one for each program, atomically or not."""
    if ATOMIC:
        tl.atomic_add(count_ptr, 1)
    else:
        tl.store(count_ptr, tl.load(count_ptr) + 1)


@triton.jit
def _copy(out_ptr, values_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(values_ptr + offsets))


def double(extra: int) -> list[Tensor]:
    # Views of one storage: the memory after a tensor is valid, and belongs to another tensor or to none.
    storage = torch.ones(2 * BLOCK)
    tensors = list(storage[: sum(SIZES)].split(SIZES))
    (table,) = tables(aligned([tensors]), BLOCK)
    _double[(len(SIZES),)](
        table.pointers, table.layout.numels, table.tensors, EXTRA=extra, DTYPES=table.dtypes, BLOCK=BLOCK
    )
    return tensors


def count(atomic: bool) -> Tensor:
    counter = torch.zeros(1, dtype=torch.int32)
    _count[(4,)](counter, ATOMIC=atomic)
    return counter


def copy(values: Tensor) -> Tensor:
    out = torch.empty_like(values)
    _copy[(1,)](out, values, BLOCK=BLOCK)
    return out


def test_kernels_without_a_fault_pass_and_are_executed() -> None:
    before = ttsem_plugin.launches.total()
    assert torch.equal(torch.cat(double(extra=0)), torch.full((sum(SIZES),), 2.0))
    assert count(atomic=True).item() == 4
    assert torch.equal(copy(torch.ones(BLOCK)), torch.ones(BLOCK))
    assert ttsem_plugin.launches.total() == before + 3


def test_access_after_a_tensor_of_the_table_is_reported() -> None:
    with pytest.raises(ttsem_plugin.KernelFault) as caught:
        double(extra=1)
    assert caught.value.fault.kind in ("oob_read", "oob_write")


def test_race_between_programs_is_reported() -> None:
    with pytest.raises(ttsem_plugin.KernelFault) as caught:
        count(atomic=False)
    assert caught.value.fault.kind == "race"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64], ids=str)
def test_read_of_unwritten_memory_is_reported(dtype: Any) -> None:
    with pytest.raises(ttsem_plugin.KernelFault) as caught:
        copy(torch.empty(BLOCK, dtype=dtype))
    assert caught.value.fault.kind == "poison"
