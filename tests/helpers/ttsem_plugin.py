"""A pytest plugin with which ttsem, which executes Triton's IR on a CPU, checks kernels with pointer tables.

It is loaded by ``.ci/run ttsem``. ttsem alone knows only the tensors among a launch's arguments, but rkif's
kernels reach tensors by addresses in a table. With this plugin

* an access outside the exact extent of a tensor of the table, or of an argument, is a fault;
* kernels work in the memory of the CPU tensors, so that aliases are aliases, as on a GPU;
* memory from ``torch.empty`` holds a pattern, and a kernel that loads this pattern is a fault;
* a run without a single launch fails. (ttsem counts launches whose races it could not check, and goes on.)
"""

from __future__ import annotations

import collections
import ctypes
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch.overrides import TorchFunctionMode
from ttsem import harness, sanitize
from ttsem.memory import Memory
from ttsem.values import Poison

# By width in bytes: NaN in every floating-point format, and an integer that is large and positive.
FLOAT_PATTERNS = {2: 0xFFA5, 4: 0xFFA5A5A5, 8: 0xFFF5A5A5A5A5A5A5}
INT_PATTERNS = {2: 0x7EA5, 4: 0x7EA5A5A5, 8: 0x7EA5A5A5A5A5A5A5}
INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

# `python -m ttsem.sanitize` runs a second copy of the module, and raises that one's faults.
_session = sys.modules["__main__"]
KernelFault: type[Exception] = getattr(_session, "KernelFault", sanitize.KernelFault)

launches: collections.Counter[str] = collections.Counter()
_tables: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_extents: list[tuple[int, int]] = []  # first byte and end of each extent that the current launch may access


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


class TableMemory(Memory):
    """The real memory of a launch's tensors, those of its table included."""

    def __init__(self) -> None:
        super().__init__()
        merged: list[list[int]] = []
        for first, end in sorted(_extents):  # overlapping extents are merged; adjacent extents are not
            if merged and first < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([first, end])
        self._mapped = {first for first, _ in _extents}
        for first, end in merged:
            super().register(
                first, np.ctypeslib.as_array((ctypes.c_uint8 * (end - first)).from_address(first))
            )

    def register(self, base: Any, array: Any) -> None:
        if int(base) not in self._mapped:
            super().register(base, array)

    def load(self, addrs: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._require_written(addrs, mask, np.dtype(dtype))
        return super().load(addrs, mask, other, dtype)

    def atomic(self, kind: Any, addrs: Any, values: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        self._require_written(addrs, mask, np.asarray(values).dtype)
        return super().atomic(kind, addrs, values, mask, *args, **kwargs)

    def _require_written(self, addrs: Any, mask: Any, dtype: np.dtype[Any]) -> None:
        live = np.ones(np.shape(addrs), bool) if mask is None else np.broadcast_to(mask, np.shape(addrs))
        addresses = np.asarray(addrs, dtype=np.int64)[live].reshape(-1)
        if not addresses.size or dtype.itemsize not in INTS:
            return
        bits = self._read(addresses, dtype).view(f"u{dtype.itemsize}")
        unwritten = bits == FLOAT_PATTERNS[dtype.itemsize]
        if dtype.kind in "iu":
            unwritten |= bits == INT_PATTERNS[dtype.itemsize]
        if unwritten.any():
            raise Poison(f"{int(unwritten.sum())} elements are read that nothing has written")


def _own_extent(tensor: torch.Tensor) -> tuple[int, Any]:
    """The bytes of the tensor, not of its storage: an access outside a view is a fault."""
    assert tensor.is_contiguous()
    return int(tensor.data_ptr()), harness._to_numpy(tensor.detach().reshape(-1))


_execute = harness.execute


def _execute_with_table(record: Any, ir_text: str, **kwargs: Any) -> Any:
    """``harness.execute`` with access to the tensors of the launch's table."""
    if "pointers_ptr" in record.ptrs:
        table = _tables[record.ptrs["pointers_ptr"]]
        numels = table.layout.numels.tolist()
        for role, (dtype, row) in enumerate(zip(table.dtypes, table.pointers.tolist(), strict=True)):
            if dtype is None:
                continue
            for index, (address, numel) in enumerate(zip(row, numels, strict=True)):
                name = f"role {role}, tensor {index} of the table"
                record.bases[name] = address
                record.pre[name] = np.zeros(numel, f"u{tl.dtype(dtype).primitive_bitwidth // 8}")
    _extents[:] = [(base, base + record.pre[name].nbytes) for name, base in record.bases.items()]
    launches[record.fn_name] += 1
    return _execute(record, ir_text, **kwargs)


def _stub_cuda() -> None:
    """ttsem reports tensors as CUDA tensors; calls that a CPU build of torch lacks become no-ops."""
    stream = object()
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.current_stream = lambda device=None: stream  # type: ignore[assignment, return-value]
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]


def pytest_configure(config: pytest.Config) -> None:
    _stub_cuda()
    harness.Memory, harness.storage_copy, harness.execute = TableMemory, _own_extent, _execute_with_table
    for module in (sanitize, _session):
        module._write_back = lambda record, execution: None  # the kernel wrote to the tensors

    from rkif_kernels.backends.triton.table import Table

    make = Table.__init__

    def make_and_note(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        _tables[self.pointers.data_ptr()] = self

    Table.__init__ = make_and_note  # type: ignore[method-assign]
    FillEmpty().__enter__()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the cases of other backends: ttsem checks only Triton kernels."""

    def without_triton(item: pytest.Item) -> bool:
        _, _, parameters = item.name.rstrip("]").partition("[")
        return not {"native", "torch"}.isdisjoint(parameters.split("-"))

    config.hook.pytest_deselected(items=[item for item in items if without_triton(item)])
    items[:] = [item for item in items if not without_triton(item)]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, count in sorted(launches.items()):
        terminalreporter.write_line(f"ttsem: {count:6d} launches of {name}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not launches:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
