"""Traffic and time of a fusion over many devices: measured with two processes, computed for clusters."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from rich.console import Console

from bench.common import rows as store
from bench.common.machine import commit
from rkif.distributed.thresholds import SAMPLE
from rkif_kernels.selection.counting import BINS

RESULTS = store.RESULTS / "scaling.jsonl"
RANKS = 2
# Bytes of memory traffic of a sharded fusion per float32 parameter with S and U: the counting pass reads 16.
# The fusion reads base, inner, outer and scores, 28, and writes 4. Copying the result takes 8.
MOVED = 16 + 28 + 4 + 8


@dataclass(frozen=True)
class Cluster:
    """Devices and the links between them, with data-sheet rates.

    Attributes:
        memory: bytes per second of a device's memory.
        link: bytes per second, in one direction, of the slowest link in a ring of all devices.
        latency: seconds per step of a collective.
    """

    name: str
    parameters: int
    ranks: int
    memory: float
    link: float
    latency: float


SHARE = 0.8  # assumed share of both rates: a goal of the kernels, and a typical result of NCCL's tests
CLUSTERS = (
    Cluster("13B, 8 x H100 SXM, NVLink", 13_015_864_320, 8, 3.35e12, 450e9, 5e-6),
    Cluster("70B, 64 x H100 SXM, 8 a node, 400 Gb/s a GPU", 68_976_648_192, 64, 3.35e12, 50e9, 20e-6),
)


def measure(console: Console) -> None:
    """Fuse over two processes on this machine, and write a row."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    done = subprocess.run(
        [*command, "-m", "bench.training.scaling_worker"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"the processes failed: {done.stderr.strip().splitlines()[-1]}")
    row = json.loads(done.stdout.splitlines()[-1]) | {"commit": commit()}
    console.print(row)
    store.write_all(RESULTS, [row])


def markdown() -> str:
    """The measured row, and the same quantities computed for clusters."""
    (row,) = store.read(RESULTS)
    measured = (
        f"Measured: {row['parameters']:,} float32 parameters over {row['ranks']} gloo processes on "
        f"{row['device']}, {row['threads']} thread each, at {store.commit_of(row)}. A "
        f"fusion takes {row['fuse_ms']:.0f} ms (median of {row['rounds']}), one process with all parameters "
        f"and one thread {row['alone_ms']:.0f} ms. Each process passes {row['handed_bytes'] / 2**20:.2f} MiB "
        f"to collectives (counting passes: {row['passes']}, bins in all: {row['bins']:,}); "
        f"summing {row['summed_bytes'] / 2**20:.0f} MiB takes {row['sum_ms']:.1f} ms.\n\n"
    )
    lines = [
        "| | parameters | devices | bytes sent by each, computed | network, ms | memory, ms | fusion, ms | "
        "gathering all scores instead, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cluster in CLUSTERS:
        sent, steps = _sent(cluster.ranks)
        wire = sent / (SHARE * cluster.link) + steps * cluster.latency
        moved = MOVED * cluster.parameters / cluster.ranks / (SHARE * cluster.memory)
        gathered = 2 * 4 * cluster.parameters * (cluster.ranks - 1) / cluster.ranks / (SHARE * cluster.link)
        lines.append(
            f"| {cluster.name} | {cluster.parameters:,} | {cluster.ranks} | {sent / 2**20:.1f} MiB | "
            f"{1e3 * wire:.2f} | {1e3 * moved:.1f} | {1e3 * (wire + moved):.1f} | {1e3 * gathered:.0f} |"
        )
    return measured + "\n".join(lines) + "\n"


def _sent(ranks: int) -> tuple[float, int]:
    """Bytes that a rank sends in rings, for both learners and the widest windows; the number of steps."""
    share = (ranks - 1) / ranks
    samples, counts = 2 * 4 * SAMPLE * share, 2 * 8 * (BINS + 3) * 2 * share
    small = 8  # number of collectives of a few bytes: lengths, flags, sums of counts and norms
    return samples + counts, (2 + 2 * (2 + small)) * (ranks - 1)
