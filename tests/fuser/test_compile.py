"""torch.compile: rkif between compiled steps, inside compiled functions, and as a registered operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fuser_loop import batch, make_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import rkif
import rkif_kernels

CONFIG = rkif.FusionConfig(density=0.3)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rounds(how: str, counter: Any) -> list[Tensor]:
    """Three rounds with nothing compiled, the forward pass compiled, or the whole step with rkif's calls."""
    model = make_model()
    forward = torch.compile(model, backend=counter) if how == "forward" else model
    fuser = rkif.Fuser(forward, CONFIG)

    def step(rate: float, x: Tensor) -> None:
        forward(x).exp().mean().backward()
        fuser.observe()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                # Compiled optimizers round differently in some versions of PyTorch.
                parameter.sub_(parameter.grad * rate)
        model.zero_grad()

    taken = torch.compile(step, backend=counter) if how == "step" else step
    for number in range(3):
        for at in range(3):
            taken(0.1, batch(10 * number + at))
        with fuser.outer():
            for at in range(3, 5):
                taken(0.2, -batch(10 * number + at))
    assert fuser.round == 3
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("how", ["forward", "step"])
def test_compiled_steps_give_the_same_bits(how: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    plain, compiled = rounds("plain", counter), rounds(how, counter)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    assert counter.frame_count >= 1


def test_fusions_cause_no_recompilation() -> None:
    """Parameters are written in place: one graph serves all rounds."""
    counter = CompileCounterWithBackend("aot_eager")
    rounds("forward", counter)
    assert counter.frame_count == 1


def importance_step(
    weight: Tensor, x: Tensor, s: Tensor, u: Tensor | None, nonfinite: Tensor
) -> tuple[Tensor, Tensor]:
    gradient = torch.func.grad(lambda w: (x @ w).square().mean())(weight)
    rkif_kernels.update_importance_(
        [weight],
        [gradient],
        [s],
        None if u is None else [u],
        beta1=0.5,
        beta2=0.3,
        order="mixed",
        nonfinite=nonfinite,
        names=["w"],
    )
    return weight - 0.1 * gradient, s * 2


@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_an_update_of_importance_is_one_operation_of_a_graph(backend: str, uncertainty: bool) -> None:
    """With fullgraph=True a graph break would be an error. Later operations see the writes."""
    weight, x = torch.randn(2, 4, 4)
    x[0, 0] = torch.inf
    results = []
    for function in (importance_step, torch.compile(importance_step, fullgraph=True, backend=backend)):
        state = [torch.zeros(4, 4), torch.zeros(4, 4) if uncertainty else None]
        nonfinite = torch.zeros(1, dtype=torch.int64)
        found = function(weight, x, *state, nonfinite)
        results.append([*found, *(tensor for tensor in state if tensor is not None), nonfinite])
    assert results[0][-1] > 0
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=0, equal_nan=True)


def test_the_operation_passes_opcheck() -> None:
    tensors = [torch.randn(5), torch.randn(5)]
    state = [[torch.zeros(5), torch.zeros(5)], [torch.zeros(5), torch.zeros(5)]]
    count = torch.zeros(1, dtype=torch.int64)
    torch.library.opcheck(
        torch.ops.rkif.update_importance_.default,
        (tensors, [torch.randn(5), None], *state, 0.5, 0.5, "first", count, "auto"),
    )
