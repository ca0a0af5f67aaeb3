"""Importance, exact selection and fusion over lists of tensors: one set of operations, four implementations.

The operations validate their arguments and call one of these backends:

* ``triton``: Triton, one launch for a whole list of tensors;
* ``native``: C++ for CPUs, if it was built;
* ``torch``: PyTorch, blocked so that temporaries stay in cache;
* ``reference``: plain PyTorch; the specification, used only by the tests.

All give the same bits (see ``docs/reference/semantics.md``). Other packages import only from here.
"""

from rkif_kernels.backends.choose import capturing
from rkif_kernels.checks import (
    PARAMETER_DTYPES,
    STATE_DTYPES,
    Arguments,
    require_choice,
    require_disjoint,
    require_float32,
    require_fraction,
    require_number,
    require_weights,
    require_whole_number,
)
from rkif_kernels.ops import (
    FusionPlan,
    ImportancePlan,
    absolute_sums,
    adamw_,
    adamw_constants,
    all_valid_scores,
    count_scores_,
    fuse_,
    kth_scores,
    merge_task_vectors_,
    order_statistic_k,
    sample_scores,
    score_thresholds,
    select_and_fuse_,
    update_importance_,
)
from rkif_kernels.ops.guards import Description, describe
from rkif_kernels.ops.searches import CountingSearches
from rkif_kernels.selection.bracket import bracket
from rkif_kernels.selection.counting import CountingSearch
from rkif_kernels.selection.draws import Draws
from rkif_kernels.selection.signs import elect_signs
from rkif_kernels.types import (
    CASES,
    ROLES,
    AdamWConstants,
    AdamWInputs,
    Backend,
    CaseWeights,
    FuseStats,
    FusionInputs,
    ImportanceInputs,
    MergeRule,
    Order,
    OuterFrom,
    Scope,
    Scores,
    Smoothing,
    TaskVectorRule,
    Views,
    magnitudes,
)

__all__ = [
    "CASES",
    "PARAMETER_DTYPES",
    "ROLES",
    "STATE_DTYPES",
    "AdamWConstants",
    "AdamWInputs",
    "Arguments",
    "Backend",
    "CaseWeights",
    "CountingSearch",
    "CountingSearches",
    "Description",
    "Draws",
    "FuseStats",
    "FusionInputs",
    "FusionPlan",
    "ImportanceInputs",
    "ImportancePlan",
    "MergeRule",
    "Order",
    "OuterFrom",
    "Scope",
    "Scores",
    "Smoothing",
    "TaskVectorRule",
    "Views",
    "absolute_sums",
    "adamw_",
    "adamw_constants",
    "all_valid_scores",
    "bracket",
    "capturing",
    "count_scores_",
    "describe",
    "elect_signs",
    "fuse_",
    "kth_scores",
    "magnitudes",
    "merge_task_vectors_",
    "order_statistic_k",
    "require_choice",
    "require_disjoint",
    "require_float32",
    "require_fraction",
    "require_number",
    "require_weights",
    "require_whole_number",
    "sample_scores",
    "score_thresholds",
    "select_and_fuse_",
    "update_importance_",
]
