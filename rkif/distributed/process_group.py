"""Processes that share a model, and collectives that detect the failure of another process."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

# Seconds between two checks of a collective that is under way. Other processes are checked for failures once
# in the longest pause.
_FIRST_PAUSE, _LONGEST_PAUSE = 1e-5, 0.05

# Number of groups made so far, by name. All processes make them in the same order, so the numbers agree.
_made: Counter[str] = Counter()


class RankFailedError(RuntimeError):
    """Another rank has failed; the message names the rank and the cause."""


class ProcessGroup:
    """The ranks of a ``torch.distributed`` group; without a group, one process, which sends nothing.

    Args:
        group: the processes that hold shards or replicas of the parameters; None for one process.
        device: the device of tensors that the group's backend can send.

    Attributes:
        group: the process group; None for one process.
        size, rank: number of processes, and the index of this one.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self._device = group, device
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self._broken: str | None = None
        self._told: BaseException | None = None  # the last failure here that was sent to the other ranks
        if group is not None:
            name = group.group_name
            self._failure = f"rkif/{name}/{_made[name]}/failure"
            _made[name] += 1

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks: exact for integers, the same bits on every rank for floats."""
        if self.size == 1:
            return tensor
        sent = tensor.to(self._device, copy=True)
        self._complete(lambda: dist.all_reduce(sent, group=self.group, async_op=True))
        return sent.to(tensor.device)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' one-dimensional tensors, concatenated by rank; lengths may differ, and may be 0."""
        if self.size == 1:
            return tensor
        sizes = torch.zeros(self.size, dtype=torch.int64, device=self._device)
        sizes[self.rank] = tensor.numel()
        lengths = self.all_reduce_sum(sizes).tolist()
        padded = torch.zeros(max(lengths), dtype=tensor.dtype, device=self._device)
        padded[: tensor.numel()] = tensor
        gathered = [torch.empty_like(padded) for _ in lengths]
        self._complete(lambda: dist.all_gather(gathered, padded, group=self.group, async_op=True))
        parts = [part[:length] for part, length in zip(gathered, lengths, strict=True)]
        return torch.cat(parts).to(tensor.device)

    def mean(self, figures: Sequence[float]) -> list[float]:
        """The mean of each number over all ranks; the same on every rank."""
        if self.size == 1:
            return list(figures)
        means: list[float] = (
            self.all_reduce_sum(torch.tensor(figures, dtype=torch.float64)) / self.size
        ).tolist()
        return means

    @contextmanager
    def raise_on_any_failure(self) -> Iterator[None]:
        """Context manager of a block without communication: if it fails on one rank, it fails on all.

        Raises:
            RankFailedError: it has failed on another rank.
        """
        try:
            yield
        except Exception as error:
            self._causes(f"{type(error).__name__}: {error}")
            self._told = error
            raise
        if causes := self._causes(None):
            raise RankFailedError("; ".join(causes))

    def _causes(self, failure: str | None) -> list[str]:
        """The failures by rank; every rank contributes its failure or None."""
        if self.size == 1:
            return []
        if not int(self.all_reduce_sum(torch.tensor(int(failure is not None)))):
            return []
        text = torch.tensor(list((failure or "").encode()), dtype=torch.uint8)
        length = torch.zeros(self.size, dtype=torch.int64)
        length[self.rank] = text.numel()
        lengths, content = self.all_reduce_sum(length).tolist(), bytes(self.all_gather(text).tolist())
        starts = [sum(lengths[:rank]) for rank in range(self.size)]
        said = (content[a : a + n].decode(errors="replace") for a, n in zip(starts, lengths, strict=True))
        return [f"rank {rank} failed: {cause}" for rank, cause in enumerate(said) if cause]

    @contextmanager
    def propagate_failure(self) -> Iterator[None]:
        """Context manager of a block that communicates: a failure in it is sent to the other ranks.

        It is written to the store that waiting ranks read. The group cannot be used after that. This method
        itself does not wait. A failure inside a nested :meth:`raise_on_any_failure` is not sent again.

        Raises:
            RankFailedError: the block has failed because another rank did.
        """
        try:
            yield
        except RankFailedError:
            raise
        except Exception as error:
            if self.size > 1 and error is not self._told:
                if cause := self._announcement():
                    raise RankFailedError(cause) from error
                self._told = error
                self._broken = f"rank {self.rank} failed: {type(error).__name__}: {error}"
                _get_default_store().set(self._failure, self._broken)
            raise

    def check_peers(self) -> None:
        """Check without waiting whether another rank has failed, for long work without communication.

        Raises:
            RankFailedError: another rank has reported a failure.
        """
        if self.size > 1 and (cause := self._announcement()):
            raise RankFailedError(cause)

    def _announcement(self) -> str | None:
        """The failure that another rank has reported; None if there is none or the store is unreachable."""
        try:
            store = _get_default_store()
            if self._broken is None and store.check([self._failure]):
                self._broken = store.get(self._failure).decode()
        except (RuntimeError, ValueError):  # the process that hosted the store has ended
            return None
        return self._broken

    def _complete(self, start: Any) -> None:
        """Run a collective; if a rank reports a failure, raise instead of waiting forever."""
        if self._broken is not None:
            raise RankFailedError(f"{self._broken}; the ranks cannot continue together")
        try:
            work, pause, asked = start(), _FIRST_PAUSE, time.monotonic()
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                if time.monotonic() - asked > _LONGEST_PAUSE:
                    asked = time.monotonic()
                    self.check_peers()
            work.wait()
        except RankFailedError:
            raise
        except RuntimeError as error:  # the connection broke, because the other process ended
            if cause := self._announcement():
                raise RankFailedError(cause) from error
            raise


ALONE = ProcessGroup(None, torch.device("cpu"))
"""One process."""


@contextmanager
def launched_processes() -> Iterator[ProcessGroup]:
    """Context manager of the processes that torchrun has started, connected by gloo; or of one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_torchelastic_launched():
        yield ALONE
        return
    dist.init_process_group("gloo")
    try:
        yield ProcessGroup(dist.group.WORLD, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
