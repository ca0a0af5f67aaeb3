"""Brackets: two values from a sample of scores, between which a quantile of all scores very probably lies."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

# Half-width of a bracket in standard deviations of the sample's quantile. Of a million brackets about 7 miss,
# which costs another pass; the result stays exact.
SIGMAS = 4.5

Floats = npt.NDArray[np.float32]


def half_width(quantile: float, sampled: float, sigmas: float = SIGMAS) -> float:
    """Half-width in sampled scores: ``sigmas`` standard deviations of the binomial distribution, plus one."""
    return sigmas * math.sqrt(quantile * (1 - quantile) * sampled) + 1


def bracket(sample: Floats, quantile: float, run: int = 1) -> tuple[float, float]:
    """Two scores between which, both included, the quantile of all scores very probably lies.

    Args:
        sample: float32 [n], n > 0; values that are not positive, NaN included, count as zero.
        quantile: in [0, 1], of all scores.
        run: number of neighbouring scores that were sampled together. Neighbours are correlated, so the
            variance of a quantile is larger than for independent scores. The factor (the design effect) is
            estimated from the runs.

    Returns:
        (lo, hi); 0 or infinity where the bracket extends beyond the sample.
    """
    values = positive(sample)
    ordered = np.sort(values)
    last = len(ordered) - 1
    center = quantile * last
    width = half_width(quantile, len(ordered) * _design_effect(values, ordered[round(center)], run))
    low, high = math.floor(center - width), math.ceil(center + width)
    return float(ordered[low]) if low >= 0 else 0.0, float(ordered[high]) if high <= last else math.inf


def positive(values: Floats) -> Floats:
    """The values; zero for those that are not positive."""
    return np.where(values > 0, values, np.float32(0))


def _design_effect(values: Floats, limit: np.float32, run: int) -> float:
    """Factor, at least 1, by which correlated neighbours increase the variance of the share above ``limit``.

    It is that of cluster sampling (Kish, 1965, section 5.4), estimated from the variance between the runs.
    """
    runs = values[: len(values) // run * run].reshape(-1, run)
    if run == 1 or len(runs) < 2:
        return 1.0
    above = (runs > limit).mean(axis=1)
    independent = float(above.mean()) * (1 - float(above.mean())) / run
    return max(1.0, float(above.var()) / independent) if independent else 1.0
