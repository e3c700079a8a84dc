"""The only door to attention kernels: `attend`. See `door`."""

from __future__ import annotations

from .door import Inputs, KernelRow, Run, attend, exporting_to, record, table, watched

__all__ = ["Inputs", "KernelRow", "Run", "attend", "exporting_to", "record", "table", "watched"]
