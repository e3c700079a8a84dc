"""Every token sees every token: the dense formula, which plugin authors have as `ultrazoo.testing.dense`."""

from __future__ import annotations

from ultrazoo.testing import dense as full

__all__ = ["full"]
