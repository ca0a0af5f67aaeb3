"""State in a folder of safetensors files, written by all processes together and read by as many or others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rkif.files import settle, sync_folder
from rkif.ranks import Ranks


def write_state(folder: str | os.PathLike[str], state: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write tensors, spread or not, as ``torch.distributed.checkpoint`` does; all ranks must call.

    The folder appears when it is complete, in the place of one that was there.

    Raises:
        RuntimeError: it could not be written, here or on another rank.
    """
    # Imported where it is needed: it takes as long as everything else in rkif.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    with ranks.together():
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    alone = ranks.size == 1
    with ranks.announced():
        save(dict(state), storage_writer=writer, process_group=ranks.group, no_dist=alone)
    with ranks.together():
        if ranks.rank == 0:
            for path in temporary.iterdir():
                settle(path)
            sync_folder(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
            sync_folder(folder.parent)


def read_state(
    folder: str | os.PathLike[str],
    room: Callable[[str, torch.Size, torch.dtype], Tensor],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Read what :func:`write_state` wrote, on as many ranks or others; all must call.

    Args:
        room: makes the tensor that one of some name, whole shape and dtype is read into, spread or not.

    Raises:
        FileNotFoundError: there is no such folder.
        RuntimeError: it could not be read, here or on another rank.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    with ranks.together():
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"there is no state in {folder}")
        reader = HuggingFaceStorageReader(str(folder))
        stored = reader.read_metadata().state_dict_metadata
    state = {
        name: room(name, about.size, about.properties.dtype)
        for name, about in sorted(stored.items())
        if isinstance(about, TensorStorageMetadata)
    }
    with ranks.announced():
        load(state, storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)
    return state
