"""Recurrent knowledge identification and fusion (Feng et al., ACL 2025)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rkif.continual.history import RoundHistory
from rkif.continual.methods.rounds import Rounds
from rkif.continual.methods.sequential import Context, strip_prefix
from rkif.fuser import Fuser


class RecurrentKIF(Rounds):
    """The two task vectors of a round are pruned and merged by the importance that either learner found."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.history = RoundHistory()
        self.fuser = Fuser(context.model, self.fusion) if self.has_memory else None

    def observe(self) -> None:
        assert self.fuser is not None
        self.fuser.observe()

    def begin_outer(self) -> None:
        assert self.fuser is not None
        self.fuser.begin_outer()

    def end_round(self) -> None:
        assert self.fuser is not None
        inner, outer = self.fuser.scores("inner"), self.fuser.scores("outer")
        self.history.add(inner, outer, self.fuser.fuse())

    def tensors(self) -> dict[str, Tensor]:
        state = {} if self.fuser is None else self.fuser.state_dict()
        rounds = self.history.tensors()
        return (
            super().tensors()
            | {f"fuser.{name}": tensor for name, tensor in state.items()}
            | {f"rounds.{name}": tensor for name, tensor in rounds.items()}
        )

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        if self.fuser is not None:
            self.fuser.load_state_dict(strip_prefix(tensors, "fuser."))
            self.history.load_tensors(strip_prefix(tensors, "rounds."))

    def rounds(self) -> dict[str, Tensor]:
        return self.history.tensors()

    def importance(self) -> dict[str, Tensor]:
        return {} if self.fuser is None else self.fuser.scores("outer")
