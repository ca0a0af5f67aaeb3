"""A prepared update of the importance: its tables are on the device and its kernels compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rkif_kernels.backends.triton.importance import prepare_update
from rkif_kernels.backends.triton.launch import LaunchConfig, PreparedLaunch
from rkif_kernels.backends.triton.launches import chosen
from rkif_kernels.backends.triton.table import ALIGNMENT, StreamOrder, Table, build_tables
from rkif_kernels.types import ImportanceInputs, Order, Smoothing

GRADIENTS = 1  # the gradients' row in a table


class PreparedUpdate:
    """An update of tensors with fixed addresses; the addresses of gradients may change.

    A captured CUDA graph has its own tables. Every replay fills them from host memory that is kept for the
    graph, so replays and other steps do not affect each other.

    Args:
        inputs: validated. They fix all dtypes, and which tensors have a gradient.
        order, nonfinite: see :func:`rkif_kernels.ops.update_importance_`.
        captured: keeps the memory of CUDA graphs alive; mutated.
    """

    def __init__(
        self,
        inputs: ImportanceInputs,
        order: Order,
        nonfinite: Tensor,
        captured: list[object],
        config: LaunchConfig | None = None,
    ) -> None:
        self._device, self._nonfinite, self._order = inputs.device, nonfinite, order
        self._on_gpu = self._device.type == "cuda"
        self._config = config or chosen("observe", inputs.lists, inputs.numel).launch
        self._params, self._grads = _Places(inputs.params), _Places(inputs.grads)
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
        # Pinned memory cannot be allocated during a capture, so one source per table is allocated before.
        self._spare = self._pinned()
        self._captured = captured
        self._stale = False  # whether gradients moved in a capture, which does not update these tables

    def launch(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        smoothing: Smoothing,
        moved: list[int] | None,
    ) -> None:
        """Update once, on the current stream.

        Args:
            moved: the gradients' addresses if one has changed since the last launch.
        """
        self._streams.enter()
        launches, capturing = self._launches, self._on_gpu and torch.cuda.is_current_stream_capturing()
        if moved is not None:
            self._rows[GRADIENTS] = self._grads.find(grads, moved)
        if capturing:
            launches = self._captured_launches()
            self._stale |= moved is not None
        elif moved is not None or self._stale:
            self._upload()
            self._stale = False
        if not self._spare and not capturing:
            self._spare = self._pinned()
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

    def _pinned(self) -> list[Tensor]:
        if not self._on_gpu:
            return []
        return [
            torch.empty(table.pointers.shape, dtype=torch.int64, device="cpu", pin_memory=True)
            for table in self._tables
        ]

    def _captured_launches(self) -> list[PreparedLaunch]:
        if not self._spare:
            raise RuntimeError(
                "a plan can be captured once after each step outside of a capture; "
                "take a step outside, then capture again"
            )
        sources, self._spare = self._spare, []
        tables = []
        for table, source, indices in zip(self._tables, sources, self._indices, strict=True):
            source.copy_(torch.tensor([[row[index] for index in indices] for row in self._rows]))
            tables.append(replace(table, pointers=source.to(self._device, non_blocking=True)))
        launches = self._prepare(tables)
        self._captured.append((sources, launches))
        return launches


class _Places:
    """The addresses of the tensors of one role, or of copies with fixed addresses.

    A tensor that is not contiguous, not aligned or negated is copied in every step, into memory that is
    allocated once.

    Args:
        tensors: those of one step; the tensors of all steps are of the same kinds.
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
            addresses: those of the tensors; mutated.
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
