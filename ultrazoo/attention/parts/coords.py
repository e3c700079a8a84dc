"""Coordinates of a branch: what the rotary embedding is told about where its tokens are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import Problem
from ...spec import Options, Site, option


@dataclass(frozen=True, kw_only=True)
class CoordsSpec(Options):
    """Places of tokens: from the grid's corner or each window's; compressed tokens at their index or their centre."""

    origin: Literal["grid", "window"] = option("grid", "positions count from the grid's corner or each window's")
    cell: Literal["index", "centre"] = option("centre", "a compressed token sits at its index or at its cell's centre")
    rule: Literal["none", "interpolate", "ntk", "yarn"] = option("none", "rotary rule beyond the trained size")

    def problems(self, site: Site) -> list[Problem]:
        if site.rope is None and self != CoordsSpec():
            return [
                Problem("", "this backbone has no rotary embedding, coordinates would be ignored", "leave coords out")
            ]
        if self.rule != "none" and site.rope is not None and site.rope.trained is None:
            return [Problem("rule", f"{self.rule} needs the size the backbone was trained at, which it does not state")]
        return []
