"""Random inputs and edge cases for every operation and backend, compared bit for bit with the reference.

The tests use fixed inputs. The sweep uses new inputs until its time is over. The seed alone determines a
case, so ``python -m bench sweep --seed SEED --cases 1`` repeats a mismatch.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

from bench.common.timing import captured
from bench.kernels.equality import require_same_bits
from rkif_kernels import (
    FusionInputs,
    ImportanceInputs,
    Scores,
    fuse_,
    order_statistic_k,
    score_thresholds,
    select_and_fuse_,
    update_importance_,
)
from rkif_kernels.backends import reference
from rkif_kernels.backends.choose import available, interpreting
from rkif_kernels.checks import PARAMETER_DTYPES, STATE_DTYPES
from rkif_kernels.types import (
    Backend,
    CaseWeights,
    FuseStats,
    MergeRule,
    Order,
    OuterFrom,
    Scope,
    Smoothing,
)

# Maximum of elements of a tensor: on a GPU enough for a single pass, on a CPU few enough to sort quickly.
LARGEST = {"cuda": 12_000_000, "cpu": 300_000}
INTERPRETED = 5_000  # maximum in Triton's interpreter, for about a second per case


@dataclass(frozen=True)
class Case:
    """The inputs (on the CPU) and settings of a seed."""

    params: tuple[list[Tensor], list[Tensor], list[Tensor]]
    grads: list[Tensor | None]
    sides: tuple[Scores, Scores]
    density: float
    scope: Scope
    order: Order
    betas: tuple[float, float]
    weights: CaseWeights
    outer_from: OuterFrom
    text: str


def sweep(
    device: torch.device,
    backends: Sequence[str],
    limit_s: float,
    cases: int | None,
    seed: int,
    graphs: bool = False,
) -> tuple[int, str]:
    """Run each case twice, until the time is over, ``cases`` have passed, or one has failed.

    Args:
        device: of the backends; the reference runs on the CPU.
        backends: names of the backends; if empty, all that are available.
        limit_s: time limit in seconds.
        cases: maximum number of cases.
        seed: of the first case; the others have the following seeds.
        graphs: replay each case from a CUDA graph that was captured with other values.

    Returns:
        The number of cases that passed, and the failure of the next one, or "".
    """
    backends = backends or available(device)
    largest = INTERPRETED if interpreting() and "triton" in backends else LARGEST[device.type]
    start, done = time.monotonic(), 0
    for case_seed in itertools.count(seed):
        if done == cases or time.monotonic() - start >= limit_s:
            break
        case = make_case(case_seed, largest)
        # Triton's interpreter reads bfloat16 denormals as zero.
        excluded = {"triton"} if interpreting() and _has_bfloat16_denormals(case) else set()
        for backend in sorted(set(backends) - excluded):
            try:
                with _bracketing(case_seed) if backend == "triton" else nullcontext():
                    for _ in range(2):  # an error that depends on timing may not occur at once
                        (check_replay if graphs else check)(case, device, cast(Backend, backend))
            except (AssertionError, RuntimeError) as error:
                return done, f"seed {case_seed}, {backend}, {case.text}: {error}"
        done += not excluded
    return done, ""


@contextmanager
def _bracketing(seed: int) -> Iterator[None]:
    """Use brackets that the seed determines, which may miss. Inputs of all sizes use them."""
    from rkif_kernels.backends.triton import both_thresholds as both
    from rkif_kernels.backends.triton import score_thresholds as threshold
    from rkif_kernels.backends.triton import select_and_fuse_ as fuse
    from rkif_kernels.backends.triton.launch import LaunchConfig
    from rkif_kernels.backends.triton.launches import default_bracketing

    choose = random.Random(seed)
    bracketing = replace(
        default_bracketing(),
        min_numel=1,
        sample_stride=choose.randint(2, 64),
        sigmas=choose.choice([0.5, 2.0, 4.0]),
        list_slack=choose.uniform(0.1, 2),
        run=choose.choice([1, 8]),
        first_samples=choose.choice([64, 2048]),
    )
    # If each tensor has a threshold of its own, those larger than this block are bracketed.
    whole = LaunchConfig(block=choose.choice([32, 1024, 8192]), tiles=1, num_warps=4)
    with (
        patch.dict(cast(Any, fuse).__kwdefaults__, bracketing=bracketing),
        patch.dict(cast(Any, threshold).__kwdefaults__, bracketing=bracketing, whole=whole),
        patch.dict(cast(Any, both).__kwdefaults__, bracketing=bracketing, whole=whole),
    ):
        yield


def make_case(seed: int, largest: int) -> Case:
    """The case of a seed."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = [_size(choose, largest) for _ in range(choose.randint(1, 6))]
    sizes[choose.randrange(len(sizes))] += 1  # at least one element
    kinds = [choose.choice(list(SCORES)) for _ in range(4)]
    uncertain = choose.random() < 0.7

    def params() -> list[Tensor]:
        return [_param(size, choose.choice(PARAMETER_DTYPES), generator) for size in sizes]

    def state(kind: str) -> list[Tensor]:
        dtype = choose.choice(STATE_DTYPES)
        return [tensor.to(dtype) for tensor in _spread(SCORES[kind], sizes, generator)]

    sides = (
        Scores(state(kinds[0]), state(kinds[1]) if uncertain else None),
        Scores(state(kinds[2]), state(kinds[3]) if uncertain else None),
    )
    density = choose.choice([0.0, 1.0, 0.2, 0.2, 0.5, 0.01, 0.999, choose.random()])
    scope: Scope = choose.choice(["global", "tensor"])
    pairs = [(choose.uniform(-2, 2), choose.uniform(-2, 2)) for _ in range(4)]
    weights = choose.choice([_RELEASE, _PAPER, cast(CaseWeights, tuple(pairs))])
    return Case(
        params=(params(), params(), params()),
        grads=[None if choose.random() < 0.1 else grad for grad in params()],
        sides=sides,
        density=density,
        scope=scope,
        order=choose.choice(["first", "second", "mixed"]),
        betas=(choose.choice([0.0, 1.0, 0.85, choose.random()]), choose.random()),
        weights=weights,
        outer_from=choose.choice(["inner", "base"]),
        text=f"sizes {sizes}, scores {kinds if uncertain else kinds[::2]}, density {density}, scope {scope}",
    )


def check(case: Case, device: torch.device, backend: Backend) -> None:
    """Run every operation; raise AssertionError at the first bit that differs from the reference."""
    _check_observe(case, device, backend)
    expected = [_expected_thresholds(case, scores) for scores in case.sides]
    for side, scores, wanted in zip(("inner", "outer"), case.sides, expected, strict=True):
        got = score_thresholds(_on(device, scores), density=case.density, scope=case.scope, backend=backend)
        require_same_bits(f"score_thresholds, {side}", got.cpu(), wanted)
    _check_fuse(case, device, backend, (expected[0], expected[1]))


def check_replay(case: Case, device: torch.device, backend: Backend) -> None:
    """Capture an update and a fusion, copy the case into the captured memory, replay, and compare.

    Raises:
        AssertionError: a bit differs from the reference, or no CUDA graph could be captured.
    """
    other = _other_values(case)
    params: list[Any] = [_copies(device, tensors) for tensors in other.params]
    sides = [_on(device, scores) for scores in other.sides]
    grads = [None if grad is None else grad.to(device, copy=True) for grad in other.grads]
    out = [torch.full_like(tensor, torch.nan) for tensor in params[0]]
    nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
    observing: dict[str, Any] = {"beta1": case.betas[0], "beta2": case.betas[1], "order": case.order}
    fusing: dict[str, Any] = {"weights": case.weights, "outer_from": case.outer_from}

    def a_round() -> FuseStats:
        state = sides[0].sensitivity, sides[0].uncertainty
        update_importance_(params[1], grads, *state, nonfinite=nonfinite, backend=backend, **observing)
        return select_and_fuse_(
            out, *params, *sides, density=case.density, scope=case.scope, backend=backend, **fusing
        )

    stats: list[FuseStats] = []
    replay = captured(lambda: stats.append(a_round()))
    assert replay is not None, "no CUDA graph could be captured"
    for there, here in zip(
        [*params[0], *params[1], *params[2], *_all(sides), *grads],
        [*case.params[0], *case.params[1], *case.params[2], *_all(case.sides), *case.grads],
        strict=True,
    ):
        if there is not None and here is not None:
            there.copy_(here)
    for tensor in out:
        tensor.fill_(torch.nan)
    replay()

    scores = _on("cpu", case.sides[0])
    state = scores.sensitivity, scores.uncertainty
    none = torch.zeros(1, dtype=torch.int64)
    reference.update_importance_(
        ImportanceInputs(case.params[1], case.grads, *state), Smoothing(**observing), none
    )
    updated = replace(case, sides=(scores, case.sides[1]))
    limits = [_expected_thresholds(updated, side) for side in updated.sides]
    wanted = [torch.full_like(tensor, torch.nan) for tensor in case.params[0]]
    expected = reference.fuse_(
        FusionInputs(wanted, *case.params, *updated.sides), (limits[0], limits[1]), MergeRule(**fusing)
    )
    _require_all("replayed, S and U", _all([sides[0]]), _all([scores]))
    for name, threshold, limit in zip(("inner", "outer"), stats[-1].thresholds, limits, strict=True):
        require_same_bits(f"replayed, {name} threshold", threshold.cpu(), limit)
    _require_all("replayed, fused", out, wanted)
    require_same_bits("replayed, counts", stats[-1].counts.cpu(), expected.counts)


def _other_values(case: Case) -> Case:
    """A case with the same shapes, dtypes and settings: reversed tensors, and S halved."""

    def backwards(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.flip(0) for tensor in tensors]

    inner, outer = (
        Scores(
            [tensor / 2 for tensor in backwards(scores.sensitivity)],
            None if scores.uncertainty is None else backwards(scores.uncertainty),
        )
        for scores in case.sides
    )
    params = [backwards(tensors) for tensors in case.params]
    return replace(case, params=(params[0], params[1], params[2]), sides=(inner, outer))


def _all(sides: Sequence[Scores]) -> list[Tensor]:
    """All tensors of the scores."""
    return [tensor for scores in sides for tensor in (*scores.sensitivity, *(scores.uncertainty or ()))]


def _check_observe(case: Case, device: torch.device, backend: Backend) -> None:
    scores, params = case.sides[0], case.params[0]
    wanted_s, wanted_u = _copies("cpu", scores.sensitivity), _optional("cpu", scores.uncertainty)
    got_s, got_u = _copies(device, scores.sensitivity), _optional(device, scores.uncertainty)
    wanted_bad = torch.zeros(1, dtype=torch.int64)
    got_bad = wanted_bad.to(device, copy=True)
    settings: dict[str, Any] = {"beta1": case.betas[0], "beta2": case.betas[1], "order": case.order}
    reference.update_importance_(
        ImportanceInputs(params, case.grads, wanted_s, wanted_u), Smoothing(**settings), wanted_bad
    )
    grads = [None if grad is None else grad.to(device) for grad in case.grads]
    moved = _copies(device, params)
    update_importance_(moved, grads, got_s, got_u, nonfinite=got_bad, backend=backend, **settings)
    _require_all("update_importance_, S", got_s, wanted_s)
    _require_all("update_importance_, U", got_u or [], wanted_u or [])
    require_same_bits("update_importance_, non-finite", got_bad.cpu(), wanted_bad)


def _check_fuse(
    case: Case, device: torch.device, backend: Backend, thresholds: tuple[Tensor, Tensor]
) -> None:
    base = case.params[0]
    wanted = [torch.full_like(tensor, torch.nan) for tensor in base]
    settings: dict[str, Any] = {"weights": case.weights, "outer_from": case.outer_from}
    stats = reference.fuse_(
        FusionInputs(wanted, *case.params, *case.sides), thresholds, MergeRule(**settings)
    )
    inputs: list[Any] = [_copies(device, tensors) for tensors in case.params]
    inputs += [_on(device, scores) for scores in case.sides]
    limits = (thresholds[0].to(device), thresholds[1].to(device))
    calls: dict[str, Callable[[list[Tensor]], Any]] = {
        "fuse_": lambda out: fuse_(out, *inputs, thresholds=limits, backend=backend, **settings),
        "select_and_fuse_": lambda out: select_and_fuse_(
            out, *inputs, density=case.density, scope=case.scope, backend=backend, **settings
        ),
    }
    for name, call in calls.items():
        out = [torch.full_like(tensor, torch.nan, device=device) for tensor in base]
        got = call(out)
        _require_all(name, out, wanted)
        require_same_bits(f"{name}, counts", got.counts.cpu(), stats.counts)
        torch.testing.assert_close(
            got.squared_norms.cpu(),
            stats.squared_norms,
            rtol=1e-12,
            atol=0,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}, squared norms: {text}",  # type: ignore[misc]
        )
    for side, threshold, limit in zip(("inner", "outer"), got.thresholds, thresholds, strict=True):
        require_same_bits(f"select_and_fuse_, {side} threshold", threshold.cpu(), limit)


def _expected_thresholds(case: Case, scores: Scores) -> Tensor:
    """The expected result of :func:`rkif_kernels.score_thresholds`, found by the reference."""
    sizes = [tensor.numel() for tensor in scores.sensitivity]
    per_tensor = case.scope == "tensor"
    groups = sizes if per_tensor else [sum(sizes)]
    if case.density in (0, 1):
        return torch.full((len(groups),), torch.inf if case.density == 0 else -torch.inf)
    filled = [index for index, size in enumerate(sizes) if size]
    ks = [order_statistic_k(size, case.density) for size in groups if size]
    thresholds = reference.score_thresholds(scores.subset(filled), ks=ks, per_tensor=per_tensor)
    expected = torch.full((len(groups),), torch.inf)
    expected[[index for index, size in enumerate(groups) if size]] = thresholds
    return expected


def _size(choose: random.Random, largest: int) -> int:
    """A size from 0 to ``largest``, log-uniform, and often a power of two or one more."""
    size = int(largest ** choose.random()) - 1
    return choose.choice([size, size, 1 << size.bit_length() >> 1, (1 << size.bit_length() >> 1) + 1])


def _param(size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values, with a few infinities, NaNs, zeros, denormals and very large values."""
    values = torch.randn(size, generator=generator)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0, 1e-42, 3e38])
    at = torch.rand(size, generator=generator) < 1e-3
    which = torch.randint(len(special), (size,), generator=generator)
    return torch.where(at, special[which], values).to(dtype)


def _has_bfloat16_denormals(case: Case) -> bool:
    """Whether S or U of a learner has a bfloat16 denormal."""
    tiny = torch.finfo(torch.bfloat16).tiny
    states = [tensor for tensor in _all(case.sides) if tensor.dtype == torch.bfloat16]
    return any(bool(((tensor != 0) & (tensor.abs() < tiny)).any()) for tensor in states)


def _spread(
    make: Callable[[Tensor], Tensor], sizes: Sequence[int], generator: torch.Generator
) -> list[Tensor]:
    """Make values for all tensors together, and split them."""
    values = make(torch.rand(sum(sizes), generator=generator))
    return list(torch.split(values, list(sizes)))


def _on(device: torch.device | str, scores: Scores) -> Scores:
    return Scores(_copies(device, scores.sensitivity), _optional(device, scores.uncertainty))


def _copies(device: torch.device | str, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.to(device, copy=True) for tensor in tensors]


def _optional(device: torch.device | str, tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
    return None if tensors is None else _copies(device, tensors)


def _require_all(what: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        require_same_bits(f"{what}, tensor {index}", one.cpu(), other)


_RELEASE: CaseWeights = ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5))
_PAPER: CaseWeights = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0))
# Name -> function that makes scores of uniform random numbers.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda x: x,
    "wide": lambda x: (x * 60 - 40).exp(),
    "all equal": lambda x: torch.full_like(x, 0.3),
    "all zero": torch.zeros_like,
    "95 % zeros": lambda x: torch.where(x > 0.95, x, 0.0),
    "two values": lambda x: torch.where(x > 0.5, 1.0, 2.0),
    "five values": lambda x: (x * 5).floor(),
    "bfloat16 ties": lambda x: x.bfloat16().float(),
    "ascending": lambda x: x.sort().values,
    "descending": lambda x: x.sort(descending=True).values,
    "denormal": lambda x: x * 1e-40,
    "with infinities": lambda x: torch.where(x > 0.7, torch.inf, x),
    "with negative zeros": lambda x: torch.where(x > 0.5, -0.0, x),
    "one small among large": lambda x: torch.where(x == x.min(), 1e-30, 1e30) if x.numel() else x,
}
