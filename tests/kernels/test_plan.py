"""A prepared update equals the operation, also if tensors move, become None or return between steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from kernel_cases import BLOCK, CHUNK, NATIVE, assert_same_bits, normal, on
from torch import Tensor

from rkif_kernels import ImportancePlan, Smoothing, update_importance_
from rkif_kernels.backends.triton.plan import _RoleAddresses
from rkif_kernels.backends.triton.table import StreamOrder
from rkif_kernels.checks import ValidatedLists

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [BLOCK + 1, 3, 0, CHUNK + 5]
BACKENDS = [
    "triton",
    "torch" if DEVICE == "cpu" else pytest.param("torch", marks=pytest.mark.gpu),
    pytest.param("native", marks=[NATIVE, pytest.mark.skipif(DEVICE == "cuda", reason="for CPU tensors")]),
]
backends = pytest.mark.parametrize("backend", BACKENDS)
SETTINGS: dict[str, Any] = {"beta1": 0.85, "beta2": 0.6, "order": "mixed"}


class Pair:
    """A plan and the operation, each with its own states, which are compared after every step."""

    def __init__(self, backend: Any, dtype: torch.dtype = torch.float32) -> None:
        self.backend = backend
        self.params = cast(list[Tensor], on(DEVICE, normal(SIZES, dtype, 0)))
        self.states = [[torch.zeros(size, device=DEVICE) for size in SIZES] for _ in range(4)]
        self.counters = [torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(2)]
        self.plan = ImportancePlan(
            self.states[0],
            self.states[1],
            smoothing=Smoothing(**SETTINGS),
            nonfinite=self.counters[0],
            backend=backend,
        )

    def step(self, grads: list[Any], *, frozen: bool = False) -> None:
        self.plan.update(self.params, grads, frozen=frozen)
        betas = {"beta1": 1.0, "beta2": 1.0} if frozen else {}
        update_importance_(
            self.params, grads, *self.states[2:], **(SETTINGS | betas),
            nonfinite=self.counters[1], backend=self.backend,
        )  # fmt: skip
        for got, wanted in ((0, 2), (1, 3)):
            assert_same_bits(self.states[got], on("cpu", self.states[wanted]) or [])
        assert torch.equal(*self.counters)


def gradients(seed: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    return on(DEVICE, normal(SIZES, dtype, seed)) or []


@backends
def test_gradients_may_move_disappear_and_return(backend: str) -> None:
    pair = Pair(backend)
    first, second = gradients(1), gradients(2)
    for grads in (first, first, second, first):
        pair.step(grads)
    pair.step([first[0], None, *first[2:]])
    pair.step([None, first[1], *first[2:]])  # the same number of gradients, of other parameters
    pair.step([None] * 4)
    pair.step(first)
    assert (pair.states[0][0] > 0).all()


@backends
def test_nonfinite_elements_are_counted_and_keep_their_state(backend: str) -> None:
    pair = Pair(backend)
    grads = gradients(1)
    pair.step(grads)
    before = on("cpu", pair.states[0])
    grads[3][-1] = torch.inf
    pair.step(grads, frozen=True)
    assert_same_bits(pair.states[0], before or [])
    assert pair.counters[0].item() == 1


@backends
def test_parameters_may_move(backend: str) -> None:
    pair = Pair(backend)
    grads = gradients(1)
    pair.step(grads)
    pair.params = [param.clone() * 2 for param in pair.params]
    pair.step(grads)


@backends
def test_another_dtype_at_the_same_address_is_validated(backend: str) -> None:
    pair = Pair(backend)
    grads = gradients(1, torch.bfloat16)
    pair.step(grads)
    pair.step([grad.view(torch.float16) for grad in grads])


@backends
def test_a_gradient_that_a_kernel_cannot_address_is_copied(backend: str) -> None:
    """A non-contiguous gradient at the address of a contiguous one, and one with an unaligned address."""
    pair = Pair(backend)
    wide = torch.randn(2 * max(SIZES) + 1, device=DEVICE)
    strided = [wide[: 2 * size : 2] for size in SIZES]
    for grads in ([wide[:size] for size in SIZES], strided, strided, [wide[1 : 1 + size] for size in SIZES]):
        pair.step(grads)
        wide.add_(1)  # a copy that is not repeated would be stale


def test_copies_keep_their_addresses() -> None:
    wide = torch.randn(20)
    views: list[list[Tensor | None]] = [[wide[start : start + 8 : 2]] for start in (1, 3, 5)]
    places = _RoleAddresses(views[0])
    addresses = [places.find(tensors) for tensors in views]
    assert addresses[0] == addresses[1] == addresses[2] != [wide[5:].data_ptr()]


@backends
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grads: grads[:3], "grads has 3 tensors, params has 4"),
        (lambda grads: [grads[0].view(1, -1), *grads[1:]], r"grads\[0\] has shape"),
        (lambda grads: [grads[1], *grads[1:]], r"grads\[0\] has shape"),
    ],
    ids=["too few", "other shape", "other size"],
)
def test_invalid_inputs_are_refused(
    backend: str, change: Callable[[list[Any]], list[Any]], message: str
) -> None:
    pair = Pair(backend)
    grads = gradients(1)
    pair.step(grads)
    before = on("cpu", pair.states[0]) or []
    with pytest.raises(ValueError, match=message):
        pair.plan.update(pair.params, change(grads))
    assert_same_bits(pair.states[0], before)
    pair.step(grads)


def test_unaligned_states_are_refused() -> None:
    state = torch.zeros(9, device=DEVICE)[1:]
    counter = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    plan = ImportancePlan([state], smoothing=Smoothing(0.5), nonfinite=counter, backend="triton")
    tensor = torch.ones(8, device=DEVICE)
    with pytest.raises(ValueError, match="tensor 0 must start on a boundary of 16 bytes"):
        plan.update([tensor], [tensor])
    assert (state == 0).all()


def test_autograd_detects_the_write() -> None:
    flat = torch.zeros(16, device=DEVICE)
    pair = [flat[:8], flat[8:]]
    counter = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    plan = ImportancePlan(pair, smoothing=Smoothing(0.5), nonfinite=counter)
    ones = [torch.ones(8, device=DEVICE)] * 2
    before = pair[1]._version
    plan.update(ones, ones)
    assert pair[1]._version > before


def test_a_plan_is_safe_for_several_threads() -> None:
    pair = Pair("triton")
    sets = [gradients(seed) for seed in range(4)]
    for grads in sets:
        grads[0][0] = torch.nan

    def steps(grads: list[Any]) -> None:
        for _ in range(5):
            pair.plan.update(pair.params, grads)

    threads = [threading.Thread(target=steps, args=(grads,)) for grads in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pair.counters[0].item() == 20


def test_validated_lists_forget_the_oldest_under_many_threads() -> None:
    validated = ValidatedLists()

    def use(offset: int) -> None:
        for key in range(offset, offset + 300):
            validated.add(key)
            assert key in validated or len(validated._keys) == validated.LIMIT

    threads = [threading.Thread(target=use, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(validated._keys) == validated.LIMIT


class _Stream:
    def __init__(self) -> None:
        self.waited_for: list[_Stream] = []

    def wait_stream(self, other: _Stream) -> None:
        self.waited_for.append(other)


class _Memory:
    def __init__(self) -> None:
        self.streams: list[_Stream] = []

    def record_stream(self, stream: _Stream) -> None:
        self.streams.append(stream)


@pytest.mark.parametrize("capturing", [False, True])
def test_streams_wait_for_each_others_copies(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = _Stream(), _Stream()
    current = one
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    memory = _Memory()
    order = StreamOrder(torch.device("cuda", 0), cast(Any, [memory]))
    order.enter()
    assert (one.waited_for, memory.streams) == ([], [])
    current = other
    order.enter()
    # A capture does not wait for other streams, but its memory must not be reused during the capture.
    assert other.waited_for == ([] if capturing else [one])
    assert memory.streams == [other]
    current = one
    order.enter()
    assert one.waited_for == ([] if capturing else [other])


@pytest.mark.gpu
def test_two_streams_on_a_device_give_the_same_bits() -> None:
    pair = Pair("triton")
    sets = [gradients(seed) for seed in range(2)]
    streams: list[Any] = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    for step in range(20):
        with torch.cuda.stream(streams[step % 2]):
            pair.plan.update(pair.params, sets[step % 2])
    torch.cuda.synchronize()
    for step in range(20):
        update_importance_(
            pair.params, sets[step % 2], *pair.states[2:], **SETTINGS, nonfinite=pair.counters[1]
        )
    assert_same_bits(pair.states[0], on("cpu", pair.states[2]) or [])


@pytest.mark.gpu
def test_a_training_step_is_captured_and_replayed() -> None:
    """Gradients are allocated in the capture; steps outside it with other gradients do not affect it."""
    weight = torch.nn.Parameter(torch.randn(64, 32, device=DEVICE))
    data = torch.randn(16, 32, device=DEVICE)
    states = [[torch.zeros_like(weight)] for _ in range(2)]
    counter = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    plan = ImportancePlan([states[0][0].detach()], smoothing=Smoothing(0.5), nonfinite=counter)
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (data @ weight.T).square().mean().backward()
        plan.update([weight], [weight.grad])
        optimizer.step()

    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step()
    start_weight, start_state = weight.detach().clone(), states[0][0].clone()
    graph.replay()
    plan.update([weight], [torch.zeros_like(weight)])
    graph.replay()
    found = states[0][0].clone()

    states[0][0].copy_(start_state)
    with torch.no_grad():
        weight.copy_(start_weight)
    step()
    plan.update([weight], [torch.zeros_like(weight)])
    step()
    assert_same_bits([found.flatten()], [states[0][0].flatten().cpu()])
