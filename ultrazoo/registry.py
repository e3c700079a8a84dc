"""Names and what they stand for.

Built-in parts are rows of a static table, imported on first use. Third parties add parts by installing a package with
entry points in the groups ``ultrazoo.<kind>``; listing reads package metadata only, and a plugin is imported when a
recipe or the user names it. Plugin names are ``vendor/name`` and can never replace a built-in.
"""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from .builtin import TABLE
from .errors import RegistryError, listed, near
from .spec import CONTRACT

KINDS = ("attention", "layout", "shift", "compress", "fuse", "selector", "far_field", "kernel", "backbone")


@dataclass(frozen=True)
class Entry:
    """One registered name. `target` is ``module:attribute``; `problem` says why a plugin cannot be used.

    `start` says how an attention begins on pretrained weights, for lists that may not import it; empty where the part is
    not an attention or has not been loaded. The class's traits have the whole of it.
    """

    kind: str
    name: str
    target: str
    summary: str = ""
    aliases: tuple[str, ...] = ()
    distribution: str = "ultrazoo"
    version: str = ""
    status: str = "built-in"
    problem: str = ""
    start: str = ""

    @property
    def builtin(self) -> bool:
        return self.status == "built-in"


import_seconds: float | None = None
"""Longest time one plugin's import may take; None, the default in a library, sets no limit. The command line sets one.
It holds on the main thread of a system with interval timers."""

_LOCAL: dict[tuple[str, str], tuple[Entry, Any]] = {}
"""Parts registered in this process, by `register` or ``--plugin file.py``."""


def _version() -> str:
    from . import __version__

    return __version__


@lru_cache(maxsize=1)
def _builtins() -> dict[tuple[str, str], Entry]:
    return {
        (row.kind, row.name): Entry(
            row.kind, row.name, f"ultrazoo.{row.target}", row.summary, row.aliases, version=_version(), start=row.start
        )
        for row in TABLE
    }


def _entry_points(group: str) -> list[metadata.EntryPoint]:
    return list(metadata.entry_points(group=group))


def _plugins(kind: str) -> list[Entry]:
    found = []
    seen = set()
    for point in _entry_points(f"ultrazoo.{kind}"):
        dist = point.dist
        name = dist.metadata["Name"] if dist else "unknown"
        version = dist.version if dist else ""
        key = (point.name, point.value, name)
        # a development install can be seen twice on sys.path
        if key in seen:
            continue
        seen.add(key)
        summary = (dist.metadata["Summary"] or "") if dist else ""
        found.append(Entry(kind, point.name, point.value, summary, (), name, version, "not loaded"))
    claims: dict[str, list[Entry]] = {}
    for entry in found:
        claims.setdefault(entry.name, []).append(entry)
    return [_judged(entry, claims[entry.name]) for entry in found]


def _judged(entry: Entry, claimants: list[Entry]) -> Entry:
    """Mark what metadata alone shows to be unusable."""
    if "/" not in entry.name:
        rule = f"plugin names are 'vendor/name', {entry.distribution} offers {entry.name!r}"
        if _resolve_builtin(entry.kind, entry.name):
            rule = f"{entry.distribution} tries to shadow the built-in {entry.kind} {entry.name!r}"
        return replace(entry, status="refused", problem=rule)
    if len(claimants) > 1:
        who = listed(sorted(f"{c.distribution} {c.version}" for c in claimants))
        return replace(entry, status="duplicate", problem=f"{entry.name!r} is claimed by {who}; uninstall all but one")
    return entry


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        hint = near(kind, KINDS)
        raise RegistryError(f"unknown kind {kind!r}; kinds are {listed(KINDS)}" + (f"; {hint}" if hint else ""))


def entries(kind: str | None = None) -> list[Entry]:
    """Every registered name (of one kind), from the table and from package metadata; imports no part."""
    if kind is not None:
        _check_kind(kind)
    kinds = KINDS if kind is None else (kind,)
    rows = [entry for entry in _builtins().values() if entry.kind in kinds]
    rows += [entry for (k, _), (entry, _) in _LOCAL.items() if k in kinds]
    for k in kinds:
        rows += _plugins(k)
    return rows


def names(kind: str) -> list[str]:
    """Names that a recipe may use for `kind`, without aliases."""
    return [entry.name for entry in entries(kind) if not entry.problem]


def _resolve_builtin(kind: str, name: str) -> Entry | None:
    table = _builtins()
    if (kind, name) in table:
        return table[(kind, name)]
    folded = name.casefold()
    for (k, _), entry in table.items():
        if k == kind and folded in {alias.casefold() for alias in entry.aliases}:
            return entry
    return None


def entry(kind: str, name: str) -> Entry:
    """The entry behind a name or alias, without importing it; raises RegistryError with the near name."""
    _check_kind(kind)
    builtin = _resolve_builtin(kind, name)
    if builtin is not None:
        return builtin
    if (kind, name) in _LOCAL:
        return _LOCAL[(kind, name)][0]
    claims = [candidate for candidate in _plugins(kind) if candidate.name == name]
    if claims:
        if claims[0].problem:
            raise RegistryError(f"{kind} {name!r}: {claims[0].problem}")
        return claims[0]
    allowed = names(kind)
    hint = near(name, [*allowed, *(alias for e in entries(kind) for alias in e.aliases)])
    if "/" in name and not hint:
        hint = (
            f"no installed package offers it (for a plugin: pip install the package of vendor {name.split('/')[0]!r})"
        )
    raise RegistryError(f"unknown {kind} {name!r}" + (f"; {hint}" if hint else "") + f"; known: {listed(allowed)}")


def find(kind: str, name: str) -> Any:
    """The spec class registered as `name`, imported now.

    Raises RegistryError when the name is unknown, claimed twice, fails to import or speaks another contract.
    """
    row = entry(kind, name)
    if (kind, row.name) in _LOCAL:
        return _LOCAL[(kind, row.name)][1]
    if row.builtin:
        return _import(row.target)
    who = f"{kind} {row.name!r} of {row.distribution} {row.version}"
    try:
        with _limited():
            found = _import(row.target)
    except _TooSlow:
        raise RegistryError(f"{who} does not import: still not done after {import_seconds:g} s") from None
    except (Exception, SystemExit) as error:  # a plugin may raise anything at import
        raise RegistryError(f"{who} does not import: {cause(error)}") from error
    check_contract(row, found)
    return found


def cause(error: BaseException) -> str:
    """One line for an exception that someone else's code, or our own on its behalf, raised."""
    if isinstance(error, RegistryError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class _TooSlow(BaseException):
    """An import that ran past its limit; not an Exception, so that the plugin's own handlers let it through."""


@contextmanager
def _limited() -> Iterator[None]:
    """Raise _TooSlow inside the block after `import_seconds`."""
    seconds = import_seconds
    if not seconds or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(*_: Any) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_contract(row: Entry, found: Any) -> None:
    """Raise RegistryError unless `found` is a spec class of `row.kind` that speaks our contract."""
    who = f"{row.kind} {row.name!r} of {row.distribution} {row.version}".rstrip()
    spoken = getattr(found, "contract", None)
    if spoken is None or getattr(found, "kind", None) is None:
        raise RegistryError(f"{who} is not a spec: {row.target} is {found!r}")
    if spoken != CONTRACT:
        raise RegistryError(
            f"{who} speaks contract {spoken}, this ultrazoo ({_version()}) speaks {CONTRACT}; "
            + ("upgrade ultrazoo" if spoken > CONTRACT else f"upgrade {row.distribution}")
        )
    if found.kind != row.kind:
        raise RegistryError(f"{who} is registered as {row.kind} but is a {found.kind}")
    if found.name != row.name:
        raise RegistryError(f"{who} calls itself {found.name!r}; the entry point and the class must agree")
    if "cycle" in getattr(found, "__dataclass_fields__", {}):
        raise RegistryError(f"{who} has an option 'cycle', which in recipes is for what changes by layer; rename it")


def _import(target: str) -> Any:
    module_name, _, attribute = target.partition(":")
    module = importlib.import_module(module_name)
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise RegistryError(f"{module_name} has no {attribute!r}") from None


def provenance(kind: str, name: str) -> tuple[str, str]:
    """Distribution and version behind a name, for plans and artefacts."""
    row = entry(kind, name)
    return row.distribution, row.version


def register(spec: Any, *, summary: str = "") -> Any:
    """Register a spec class in this process, for notebooks and tests; usable as a decorator.

    The name must be ``vendor/name`` and free; raises RegistryError otherwise.
    """
    row = Entry(
        spec.kind, spec.name, f"{spec.__module__}:{spec.__qualname__}", summary, (), "(this process)", "", "local"
    )
    _check_kind(spec.kind)
    if "/" not in spec.name:
        raise RegistryError(f"plugin names are 'vendor/name', got {spec.name!r}")
    taken = _LOCAL.get((spec.kind, spec.name))
    if taken is not None and taken[1] is not spec:
        raise RegistryError(f"{spec.kind} {spec.name!r} is registered already, by {taken[0].target}")
    if any(plugin.name == spec.name for plugin in _plugins(spec.kind)):
        raise RegistryError(f"{spec.kind} {spec.name!r} is offered by an installed package already")
    check_contract(row, spec)
    _LOCAL[(spec.kind, spec.name)] = (row, spec)
    return spec


def forget(kind: str, name: str) -> None:
    """Undo `register`."""
    _LOCAL.pop((kind, name), None)


def foreign() -> dict[str, str]:
    """Parts of plugins that are loaded: what they are called, by the module that defines them."""
    found = {spec.__module__: f"{kind} {name!r}" for (kind, name), (_, spec) in _LOCAL.items()}
    for kind in KINDS:
        for row in _plugins(kind):
            module = row.target.partition(":")[0]
            if module in sys.modules:
                found.setdefault(module, f"{kind} {row.name!r} of {row.distribution} {row.version}".rstrip())
    return found


def load_file(path: str | Path) -> list[Entry]:
    """Import one local Python file and register every spec class it defines (``--plugin file.py``)."""
    file = Path(path)
    if not file.is_file():
        raise RegistryError(f"--plugin {path}: no such file")
    module_name = f"ultrazoo_local_{file.stem}"
    loader = importlib.util.spec_from_file_location(module_name, file)
    if loader is None or loader.loader is None:
        raise RegistryError(f"--plugin {path}: not a Python file")
    module = importlib.util.module_from_spec(loader)
    sys.modules[module_name] = module
    try:
        with _limited():
            loader.loader.exec_module(module)
    except _TooSlow:
        del sys.modules[module_name]
        raise RegistryError(f"--plugin {path}: import still not done after {import_seconds:g} s") from None
    except (Exception, SystemExit) as error:  # someone else's file may raise anything
        del sys.modules[module_name]
        raise RegistryError(f"--plugin {path}: {cause(error)}") from error
    specs: list[Any] = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module_name and _is_spec(value)
    ]
    if not specs:
        raise RegistryError(f"--plugin {path}: defines no spec (a class with kind, name and contract)")
    return [_LOCAL[(spec.kind, register(spec).name)][0] for spec in specs]


def _is_spec(value: type) -> bool:
    return bool(getattr(value, "kind", "")) and bool(getattr(value, "name", "")) and hasattr(value, "contract")


def recipe_points() -> Iterable[metadata.EntryPoint]:
    """Entry points of the group ``ultrazoo.recipes``: name → package that holds recipe files."""
    return _entry_points("ultrazoo.recipes")
