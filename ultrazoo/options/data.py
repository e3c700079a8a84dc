"""From typed specs back to plain data, and the frozen mapping that specs hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..spec import Options, Spec
from .declared import declared


class FrozenMap(dict[str, Any]):
    """A mapping inside a frozen spec: equal to any dict with the same entries, hashable, not to be changed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("options are frozen: make a new spec with dataclasses.replace")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse

    def __copy__(self) -> FrozenMap:
        return self

    def __deepcopy__(self, memo: Any) -> FrozenMap:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenMap, (dict(self),)


def frozen(data: Any) -> Any:
    """Plain data that cannot be changed: mappings as `FrozenMap`, lists as tuples."""
    if isinstance(data, Mapping):
        return FrozenMap({key: frozen(value) for key, value in data.items()})
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        return tuple(frozen(value) for value in data)
    return data


def to_data(spec: Any) -> Any:
    """Plain data that `parse` turns back into an equal spec: name first, options equal to their default left out."""
    if isinstance(spec, (Spec, Options)):
        data: dict[str, Any] = {"name": spec.name} if spec.name else {}
        cls: Any = type(spec)
        for row in declared(cls):
            value = getattr(spec, row.name)
            if row.required or not _same(value, row.default):
                data[row.name] = to_data(value)
        return data
    if isinstance(spec, Mapping):
        return {key: to_data(value) for key, value in spec.items()}
    if isinstance(spec, (tuple, list)):
        return [to_data(value) for value in spec]
    return spec


def _same(value: Any, default: Any) -> bool:
    # True == 1 in Python; canonical data must not mistake one for the other
    return isinstance(value, bool) == isinstance(default, bool) and bool(value == default)
