"""Fusion inside a training loop: the state machine of a round, and its parts."""

from rkif.fuser.fuser import Fuser

__all__ = ["Fuser"]
