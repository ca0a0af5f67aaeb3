"""The running metrics of trl's trainers, which outer steps must not change."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Attributes in which trl's trainers collect metrics in `compute_loss`, to average them at the next log.
_FIGURES = ("_metrics", "_stored_metrics")
_TOTALS = ("_total_train_tokens",)


@contextmanager
def figures_set_aside(trainer: Any) -> Iterator[None]:
    """Within the block, the trainer's running metrics are empty; after it, they are as before.

    So num_tokens, mean_token_accuracy, entropy and similar metrics do not include samples of the memory.
    """
    kept = {name: vars(trainer)[name] for name in (*_FIGURES, *_TOTALS) if name in vars(trainer)}
    try:
        for name in _FIGURES:
            if name in kept:
                empty = copy.deepcopy(kept[name])
                for mode in empty.values():
                    mode.clear()
                setattr(trainer, name, empty)
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
