"""The compiled library, and the lists of tensors that it takes."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rkif_kernels.contiguous import all_contiguous

_DTYPES = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

_pointer, _float, _int, _long = ctypes.c_void_p, ctypes.c_float, ctypes.c_int32, ctypes.c_int64
_LISTS = [_long, _pointer, _pointer, _pointer]  # tensors, numels, addresses, dtypes
_SIGNATURES = {
    "rkif_update_importance": (_long, [*_LISTS, _float, _float, _float, _float, _int, _int]),
    "rkif_adamw": (_long, [*_LISTS, *[_float] * 11, _int, _int]),
    "rkif_sample": (None, [*_LISTS, _int, _long, _pointer, _int]),
    "rkif_split": (None, [*_LISTS, _int, _float, _float, _pointer, _long, _pointer, _int]),
    "rkif_count": (None, [*_LISTS, _int, _long, _int, _long, _pointer, _int]),
    "rkif_fuse": (None, [*_LISTS, *[_pointer] * 4, _int, _int, _int, _pointer, _pointer, _int]),
    "rkif_begin": (_pointer, [*_LISTS, *[_pointer] * 3, _int, _int, _int, _long, _pointer, _int]),
    "rkif_gather_undecided": (_long, [_pointer, _int, _float, _float, _pointer]),
    "rkif_finish": (None, [_pointer] * 4),
    "rkif_merge": (None, [*_LISTS, *[_pointer] * 4, *[_float] * 4, _int, _int, _pointer, _pointer, _int]),
    "rkif_absolute_sums": (None, [*_LISTS, _pointer, _pointer, _float, _pointer, _int]),
    "rkif_use_isa": (_int, [_int]),
    "rkif_out_of_memory": (_int, []),
}


ABI = 6  # of the signatures above; rkif_abi() in kernels.cpp


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, whose calls release Python's global interpreter lock.

    None if it was not built, cannot be loaded, or was built from another version (with a warning).
    """
    folder = Path(__file__).parent
    paths = (folder / f"_kernels{suffix}" for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    try:
        loaded = ctypes.CDLL(str(path)) if path else None
        if loaded is None:
            return None
        if loaded.rkif_abi() != ABI:
            warnings.warn(
                f"{path} was built from another version of rkif, so the torch backend takes its place; "
                "install rkif again",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return loaded


class Lists:
    """Lists of tensors, one per role, as arrays of addresses and dtypes; it keeps the tensors alive.

    Tensors that are not contiguous are replaced by copies, so outputs must come from ``in_place``.
    """

    def __init__(self, roles: Sequence[Sequence[Tensor | None] | None]) -> None:
        first = roles[0]
        assert first is not None
        self._tensors = [[None] * len(first) if role is None else all_contiguous(role) for role in roles]
        shape = (len(roles), len(first))
        flat = [tensor for row in self._tensors for tensor in row]
        numels = [tensor.numel() for tensor in first if tensor is not None]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in flat]
        dtypes = [_DTYPES[None if tensor is None else tensor.dtype] for tensor in flat]
        # NumPy arrays, because PyTorch's defaults of dtype and device are set by the user.
        self._arrays = (
            np.array(numels, np.int64),
            np.array(addresses, np.int64).reshape(shape),
            np.array(dtypes, np.int32).reshape(shape),
        )

    def part(self, roles: slice) -> Lists:
        """Some of the roles, without a copy."""
        part = object.__new__(Lists)
        numels, addresses, dtypes = self._arrays
        part._tensors, part._arrays = self._tensors, (numels, addresses[roles], dtypes[roles])
        return part

    def of_addresses(self) -> Lists:
        """Release the tensors and return self: for callers that check addresses before each call."""
        self._tensors = []
        return self

    @property
    def numel(self) -> int:
        """Number of elements in all tensors of a role."""
        return int(self._arrays[0].sum())

    def call(self, function: str, *arguments: float | None) -> Any:
        """Call a function of the library with these lists, ``arguments`` and the number of threads."""
        lists = (array.ctypes.data for array in self._arrays)
        return call(function, len(self._arrays[0]), *lists, *arguments, torch.get_num_threads())


def call(function: str, *arguments: float | None) -> Any:
    """Call a function of the library.

    Raises:
        MemoryError: the function ran out of memory; its outputs may hold a part of the result.
    """
    loaded: Any = library()
    result = getattr(loaded, function)(*arguments)
    if loaded.rkif_out_of_memory():
        raise MemoryError(f"{function} needs more memory than is available")
    return result


def use_instructions(which: int) -> int:
    """Use the ``which``-th best instruction set, for tests; returns how many the processor has.

    The default is 0, the best of AVX-512, AVX2 and portable C++.
    """
    count: int = call("rkif_use_isa", which)
    return count
