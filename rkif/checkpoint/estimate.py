"""Estimates how long a fusion will take, from a short measurement."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Mapping

import torch

from rkif.checkpoint.layout import OutputLayout
from rkif.checkpoint.methods import Method, ScanResult
from rkif.checkpoint.request import Request, existing_parent
from rkif.checkpoint.scores import scores_of
from rkif.checkpoint.source import Checkpoint
from rkif.checkpoint.tiles import TILE, Tile


def scanned_bytes(method: Method, checkpoints: Mapping[str, Checkpoint], size: int) -> int:
    """Bytes that a scan of inputs of ``size`` bytes reads in one pass, which is usually enough."""
    if method.needs_threshold:
        scores = [checkpoint for argument, checkpoint in checkpoints.items() if argument.startswith("--")]
        if scores:
            return sum(entry.nbytes for checkpoint in scores for entry in checkpoint.tensors.values())
        return size
    return size if method.rescales else 0


def estimate_seconds(request: Request, layout: OutputLayout, read: int, written: int) -> float:
    """Estimated seconds, from the measured times of fusing a random tile and writing 8 MiB to OUT's disk."""
    models = request.method.models
    name = next(tensor.name for tensor in layout.tensors if tensor.fused)
    out, base, *ends = ([torch.rand(TILE, device=request.device)] for _ in range(2 + models))
    tile = Tile([0], [0], out, base, ends, None, [name])
    scan_result = ScanResult(torch.full((models, 1), 0.5), torch.ones(models, 1, dtype=torch.float64))
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        request.method.fuse(tile, scores_of(request.method, tile), scan_result)
        durations.append(time.perf_counter() - start)
    # 1.5: the scores and their counts take about half as long as the fusion.
    computing = min(durations) / TILE * layout.numel * 1.5
    block = bytes(8 << 20)
    rate = math.inf
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=existing_parent(request.out)) as file:
        start = time.perf_counter()
        file.write(block)
        file.flush()
        rate = len(block) / (time.perf_counter() - start)
    return max(computing, (read + written) / rate)
