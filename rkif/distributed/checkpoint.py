"""State in a folder of safetensors files, written by all processes, read by any number of processes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from rkif.distributed.process_group import ProcessGroup
from rkif.files import fsync_file, fsync_folder

# The names that torch.distributed.checkpoint gives the files of a state.
_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")


def write_state(folder: str | os.PathLike[str], state: Mapping[str, Tensor], processes: ProcessGroup) -> None:
    """Write tensors, sharded or not, with ``torch.distributed.checkpoint``; all ranks must call it.

    The new folder replaces an earlier one when it is complete. After a kill, one of the two is left.

    Raises:
        ValueError: the folder holds other files than a state's, which would be lost.
        OSError, RuntimeError: it could not be written, here or on another rank.
    """
    # Imported here because it takes as long as all other imports of rkif together.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = Path(folder).resolve()  # if it is a link, its target is replaced
    temporary = _beside(folder, "new")
    with processes.raise_on_any_failure():
        if processes.rank == 0:
            _restore(folder)
            _require_state(folder)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    alone = processes.size == 1
    with _in_words(f"{folder} could not be written"), processes.propagate_failure():
        save(dict(state), storage_writer=writer, process_group=processes.group, no_dist=alone)
    with processes.raise_on_any_failure():
        if processes.rank == 0:
            for path in temporary.iterdir():
                fsync_file(path)
            fsync_folder(temporary)
            _replace_folder(folder, temporary)


def read_state(
    folder: str | os.PathLike[str],
    empty_for: Callable[[str, torch.Size, torch.dtype], Tensor],
    processes: ProcessGroup,
) -> dict[str, Tensor]:
    """Read what :func:`write_state` wrote, on any number of ranks; all must call it.

    Args:
        empty_for: (name, global shape, dtype) -> an empty tensor to read into, sharded or not.

    Raises:
        FileNotFoundError: there is no such folder.
        RuntimeError: it could not be read, here or on another rank.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = Path(folder).resolve()
    with processes.raise_on_any_failure():
        if processes.rank == 0:
            _restore(folder)
    with _in_words(f"{folder} could not be read"), processes.raise_on_any_failure():
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no state in {folder}")
        reader = HuggingFaceStorageReader(str(folder))
        stored = reader.read_metadata().state_dict_metadata
    state = {
        name: empty_for(name, about.size, about.properties.dtype)
        for name, about in sorted(stored.items())
        if isinstance(about, TensorStorageMetadata)
    }
    with _in_words(f"{folder} could not be read"), processes.propagate_failure():
        load(state, storage_reader=reader, process_group=processes.group, no_dist=processes.size == 1)
    return state


def _replace_folder(folder: Path, new: Path) -> None:
    """Replace a folder by ``new``. The old one has another name until the new one is in place."""
    old = _beside(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        _restore(folder)
        raise
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _require_state(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but a state."""
    if not folder.exists():
        return
    others = [folder.name] if not folder.is_dir() else sorted(path.name for path in folder.iterdir())
    others = [name for name in others if not _SHARD.fullmatch(name)]
    if others:
        raise ValueError(
            f"{folder} holds {others[0]!r}, which is not part of a state and would be lost; "
            "name a folder that does not exist, is empty, or holds a state"
        )


def _restore(folder: Path) -> None:
    """Rename the old folder back if its replacement was interrupted."""
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)


def _beside(folder: Path, kind: str) -> Path:
    """The path of a temporary folder, with a name that only rkif uses: it is deleted without a check."""
    return folder.with_name(f".{folder.name}.rkif-{kind}")


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Replace errors of torch.distributed.checkpoint, which do not derive from Exception and have many lines.

    Raises:
        RuntimeError: in their place, with the first cause; also for a damaged file.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise RuntimeError(f"{what}: rank {rank} failed: {type(cause).__name__}: {cause}") from error
    except SafetensorError as error:
        raise RuntimeError(f"{what}: {error}") from error
