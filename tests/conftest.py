"""Fixtures. Kernels run compiled if there is a GPU, otherwise in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch

# Triton reads this variable at its first import, so it is set before all other imports. ttsem executes
# kernels that are not interpreted.
if not torch.cuda.is_available() and "ttsem" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

import pytest
from command import Rkif
from hypothesis import HealthCheck, settings
from kernel_cases import BLOCK, implementations

from rkif_kernels.backends.choose import interpreting

if interpreting() and find_spec("triton"):
    from interpreter import replace_builtins_once

    replace_builtins_once()


# A time limit per example would fail on a busy machine. CI repeats the same examples.
settings.register_profile(
    "rkif",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("rkif")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `pytest -n`, tests that share a slow fixture run on one worker, so that it is made once.

    ``--dist loadgroup`` would do it, but does not with pytest 9.2 (seen with pytest-xdist 3.8.0).
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return module if _shares(config.rootpath / module) else nodeid

    return Scheduler(config, log)


@cache
def _shares(module: Path) -> bool:
    """Whether the module has fixtures of its own, or a server that forks processes."""
    text = module.read_text(encoding="utf-8")
    return 'scope="module"' in text or "import start_program" in text


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Results do not depend on the number of cores, and busy cores do not make tests hang."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=implementations())
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One implementation, with small blocks, samples and lists."""
    monkeypatch.setattr("rkif_kernels.backends.torch.blocks.BLOCK", BLOCK)
    for name, value in {"SHORT": 32, "SMALL": 32, "SAMPLE_LEAST": 16, "SAMPLE_MOST": 16}.items():
        monkeypatch.setattr(f"rkif_kernels.selection.sampled.{name}", value)
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an unwritten element is detected."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small tasks, a small Llama, a small T5 and a small BERT."""
    from run_inputs import make_inputs

    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture
def config(inputs: Path) -> Callable[..., Any]:
    """A function that makes configs for these inputs; keywords change single settings."""
    from run_inputs import make_config

    return partial(make_config, inputs)


@pytest.fixture
def rkif(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Rkif:
    """A function that runs a command line; returns status, output and errors. An exception fails the test."""
    from rkif.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rkif", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    return call
