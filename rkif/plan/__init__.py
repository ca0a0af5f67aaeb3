"""How much of a device's memory recurrent training takes, before anything is loaded."""

from rkif.plan.bytes import OPTIONS, PHASES, Budget, Option, Training, choose

__all__ = ["OPTIONS", "PHASES", "Budget", "Option", "Training", "choose"]
