"""The memory bound holds for checkpoints several times its size, with a tensor larger than the bound."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

MIB = 1 << 20
BESIDE = 150 * MIB  # taken by Python and PyTorch; twice as much with CUDA's libraries
SHAPES = {"embed": (260_000, 1024), "a": (64, 1024, 1024), "b": (1024,)}  # bf16: 508 MiB and 128 MiB

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured by Linux's /proc")


def write(path: Path, seed: int) -> None:
    """Write a bf16 checkpoint of a repeated block of random values between 1 and 2, in little memory."""
    generator = np.random.default_rng(seed)
    block = (0x3F80 + generator.integers(0, 128, 1 << 20, dtype=np.uint16)).tobytes()
    header, at = {}, 0
    for name, shape in SHAPES.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, at, len(block)):
            file.write(block[: min(len(block), at - start)])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Base, inner and outer."""
    folder = tmp_path_factory.mktemp("large")
    paths = [folder / f"{name}.safetensors" for name in ("base", "inner", "outer")]
    for seed, path in enumerate(paths):
        write(path, seed)
    yield [str(path) for path in paths]
    for path in paths:
        path.unlink()  # pytest would keep these gigabytes


@pytest.fixture(scope="module")
def alone() -> int:
    """Bytes of a process after its imports."""
    code = (
        "import rkif.cli, rkif.checkpoint.fuse; from rkif.checkpoint.process_memory import anonymous_memory; "
        "print(anonymous_memory())"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="measured by Linux's /proc")
@pytest.mark.parametrize("method", ["recurrent_kif", "ties"])
def test_anonymous_memory_stays_below_the_bound(
    large: list[str], alone: int, tmp_path: Path, method: str
) -> None:
    bound = -(-(alone + BESIDE) // MIB) * MIB
    assert sum(Path(path).stat().st_size for path in large) > 4 * bound
    assert 2 * np.prod(SHAPES["embed"]) > bound
    options = [
        "--out",
        str(tmp_path / "out"),
        "--max-memory",
        f"{bound // MIB}MiB",
        "--device",
        "cpu",
        "--method",
        method,
        "--json",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "rkif", "fuse", *large, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines() if status.exists() else []
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))])
        time.sleep(0.002)
    output, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert alone < peak <= bound
    assert json.loads(output)["report"]["numel"] == sum(int(np.prod(shape)) for shape in SHAPES.values())
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()  # pytest would keep these gigabytes
