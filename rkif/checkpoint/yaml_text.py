"""Reads YAML files of the user: settings of a run, merges of mergekit."""

from __future__ import annotations

from typing import Any

import yaml


def load_yaml(text: bytes, where: str) -> Any:
    """The content of YAML in UTF-8.

    Raises:
        ValueError: it is not valid, or gives a key of a mapping twice; it begins with ``where``.
    """
    try:
        return yaml.load(text.decode("utf-8"), _UniqueKeyLoader)
    except RecursionError as error:
        raise ValueError(f"{where}: not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where}: not valid YAML: {_problem(error)}") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """Rejects duplicate keys in a mapping; YAML would silently use the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):  # others are refused, because they cannot be keys of a dict
                if (key.tag, key.value) in seen:
                    mark, problem = key.start_mark, f"key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _problem(error: Exception) -> str:
    """A problem of YAML's syntax, with its line."""
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.MarkedYAMLError) and mark is not None:
        context = f" {error.context}" if error.context else ""
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{context}"
    return " ".join(str(error).split())
