"""The host's own attention, untouched: on a plain host that is full attention."""

from __future__ import annotations

from ultrazoo.testing import dense as original

__all__ = ["original"]
