"""The entry point of the command line, and its work before it imports PyTorch."""

from __future__ import annotations

import importlib.metadata
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from command import Rkif
from typer.main import get_command
from typer.testing import CliRunner

import rkif
from rkif.cli import app, main
from rkif.cli.options import parse_size

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
        assert process.wait() == 1  # a terminal that is closed earlier makes the status 120
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


@pytest.mark.parametrize("text", ["8EiB", "10E", "9" * 400 + "GB"])
def test_a_size_beyond_64_bits_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--max-memory must be less than 8EiB; got"):
        parse_size("--max-memory", text)


def test_version_is_printed(rkif: Rkif) -> None:
    for option in ("--version", "-V"):
        status, out, _ = rkif(option)
        assert (status, out) == (0, f"rkif {importlib.metadata.version('rkif')}\n")


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_whole_names(command: str, columns: int) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], terminal_width=columns).output
    assert "Example" in shown
    assert f"  rkif {command} " in shown
    options = [name for one in get_command(app).commands[command].params for name in one.opts]  # type: ignore[attr-defined]
    words = set(shown.split())
    assert [name for name in options if name.startswith("--") and name not in words] == []
    assert "<bool>" not in shown
    assert "…" not in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_json(command: str) -> None:
    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert "--json" in [name for one in parameters for name in one.opts]


def test_the_help_lists_every_command_in_a_group(rkif: Rkif) -> None:
    status, out, _ = rkif("--help")
    assert status == 0
    lines = out.partition("Start:")[2].splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line[2:3].strip()]
    assert sorted(listed) == COMMANDS
    assert rkif() == (2, "", out)  # a call without a command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "no such command 'fly'; see "),
        (
            ["fuse", "a", "b", "c", "--out", "d", "--density", "abc"],
            "--density must be a number; got 'abc'; see ",
        ),
        (["rollback", "run", "--to", "1.5"], "--to must be an integer; got '1.5'; see "),
        (["rollback", "run", "--to", "-1"], "--to must be greater than or equal to 0; got '-1'; see "),
        (["rollback", "run"], "--to is missing; see "),
        (["sign", "--key", "k"], "RUN|DIR is missing; see "),
        (["log", "run", "--densty", "1"], "no such option: --densty"),
        (["run", "config.yaml", "--out"], "option '--out' requires an argument"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(rkif: Rkif, arguments: list[str], message: str) -> None:
    status, out, errors = rkif(*arguments)
    assert (status, out, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"rkif: error: {message}")
    if "; see " in message:
        assert errors.endswith(f"{arguments[0]} --help\n" if arguments[0] in COMMANDS else " --help\n")


@pytest.mark.parametrize("arguments", [["log"], ["verify"], ["report"], ["rollback", "--to", "1"]])
def test_a_missing_folder_is_named(rkif: Rkif, tmp_path: Path, arguments: list[str]) -> None:
    command, *options = arguments
    missing = tmp_path / "nowhere"
    assert rkif(command, missing, *options) == (1, "", f"rkif: error: no such folder: {missing}\n")


@pytest.mark.parametrize("arguments", [["--debug", "log"], ["log", "--debug"]])
def test_debug_shows_the_traceback_of_an_error(rkif: Rkif, tmp_path: Path, arguments: list[str]) -> None:
    status, _, errors = rkif(*arguments, tmp_path)
    assert status == 1
    assert errors.startswith("Traceback (most recent call last):\n")
    assert errors.splitlines()[-1] == f"rkif: error: {tmp_path} is not a run: it has no config.yaml"


def test_the_completion_script_of_a_shell_is_printed() -> None:
    environment = {**os.environ, "_RKIF_COMPLETE": "source_bash"}
    code = "import sys; from rkif.cli import main; sys.argv = ['rkif']; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "rkif" in done.stdout
    assert done.returncode == 0


def test_python_dash_m_runs_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rkif", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "demo" in done.stdout
