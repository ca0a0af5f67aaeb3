"""PyTorch in blocks that stay in cache, for every device. Callers have validated the arguments."""

from rkif_kernels.backends.torch.adamw import adamw_
from rkif_kernels.backends.torch.fuse import fuse_
from rkif_kernels.backends.torch.importance import update_importance_
from rkif_kernels.backends.torch.select import all_valid, count_scores_, score_thresholds

__all__ = ["adamw_", "all_valid", "count_scores_", "fuse_", "score_thresholds", "update_importance_"]
