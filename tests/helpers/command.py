"""The type of the fixture ``rkif``: arguments -> exit status, standard output, standard error."""

from __future__ import annotations

from collections.abc import Callable

Rkif = Callable[..., tuple[int, str, str]]
