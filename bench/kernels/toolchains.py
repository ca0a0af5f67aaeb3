"""Other versions of Triton than the installed one, each in its own folder at the front of PYTHONPATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any


def check_under(
    versions: Sequence[str], targets: Sequence[str], kernels: Sequence[str] = (), dtypes: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], bool]:
    """Run ``bench aot`` under each version of Triton, in separate processes.

    Returns:
        The rows of all, and whether every check passed.
    """
    collected: list[dict[str, Any]] = []
    passed = True
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "bench", "aot", "--json", str(rows)]
            for option, values in (("--target", targets), ("--kernel", kernels), ("--dtype", dtypes)):
                command += [part for value in values for part in (option, value)]
            done = subprocess.run(command, env=environment(version), check=False)
            passed &= done.returncode == 0
            collected += json.loads(rows.read_text(encoding="utf-8")) if rows.exists() else []
    return collected, passed


def environment(version: str) -> dict[str, str]:
    """The environment of a process that imports this version of Triton, which is installed if missing.

    Raises:
        CalledProcessError: pip cannot install it.
    """
    if version == installed_version("triton"):
        return dict(os.environ)
    path = (str(_installed(version)), os.environ.get("PYTHONPATH"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def _installed(version: str) -> Path:
    """The folder with this version of Triton; pip creates it if it is missing."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    folder = _cache() / f"triton-{version}-{python}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            target = Path(unfinished) / "triton"
            options = ("--quiet", "--no-deps", "--target", str(target))
            subprocess.run(
                [sys.executable, "-m", "pip", "install", *options, f"triton=={version}"], check=True
            )
            try:
                target.rename(folder)
            except OSError:
                if not folder.exists():  # otherwise another process has installed it meanwhile
                    raise
    return folder


def _cache() -> Path:
    """The user's cache folder, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rkif"
