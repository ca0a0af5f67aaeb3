"""``bench launches --write``: the fastest configuration is written, used, and shown with its measurement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.common import rows
from bench.kernels import launches as sweep
from rkif_kernels.backends.triton import launches
from rkif_kernels.backends.triton.launches import FILE, Row, chosen, default, read

pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of launches.json that calls use, on a machine that is taken for a GPU."""
    copy = tmp_path / "launches.json"
    copy.write_text(FILE.read_text())
    monkeypatch.setattr(launches, "FILE", copy)
    monkeypatch.setattr(launches, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    yield copy
    forget()


def forget() -> None:
    launches.rows.cache_clear()
    launches._chosen.cache_clear()


def sweep_with(times: dict[str, list[float]], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the sweep; the configurations of each operation take these milliseconds, in sequence."""
    monkeypatch.setattr(sweep, "available", lambda _: ["triton"])
    monkeypatch.setattr(sweep, "copy_gbps", lambda _: 10.0)
    monkeypatch.setattr(sweep, "plan", lambda *_, **__: (1, 1))
    # Two updates are one call of "observe"; each configuration is timed once to plan, and once.
    updates = {"observe": 2}
    taken = iter(t * 1e-3 * updates.get(op, 1) for op in times for t in times[op] for _ in range(2))
    monkeypatch.setattr(sweep, "seconds", lambda *_: next(taken))
    monkeypatch.setattr(sweep, "PROGRAMS", ((1024, 8, 4), (512, 16, 4), (256, 32, 2)))
    monkeypatch.setattr(sweep, "SIZES", {"smoke": 2**24})
    sweep.measure(CPU, [], Console(quiet=True), into=file)
    assert next(taken, None) is None
    forget()


def found(op: str, numel: int) -> Row:
    return chosen(op, [[torch.zeros(1)]], numel)


def test_the_fastest_is_written_and_launched_from_then_on(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other programs are timed, then the fastest with other brackets: strides, slacks.

    Programs of 32 tiles are only for "observe": the bits of a bracketed pass have no room for them.
    """
    times = {
        "observe": [1.0, 0.9, 0.7],
        "threshold": [1.0, 0.8, 0.75, 0.77, 0.9, 0.9],
        "fuse": [1.0, 0.985, 1.2, 1.2, 1.2, 1.2],
    }
    before = read(file)
    sweep_with(times, file, monkeypatch)
    assert len(read(file)) == len(before) + 3
    observe, threshold, fuse = (found(op, 2**24) for op in times)
    assert (observe.launch.label, observe.measured["ms"]) == ("256 x 32, 2", 0.7)
    # The program of 1,024 elements was faster than the default, and then one run in 64 scores.
    assert threshold.launch.label == "1024 x 8, 4"
    assert threshold.bracketing == replace(default("threshold").bracketing, sample_stride=64)
    # Less than two in a hundred is chance: the default is measured, and stays.
    assert (fuse.launch, fuse.bracketing) == (default("fuse").launch, default("fuse").bracketing)
    assert (fuse.measured["ms"], fuse.measured["shape"]) == (1.0, "smoke")
    assert found("observe", 2**24 + 1) == default("observe")
    assert default("observe").measured is None


def test_the_table_shows_which_rows_were_measured(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sweep.markdown()
    assert before.count("| not measured |") == len(read(file)) == len(before.splitlines()) - 2
    assert (
        "| fuse | any other | any other | any other | any number | 512 x 16, 4 | 8 of 128, 2 times |"
        in before
    )
    times = {"observe": [1.0, 0.9, 0.5], "threshold": [1.0] * 6, "fuse": [1.0] * 6}
    sweep_with(times, file, monkeypatch)
    (line,) = [line for line in sweep.markdown().splitlines() if line.startswith("| observe")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[1:-1] == [launches.triton_version(), "float32", "up to 16,777,216", "256 x 32, 2", "-"]
    assert cells[0] == "sm_90"
    assert cells[-1].startswith("smoke: 0.5000 ms, ")
    kept = [row for row in rows.read(sweep.file()) if row["op"] == "observe"]
    assert [(row["implementation"], row["default"]) for row in kept] == [
        ("1024 x 8, 4", True),
        ("512 x 16, 4", False),
        ("256 x 32, 2", False),
    ]


def test_a_wrong_result_is_not_timed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: torch.device) -> object:
        return lambda launch, w, g, s, u, **betas: s[1].zero_()

    monkeypatch.setitem(sweep._RUNS, "observe", wrong)
    with pytest.raises(AssertionError, match="differ"):
        sweep_with({"observe": []}, file, monkeypatch)
    assert read(file) == read(FILE)
