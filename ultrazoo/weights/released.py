"""Where the released UltraGen checkpoints fit: numbers with the right shape in a block that means something else by them
are worse than none.

The released blocks mix ``[[local, regional], global]`` and make the global keys from the query matrix (`ultragen`,
``variant: released``). A block that differs in this would take the weights and compute nonsense.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..attention.branched import BranchedSpec
from ..attention.parts.fuse import TimeGateSpec
from ..errors import Problem, WeightsError
from ..spec import AttentionSpec
from .match import collapse, detect
from .reader import Checkpoint

ORDER = [["local", "regional"], "global"]
KEY_FROM = {"regional": "key", "global": "query"}


def require_released(checkpoint: Checkpoint, attention: Sequence[AttentionSpec], layout: str = "auto") -> None:
    """Raise WeightsError for every branched layer that would misread released extra weights.

    A layer that the file has extra weights for and that is not branched at all drops them; that is reported elsewhere.
    """
    form, prefix = detect(checkpoint, layout)
    if form.name != "ultragen":
        return
    names = [form.ours(key[len(prefix) :]) or "" for key in checkpoint]
    layers = sorted({int(name.split(".")[1]) for name in names if ".attention." in name})
    wrong: dict[Problem, list[str]] = {}
    for layer in layers:
        if layer < len(attention) and isinstance(spec := attention[layer], BranchedSpec):
            for problem in _problems(spec):
                wrong.setdefault(problem, []).append(f"attention.{layer}.{problem.path}")
    if wrong:
        lines = [
            f"{checkpoint.path} holds released UltraGen weights, which this recipe would misread; nothing was loaded"
        ]
        lines += [f"  {collapse(where)[0]}   {problem.rule}; {problem.fix}" for problem, where in wrong.items()]
        lines.append("  the design they belong to is {name: ultragen, variant: released}")
        raise WeightsError("\n".join(lines))


def _problems(spec: BranchedSpec) -> list[Problem]:
    found = []
    order = _plain(spec.fuse.order) if isinstance(spec.fuse, TimeGateSpec) else None
    if order != ORDER:
        got = f"order {order}" if order else f"fuse {spec.fuse.name!r}"
        found.append(Problem("fuse.order", f"the gates belong to the order {ORDER}, got {got}", "use that order"))
    for name, due in KEY_FROM.items():
        branch = spec.branches.get(name)
        if branch is None:
            found.append(Problem(f"branches.{name}", "there is no such branch", "add it"))
        elif (base := getattr(branch.adapt, "key_from", None)) != due:
            path = f"branches.{name}.adapt.key_from"
            found.append(Problem(path, f"the weights belong to {due!r}, got {base!r}", f"use {due!r}"))
    return found


def _plain(order: object) -> object:
    return [_plain(part) for part in order] if isinstance(order, (list, tuple)) else order
