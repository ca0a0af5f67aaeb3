"""The position of each tensor in the output, and the chunks of the work."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory

from rkif.checkpoint.source import FUSED, Checkpoint, Entry

ALIGNMENT = 64  # bytes; each tensor's part begins at a multiple in a buffer


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output, and its inputs.

    Attributes:
        name: the tensor's name.
        target: its entry in the output.
        inputs: the entries of base and models, then those of the two importances if they are given.
    """

    name: str
    target: Entry
    inputs: tuple[Entry, ...]

    @property
    def fused(self) -> bool:
        """Whether it is fused; tensors that are not floating point are copied."""
        return self.target.dtype in FUSED

    @property
    def widest(self) -> int:
        """Maximum bytes of an element over all inputs and the output."""
        return max(entry.itemsize for entry in (self.target, *self.inputs))


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop`` of the tensor with the index ``tensor``."""

    tensor: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


# Whole tensors, or one part of a tensor larger than a chunk.
Chunk = tuple[Piece, ...]


@dataclass(frozen=True)
class OutputLayout:
    """The output's files.

    Attributes:
        headers: file name -> the bytes before the tensors' data.
        sizes: file name -> size in bytes.
        tensors: in the order in which they are written.
        index: content of the index; None for a single file.
    """

    headers: dict[str, bytes]
    sizes: dict[str, int]
    tensors: tuple[OutputTensor, ...]
    index: dict[str, object] | None

    @property
    def numel(self) -> int:
        """Elements that are fused."""
        return sum(tensor.target.numel for tensor in self.tensors if tensor.fused)


def plan_layout(
    base: Checkpoint, others: Sequence[Mapping[str, Entry]], folder: Path, max_shard_size: int
) -> OutputLayout:
    """Distribute the tensors of ``base`` over files of at most ``max_shard_size`` bytes.

    A larger tensor has a separate file. The files have the names that loaders expect.

    Args:
        base: gives names, dtypes and shapes.
        others: entries of the other inputs, by the same names; importances have none of copied tensors.
        folder: the folder of the targets.
        max_shard_size: maximum bytes of a file.
    """
    split = split_state_dict_into_shards_factory(
        base.tensors,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern=f"{base.stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    headers, sizes, tensors = {}, {}, []
    for file, names in split.filename_to_tensors.items():
        # Wide elements first: every tensor stays aligned to its own element size.
        ordered = sorted(names, key=lambda name: (-base.tensors[name].itemsize, name))
        header, begin = _header(base, ordered)
        headers[file] = header
        for name in ordered:
            entry = base.tensors[name]
            target = Entry(folder / file, entry.dtype, entry.shape, begin, entry.nbytes)
            inputs = (entry, *(other[name] for other in others if name in other))
            tensors.append(OutputTensor(name, target, inputs))
            begin += entry.nbytes
        sizes[file] = begin
    index = None
    if split.is_sharded:
        total = sum(entry.nbytes for entry in base.tensors.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
    return OutputLayout(headers, sizes, tuple(tensors), index)


def _header(base: Checkpoint, names: Sequence[str]) -> tuple[bytes, int]:
    """The header of a safetensors file, and where its data begins."""
    fields: dict[str, object] = {"__metadata__": {**base.metadata, "format": "pt"}}
    begin = 0
    for name in names:
        entry = base.tensors[name]
        fields[name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [begin, begin + entry.nbytes],
        }
        begin += entry.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text)


def plan_chunks(tensors: Sequence[OutputTensor], slot: int, *, fused: bool) -> list[Chunk]:
    """Cut the tensors into chunks, each of at most ``slot`` bytes in every input and in the output.

    Args:
        tensors: the tensors of the layout.
        slot: bytes of a chunk's buffer.
        fused: whether to take the tensors that are fused; otherwise those that are copied.
    """
    chunks: list[Chunk] = []
    pending: list[Piece] = []
    taken = 0
    for index, tensor in enumerate(tensors):
        numel = tensor.target.numel
        if tensor.fused != fused or not numel:
            continue
        size = aligned(numel * tensor.widest)
        if pending and taken + size > slot:
            chunks.append(tuple(pending))
            pending, taken = [], 0
        if size <= slot:
            pending.append(Piece(index, 0, numel))
            taken += size
            continue
        step = slot // tensor.widest // ALIGNMENT * ALIGNMENT
        chunks += [(Piece(index, start, min(start + step, numel)),) for start in range(0, numel, step)]
    if pending:
        chunks.append(tuple(pending))
    return chunks


def aligned(size: int) -> int:
    """``size`` rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def runs(chunks: Sequence[Chunk]) -> list[range]:
    """Ranges of chunks that have whole tensors: all chunks of a cut tensor, or one chunk."""
    starts = [index for index, pieces in enumerate(chunks) if pieces[0].start == 0]
    return [range(*ends) for ends in itertools.pairwise([*starts, len(chunks)])]


def share(chunks: Sequence[Chunk], tensors: Sequence[OutputTensor], rank: int, ranks: int) -> range:
    """The consecutive chunks that process ``rank`` of ``ranks`` works on. Shares have similar sizes.

    No tensor has chunks in two shares, because one process digests it from its first byte to its last.
    """
    sizes = [sum(piece.numel * tensors[piece.tensor].widest for piece in chunk) for chunk in chunks]
    total = sum(sizes)
    starts, done = [0] * ranks, 0
    for run in runs(chunks):
        # A share starts after the last run whose middle does not lie beyond the even split.
        size = sum(sizes[run.start : run.stop])
        for later in range(1, ranks):
            if 2 * done + size <= 2 * total * later // ranks:
                starts[later] = run.stop
        done += size
    return range(starts[rank], starts[rank + 1] if rank + 1 < ranks else len(chunks))
