"""Recurrent Knowledge Identification and Fusion: models that learn task after task without forgetting."""

from rkif.config import FusionConfig, MergeWeights
from rkif.fuser import Fuser
from rkif.fusion import FusionReport, FusionResult, fuse

__all__ = ["Fuser", "FusionConfig", "FusionReport", "FusionResult", "MergeWeights", "fuse"]
