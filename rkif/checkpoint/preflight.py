"""The plan of a fusion: everything that can be known before a weight is read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from dataclasses import dataclass, replace
from typing import Any

from rkif.checkpoint.card import companions
from rkif.checkpoint.compatibility import (
    compare_configs,
    compare_importance,
    compare_tensors,
    require_dtypes,
)
from rkif.checkpoint.estimate import estimate_seconds, scanned_bytes
from rkif.checkpoint.layout import ALIGNMENT, Chunk, Layout, plan_chunks, plan_layout
from rkif.checkpoint.methods import settings_of
from rkif.checkpoint.process_memory import anonymous_memory
from rkif.checkpoint.request import PreflightError, Request, existing_parent, require_out
from rkif.checkpoint.source import FUSED, Checkpoint, changes, open_checkpoint
from rkif.checkpoint.stream import IN_FLIGHT
from rkif.checkpoint.tiles import TILE
from rkif.checkpoint.workdir import partial_folder, recorded_slot

MIB = 1 << 20
# Beside the buffers: counts of both searches and their sums, a sample, the collected scores of an in-memory
# selection, threads' stacks, the tables of names and digests.
OVERHEAD = 56 * MIB
SLOT_MOST = 8 * MIB  # of one input: larger chunks are no faster
SLOT_LEAST = MIB
TILE_BUFFERS = 12  # float32 values an element that a method makes of them at most


@dataclass(frozen=True)
class Plan:
    """How it will be done.

    Attributes:
        checkpoints: the inputs by argument, base first.
        layout: the output's files.
        slot: bytes of one input's buffer for a chunk.
        chunks: of tensors that are fused.
        copies: of tensors that are copied.
        notes: what the user should know, though it hinders nothing.
        memory: bytes that it will take at most.
        read, written: bytes; ``read`` with all passes that are likely.
        seconds: a rough estimate of how long it takes.
        identity: digest of what decides the output.
    """

    request: Request
    checkpoints: dict[str, Checkpoint]
    layout: Layout
    slot: int
    chunks: list[Chunk]
    copies: list[Chunk]
    notes: list[str]
    memory: int
    read: int
    written: int
    seconds: float
    identity: str

    def cut(self, slot: int) -> Plan:
        """The same work in chunks of another size."""
        tensors = self.layout.tensors
        chunks, copies = (plan_chunks(tensors, slot, fused=fused) for fused in (True, False))
        return replace(self, slot=slot, chunks=chunks, copies=copies)

    @property
    def tile(self) -> int:
        """Elements that are fused at a time: a chunk where kernels stream, else what stays in cache."""
        return self.slot if self.request.method.streams or self.request.device.type != "cpu" else TILE

    @property
    def scan_tile(self) -> int:
        """Elements that are scanned at a time: counting streams, too."""
        return self.slot if self.request.method.scope is not None else self.tile

    @property
    def journal_identity(self) -> str:
        """Of the work: it is resumed only where all that goes into the output is unchanged since."""
        changed = [checkpoint.changed for checkpoint in self.checkpoints.values()]
        beside = [[path.name, *changes([path])[0]] for path in companions(self.checkpoints["BASE"])]
        return _digest([self.identity, importlib.metadata.version("rkif"), changed, beside])

    @property
    def last_change(self) -> int:
        """When an input was last changed, in nanoseconds."""
        return max(max(file[1:]) for checkpoint in self.checkpoints.values() for file in checkpoint.changed)


def preflight(request: Request) -> Plan:
    """Compare the inputs' headers and configs, and plan; no weight is read.

    Raises:
        PreflightError: with all that is wrong.
    """
    problems: list[str] = []
    notes: list[str] = []
    paths = {"BASE": request.base, "INNER": request.inner, "OUTER": request.outer}
    given = {
        "--inner-importance": request.inner_importance,
        "--outer-importance": request.outer_importance,
    }
    importances = {argument: path for argument, path in given.items() if path is not None}
    if len(importances) == 1:
        problems.append("--inner-importance and --outer-importance belong together: give both or neither")
    if importances and not request.method.accepts_importance:
        problems.append(f"importance is used by recurrent_kif only, not by {request.method.name}")
    checkpoints = {}
    for argument, path in (paths | importances).items():
        if (found := open_checkpoint(path, argument, problems)) is not None:
            checkpoints[argument] = found
    base = checkpoints.get("BASE")
    if base is not None:
        for argument, checkpoint in checkpoints.items():
            if argument in importances:
                compare_importance(base, checkpoint, argument, problems)
            elif argument != "BASE":
                compare_configs(base, checkpoint, argument, problems, notes)
                compare_tensors(base, checkpoint, argument, problems)
        require_dtypes(checkpoints, problems)
        if base.tensors and not any(one.dtype in FUSED and one.numel for one in base.tensors.values()):
            problems.append("BASE has no floating-point element: there is nothing to fuse")
    require_out(request, problems)
    if problems or base is None:
        raise PreflightError(problems)

    data = partial_folder(request.out) / "data"
    others = [checkpoints[argument].tensors for argument in checkpoints if argument != "BASE"]
    layout = plan_layout(base, others, data, request.max_shard_size)
    slot, memory = _fit(request, layout, len(checkpoints), problems)
    written = sum(layout.sizes.values())
    _require_space(request, written, problems)
    if problems:
        raise PreflightError(problems)

    whole = sum(entry.nbytes for checkpoint in checkpoints.values() for entry in checkpoint.tensors.values())
    scanned = scanned_bytes(request.method, checkpoints, whole)
    return Plan(
        request,
        checkpoints,
        layout,
        slot,
        plan_chunks(layout.tensors, slot, fused=True),
        plan_chunks(layout.tensors, slot, fused=False),
        notes,
        memory,
        read=whole + scanned,
        written=written,
        seconds=estimate_seconds(request, layout.numel, whole + scanned, written),
        identity=_digest(
            [
                request.method.name,
                settings_of(request.method),
                request.max_shard_size,
                {argument: checkpoint.headers for argument, checkpoint in checkpoints.items()},
            ]
        ),
    )


def _fit(request: Request, layout: Layout, inputs: int, problems: list[str]) -> tuple[int, int]:
    """Bytes of an input's buffer for a chunk, and of all memory with it."""
    widest = max((tensor.widest for tensor in layout.tensors), default=4)
    narrowest = min((tensor.target.itemsize for tensor in layout.tensors if tensor.fused), default=4)
    shares = (inputs + 1) * IN_FLIGHT
    scratch = TILE * 4 * TILE_BUFFERS
    if request.device.type != "cpu" and not request.method.streams:
        shares += TILE_BUFFERS * 4 // narrowest  # a chunk is computed on whole
    fixed = anonymous_memory() + OVERHEAD + scratch
    grain = ALIGNMENT * widest
    whole = sum(-(-tensor.target.numel * tensor.widest // grain) * grain for tensor in layout.tensors)
    affordable = (request.max_memory - fixed) // shares
    slot = max(min(affordable, SLOT_MOST, whole) // grain * grain, grain)
    recorded = recorded_slot(request.out) if request.resume else None
    if recorded is not None and (recorded <= 0 or recorded % grain):
        recorded = None  # of other inputs
    # What Python and PyTorch take is not the same every time; the overhead has room for that.
    if recorded is not None and recorded <= affordable + OVERHEAD // 4 // shares:
        slot = recorded
    elif recorded is not None:
        problems.append(
            f"--max-memory: the interrupted fusion needs {(fixed + shares * recorded) / MIB:.0f} MiB; "
            "resume it with as much as it was begun with"
        )
    if recorded is None and affordable < min(SLOT_LEAST, whole):
        least = fixed + shares * SLOT_LEAST
        problems.append(
            f"--max-memory: {request.max_memory / MIB:.0f} MiB are too few; with {inputs} inputs and what "
            f"Python and PyTorch take themselves it needs {least / MIB:.0f} MiB"
        )
    return slot, fixed + shares * slot


def _require_space(request: Request, written: int, problems: list[str]) -> None:
    free = shutil.disk_usage(existing_parent(request.out)).free
    partial = partial_folder(request.out)
    taken = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
    if free + taken < written:
        problems.append(
            f"--out: {written / 1e9:.2f} GB are to be written, and {free / 1e9:.2f} GB are free at "
            f"{existing_parent(request.out)}"
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
