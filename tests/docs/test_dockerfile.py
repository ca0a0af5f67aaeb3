"""The Dockerfile, as far as it can be checked without Docker: paths, extras, and commands."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from typer.testing import CliRunner

from rkif.cli import app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions(name: str) -> list[str]:
    """The arguments of every instruction with this name."""
    return re.findall(rf"^{name} (.*)$", TEXT.replace("\\\n", ""), flags=re.MULTILINE)


def test_both_stages_have_one_supported_python() -> None:
    (version,) = {image.split()[0] for image in instructions("FROM")}
    (number,) = re.fullmatch(r"python:(3\.\d+)-slim", version).groups()  # type: ignore[union-attr]
    assert f"Programming Language :: Python :: {number}" in PROJECT["classifiers"]


def test_copied_paths_exist() -> None:
    """From the repository, or from the environment that an earlier instruction makes."""
    made = re.findall(r"python -m venv (\S+)", "\n".join(instructions("RUN")))
    stages = re.findall(r"^FROM \S+ AS (\S+)$", TEXT, flags=re.MULTILINE)
    copied = [line.split() for line in instructions("COPY")]
    assert copied
    for first, *rest in copied:
        if first.startswith("--from="):
            assert first.removeprefix("--from=") in stages
            assert rest[0] in made
        else:
            assert (ROOT / first).exists()
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    needed = {"rkif", "rkif_kernels", "pyproject.toml", *PROJECT["license-files"], PROJECT["readme"]}
    assert all((ROOT / name).exists() for name in needed)
    assert not needed & set(ignored)


def test_the_project_is_installed_with_extras_that_it_has() -> None:
    ((folder, extras),) = re.findall(r"'(/\w+)\[([\w,]+)\]'", "\n".join(instructions("RUN")))
    assert folder in {line.split()[-1] for line in instructions("COPY")}
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_the_environment_is_found_and_its_command_exists() -> None:
    path = instructions("ENV")[-1].removeprefix("PATH=").split(":")[0]
    assert path.removesuffix("/bin") in re.findall(r"python -m venv (\S+)", TEXT)
    assert set(json.loads(instructions("ENTRYPOINT")[0])) == set(PROJECT["scripts"]) == {"rkif"}


def test_the_documented_commands_have_help() -> None:
    page = (ROOT / "docs" / "guide" / "serving.md").read_text(encoding="utf-8")
    commands = re.findall(r"docker run .* rkif (\w+)", TEXT + page)
    assert set(commands) == {"demo", "run"}
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
