"""Checkpoints on disk: their tensors, with files, offsets and sizes."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rkif.files import parse_json

# Safetensors' names of dtypes. Tensors of the first three are fused; tensors of the others are copied.
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FUSED = ("F32", "BF16", "F16")
BLOCK = 1 << 20  # number of elements that are read and digested at a time


@dataclass(frozen=True)
class Entry:
    """One tensor in a file. ``dtype`` is safetensors' name, ``offset`` the position of its first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's headers and config.

    Attributes:
        path: as given: a folder in Hugging Face layout, or a safetensors file.
        stem: first part of its files' names: "model" or "adapter_model".
        tensors: name -> entry, file by file in the order of the bytes.
        metadata: metadata in the header of the first file.
        config: content of config.json or adapter_config.json; empty if there is none.
        headers: digest of the files' names, sizes and headers.
        files: the files of weights.
        changed: identity and times of change of each file; see :func:`changes`.
    """

    path: Path
    stem: str
    tensors: dict[str, Entry]
    metadata: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    headers: str = ""
    files: tuple[Path, ...] = ()
    changed: tuple[tuple[int, ...], ...] = ()

    @property
    def folder(self) -> Path | None:
        return self.path if self.path.is_dir() else None

    @property
    def name(self) -> str:
        """The Hub's name of a cached snapshot, else the name of the folder or file."""
        parts = self.path.resolve().parts
        if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
            return parts[-3].removeprefix("models--").replace("--", "/")
        return parts[-1].encode("utf-8", "replace").decode()


class InvalidInputError(ValueError):
    """The content of an input cannot be fused, so work that is finished already cannot be used."""


def changes(files: Sequence[Path]) -> tuple[tuple[int, ...], ...]:
    """For each file its inode, and the times of its last change in nanoseconds: content, and inode."""
    stats = [file.stat() for file in files]
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


def open_checkpoint(path: Path, argument: str, problems: list[str]) -> Checkpoint | None:
    """Read the headers of a checkpoint; None if it cannot be opened. Append the reasons to ``problems``."""
    if not path.exists():
        problems.append(f"{argument}: there is no {path}")
        return None
    if path.is_dir():
        weights = _weights_of(path, argument, problems)
        if weights is None:
            return None
        stem, files, weight_map = weights
    else:
        stem = "adapter_model" if path.stem == "adapter_model" else "model"
        files, weight_map = [path], None

    tensors: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    headers = hashlib.sha256()
    for index, file in enumerate(files):
        try:
            entries, file_metadata, header = _read_header(file)
            size = file.stat().st_size
        except (OSError, ValueError) as error:
            other = isinstance(error, ValueError) and file.suffix != ".safetensors"
            reason = "it is not a .safetensors file; give one, or a folder" if other else _reason(error)
            problems.append(f"{argument}: {file} cannot be read: {reason}")
            return None
        headers.update(f"{file.name} {size} {header}\n".encode())
        twice = sorted(entries.keys() & tensors.keys())
        if twice:
            problems.append(f"{argument}: {twice[0]!r} is in {file.name} and in another file")
        tensors |= entries
        metadata = metadata if index else file_metadata
    if weight_map is not None:
        listed = {name: entry.file.name for name, entry in tensors.items()}
        for name in sorted(weight_map.keys() | listed.keys()):
            if weight_map.get(name) != listed.get(name):
                problems.append(
                    f"{argument}: the index has {name!r} in {weight_map.get(name, 'no file')}, "
                    f"but it is in {listed.get(name, 'none of them')}"
                )
    if not tensors:
        problems.append(f"{argument}: {path} holds no tensor")
    config = _config(path, stem, problems)
    return Checkpoint(
        path, stem, tensors, metadata, config, headers.hexdigest(), tuple(files), changes(files)
    )


def _weights_of(
    folder: Path, argument: str, problems: list[str]
) -> tuple[str, list[Path], dict[str, str] | None] | None:
    """Stem, files and, if there is an index, its tensor -> file name; None if there are no weights."""
    for stem in ("model", "adapter_model"):
        if (folder / f"{stem}.safetensors").exists():  # before an index, as transformers and peft load it
            return stem, [folder / f"{stem}.safetensors"], None
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            try:
                weight_map = dict(parse_json(index.read_bytes(), "its text")["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                problems.append(f"{argument}: {index} is not an index: {_reason(error)}")
                return None
            files = [folder / name for name in sorted(set(weight_map.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                problems.append(f"{argument}: {folder} lacks {', '.join(missing)}, which its index names")
                return None
            return stem, files, weight_map
    others = sorted(
        file.name for suffix in ("safetensors", "bin", "pt") for file in folder.glob(f"*.{suffix}")
    )
    seen = f"it has {', '.join(others[:3])}" if others else "it has no weights"
    problems.append(
        f"{argument}: {folder} has neither model.safetensors, adapter_model.safetensors nor an index of "
        f"either ({seen}); other formats are not read"
    )
    return None


def _read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str], str]:
    """The tensors and the metadata of a file, and a digest of its header.

    Raises:
        OSError, ValueError: the file is not readable, or not a complete safetensors file.
    """
    try:
        with safe_open(file, framework="numpy"):  # checks that offsets, shapes and size fit together
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    with file.open("rb") as handle:
        (size,) = struct.unpack("<Q", handle.read(8))
        header = handle.read(size)
    fields = parse_json(header, "its header")
    metadata = fields.pop("__metadata__", {})
    entries = {
        name: Entry(
            file,
            tensor["dtype"],
            tuple(tensor["shape"]),
            8 + size + tensor["data_offsets"][0],
            tensor["data_offsets"][1] - tensor["data_offsets"][0],
        )
        for name, tensor in sorted(fields.items(), key=lambda item: item[1]["data_offsets"][0])
    }
    return entries, metadata, hashlib.sha256(header).hexdigest()


def _config(path: Path, stem: str, problems: list[str]) -> dict[str, Any]:
    file = path / ("config.json" if stem == "model" else "adapter_config.json")
    if not path.is_dir() or not file.exists():
        return {}
    try:
        config = parse_json(file.read_bytes(), "its text")
        if not isinstance(config, dict):
            raise ValueError(f"it must hold a JSON object; got {type(config).__name__}")
    except (OSError, ValueError) as error:
        problems.append(f"{file} cannot be read: {_reason(error)}")
        return {}
    return config


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


class TensorReader:
    """Reads parts of tensors into the caller's memory; keeps the files open until :meth:`close`."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def read(self, entry: Entry, start: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes of the tensor from element ``start`` on.

        Raises:
            OSError: reading failed, or the file ends too early; it names the file.
        """
        if entry.file not in self._descriptors:
            self._descriptors[entry.file] = os.open(entry.file, os.O_RDONLY)
        descriptor = self._descriptors[entry.file]
        offset, done = entry.offset + start * entry.itemsize, 0
        while done < len(into):
            try:
                count = os.preadv(descriptor, [into[done:]], offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(entry.file)) from error
            if count == 0:
                raise OSError(0, "the file ends before its last tensor does", str(entry.file))
            done += count

    def blocks(self, entry: Entry, numel: int) -> Iterator[memoryview]:
        """Yield the bytes of the tensor's first ``numel`` elements; each block is valid until the next."""
        buffer = memoryview(bytearray(min(BLOCK, numel) * entry.itemsize))
        for start in range(0, numel, BLOCK):
            block = buffer[: min(BLOCK, numel - start) * entry.itemsize]
            self.read(entry, start, block)
            yield block

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
