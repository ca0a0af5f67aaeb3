"""Launch configurations are data: the rows of ``launches.json``, of which a call takes the most specific.

What the rows without a measurement have was chosen by counting bytes and registers:

- 1024 float32 elements over 4 warps are two 16-byte accesses a thread and stream. Several tiles a program
  make one set of atomics, and one entry of the chunk table, serve 8,192 elements: 13e9 parameters are then
  1.6 million chunks and 19 MB of table.
- Fusing holds seven streams in registers, and in a single pass masks and a list: with half the elements a
  thread that is 125 of them, not 200, and more programs fit on a multiprocessor.
- A run of the sample costs a sector of 32 bytes for each of four streams, and a bracket's width falls with
  the square root of their number: one run of eight in 128 scores reads 3 % of all bytes and leaves 0.5 % of
  64 Mi elements undecided, which cost as much again. Neighbours resemble each other, so eight are counted
  as three.
- A program with all scores of a tensor holds 16 per thread. With 32, registers spill, or the program fills a
  multiprocessor.
- Radix selection takes 17 launches for a fusion instead of 7, and reads scores four times; below 2^17
  elements a sample would be most of them.

``python -m bench launches --write`` measures others and adds the rows of the GPU that it ran on.
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
    """What a launch configuration is chosen by.

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
    """A launch configuration, and the calls that it is for.

    Attributes:
        op, architecture, triton, dtypes: as in :class:`Call`, or "*" for any.
        numel_up_to: for so many elements at most; None for any number.
        launch: how the kernels are launched. ``max_registers`` holds for those that pass over all elements.
        bracketing: how thresholds are bracketed, where the operation does that.
        measured: device, shape, ms, share of a copy's bandwidth, and commit; None where nobody measured.
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
        """What no two rows of a file share."""
        return self.op, self.architecture, self.triton, self.dtypes, self.numel_up_to

    def fits(self, call: Call) -> bool:
        names = zip((self.op, self.architecture, self.triton, self.dtypes), call[:4], strict=True)
        fits_size = self.numel_up_to is None or call.numel <= self.numel_up_to
        return fits_size and all(mine in (ANY, its) for mine, its in names)

    @property
    def specificity(self) -> tuple[object, ...]:
        """Of two rows that fit, the one with the larger value wins.

        The first of these that tells them apart decides: whether the operation is named, the architecture,
        the version of Triton, the dtypes; and at last the smaller size.
        """
        named = (name != ANY for name in (self.op, self.architecture, self.triton, self.dtypes))
        return *named, -float("inf") if self.numel_up_to is None else -self.numel_up_to


def choose(found: Iterable[Row], call: Call) -> Row:
    """The most specific row that fits; there is one for any call."""
    return max((row for row in found if row.fits(call)), key=lambda row: row.specificity)


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
    """Put rows into a file, in place of those with the same keys."""
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
        roles: the operation's lists; None for one that is missing. The first tensor of each counts.
        numel: elements of one list.
    """
    firsts = [next((t for t in role if t is not None), None) for role in roles if role is not None]
    there = [tensor for tensor in firsts if tensor is not None]
    return _chosen(op, there[0].device, tuple(tensor.dtype for tensor in there), numel)


def default(op: str) -> Row:
    """The row for calls that nobody has measured."""
    return choose(rows(), Call(op, "", "", "", 2**63))


def default_bracketing() -> Bracketing:
    """How a fusion that nobody has measured brackets its thresholds."""
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
    """As rows name it; see :class:`Call`."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def triton_version() -> str:
    """As rows name it: major and minor version."""
    return ".".join(triton.__version__.split(".")[:2])
