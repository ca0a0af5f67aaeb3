"""The production path on CPUs: PyTorch in blocks that stay in cache. Callers have validated the arguments."""

from rkif_kernels.torch_backend.fuse import fuse_
from rkif_kernels.torch_backend.importance import update_importance_
from rkif_kernels.torch_backend.select import all_valid, count_scores_, score_thresholds

__all__ = ["all_valid", "count_scores_", "fuse_", "score_thresholds", "update_importance_"]
