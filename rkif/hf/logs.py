"""The running figures of trl's trainers, which a round must not change."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What trl's trainers collect in `compute_loss`. They average it over all calls since the last log.
_FIGURES = ("_metrics", "_stored_metrics")
_TOTALS = ("_total_train_tokens",)


@contextmanager
def figures_set_aside(trainer: Any) -> Iterator[None]:
    """Within the block, the trainer's running figures are empty; after it they are as before.

    So the memory's samples are not mixed into num_tokens, mean_token_accuracy, entropy and the like.
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
