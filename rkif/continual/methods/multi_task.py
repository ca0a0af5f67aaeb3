"""All tasks at once: an upper bound for methods that learn them one after another."""

from __future__ import annotations

from dataclasses import replace

from rkif.continual.methods.replay import memory_share
from rkif.continual.methods.sequential import Sequential
from rkif.continual.tasks.records import Item
from rkif.seeding import derive_seed, shuffled


class MultiTask(Sequential):
    """Every step draws its records from all tasks.

    It takes as many steps as the whole sequence, on as many records as the methods with a memory. The
    learning-rate schedule restarts with each task of the sequence, as in the other methods.
    """

    sequential = False
    needs_all_tasks = True

    def batch(self, step: int) -> list[Item]:
        before = sum(self._seen(index) for index in range(self.context.index))
        count, steps = self._seen(self.context.index), self.context.steps
        return self.records(before + step * count // steps, before + (step + 1) * count // steps)

    def _seen(self, index: int) -> int:
        """Number of records trained on while task ``index`` is learned."""
        context = replace(self.context, index=index)
        return context.steps * context.config.training.batch_size + memory_share(context)

    def records(self, start: int, stop: int) -> list[Item]:
        tasks = self.context.tasks
        items = []
        for position in range(start, stop):
            turn, place = divmod(position, len(tasks))
            task = tasks[shuffled(len(tasks), self._seed("turn", turn))[place]]
            epoch, at = divmod(turn, len(task.train))
            record = task.train[shuffled(len(task.train), self._seed("epoch", task.name, epoch))[at]]
            items.append((task.instruction, record))
        return items

    def _seed(self, *parts: str | int) -> int:
        """A seed that does not depend on the task, because one walk covers all tasks."""
        return derive_seed(self.context.config.seed, "multi_task", *parts)
