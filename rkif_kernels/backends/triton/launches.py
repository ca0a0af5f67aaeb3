"""The launch configurations of ``launches.json``. A call takes the most specific row that fits it.

The rows without a measurement were chosen by counting bytes and registers:

- 1024 float32 elements over 4 warps are two 16-byte accesses per thread and stream. With several tiles per
  program, one set of atomics and one entry of the chunk table serve 8,192 elements. Then 13e9 parameters are
  1.6 million chunks, with a table of 19 MB.
- A fusion holds seven streams in registers. In a single pass, it also holds masks and a list. With half as
  many elements per thread, it needs 125 registers instead of 200, so more programs fit on a multiprocessor.
- A run of the sample reads a sector of 32 bytes of each of four streams. The width of a bracket falls with
  the square root of the number of runs. With one run of eight per 128 scores, the sample is 3 % of all bytes,
  and 0.5 % of 64 Mi elements are undecided, which costs about as much again. Neighbours are correlated, so
  eight count as about three.
- A program with all scores of a tensor holds 16 per thread. With 32, registers spill, or the program fills a
  multiprocessor.
- Radix selection takes 17 launches for a fusion instead of 7, and reads scores four times. It is used below
  2^17 elements, where samples are a larger part of the scores.

``python -m bench launches --write`` measures other configurations, and adds rows for the GPU that it runs on.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rkif_kernels.backends.triton.launch import Bracketing, LaunchConfig

FILE = Path(__file__).with_name("launches.json")
ANY = "*"


class Call(NamedTuple):
    """The properties of a call that its launch configuration depends on.

    Attributes:
        op: "observe", "adamw", "threshold", "whole" (a threshold of a tensor by one program), "radix", "fuse"
            (with its thresholds), "merge" (thresholds given), "count" or "valid".
        architecture: as in "sm_90" or "gfx942"; the type of a device that is not a GPU.
        triton: major and minor version.
        dtypes: of the operation's lists in their order, each once, as in "bfloat16+float32".
        numel: elements of all tensors together.
    """

    op: str
    architecture: str
    triton: str
    dtypes: str
    numel: int


@dataclass(frozen=True)
class Row:
    """A launch configuration, and the calls that it applies to.

    Attributes:
        op, architecture, triton, dtypes: as in :class:`Call`, or "*" for any.
        numel_up_to: maximum number of elements; None for any number.
        launch: how the kernels are launched. ``max_registers`` applies to passes over all elements.
        bracketing: how thresholds are bracketed; None for operations without brackets.
        measured: device, shape, ms, share of a copy's bandwidth, and commit; None without a measurement.
    """

    op: str
    architecture: str
    triton: str
    dtypes: str
    numel_up_to: int | None
    launch: LaunchConfig
    bracketing: Bracketing | None = None
    measured: Mapping[str, Any] | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """The key of a row, which is unique in a file."""
        return self.op, self.architecture, self.triton, self.dtypes, self.numel_up_to

    def fits(self, call: Call) -> bool:
        names = zip((self.op, self.architecture, self.triton, self.dtypes), call[:4], strict=True)
        fits_size = self.numel_up_to is None or call.numel <= self.numel_up_to
        return fits_size and all(mine in (ANY, its) for mine, its in names)

    @property
    def specificity(self) -> tuple[object, ...]:
        """The row with the largest value is the most specific.

        Rows are compared by what they name, in this order: operation, architecture, version of Triton,
        dtypes. Of rows that name the same, the one for the smaller size is more specific.
        """
        named = (name != ANY for name in (self.op, self.architecture, self.triton, self.dtypes))
        return *named, -float("inf") if self.numel_up_to is None else -self.numel_up_to


def choose(rows: Iterable[Row], call: Call) -> Row:
    """The most specific row that fits; at least one row fits any call."""
    return max((row for row in rows if row.fits(call)), key=lambda row: row.specificity)


def read(file: Path) -> list[Row]:
    """The rows of a file."""
    return [
        Row(
            **{key: row[key] for key in ("op", "architecture", "triton", "dtypes", "numel_up_to")},
            launch=LaunchConfig(**row["launch"]),
            bracketing=Bracketing(**row["bracketing"]) if "bracketing" in row else None,
            measured=row["measured"],
        )
        for row in json.loads(file.read_text(encoding="utf-8"))
    ]


def write(file: Path, new: Iterable[Row]) -> None:
    """Write rows to a file, in place of those with the same keys."""
    lines = []
    for row in {row.key: row for row in (*read(file), *new)}.values():
        fields = asdict(row)
        if row.bracketing is None:
            del fields["bracketing"]
        lines.append(json.dumps(fields))
    temporary = file.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    temporary.replace(file)


def chosen(op: str, roles: Sequence[Sequence[Tensor | None] | None], numel: int) -> Row:
    """The row for a call.

    Args:
        op: see :class:`Call`.
        roles: the operation's lists; None for a missing list. The first tensor of each gives its dtype.
        numel: elements of one list.
    """
    firsts = [next((t for t in role if t is not None), None) for role in roles if role is not None]
    present = [tensor for tensor in firsts if tensor is not None]
    return _chosen(op, present[0].device, tuple(tensor.dtype for tensor in present), numel)


def default(op: str) -> Row:
    """The row for calls without a measured row."""
    return choose(rows(), Call(op, "", "", "", 2**63))


def default_bracketing() -> Bracketing:
    """The bracketing of a fusion without a measured row."""
    bracketing = default("fuse").bracketing
    assert bracketing is not None
    return bracketing


@functools.cache
def rows() -> tuple[Row, ...]:
    """All rows."""
    return tuple(read(FILE))


@functools.lru_cache(maxsize=256)
def _chosen(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...], numel: int) -> Row:
    names = "+".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return choose(rows(), Call(op, architecture(device), triton_version(), names, numel))


def architecture(device: torch.device) -> str:
    """The name of a device's architecture in rows; see :class:`Call`."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def triton_version() -> str:
    """The version of Triton in rows: major and minor version."""
    return ".".join(triton.__version__.split(".")[:2])
