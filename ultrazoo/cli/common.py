"""What several verbs share: telling recipes from overrides, and the options that they have in common and how they are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import typer

from ..errors import UsageError, near

GLOBALS = "--debug and --plugin FILE.py may stand anywhere on the line."

_OVERRIDE = re.compile(r"^(?:[^=/\\\s]+|(?:attention|steps|search)\.[^=]+)=")
"""``dotted.path=value``. A file's path has a slash before the sign of equality, or exists; layer keys may have one too."""


def is_override(argument: str) -> bool:
    """Whether an argument is ``key=value`` and not the path of a recipe."""
    return bool(_OVERRIDE.match(argument)) and not Path(argument).exists()


def split(arguments: Sequence[str], *, verb: str, many: bool = False) -> tuple[list[str], list[str]]:
    """Recipes and ``key=value`` overrides, in their order.

    Raises UsageError when there is no recipe, or more than one where the verb takes one.
    """
    recipes = [argument for argument in arguments if not is_override(argument)]
    overrides = [argument for argument in arguments if is_override(argument)]
    if not recipes:
        got = f", got only the override {overrides[0]!r}" if overrides else ""
        raise UsageError(f"{verb} needs a recipe, by path or name{got}; `ultrazoo list recipes` shows those shipped")
    if len(recipes) > 1 and not many:
        raise UsageError(
            f"{verb} takes one recipe followed by key=value overrides, got {len(recipes)} recipes: {', '.join(recipes)}"
        )
    return recipes, overrides


def one_of(value: str | None, allowed: Sequence[str], flag: str) -> None:
    """Raise UsageError unless the value of `flag` is allowed, or None."""
    if value is not None and value not in allowed:
        hint = near(value, allowed)
        raise UsageError(f"{flag} is one of {', '.join(allowed)}, got {value!r}" + (f"; {hint}" if hint else ""))


def size_of(text: str) -> tuple[int, int]:
    """``832x480`` as width and height in pixels. Raises UsageError."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UsageError(f"--size is WIDTHxHEIGHT in pixels, as 832x480, got {text!r}")
    return int(match[1]), int(match[2])


def checked_device(name: str) -> str:
    """`name` where torch has such a device; raises UsageError."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise UsageError("--device cuda: torch finds no CUDA device here")
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: there are {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    return name


def complete_recipe(incomplete: str) -> list[str]:
    """Shell completion: names of shipped recipes, and recipe files beside the text typed so far."""
    base = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    files = [str(path) for pattern in ("*.yaml", "*.yml") for path in base.glob(pattern)] if base.is_dir() else []
    return [name for name in [*recipe_names(), *files] if name.startswith(incomplete)]


def recipe_names() -> list[str]:
    """Names under which recipes can be addressed."""
    from ..recipe.find import recipes

    return [row.name for row in recipes() if not row.problem]


def complete_kind(incomplete: str) -> list[str]:
    """Shell completion: what `list` can show."""
    from ..registry import KINDS

    return [kind for kind in (*KINDS, "plugins", "kernels", "recipes") if kind.startswith(incomplete)]


def complete_name(incomplete: str) -> list[str]:
    """Shell completion: every registered name."""
    from ..registry import entries

    return sorted({row.name for row in entries() if row.name.startswith(incomplete)})


RECIPE = typer.Argument(
    help="A recipe by path or name, then key=value overrides.",
    metavar="RECIPE [KEY=VALUE]...",
    autocompletion=complete_recipe,
)
RECIPES = typer.Argument(
    help="Recipes by path or name, then key=value overrides (applied to each).",
    metavar="RECIPE... [KEY=VALUE]...",
    autocompletion=complete_recipe,
)
JSON = typer.Option(False, "--json", help="Print JSON instead of text.")
