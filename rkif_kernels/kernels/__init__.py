"""Triton kernels and their launchers, one launch for a list of tensors. Arguments have been validated."""

from rkif_kernels.kernels.fuse import fuse_
from rkif_kernels.kernels.importance import update_importance_
from rkif_kernels.kernels.select import all_valid, count_scores_, score_thresholds
from rkif_kernels.kernels.single_pass import select_and_fuse_

__all__ = [
    "all_valid",
    "count_scores_",
    "fuse_",
    "score_thresholds",
    "select_and_fuse_",
    "update_importance_",
]
