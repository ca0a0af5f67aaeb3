"""Kernels that the ahead-of-time check must refuse; run as a script, it prints the problems of each."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from bench.kernels.aot import compile_cases
from bench.kernels.cases import Case
from rkif_kernels.backends.triton.elements import kernel
from rkif_kernels.backends.triton.launch import LaunchConfig


@kernel
def _double(numels_ptr, values_ptr, capacity, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(values_ptr + offsets, tl.load(values_ptr + offsets) * 2)


@triton.jit
def _double_under_a_mask(numels_ptr, values_ptr, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(values_ptr + offsets, tl.load(values_ptr + offsets, offsets < numel) * 2, offsets < numel)


@triton.jit
def _hoard(numels_ptr, values_ptr, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + offsets)
    for _ in range(numel):
        values = tl.dot(tl.reshape(values, (64, 64)), tl.reshape(values, (64, 64)), input_precision="ieee")
        values = tl.reshape(values, (BLOCK,))
    tl.store(values_ptr + offsets, values)


@triton.jit
def _contract(numels_ptr, values_ptr, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + offsets)
    tl.store(values_ptr + offsets, tl.fma(values, values, values))


@triton.jit
def _meet(numels_ptr, values_ptr, numel, BLOCK: tl.constexpr):
    """A loop with a barrier, an atomic addition, and a load after a store."""
    for tile in range(numel):
        offsets = (tl.program_id(0) * numel + tile) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + offsets)
        tl.store(values_ptr + offsets, values * 2)
        tl.debug_barrier()
        total = tl.sum(tl.load(values_ptr + offsets + BLOCK) + values)
        tl.atomic_add(numels_ptr, total.to(tl.int64), sem="relaxed")


if __name__ == "__main__":
    stream = ("fp32",)
    good = Case("test", "good", _double, {}, stream, stream)
    cases = [
        good,
        replace(good, variant="narrow", function=_double_under_a_mask),
        replace(
            good, variant="spills", function=_hoard, config=LaunchConfig(block=4096, tiles=1, num_warps=1)
        ),
        replace(good, variant="contracted", function=_contract),
        replace(good, variant="contracted, divides", function=_contract, divides=True),
        replace(good, kernel="bracketed fuse", variant="meets", function=_meet),
        replace(good, kernel="bracketed fuse", variant="no loop"),
    ]
    for target in ("sm_90", "gfx942"):
        for case, compiled in zip(cases, compile_cases(cases, target), strict=True):
            print(case.variant, target, *compiled.problems, sep=" | ")
