"""Pages about a plan: `html` makes report.html, `card` the model card README.md."""

from __future__ import annotations

from .modelcard import card
from .page import html

__all__ = ["card", "html"]
