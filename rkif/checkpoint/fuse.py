"""The fusion of checkpoints: scan, fuse chunk by chunk, publish."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from rkif.checkpoint.delta import fuse_updates
from rkif.checkpoint.digests import Digests
from rkif.checkpoint.layout import share
from rkif.checkpoint.loader import LoadedChunk, Loader
from rkif.checkpoint.manifest import MANIFEST, read_manifest
from rkif.checkpoint.metadata import write_metadata
from rkif.checkpoint.methods import ScanResult
from rkif.checkpoint.output import OutputWriter
from rkif.checkpoint.preflight import Plan
from rkif.checkpoint.progress import NullProgress, Progress, ProgressMeter
from rkif.checkpoint.provenance import InputDigests, input_files, timestamp, write_provenance
from rkif.checkpoint.scan import Scan, are_valid_scores, make_scan
from rkif.checkpoint.scores import invalid_input, scores_of
from rkif.checkpoint.source import InvalidInputError, changes
from rkif.checkpoint.summary import Summary
from rkif.checkpoint.tiles import Tile, tiles
from rkif.checkpoint.workdir import Workdir, clear
from rkif.distributed.process_group import ALONE, ProcessGroup

UNRECORDED = 256 << 20  # bytes after which a scan is recorded: a kill makes it read at most these again


def fuse_checkpoints(
    plan: Plan, progress: Progress | None = None, processes: ProcessGroup = ALONE
) -> Summary:
    """Execute the plan of :func:`rkif.checkpoint.preflight.preflight`.

    ``request.out`` appears in one step when everything is complete. Until then the work is in
    ``OUT.partial``. An interrupted fusion is resumed from there, and its output has the same bytes.

    Several processes on one file system may share the work. All of them call this with the same request,
    and the output has the same bytes. Any number of processes may resume an interrupted fusion.

    Raises:
        ValueError: the inputs are not finite, or the output exists.
        RuntimeError: another process writes the output, there is work that cannot be resumed, or another of
            the processes that share the work has failed.
        OSError: reading or writing failed; what was done is kept, to be resumed.
    """
    started, start, cpu_start = timestamp(), time.perf_counter(), time.process_time()
    request = plan.request
    if request.resume and (complete := _complete_output(plan)) is not None:
        return Summary.of(plan, complete, resumed=True)
    # Each process has its own amount of free memory, but all must use the same chunks.
    plan = plan.cut(int(processes.all_gather(torch.tensor([plan.slot])).min()))
    # PyTorch's threads spin while they wait for the next small tile. Streaming kernels need no small tiles.
    threads = torch.get_num_threads() if request.method.streams or plan.updates is not None else 1
    meter = ProgressMeter(progress or NullProgress())
    if plan.updates is not None and processes.size > 1:
        raise ValueError("--space delta runs in one process: factorisations may differ between processes")
    workdir = Workdir(
        request.out, plan.journal_identity, plan.slot, resume=request.resume, processes=processes
    )
    inputs = InputDigests(input_files(plan) if processes.rank == 0 else [])
    with closing(inputs), _torch_threads(threads), workdir as work, processes.propagate_failure():
        if plan.updates is not None:
            work.restart()  # A and B must be of the same factorisation, and two may differ
        resumed = bool(work.records)
        with closing(OutputWriter(plan, work, processes)) as output, closing(Loader(plan)) as loader:
            kind = _Fusion if plan.updates is None else _UpdateFusion
            fusion = kind(plan, work, loader, output, meter, processes)
            scan_result = fusion.scan()
            fusion.fuse(scan_result)
        with processes.raise_on_any_failure():  # wait until all chunks are on disk
            pass
        with processes.raise_on_any_failure():
            if processes.rank == 0:
                work.read_all()
                write_metadata(plan, work.data, work.records, scan_result.thresholds, fusion.truncation)
                write_provenance(plan, work.data, MANIFEST, inputs.result(), started)
                _require_unchanged(plan)
        manifest = read_manifest(work.data)
        with processes.raise_on_any_failure():  # wait until all have read it
            pass
        if processes.rank == 0:
            work.publish(plan.layout.sizes)
    return Summary.of(
        plan,
        manifest,
        resumed=resumed,
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu_start,
        read=int(processes.all_reduce_sum(torch.tensor(meter.read))),
        memory=int(processes.all_gather(torch.tensor([meter.memory])).max()),
    )


def _complete_output(plan: Plan) -> dict[str, Any] | None:
    """The manifest of the output if it is complete and no input has changed since."""
    path = plan.request.out / MANIFEST
    if not path.exists():
        return None
    manifest = read_manifest(plan.request.out)
    if manifest["identity_sha256"] != plan.identity or plan.last_change > path.stat().st_mtime_ns:
        return None
    clear(plan.request.out)
    return manifest


def _require_unchanged(plan: Plan) -> None:
    for argument, checkpoint in plan.checkpoints.items():
        if changes(checkpoint.files) != checkpoint.changed:
            raise InvalidInputError(
                f"{argument}: {checkpoint.path} was changed while it was read; nothing was published"
            )


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute on ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Fusion:
    """The share of a fusion of one process: scan the loaded chunks, then fuse and write them."""

    def __init__(
        self,
        plan: Plan,
        work: Workdir,
        loader: Loader,
        output: OutputWriter,
        meter: ProgressMeter,
        processes: ProcessGroup,
    ) -> None:
        self._plan, self._work, self._loader, self._output = plan, work, loader, output
        self._meter, self._processes = meter, processes
        self._method, self._tensors = plan.request.method, plan.layout.tensors
        self._names = [tensor.name for tensor in self._tensors]
        self._share = share(plan.chunks, self._tensors, processes.rank, processes.size)
        self.truncation: dict[str, float] = {}  # by module; empty unless updates are factorised

    def scan(self) -> ScanResult:
        """Scan all elements for the method, from where an interrupted scan stopped."""
        scan, first = self._resumed_scan()
        unrecorded = 0
        while (indices := scan.next_pass()) is not None:
            remaining = indices if first is None else range(first, indices.stop)
            self._meter.stage("scanning", self._loader.nbytes(remaining))
            for chunk in self._loader.load(remaining):
                for tile in self._tiles(chunk, self._plan.scan_tile):
                    if not scan.observe(tile, scores_of(self._method, tile)):
                        raise self._invalid(tile)
                unrecorded += chunk.nbytes
                if unrecorded >= UNRECORDED:
                    self._work.record_scan(scan.state(), {"next": chunk.index + 1})
                    unrecorded = 0
                self._meter.advance(chunk.nbytes)
            scan.end_pass()
            first = None
        if unrecorded:
            self._work.record_scan(scan.state(), {"next": None})
        return scan.result()

    def _resumed_scan(self) -> tuple[Scan, int | None]:
        """The scan as it was recorded, and the index of the next chunk; None for the start of a pass."""
        scan, first = self._new_scan(), None
        if (recorded := self._work.recorded_scan()) is not None:
            state, position = recorded
            scan.restore(state)
            first = position["next"]
        # A kill may have left the processes in different passes. Counts are summed by pass: all start again.
        if len(set(self._processes.all_gather(torch.tensor([scan.passes])).tolist())) > 1:
            return self._new_scan(), None
        return scan, first

    def _new_scan(self) -> Scan:
        chunks = self._plan.fused_chunks
        scanned = range(self._share.start, min(self._share.stop, len(chunks)))
        return make_scan(self._method, self._tensors, chunks, scanned, self._processes)

    def fuse(self, scan_result: ScanResult) -> None:
        """Fuse the remaining chunks; the writer writes and records them."""
        if scan_result.thresholds is not None:
            scan_result = scan_result._replace(
                thresholds=scan_result.thresholds.to(self._plan.request.device)
            )
        done = {record["chunk"] for record in self._work.records if "chunk" in record}
        remaining = [index for index in self._share if index not in done]
        self._meter.stage("fusing", self._loader.nbytes(remaining))
        for chunk in self._loader.load(remaining, Digests(self._tensors, lambda tensor: tensor.inputs)):
            self._processes.check_peers()
            counts, squared_norms = self._compute(chunk, self._output.targets(chunk.index), scan_result)
            self._output.submit(chunk, counts, squared_norms)
            self._meter.advance(chunk.nbytes)
        self._output.finish()

    def _compute(
        self, chunk: LoadedChunk, targets: Sequence[Tensor], scan_result: ScanResult
    ) -> tuple[list[int], list[float]]:
        """Fill a chunk's targets; return counts and squared norms, in the order of the request's names."""
        request = self._plan.request
        counts, squared_norms = [0] * len(request.cases), [0.0] * len(request.norms)
        if chunk.index >= len(self._plan.fused_chunks):
            self._copy(chunk, targets)
            return counts, squared_norms
        for tile in self._tiles(chunk, self._plan.tile, targets):
            scores = scores_of(self._method, tile)
            # Importance is checked here unless a scan has done it. Norms show all other invalid values.
            unseen = tile.importance is not None and not self._method.needs_threshold
            if unseen and not all(map(are_valid_scores, scores)):
                raise self._invalid(tile)
            stats = self._method.fuse(tile, scores, scan_result)
            tile_norms = stats.squared_norms.tolist()
            if not all(map(math.isfinite, tile_norms)):  # an input or a result is not finite
                raise self._invalid(tile)
            counts = [a + b for a, b in zip(counts, stats.counts.tolist(), strict=True)]
            squared_norms = [a + b for a, b in zip(squared_norms, tile_norms, strict=True)]
        return counts, squared_norms

    def _copy(self, chunk: LoadedChunk, targets: Sequence[Tensor]) -> None:
        """Copy tensors that are not fused from the base; the models must have the same values."""
        base, *others = chunk.tensors
        for position, piece in enumerate(self._plan.chunks[chunk.index]):
            first, *models = self._plan.request.checkpoints
            for argument, other in zip(models, others, strict=True):
                if not torch.equal(base[position], other[position]):
                    tensor = self._tensors[piece.tensor]
                    raise InvalidInputError(
                        f"{tensor.name!r} is {tensor.target.dtype}, which is copied, not fused, but "
                        f"{argument} has other values in it than {first}; nothing was published"
                    )
            targets[position].copy_(base[position])

    def _tiles(
        self, chunk: LoadedChunk, largest: int, targets: Sequence[Tensor] | None = None
    ) -> Iterator[Tile]:
        pieces, models = self._plan.chunks[chunk.index], self._method.models
        return tiles(pieces, chunk.tensors, targets, largest, self._names, models)

    def _invalid(self, tile: Tile) -> InvalidInputError:
        return invalid_input(self._tensors, tile, self._plan.checkpoints)


class _UpdateFusion(_Fusion):
    """Merges the updates of adapters first; the chunks then take the factors from the result."""

    def scan(self) -> ScanResult:
        assert self._plan.updates is not None
        self._meter.stage("merging", 0)
        self._result = fuse_updates(self._method, self._plan.updates, self._plan.checkpoints)
        self.truncation = self._result.truncation
        return ScanResult(self._result.thresholds)

    def _compute(
        self, chunk: LoadedChunk, targets: Sequence[Tensor], scan_result: ScanResult
    ) -> tuple[list[int], list[float]]:
        request, result = self._plan.request, self._result
        counts, squared_norms = [0] * len(request.cases), [0.0] * len(request.norms)
        if chunk.index >= len(self._plan.fused_chunks):
            self._copy(chunk, targets)
            return counts, squared_norms
        for piece, target in zip(self._plan.chunks[chunk.index], targets, strict=True):
            name = self._tensors[piece.tensor].name
            target.copy_(result.params[name][piece.start : piece.stop])
            if piece.start == 0 and name in result.counts:  # counted once: where the first tensor begins
                counts = [a + b for a, b in zip(counts, result.counts[name], strict=True)]
                norms = result.squared_norms[name]
                squared_norms = [a + b for a, b in zip(squared_norms, norms, strict=True)]
        return counts, squared_norms
