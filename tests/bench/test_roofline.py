"""The table of calls and their bounds, from rows made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.common import rows
from bench.kernels import roofline
from bench.kernels.goals import OURS
from bench.kernels.prediction import VARIANTS

COUNTED = {"observe": 20.0, "bracketed scores": 26.0, "bracketed fuse": 77.0, "adamw": 60.0}


def compiled(version: str = "3.6.0") -> list[dict[str, Any]]:
    return [
        {
            "kernel": kernel,
            "variant": variant,
            "target": "sm_90",
            "triton": version,
            "instructions_per_element": COUNTED[kernel],
        }
        for kernel, variant in VARIANTS.items()
    ]


def cells(op: str, elements: str) -> list[str]:
    lines = roofline.markdown().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {op} | {elements}")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    return tmp_path


def test_every_operation_is_there_for_the_adapter_and_a_large_tensor() -> None:
    """The floor by hand: 0.9 of 3.35 TB/s, so 52.2 us for 24 bytes of each of 6,553,600 elements."""
    others = [row | {"target": "sm_80"} for row in compiled()] + [compiled()[0] | {"variant": "another"}]
    roofline.write_counts([*others, *compiled("3.6.0"), *compiled("3.9.0")])
    roofline.write_host([{"call": "observe", "tensors": 160, "launches": 1}])
    assert len(rows.read(roofline.counts_file())) == 8
    text = roofline.markdown()
    assert "by triton 3.6.0 / 3.9.0" in text
    assert text.count("| not measured |") == 9
    observe = cells("observe", "6,553,600 in 160 tensors")
    assert observe[2:6] == ["24", "24.0", "20 / 20", "1"]
    assert observe[6:9] == ["52", "56 / 56", "1.08x / 1.08x"]
    assert observe[9:] == ["at most 1.25x the floor", "not measured"]
    fuse = cells("fuse", "6,553,600")
    assert fuse[9] == "at most 150 µs"
    assert float(fuse[3]) > 32
    assert cells("adamw", "67,108,864")[2:6] == ["44", "44.0", "60 / 60", "not counted"]


def test_a_measurement_is_shown_with_its_gpu(results: Path) -> None:
    roofline.write_counts(compiled())
    measured = rows.row(
        op="fuse", shape="one-64Mi", dtype="float32", implementation=OURS, numel=2**26, tensors=1,
        seconds=[1e-3], bytes_min=2_000_000_000, copy_gbps=2500.0, device=torch.device("cpu"),
    )  # fmt: skip
    others = [measured | {"implementation": "eager"}, measured | {"dtype": "bfloat16"}]
    rows.write_all(results / "gpu.jsonl", [*others, measured | {"device": "H100"}])
    assert cells("fuse", "67,108,864")[-1] == "1000 µs, 1.25x the floor, H100"
    assert cells("observe", "67,108,864")[-1] == "not measured"


def test_incomplete_rows_are_not_written() -> None:
    with pytest.raises(ValueError, match=r"--write: no bracketed fuse among the rows of triton 3\.6\.0"):
        roofline.write_counts([row for row in compiled() if row["kernel"] != "bracketed fuse"])
    with pytest.raises(ValueError, match="--write needs --target sm_90"):
        roofline.write_counts([row | {"target": "gfx942"} for row in compiled()])
    assert not roofline.counts_file().exists()
