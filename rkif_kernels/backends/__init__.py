"""Implementations of the operations: one folder for each value of the argument ``backend``."""
