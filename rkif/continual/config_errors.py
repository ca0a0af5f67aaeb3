"""The problems of a config file, in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from rkif.continual.config_base import classes
from rkif.continual.spelling import did_you_mean
from rkif.files import problem_in_words


def settings_problems(error: ValidationError, model: type[BaseModel]) -> str:
    """The problems of settings, each with its key. For an unknown name, a similar known one is suggested."""
    return "; ".join(_problem(problem, model) for problem in error.errors())


def _problem(problem: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    message = problem_in_words(problem)
    if problem["type"] == "extra_forbidden":
        *parents, key = problem["loc"]
        message = f"unknown setting{did_you_mean(str(key), _settings(model, parents))}"
    elif problem["type"] == "missing":
        message = "this setting is required"
    elif problem["type"] == "model_type":
        first = _settings(model, problem["loc"])[0]
        message = f"must be settings, such as {{{first}: ...}}; got {problem['input']!r}"
    elif problem["type"] == "literal_error":
        message += did_you_mean(str(problem["input"]), re.findall("'([^']*)'", problem["ctx"]["expected"]))
    return f"{where}: {message}" if where else message


def _settings(model: type[BaseModel], parents: Sequence[str | int]) -> list[str]:
    """The names of the settings below ``parents``; numbers among these are indices of lists."""
    for parent in parents:
        if isinstance(parent, str):
            annotation = model.model_fields[parent].annotation
            model = next(one for one in classes(annotation) if issubclass(one, BaseModel))
    return list(model.model_fields)
