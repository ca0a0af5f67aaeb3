"""A prepared update of the importance: its tables are on the device and its kernels compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rkif_kernels.backends.choose import capturing
from rkif_kernels.backends.triton.importance import prepare_update
from rkif_kernels.backends.triton.launch import LaunchConfig, PreparedLaunch
from rkif_kernels.backends.triton.launches import chosen
from rkif_kernels.backends.triton.table import ALIGNMENT, StreamOrder, Table, build_tables
from rkif_kernels.types import ImportanceInputs, Order, Smoothing

# The memory that replays of captured steps read: tables on the device, and host memory with addresses.
Captured = dict[tuple[int, tuple[tuple[int, ...], ...]], tuple[tuple[Table, ...], tuple[Tensor, ...]]]

GRADIENTS = 1  # the gradients' row in a table
SPARES = 4  # sets of new addresses that can be captured between two steps outside of captures


class PreparedUpdate:
    """An update of tensors with fixed addresses; the addresses of gradients may change.

    A captured CUDA graph has its own addresses. Every replay reads them from host memory that the plan keeps,
    so replays and other steps do not affect each other. Steps with the same addresses share this memory.

    Args:
        inputs: validated. They fix all dtypes, and which tensors have a gradient.
        order, nonfinite: see :func:`rkif_kernels.ops.update_importance_`.
        captured: the memory of captured steps, by id of the tables and addresses; mutated. The plan passes it
            on when it prepares again.
    """

    def __init__(
        self,
        inputs: ImportanceInputs,
        order: Order,
        nonfinite: Tensor,
        captured: Captured,
        config: LaunchConfig | None = None,
    ) -> None:
        self._device, self._nonfinite, self._order = inputs.device, nonfinite, order
        self._on_gpu = self._device.type == "cuda"
        self._config = config or chosen("observe", inputs.lists, inputs.numel).launch
        self._params, self._grads = _RoleAddresses(inputs.params), _RoleAddresses(inputs.grads)
        states = [_addresses(row, inputs.params) for row in (inputs.sensitivity, inputs.uncertainty)]
        self._rows = [self._params.find(inputs.params), self._grads.find(inputs.grads), *states]
        self._tables = build_tables(
            self._device,
            tuple(map(tuple, self._rows)),
            tuple(
                tuple(None if tensor is None else tensor.dtype for tensor in row or [None] * len(states[0]))
                for row in inputs.lists
            ),
            tuple(tensor.numel() for tensor in inputs.params),
            self._config.chunk,
        )
        self._indices = [table.members for table in self._tables]
        self._streams = StreamOrder(self._device, [t for table in self._tables for t in table.memory])
        self._launches = self._prepare(self._tables)
        # Pinned memory cannot be allocated during a capture, so memory for some captures is allocated before.
        self._spares = self._pinned()
        self._captured = captured
        self._stale = False  # whether gradients moved in a capture, which does not update the tables

    def launch(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        smoothing: Smoothing,
        moved: list[int] | None,
    ) -> None:
        """Update once, on the current stream.

        Args:
            moved: the gradients' addresses, if one has changed since the last launch.
        """
        self._streams.enter()
        launches, captured = self._launches, capturing(self._device)
        if moved is not None:
            self._rows[GRADIENTS] = self._grads.find(grads, moved)
        if captured:
            launches = self._captured_launches()
            self._stale |= moved is not None
        elif moved is not None or self._stale:
            self._upload()
            self._stale = False
        if len(self._spares) < SPARES and not captured:
            self._spares = self._pinned()
        self._params.fill(params)
        self._grads.fill(grads)
        for launch in launches:
            launch({"smoothing": smoothing.factors})

    def _prepare(self, tables: Sequence[Table]) -> list[PreparedLaunch]:
        return [prepare_update(table, self._order, self._nonfinite, self._config) for table in tables]

    def _upload(self) -> None:
        """Upload the gradients' addresses. Each copy has a new source, because copies are asynchronous."""
        row = self._rows[GRADIENTS]
        for table, indices in zip(self._tables, self._indices, strict=True):
            addresses = row if len(indices) == len(row) else [row[index] for index in indices]
            source = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            if self._on_gpu:
                source = source.pin_memory()
            table.pointers[GRADIENTS].copy_(source, non_blocking=True)

    def _pinned(self) -> list[tuple[Tensor, ...]]:
        """Host memory for SPARES sets of the addresses of all tables."""
        shapes = ((SPARES, *table.pointers.shape) for table in self._tables)
        options = {"dtype": torch.int64, "device": "cpu", "pin_memory": self._on_gpu}
        return list(zip(*(torch.empty(shape, **options).unbind() for shape in shapes), strict=True))

    def _captured_launches(self) -> list[PreparedLaunch]:
        key = id(self._tables), tuple(map(tuple, self._rows))
        if key not in self._captured:
            if not self._spares:
                raise RuntimeError(
                    f"between two steps outside of captures, a plan can be captured with {SPARES} sets of "
                    "addresses that are new to it; take a step outside, then capture again"
                )
            sources = self._spares.pop()
            for source, indices in zip(sources, self._indices, strict=True):
                source.copy_(torch.tensor([[row[index] for index in indices] for row in self._rows]))
            self._captured[key] = self._tables, sources
        tables = [
            replace(table, pointers=source.to(self._device, non_blocking=True))
            for table, source in zip(*self._captured[key], strict=True)
        ]
        return self._prepare(tables)


class _RoleAddresses:
    """The addresses of the tensors of one role, or of copies with fixed addresses.

    A tensor that is not contiguous, not aligned or negated is copied in every step, into memory that is
    allocated once.

    Args:
        tensors: those of one step; in all steps, they have the same dtypes, shapes and strides.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._gapped = {
            index
            for index, tensor in enumerate(tensors)
            if tensor is not None and (not tensor.is_contiguous() or tensor.is_neg())
        }
        self._copies: dict[int, Tensor] = {}
        self._copied: list[int] = []

    def find(self, tensors: Sequence[Tensor | None], addresses: list[int] | None = None) -> list[int]:
        """The addresses; 0 for None.

        Args:
            addresses: those of the tensors, if known; mutated.
        """
        if addresses is None:
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        misaligned = {index for index, address in enumerate(addresses) if address % ALIGNMENT}
        self._copied = sorted(misaligned | self._gapped)
        for index in self._copied:
            tensor = tensors[index]
            assert tensor is not None
            if index not in self._copies:
                self._copies[index] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            addresses[index] = self._copies[index].data_ptr()
        return addresses

    def fill(self, tensors: Sequence[Tensor | None]) -> None:
        """Copy the tensors that kernels cannot address."""
        if self._copied:
            sources = [tensor.detach() for index in self._copied if (tensor := tensors[index]) is not None]
            torch._foreach_copy_([self._copies[index] for index in self._copied], sources)


def _addresses(states: Sequence[Tensor] | None, like: Sequence[Tensor]) -> list[int]:
    if states is None:
        return [0] * len(like)
    for index, state in enumerate(states):
        if state.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"the state of tensor {index} must start on a boundary of {ALIGNMENT} bytes to be in a plan; "
                f"it starts {state.data_ptr() % ALIGNMENT} bytes behind one"
            )
    return [state.data_ptr() for state in states]
