"""The API reference: signatures and docstrings of the public names, as Markdown."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

WIDTH = 100  # of a signature in one line
MODULES = {
    "rkif": "Training loops, tensors and settings.",
    "rkif.hf": "The Hugging Face `Trainer`.",
    "rkif.optim": "An optimizer whose step also updates the importance.",
}
INTRODUCTION = (
    "# API\n\n"
    "Signatures and docstrings of the public names, written by `python -m bench docs`. Other names may "
    "change in any version. [semantics.md](semantics.md) specifies what the operations compute.\n"
)
_SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:")


def api_reference() -> str:
    """The text of the page."""
    parts = [INTRODUCTION]
    for module_name, summary in MODULES.items():
        module = importlib.import_module(module_name)
        parts.append(f"## {module_name}\n\n{summary}\n")
        for name in sorted(_public_names(module), key=str.lower):
            if callable(value := getattr(module, name)):
                parts += _entry(f"{module_name}.{name}", value)
    return "\n".join(parts)


def _public_names(module: ModuleType) -> list[str]:
    """The names in ``__all__``, or else those that the module defines without a leading underscore."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = [name for name, value in vars(module).items() if inspect.getmodule(value) is module]
    return [name for name in own if not name.startswith("_")]


def _entry(path: str, value: Any) -> Iterator[str]:
    """A function, or a class with its public methods."""
    yield f"### {path}\n\n{_signature(path, value)}\n{markdown(inspect.getdoc(value) or '')}"
    if not inspect.isclass(value):
        return
    own = vars(value)
    if "__init__" in own and (text := own["__init__"].__doc__):
        yield markdown(inspect.cleandoc(text))
    for name, member in own.items():
        function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        if name.startswith("_") or not getattr(function, "__doc__", None):
            continue
        if isinstance(function, property):
            yield f"#### {path}.{name}\n\n{markdown(inspect.cleandoc(function.__doc__ or ''))}"
        elif inspect.isfunction(function):
            text = markdown(inspect.cleandoc(function.__doc__ or ""))
            yield f"#### {path}.{name}\n\n{_signature(name, function)}\n{text}"


def _signature(name: str, value: Any) -> str:
    """The call with the annotations of the source, as a code block; empty for an exception."""
    if inspect.isclass(value) and issubclass(value, BaseException):
        return ""
    signature = inspect.signature(value)
    parameters: list[str] = []
    for one in signature.parameters.values():
        if one.name == "self":
            continue
        if one.kind is one.KEYWORD_ONLY and not any(text.startswith("*") for text in parameters):
            parameters.append("*")
        stars = "*" * (one.kind is one.VAR_POSITIONAL) + "**" * (one.kind is one.VAR_KEYWORD)
        text = f"{stars}{one.name}" + ("" if one.annotation is one.empty else f": {one.annotation}")
        parameters.append(text if one.default is one.empty else f"{text} = {_default(one.default)}")
    returns = signature.return_annotation
    end = ")" if inspect.isclass(value) else f") -> {returns}"
    line = f"{name}({', '.join(parameters)}{end}"
    if len(line) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + end
    return f"```python\n{line}\n```\n"


def _default(value: Any) -> str:
    return "..." if repr(value) == "<factory>" else repr(value)


def markdown(docstring: str) -> str:
    """Convert a docstring to Markdown: sections become lists, and indented blocks become code."""
    parts = []
    for block in re.split(r"\n\s*\n", docstring):
        heading, _, rest = block.partition("\n")
        if heading in _SECTIONS:
            if heading == "Returns:":
                parts.append(f"**Returns**\n\n{_inline(' '.join(rest.split()))}")
                continue
            items = re.sub(r"\n {5,}", " ", rest).splitlines()  # deeper lines continue an item
            bullets = [f"- {_item(_inline(item.strip()))}" for item in items]
            parts.append(f"**{heading[:-1]}**\n\n" + "\n".join(bullets))
        elif block.startswith("    "):
            code = inspect.cleandoc(f"\n{block}").replace("``", "")
            parts.append(f"```\n{code}\n```")
        else:
            text = " ".join(block.split("\n"))
            parts.append(_inline(re.sub(r"(\.?) ?::$", lambda end: end.group(1) or ":", text)))
    return "\n\n".join(parts) + "\n"


def _item(line: str) -> str:
    """``name: text`` with the names as code."""
    names, colon, text = line.partition(": ")
    if not colon:
        return line
    return ", ".join(f"`{name.strip('`')}`" for name in names.split(", ")) + f": {text}"


def _inline(text: str) -> str:
    """Code spans and links to pages; asterisks of formulas are no emphasis."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    text = re.sub(r"docs/((?:guide|reference|results)/[\w-]+\.md)", r"[\1](../\1)", text)
    spans = re.split(r"(`[^`]*`)", text)
    return "".join(span if span.startswith("`") else span.replace("*", r"\*") for span in spans)
