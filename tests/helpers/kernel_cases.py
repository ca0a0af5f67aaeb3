"""Shared by the kernel tests: the implementations, with small blocks, and difficult tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rkif_kernels import Scores
from rkif_kernels.backends import native, reference
from rkif_kernels.backends import torch as torch_backend
from rkif_kernels.backends import triton as kernels
from rkif_kernels.backends.choose import interpreting
from rkif_kernels.backends.native.library import library
from rkif_kernels.backends.triton.launch import LaunchConfig

# So small that a few hundred elements cover every branch: full tiles, tails, several programs per tensor.
BLOCK, TILES = 64, 2
CONFIG = LaunchConfig(block=BLOCK, tiles=TILES, num_warps=4)
CHUNK = CONFIG.chunk

SIZES = {
    "one": [1],
    "below a block": [BLOCK - 1],
    "a block": [BLOCK],
    "above a block": [BLOCK + 1],
    "below a chunk": [CHUNK - 1],
    "a chunk": [CHUNK],
    "above a chunk": [CHUNK + 1],
    "empty ones between": [0, 5, 0, CHUNK + 3, 0],
    "many small and a large": [1, 2, 3, 4, 5, 6, 7, 8, 9, 3 * CHUNK + 17],
}
# With a compiler the library must have been built; without one there is nothing to test.
NATIVE = pytest.mark.skipif(
    library() is None and shutil.which("c++") is None, reason="no C++ compiler when rkif was installed"
)
PARAMETER_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATE_DTYPES = [torch.float32, torch.bfloat16]


def implementations() -> list[Any]:
    """The implementations that are compared with the reference, with the device of their tensors."""
    operations = ("adamw_", "update_importance_", "count_scores_", "score_thresholds", "fuse_")
    triton = {name: partial(getattr(kernels, name), config=CONFIG) for name in operations}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_cpu = [
        pytest.param(
            SimpleNamespace(
                **{name: getattr(module, name) for name in operations}, device="cpu", interpreted=False
            ),
            id=module.__name__.rpartition(".")[2],
            marks=marks,
        )
        for module, marks in ((torch_backend, ()), (native, NATIVE))
    ]
    return [
        pytest.param(SimpleNamespace(**triton, device=device, interpreted=interpreting()), id="triton"),
        *on_cpu,
    ]


def normal(sizes: Sequence[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def positive(sizes: Sequence[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    return [tensor.abs() for tensor in normal(sizes, dtype, seed)]


def adversarial(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    values = torch.rand(n, generator=generator)
    mostly_zero = torch.where(values > 0.95, values, 0.0)
    return {
        "all zero": torch.zeros(n),
        "all equal": torch.full((n,), 0.3),
        "two values": torch.where(values > 0.5, 1.0, 2.0),
        "95 % zeros": mostly_zero,
        "bfloat16 ties": values.bfloat16().float(),
        "few values": (values * 5).floor(),
        "ascending": values.sort().values,
        "descending": values.sort(descending=True).values,
        "one small among large": torch.cat([torch.full((n - 1,), 1e30), torch.tensor([1e-30])]),
        "denormal": values * 1e-40,
        "with infinities": torch.where(values > 0.7, torch.inf, values),
        "period of the sample": torch.arange(n).remainder(4).float() * values,
        "neighbouring bit patterns": torch.arange(n, dtype=torch.int32).add(0x3F800000).view(torch.float32),
    }


def on(device: str, tensors: Sequence[Tensor | None] | None) -> list[Any] | None:
    """Copies on a device; every implementation gets its own tensors."""
    if tensors is None:
        return None
    return [None if tensor is None else tensor.clone().to(device) for tensor in tensors]


def scores_on(device: str, scores: Scores) -> Scores:
    """A copy on a device."""
    return Scores(on(device, scores.sensitivity), on(device, scores.uncertainty), scores.distance)


class Guarded:
    """Tensors inside larger buffers with sentinels at the edges, which detect out-of-bounds writes."""

    EDGE = 128  # elements: more than a block, so that an unmasked tail would write here

    def __init__(self, tensors: Sequence[Tensor], device: str) -> None:
        self.buffers = [
            torch.full((tensor.numel() + 2 * self.EDGE,), 7.0, dtype=tensor.dtype, device=device)
            for tensor in tensors
        ]
        self.tensors = [
            buffer[self.EDGE : self.EDGE + tensor.numel()]
            for buffer, tensor in zip(self.buffers, tensors, strict=True)
        ]
        for inside, tensor in zip(self.tensors, tensors, strict=True):
            inside.copy_(tensor)

    def assert_edges_untouched(self) -> None:
        for buffer in self.buffers:
            assert (buffer[: self.EDGE] == 7).all()
            assert (buffer[-self.EDGE :] == 7).all()


def assert_same_bits(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """The same values, zeros of the same sign, NaN where NaN is expected."""
    assert len(got) == len(expected)
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        a = a.cpu()
        assert a.dtype == b.dtype, f"tensor {index}: {a.dtype}, expected {b.dtype}"
        integers: Callable[[Tensor], Tensor] = lambda t: t.view({4: torch.int32, 2: torch.int16}[t.itemsize])  # noqa: E731
        same = (integers(a) == integers(b)) | (a.isnan() & b.isnan())
        if not same.all():
            at = int((~same).nonzero()[0])
            raise AssertionError(
                f"tensor {index}: {int((~same).sum())} of {a.numel()} elements differ, the first at {at}: "
                f"{a[at].item()!r}, expected {b[at].item()!r}"
            )


def check_thresholds(implementation: Any, scores: Scores, ks: list[int], per_tensor: bool) -> Tensor:
    """Compare the thresholds of an implementation with those of the reference, which are returned."""
    expected = reference.score_thresholds(scores, ks=ks, per_tensor=per_tensor)
    device = implementation.device
    got = implementation.score_thresholds(scores_on(device, scores), ks=ks, per_tensor=per_tensor)
    assert got.dtype == torch.float32
    assert torch.equal(got.cpu(), expected)
    return expected
