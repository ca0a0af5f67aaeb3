"""How much device memory recurrent training needs, computed before anything is loaded."""

from rkif.plan.bytes import OPTIONS, PHASES, Budget, Option, Training, choose

__all__ = ["OPTIONS", "PHASES", "Budget", "Option", "Training", "choose"]
