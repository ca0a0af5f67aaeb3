"""Importance, exact selection and fusion over lists of tensors: one set of operations, three implementations.

The operations in :mod:`rkif_kernels.ops` validate their arguments and hand them to one of

* ``triton``: Triton, one launch for a whole list of tensors;
* ``torch``: PyTorch, blocked so that temporaries stay in cache;
* ``reference``: PyTorch without any cleverness; the specification, used by the tests only.

All three give the same bits (see ``docs/reference/semantics.md``).
"""

from rkif_kernels.ops import (
    FuseStats,
    Scores,
    all_valid_scores,
    count_scores_,
    fuse_,
    magnitudes,
    order_statistic_rank,
    sample_scores,
    score_thresholds,
    scores_at_ranks,
    select_and_fuse_,
    update_importance_,
)

__all__ = [
    "FuseStats",
    "Scores",
    "all_valid_scores",
    "count_scores_",
    "fuse_",
    "magnitudes",
    "order_statistic_rank",
    "sample_scores",
    "score_thresholds",
    "scores_at_ranks",
    "select_and_fuse_",
    "update_importance_",
]
