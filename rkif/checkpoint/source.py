"""Checkpoints as they lie on disk: which tensors, where, and their bytes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# Safetensors' names for dtypes. Only the first three are fused; the others are copied if all agree.
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
BLOCK = 1 << 20  # elements that are read at a time where nothing is computed on them


@dataclass(frozen=True)
class Entry:
    """One tensor in a file; ``offset`` is that of its first byte in the file."""

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
    """What is known of a checkpoint from its headers.

    Attributes:
        path: as it was given: a folder in Hugging Face layout, or a safetensors file.
        stem: what its files are called, "model" or "adapter_model".
        tensors: name -> where it is, file by file in the order of the bytes.
        metadata: of the first file's header.
        config: of config.json or adapter_config.json; empty where there is none.
        headers: digest of the files' names, sizes and headers.
        files: all of them.
        changed: of each file which it is and when it was changed; see :func:`changes`.
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
        """The hub's name of a cached snapshot; otherwise that of the folder or file."""
        parts = self.path.resolve().parts
        if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
            return parts[-3].removeprefix("models--").replace("--", "/")
        return parts[-1].encode("utf-8", "replace").decode()


class InvalidInputError(ValueError):
    """What is in the inputs cannot be fused: nothing that was made of them is of use."""


def changes(files: Sequence[Path]) -> tuple[tuple[int, ...], ...]:
    """Inode, nanoseconds of the last change of content and of anything, of each file."""
    found = [file.stat() for file in files]
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for stat in found)


def open_checkpoint(path: Path, argument: str, problems: list[str]) -> Checkpoint | None:
    """Read the headers of a checkpoint; None if it cannot be opened. ``problems`` gains what is wrong."""
    if not path.exists():
        problems.append(f"{argument}: there is no {path}")
        return None
    if path.is_dir():
        found = _files_of(path, argument, problems)
        if found is None:
            return None
        stem, files, weight_map = found
    else:
        stem = "adapter_model" if path.stem == "adapter_model" else "model"
        files, weight_map = [path], None

    tensors: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    headers = hashlib.sha256()
    for number, file in enumerate(files):
        try:
            entries, about, header = _read_header(file)
            size = file.stat().st_size
        except (OSError, ValueError) as error:
            problems.append(f"{argument}: {file} cannot be read: {_reason(error)}")
            return None
        headers.update(f"{file.name} {size} {header}\n".encode())
        twice = sorted(entries.keys() & tensors.keys())
        if twice:
            problems.append(f"{argument}: {twice[0]!r} is in {file.name} and in another file")
        tensors |= entries
        metadata = metadata if number else about
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


def _files_of(
    folder: Path, argument: str, problems: list[str]
) -> tuple[str, list[Path], dict[str, str] | None] | None:
    for stem in ("model", "adapter_model"):
        if (folder / f"{stem}.safetensors").exists():  # before an index, as transformers and peft load it
            return stem, [folder / f"{stem}.safetensors"], None
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            try:
                weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
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
        OSError, ValueError: it is not readable, or not a whole safetensors file.
    """
    try:
        with safe_open(file, framework="numpy"):  # checks that offsets, shapes and size fit together
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    with file.open("rb") as handle:
        (size,) = struct.unpack("<Q", handle.read(8))
        header = handle.read(size)
    fields = json.loads(header)
    metadata = fields.pop("__metadata__", {})
    entries = {
        name: Entry(
            file,
            about["dtype"],
            tuple(about["shape"]),
            8 + size + about["data_offsets"][0],
            about["data_offsets"][1] - about["data_offsets"][0],
        )
        for name, about in sorted(fields.items(), key=lambda item: item[1]["data_offsets"][0])
    }
    return entries, metadata, hashlib.sha256(header).hexdigest()


def _config(path: Path, stem: str, problems: list[str]) -> dict[str, Any]:
    file = path / ("config.json" if stem == "model" else "adapter_config.json")
    if not path.is_dir() or not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds no JSON object, but a {type(config).__name__}")
    except (OSError, ValueError) as error:
        problems.append(f"{file} cannot be read: {_reason(error)}")
        return {}
    return config


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


class Reader:
    """Reads parts of tensors into memory of the caller's; keeps the files open."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def read(self, entry: Entry, start: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes of the tensor from element ``start`` on.

        Raises:
            OSError: naming the file, also where it ends too early.
        """
        if entry.file not in self._descriptors:
            self._descriptors[entry.file] = os.open(entry.file, os.O_RDONLY)
        descriptor, at, done = self._descriptors[entry.file], entry.offset + start * entry.itemsize, 0
        while done < len(into):
            try:
                count = os.preadv(descriptor, [into[done:]], at + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(entry.file)) from error
            if count == 0:
                raise OSError(0, "the file ends before its last tensor does", str(entry.file))
            done += count

    def blocks(self, entry: Entry, numel: int) -> Iterator[memoryview]:
        """The bytes of the tensor's first ``numel`` elements, in memory that the next block uses again."""
        buffer = memoryview(bytearray(min(BLOCK, numel) * entry.itemsize))
        for start in range(0, numel, BLOCK):
            block = buffer[: min(BLOCK, numel - start) * entry.itemsize]
            self.read(entry, start, block)
            yield block

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
