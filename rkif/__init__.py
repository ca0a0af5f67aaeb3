"""Recurrent Knowledge Identification and Fusion: models that learn task after task without forgetting."""

from rkif.config import FusionConfig, MergeWeights
from rkif.fuser import Fuser
from rkif.fusion import FusionReport, FusionResult, fuse
from rkif.gate import Criterion, Gate, GateReport

__all__ = [
    "Criterion",
    "Fuser",
    "FusionConfig",
    "FusionReport",
    "FusionResult",
    "Gate",
    "GateReport",
    "MergeWeights",
    "fuse",
]
