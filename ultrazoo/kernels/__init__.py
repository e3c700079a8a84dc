"""The only door to attention kernels: `attend`. See `door`."""

from __future__ import annotations

from .door import Inputs, Run, attend, exporting_to, record, watched
from .facts import KernelRow, table

__all__ = ["Inputs", "KernelRow", "Run", "attend", "exporting_to", "record", "table", "watched"]
