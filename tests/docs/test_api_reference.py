"""The API reference has all public names, and their docstrings as Markdown."""

from __future__ import annotations

import re
from pathlib import Path

import rkif
import rkif.hf
from bench.api_reference import markdown

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "api.md").read_text(encoding="utf-8")


def test_every_public_name_has_an_entry() -> None:
    names = {f"rkif.{name}" for name in rkif.__all__} - {"rkif.__version__", "rkif.optim"}
    names |= {f"rkif.hf.{name}" for name in rkif.hf.__all__} | {"rkif.optim.AdamW"}
    assert set(re.findall(r"^### (.+)$", PAGE, flags=re.MULTILINE)) == names


def test_a_docstring_becomes_markdown() -> None:
    docstring = """\
Multiplies a*b, as :meth:`Fuser.fuse` does ``a*b`` (docs/guide/lora.md)::

    c = a * b

Args:
    a, b: numbers
        or tensors.
    options: the rest.

Returns:
    The product
    of both.
"""
    assert (
        markdown(docstring)
        == """\
Multiplies a\\*b, as `Fuser.fuse` does `a*b` ([guide/lora.md](../guide/lora.md)):

```
c = a * b
```

**Args**

- `a`, `b`: numbers or tensors.
- `options`: the rest.

**Returns**

The product of both.
"""
    )


def test_no_markup_of_docstrings_is_left() -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", PAGE, flags=re.DOTALL)
    assert not re.search(r"``|:\w+:`|::$|^(Args|Raises|Returns|Attributes):", text, flags=re.MULTILINE)
