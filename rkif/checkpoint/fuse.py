"""The fusion of checkpoints: scan, fuse chunk by chunk, publish."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rkif.checkpoint.card import copy_companions, write_card
from rkif.checkpoint.digests import EMPTY, Digests
from rkif.checkpoint.layout import Chunk, share
from rkif.checkpoint.manifest import MANIFEST, content_digest, read_manifest, write_manifest
from rkif.checkpoint.methods import ScanResult, settings_of
from rkif.checkpoint.preflight import Plan
from rkif.checkpoint.process_memory import anonymous_memory
from rkif.checkpoint.scan import Scan, are_valid_scores, make_scan
from rkif.checkpoint.scores import ROLES, guess_thresholds, invalid_input, scores_of
from rkif.checkpoint.source import InvalidInputError, changes
from rkif.checkpoint.stream import IN_FLIGHT, Buffers, Loader, as_bytes, parts
from rkif.checkpoint.tiles import tiles
from rkif.checkpoint.workdir import Workdir, clear
from rkif.distributed.process_group import ALONE, ProcessGroup
from rkif.files import fsync_file, write_text
from rkif_kernels import CASES

OUT = "OUT"  # the output's name among the arguments


class Progress(Protocol):
    """Who is told how far the work has come."""

    def stage(self, what: str, total: int) -> None:
        """Something begins that goes over so many bytes."""

    def advance(self, size: int) -> None:
        """So many more of them are done."""


class NullProgress:
    def stage(self, what: str, total: int) -> None: ...

    def advance(self, size: int) -> None: ...


@dataclass(frozen=True)
class Summary:
    """What was done, ready for JSON.

    Attributes:
        out: the folder.
        tensors, files: of weights.
        method, settings, report: as in the manifest; ``report`` has the fields of :class:`rkif.FusionReport`,
            with None for thresholds that are infinite or that the method has not.
        content_sha256: digest of the output's tensors.
        seconds, cpu_seconds: of this process's work, 0 where all was done before.
        read, written: bytes.
        memory: most bytes of anonymous memory seen, what Python and PyTorch take themselves included.
        resumed: whether a part had been done before.
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fuse_checkpoints(
    plan: Plan, progress: Progress | None = None, processes: ProcessGroup = ALONE
) -> Summary:
    """Do what :func:`preflight` has planned.

    ``request.out`` is made in one step when everything is complete; until then the work is in
    ``OUT.partial``, from where an interrupted fusion is resumed with the same bytes as result.

    Several processes share the work, on one file system, with the same bytes as result: all of them call,
    with the same request. An interrupted fusion may be resumed by as many or by others.

    Raises:
        ValueError: the inputs are not finite, or the output exists.
        RuntimeError: another process writes it, there is work that cannot be resumed, or another of the
            processes that share the work has failed.
        OSError: reading or writing failed; what was done is kept, to be resumed.
    """
    begun, cpu = time.perf_counter(), time.process_time()
    out = plan.request.out
    if plan.request.resume and (out / MANIFEST).exists():
        manifest = read_manifest(out)
        made = (out / MANIFEST).stat().st_mtime_ns
        if manifest["identity_sha256"] == plan.identity and plan.last_change <= made:
            clear(out)
            return _summary(plan, manifest, 0.0, 0.0, 0, 0, resumed=True)
    # PyTorch's threads spin while they wait for the next small tile; kernels that stream have their own.
    threads = _threads(None if plan.request.method.streams else 1)
    # Every process has memory of its own, but all must cut the work alike.
    plan = plan.cut(int(processes.all_gather(torch.tensor([plan.slot])).min()))
    workdir = Workdir(out, plan.journal_identity, plan.slot, resume=plan.request.resume, processes=processes)
    with threads, workdir as work, processes.propagate_failure():
        resumed = bool(work.records)
        fusion = _Fusion(plan, work, progress or NullProgress(), processes)
        try:
            fusion.fuse(fusion.scan())
            with processes.raise_on_any_failure():  # all chunks are on disk
                pass
            with processes.raise_on_any_failure():
                if processes.rank == 0:
                    fusion.finish()
                    _require_unchanged(plan)
        finally:
            fusion.close()
        manifest = read_manifest(work.data)
        with processes.raise_on_any_failure():  # all have read it
            pass
        if processes.rank == 0:
            work.publish(plan.layout.sizes)
    taken, cpu_taken = time.perf_counter() - begun, time.process_time() - cpu
    read = int(processes.all_reduce_sum(torch.tensor(fusion.read)))
    memory = int(processes.all_gather(torch.tensor([fusion.memory])).max())
    return _summary(plan, manifest, taken, cpu_taken, read, memory, resumed=resumed)


def _require_unchanged(plan: Plan) -> None:
    for argument, checkpoint in plan.checkpoints.items():
        if changes(checkpoint.files) != checkpoint.changed:
            raise InvalidInputError(
                f"{argument}: {checkpoint.path} was changed meanwhile; nothing was published"
            )


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch computes on so many inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _summary(
    plan: Plan,
    manifest: dict[str, Any],
    seconds: float,
    cpu_seconds: float,
    read: int,
    memory: int,
    *,
    resumed: bool,
) -> Summary:
    return Summary(
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
    )


class _Fusion:
    """One process's work on one plan in one folder."""

    def __init__(self, plan: Plan, work: Workdir, progress: Progress, processes: ProcessGroup) -> None:
        self._plan, self._work, self._progress, self._processes = plan, work, progress, processes
        self._method, self._tensors = plan.request.method, plan.layout.tensors
        self._names = [tensor.name for tensor in self._tensors]
        self._device = plan.request.device
        self._chunks = [*plan.chunks, *plan.copies]
        self._own = share(self._chunks, self._tensors, processes.rank, processes.size)
        self.read = 0
        self.memory = 0
        with processes.raise_on_any_failure():
            if processes.rank == 0:
                work.allocate(plan.layout.sizes)
        self._files = {name: os.open(work.data / name, os.O_WRONLY) for name in plan.layout.sizes}
        if processes.rank == 0:
            for name, header in plan.layout.headers.items():
                os.pwrite(self._files[name], header, 0)
        slots = [Buffers(len(plan.checkpoints), plan.slot, self._device) for _ in range(IN_FLIGHT)]
        self._loader = Loader(self._tensors, self._chunks, slots)

    def close(self) -> None:
        self._loader.close()
        for descriptor in self._files.values():
            os.close(descriptor)

    def scan(self) -> ScanResult:
        """Find out what the method must know of all elements, or go on with it."""
        scan, begin = self._scan(), None
        recorded = self._work.recorded_scan()
        if recorded is not None:
            scan.restore(recorded[0])
        # Where a kill has left the processes at different passes, all begin anew: the counts are sums.
        if len(set(self._processes.all_gather(torch.tensor([scan.passes])).tolist())) > 1:
            scan = self._scan()
        elif recorded is not None:
            begin = recorded[1]["next"]
        while (chunks := scan.next_pass()) is not None:
            left = range(chunks.start if begin is None else begin, chunks.stop)
            self._progress.stage("scanning", sum(map(self._bytes, left)))
            for number, buffers, _ in self._loader.load(left, lambda number, rows: None):
                rows = self._loader.inputs(number, buffers.arrived())
                for tile in tiles(self._chunks[number], rows, None, self._plan.scan_tile, self._names):
                    if not scan.observe(tile, scores_of(self._method, tile)):
                        raise invalid_input(self._tensors, tile)
                self._work.record_scan(scan.state(), {"next": number + 1})
                self._done(number)
            scan.end_pass()
            begin = None
            self._work.record_scan(scan.state(), {"next": None})
        return scan.result()

    def _scan(self) -> Scan:
        fused = range(self._own.start, min(self._own.stop, len(self._plan.chunks)))
        return make_scan(
            self._method,
            self._tensors,
            self._plan.chunks,
            lambda: guess_thresholds(self._method, self._tensors),
            own=fused,
            processes=self._processes,
        )

    def fuse(self, scan_result: ScanResult) -> None:
        """Compute, write and record chunk by chunk."""
        if scan_result.thresholds is not None:
            scan_result = scan_result._replace(thresholds=scan_result.thresholds.to(self._device))
        self._scan_result = scan_result
        arguments = list(self._plan.checkpoints)
        done = {record["chunk"] for record in self._work.records if "chunk" in record}
        left = [number for number in self._own if number not in done]
        of_inputs = Digests(self._tensors, lambda tensor: tensor.inputs)
        of_output = Digests(self._tensors, lambda tensor: [tensor.target])
        outs = [Buffers(1, self._plan.slot, self._device) for _ in range(IN_FLIGHT)]

        def digest(number: int, rows: list[list[Tensor]]) -> list[dict[str, str]]:
            return of_inputs.add(self._chunks[number], rows)

        def write(number: int, out: Buffers, found: list[dict[str, str]], stats: dict[str, Any]) -> None:
            row = self._write(number, out.host[0])
            found += of_output.add(self._chunks[number], [row])
            names = [*arguments[: len(found) - 1], OUT]
            self._work.record({"chunk": number, **stats, "digests": dict(zip(names, found, strict=True))})

        self._progress.stage("fusing", sum(map(self._bytes, left)))
        with ThreadPoolExecutor(1, "rkif-write") as writer:
            writing: Future[None] | None = None
            for turn, (number, buffers, found) in enumerate(self._loader.load(left, digest)):
                self._processes.check_peers()
                out = outs[turn % IN_FLIGHT]
                stats = self._compute(number, buffers, out)
                if writing is not None:
                    writing.result()  # so that a kill undoes no more than one chunk that was computed
                writing = writer.submit(write, number, out, found, stats)
                self._done(number)
            if writing is not None:
                writing.result()

    @property
    def _fused(self) -> dict[str, Any]:
        """The sum of what was recorded of the fusion, in the order of the chunks, whoever did them."""
        total: dict[str, Any] = {"counts": [0] * len(CASES), "squared_norms": [0.0] * 3, "digests": {}}
        records = {record["chunk"]: record for record in self._work.records if "chunk" in record}
        for _, record in sorted(records.items()):
            for key in ("counts", "squared_norms"):
                total[key] = [a + b for a, b in zip(total[key], record[key], strict=True)]
            for argument, found in record["digests"].items():
                total["digests"].setdefault(argument, {}).update(found)
        return total

    def _compute(self, number: int, buffers: Buffers, out: Buffers) -> dict[str, Any]:
        """Fill a chunk's output; what is counted and summed on the way."""
        chunk = self._chunks[number]
        rows = self._loader.inputs(number, buffers.arrived())
        targets = parts(chunk, [self._tensors[piece.tensor].target for piece in chunk], out.here()[0])
        counts, norms = [0] * len(CASES), [0.0] * 3
        if number >= len(self._plan.chunks):
            self._copy(chunk, rows, targets)
        else:
            for tile in tiles(chunk, rows, targets, self._plan.tile, self._names):
                scores = scores_of(self._method, tile)
                scanned = tile.importance is None or self._method.needs_threshold
                if not scanned and not all(map(are_valid_scores, scores)):
                    raise invalid_input(self._tensors, tile)
                stats = self._method.fuse(tile, scores, self._scan_result)
                squared = stats.squared_norms.tolist()
                if not all(map(math.isfinite, squared)):  # nor is an input, or a result
                    raise invalid_input(self._tensors, tile)
                counts = [a + b for a, b in zip(counts, stats.counts.tolist(), strict=True)]
                norms = [a + b for a, b in zip(norms, squared, strict=True)]
        out.fetch()
        return {"counts": counts, "squared_norms": norms}

    def _copy(self, chunk: Chunk, rows: list[list[Tensor]], targets: list[Tensor]) -> None:
        for position, piece in enumerate(chunk):
            base, *others = (row[position] for row in rows)
            for argument, other in zip(ROLES[1:], others, strict=False):
                if not torch.equal(base, other):
                    tensor = self._tensors[piece.tensor]
                    raise InvalidInputError(
                        f"{tensor.name!r} is {tensor.target.dtype}, which is copied, not fused, but "
                        f"{argument} has other values in it than BASE; nothing was published"
                    )
            targets[position].copy_(base)

    def _write(self, number: int, buffer: Tensor) -> list[Tensor]:
        """Bring a chunk's output to disk; returns its parts."""
        chunk = self._chunks[number]
        entries = [self._tensors[piece.tensor].target for piece in chunk]
        row = parts(chunk, entries, buffer)
        for piece, entry, part in zip(chunk, entries, row, strict=True):
            content, done = as_bytes(part), 0
            at = entry.offset + piece.start * entry.itemsize
            try:
                while done < len(content):
                    done += os.pwrite(self._files[entry.file.name], content[done:], at + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(entry.file)) from error
        for name in {entry.file.name for entry in entries}:
            os.fdatasync(self._files[name])
        return row

    def _bytes(self, number: int) -> int:
        """Bytes of a chunk's inputs."""
        chunk = self._chunks[number]
        return sum(
            piece.numel * entry.itemsize for piece in chunk for entry in self._tensors[piece.tensor].inputs
        )

    def _done(self, number: int) -> None:
        size = self._bytes(number)
        self.read += size
        self.memory = max(self.memory, anonymous_memory())
        self._progress.advance(size)

    def finish(self) -> None:
        """Write what belongs beside the weights."""
        self._work.read_all()
        folder, base = self._work.data, self._plan.checkpoints["BASE"]
        for path in folder.iterdir():
            if path.name in self._files:
                fsync_file(path)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()  # of an earlier try, perhaps half a file
        if self._plan.layout.index is not None:
            write_text(
                folder / f"{base.stem}.safetensors.index.json", json.dumps(self._plan.layout.index, indent=2)
            )
        copy_companions(base, folder)
        fused = self._fused
        contents = {
            argument: {
                name: (entry, fused["digests"].get(argument, {}).get(name, EMPTY))
                for name, entry in checkpoint.tensors.items()
            }
            for argument, checkpoint in self._plan.checkpoints.items()
        }
        inputs = {
            argument: {"name": checkpoint.name, "content_sha256": content_digest(contents[argument])}
            for argument, checkpoint in self._plan.checkpoints.items()
        }
        tensors = {
            tensor.name: (tensor.target, fused["digests"].get(OUT, {}).get(tensor.name, EMPTY))
            for tensor in self._tensors
        }
        method, settings, report = self._method.name, settings_of(self._method), self._report(fused)
        write_card(folder, base, inputs, method, settings, report, content_digest(tensors))
        about = {
            "rkif": importlib.metadata.version("rkif"),
            "method": method,
            "settings": settings,
            "inputs": inputs,
            "report": report,
            "identity_sha256": self._plan.identity,
        }
        write_manifest(folder, tensors, about)

    def _report(self, fused: dict[str, Any]) -> dict[str, Any]:
        """A :class:`rkif.FusionReport` as JSON has it; norms to six digits: the last depend on the chunks."""
        sides: list[Any] = [None, None]
        if self._scan_result.thresholds is not None:
            for side, row in enumerate(self._scan_result.thresholds.tolist()):
                values = [value if math.isfinite(value) else None for value in row]
                named = dict(zip((tensor.name for tensor in self._tensors), values, strict=False))
                sides[side] = values[0] if self._method.scope == "global" else named
        norms = [float(f"{math.sqrt(value):.6g}") for value in fused["squared_norms"]]
        return {
            "numel": self._plan.layout.numel,
            "thresholds": sides,
            "counts": dict(zip(CASES, fused["counts"], strict=True)),
            "norms": dict(zip(("inner", "outer", "update"), norms, strict=True)),
        }
