"""YAML of a user: a key that is given twice, and keys that are not text."""

from __future__ import annotations

import pytest

from rkif.checkpoint.yaml_text import load_yaml


def test_a_key_may_be_given_once_in_each_mapping() -> None:
    assert load_yaml(b"a: {x: 1}\nb: {x: 2}\n", "f") == {"a": {"x": 1}, "b": {"x": 2}}
    assert load_yaml(b"1: a\n'1': b\n", "f") == {1: "a", "1": "b"}
    with pytest.raises(ValueError, match="f: not valid YAML: line 1, column 11: key 'x' is given twice"):
        load_yaml(b"a: {x: 1, x: 2}", "f")


def test_a_key_of_many_aliases_is_refused_without_its_text() -> None:
    """Its text would double with every line."""
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 64)), "? *a63\n: 1"]
    with pytest.raises(ValueError, match="f: not valid YAML: line 64, column 6: found unhashable key"):
        load_yaml("\n".join(lines).encode(), "f")
