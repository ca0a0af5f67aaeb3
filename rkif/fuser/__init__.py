"""Fusion inside a training loop: the state machine of a round and what it is made of."""

from rkif.fuser.fuser import Fuser

__all__ = ["Fuser"]
