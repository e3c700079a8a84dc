"""Reference implementations in fp64, with loops and dense masks, written from the formulas.

Each takes a `ultrazoo.testing.Case` and shares no helper with the code that runs. `ORACLES` is the table that the
contract suite reads: every registered attention has a row.
"""
