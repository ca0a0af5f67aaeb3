"""Implementations of the operations, one folder each, named as the ``backend`` argument names them."""
