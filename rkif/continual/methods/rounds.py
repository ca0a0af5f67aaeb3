"""The loop of the recurrent methods: inner steps, outer steps, a merge, repeated."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

from rkif.continual.config_fusion import fusion_config
from rkif.continual.methods.sequential import Context, Sequential
from rkif.continual.tasks.records import Item
from rkif.fuser.state_names import flatten, section


class Rounds(Sequential):
    """A round is Q inner steps on the new task, M outer steps on the memory, and the merge of a subclass.

    The outer learner has a separate optimizer, which is kept for all rounds of a task, and the inner
    learner's schedule. The last round of a task may have fewer inner steps. The first task has no memory, so
    it is plain fine-tuning.
    """

    replays = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.fusion = fusion_config(context.config.fusion)
        self.outer = self.learner(context.config.outer.learning_rate)
        self.has_memory = len(context.memory) > 0
        # Step -> its batch, for the steps of the current round that this process took.
        self._inner_batches: dict[int, list[Item]] = {}
        self._outer_batches: dict[int, list[Item]] = {}

    @property
    def period(self) -> int:
        return fusion_config(self.context.config.fusion).inner_steps

    def begin_round(self) -> None:
        """Hook before the first inner step of a round."""

    @abstractmethod
    def observe(self) -> None:
        """Hook at each step of both learners after clipping: before or after the optimizer's step."""

    @abstractmethod
    def begin_outer(self) -> None:
        """Hook after the last inner step of a round."""

    @abstractmethod
    def end_round(self, steps: range) -> None:
        """Hook after the last outer step of a round, which merges.

        Args:
            steps: indices of the round's inner steps.
        """

    def train_step(self, step: int) -> float:
        if not self.has_memory:
            return super().train_step(step)
        if step % self.fusion.inner_steps == 0:
            self.begin_round()
        items = self._inner_batches[step] = self.batch(step)
        self.samples += len(items)
        loss = self.inner.step(
            items, lr_fraction=self.lr_fraction(step), seed=self.seed("inner", step), **self._observed()
        )
        if (step + 1) % self.fusion.inner_steps == 0 or step + 1 == self.context.steps:
            self.begin_outer()
            self._learn_memory(step)
            self.end_round(range(step // self.fusion.inner_steps * self.fusion.inner_steps, step + 1))
            self._inner_batches.clear()
            self._outer_batches.clear()
            if self.context.config.rounds.optimizers == "reset":
                self.inner.reset()
                self.outer.reset()
        return loss

    def moments(self) -> dict[str, Tensor]:
        """The state of both optimizers, by name; not copies."""
        learners = {"inner": self.inner} | ({"outer": self.outer} if self.has_memory else {})
        return flatten({learner: one.tensors() for learner, one in learners.items()})

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`moments` returned; other names are ignored."""
        self.inner.load_tensors(section(tensors, "inner"))
        self.outer.load_tensors(section(tensors, "outer"))

    def _learn_memory(self, step: int) -> None:
        """Take the outer steps that follow inner step ``step``."""
        for outer_step in self.outer_steps(step):
            items = self._outer_batches[outer_step] = self.outer_batch(outer_step)
            self.samples += len(items)
            self.outer.step(
                items,
                lr_fraction=self.lr_fraction(step),
                seed=self.seed("outer", outer_step),
                **self._observed(),
            )

    def round_batches(self, steps: range) -> tuple[list[Item], list[Item]]:
        """The records on which each learner trained in the round of these inner steps, in order.

        After a resume, batches that an earlier process has drawn are drawn again.
        """
        inner = [item for step in steps for item in self._inner_batches.get(step) or self.batch(step)]
        outer = [item for step in self.outer_steps(steps[-1]) for item in self._outer_batches[step]]
        return inner, outer

    def outer_steps(self, step: int) -> range:
        """The indices of the outer steps in the round of inner step ``step``."""
        first = step // self.fusion.inner_steps * self.fusion.outer_steps
        return range(first, first + self.fusion.outer_steps)

    def outer_batch(self, outer_step: int) -> list[Item]:
        """The memory's records of an outer step."""
        size = self.context.config.outer.batch_size
        return self.context.memory.batch(outer_step, size, seed=self.seed("memory"))

    def _observed(self) -> dict[str, Callable[[], None]]:
        return {f"{self.context.config.rounds.observe}_step": self.observe}

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | self.moments()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self.load_moments(tensors)
