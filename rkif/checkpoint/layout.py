"""Where every tensor goes in the output, and in which chunks the work is done."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory

from rkif.checkpoint.source import FUSED, Checkpoint, Entry

ALIGNMENT = 64  # bytes: where a tensor's part begins in a buffer


@dataclass(frozen=True)
class Tensor:
    """A tensor of the output, with where it comes from.

    Attributes:
        inputs: the entries of base, inner and outer, then of the two importances where they are given.
    """

    name: str
    target: Entry
    inputs: tuple[Entry, ...]

    @property
    def fused(self) -> bool:
        """Whether it is computed on; what is not floating point is copied."""
        return self.target.dtype in FUSED

    @property
    def widest(self) -> int:
        """Bytes of an element in the widest of its places."""
        return max(entry.itemsize for entry in (self.target, *self.inputs))


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop`` of the tensor of that number."""

    tensor: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


# Either whole tensors, or one part of a tensor that is too large for a chunk.
Chunk = tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """The output's files.

    Attributes:
        headers: file name -> the bytes before its tensors' data.
        sizes: file name -> its size in bytes.
        tensors: in the order in which they are written.
        index: content of the index, where there are several files.
    """

    headers: dict[str, bytes]
    sizes: dict[str, int]
    tensors: tuple[Tensor, ...]
    index: dict[str, object] | None

    @property
    def numel(self) -> int:
        """Elements that are fused."""
        return sum(tensor.target.numel for tensor in self.tensors if tensor.fused)


def plan_layout(
    base: Checkpoint, others: Sequence[Mapping[str, Entry]], folder: Path, max_shard_size: int
) -> Layout:
    """Share the tensors of ``base`` out to files of at most ``max_shard_size`` bytes, named for loaders.

    Args:
        others: entries of the other inputs, by the same names; importances may lack what is not fused.
        folder: where the targets lie.
    """
    split = split_state_dict_into_shards_factory(
        base.tensors,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern=f"{base.stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    headers, sizes, tensors = {}, {}, []
    for file, names in split.filename_to_tensors.items():
        # Wide elements first: all stay aligned to their own size.
        ordered = sorted(names, key=lambda name: (-base.tensors[name].itemsize, name))
        header, begin = _header(base, ordered)
        headers[file] = header
        for name in ordered:
            entry = base.tensors[name]
            target = Entry(folder / file, entry.dtype, entry.shape, begin, entry.nbytes)
            inputs = (entry, *(other[name] for other in others if name in other))
            tensors.append(Tensor(name, target, inputs))
            begin += entry.nbytes
        sizes[file] = begin
    index = None
    if split.is_sharded:
        total = sum(entry.nbytes for entry in base.tensors.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
    return Layout(headers, sizes, tuple(tensors), index)


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


def plan_chunks(tensors: Sequence[Tensor], slot: int, *, fused: bool) -> list[Chunk]:
    """Cut the work so that no input of a chunk, and not its output, takes more than ``slot`` bytes.

    Of the tensors that are fused, or of those that are not.
    """
    chunks: list[Chunk] = []
    pending: list[Piece] = []
    taken = 0
    for number, tensor in enumerate(tensors):
        numel = tensor.target.numel
        if tensor.fused != fused or not numel:
            continue
        size = aligned(numel * tensor.widest)
        if pending and taken + size > slot:
            chunks.append(tuple(pending))
            pending, taken = [], 0
        if size <= slot:
            pending.append(Piece(number, 0, numel))
            taken += size
            continue
        step = slot // tensor.widest // ALIGNMENT * ALIGNMENT
        chunks += [(Piece(number, start, min(start + step, numel)),) for start in range(0, numel, step)]
    if pending:
        chunks.append(tuple(pending))
    return chunks


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def runs(chunks: Sequence[Chunk]) -> list[range]:
    """The chunks of each large tensor together, all others one by one."""
    starts = [number for number, pieces in enumerate(chunks) if pieces[0].start == 0]
    return [range(*ends) for ends in itertools.pairwise([*starts, len(chunks)])]


def share(chunks: Sequence[Chunk], tensors: Sequence[Tensor], rank: int, ranks: int) -> range:
    """The chunks that one of several processes works on: neighbours, whole tensors, as many bytes as others.

    A digest goes over a tensor from its first byte to its last, so no tensor has chunks in two shares.
    """
    sizes = [sum(piece.numel * tensors[piece.tensor].widest for piece in chunk) for chunk in chunks]
    total = sum(sizes)
    starts, done = [0] * ranks, 0
    for run in runs(chunks):
        # A share begins with the run that brings what is before it closest to what others have.
        size = sum(sizes[run.start : run.stop])
        for other in range(1, ranks):
            if 2 * done + size <= 2 * total * other // ranks:
                starts[other] = run.stop
        done += size
    return range(starts[rank], starts[rank + 1] if rank + 1 < ranks else len(chunks))
