"""Layer keys: which entry of a layer map holds for which layer. Sampling steps use the same keys.

Items ``7``, ``0-2``, ``0-26/2``, ``first3``, ``last3``, ``odd``, ``even``, ``*`` and lists of them, with an optional
``group:``. Explicit beats parity beats ``*``; inside one rank an item with a group beats one without; what is left is a
conflict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import Problem, listed, near

_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?:/([0-9]{1,9}))?)?")
_END = re.compile(r"(first|last)([0-9]{1,9})")
_EXPLICIT, _PARITY, _ALL = 0, 2, 4

_FORMS = "7, 0-2, 0-26/2, first3, last3, odd, even, '*' and lists of them"


@dataclass(frozen=True)
class Axis:
    """What keys count: ``groups`` as in `BackboneSpec.groups`, and the words for one item and for the whole."""

    groups: Mapping[str, int]
    item: str
    whole: str

    @property
    def count(self) -> int:
        return sum(self.groups.values())


def assign(keys: Sequence[str], axis: Axis, path: str) -> tuple[list[str | None], list[Problem]]:
    """The key that holds at every index (None where none does), and the problems of the keys, below `path`."""
    problems: list[Problem] = []
    holder: list[str | None] = [None] * axis.count
    ranks = [_ALL + 2] * axis.count
    clashes: dict[tuple[str, str], list[int]] = {}
    for key in keys:
        claims, found = _claims(key, axis)
        problems += [Problem(f"{path}.{key}", rule, fix) for rule, fix in found]
        if not claims and not found:
            problems.append(Problem(f"{path}.{key}", f"matches no {axis.item} of {axis.whole}"))
        for index, rank in claims.items():
            other = holder[index]
            if rank < ranks[index]:
                holder[index], ranks[index] = key, rank
            elif rank == ranks[index] and other is not None:
                clashes.setdefault((key, other), []).append(index)
    for (key, other), where in clashes.items():
        # a stronger key may have settled it
        open_ = [index for index in where if holder[index] == other]
        if open_:
            rule = f"{axis.item} {spans(open_)} is claimed by {other!r} too, in the same rank"
            problems.append(Problem(f"{path}.{key}", rule, "let one of them go, or move it to another rank"))
    return holder, problems


def _claims(key: str, axis: Axis) -> tuple[dict[int, int], list[tuple[str, str]]]:
    """Index → rank for one key, its best item counting, and what is wrong with its items."""
    claims: dict[int, int] = {}
    problems: list[tuple[str, str]] = []
    for item in key.split(","):
        found, rank, problem = _item(item.strip(), axis)
        if problem:
            problems.append(problem)
        for index in found:
            claims[index] = min(rank, claims.get(index, rank))
    return claims, problems


def _item(item: str, axis: Axis) -> tuple[Iterable[int], int, tuple[str, str] | None]:
    """Indices and rank of one item, or ``(rule, fix)``."""
    offset, count, whole, weaker = 0, axis.count, axis.whole, 1
    prefix, colon, rest = item.rpartition(":")
    if colon:
        if prefix not in axis.groups or not prefix:
            names = [name for name in axis.groups if name]
            fix = near(prefix, names) or (f"groups are {listed(names)}" if names else "remove the prefix")
            return (), 0, (f"{axis.whole} has no group {prefix!r}", fix)
        for name, size in axis.groups.items():
            if name == prefix:
                count = size
                break
            offset += size
        item, whole, weaker = rest.strip(), f"group {prefix!r} of {axis.whole}", 0
    if item == "*":
        return range(offset, offset + count), _ALL + weaker, None
    if item in ("odd", "even"):
        return range(offset + (item == "odd"), offset + count, 2), _PARITY + weaker, None
    chosen, problem = _explicit(item, count, axis.item, whole)
    return (offset + index for index in chosen), _EXPLICIT + weaker, problem


def _explicit(item: str, count: int, what: str, whole: str) -> tuple[Iterable[int], tuple[str, str] | None]:
    end = _END.fullmatch(item)
    if end:
        size = int(end[2])
        if not 1 <= size <= count:
            return (), (f"{item!r} wants {size} {what}s, {whole} has {count}", "")
        return (range(size) if end[1] == "first" else range(count - size, count)), None
    span = _RANGE.fullmatch(item)
    if not span:
        fix = near(item, ("odd", "even", "first1", "last1")) or f"keys are {_FORMS}"
        return (), (f"{item!r} is not a {what} key", fix)
    first = int(span[1])
    last = first if span[2] is None else int(span[2])
    step = 1 if span[3] is None else int(span[3])
    if last < first or step < 1:
        return (), (f"{item!r} runs backwards or stands still", "write first-last or first-last/step, step at least 1")
    if last >= count:
        rule = f"{what} {max(first, count) if first >= count else last} does not exist: {whole} has {_all(what, count)}"
        return (), (rule, "")
    return range(first, last + 1, step), None


def _all(what: str, count: int) -> str:
    return f"{what}s 0-{count - 1}" if count > 1 else f"only {what} 0"


def spans(indices: Iterable[int]) -> str:
    """Sorted indices as a key: ``0-2,27-29``, ``1-29/2``."""
    rest = sorted(set(indices))
    parts = []
    while rest:
        length, step = 1, 1
        if len(rest) > 1:
            step = rest[1] - rest[0]
            length = 2
            while length < len(rest) and rest[length] - rest[length - 1] == step:
                length += 1
        if length == 2 and step > 1:
            length = 1
        first, last = rest[0], rest[length - 1]
        if length == 1:
            parts.append(str(first))
        else:
            parts.append(f"{first}-{last}" if step == 1 else f"{first}-{last}/{step}")
        rest = rest[length:]
    return ",".join(parts)
