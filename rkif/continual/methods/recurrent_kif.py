"""Recurrent knowledge identification and fusion (Feng et al., ACL 2025)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rkif.continual.config import fusion_config
from rkif.continual.methods.sequential import Context, Sequential, strip_prefix
from rkif.fuser import Fuser


class RecurrentKIF(Sequential):
    """Q inner steps on the new task, M outer steps on the memory, fusion; and again, to the end of the task.

    The outer learner has an optimizer of its own, kept over the rounds of a task; its learning rate follows
    the inner schedule. The last round of a task is fused with however many inner steps it has. The first
    task has no memory and is fine-tuned.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.fusion = fusion_config(context.config.fusion)
        self.outer = self.learner(context.config.outer.learning_rate)
        self.fuser = Fuser(context.model, self.fusion) if len(context.memory) else None

    def train_step(self, step: int) -> float:
        if self.fuser is None:
            return super().train_step(step)
        items = self.batch(step)
        self.samples += len(items)
        loss = self.inner.step(
            items,
            lr_fraction=self.lr_fraction(step),
            seed=self.seed("inner", step),
            before_step=self.fuser.observe,
        )
        if (step + 1) % self.fusion.inner_steps == 0 or step + 1 == self.context.steps:
            with self.fuser.outer():
                self._learn_memory(self.fuser, step)
        return loss

    def _learn_memory(self, fuser: Fuser, step: int) -> None:
        """The outer learner's steps after inner step ``step``."""
        size = self.context.config.outer.batch_size
        first = step // self.fusion.inner_steps * self.fusion.outer_steps
        for outer_step in range(first, first + self.fusion.outer_steps):
            items = self.context.memory.batch(outer_step, size, seed=self.seed("memory"))
            self.samples += len(items)
            self.outer.step(
                items,
                lr_fraction=self.lr_fraction(step),
                seed=self.seed("outer", outer_step),
                before_step=fuser.observe,
            )

    def tensors(self) -> dict[str, Tensor]:
        tensors = super().tensors()
        if self.fuser is not None:
            tensors |= {f"outer.{name}": tensor for name, tensor in self.outer.tensors().items()}
            tensors |= {f"fuser.{name}": tensor for name, tensor in self.fuser.state_dict().items()}
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        if self.fuser is not None:
            self.outer.load_tensors(strip_prefix(tensors, "outer."))
            self.fuser.load_state_dict(strip_prefix(tensors, "fuser."))

    def importance(self) -> dict[str, Tensor]:
        return {} if self.fuser is None else self.fuser.scores("outer")
