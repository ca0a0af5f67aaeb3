"""`torchrun -m rkif fuse`: several processes share a fusion, with the bytes of a single process."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fuse_ranks_program
import pytest
import torch
from checkpoint_files import Triple, files_of, split_folder
from safetensors.torch import save_file
from torchrun import start_program

from rkif.checkpoint.layout import OutputTensor, Piece, share
from rkif.checkpoint.source import Entry

SLOT = 4096


def start(
    ranks: int, arguments: Sequence[Any], *, fails: bool = False, torchrun: bool = False, **settings: Any
) -> subprocess.CompletedProcess[str]:
    words = [json.dumps({"slot": SLOT, **settings}), "fuse", *arguments]
    return start_program(fuse_ranks_program.__file__, ranks, *words, fails=fails, torchrun=torchrun)


def fuse(ranks: int, arguments: Sequence[Any], *, torchrun: bool = False) -> dict[str, Any]:
    done = start(ranks, [*arguments, "--json"], torchrun=torchrun)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.fixture
def triple(tmp_path: Path) -> Triple:
    return Triple(tmp_path)


def inputs(triple: Triple) -> list[Path]:
    return [triple.path(name) for name in ("base", "inner", "outer")]


IMPORTANCE = [
    word for side in ("inner", "outer") for word in (f"--{side}-importance", f"{side}_scores.safetensors")
]


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, []),
        (3, ["--density", "0.4", "--rule", "release", *IMPORTANCE]),
        (3, ["--scope", "tensor"]),
        (2, ["--density", "1", "--scope", "tensor", *IMPORTANCE]),
        (3, ["--method", "dare_ties", "--density", "0.5"]),
        (2, ["--method", "ties"]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else " ".join(value) or "default",
)
def test_the_bytes_are_those_of_one_process(triple: Triple, ranks: int, settings: list[str]) -> None:
    chosen = [triple.folder / word if word.endswith(".safetensors") else word for word in settings]
    outs = [triple.folder / f"out{count}" for count in (1, ranks)]
    summaries = [
        fuse(count, [*inputs(triple), "--out", out, *chosen])
        for count, out in zip((1, ranks), outs, strict=True)
    ]
    one, several = (files_of(out) for out in outs)
    assert one == several
    assert not list(triple.folder.glob("*.partial"))
    assert summaries[0]["report"] == summaries[1]["report"]
    assert summaries[0]["read"] == summaries[1]["read"]


def test_sharded_folders_are_fused_by_several_processes(triple: Triple) -> None:
    for name in ("base", "inner", "outer"):
        split_folder(triple.folder / name, getattr(triple, name), files=3)
    folders = [triple.folder / name for name in ("base", "inner", "outer")]
    for ranks in (1, 3):
        arguments = [*folders, "--out", triple.folder / f"out{ranks}", "--max-shard-size", "20KB"]
        fuse(ranks, arguments, torchrun=ranks == 3)
    assert files_of(triple.folder / "out1") == files_of(triple.folder / "out3")
    assert len(list((triple.folder / "out3").glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("first", "dies", "then"),
    [(2, [1, 1], 2), (2, [1, 4], 1), (3, [0, 5], 2), (1, [0, 9], 3)],
)
def test_a_killed_fusion_resumes_with_any_number_of_processes(
    triple: Triple, first: int, dies: list[int], then: int
) -> None:
    expected = triple.folder / "expected"
    fuse(1, [*inputs(triple), "--out", expected])
    out = triple.folder / "out"
    killed = start(first, [*inputs(triple), "--out", out], dies=dies)
    assert killed.returncode != 0
    assert not out.exists()
    assert list((triple.folder / "out.partial").glob("journal*.jsonl")) or dies[1] == 1
    resumed = fuse(then, [*inputs(triple), "--out", out, "--resume"])
    assert resumed["resumed"] or dies[1] == 1
    assert files_of(out) == files_of(expected)
    assert not (triple.folder / "out.partial").exists()


def test_a_full_disk_on_one_process_fails_all(triple: Triple) -> None:
    out = triple.folder / "out"
    done = start(2, [*inputs(triple), "--out", out], fails=True, full=[1, 3])
    assert done.returncode != 0
    assert "rkif: error: No space left on device: " in done.stderr
    assert not out.exists()
    assert (triple.folder / "out.partial").exists()


def test_a_nan_on_one_process_stops_all(triple: Triple) -> None:
    """For a NaN on any process, no file is left, and the next attempt starts from the beginning."""
    triple.inner["layer.1.weight"][3, 4] = math.nan
    triple.save("inner")
    done = start(3, [*inputs(triple), "--out", triple.folder / "out"], fails=True)
    assert done.returncode != 0
    assert "has nan in 'layer.1.weight', element 199; nothing was published" in done.stderr
    assert not [path for path in triple.folder.iterdir() if path.stem == "out"]


def test_a_preflight_problem_is_printed_once(triple: Triple) -> None:
    save_file({"other": torch.zeros(3)}, triple.path("inner"))
    done = start(2, [*inputs(triple), "--out", triple.folder / "out"], fails=True)
    assert done.returncode != 0
    assert done.stderr.count("rkif: error: ") == 1
    assert not [path for path in triple.folder.iterdir() if path.stem == "out"]


def test_a_dry_run_is_printed_once(triple: Triple) -> None:
    done = start(2, [*inputs(triple), "--out", triple.folder / "out", "--dry-run"])
    assert done.returncode == 0
    assert done.stdout.count("Pre-flight") == 1
    assert not [path for path in triple.folder.iterdir() if path.stem == "out"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("sizes", [[1], [4, 4, 4, 4], [100, 1, 1], [1, 1, 100], [1, 50, 1, 50], []])
def test_shares_are_whole_tensors_and_cover_all(sizes: list[int], ranks: int) -> None:
    tensors = [OutputTensor(str(n), _entry(n, size), ()) for n, size in enumerate(sizes)]
    chunks = [
        (Piece(number, start, min(start + 10, size)),)
        for number, size in enumerate(sizes)
        for start in range(0, size, 10)
    ]
    shares = [share(chunks, tensors, rank, ranks) for rank in range(ranks)]
    assert [number for one in shares for number in one] == list(range(len(chunks)))
    for one in shares:
        assert not len(one) or chunks[one.start][0].start == 0
    most = max((sum(chunks[n][0].numel for n in one) for one in shares), default=0)
    assert most <= sum(sizes) / ranks + max(sizes, default=0)


def _entry(number: int, size: int) -> Entry:
    return Entry(Path("x"), "F32", (size,), 0, 4 * size)
