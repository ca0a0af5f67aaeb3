"""The recurrent loop with another merge of the two task vectors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from rkif.continual.methods.rounds import Rounds
from rkif.continual.methods.sequential import Context
from rkif.fuser.parameters import parameter_copies
from rkif.fuser.state_names import flatten, section


class Merging(Rounds):
    """``theta = base + merge(inner - base, outer - inner)`` after each round, tensor by tensor."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.parameters = self.inner.parameters
        self.base = parameter_copies(self.parameters)
        self.stopped: dict[
            str, Tensor
        ] = {}  # parameters at the end of the inner phase; empty outside the outer phase
        self.round = 0

    @abstractmethod
    def merge(self, name: str, inner: Tensor, outer: Tensor) -> Tensor:
        """The update of the parameter ``name``: float32, of its shape.

        Args:
            name: name of the parameter.
            inner: the inner learner's task vector, float32.
            outer: the outer learner's task vector, float32.
        """

    def observe(self) -> None:
        """A merge without importance ignores gradients."""

    def begin_outer(self) -> None:
        self.stopped = parameter_copies(self.parameters)

    @torch.no_grad()
    def end_round(self, steps: range) -> None:
        for name, parameter in self.parameters.items():
            base, stopped = self.base[name], self.stopped[name]
            parameter.copy_(base + self.merge(name, stopped - base, parameter - stopped))
        self.base, self.stopped = parameter_copies(self.parameters), {}
        self.round += 1

    def tensors(self) -> dict[str, Tensor]:
        state = flatten({"base": self.base})
        return super().tensors() | state | {"round": torch.tensor(self.round)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        for name, tensor in section(tensors, "base").items():
            self.base[name].copy_(tensor)
        self.round = int(tensors["round"])
