"""Recurrent Knowledge Identification and Fusion: models that learn task after task without forgetting."""

from rkif.config import FusionConfig, MergeWeights
from rkif.fuser import Fuser
from rkif.fusion import FusionReport, FusionResult, fuse
from rkif.gate import Criterion, Gate, GateReport
from rkif.lora import DeltaResult, fuse_delta, lora_scaling

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
    "fuse",
    "fuse_delta",
    "lora_scaling",
]
