"""What `ultrazoo show` draws: who can influence a query per branch and layer parity, which blocks see which, after how
many layers everything has met, and cost per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cost.price import LayerPlan, full_flops
from ..cost.units import flops
from ..errors import OutputError, UsageError
from . import influence, text
from .blocks import ANSWERS, BlockMap, block_maps, parse_block
from .coverage import Coverage, coverage
from .influence import Views

if TYPE_CHECKING:
    from ..recipe import Plan

FORMS = ("png", "svg")


@dataclass(frozen=True)
class Shown:
    """Views of one query and block maps (`maps[i]` of `groups[i]`) by groups of layers, the model's coverage, and the
    plan's cost per layer."""

    name: str
    groups: tuple[Views, ...]
    layers: tuple[LayerPlan, ...]
    full: int
    maps: tuple[Mapping[str, BlockMap], ...]
    coverage: Coverage

    def text(self, *, width: int = 100, unicode: bool = True) -> str:
        """Maps and cost bars for a terminal of `width` columns."""
        parts = [
            text.render(self.groups, width=width, unicode=unicode),
            text.render_blocks(self.groups, self.maps, width=width, unicode=unicode),
            text.folded(self.coverage.text(), width),
            cost_text(self.layers, width=width, unicode=unicode),
        ]
        return "\n\n".join(parts)

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
                    "selects": group.selects,
                    "branches": [
                        {
                            "name": view.name,
                            "tokens": view.tokens,
                            "share": view.share,
                            "frames": [float(share) for share in view.per_frame],
                        }
                        for view in group.views
                    ],
                    "blocks": {name: one.data() for name, one in maps.items()},
                }
                for group, maps in zip(self.groups, self.maps, strict=True)
            ],
            "coverage": self.coverage.data(),
            "layers": [layer.data() for layer in self.layers],
        }

    def images(self, form: str = "png") -> dict[str, bytes]:
        """The pictures as bytes: ``influence``, ``blocks`` and ``layers``. Raises UsageError for another form than png, svg."""
        from . import pictures
        from .blockpictures import block_figure

        if form not in FORMS:
            raise UsageError(f"pictures are {' or '.join(FORMS)}, got {form!r}")
        drawn = {
            "influence": pictures.influence(self.groups, self.name),
            "blocks": block_figure(self.groups, self.maps, self.name),
            "layers": pictures.layer_costs(self.layers, self.full, f"{self.name}: FLOPs of one forward, per layer"),
        }
        return {name: pictures.image(figure, form) for name, figure in drawn.items()}

    def save(self, directory: str | Path, form: str = "png") -> list[Path]:
        """Write ``<name>_influence``, ``_blocks`` and ``_layers`` into `directory` (made if missing); returns the files.

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


def show(
    plan: Plan,
    query: str | Sequence[int] | None = None,
    *,
    layer: int | None = None,
    block: str | Sequence[int] | None = None,
) -> Shown:
    """Views, block maps, coverage and costs of a plan. `query` is ``"t,y,x"`` or three numbers; None is a token near the
    middle. `layer`: look at this one only (coverage stays the whole model's). `block`: ``"t,h,w"`` or three numbers of
    tokens; None: such that a map has 64 blocks at most.

    Raises UsageError for a query, a layer or a block that the plan does not have, and UltrazooError, which names the
    attention, where one fails to answer.
    """
    resolved, grid = plan.resolved, plan.grid
    token = influence.default_query(grid) if query is None else influence.parse_query(_joined(query), grid)
    size = None if block is None else parse_block(_joined(block), grid)
    depth = len(resolved.sites)
    if layer is not None and not 0 <= layer < depth:
        raise UsageError(f"layer {layer} does not exist: {plan.name} has layers 0-{depth - 1}")
    looked_at = slice(None) if layer is None else slice(layer, layer + 1)
    sites, attention = resolved.sites[looked_at], resolved.attention[looked_at]
    groups = influence.grouped(sites, attention, token, resolved.written[looked_at])
    first = {site.layer: (spec, site) for site, spec in zip(sites, attention, strict=True)}
    # more groups share what two may ask for
    answers = ANSWERS // max(1, len(groups) // 2)
    maps = tuple(block_maps(*first[group.layers[0]], size, answers) for group in groups)
    return Shown(
        plan.name,
        tuple(groups),
        tuple(plan.layers[looked_at]),
        full_flops(resolved.sites[0]) if resolved.sites else 0,
        maps,
        coverage(resolved.sites, resolved.attention, resolved.written),
    )


def _joined(numbers: str | Sequence[int]) -> str:
    return numbers if isinstance(numbers, str) else ",".join(map(str, numbers))


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
