"""The exponential moving average of the parameters, evaluated and published in their place.

SuRe (continual learning of language models by replay) evaluates such an average. Training continues from the
parameters themselves, so the average does not change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from rkif.fuser.parameters import parameter_copies


class WeightAverage:
    """average <- decay^n * average + (1 - decay^n) * parameters, after every n steps of every task.

    Args:
        decay: decay per step, in [0, 1); 0 keeps no average.
        parameters: name -> trainable parameter. A float32 average of each is kept; at first it is a copy.
    """

    def __init__(self, decay: float, parameters: Mapping[str, Tensor]) -> None:
        self._decay = decay
        self._parameters = parameters
        self._averages = {
            name: copy.float() for name, copy in parameter_copies(parameters if decay else {}).items()
        }

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Update the average with the parameters after another ``steps`` steps."""
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name].float(), 1 - self._decay**steps)

    @contextmanager
    def published(self) -> Iterator[None]:
        """Context manager: the parameters have the average's values in the block; unchanged without one."""
        trained = parameter_copies({name: self._parameters[name] for name in self._averages})
        self._set(self._averages)
        try:
            yield
        finally:
            self._set(trained)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> average; not copies."""
        return self._averages

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned."""
        for name, tensor in tensors.items():
            self._averages[name].copy_(tensor)
