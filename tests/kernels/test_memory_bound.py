"""The memory of an operation, besides its inputs, does not grow with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import NATIVE

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")

# Prints the peak growth of the process during each operation, in MiB.
SCRIPT = """
import sys, torch, rkif_kernels
from rkif_kernels import Scores

torch.set_num_threads(2)
n, backend = int(sys.argv[1]), sys.argv[2]

def high_water(field="VmHWM"):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024

tensors = [torch.rand(n) for _ in range(5)]
w, g, s, u, v = ([tensor] for tensor in tensors)
nonfinite = torch.zeros(1, dtype=torch.int64)
keep = ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5))
operations = {
    "observe": lambda: rkif_kernels.update_importance_(
        w, g, s, u, beta1=0.5, beta2=0.5, nonfinite=nonfinite, backend=backend),
    "threshold": lambda: rkif_kernels.score_thresholds(Scores(s, u), density=0.2, backend=backend),
    "fuse": lambda: rkif_kernels.select_and_fuse_(
        w, w, g, v, Scores(s, u), Scores(u), density=0.2, weights=keep, backend=backend),
}
small = [torch.rand(1000)]
rkif_kernels.score_thresholds(Scores(small), density=0.2, backend=backend)  # loads what is loaded once
for name, operation in operations.items():
    before = high_water("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    operation()
    print(name, high_water() - before)
"""


@pytest.mark.parametrize(
    ("backend", "numel"), [("torch", 1 << 23), pytest.param("native", 1 << 24, marks=NATIVE)]
)
def test_memory_does_not_grow_with_the_number_of_elements(backend: str, numel: int) -> None:
    """With 32 or 64 MiB per tensor, a temporary of a quarter of that or a 16-bit copy would be noticed."""
    command = [sys.executable, "-c", SCRIPT, str(numel), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = {name: float(mib) for name, mib in (line.split() for line in done.stdout.splitlines())}
    assert set(grown) == {"observe", "threshold", "fuse"}
    assert max(grown.values()) < numel / 2**20, grown
