"""Files that cannot be written or read are named, and no partial file is left."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rkif import files
from rkif.continual.rundir.state import RunState, write_state
from rkif.files import parse_json, remove_temporary, write_text
from rkif.ledger.chain import Ledger


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Limit files to 100 bytes, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "whole")
    state = RunState(0, 0, 0, 0, {"w": torch.zeros(1000)}, {})
    for write in (
        lambda: write_text(path, "x" * 1000),
        lambda: write_state(path, state),
        lambda: Ledger(path.with_name("file.jsonl")).append({"text": "x" * 1000}),
    ):
        with pytest.raises(OSError, match=str(path)):
            write()
    assert path.read_text() == "whole"
    assert not (tmp_path / "file.tmp").exists()


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("another's file")
    (tmp_path / "file.tmp").symlink_to("victim")
    write_text(tmp_path / "file", "mine")
    assert (tmp_path / "victim").read_text() == "another's file"
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("status", [files.STATUS, Path("absent")])
def test_a_file_of_tensors_has_the_mode_of_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Path
) -> None:
    """Other threads may create files meanwhile: the umask is not changed on Linux, and never opened."""
    monkeypatch.setattr(files, "STATUS", status)
    masks, umask = [], os.umask
    monkeypatch.setattr(os, "umask", lambda mask: masks.append(mask) or umask(mask))
    files.replace_tensors(tmp_path / "tensors", {"w": torch.zeros(1)})
    (tmp_path / "other").touch()
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert masks[:1] == ([] if status.exists() else [0o077])


def test_only_temporary_files_of_safetensors_are_deleted(tmp_path: Path) -> None:
    for name in (".tmpAbCdEf", ".tmp-my-notes", ".tmpdir"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".tmpFolder").mkdir()
    remove_temporary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".tmp-my-notes", ".tmpdir", ".tmpFolder"}


def test_a_file_nested_too_deeply_is_named() -> None:
    with pytest.raises(ValueError, match="some file is damaged: it is nested too deeply"):
        parse_json("[" * 100_000, "some file")
