"""docs/guide/signatures.md says how the ledger's JSON differs from RFC 8785."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import Triple
from hypothesis import given
from hypothesis import strategies as st

from rkif.ledger.chain import canonical

TEXT = (Path(__file__).parents[2] / "docs" / "guide" / "signatures.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| [^|`]+ \| `(.+?)` \| `(.+?)` \| (?:`(.+?)`|none) \|$", TEXT, flags=re.MULTILINE)


def of_ledger(value: Any) -> str:
    """A value as it is written in a record."""
    return canonical({"": value}).decode().removeprefix('{"":').removesuffix("}")


def test_the_ledgers_form_is_as_documented() -> None:
    assert len(ROWS) == 8
    for python, ledger, _ in ROWS:
        assert of_ledger(ast.literal_eval(python)) == ledger


def test_the_form_of_rfc_8785_is_as_documented() -> None:
    library = pytest.importorskip("rfc8785")
    for python, ledger, rfc8785 in ROWS:
        value = ast.literal_eval(python)
        assert rfc8785 != ledger
        if rfc8785:
            assert library.dumps(value).decode() == rfc8785
        else:
            with pytest.raises(library.CanonicalizationError):
                library.dumps(value)


ASCII = st.text(st.characters(max_codepoint=0x7E))
SAME = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**53, 2**53 - 1) | ASCII,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ASCII, inner, max_size=3),
    max_leaves=6,
)


@given(value=SAME)
def test_other_values_have_the_form_of_rfc_8785(value: Any) -> None:
    library = pytest.importorskip("rfc8785")
    assert of_ledger(value) == library.dumps(value).decode()


def test_a_manifest_is_hashed_as_documented(tmp_path: Path) -> None:
    Triple(tmp_path).fuse()
    content = json.loads((tmp_path / "out" / "rkif-manifest.json").read_text())
    digest = content.pop("manifest_sha256")
    assert hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() == digest
