"""Methods that torch.compile leaves out of its graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graph(method: Callable[P, R]) -> Callable[P, R]:
    """Decorate a method that torch.compile must not trace: a call breaks the graph.

    ``torch.compiler.disable`` does the same, but its use in a module would import the compiler.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            result: R = torch.compiler.disable(method)(*args, **kwargs)  # type: ignore[no-untyped-call]
            return result
        return method(*args, **kwargs)

    return call
