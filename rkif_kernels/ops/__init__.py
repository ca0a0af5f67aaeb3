"""The public operations: they validate their arguments, choose a backend and call it."""

from rkif_kernels.ops import library as library  # registers operations with PyTorch
from rkif_kernels.ops.adamw import adamw_, adamw_constants
from rkif_kernels.ops.fuse import fuse_, select_and_fuse_
from rkif_kernels.ops.fusion_plan import FusionPlan
from rkif_kernels.ops.importance import update_importance_
from rkif_kernels.ops.importance_plan import ImportancePlan
from rkif_kernels.ops.select import (
    all_valid_scores,
    count_scores_,
    kth_scores,
    order_statistic_k,
    sample_scores,
    score_thresholds,
)
from rkif_kernels.ops.task_vectors import absolute_sums, merge_task_vectors_

__all__ = [
    "FusionPlan",
    "ImportancePlan",
    "absolute_sums",
    "adamw_",
    "adamw_constants",
    "all_valid_scores",
    "count_scores_",
    "fuse_",
    "kth_scores",
    "merge_task_vectors_",
    "order_statistic_k",
    "sample_scores",
    "score_thresholds",
    "select_and_fuse_",
    "update_importance_",
]
