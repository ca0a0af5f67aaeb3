"""The pytest plugin: it executes every launch by ttsem, with all checks.

Tensors are on the CPU, as for Triton's interpreter. Kernels are those that are compiled for a GPU.
"""

from __future__ import annotations

import collections
import functools
import importlib
import itertools
import os
import pkgutil
import threading
from typing import Any

import pytest
from ttsem import harness, pidraces, sanitize
from ttsem._fakedriver import unstub_torch_cuda

from sanitizer.bounds import BoundedMemory, extents, own_bytes
from sanitizer.ordering import OrderedMemory, find_race, pass_attributes
from sanitizer.speed import speed_up
from sanitizer.unwritten import FillEmpty, WrittenMemory

ALL_TESTS = "tests/kernels"
SESSION = pytest.StashKey[Any]()
# Modules and tests that launch no Triton kernel in this process, or are about the host's side of calls: other
# tests make the same launches.
NOT_OF_KERNELS = (
    *(f"test_{module}.py" for module in ("aot", "host", "memory_bound", "native", "reference")),
    *(f"test_{module}.py" for module in ("library", "profiling", "task_vectors")),
    "::test_import_needs_neither_triton_nor_transformers_nor_peft",
    "::test_launches_do_not_grow_with_the_number_of_tensors",
    "::test_nothing_is_uploaded_for_tensors_that_stay_where_they_are",
    # Here, "auto" chooses Triton for CPU tensors, without Triton's interpreter.
    "::test_an_explicit_backend_that_cannot_run_is_an_error",
    "::test_auto_chooses_the_backend_by_device",
)

launches: collections.Counter[str] = collections.Counter()
_orders = itertools.count()
_execute = harness.execute
_one_launch = threading.Lock()  # ttsem keeps the state of a launch in globals


class CheckedMemory(WrittenMemory, OrderedMemory, BoundedMemory):
    """The memory of a launch, with all checks."""


def _execute_checked(record: Any, ir_text: str, **kwargs: Any) -> Any:
    """``harness.execute`` in a :class:`CheckedMemory`, with the programs in an order of this launch alone."""
    with _one_launch:
        harness.Memory = functools.partial(CheckedMemory, extents(record))
        os.environ["TTSEM_GRID_ORDER"] = f"shuffle:{next(_orders)}"
        launches[record.fn_name] += 1
        execution = _execute(record, ir_text, **kwargs)
    assert execution.memory is None or not execution.memory.access_overflow, (
        f"{record.fn_name}: too many accesses for the race check; use a smaller size"
    )
    return execution


def _prefer_triton() -> None:
    """Let "auto" choose Triton for CPU tensors, as it does for those on a GPU."""
    from rkif_kernels.backends import choose

    available = choose.available
    choose.available = lambda device: ["triton"] * (device.type == "cpu") + available(device)


def pytest_configure(config: pytest.Config) -> None:
    harness.storage_copy, harness.execute = own_bytes, _execute_checked
    sanitize._write_back = lambda record, execution: None  # the kernel wrote to the tensors
    pidraces.find_race = find_race
    pass_attributes()
    speed_up()
    _prefer_triton()
    config.stash[SESSION] = sanitize.session(cuda_is_cpu=False)
    config.stash[SESSION].__enter__()
    unstub_torch_cuda()
    FillEmpty().__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[SESSION].__exit__(None, None, None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that runs alone has the same orders."""
    global _orders
    _orders = itertools.count()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that are not of kernels, and the cases of other backends."""

    def without_triton(item: pytest.Item) -> bool:
        _, _, parameters = item.name.rstrip("]").partition("[")
        other_backend = not {"native", "torch"}.isdisjoint(parameters.split("-"))
        return other_backend or any(name in item.nodeid for name in NOT_OF_KERNELS)

    config.hook.pytest_deselected(items=[item for item in items if without_triton(item)])
    items[:] = [item for item in items if not without_triton(item)]


def _not_launched(config: pytest.Config) -> list[str]:
    """After a run of all kernel tests, the names of rkif's Triton kernels that it did not launch."""
    from rkif_kernels.backends import triton

    if ALL_TESTS not in config.getoption("file_or_dir"):
        return []
    modules = [f"{triton.__name__}.{found.name}" for found in pkgutil.iter_modules(triton.__path__)]
    names = {name for module in modules for name in vars(importlib.import_module(module))}
    return sorted(name for name in names if name.endswith("_kernel") and name not in launches)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A kernel that is not launched is not checked."""
    if _not_launched(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name, count in sorted(launches.items()):
        terminalreporter.write_line(f"ttsem: {count:6d} launches of {name}")
    for name in _not_launched(config):
        terminalreporter.write_line(f"ttsem: no launch of {name}")
