"""Triton kernels and their launchers, one launch for a list of tensors. Arguments have been validated."""

from rkif_kernels.kernels.fuse import fuse_
from rkif_kernels.kernels.importance import update_importance_
from rkif_kernels.kernels.select import score_thresholds

__all__ = ["fuse_", "score_thresholds", "update_importance_"]
