"""``rkif fuse --push-to-hub``, with a stub in place of the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import Triple
from command import Rkif


class Hub:
    """Records calls of HfApi; ``error`` is raised by the upload."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None

    def create_repo(self, repo_id: str, **settings: Any) -> str:
        self.calls.append(("create_repo", {"repo_id": repo_id, **settings}))
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, **settings: Any) -> None:
        if self.error is not None:
            raise self.error
        files = sorted(path.name for path in Path(settings["folder_path"]).iterdir())
        self.calls.append(("upload_folder", settings | {"files": files}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("rkif.checkpoint.hub.HfApi", lambda: hub)
    return hub


@pytest.fixture
def command(tmp_path: Path) -> list[object]:
    triple = Triple(tmp_path)
    inputs = [triple.path(name) for name in ("base", "inner", "outer")]
    return ["fuse", *inputs, "--out", tmp_path / "out", "--push-to-hub", "user/fused"]


def test_the_finished_folder_is_uploaded(rkif: Rkif, hub: Hub, command: list[object], tmp_path: Path) -> None:
    status, output, errors = rkif(*command)
    assert (status, errors) == (0, "")
    assert output.splitlines()[-1] == "Uploaded to https://hub.example/user/fused"
    (create, settings), (upload, uploaded) = hub.calls
    assert (create, upload) == ("create_repo", "upload_folder")
    assert settings == {"repo_id": "user/fused", "repo_type": "model", "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("user/fused", tmp_path / "out")
    assert uploaded["files"] == ["README.md", "model.safetensors", "provenance.json", "rkif-manifest.json"]


def test_json_has_the_address(rkif: Rkif, hub: Hub, command: list[object]) -> None:
    assert json.loads(rkif(*command, "--json")[1])["hub"] == "https://hub.example/user/fused"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ConnectionError("no\n network"), "no network"), (RuntimeError(), "RuntimeError")],
)
def test_a_failed_upload_keeps_the_output_and_can_be_repeated(
    rkif: Rkif, hub: Hub, command: list[object], tmp_path: Path, error: Exception, reason: str
) -> None:
    hub.error = error
    status, _, errors = rkif(*command)
    out = tmp_path / "out"
    assert status == 1
    assert errors == (
        f"rkif: error: --push-to-hub: user/fused was not uploaded: {reason}; {out} is complete: "
        "--resume uploads it\n"
    )
    written = (out / "model.safetensors").stat().st_mtime_ns
    hub.error = None
    assert rkif(*command, "--resume")[0] == 0
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    assert hub.calls[-1][0] == "upload_folder"


def test_without_a_network_the_error_is_one_line(rkif: Rkif, command: list[object], tmp_path: Path) -> None:
    """HF_HUB_OFFLINE simulates a missing network, with the real client."""
    status, _, errors = rkif(*command)
    assert status == 1
    assert errors.startswith("rkif: error: --push-to-hub: user/fused was not uploaded: ")
    assert errors.count("\n") == 1
    assert (tmp_path / "out" / "README.md").exists()


def test_nothing_is_uploaded_by_a_dry_run_or_to_an_invalid_name(
    rkif: Rkif, hub: Hub, command: list[object], tmp_path: Path
) -> None:
    assert rkif(*command, "--dry-run")[0] == 0
    status, output, errors = rkif(*command, "--push-to-hub", "user/a/b")
    assert (status, output) == (1, "")
    assert (
        errors
        == "rkif: error: --push-to-hub: 'user/a/b' is not the name of a repository, such as user/model\n"
    )
    assert hub.calls == []
    assert not (tmp_path / "out").exists()
