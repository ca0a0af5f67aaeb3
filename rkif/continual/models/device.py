"""The device and the precision of a run."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from rkif.continual.config import RunConfig


def run_device(config: RunConfig) -> torch.device:
    """The device of ``config.device``; "auto" is "cuda" if available, else "cpu".

    Raises:
        ValueError: the device does not exist or cannot be used.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:  # its message lists all kinds of devices
        raise ValueError(
            f"device must be auto, cpu, cuda, or one GPU such as cuda:1; got {name!r}"
        ) from error
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    return chosen


def autocast(config: RunConfig) -> contextlib.AbstractContextManager[Any]:
    """A context manager for the run's precision: autocast to bfloat16, or float32."""
    enabled = config.precision == "bfloat16"
    return torch.autocast(run_device(config).type, dtype=torch.bfloat16, enabled=enabled)
