"""Config files of ``rkif run``, written and changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def changed(settings: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    settings = json.loads(json.dumps(settings))
    *parents, last = path.split(".")
    inner = settings
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return settings
