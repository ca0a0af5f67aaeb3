"""Counts of the observed steps of a round, including those that CUDA graphs have replayed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import torch

from rkif_kernels import capturing

Learner = Literal["inner", "outer"]


class ObservedSteps:
    """How often each learner was observed in a round, and which parameters had a gradient.

    A capture executes nothing, and a replay executes no Python. So a captured step increments a counter on
    the device at each replay. Which parameters have a gradient is recorded during the capture.

    Args:
        device: device of the parameters.

    Attributes:
        counts: learner -> observed steps of the round.
        with_gradient: names of the parameters that had a gradient in one of these steps. Neither attribute
            includes replays since the last :meth:`add_replayed`.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts: dict[Learner, int] = {"inner": 0, "outer": 0}
        self.with_gradient: set[str] = set()
        self._replayed = torch.zeros(2, dtype=torch.int64, device=device)  # in the order of the counts
        self._captured: dict[Learner, set[str]] = {}  # with_gradient of all captured steps

    def add(self, learner: Learner, names: Collection[str], gradients: Sequence[object]) -> None:
        """Count a step.

        Args:
            learner: the learner that was observed.
            names: names of all parameters.
            gradients: their gradients; None for a missing one.
        """
        if capturing(self._replayed.device):
            self._replayed[list(self.counts).index(learner)].add_(1)
            seen = self._captured.setdefault(learner, set())
        else:
            self.counts[learner] += 1
            seen = self.with_gradient
        if len(seen) < len(names):
            pairs = zip(names, gradients, strict=True)
            seen.update(name for name, gradient in pairs if gradient is not None)

    def add_replayed(self) -> None:
        """Add the replayed steps to the attributes. Waits for the device if a step was ever captured."""
        if not self._captured or capturing(self._replayed.device):
            return
        for learner, replayed in zip(list(self.counts), self._replayed.tolist(), strict=True):
            self.counts[learner] += replayed
            if replayed:
                self.with_gradient |= self._captured[learner]
        self._replayed.zero_()

    def load(self, counts: Mapping[Learner, int], with_gradient: Iterable[str]) -> None:
        """Replace the steps of the round."""
        self.counts, self.with_gradient = dict(counts), set(with_gradient)
        if self._captured:
            self._replayed.zero_()

    def clear(self) -> None:
        """Begin a round."""
        self.load(dict.fromkeys(self.counts, 0), ())
