"""Argument checks shared by the operations. They run before anything is written."""

from __future__ import annotations

import bisect
import itertools
import math
import numbers
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from decimal import Decimal
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rkif_kernels.numerics import float32

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16)


class Arguments:
    """Checks that lists of tensors have equal lengths, shapes and devices, and names them in errors.

    Args:
        names: one name per tensor (parameter names), or None: errors then give the index in the list.
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self._names = names
        self._first: tuple[str, Sequence[Tensor | None]] | None = None

    def label(self, argument: str, index: int) -> str:
        return f"{argument}[{self._names[index]!r}]" if self._names is not None else f"{argument}[{index}]"

    def add(
        self,
        argument: str,
        tensors: Sequence[Tensor | None],
        dtypes: Sequence[torch.dtype] = PARAMETER_DTYPES,
        *,
        optional: bool = False,
    ) -> None:
        """Check the dtypes of a list, and that its length, shapes and devices equal those of the first list.

        Args:
            optional: whether entries may be None (never in the first list).

        Raises:
            TypeError: an entry is not a dense tensor, or its dtype is not one of ``dtypes``.
            ValueError: lengths, shapes or devices differ; or there is not one name per tensor.
        """
        if self._first is None:
            if self._names is not None and len(self._names) != len(tensors):
                raise ValueError(f"names has {len(self._names)} names, {argument} has {len(tensors)} tensors")
            self._first = (argument, tensors)
        first_name, first = self._first
        if len(tensors) != len(first):
            raise ValueError(f"{argument} has {len(tensors)} tensors, {first_name} has {len(first)}")
        for index, tensor in enumerate(tensors):
            if tensor is None and optional:
                continue
            label = self.label(argument, index)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{label} must be a tensor; got {type(tensor).__name__}")
            if tensor.layout is not torch.strided:
                raise TypeError(f"{label} must be a dense tensor; got layout {tensor.layout}")
            if is_traceable_wrapper_subclass(cast(Any, tensor)):
                raise TypeError(
                    f"{label} is a {type(tensor).__name__}; tensors that wrap others are not supported"
                )
            if tensor.dtype not in dtypes:
                allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                got = str(tensor.dtype).removeprefix("torch.")
                raise TypeError(f"{label} has dtype {got}; supported: {allowed}")
            other = first[index]
            assert other is not None  # only later lists are optional
            if tensor.shape != other.shape:
                raise ValueError(
                    f"{label} has shape {tuple(tensor.shape)}, "
                    f"{self.label(first_name, index)} has {tuple(other.shape)}"
                )
            if tensor.device != self.device:
                raise ValueError(
                    f"{label} is on {tensor.device}, {self.label(first_name, 0)} is on {self.device}"
                )

    @property
    def device(self) -> torch.device:
        """Where the tensors are; the CPU for empty lists."""
        first = self._first[1][0] if self._first and self._first[1] else None
        return first.device if first is not None else torch.device("cpu")


class ValidatedLists:
    """Lists of tensors that have passed the checks, recognised by their addresses, dtypes and shapes.

    A training loop passes the same tensors in every step. Checking hundreds of tensors takes longer than the
    kernels; comparing keys takes a fraction of that time.
    """

    LIMIT = 16

    def __init__(self) -> None:
        self._keys: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.Lock()

    def key(self, **lists: Sequence[Tensor | None] | None) -> Hashable:
        """The properties that the checks depend on; None if a tensor has no address, so checks always run."""
        try:
            return torch.is_inference_mode_enabled(), tuple(
                (argument, None if tensors is None else tuple(map(_properties, tensors)))
                for argument, tensors in lists.items()
            )
        except (AttributeError, RuntimeError, TypeError):
            return None

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            if key not in self._keys:
                return False
            self._keys.move_to_end(key)
            return True

    def add(self, key: Hashable) -> None:
        """Remember a key; beyond ``LIMIT`` keys the least recently used one is forgotten."""
        if key is not None:
            with self._lock:
                self._keys[key] = None
                while len(self._keys) > self.LIMIT:
                    self._keys.popitem(last=False)


def _properties(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return (
        type(tensor),
        tensor.data_ptr(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.device,
        tensor.is_inference(),
    )


def require_writable(arguments: Arguments, argument: str, tensors: Sequence[Tensor]) -> None:
    """Refuse tensors that PyTorch would refuse to write to.

    Raises:
        ValueError: a tensor was made in inference mode, and inference mode is off.
    """
    for index, tensor in enumerate(tensors):
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{arguments.label(argument, index)} was made in inference mode and cannot be written outside"
            )


def require_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(choices)}; got {value!r}")


def require_fraction(argument: str, value: Any) -> None:
    """Raise ValueError unless 0 <= ``value`` <= 1, TypeError unless it is a number."""
    if not isinstance(value, numbers.Real | Decimal):
        raise TypeError(f"{argument} must be a number; got {value!r}")
    try:
        inside = 0 <= float(value) <= 1
    except OverflowError:
        inside = False
    if not inside:
        raise ValueError(f"{argument} must be in [0, 1]; got {value!r}")


def require_number(argument: str, value: Any, *, minimum: float = -math.inf) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is finite, at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument} must be a number; got {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError(f"{argument} must be finite; got {value!r}")
    if value < minimum:
        raise ValueError(f"{argument} must be at least {minimum}; got {value!r}")


def require_whole_number(argument: str, value: Any, *, minimum: int, bits: int | None = None) -> None:
    """Raise ValueError unless ``value`` is an int of at least ``minimum``, and below ``2^bits`` if given."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < minimum or (bits is not None and value >> bits):
        limit = "" if bits is None else f" and below 2^{bits}"
        raise ValueError(f"{argument} must be a whole number of at least {minimum}{limit}; got {value!r}")


def require_float32(argument: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a number that is finite in float32."""
    if not _is_finite(value):
        raise ValueError(f"{argument} must be a number that is finite in float32; got {value!r}")


def require_weights(argument: str, pair: Any) -> None:
    """Raise ValueError unless ``pair`` is two numbers that are finite in float32."""
    try:
        valid = len(pair) == 2 and all(map(_is_finite, pair))
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{argument} must be two finite numbers (inner, outer); got {pair!r}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value) and math.isfinite(float32(value))  # the first refuses text
    except (TypeError, ValueError, OverflowError):
        return False


def require_disjoint(
    arguments: Arguments,
    out: Sequence[Tensor],
    inputs: Mapping[str, Sequence[Tensor | None]],
    argument: str = "out",
    *,
    counterparts: bool = True,
) -> None:
    """Refuse outputs that share memory with each other or with inputs.

    If ``counterparts``, the input of a parameter may be its output, because every element is read before it
    is written. With other overlaps (tied weights listed twice, overlapping views) the result would depend on
    the order of the writes.

    Raises:
        ValueError: two outputs share memory, an output overlaps itself, or an output overlaps an input
            that is not its counterpart.
    """
    spans = []
    for index, tensor in enumerate(out):
        if tensor.numel() == 0:
            continue
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(
                f"{arguments.label(argument, index)} is an expanded view; its elements share memory"
            )
        spans.append((*_span(tensor), index))
    spans.sort()
    for (_, end, index), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(
                f"{arguments.label(argument, index)} and {arguments.label(argument, other)} share memory "
                "(tied weights?); give each storage once"
            )
    starts = [start for start, _, _ in spans]
    for input_name, tensors in inputs.items():
        for index, tensor in enumerate(tensors):  # type: ignore[assignment]
            if tensor is None or tensor.numel() == 0:
                continue
            start, end = _span(tensor)
            at = max(bisect.bisect_right(starts, start) - 1, 0)
            for out_start, out_end, other in spans[at : at + 2]:
                same = (
                    counterparts
                    and other == index
                    and start == out_start
                    and tensor.dtype == out[index].dtype
                    and tensor.stride() == out[index].stride()
                )
                if start < out_end and out_start < end and not same:
                    raise ValueError(
                        f"{arguments.label(input_name, index)} shares memory with "
                        f"{arguments.label(argument, other)}, which would be overwritten while it is read"
                    )


def _span(tensor: Tensor) -> tuple[int, int]:
    """The byte addresses of the start and the end of a non-empty tensor's elements."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
