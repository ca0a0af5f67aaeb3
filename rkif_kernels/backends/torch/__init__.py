"""PyTorch in blocks that stay in cache, for every device. Callers have validated the arguments."""

from rkif_kernels.backends.torch.adamw import adamw_
from rkif_kernels.backends.torch.fuse import fuse_
from rkif_kernels.backends.torch.importance import update_importance_
from rkif_kernels.backends.torch.select import all_valid, count_scores_, score_thresholds
from rkif_kernels.backends.torch.task_vectors import absolute_sums, merge_task_vectors_

__all__ = [
    "absolute_sums",
    "adamw_",
    "all_valid",
    "count_scores_",
    "fuse_",
    "merge_task_vectors_",
    "score_thresholds",
    "update_importance_",
]
