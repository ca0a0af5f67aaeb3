"""Notes about inputs that are probably a mistake: identical ones, and checkpoints of a run out of order."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping

from rkif.checkpoint.methods import Method
from rkif.checkpoint.source import Checkpoint
from rkif_kernels import OuterFrom

_NUMBER = re.compile(r"\d+$")


def same_files(checkpoints: Mapping[str, Checkpoint], method: Method) -> list[str]:
    """A note for each pair of inputs that are the same files, by argument."""
    return [
        _note(first, second, method.outer_from)
        for first, second in _pairs(checkpoints, method)
        if len(checkpoints[first].files) == len(checkpoints[second].files)
        and all(map(os.path.samefile, checkpoints[first].files, checkpoints[second].files))
    ]


def same_contents(inputs: Mapping[str, Mapping[str, str]], method: Method) -> list[str]:
    """A note for each pair of inputs with the same tensors; ``inputs`` are those of a manifest."""
    return [
        _note(first, second, method.outer_from)
        for first, second in _pairs(inputs, method)
        if inputs[first]["content_sha256"] == inputs[second]["content_sha256"]
    ]


def out_of_order(checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """A note if the numbers at the ends of the checkpoints' names ("checkpoint-500") do not increase."""
    matches = [(argument, _NUMBER.search(checkpoint.name)) for argument, checkpoint in checkpoints.items()]
    for (first, one), (second, other) in itertools.pairwise(matches):
        if one and other and int(one[0]) > int(other[0]):
            names = f"{checkpoints[first].name} and {checkpoints[second].name}"
            return [f"{first} and {second} are {names}: wsm takes the oldest checkpoint first"]
    return []


def _pairs(inputs: Mapping[str, object], method: Method) -> itertools.combinations[tuple[str, str]]:
    base, *models = [argument for argument in inputs if not argument.startswith("--")]
    # The mean of models has no task vectors: its BASE may be one of them.
    return itertools.combinations(models if method.name == "linear" else [base, *models], 2)


def _note(first: str, second: str, outer_from: OuterFrom) -> str:
    if (first, second) == ("INNER", "OUTER") and outer_from == "base":
        meaning = "their task vectors are equal"
    elif (first, second) == ("BASE", "OUTER") and outer_from == "inner":
        meaning = "the outer task vector, OUTER - INNER, is the inner one with the opposite sign"
    elif first.startswith("CHECKPOINT"):
        meaning = "it counts twice"
    elif first.startswith("MODEL"):
        meaning = "their task vectors are equal"
    else:
        meaning = f"the task vector {second} - {first} is zero"
    return f"{second} and {first} are identical: {meaning}"
