"""Recurrent Knowledge Identification and Fusion: models that learn task after task without forgetting."""

from rkif.config import FusionConfig, MergeWeights
from rkif.delta import DeltaResult, fuse_delta, lora_scaling
from rkif.fuser import Fuser
from rkif.fusion import FusionReport, FusionResult, fuse
from rkif.gate import Criterion, Gate, GateReport

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
