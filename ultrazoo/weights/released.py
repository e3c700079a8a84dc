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
from .match import Match

ORDER = [["local", "regional"], "global"]
KEY_FROM = {"regional": "key", "global": "query"}


def require_released(attention: Sequence[AttentionSpec], match: Match) -> None:
    """Raise WeightsError for every layer that reuses released extra weights in a block that reads them differently."""
    if match.format != "ultragen":
        return
    layers = sorted({int(n.split(".")[1]) for n in match.reused if n.startswith("blocks.") and ".attention." in n})
    wrong: dict[Problem, list[int]] = {}
    for layer in layers:
        for problem in _problems(attention[layer]):
            wrong.setdefault(problem, []).append(layer)
    if wrong:
        lines = [f"{match.path} holds released UltraGen weights, which this recipe would misread; nothing was loaded"]
        for problem, where in wrong.items():
            lines.append(f"  layers {where[0]}-{where[-1]}: {problem.path}   {problem.rule}; {problem.fix}")
        lines.append("  the design they belong to: {name: ultragen, variant: released}")
        raise WeightsError("\n".join(lines))


def _problems(spec: AttentionSpec) -> list[Problem]:
    if not isinstance(spec, BranchedSpec):
        return [Problem("name", f"got {spec.name!r}", "use 'branched'")]
    found = []
    order = spec.fuse.order if isinstance(spec.fuse, TimeGateSpec) else None
    if _plain(order) != ORDER:
        found.append(Problem("fuse", f"the gates belong to the order {ORDER}, got {_plain(order)}", "use that order"))
    for name, due in KEY_FROM.items():
        branch = spec.branches.get(name)
        got = getattr(branch.adapt, "key_from", None) if branch is not None else None
        if got != due:
            found.append(
                Problem(f"branches.{name}.adapt.key_from", f"is {due!r} there, got {got!r}", f"set it to {due}")
            )
    return found


def _plain(order: object) -> object:
    return [_plain(part) for part in order] if isinstance(order, (list, tuple)) else order
