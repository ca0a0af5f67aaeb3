"""The specification: plain PyTorch on whole tensors, slow and obviously right. For tests only."""

from rkif_kernels.reference.fuse import fuse_
from rkif_kernels.reference.importance import update_importance_
from rkif_kernels.reference.select import score_thresholds

__all__ = ["fuse_", "score_thresholds", "update_importance_"]
