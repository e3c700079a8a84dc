"""Tests for anyone's attention: the contract suite, references in fp64, comparisons and tolerances.

A plugin's whole test file::

    from ultrazoo.testing import contract_suite
    from my_package.oracle import my_oracle

    TestMine = contract_suite("vendor/name", oracle=my_oracle)
"""

from .case import Case, ExtraTokens, Oracle, plain
from .compare import TOLERANCES, Tolerance, assert_close, error_ratio, null_answers
from .dense import dense, dense_heads, extra_rows, real_keys
from .poison import poisoned_memory, restored_state
from .reference import ReferenceHost, affine, attend, frequencies, grid_of, scores
from .suite import ContractSuite, contract_suite

__all__ = [
    "TOLERANCES",
    "Case",
    "ContractSuite",
    "ExtraTokens",
    "Oracle",
    "ReferenceHost",
    "Tolerance",
    "affine",
    "assert_close",
    "attend",
    "contract_suite",
    "dense",
    "dense_heads",
    "error_ratio",
    "extra_rows",
    "frequencies",
    "grid_of",
    "null_answers",
    "plain",
    "poisoned_memory",
    "real_keys",
    "restored_state",
    "scores",
]
