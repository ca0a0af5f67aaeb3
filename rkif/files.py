"""Atomic writes, and reads with errors that name the file."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from torch import Tensor

M = TypeVar("M", bound="BaseModel")
STATUS = Path("/proc/self/status")  # of this process, on Linux
# safetensors writes to a file with such a name and renames it. A killed process can leave the file.
TEMPORARY = re.compile(r"\.tmp[0-9A-Za-z]{6}")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it.

    An existing file with the temporary name is deleted first: if it is a link, the write would change another
    file.

    Args:
        path: the file's final name.
        write: called with the temporary name; it creates the file.

    Raises:
        OSError: the file cannot be written; it names the path. After an error the temporary file is deleted.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with named_in_errors(path):
            write(temporary)
            fsync_file(temporary)
            os.replace(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file completely or not at all; lines end in a line feed on every system."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def require_folder(path: Path) -> None:
    """Raise FileNotFoundError unless ``path`` is a folder."""
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path}")


def read_text(path: Path) -> str:
    """The content of a UTF-8 file, with its line ends as they are.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def parse_json(text: str | bytes, where: object, *, own: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        text: the text; bytes are decoded.
        where: the file, for messages.
        own: whether rkif wrote the text. If so, the message calls invalid content damage.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply; it names ``where``.
    """
    problem = f"{where} is damaged" if own else f"{where}: not valid JSON"
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{problem}: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{problem}: {error}") from error


def require_object(content: Any, where: object, *, own: bool = True) -> dict[str, Any]:
    """Return the value of a JSON text; raise ValueError, as :func:`parse_json`, unless it is an object."""
    if isinstance(content, dict):
        return content
    if own:
        raise ValueError(f"{where} is damaged: it does not hold an object")
    raise ValueError(f"{where}: expected a JSON object, got {type(content).__name__}")


def require_inside(name: str) -> str:
    """Return ``name``; raise ValueError unless it is a relative path of a file inside a folder."""
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} is not the name of a file in the folder")
    return name


def validated(model: type[M], content: Any, where: object, *, own: bool = True) -> M:
    """Convert the content of a file to a pydantic model.

    Args:
        model: the class.
        content: an object (dict) of the file.
        where: the file, for messages.
        own: whether rkif wrote the file. If so, the message calls invalid content damage; otherwise it names
            the value.

    Raises:
        ValueError: the content does not fit the model; it names ``where`` and the key.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(require_object(content, where, own=own))
    except ValidationError as error:
        problem = error.errors()[0]
        missing = problem["type"] == "missing"
        state = " is damaged, or of another version of rkif" if missing else " is damaged"
        got = "" if own or missing else f", got {problem['input']!r}"
        raise ValueError(f"{where}{state if own else ''}: {_first_problem(error)}{got}") from None


def _first_problem(error: ValidationError) -> str:
    """The first problem that pydantic found, in one line that names the key."""
    problem = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"it lacks {key!r}"
    return f"{f'{key}: ' if key else ''}{problem['msg'].removeprefix('Value error, ')}"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return tensors


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    A kill can leave a partial file, so the path must be temporary or in a temporary folder.

    Args:
        path: the file.
        tensors: contiguous tensors that share no memory, by name.
        metadata: further text by name.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{error}: {path}") from error


def remove_temporary(folder: Path) -> None:
    """Delete temporary files that killed processes have left; no process may be writing to the folder."""
    for stale in folder.iterdir():
        if TEMPORARY.fullmatch(stale.name) and stale.is_file():
            stale.unlink()


def replace_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    written: Callable[[Path], object] | None = None,
) -> None:
    """:func:`save_tensors` under a temporary name first.

    Args:
        written: called with the temporary file before it is renamed.

    Raises:
        OSError: the file cannot be written.
    """

    def write(temporary: Path) -> None:
        save_tensors(temporary, tensors, metadata)
        if written is not None:
            written(temporary)

    replace_file(path, write)


def problem_in_words(problem: Mapping[str, Any]) -> str:
    """A problem that pydantic found with a value, without the key: "must be a number; got 'abc'"."""
    text = str(problem["msg"]).removeprefix("Value error, ").partition(", unable to")[0]
    if not text.startswith("Input should be "):
        return text
    text = text.replace("a valid integer", "an integer").replace("a valid ", "a ")
    return f"{text.replace('Input should be', 'must be')}; got {problem['input']!r}"


def file_sha256(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file's bytes; ``advance`` is called with the size of each block, and may raise to stop."""
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(memoryview(block)[:size])
            if advance is not None:
                advance(size)
    return digest.hexdigest()


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def fsync_file(path: Path) -> None:
    """Give a file the default mode and flush it to disk; safetensors lets only the owner read its files."""
    path.chmod(0o666 & ~_umask())
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    """The umask of the process, which ``os.umask`` reads only by changing it for all threads.

    Without /proc, a file that another thread creates at that moment is private, and never writable by others.
    """
    if STATUS.exists():
        for line in STATUS.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, so that created and deleted files stay so after a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock a folder until the block or the process ends. Nothing is written.

    Raises:
        RuntimeError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is working in {folder}") from None
        yield
    finally:
        os.close(descriptor)
