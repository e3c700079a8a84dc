"""Attention architecture as data: recipes in, checked, priced and built diffusion transformers out.

Importing this package imports neither torch nor omegaconf: the names below are fetched on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from .spec import CONTRACT

if TYPE_CHECKING:
    from . import errors
    from .analysis.capture import capture
    from .analysis.probe import probe
    from .api import check, load, plan
    from .assemble import build, from_pretrained
    from .attention.standalone import create_attention, visible
    from .catalog import describe, list_entries
    from .inplace import apply, remove
    from .registry import register
    from .report.saving import save

_PUBLIC = {
    "errors": "errors",
    "load": "api:load",
    "check": "api:check",
    "plan": "api:plan",
    "build": "assemble:build",
    "apply": "inplace:apply",
    "remove": "inplace:remove",
    "capture": "analysis.capture:capture",
    "probe": "analysis.probe:probe",
    "save": "report.saving:save",
    "from_pretrained": "assemble:from_pretrained",
    "create_attention": "attention.standalone:create_attention",
    "visible": "attention.standalone:visible",
    "list_entries": "catalog:list_entries",
    "describe": "catalog:describe",
    "register": "registry:register",
}

__all__ = [
    "CONTRACT",
    "__version__",
    "apply",
    "build",
    "capture",
    "check",
    "create_attention",
    "describe",
    "errors",
    "from_pretrained",
    "list_entries",
    "load",
    "plan",
    "probe",
    "register",
    "remove",
    "save",
    "visible",
]


def __getattr__(name: str) -> Any:
    target = _PUBLIC.get(name)
    if target is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, _, attribute = target.partition(":")
    module = importlib.import_module(f".{module_name}", __name__)
    value = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
