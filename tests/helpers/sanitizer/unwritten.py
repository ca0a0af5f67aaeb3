"""Reads of memory that nothing has written: ``torch.empty`` returns a pattern, which no kernel may read."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from ttsem.memory import Memory
from ttsem.values import Poison

# By width in bytes: NaN in every floating-point format, and an integer that is large and positive.
FLOAT_PATTERNS = {2: 0xFFA5, 4: 0xFFA5A5A5, 8: 0xFFF5A5A5A5A5A5A5}
INT_PATTERNS = {2: 0x7EA5, 4: 0x7EA5A5A5, 8: 0x7EA5A5A5A5A5A5A5}
INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class FillEmpty(TorchFunctionMode):
    """Fills what ``torch.empty`` and its like return with the pattern of its width."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in EMPTY and isinstance(out, torch.Tensor) and out.itemsize in INTS:
            width = out.itemsize
            pattern = (
                FLOAT_PATTERNS[width] - (1 << 8 * width) if out.is_floating_point() else INT_PATTERNS[width]
            )
            with torch.no_grad():
                out.view(INTS[width]).fill_(pattern)
        return out


class WrittenMemory(Memory):
    """Memory in which a load or an atomic of the pattern is a fault."""

    def load(self, addrs: Any, mask: Any, other: Any, dtype: Any) -> Any:
        values = super().load(addrs, mask, other, dtype)
        _require_written(values, mask)
        return values

    def atomic(self, kind: Any, addrs: Any, values: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        old = super().atomic(kind, addrs, values, mask, *args, **kwargs)
        _require_written(old, mask)
        return old


def _require_written(values: Any, mask: Any) -> None:
    """Refuse the pattern in values that were read; ``mask`` selects the lanes that read."""
    width = values.dtype.itemsize
    if width not in INTS:
        return
    bits = values.view(f"u{width}")
    unwritten = bits == FLOAT_PATTERNS[width]
    if values.dtype.kind in "iu":
        unwritten |= bits == INT_PATTERNS[width]
    if mask is not None:
        unwritten &= mask
    if unwritten.any():
        raise Poison(f"{int(unwritten.sum())} elements are read that nothing has written")
