"""The command line's entry point, and what it does before it imports PyTorch."""

from __future__ import annotations

import importlib.metadata
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

import rkif
from rkif.cli import app, main
from rkif.cli.options import parse_size

Rkif = Callable[..., tuple[int, str, str]]
COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]

# Runs a command line, and fails if it made one of the slow imports.
PROGRAM = """
import sys
from rkif.cli import main
sys.argv = ["rkif", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
    assert not heavy, heavy
"""


def without_heavy_imports(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_is_imported_without_pytorch() -> None:
    code = "import sys, rkif; assert 'torch' not in sys.modules; rkif.fuse; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_unknown_names_raise() -> None:
    assert all(getattr(rkif, name) is not None for name in rkif.__all__)
    assert set(rkif.__all__) <= set(dir(rkif))
    with pytest.raises(AttributeError, match="module 'rkif' has no attribute 'fuze'"):
        rkif.fuze  # noqa: B018


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_needs_no_heavy_import(command: str) -> None:
    assert "Usage:" in without_heavy_imports(*command.split(), "--help")


def test_the_version_needs_no_heavy_import() -> None:
    assert without_heavy_imports("--version") == f"rkif {rkif.__version__}\n"


ARGUMENTS = {
    "demo": ["--out", "{}/made"],
    "fuse": ["{}/a", "{}/b", "{}/c", "--out", "{}/made"],
    "plan": ["--model", "{}"],
    "reproduce": ["{}", "--round", "1"],
    "rollback": ["{}", "--to", "1"],
    "sign": ["{}", "--key", "{}/key.pem"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_announced_before_slow_imports(command: str, tmp_path: Path) -> None:
    """PyTorch cannot be imported here, so the announcement was written before the import."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    arguments = [argument.format(tmp_path) for argument in ARGUMENTS.get(command, ["{}"])]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "rkif", command, *arguments],
        env=environment,
        stderr=theirs,
        stdout=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    os.close(theirs)
    with os.fdopen(ours) as terminal:
        first = terminal.readline()
    assert process.wait() == 1
    assert str(tmp_path) in first
    assert "error" not in first


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_that_an_import_swallows_ends_the_command(command: str, tmp_path: Path) -> None:
    """A module may catch every exception during its import; the command still ends."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.1)\nexcept BaseException: pass\n"
        "raise ImportError('still here')\n"
    )
    arguments = [argument.format(tmp_path) for argument in ARGUMENTS.get(command, ["{}"])]
    done = subprocess.run(
        [sys.executable, "-m", "rkif", command, *arguments],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (130, "rkif: interrupted\n")


def test_an_interrupt_ends_the_command_with_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rkif.cli.continual.announce", interrupted)
    monkeypatch.setattr(sys, "argv", ["rkif", "report", "run"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert (exit_info.value.code, capsys.readouterr().err) == (130, "rkif: interrupted\n")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("500MB", 500 * 10**6),
        ("2GiB", 2 << 30),
        ("0.5 kib", 512),
        (" 3 T ", 3 * 10**12),
        ("1.5e", 1500 * 10**15),
        ("7b", 7),
    ],
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_size("--max-memory", text) == size


@pytest.mark.parametrize("text", ["", "much", "GiB", "1iB", "-1", "1.2.3", "2GiB more", "nan"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--max-memory must be a size such as 2GiB or 500MB; got"):
        parse_size("--max-memory", text)


@pytest.mark.parametrize("text", ["0", "2", "0.5", " 500 "])
def test_a_size_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--max-memory needs a unit, such as 2GiB or 500MB; got"):
        parse_size("--max-memory", text)


@pytest.mark.parametrize("text", ["0B", "0.4 B", "0GiB"])
def test_a_size_of_zero_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--max-memory must be at least one byte; got"):
        parse_size("--max-memory", text)


def test_version_is_printed(rkif: Rkif) -> None:
    status, out, _ = rkif("--version")
    assert (status, out) == (0, f"rkif {importlib.metadata.version('rkif')}\n")


@pytest.mark.parametrize("command", [[], ["run"], ["demo"]])
def test_help_is_printed(rkif: Rkif, command: list[str]) -> None:
    status, out, _ = rkif(*command, "--help")
    assert status == 0
    assert "Usage:" in out


def test_an_unknown_command_is_refused(rkif: Rkif) -> None:
    status, _, errors = rkif("fly")
    assert status == 2
    assert "No such command 'fly'" in errors


def test_python_dash_m_runs_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rkif", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "demo" in done.stdout
