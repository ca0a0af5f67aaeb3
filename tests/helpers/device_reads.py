"""Records when the host reads values of tensors, also of CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Methods that do not pass through the dispatcher for CPU tensors.
_METHODS = "tolist", "cpu", "numpy"
_OPERATIONS = "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"


@contextmanager
def device_reads() -> Iterator[list[str]]:
    """The reads of the block, by the name of the method or operation, as they occur."""
    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in _OPERATIONS:
                seen.append(name)
            return func(*args, **(kwargs or {}))

    def noticed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return method(*args, **kwargs)

        return call

    with Mode(), patch.multiple(Tensor, **{name: noticed(name, getattr(Tensor, name)) for name in _METHODS}):
        yield seen
