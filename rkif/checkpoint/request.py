"""The request for a fusion, and the check of its output path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from rkif.checkpoint.manifest import MANIFEST
from rkif.checkpoint.methods import Method, settings_of
from rkif_kernels import CASES, require_choice

Space = Literal["factor", "delta"]

CPU = torch.device("cpu")
IMPORTANCES = ("--inner-importance", "--outer-importance")


class PreflightError(ValueError):
    """The inputs cannot be fused as requested; ``problems`` has a line for each reason."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = f"{len(problems)} problems; the first: " if len(problems) > 1 else ""
        super().__init__(f"{count}{problems[0]}")


@dataclass(frozen=True)
class Request:
    """The inputs, output, method and limits of a fusion.

    Attributes:
        base: folder in Hugging Face layout, or safetensors file; gives the output its layout and dtypes.
        models: the other checkpoints: INNER and OUTER, or ``method.models`` models.
        out: the output's folder; it must not exist, or must be empty.
        method: from :func:`rkif.checkpoint.methods.make_method`.
        inner_importance, outer_importance: folders or files with scores by the parameters' names; both or
            neither. Without them the scores are the magnitudes of the task vectors.
        max_memory: bytes of anonymous memory that the process may use, including those in use already. With a
            GPU, this also bounds the buffers in the GPU's memory.
        max_shard_size: maximum bytes of a file of the output.
        device: the device that computes.
        resume: continue an interrupted fusion to the same folder.
        space: "factor" merges each tensor, "delta" the weight updates B·A of LoRA adapters.
    """

    base: Path
    models: tuple[Path, ...]
    out: Path
    method: Method
    inner_importance: Path | None = None
    outer_importance: Path | None = None
    max_memory: int = 2 << 30
    max_shard_size: int = 5 * 10**9
    device: torch.device = CPU
    resume: bool = False
    space: Space = "factor"

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(os.path.abspath(self.out)))
        require_choice("space", self.space, get_args(Space))
        if len(self.models) != self.method.models:
            raise ValueError(f"the method merges {self.method.models} models; got {len(self.models)}")

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Names of the base and the models in messages and metadata."""
        if self.method.name == "wsm":
            return tuple(f"CHECKPOINT {index + 1}" for index in range(len(self.models) + 1))
        if len(self.models) == 2:
            return ("BASE", "INNER", "OUTER")
        return ("BASE", *(f"MODEL {index + 1}" for index in range(len(self.models))))

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings and the space, ready for JSON."""
        return settings_of(self.method) | ({"space": "delta"} if self.space == "delta" else {})

    @property
    def inputs(self) -> dict[str, Path]:
        """Argument -> path, in the order of their roles, without importances that are not given."""
        paths = (self.base, *self.models, self.inner_importance, self.outer_importance)
        arguments = (*self.checkpoints, *IMPORTANCES)
        return {argument: path for argument, path in zip(arguments, paths, strict=True) if path is not None}

    @property
    def cases(self) -> tuple[str, ...]:
        """Names of the counts of a report: the models that select an element, or their number."""
        if self.method.name == "wsm":
            return ("all",)
        return CASES if len(self.models) == 2 else tuple(map(str, range(len(self.models) + 1)))

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms of a report: of the task vectors, and of the update."""
        models = self.checkpoints[1:]
        return (*(("inner", "outer") if models == ("INNER", "OUTER") else models), "update")


def check_out(request: Request, problems: list[str]) -> None:
    """Append to ``problems`` the reasons why the output cannot be written to ``request.out``."""
    out = request.out
    finished = request.resume and (out / MANIFEST).exists()
    if out.is_symlink() or os.path.ismount(out):
        problems.append(f"--out: {out} is a link or a mount point; no folder can be renamed to it")
    elif out.exists() and not out.is_dir():
        problems.append(f"--out: {out} is a file")
    elif out.is_dir() and any(out.iterdir()) and not finished:
        problems.append(f"--out: {out} exists; name another folder, or remove it")
    for argument, path in request.inputs.items():
        if path.exists() and out.resolve() == path.resolve():
            problems.append(f"--out: {out} is {argument}")
    parent = existing_parent(out)
    if not parent.is_dir():
        problems.append(f"--out: {parent} is not a folder")


def existing_parent(path: Path) -> Path:
    """The nearest parent of a path that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())
