"""The script of CI ends its background jobs, and shows their logs, if a check fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

# Background jobs write a line, and run for long; ruff fails as soon as both have started.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *"bench fuzz"*) job=fuzz ;;
    *sanitizer.plugin*) job=ttsem ;;
    *) exit 0 ;;
esac
echo "a line of $job"
[ "$FAILS" = "$job" ] && exit 1
sleep 300 &
echo $! > "$STARTED/$job"
wait
"""
RUFF = """#!/usr/bin/env bash
[ "$FAILS" = ruff ] || exit 0
until [ -s "$STARTED/fuzz" ] && [ -s "$STARTED/ttsem" ]; do sleep 0.05; done
exit 3
"""
NOTHING = "#!/bin/sh\n"


def run_script(folder: Path, part: str, fails: str, **more: str) -> tuple[int, str]:
    """Run a copy of .ci/run with stub programs; returns exit status and output. Errors go to a file."""
    for name in (".ci", ".venv/bin", "bin", "started"):
        (folder / name).mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    root = Path(__file__).parents[2]
    script = shutil.copy(root / ".ci" / "run", folder / ".ci")
    shutil.copy(root / "README.md", folder)
    stubs = {"python": PYTHON, "ruff": RUFF} | dict.fromkeys(("pip", "mypy", "chromium"), NOTHING) | more
    for name, text in stubs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "FAILS": fails,
        "STARTED": str(folder / "started"),
        "TMPDIR": str(folder / "started"),
    }
    done = subprocess.run(
        ["bash", script, part], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    (folder / "errors").write_text(done.stderr)
    return done.returncode, done.stdout


def test_each_half_of_the_readmes_command_runs_once(tmp_path: Path) -> None:
    """The half before && installs, the other runs the tests."""
    calls = "#!/bin/sh\necho $(basename $0) $* >&2\n"
    code, _ = run_script(tmp_path / "all", "test", fails="", pip=calls, pytest=calls)
    assert code == 0
    said = (tmp_path / "all" / "errors").read_text().splitlines()
    assert said == ["pip install -e .[dev] -q", "pytest -n logical"]


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the test reads /proc")
def test_a_failed_check_ends_the_background_jobs_and_shows_their_logs(tmp_path: Path) -> None:
    code, said = run_script(tmp_path, "all", fails="ruff")
    assert code == 3
    for job in ("fuzz", "ttsem"):
        assert f"a line of {job}" in said
        process = int((tmp_path / "started" / job).read_text())
        until = time.monotonic() + 10
        while is_running(process) and time.monotonic() < until:
            time.sleep(0.05)
        assert not is_running(process), job
    assert {path.name for path in (tmp_path / "started").iterdir()} == {"fuzz", "ttsem"}


def test_a_failed_background_job_shows_its_log(tmp_path: Path) -> None:
    code, said = run_script(tmp_path, "check", fails="fuzz")
    assert code == 1
    assert "== python -m bench fuzz" in said
    assert said.endswith("a line of fuzz\n")
