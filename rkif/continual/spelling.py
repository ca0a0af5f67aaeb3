"""Suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: "; did you mean 'accuracy'?", or "" if none is close.

    If none is close, up to three names that begin with ``name`` are suggested.
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    if not close and len(name) >= 3:
        close = [one for one in names if one.startswith(name)][:3]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
