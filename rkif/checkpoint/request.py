"""What is to be fused, and how; whether the output may be made there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from rkif.checkpoint.manifest import MANIFEST
from rkif.checkpoint.methods import Method

CPU = torch.device("cpu")


class PreflightError(ValueError):
    """The inputs cannot be fused as asked; ``problems`` says all that is wrong, a line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = f"{len(problems)} problems; the first: " if len(problems) > 1 else ""
        super().__init__(f"{count}{problems[0]}")


@dataclass(frozen=True)
class Request:
    """What is to be fused, and how.

    Attributes:
        base, inner, outer: folders in Hugging Face layout, or safetensors files.
        out: the folder to be made; it must not exist.
        method: from :func:`rkif.checkpoint.methods.make_method`.
        inner_importance, outer_importance: the same with scores under the parameters' names; both or
            neither. Without them the scores are the magnitudes of the task vectors.
        max_memory: bytes of anonymous memory that the process may use, what it has already included. On a
            GPU, also the bytes of its memory for buffers.
        max_shard_size: bytes of a file of the output.
        device: what computes.
        resume: go on with an interrupted fusion to the same folder.
    """

    base: Path
    inner: Path
    outer: Path
    out: Path
    method: Method
    inner_importance: Path | None = None
    outer_importance: Path | None = None
    max_memory: int = 2 << 30
    max_shard_size: int = 5 * 10**9
    device: torch.device = CPU
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(os.path.abspath(self.out)))


def require_out(request: Request, problems: list[str]) -> None:
    out = request.out
    finished = request.resume and (out / MANIFEST).exists()
    if out.is_symlink() or os.path.ismount(out):
        problems.append(f"--out: {out} is a link or a mount point, which no folder can be renamed to")
    elif out.exists() and not out.is_dir():
        problems.append(f"--out: {out} is a file")
    elif out.is_dir() and any(out.iterdir()) and not finished:
        problems.append(f"--out: {out} exists; name another folder, or remove it")
    for argument, path in (("BASE", request.base), ("INNER", request.inner), ("OUTER", request.outer)):
        if path.exists() and out.resolve() == path.resolve():
            problems.append(f"--out: {out} is {argument}")
    parent = existing_parent(out)
    if not parent.is_dir():
        problems.append(f"--out: {parent} is not a folder")


def existing_parent(path: Path) -> Path:
    """The nearest of a path's parents that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())
