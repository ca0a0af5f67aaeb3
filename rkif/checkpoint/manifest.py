"""The manifest: digests of every byte of an output, and the check against them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from rkif.attest.model_signature import SIGNATURE
from rkif.checkpoint.progress import NullProgress, Progress
from rkif.checkpoint.provenance import PROVENANCE, provenance_problems
from rkif.checkpoint.source import Entry, TensorReader, open_checkpoint
from rkif.files import file_sha256, parse_json, read_text, require_inside, validated, write_text

MANIFEST = "rkif-manifest.json"


Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, AfterValidator(require_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileContent(BaseModel):
    """Types are strict: no value is converted. Unknown keys are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _File(FileContent):
    bytes: Count
    sha256: Sha256


class _Tensor(FileContent):
    file: FileName
    dtype: str
    shape: list[Count]
    sha256: Sha256


class _Manifest(FileContent):
    rkif: str
    method: str
    settings: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    report: dict[str, Any]
    identity_sha256: str
    content_sha256: Sha256
    files: dict[FileName, _File]
    tensors: dict[str, _Tensor]
    manifest_sha256: Sha256


def content_digest(tensors: Mapping[str, tuple[Entry, str]]) -> str:
    """SHA-256 over names, dtypes, shapes and digests of tensors; it does not depend on their files."""
    return _content_digest(
        {name: (entry.dtype, entry.shape, sha256) for name, (entry, sha256) in tensors.items()}
    )


def _content_digest(tensors: Mapping[str, tuple[str, Sequence[int], str]]) -> str:
    digest = hashlib.sha256()
    for name, (dtype, shape, sha256) in sorted(tensors.items()):
        line = json.dumps([name, dtype, shape, sha256], separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def write_manifest(folder: Path, tensors: Mapping[str, tuple[Entry, str]], header: Mapping[str, Any]) -> None:
    """Write the manifest of a folder.

    Args:
        folder: the folder.
        tensors: name -> entry and SHA-256; all other digests are computed here.
        header: further content of the manifest, ready for JSON.
    """
    weights = {entry.file.name for entry, _ in tensors.values()}
    files = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        digest = _header_digest(path) if name in weights else file_sha256(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": digest}
    content = {
        **header,
        "content_sha256": content_digest(tensors),
        "files": files,  # the digest of a file of weights is that of its header
        "tensors": {
            name: {"file": entry.file.name, "dtype": entry.dtype, "shape": entry.shape, "sha256": sha256}
            for name, (entry, sha256) in sorted(tensors.items())
        },
    }
    write_text(folder / MANIFEST, _text(content, _content_sha256(content)))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a folder; without the key "manifest_sha256".

    Raises:
        ValueError: there is none, or it was changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it is not a finished output of rkif fuse")
    text = read_text(path)
    manifest: dict[str, Any] = parse_json(text, path)
    validated(_Manifest, manifest, path)
    written = manifest.pop("manifest_sha256")
    # The text is compared as well, because other texts can have the same content.
    if written != _content_sha256(manifest) or text != _text(manifest, written):
        raise ValueError(f"{path} is damaged: its digest is not that of its content")
    tensors = {name: (t["dtype"], t["shape"], t["sha256"]) for name, t in manifest["tensors"].items()}
    if manifest["content_sha256"] != _content_digest(tensors):
        raise ValueError(f"{path} is damaged: content_sha256 is not the digest of its tensors")
    for name, tensor in manifest["tensors"].items():
        if tensor["file"] not in manifest["files"]:
            raise ValueError(f"{path} is damaged: tensors.{name}.file: {tensor['file']!r} is not in files")
    return manifest


def verify(folder: Path, progress: Progress | None = None) -> list[str]:
    """Compare every byte of an output of ``rkif fuse`` with its manifest; returns a line per difference.

    An added file is a difference, because a loader may read it. Hidden files and folders are ignored.
    The provenance may be missing, but it must be that of this manifest. A signature is not checked.

    Raises:
        ValueError: there is no manifest, or it is damaged.
        OSError: a file cannot be read.
    """
    manifest = read_manifest(folder)
    names = {path.relative_to(folder): path for path in folder.rglob("*")}
    present = {
        name.as_posix()
        for name, path in names.items()
        if (path.is_file() or path.is_symlink()) and not any(part.startswith(".") for part in name.parts)
    }
    progress = progress or NullProgress()
    progress.stage("verifying", sum((folder / name).lstat().st_size for name in present))
    weights = {tensor["file"] for tensor in manifest["tensors"].values()}
    problems, damaged = [], set()
    for name, written in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != written["bytes"]:
            problems.append(f"{name} has {path.stat().st_size:,} bytes; it had {written['bytes']:,}")
        elif name in weights and _header_digest(path) != written["sha256"]:
            problems.append(f"{name}: its header was changed")
        elif name not in weights and file_sha256(path, progress.advance) != written["sha256"]:
            problems.append(f"{name} was changed")
        else:
            continue
        damaged.add(name)
    for file in sorted(weights - damaged):
        checkpoint = open_checkpoint(folder / file, file, problems)
        if checkpoint is not None:
            expected = {name: t["sha256"] for name, t in manifest["tensors"].items() if t["file"] == file}
            problems += _changed_tensors(file, checkpoint.tensors, expected, progress)
    unknown = sorted(present - manifest["files"].keys() - {MANIFEST, PROVENANCE, SIGNATURE})
    problems += provenance_problems(folder, MANIFEST)
    return problems + [f"{name} was added" for name in unknown]


def _changed_tensors(
    file: str, entries: Mapping[str, Entry], digests: Mapping[str, str], progress: Progress
) -> list[str]:
    reader = TensorReader()
    problems = [f"{file}: {name!r} is missing" for name in digests if name not in entries]
    try:
        for name, entry in entries.items():
            digest = hashlib.sha256()
            for block in reader.blocks(entry, entry.numel):
                digest.update(block)
                progress.advance(len(block))
            if name not in digests:
                problems.append(f"{file}: {name!r} is not in the manifest")
            elif digest.hexdigest() != digests[name]:
                problems.append(f"{file}: {name!r} was changed")
    finally:
        reader.close()
    return problems


def _header_digest(path: Path) -> str:
    with path.open("rb") as file:
        size = file.read(8)
        length = min(int.from_bytes(size, "little"), path.stat().st_size)  # the size may have been changed
        return hashlib.sha256(size + file.read(length)).hexdigest()


def _text(content: Mapping[str, Any], digest: str) -> str:
    return json.dumps({**content, "manifest_sha256": digest}, indent=1) + "\n"


def _content_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
