"""Plans a fusion from headers and configs, before a weight is read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rkif.checkpoint.buffers import IN_FLIGHT
from rkif.checkpoint.card import companions
from rkif.checkpoint.compatibility import compare_inputs
from rkif.checkpoint.delta import UpdateSpace, update_space
from rkif.checkpoint.estimate import estimate_seconds, scanned_bytes
from rkif.checkpoint.input_notes import out_of_order, same_files
from rkif.checkpoint.layout import ALIGNMENT, Chunk, OutputLayout, plan_chunks, plan_layout
from rkif.checkpoint.process_memory import anonymous_memory
from rkif.checkpoint.request import IMPORTANCES, PreflightError, Request, check_out, existing_parent
from rkif.checkpoint.source import Checkpoint, changes, open_checkpoint
from rkif.checkpoint.tiles import TILE
from rkif.checkpoint.workdir import partial_folder, recorded_slot

MIB = 1 << 20
# Memory beside the buffers: counts of both searches and their sums, a sample, scores that a selection in
# memory collects, threads' stacks, tables of names and digests.
OVERHEAD = 56 * MIB
MAX_SLOT = 8 * MIB  # for one input: larger chunks are not faster
MIN_SLOT = MIB
# Maximum number of buffers of MAX_SLOT. With more inputs, buffers are smaller, so memory does not grow.
MOST_SLOTS = 12
SEARCH = 16 * MIB  # counts, their sums and a sample of each model beyond two, if thresholds are searched
TILE_BUFFERS = 12  # maximum number of float32 values that a method has for each element of a tile
FACTORS = (
    "the inputs are LoRA factors: {} merges A and B separately, so a weight or lambda of 0.5 gives a quarter "
    "of the update B·A; --space delta merges the updates"
)


@dataclass(frozen=True)
class Plan:
    """The plan of a fusion.

    Attributes:
        request: the request.
        checkpoints: the inputs by argument, in the order of their roles.
        layout: the output's files.
        slot: bytes of a chunk's buffer for one input.
        fused_chunks: chunks of tensors that are fused.
        copied_chunks: chunks of tensors that are copied.
        notes: notes to the user; they do not prevent the fusion.
        updates: the modules of adapters whose updates are merged; None if the tensors are merged.
        memory: maximum bytes of anonymous memory.
        read, written: bytes; ``read`` is an estimate, with one pass of a scan.
        seconds: rough estimate of the duration.
        identity: digest of the request and the inputs' headers.
    """

    request: Request
    checkpoints: dict[str, Checkpoint]
    layout: OutputLayout
    slot: int
    fused_chunks: list[Chunk]
    copied_chunks: list[Chunk]
    notes: list[str]
    updates: UpdateSpace | None
    memory: int
    read: int
    written: int
    seconds: float
    identity: str

    @property
    def base(self) -> Checkpoint:
        """The checkpoint whose layout, dtypes and companions the output has."""
        return next(iter(self.checkpoints.values()))

    def cut(self, slot: int) -> Plan:
        """The same plan with chunks of another size."""
        tensors = self.layout.tensors
        fused, copied = (plan_chunks(tensors, slot, fused=fused) for fused in (True, False))
        return replace(self, slot=slot, fused_chunks=fused, copied_chunks=copied)

    @cached_property
    def chunks(self) -> list[Chunk]:
        """All chunks; a chunk's index is its position in this list."""
        return [*self.fused_chunks, *self.copied_chunks]

    @property
    def numel(self) -> int:
        """Elements that are merged."""
        return self.layout.numel if self.updates is None else self.updates.numel

    @property
    def tile(self) -> int:
        """Maximum number of elements fused at a time: a chunk if kernels stream, else what fits in cache."""
        return self.slot if self.request.method.streams or self.request.device.type != "cpu" else TILE

    @property
    def scan_tile(self) -> int:
        """Maximum number of elements scanned at a time; counting needs one pass over memory as well."""
        return self.slot if self.request.method.scope is not None else self.tile

    @property
    def journal_identity(self) -> str:
        """Digest of all that determines the output: work is resumed only if the digest is unchanged."""
        changed = [checkpoint.changed for checkpoint in self.checkpoints.values()]
        copied = [[path.name, *changes([path])[0]] for path in companions(self.base)]
        return _digest([self.identity, importlib.metadata.version("rkif"), changed, copied])

    @property
    def last_change(self) -> int:
        """When an input last changed, in nanoseconds since the epoch."""
        return max(max(file[1:]) for checkpoint in self.checkpoints.values() for file in checkpoint.changed)


def preflight(request: Request) -> Plan:
    """Compare the inputs' headers and configs, and plan the fusion; no weight is read.

    Raises:
        PreflightError: the inputs cannot be fused as requested; it has all reasons.
    """
    problems: list[str] = []
    notes: list[str] = []
    checkpoints = _open_inputs(request, problems)
    if request.checkpoints[0] in checkpoints:
        compare_inputs(checkpoints, problems, notes)
    updates = None
    if request.space == "delta" and request.checkpoints[0] in checkpoints:
        updates = update_space(checkpoints[request.checkpoints[0]], request.checkpoints[0], problems)
        if any(argument in request.inputs for argument in IMPORTANCES):
            problems.append("--space delta selects by magnitude: importances belong to the factors")
    check_out(request, problems)
    if problems:
        raise PreflightError(problems)
    notes += same_files(checkpoints, request.method)
    if request.method.name == "wsm":
        notes += out_of_order(checkpoints)

    base, *others = checkpoints.values()
    layout = plan_layout(
        base,
        [other.tensors for other in others],
        partial_folder(request.out) / "data",
        request.max_shard_size,
    )
    slot, memory = _fit(request, layout, len(checkpoints), problems)
    if updates is not None:
        memory += updates.memory(list(checkpoints.values()))
        if memory > request.max_memory:
            problems.append(
                f"--max-memory: {request.max_memory / MIB:.0f} MiB is too little; the adapters' factors and "
                f"the updates of the largest module need {memory / MIB:.0f} MiB"
            )
    elif request.method.name != "recurrent_kif" and any(".lora_" in name for name in base.tensors):
        notes.append(FACTORS.format(request.method.name))
    written = sum(layout.sizes.values())
    _check_space(request, written, problems)
    if problems:
        raise PreflightError(problems)

    size = sum(entry.nbytes for checkpoint in checkpoints.values() for entry in checkpoint.tensors.values())
    read = size + scanned_bytes(request.method, checkpoints, size)
    return Plan(
        request,
        checkpoints,
        layout,
        slot,
        plan_chunks(layout.tensors, slot, fused=True),
        plan_chunks(layout.tensors, slot, fused=False),
        notes,
        updates,
        memory,
        read,
        written,
        seconds=estimate_seconds(request, layout, read, written),
        identity=_digest(
            [
                request.method.name,
                request.settings,
                request.max_shard_size,
                {argument: checkpoint.headers for argument, checkpoint in checkpoints.items()},
            ]
        ),
    )


def _open_inputs(request: Request, problems: list[str]) -> dict[str, Checkpoint]:
    """The inputs that can be opened, by argument."""
    importances = [argument for argument in request.inputs if argument.startswith("--")]
    if len(importances) == 1:
        problems.append("--inner-importance and --outer-importance belong together: give both or neither")
    if importances and not request.method.accepts_importance:
        problems.append(f"importance is used by recurrent_kif only, not by {request.method.name}")
    opened = {
        argument: open_checkpoint(path, argument, problems) for argument, path in request.inputs.items()
    }
    return {argument: checkpoint for argument, checkpoint in opened.items() if checkpoint is not None}


def _fit(request: Request, layout: OutputLayout, inputs: int, problems: list[str]) -> tuple[int, int]:
    """Bytes of a chunk's buffer for one input, and bytes of all memory with buffers of that size."""
    widest = max((tensor.widest for tensor in layout.tensors), default=4)
    narrowest = min((tensor.target.itemsize for tensor in layout.tensors if tensor.fused), default=4)
    buffers = (inputs + 1) * IN_FLIGHT
    most = MOST_SLOTS * MAX_SLOT // buffers
    scratch = TILE * (4 * TILE_BUFFERS + request.method.models)  # a mask of each model
    if request.method.needs_threshold:
        scratch += SEARCH * max(request.method.models - 2, 0)
    if request.device.type != "cpu" and not request.method.streams:
        buffers += TILE_BUFFERS * 4 // narrowest  # on a GPU, a tile is a whole chunk
    fixed = anonymous_memory() + OVERHEAD + scratch
    grain = ALIGNMENT * widest
    whole = sum(-(-tensor.target.numel * tensor.widest // grain) * grain for tensor in layout.tensors)
    affordable = (request.max_memory - fixed) // buffers
    slot = max(min(affordable, MAX_SLOT, most, whole) // grain * grain, grain)
    recorded = recorded_slot(request.out) if request.resume else None
    if recorded is not None and (recorded <= 0 or recorded % grain):
        recorded = None  # of other inputs
    # The memory of Python and PyTorch varies between processes; the overhead includes a margin for it.
    if recorded is not None and recorded <= affordable + OVERHEAD // 4 // buffers:
        slot = recorded
    elif recorded is not None:
        problems.append(
            f"--max-memory: the interrupted fusion needs {(fixed + buffers * recorded) / MIB:.0f} MiB; "
            "resume it with the memory that it was started with"
        )
    least = min(MIN_SLOT, max(most, grain))
    if recorded is None and affordable < min(least, whole):
        needed = fixed + buffers * least
        problems.append(
            f"--max-memory: {request.max_memory / MIB:.0f} MiB is too little; Python, PyTorch and "
            f"buffers for {inputs} inputs need {needed / MIB:.0f} MiB"
        )
    return slot, fixed + buffers * slot


def _check_space(request: Request, written: int, problems: list[str]) -> None:
    free = shutil.disk_usage(existing_parent(request.out)).free
    partial = partial_folder(request.out)
    taken = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
    if free + taken < written:
        problems.append(
            f"--out: the output has {written / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free at "
            f"{existing_parent(request.out)}"
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
