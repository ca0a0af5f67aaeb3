"""Notebooks of the examples: a line ``# %% Title`` of a script starts a cell."""

from __future__ import annotations

import ast
import json
import re
from typing import Any


def notebook(script: str) -> str:
    """The text of an .ipynb file with the code of ``script``, without output."""
    docstring = ast.get_docstring(ast.parse(script)) or ""
    _, *parts = re.split(r"^# %% (.+)\n", script, flags=re.MULTILINE)
    cells = [_cell("markdown", f"# {docstring.splitlines()[0]}")]
    for title, code in zip(parts[::2], parts[1::2], strict=True):
        cells += [_cell("markdown", f"## {title}"), _cell("code", code.strip())]
    for index, cell in enumerate(cells):
        cell["id"] = f"cell-{index}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _cell(kind: str, text: str) -> dict[str, Any]:
    output: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, **output, "source": text.splitlines(keepends=True)}
