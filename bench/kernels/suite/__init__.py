"""Benchmarks of the operations, collected by pytest: run them with ``python -m bench run``."""
