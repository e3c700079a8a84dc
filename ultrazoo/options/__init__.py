"""From plain data to typed specs and back, by the annotations of the spec and the metadata of `spec.option`.

`parse` and `parse_part` never raise for bad data: they return the instance, or None and every problem found, with dotted
paths. `to_data` is the way back: canonical, names first, options equal to their default left out.
"""

from __future__ import annotations

from .data import FrozenMap, frozen, to_data
from .declared import Declared, declared, expected, got
from .parse import join, parse, parse_part, preset_fields

__all__ = [
    "Declared",
    "FrozenMap",
    "declared",
    "expected",
    "frozen",
    "got",
    "join",
    "parse",
    "parse_part",
    "preset_fields",
    "to_data",
]
