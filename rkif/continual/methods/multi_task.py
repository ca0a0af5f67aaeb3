"""All tasks at once: the bound for methods that see them one after another."""

from __future__ import annotations

from rkif.continual.methods.sequential import Sequential
from rkif.continual.tasks import Item
from rkif.seeding import derive_seed, shuffled


class MultiTask(Sequential):
    """Every step's records come from all tasks alike; so many steps as the sequence has in all.

    The schedule of the learning rate begins anew with each task of the sequence, as for the other methods.
    """

    in_sequence = False
    needs_all = True

    def records(self, start: int, stop: int) -> list[Item]:
        tasks, offset = self.context.tasks, self.context.index * self.context.steps
        size = self.context.config.training.batch_size
        items = []
        for position in range(offset * size + start, offset * size + stop):
            turn, place = divmod(position, len(tasks))
            task = tasks[shuffled(len(tasks), self._seed("turn", turn))[place]]
            epoch, at = divmod(turn, len(task.train))
            record = task.train[shuffled(len(task.train), self._seed("epoch", task.name, epoch))[at]]
            items.append((task.instruction, record))
        return items

    def _seed(self, *parts: str | int) -> int:
        """Not of the task: the walk goes on over all of them."""
        return derive_seed(self.context.config.seed, "multi_task", *parts)
