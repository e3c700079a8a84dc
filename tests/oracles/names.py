"""How parameters are called in a state dict."""

from __future__ import annotations

import keyword


def stored(branch: str) -> str:
    """A branch's name there: ``global`` is a word of Python's and is stored as ``global_``."""
    return branch + "_" if keyword.iskeyword(branch) else branch
