"""Options of the suite, and fixtures that check, time and record operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common import peak as memory
from bench.common import rows
from bench.common.timing import copy_gbps
from bench.kernels.implementations import implementations
from bench.kernels.measure import QUICK, Budget, measure
from bench.kernels.operations import DTYPES, OPERATIONS, Operation, bytes_per_element
from bench.kernels.shapes import SHAPES, by_default, fitted


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--shape", action="append", default=[], choices=list(SHAPES))
    group.addoption("--dtype", action="append", default=[], choices=list(DTYPES))
    group.addoption("--implementation", default="", help="prefix of the names")
    group.addoption("--quick", action="store_true")
    group.addoption("--threads", type=int)
    group.addoption("--memory", type=float, help="GiB for inputs")
    group.addoption("--rows", type=Path, help="file for the rows")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test per shape, dtype and implementation; tests with the same inputs are consecutive."""
    option = metafunc.config.getoption
    device = torch.device(option("--device"))
    op = metafunc.module.OPERATION.name
    cases = [
        pytest.param(shape, dtype, implementation, id=f"{shape} {dtype} {implementation.name}")
        for shape in option("--shape") or by_default(device.type, option("--quick"))
        for dtype in option("--dtype") or DTYPES
        for implementation in implementations(op, device)
        if implementation.name.startswith(option("--implementation"))
    ]
    metafunc.parametrize(("shape", "dtype", "implementation"), cases)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def bandwidth(device: torch.device) -> float:
    gbps = copy_gbps(device)
    memory.release(device)
    return gbps


@pytest.fixture(scope="session")
def operations(
    request: pytest.FixtureRequest, device: torch.device
) -> Iterator[Callable[[str, str, str], Operation]]:
    """Return a function that makes operations with their inputs, and caches the last one."""
    kept: dict[tuple[str, str, str], Operation] = {}
    bytes_for_inputs = memory.budget(device, request.config.getoption("--memory"))

    def make(op: str, shape: str, dtype: str) -> Operation:
        key = (op, shape, dtype)
        if key not in kept:
            kept.clear()
            memory.release(device)
            # With a second gradient and copies of the state, other operations need as much memory as a
            # fusion.
            each = max(bytes_per_element(op, DTYPES[dtype]), bytes_per_element("fuse", DTYPES[dtype]))
            try:
                shapes = fitted(shape, bytes_for_inputs // each)
            except ValueError as error:
                pytest.skip(str(error))
            kept[key] = OPERATIONS[op](shapes, DTYPES[dtype], device)
        return kept[key]

    yield make
    kept.clear()


@pytest.fixture
def measured(
    request: pytest.FixtureRequest,
    benchmark: Any,
    bandwidth: float,
    operations: Callable[[str, str, str], Operation],
    shape: str,
    dtype: str,
    implementation: Any,
) -> Iterator[Callable[[type[Operation]], None]]:
    """Return a function that measures the test's case and records its row."""
    option = request.config.getoption

    def run(kind: type[Operation]) -> None:
        if implementation.obstacle:
            pytest.skip(implementation.obstacle)
        operation = operations(kind.name, shape, dtype)
        if obstacle := implementation.obstacle_to(operation.shapes):
            pytest.skip(obstacle)
        budget = QUICK if option("--quick") else Budget()
        try:
            row = measure(benchmark, operation, implementation, budget, bandwidth)
        except torch.OutOfMemoryError:
            pytest.skip("out of GPU memory")
        rows.write(option("--rows") or rows.results_file(operation.device.type), row)

    yield run
    torch.compiler.reset()  # after a number of shapes, torch.compile would silently stop compiling
