"""The replay memory of a Trainer: accepted datasets, their preparation, and a digest to detect changes."""

from __future__ import annotations

import hashlib
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

_KEY = "__rkif_memory__"  # name of the memory among the evaluation sets
_SYNONYMS = {"labels", "label", "label_ids"}  # collators rename all of them to "labels"
_DIGESTED = 64  # maximum number of samples in a digest


def accepted_memory(memory: Any, train_dataset: Any) -> Any:
    """The memory in the form that the trainer needs, or None if there is none or it is empty.

    A list of samples becomes a ``datasets.Dataset`` if the training data is one, because trainers that
    prepare their data call its methods.

    Args:
        memory: samples with a length and indexing, or None.
        train_dataset: the training data, or None.

    Raises:
        TypeError: the memory is a mapping of datasets or columns, text, or lacks a length or indexing.
    """
    if memory is None:
        return None
    kind = type(memory).__name__
    if isinstance(memory, Mapping):
        names = ", ".join(map(repr, memory))
        raise TypeError(f"memory_dataset must be one dataset, got a {kind} of {names}: concatenate them")
    endless = isinstance(memory, torch.utils.data.IterableDataset | str | bytes)
    if endless or not (hasattr(memory, "__len__") and hasattr(memory, "__getitem__")):
        raise TypeError(f"memory_dataset must have a length and indexing, got {kind}")
    if len(memory) == 0:
        return None
    datasets = sys.modules.get("datasets")  # if it is not imported, the training data is not of this library
    if datasets is None or not isinstance(memory, list):
        return memory
    prepared = isinstance(train_dataset, datasets.Dataset | datasets.IterableDataset)
    return datasets.Dataset.from_list(memory) if prepared else memory


def require_no_empty_memory(memory: Any) -> None:
    """With a ledger: refuse an empty memory, and warn if there is none, because nothing will be recorded.

    Raises:
        ValueError: the memory is empty.
    """
    if memory is not None:
        raise ValueError(
            "memory_dataset is empty, so there is no fusion for the ledger to record: pass samples of "
            "earlier tasks, or None for the first task"
        )
    warnings.warn(
        "without a memory_dataset there are no fusions, so ledger= records nothing", UserWarning, stacklevel=3
    )


def with_memory(eval_dataset: Any, memory: Any) -> dict[str, Any]:
    """The evaluation sets by name, with the memory as one of them.

    Trainers that tokenize or pack their data prepare the evaluation sets too, and so the memory.
    """
    sets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    return {name: dataset for name, dataset in sets.items() if dataset is not None} | {_KEY: memory}


def split_memory(trainer: Any, *, several: bool) -> tuple[Any, Any]:
    """The memory as the trainer has prepared it; and its evaluation set, or several sets by name.

    Raises:
        ValueError: the trainer has replaced the sets of :func:`with_memory`.
    """
    sets = dict(trainer.eval_dataset) if isinstance(trainer.eval_dataset, Mapping) else {}
    if _KEY not in sets:
        raise ValueError(
            f"{type(trainer).__name__} has replaced its eval_dataset, which also held the memory_dataset"
        )
    return sets.pop(_KEY), sets if several else sets.get("eval")


def require_labels(memory: Any, train_dataset: Any, label_names: Iterable[str]) -> None:
    """Check that the memory has the label columns that the training data has.

    Args:
        memory, train_dataset: as the trainer has prepared them.
        label_names: names of label columns, from the trainer.

    Raises:
        ValueError: the memory lacks some; it names them.
    """
    # The columns of other datasets are unknown: it may not be possible to index them with 0.
    listed = isinstance(train_dataset, list) and len(train_dataset) > 0
    if not listed and getattr(train_dataset, "column_names", None) is None:
        return
    present = _columns(memory)
    needed = _columns(train_dataset) & {*label_names, *_SYNONYMS}
    if present & _SYNONYMS:
        needed -= _SYNONYMS
    if missing := ", ".join(map(repr, sorted(needed - present))):
        raise ValueError(f"memory_dataset has no {missing}, which train_dataset has and its loss needs")


def memory_digest(memory: Any) -> str:
    """SHA-256 over the ``repr`` of at most 64 samples of the memory, without addresses of objects."""
    step = -(-len(memory) // _DIGESTED)
    texts = (re.sub(r" at 0x[0-9a-fA-F]+", "", repr(memory[n])) for n in range(0, len(memory), step))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _columns(dataset: Any) -> set[str]:
    """The names of a dataset's columns, or of the keys of its first sample."""
    if (names := getattr(dataset, "column_names", None)) is not None:
        return set(names)
    return set(dataset[0]) if isinstance(dataset[0], Mapping) else set()
