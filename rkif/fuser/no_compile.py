"""Methods that torch.compile leaves out of its graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(method: Callable[P, R]) -> Callable[P, R]:
    """The method; a compiler that meets a call breaks its graph there, and does not trace what is inside.

    As ``torch.compiler.disable``, which would import the compiler for those who never compile.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            found: R = torch.compiler.disable(method)(*args, **kwargs)  # type: ignore[no-untyped-call]
            return found
        return method(*args, **kwargs)

    return call
