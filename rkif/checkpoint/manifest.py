"""The manifest: digests of every byte of an output, and the check against them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkif.checkpoint.progress import NullProgress, Progress
from rkif.checkpoint.source import Entry, TensorReader, open_checkpoint
from rkif.files import write_text

MANIFEST = "rkif-manifest.json"
_BLOCK = 1 << 22  # bytes that are read at a time


def content_digest(tensors: Mapping[str, tuple[Entry, str]]) -> str:
    """SHA-256 over names, dtypes, shapes and digests of tensors; it does not depend on their files."""
    digest = hashlib.sha256()
    for name, (entry, sha256) in sorted(tensors.items()):
        line = json.dumps([name, entry.dtype, entry.shape, sha256], separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def write_manifest(folder: Path, tensors: Mapping[str, tuple[Entry, str]], header: Mapping[str, Any]) -> None:
    """Write the manifest of a folder.

    Args:
        tensors: entry and SHA-256 by name; all other digests are computed here.
        header: further content of the manifest, ready for JSON.
    """
    weights = {entry.file.name for entry, _ in tensors.values()}
    files = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        digest = _header_digest(path) if name in weights else _file_digest(path, NullProgress())
        files[name] = {"bytes": path.stat().st_size, "sha256": digest}
    content = {
        **header,
        "content_sha256": content_digest(tensors),
        "files": files,  # for files of weights, the digest of the header
        "tensors": {
            name: {"file": entry.file.name, "dtype": entry.dtype, "shape": entry.shape, "sha256": sha256}
            for name, (entry, sha256) in sorted(tensors.items())
        },
    }
    write_text(folder / MANIFEST, _text(content, _content_sha256(content)))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ValueError: there is none, or it was changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it is not a finished output of rkif fuse")
    try:
        text = path.read_bytes().decode()
        manifest = dict(json.loads(text))
        written = manifest.pop("manifest_sha256")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    # The text is compared, too: other texts have the same content.
    if written != _content_sha256(manifest) or text != _text(manifest, written):
        raise ValueError(f"{path} is damaged: its digest is not that of its content")
    return manifest


def verify(folder: Path, progress: Progress | None = None) -> list[str]:
    """Read every byte of an output of ``rkif fuse``; returns a line for each difference from its manifest.

    Raises:
        ValueError: there is no manifest, or it is damaged.
        OSError: a file cannot be read.
    """
    manifest = read_manifest(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    progress = progress or NullProgress()
    progress.stage("verifying", sum((folder / name).stat().st_size for name in present))
    weights = {tensor["file"] for tensor in manifest["tensors"].values()}
    problems, damaged = [], set()
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{name} has {path.stat().st_size:,} bytes; it had {expected['bytes']:,}")
        elif name in weights and _header_digest(path) != expected["sha256"]:
            problems.append(f"{name}: its header was changed")
        elif name not in weights and _file_digest(path, progress) != expected["sha256"]:
            problems.append(f"{name} was changed")
        else:
            continue
        damaged.add(name)
    for file in sorted(weights - damaged):
        checkpoint = open_checkpoint(folder / file, file, problems)
        if checkpoint is not None:
            problems += _changed_tensors(checkpoint.tensors, manifest["tensors"], progress)
    unknown = sorted(present - manifest["files"].keys() - {MANIFEST})
    problems += [f"{name} was not there" for name in unknown if name.endswith((".safetensors", ".json"))]
    return problems


def _changed_tensors(
    entries: Mapping[str, Entry], tensors: Mapping[str, Any], progress: Progress
) -> list[str]:
    reader = TensorReader()
    problems = []
    try:
        for name, entry in entries.items():
            digest = hashlib.sha256()
            for block in reader.blocks(entry, entry.numel):
                digest.update(block)
                progress.advance(len(block))
            if digest.hexdigest() != tensors[name]["sha256"]:
                problems.append(f"{entry.file.name}: {name!r} was changed")
    finally:
        reader.close()
    return problems


def _header_digest(path: Path) -> str:
    with path.open("rb") as file:
        size = file.read(8)
        length = min(int.from_bytes(size, "little"), path.stat().st_size)  # the size may have been changed
        return hashlib.sha256(size + file.read(length)).hexdigest()


def _file_digest(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress.advance(len(block))
    return digest.hexdigest()


def _text(content: Mapping[str, Any], digest: str) -> str:
    return json.dumps({**content, "manifest_sha256": digest}, indent=1) + "\n"


def _content_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
