"""The example of docs/adding-an-op.md: its three implementations give the same bits."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_cases import CONFIG, PARAMETER_DTYPES, SIZES, Guarded, assert_same_bits, normal, on

PAGE = Path(__file__).parents[2] / "docs" / "adding-an-op.md"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    """Backend -> the module on the page."""
    folder = tmp_path_factory.mktemp("average")
    modules = {}
    code = re.findall(
        r"```python\n(# backends/(\w+)/.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    for text, name in code:
        path = folder / f"{name}_average.py"
        path.write_text(text, encoding="utf-8")  # Triton reads the source of a kernel from its file
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    assert set(modules) == {"reference", "torch", "triton"}
    return modules


def test_the_reference_is_the_formula(backends: dict[str, ModuleType]) -> None:
    average = torch.tensor([1.0, -2.0, 0.0])
    backends["reference"].average_([average], [torch.tensor([3.0, 2.0, 8.0])], decay=0.75)
    assert average.tolist() == [1.5, -1.0, 2.0]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_backend_gives_the_bits_of_the_reference(
    backends: dict[str, ModuleType], name: str, dtype: torch.dtype, sizes: list[int]
) -> None:
    averages, params = normal(sizes, dtype, 0), normal(sizes, torch.float32, 1)
    params[-1][:1] = torch.nan
    expected = on("cpu", averages)
    backends["reference"].average_(expected, params, decay=0.9)
    device = DEVICE if name == "triton" else "cpu"
    got = Guarded(averages, device)
    settings = {"config": CONFIG} if name == "triton" else {}
    backends[name].average_(got.tensors, on(device, params), decay=0.9, **settings)
    assert_same_bits(got.tensors, expected)
    got.assert_edges_untouched()
