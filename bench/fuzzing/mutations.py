"""Random damage to one file of a folder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**400, 1e308, "", "x" * 3000, "../../victim", "/etc/passwd", "a\0b", "\ud800",
    [], {}, [[]],
)  # fmt: skip
# Files that a loader would read, also under names with other letter cases.
ADDED = (
    "chat_template.jinja", "tokenizer.model", "modeling_x.py", "pytorch_model.bin", "Model.SafeTensors",
    "vocab.TXT",
)  # fmt: skip


def mutate(folder: Path, choose: random.Random) -> str | None:
    """Damage one file, or add one. Returns a description, or None if the damage does not apply."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = choose.choice(files)
    before = path.read_bytes()
    damage = choose.choice(DAMAGES)
    done = damage(path, choose)
    if done is None or (
        path.is_file() and not path.is_symlink() and "added" not in done and path.read_bytes() == before
    ):
        return None
    return f"{path.relative_to(folder)}: {done}"


def _bit(path: Path, choose: random.Random) -> str | None:
    content = bytearray(path.read_bytes())
    if not content:
        return None
    place = choose.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return f"bit {place} flipped"


def _cut(path: Path, choose: random.Random) -> str:
    size = choose.randrange(path.stat().st_size + 1)
    path.write_bytes(path.read_bytes()[:size])
    return f"cut to {size} bytes"


def _longer(path: Path, choose: random.Random) -> str:
    more = choose.choice([b"\0", b"\n", b" ", b"{}", choose.randbytes(50)])
    path.write_bytes(path.read_bytes() + more)
    return f"{more!r} appended"


def _deleted(path: Path, _: random.Random) -> str:
    path.unlink()
    return "deleted"


def _linked(path: Path, _: random.Random) -> str:
    path.unlink()
    path.symlink_to("/dev/null")
    return "a link to /dev/null"


def _folder(path: Path, _: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


def _added(path: Path, choose: random.Random) -> str:
    added = path.with_name(choose.choice(ADDED))
    added.write_text("added")
    return f"{added.name} added beside it"


def _lines(path: Path, choose: random.Random) -> str | None:
    lines = path.read_bytes().splitlines(keepends=True)
    if len(lines) < 2:
        return None
    first, second = sorted(choose.sample(range(len(lines)), 2))
    way = choose.choice(["swapped", "dropped", "doubled", "tail"])
    if way == "swapped":
        lines[first], lines[second] = lines[second], lines[first]
    elif way == "dropped":
        del lines[first]
    elif way == "doubled":
        lines.insert(first, lines[first])
    else:
        del lines[second:]
    path.write_bytes(b"".join(lines))
    return f"lines {first} and {second}: {way}"


def _value(path: Path, choose: random.Random) -> str | None:
    """Another value somewhere in a JSON file, in one line of JSON lines, or in a safetensors header."""
    content = path.read_bytes()
    start, end = 0, len(content)
    if path.suffix == ".jsonl":
        lines = content.splitlines(keepends=True)
        if not lines:
            return None
        line = choose.randrange(len(lines))
        start = sum(map(len, lines[:line]))
        end = start + len(lines[line])
    elif path.suffix == ".safetensors":
        start, end = 8, 8 + int.from_bytes(content[:8], "little")
    try:
        value = json.loads(content[start:end])
    except ValueError:
        return None
    places = list(_places(value))
    if not places:
        return None
    holder, key = choose.choice(places)
    if choose.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
        done = f"{key!r} removed"
    else:
        holder[key] = choose.choice(VALUES)
        done = f"{key!r} = {str(holder[key])[:40]!r}"
    text = json.dumps(value, separators=(",", ":")).encode("utf-8", "surrogatepass")
    if path.suffix == ".safetensors":
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    else:
        path.write_bytes(content[:start] + text + (b"\n" if path.suffix == ".jsonl" else b"") + content[end:])
    return done


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


DAMAGES: tuple[Callable[[Path, random.Random], str | None], ...] = (
    _bit, _bit, _cut, _longer, _deleted, _linked, _folder, _added, _lines, _value, _value, _value,
)  # fmt: skip
