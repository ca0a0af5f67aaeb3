"""The summary of a fusion."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rkif.checkpoint.input_notes import same_contents
from rkif.checkpoint.preflight import Plan


@dataclass(frozen=True)
class Summary:
    """The result and cost of a fusion, ready for JSON.

    Attributes:
        out: the output's folder.
        tensors, files: counts in the output; ``files`` counts weight files only.
        method, settings, report: as in the manifest. ``report`` has the fields of :class:`rkif.FusionReport`,
            with None for thresholds that are infinite or that the method does not have.
        content_sha256: digest of the output's tensors.
        seconds, cpu_seconds: wall time and CPU time of this process; 0 if the output was complete already.
        read, written: bytes.
        memory: maximum bytes of anonymous memory, including that of Python and PyTorch.
        resumed: whether an interrupted fusion was continued.
        notes: notes to the user: those of the plan, and one for each pair of identical inputs.
    """

    out: str
    tensors: int
    files: int
    method: str
    settings: dict[str, Any]
    report: dict[str, Any]
    content_sha256: str
    seconds: float
    cpu_seconds: float
    read: int
    written: int
    memory: int
    resumed: bool
    notes: list[str]

    @classmethod
    def of(
        cls,
        plan: Plan,
        manifest: dict[str, Any],
        *,
        resumed: bool,
        seconds: float = 0.0,
        cpu_seconds: float = 0.0,
        read: int = 0,
        memory: int = 0,
    ) -> Summary:
        """The summary of a plan whose output has this manifest."""
        identical = same_contents(manifest["inputs"], plan.request.method)
        return cls(
            out=str(plan.request.out),
            tensors=len(plan.layout.tensors),
            files=len(plan.layout.sizes),
            method=manifest["method"],
            settings=manifest["settings"],
            report=manifest["report"],
            content_sha256=manifest["content_sha256"],
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            read=read,
            written=plan.written,
            memory=memory,
            resumed=resumed,
            notes=list(dict.fromkeys([*plan.notes, *identical])),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
