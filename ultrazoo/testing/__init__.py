"""Tests for anyone's attention: the contract suite, references in fp64, comparisons and tolerances.

A plugin's whole test file::

    from ultrazoo.testing import contract_suite
    from my_package.oracle import my_oracle

    TestMine = contract_suite("vendor/name", oracle=my_oracle)
"""

from .case import Case, ExtraTokens, Oracle, plain
from .compare import TOLERANCES, Tolerance, assert_close, error_ratio, null_answers
from .reference import ReferenceHost, affine, attend, frequencies, grid_of, scores

__all__ = [
    "TOLERANCES",
    "Case",
    "ExtraTokens",
    "Oracle",
    "ReferenceHost",
    "Tolerance",
    "affine",
    "assert_close",
    "attend",
    "error_ratio",
    "frequencies",
    "grid_of",
    "null_answers",
    "plain",
    "scores",
]
