"""A description changes with everything that a prepared call depends on, compiled or not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rkif_kernels import ImportancePlan, Smoothing, describe
from rkif_kernels.ops import guards

COMPILED = pytest.mark.skipif(guards._compiled is None, reason="the extension was not built")


@pytest.fixture(params=[pytest.param(True, marks=COMPILED), False], ids=["compiled", "python"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(guards, "_compiled", None)
    return bool(request.param)


class Tagged(Tensor):
    """A subclass, which may have any behaviour."""


FLAT = torch.zeros(64)
# Tensors at one address, no two of the same kind.
KINDS: dict[str, Any] = {
    "flat": FLAT[:16],
    "parameter": nn.Parameter(FLAT[:16]),
    "subclass": FLAT[:16].as_subclass(Tagged),
    "shape": FLAT[:16].view(4, 4),
    "strides": FLAT[:16].view(4, 4).t(),
    "other shape": FLAT[:16].view(2, 8),
    "gaps": FLAT[:32:2],
    "shorter": FLAT[:15],
    "dtype": FLAT.view(torch.int32)[:16],
    "half": FLAT.view(torch.float16)[:16],
    "bfloat16": FLAT.view(torch.bfloat16)[:16],
    "scalar": FLAT[0],
    "one": FLAT[:1],
    "empty": FLAT[:0],
}


def test_no_two_kinds_have_equal_descriptions(compiled: bool) -> None:
    described = [describe([tensor]) for tensor in (*KINDS.values(), None, torch.empty(16, device="meta"))]
    assert len({found.kinds for found in described}) == len(described)
    assert len({found.addresses for found in described[: len(KINDS) - 1]}) == 1


@pytest.mark.parametrize("entry", [torch.eye(3).to_sparse(), 3])
def test_a_list_without_addresses_equals_no_other(compiled: bool, entry: Any) -> None:
    tensors = [FLAT, entry]
    assert describe(tensors) != describe(tensors)
    assert describe(tensors).kinds != describe(tensors).kinds


@pytest.mark.parametrize("name", KINDS)
def test_equal_tensors_have_equal_descriptions(compiled: bool, name: str) -> None:
    tensor = KINDS[name]
    assert describe([tensor, None]) == describe((tensor, None))
    alias = tensor.detach().as_subclass(type(tensor))
    if not isinstance(tensor, nn.Parameter):
        assert describe([alias]) == describe([tensor])
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).as_subclass(type(tensor))
    assert describe([moved]).kinds == describe([tensor]).kinds


def test_tensors_may_have_many_dimensions(compiled: bool) -> None:
    tensors = [torch.zeros((1,) * 60) for _ in range(50)]
    assert describe(tensors) == describe(tensors)
    assert describe(tensors) != describe([*tensors[:-1], torch.zeros((1,) * 59)])


def test_the_order_and_the_positions_of_missing_tensors_count(compiled: bool) -> None:
    one, other = torch.zeros(3), torch.zeros(4)
    lists: list[list[Any]] = [
        [one, other], [other, one], [one, None], [None, one], [one], [one, one], [None, None], [None], [],
    ]  # fmt: skip
    described = [describe(tensors) for tensors in lists]
    assert len(set(described)) == len(described)


def test_the_addresses_are_those_of_the_tensors(compiled: bool) -> None:
    tensors: list[Any] = [FLAT[3:], None, FLAT.view(8, 8)[1:, 1:], nn.Parameter(FLAT[5:])]
    expected = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    assert describe(tensors).address_list() == expected


def test_a_delayed_negation_of_a_single_element_counts(compiled: bool) -> None:
    """The gradient of a parameter that is an imaginary part may be negated or not, at one address."""
    for shape in ((), (1,), (1, 1)):
        number = torch.complex(torch.zeros(shape), torch.ones(shape))
        assert number.conj().imag.is_neg()
        assert describe([number.imag]) == describe([number.imag])
        assert describe([number.imag]) != describe([number.conj().imag])


def test_inference_mode_counts(compiled: bool) -> None:
    outside = describe([FLAT])
    with torch.inference_mode():
        assert describe([FLAT]) != outside
    assert describe([FLAT]) == outside


def test_changes_in_place_count(compiled: bool) -> None:
    tensor = torch.zeros(4, 4)
    changes: list[Callable[[], object]] = [
        tensor.t_,
        lambda: setattr(tensor, "data", tensor.data.t().view(2, 8)),
        lambda: setattr(tensor, "data", tensor.data.view(torch.int32)),
        lambda: tensor.resize_(2, 4),
        lambda: setattr(tensor, "data", tensor.data.clone()),
    ]
    seen = {describe([tensor])}
    for change in changes:
        tensor.zero_()
        assert describe([tensor]) in seen
        change()
        assert describe([tensor]) not in seen
        seen.add(describe([tensor]))


@COMPILED
def test_plain_tensors_are_described_without_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_tensor: object) -> None:
        raise AssertionError

    monkeypatch.setattr(guards, "_PROPERTIES", fail)
    assert describe([FLAT, None, nn.Parameter(FLAT)]).kinds
    with pytest.raises(AssertionError):
        describe([KINDS["subclass"]])


class Clears(TorchFunctionMode):
    """Empties a list when `is_neg` of one of its tensors is called, as another thread could do."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tensors.clear()
        return func(*args, **(kwargs or {}))


@COMPILED
def test_a_list_that_changes_meanwhile_is_not_described_in_part() -> None:
    tensors = [torch.ones(1) for _ in range(3)]
    with Clears(tensors):
        assert guards._compiled.describe(tensors, guards._EXCHANGE_API, (Tensor,)) is None


@COMPILED
def test_wrong_arguments_of_the_extension_raise() -> None:
    with pytest.raises(TypeError):
        guards._compiled.describe([FLAT])
    with pytest.raises(ValueError, match="PyCapsule"):
        guards._compiled.describe([FLAT], None, ())
    with pytest.raises(TypeError):
        guards._compiled.describe(3, guards._EXCHANGE_API, (Tensor,))


def test_a_plan_follows_its_gradients(compiled: bool) -> None:
    states = torch.zeros(16)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    plan = ImportancePlan([states], smoothing=Smoothing(0.0), nonfinite=nonfinite)
    weight = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"sensitivity\[0\] has shape"):
        plan.update([weight], [weight])
    weight = weight.view(16)
    gradients: list[Any] = [torch.arange(16.0), torch.arange(16.0) + 1, torch.arange(32.0)[::2], None]
    for gradient in (*gradients, *gradients):
        plan.update([weight], [gradient])
        assert torch.equal(states, torch.zeros(16) if gradient is None else gradient)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_extension_compiles_without_warnings(tmp_path: Path) -> None:
    source = Path(guards.__file__).parent / "_describe.cpp"
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        pytest.skip("Python's headers are not installed")
    command = [
        "c++",
        "-std=c++17",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{include}",
        str(source),
    ]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", source.read_text())
