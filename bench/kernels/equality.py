"""Checks of a result, which come before its timing.

Elements are compared with the reference on the device of the tensors, in chunks that need little memory. A
threshold is compared with the reference up to ``SORTED`` elements. Beyond that a sort would not fit, and the
definition of an order statistic is checked: at most k scores are below it, and more than k are not above it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rkif_kernels import Scores
from rkif_kernels.backends import reference
from rkif_kernels.backends.reference.select import score_values

CHUNK = 2**24
SORTED = 2**24


def chunks(*lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield flat chunks of at most ``CHUNK`` elements of lists of tensors of the same shapes."""
    for group in zip(*lists, strict=True):
        yield from zip(*(tensor.reshape(-1).split(CHUNK) for tensor in group), strict=True)


def require_same_bits(what: str, got: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless all bits agree; all NaNs are equal."""
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.itemsize]
    if torch.equal(got.view(integers), expected.view(integers)):
        return
    same = (got.view(integers) == expected.view(integers)) | (got.isnan() & expected.isnan())
    if not bool(same.all()):
        at = int((~same).reshape(-1).nonzero()[0])
        pair = f"{got.reshape(-1)[at].item()!r}, expected {expected.reshape(-1)[at].item()!r}"
        raise AssertionError(f"{what}: {int((~same).sum())} elements differ, the first at {at}: {pair}")


def require_close(what: str, got: Tensor, expected: Tensor, ignored: Tensor | None = None) -> None:
    """Raise AssertionError unless all elements agree up to the rounding of another order of operations."""
    if ignored is not None:
        got, expected = got[~ignored], expected[~ignored]
    rtol = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-6, msg=lambda text: f"{what}: {text}")


def exact_threshold(scores: Scores, k: int, got: Tensor) -> Tensor:
    """The ``k``-th smallest score as float32 [1]: from the reference, or ``got`` after a check by counting.

    Raises:
        AssertionError: there are too many scores to sort, and ``got`` is not the order statistic.
    """
    if sum(tensor.numel() for tensor in scores.sensitivity) <= SORTED:
        return reference.score_thresholds(scores, ks=[k], per_tensor=False)
    below, up_to = k_range(scores, got)
    assert below <= k < up_to, f"{got.item()!r} is the k-th for k from {below} to {up_to - 1}, not {k}"
    return got.reshape(1)


def k_range(scores: Scores, value: Tensor) -> tuple[int, int]:
    """The numbers of scores below ``value`` and not above it: the smallest k of ``value``, and the end."""
    assert scores.uncertainty is not None
    below = up_to = 0
    for s, u in chunks(scores.sensitivity, scores.uncertainty):
        (values,) = score_values(Scores([s], [u]))
        below += int((values < value).sum())
        up_to += int((values <= value).sum())
    return below, up_to
