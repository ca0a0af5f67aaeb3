"""``rkif run`` as a user sees it: what it prints, what it refuses, and the exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from command import Rkif
from config_files import write
from safetensors import SafetensorError

from rkif.cli import main
from rkif.demo import CONFIG


def test_run_prints_a_table_and_the_folder(rkif: Rkif, settings: dict[str, Any], tmp_path: Path) -> None:
    config = write(tmp_path / "config.yaml", settings)
    status, out, _ = rkif("run", config, "--out", tmp_path / "out")
    assert status == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for text in ("review", "tense", f"OP {metrics['op']:.1f}", "dev split", str(tmp_path / "out")):
        assert text in out.replace("\n", "")
    assert "recurrent_kif after tense:" in out
    assert out.splitlines()[0].strip()


def test_a_memory_with_fewer_records_than_labels_is_said(
    rkif: Rkif, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = write(tmp_path / "config.yaml", settings)
    small = "warning: memory.fraction 0.02: the memory has fewer records than labels of review (1 for 2)\n"
    for changes, said in (((), True), (("memory.fraction=0.1",), False), (("method=sequential",), False)):
        out = tmp_path / str(changes)
        status, output, _ = rkif("run", config, "--out", out, *(f"--set={change}" for change in changes))
        assert status == 0
        assert (small in output) == said
    capped = ("--set=memory.fraction=0.1", "--set=memory.cap=1")
    assert (
        "memory.fraction 0.1 and memory.cap 1: the"
        in rkif("run", config, "--out", tmp_path / "c", *capped)[1]
    )


def test_a_run_ends_with_the_verdicts_of_its_gate(
    rkif: Rkif, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["gate"] = {"criteria": [{"metric": "memory_loss", "floor": -1, "tolerance": None}]}
    status, out, _ = rkif("run", write(tmp_path / "config.yaml", settings), "--out", tmp_path / "out")
    assert status == 0
    assert "gate: 1 undone; most often: memory_loss above ceiling -1\n" in out


def test_a_second_run_needs_resume_and_the_same_settings(
    rkif: Rkif, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = write(tmp_path / "config.yaml", settings)
    out = tmp_path / "out"
    assert rkif("run", config, "--out", out)[0] == 0
    status, _, errors = rkif("run", config, "--out", out)
    assert (status, errors.count("\n")) == (1, 1)
    assert "holds a run; continue with --resume" in errors
    assert rkif("run", config, "--out", out, "--resume")[0] == 0
    assert rkif("run", out / "config.yaml", "--out", out, "--resume")[0] == 0  # the recorded config is valid
    write(config, settings | {"seed": 7})
    status, _, errors = rkif("run", config, "--out", out, "--resume")
    assert status == 1
    assert "has `seed: 42`, but the config now has `seed: 7`" in errors


def test_quiet_commands_print_nothing(
    rkif: Rkif, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("rkif.demo.CONFIG", CONFIG.replace("steps: 160", "steps: 2"))
    config, run = write(tmp_path / "config.yaml", settings), tmp_path / "run"
    model = settings["model"]
    for call in (
        ("run", config, "--out", run),
        ("reproduce", run, "--round", 1),
        ("tune", config, "--out", tmp_path / "tune", "--trials", 1),
        ("fuse", model, model, model, "--out", tmp_path / "fused"),
        ("demo", "--out", tmp_path / "demo"),
    ):
        assert rkif(*call, "--quiet") == (0, "", ""), call


def test_a_folder_that_cannot_be_written_is_named(
    rkif: Rkif, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = write(tmp_path / "config.yaml", settings)
    occupied = write(tmp_path / "file", "not a folder")
    for out in (occupied, occupied / "below"):
        status, _, errors = rkif("run", config, "--out", out)
        assert (status, errors.count("\n")) == (1, 1)
        assert str(occupied) in errors
    (tmp_path / "full").mkdir()
    write(tmp_path / "full" / "something", "else")
    status, _, errors = rkif("run", config, "--out", tmp_path / "full")
    assert status == 1
    assert "is not empty and is not a run" in errors


@pytest.mark.parametrize("damage", ["checkpoint.safetensors", "metrics.json"])
def test_a_damaged_run_is_named(rkif: Rkif, settings: dict[str, Any], tmp_path: Path, damage: str) -> None:
    config = write(tmp_path / "config.yaml", settings)
    out = tmp_path / "out"
    assert rkif("run", config, "--out", out)[0] == 0
    content = (out / damage).read_bytes()
    (out / damage).write_bytes(content[: len(content) // 2])
    status, _, errors = rkif("run", config, "--out", out, "--resume")
    assert (status, errors.count("\n")) == (1, 1)
    assert f"{out / damage} is damaged" in errors


def test_a_full_disk_is_one_clear_line(
    rkif: Rkif, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = safetensors.torch.save_file

    def full(tensors: Any, path: Any, *arguments: Any, **more: Any) -> None:
        if Path(path).name == "checkpoint.safetensors.tmp":
            raise SafetensorError("No space left on device (os error 28)")
        save_file(tensors, path, *arguments, **more)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    config = write(tmp_path / "config.yaml", settings)
    status, _, errors = rkif("run", config, "--out", tmp_path / "out")
    path = tmp_path / "out" / "checkpoint.safetensors.tmp"
    assert (status, errors) == (1, f"rkif: error: No space left on device (os error 28): {path}\n")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["rkif", "run", str(config), "--out", str(tmp_path / "out"), "--resume"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code


def test_without_transformers_the_install_command_is_shown(
    rkif: Rkif, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, errors = rkif("run", write(tmp_path / "config.yaml", settings), "--out", tmp_path / "out")
    assert status == 1
    assert 'pip install ".[hf]" in the source folder of rkif' in errors
    status, _, errors = rkif("demo", "--out", tmp_path / "demo")
    assert status == 1
    assert 'pip install ".[hf]" in the source folder of rkif' in errors
    assert not (tmp_path / "demo").exists()
