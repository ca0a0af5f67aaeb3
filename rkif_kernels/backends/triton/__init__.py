"""Triton kernels, with one launch for a whole list of tensors. Callers have validated the arguments."""

from rkif_kernels.backends.torch.task_vectors import absolute_sums, merge_task_vectors_
from rkif_kernels.backends.triton.adamw import adamw_
from rkif_kernels.backends.triton.count import all_valid, count_scores_
from rkif_kernels.backends.triton.fuse import fuse_
from rkif_kernels.backends.triton.importance import update_importance_
from rkif_kernels.backends.triton.plan import PreparedUpdate
from rkif_kernels.backends.triton.single_pass import prepared_fusion, select_and_fuse_
from rkif_kernels.backends.triton.thresholds import both_thresholds, score_thresholds

__all__ = [
    "PreparedUpdate",
    "absolute_sums",
    "adamw_",
    "all_valid",
    "both_thresholds",
    "count_scores_",
    "fuse_",
    "merge_task_vectors_",
    "prepared_fusion",
    "score_thresholds",
    "select_and_fuse_",
    "update_importance_",
]
