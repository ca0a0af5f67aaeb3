"""Compiled kernels for CPUs: one pass over memory per operation. Callers have validated the arguments.

It is built from ``kernels.cpp`` when the package is installed. Without a C++ compiler, the ``torch``
backend is used, with the same bits.
"""

from rkif_kernels.backends.native.adamw import adamw_
from rkif_kernels.backends.native.fuse import fuse_, prepared_fusion, select_and_fuse_
from rkif_kernels.backends.native.importance import update_importance_
from rkif_kernels.backends.native.select import count_scores_, score_thresholds
from rkif_kernels.backends.native.task_vectors import absolute_sums, merge_task_vectors_
from rkif_kernels.backends.torch.select import all_valid

__all__ = [
    "absolute_sums",
    "adamw_",
    "all_valid",
    "count_scores_",
    "fuse_",
    "merge_task_vectors_",
    "prepared_fusion",
    "score_thresholds",
    "select_and_fuse_",
    "update_importance_",
]
