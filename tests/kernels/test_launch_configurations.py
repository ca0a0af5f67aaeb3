"""The launch configuration of a call: the most specific row, looked up when the call is prepared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import assert_same_bits, normal, on, positive

from rkif_kernels import ImportanceInputs, Scores, Smoothing
from rkif_kernels.backends import reference
from rkif_kernels.backends import triton as kernels
from rkif_kernels.backends.triton import importance, launches, plan, radix
from rkif_kernels.backends.triton.launch import Bracketing, LaunchConfig
from rkif_kernels.backends.triton.launches import FILE, Call, Row, choose, chosen, default, read, write

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STREAM, NARROW = LaunchConfig(1024, 8, 4), LaunchConfig(512, 16, 4)
ANY = Row("*", "*", "*", "*", None, STREAM)
MEASURED = {"device": "H100", "shape": "one-64Mi", "ms": 0.5, "share": 0.95, "commit": "abc"}


def test_calls_without_a_measured_row_have_the_default_configuration() -> None:
    for op in ("observe", "adamw", "radix", "count", "valid"):
        assert default(op).launch == STREAM
    for op in ("threshold", "merge"):
        assert default(op).launch == NARROW
    assert default("fuse").launch == replace(NARROW, max_registers=128)
    assert default("whole").launch == LaunchConfig(8192, 1, 16, max_registers=128)
    brackets = Bracketing(1 << 17, 128, 1 << 20, sigmas=4.0, list_slack=2.0, run=8, design_effect=2.5)
    assert default("fuse").bracketing == default("threshold").bracketing == brackets
    assert all(default(op).measured is None for op in ("observe", "threshold", "fuse", "merge"))


def test_rows_have_unique_keys_and_complete_measurements() -> None:
    rows = read(FILE)
    assert max(Counter(row.key for row in rows).values()) == 1
    for row in rows:
        assert (row.measured is None) == (row.architecture == "*")
        assert row.measured is None or row.measured.keys() == MEASURED.keys()


@pytest.mark.parametrize(
    ("more", "less"),
    [
        (replace(ANY, op="observe"), replace(ANY, architecture="sm_90", triton="3.6", dtypes="float32")),
        (replace(ANY, architecture="sm_90"), replace(ANY, triton="3.6", dtypes="float32", numel_up_to=99)),
        (replace(ANY, triton="3.6"), replace(ANY, dtypes="float32", numel_up_to=99)),
        (replace(ANY, dtypes="float32"), replace(ANY, numel_up_to=99)),
        (replace(ANY, numel_up_to=10), replace(ANY, numel_up_to=99)),
        (replace(ANY, numel_up_to=99), ANY),
    ],
    ids=["operation", "architecture", "triton", "dtypes", "smaller", "bounded"],
)
def test_the_most_specific_row_wins(more: Row, less: Row) -> None:
    call = Call("observe", "sm_90", "3.6", "float32", 10)
    assert choose([more, less], call) == choose([less, more], call) == more


@pytest.mark.parametrize(
    "other",
    [
        Call("fuse", "sm_90", "3.6", "float32", 99),
        Call("observe", "sm_100", "3.6", "float32", 99),
        Call("observe", "sm_90", "3.7", "float32", 99),
        Call("observe", "sm_90", "3.6", "bfloat16+float32", 99),
        Call("observe", "sm_90", "3.6", "float32", 100),
    ],
)
def test_a_row_fits_only_the_calls_that_it_names(other: Call) -> None:
    row = Row("observe", "sm_90", "3.6", "float32", 99, NARROW, measured=MEASURED)
    assert choose([row, ANY], Call("observe", "sm_90", "3.6", "float32", 99)) == row
    assert choose([row, ANY], other) == ANY


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of launches.json, which calls use."""
    copy = tmp_path / "launches.json"
    copy.write_text(FILE.read_text())
    monkeypatch.setattr(launches, "FILE", copy)
    forget()
    yield copy
    forget()


def keep(file: Path, row: Row) -> None:
    """Write a row, which calls use from then on."""
    write(file, [row])
    forget()


def forget() -> None:
    launches.rows.cache_clear()
    launches._chosen.cache_clear()


def measured_here(op: str, launch: LaunchConfig, numel_up_to: int) -> Row:
    names = launches.architecture(DEVICE), launches.triton_version(), "float32"
    return Row(op, *names, numel_up_to, launch, default(op).bracketing, MEASURED)


def test_rows_are_read_as_they_were_written_and_replaced_by_key(file: Path) -> None:
    before = read(file)
    write(file, [])
    assert read(file) == before
    fuse, observe = measured_here("fuse", NARROW, 99), measured_here("observe", STREAM, 99)
    write(file, [fuse, observe])
    write(file, [replace(observe, launch=NARROW)])
    assert read(file) == [*before, fuse, replace(observe, launch=NARROW)]
    assert len(file.read_text().splitlines()) == len(before) + 4  # one a line, between brackets


def test_a_call_is_launched_by_the_row_for_its_size(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any row, the bits are those of the reference."""
    small = LaunchConfig(64, 2, 2)
    keep(file, measured_here("observe", small, 300))
    chunks: list[int] = []
    tables = importance.tables
    monkeypatch.setattr(importance, "tables", lambda rows, chunk: chunks.append(chunk) or tables(rows, chunk))
    for sizes in ([200, 100], [200, 101]):
        w, g = normal(sizes, torch.float32, 0), normal(sizes, torch.float32, 1)
        s = positive(sizes, torch.float32, 2)
        there = [on(DEVICE, part) for part in (w, g, s)]
        bad = torch.zeros((), dtype=torch.int64)
        kernels.update_importance_(ImportanceInputs(*there), Smoothing(0.5), bad.to(DEVICE))
        reference.update_importance_(ImportanceInputs(w, g, s), Smoothing(0.5), bad)
        assert_same_bits(there[2], s)
    assert chunks == [small.chunk, STREAM.chunk]


def test_dtypes_are_named_in_the_order_of_the_lists(file: Path) -> None:
    row = replace(measured_here("observe", NARROW, 99), dtypes="bfloat16+float32")
    keep(file, row)
    w, s = [torch.zeros(3, dtype=torch.bfloat16, device=DEVICE)], [torch.zeros(3, device=DEVICE)]
    assert chosen("observe", (w, [None], s, None), 3) == row
    assert chosen("observe", (s, None, w), 3) == default("observe")


def test_a_plan_looks_up_its_launch_configuration_once(monkeypatch: pytest.MonkeyPatch) -> None:
    w, g, s = ([torch.ones(5, device=DEVICE)] for _ in range(3))
    bad = torch.zeros((), dtype=torch.int64, device=DEVICE)
    asked: list[str] = []
    monkeypatch.setattr(plan, "chosen", lambda op, *rest: asked.append(op) or chosen(op, *rest))
    update = kernels.PreparedUpdate(ImportanceInputs(w, g, s), "first", bad, [])
    for _ in range(2):
        update.launch(w, g, Smoothing(0.5), moved=None)
    assert asked == ["observe"]
    assert s[0].tolist() == [1.0] * 5


def test_radix_selection_uses_its_row(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(file, measured_here("radix", LaunchConfig(64, 2, 2), 300))
    chunks: list[Any] = []
    tables = radix.tables
    monkeypatch.setattr(radix, "tables", lambda rows, chunk: chunks.append(chunk) or tables(rows, chunk))
    scores = positive([300], torch.float32, 0)
    found = kernels.score_thresholds(Scores(on(DEVICE, scores)), ks=[100], per_tensor=False)
    assert found.item() == scores[0].sort().values[100].item()
    assert chunks == [128]
