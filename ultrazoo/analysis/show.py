"""What `ultrazoo show` draws: who can influence a query per branch and layer parity, and cost per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cost.price import LayerPlan, full_flops
from ..cost.units import flops
from ..errors import OutputError, UsageError
from . import influence, text
from .influence import Views

if TYPE_CHECKING:
    from ..recipe import Plan

FORMS = ("png", "svg")


@dataclass(frozen=True)
class Shown:
    """Views of one query by groups of layers, and the plan's cost per layer."""

    name: str
    groups: tuple[Views, ...]
    layers: tuple[LayerPlan, ...]
    full: int

    def text(self, *, width: int = 100, unicode: bool = True) -> str:
        """Maps and cost bars for a terminal of `width` columns."""
        maps = text.render(self.groups, width=width, unicode=unicode)
        return f"{maps}\n\n{cost_text(self.layers, width=width, unicode=unicode)}"

    def data(self) -> dict[str, Any]:
        """Counts and shares for ``--json``; `frames` is the share seen of each frame."""
        return {
            "name": self.name,
            "query": list(self.groups[0].query) if self.groups else None,
            "groups": [
                {
                    "layers": list(group.layers),
                    "attention": group.attention,
                    "start": group.start,
                    "visible": group.bound,
                    "branches": [
                        {
                            "name": view.name,
                            "tokens": view.tokens,
                            "share": view.share,
                            "frames": [float(share) for share in view.per_frame],
                        }
                        for view in group.views
                    ],
                }
                for group in self.groups
            ],
            "layers": [layer.data() for layer in self.layers],
        }

    def images(self, form: str = "png") -> dict[str, bytes]:
        """The two pictures as bytes: ``influence`` and ``layers``. Raises UsageError for another form than png, svg."""
        from . import pictures

        if form not in FORMS:
            raise UsageError(f"pictures are {' or '.join(FORMS)}, got {form!r}")
        drawn = {
            "influence": pictures.influence(self.groups, self.name),
            "layers": pictures.layer_costs(self.layers, self.full, f"{self.name}: FLOPs of one forward, per layer"),
        }
        return {name: pictures.image(figure, form) for name, figure in drawn.items()}

    def save(self, directory: str | Path, form: str = "png") -> list[Path]:
        """Write ``<name>_influence`` and ``<name>_layers`` into `directory` (made if missing); returns the files.

        Raises OutputError where the directory cannot be written.
        """
        folder = Path(directory)
        written = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in self.images(form).items():
                file = folder / f"{self.name.replace('/', '_')}_{name}.{form}"
                file.write_bytes(content)
                written.append(file)
        except OSError as error:
            raise OutputError(f"{folder}: {error.strerror or error}") from error
        return written


def show(plan: Plan, query: str | Sequence[int] | None = None) -> Shown:
    """Views and costs of a plan. `query` is ``"t,y,x"`` or three numbers; None is a token near the middle.

    Raises UsageError for a query that is not on the grid.
    """
    resolved, grid = plan.resolved, plan.grid
    if query is None:
        token = influence.default_query(grid)
    else:
        token = influence.parse_query(query if isinstance(query, str) else ",".join(map(str, query)), grid)
    groups = influence.grouped(resolved.sites, resolved.attention, token, resolved.written)
    full = full_flops(resolved.sites[0]) if resolved.sites else 0
    return Shown(plan.name, tuple(groups), tuple(plan.layers), full)


def cost_text(layers: Sequence[LayerPlan], *, width: int = 100, unicode: bool = True) -> str:
    """Cost per layer as bars: attention, projections, other; one line per layer."""
    if not layers:
        return ""
    marks = "█▓░" if unicode else "#+."
    top = max(layer.flops for layer in layers)
    room = max(10, width - 36)
    lines = [f"FLOPs per layer: {marks[0]} attention  {marks[1]} projections  {marks[2]} other"]
    for layer in layers:
        ends, total = [], 0
        for part in (layer.attention_flops, layer.projection_flops, layer.other_flops):
            total += part
            ends.append(round(room * total / top) if top else 0)
        bar = marks[0] * ends[0] + marks[1] * (ends[1] - ends[0]) + marks[2] * (ends[2] - ends[1])
        lines.append(f"{layer.layer:>4} {layer.attention[:16]:<16} {flops(layer.flops):>12} {bar}".rstrip())
    return "\n".join(lines)
