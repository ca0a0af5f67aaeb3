"""The specification: plain PyTorch on whole tensors, slow, close to the formulas. For tests only."""

from rkif_kernels.backends.reference.adamw import adamw_
from rkif_kernels.backends.reference.fuse import fuse_
from rkif_kernels.backends.reference.importance import update_importance_
from rkif_kernels.backends.reference.select import count_scores_, score_thresholds

__all__ = ["adamw_", "count_scores_", "fuse_", "score_thresholds", "update_importance_"]
