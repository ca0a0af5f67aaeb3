"""Fast checks whether a prepared call still applies: addresses, dtypes, shapes, strides and devices."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_compiled: Any
try:
    import rkif_kernels.ops._describe as _compiled
except ImportError:  # there was no C++ compiler
    _compiled = None
# None for versions of PyTorch with an older DLPack.
_EXCHANGE_API = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_TYPES = Tensor, nn.Parameter
_PROPERTIES = attrgetter("dtype", "shape", "device")


class Description(NamedTuple):
    """The properties of a list of tensors that a prepared call depends on.

    Attributes:
        addresses: int64 of each tensor, as bytes; 0 for None.
        kinds: types, dtypes, shapes, strides, devices and None entries, and whether inference mode is on.
    """

    addresses: bytes
    kinds: Hashable

    def address_list(self) -> list[int]:
        """The addresses as numbers."""
        return array("q", self.addresses).tolist()


def describe(tensors: Sequence[Tensor | None]) -> Description:
    """Describe a list of tensors.

    If a list has sparse tensors, or entries that are no tensors, its description never equals another one.
    """
    mode = torch.is_inference_mode_enabled()
    if _compiled is not None and _EXCHANGE_API is not None:
        described = _compiled.describe(tensors, _EXCHANGE_API, _TYPES)
        if described is not None:
            return Description(described[0], (mode, described[1]))
    present: Any = [tensor for tensor in tensors if tensor is not None]
    try:
        addresses = array("q", [0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        properties = [*map(_PROPERTIES, present), *map(Tensor.stride, present), *map(Tensor.is_neg, present)]
        return Description(addresses.tobytes(), (mode, *map(type, tensors), *properties))
    except (AttributeError, RuntimeError, TypeError):
        return Description(b"", object())  # the argument checks refuse it by name
