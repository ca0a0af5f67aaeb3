"""Recurrent Knowledge Identification and Fusion: models that learn task after task with less forgetting.

The public names are imported when they are first used, so that ``import rkif`` and the command line start
without PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rkif import optim
    from rkif.config import FusionConfig, MergeWeights
    from rkif.distributed.process_group import RankFailedError
    from rkif.fuser import Fuser
    from rkif.fusion import FusionReport, FusionResult, fuse
    from rkif.gate import Criterion, Gate, GateReport
    from rkif.lora import DeltaResult, fuse_delta, lora_scaling

    __version__: str

__all__ = [
    "Criterion",
    "DeltaResult",
    "Fuser",
    "FusionConfig",
    "FusionReport",
    "FusionResult",
    "Gate",
    "GateReport",
    "MergeWeights",
    "RankFailedError",
    "__version__",
    "fuse",
    "fuse_delta",
    "lora_scaling",
    "optim",
]

_MODULES = {
    "rkif.config": ("FusionConfig", "MergeWeights"),
    "rkif.distributed.process_group": ("RankFailedError",),
    "rkif.fuser": ("Fuser",),
    "rkif.fusion": ("FusionReport", "FusionResult", "fuse"),
    "rkif.gate": ("Criterion", "Gate", "GateReport"),
    "rkif.lora": ("DeltaResult", "fuse_delta", "lora_scaling"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.metadata.version("rkif")
    elif name == "optim":
        value = importlib.import_module("rkif.optim")
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
