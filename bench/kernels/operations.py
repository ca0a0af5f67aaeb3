"""The measured operations: inputs, minimum of bytes moved, and checks of the results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.kernels.baselines import QUANTILE_LIMIT, all_scores
from bench.kernels.equality import chunks, exact_threshold, k_range, require_close, require_same_bits
from bench.kernels.shapes import Shape, ShapeSet
from rkif_kernels import FusionInputs, ImportanceInputs, MergeRule, Scores, Smoothing, order_statistic_k
from rkif_kernels.backends import reference
from rkif_kernels.backends.reference.select import score_values
from rkif_kernels.types import CaseWeights

# The released settings.
BETA, DENSITY = 0.85, 0.2
WEIGHTS: CaseWeights = ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5))


@dataclass(frozen=True)
class Dtypes:
    """Storage dtypes of parameters and gradients, and of importance."""

    name: str
    param: torch.dtype
    state: torch.dtype


DTYPES = {
    dtypes.name: dtypes
    for dtypes in (
        Dtypes("float32", torch.float32, torch.float32),
        Dtypes("bfloat16+float32", torch.bfloat16, torch.float32),
        Dtypes("bfloat16", torch.bfloat16, torch.bfloat16),
    )
}


def bytes_per_element(op: str, dtypes: Dtypes) -> int:
    """Minimum that an operation reads and writes: every input once, every output once."""
    param, state = dtypes.param.itemsize, dtypes.state.itemsize
    return {
        "observe": 2 * param + 4 * state,  # w, g; S and U, read and written
        "threshold": 2 * state,  # S, U
        "tensor_thresholds": 2 * state,
        "adamw": 3 * param + 8 * state,  # g; w, both moments, S and U, read and written
        "fuse": 3 * param + 4 * state + param,  # base, inner, outer; S and U of both; the result
    }[op]


class Operation(ABC):
    """One operation on its own random inputs.

    Attributes:
        name: as in rows.
        repeats: number of times that :meth:`call` runs the implementation.
    """

    name: str
    repeats = 1

    def __init__(self, shapes: ShapeSet, dtypes: Dtypes, device: torch.device) -> None:
        self.shapes, self.dtypes, self.device = shapes, dtypes, device
        self._generator = torch.Generator(device).manual_seed(torch.seed() % 2**63)

    @abstractmethod
    def call(self, run: Callable[..., Any]) -> None:
        """Run an implementation on the inputs."""

    @abstractmethod
    def check(self, run: Callable[..., Any], exact: bool) -> None:
        """Run an implementation once and raise AssertionError unless its result is right.

        Args:
            run: the implementation.
            exact: compare bits; if False, up to rounding (and the interpolation of a quantile).
        """

    def _normal(self) -> list[Tensor]:
        return _random(self.shapes.shapes, self.dtypes.param, self.device, self._generator)

    def _positive(self) -> list[Tensor]:
        tensors = _random(self.shapes.shapes, self.dtypes.state, self.device, self._generator)
        return [tensor.abs_() for tensor in tensors]

    def _scores(self) -> Scores:
        return Scores(self._positive(), self._positive())


class Observe(Operation):
    """The importance update.

    A call is two updates with different gradients. With one gradient S would converge and U would decay to
    denormals, which are slow on CPUs and do not occur in training.
    """

    name = "observe"
    repeats = 2

    def __init__(self, shapes: ShapeSet, dtypes: Dtypes, device: torch.device) -> None:
        super().__init__(shapes, dtypes, device)
        self.params, self.grads = self._normal(), (self._normal(), self._normal())
        self.s, self.u = self._positive(), self._positive()

    def call(self, run: Callable[..., Any]) -> None:
        for grads in self.grads:
            run(self.params, grads, self.s, self.u, beta1=BETA, beta2=BETA)

    def check(self, run: Callable[..., Any], exact: bool) -> None:
        before = [tensor.clone() for tensor in self.s], [tensor.clone() for tensor in self.u]
        run(self.params, self.grads[0], self.s, self.u, beta1=BETA, beta2=BETA)
        require = require_same_bits if exact else require_close
        bad = torch.zeros((), dtype=torch.int64, device=self.device)
        for w, g, s, u, got_s, got_u in chunks(self.params, self.grads[0], *before, self.s, self.u):
            reference.update_importance_(ImportanceInputs([w], [g], [s], [u]), Smoothing(BETA, BETA), bad)
            require("S", got_s, s)
            require("U", got_u, u)


class Threshold(Operation):
    """The exact global threshold of one learner's scores S*U."""

    name = "threshold"

    def __init__(self, shapes: ShapeSet, dtypes: Dtypes, device: torch.device) -> None:
        super().__init__(shapes, dtypes, device)
        self.scores = self._scores()

    def call(self, run: Callable[..., Any]) -> None:
        run(self.scores, DENSITY)

    def check(self, run: Callable[..., Any], exact: bool) -> None:
        got = run(self.scores, DENSITY)
        k = order_statistic_k(self.shapes.numel, DENSITY)
        if exact:
            expected = exact_threshold(self.scores, k, got)
            require_same_bits("threshold", got.reshape(1).to(expected), expected)
        else:
            # torch.quantile interpolates at a float32 position, which may be wrong by one.
            below, up_to = k_range(self.scores, got)
            assert below - 2 <= k <= up_to, f"quantile between k {below} and {up_to}; expected near {k}"


class Fuse(Operation):
    """The whole fusion: both thresholds, masks and merge."""

    name = "fuse"

    def __init__(self, shapes: ShapeSet, dtypes: Dtypes, device: torch.device) -> None:
        super().__init__(shapes, dtypes, device)
        self.base, self.inner, self.outer = self._normal(), self._normal(), self._normal()
        self.inner_scores, self.outer_scores = self._scores(), self._scores()
        self.out = [torch.full_like(tensor, torch.nan) for tensor in self.base]

    def call(self, run: Callable[..., Any]) -> Any:
        inputs = (self.base, self.inner, self.outer, self.inner_scores, self.outer_scores)
        return run(self.out, *inputs, density=DENSITY, weights=WEIGHTS)

    def check(self, run: Callable[..., Any], exact: bool) -> None:
        for tensor in self.out:
            tensor.fill_(torch.nan)
        stats = self.call(run)
        k = order_statistic_k(self.shapes.numel, DENSITY)
        sides = (self.inner_scores, self.outer_scores)
        if exact:
            thresholds = [t.reshape(1) for t in stats.thresholds]
        else:
            thresholds = [all_scores(scores).kthvalue(k + 1).values.reshape(1) for scores in sides]
        limits = [exact_threshold(scores, k, t) for scores, t in zip(sides, thresholds, strict=True)]
        for side, got, expected in zip(("inner", "outer"), thresholds, limits, strict=True):
            require_same_bits(f"{side} threshold", got, expected)
        # Masks may differ for scores between the order statistic and a quantile that replaces it.
        loose = limits if exact else [self._quantile(scores, limits[i]) for i, scores in enumerate(sides)]
        counts = torch.zeros(4, dtype=torch.int64, device=self.device)
        lists = [self.base, self.inner, self.outer, self.out]
        lists += [list(part) for scores in sides for part in (scores.sensitivity, scores.uncertainty or ())]
        for b, i, o, got, s_in, u_in, s_out, u_out in chunks(*lists):
            expected = torch.empty_like(got)
            pair = Scores([s_in], [u_in]), Scores([s_out], [u_out])
            with torch.device(self.device):
                counts += reference.fuse_(
                    FusionInputs([expected], [b], [i], [o], *pair),
                    (limits[0], limits[1]),
                    MergeRule(WEIGHTS, "inner"),
                ).counts
            if exact:
                require_same_bits("fused", got, expected)
            else:
                either = [_between(scores, *ends) for scores, *ends in zip(pair, limits, loose, strict=True)]
                require_close("fused", got, expected, ignored=either[0] | either[1])
        if exact:
            require_same_bits("counts", stats.counts, counts)

    def _quantile(self, scores: Scores, limit: Tensor) -> Tensor:
        if self.shapes.numel > QUANTILE_LIMIT:
            return limit
        return torch.quantile(all_scores(scores), 1 - DENSITY).reshape(1)


OPERATIONS: dict[str, type[Operation]] = {kind.name: kind for kind in (Observe, Threshold, Fuse)}


def _random(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, device=device, generator=generator) for shape in shapes]


def _between(scores: Scores, first: Tensor, second: Tensor) -> Tensor:
    """A mask of the scores between two thresholds, both included."""
    (values,) = score_values(scores)
    return (values >= torch.minimum(first, second)) & (values <= torch.maximum(first, second))
