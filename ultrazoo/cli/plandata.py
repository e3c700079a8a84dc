"""One plan as data: what ``plan.json`` holds, and what the text of `plan` says beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..analysis.coverage import Coverage
    from ..cost import LayerPlan
    from ..recipe import Plan


def data(plan: Plan, coverage: Coverage | None = None) -> dict[str, Any]:
    """For ``--json``. `visited_share` is of full attention's pairs, `peak_bytes` those of the layer that needs most."""
    from ..analysis.comparison import peak_bytes, visited_share

    found = plan.to_json()
    found["layers"] = [{**layer.data(), **_beside(layer)} for layer in plan.layers]
    found["totals"] |= {
        "flops": plan.totals.flops,
        "visited_share": visited_share(plan),
        "peak_bytes": peak_bytes(plan),
    }
    found["seconds"] = [one.data() for one in plan.seconds]
    return found if coverage is None else {**found, "coverage": coverage.data()}


def _beside(layer: LayerPlan) -> dict[str, Any]:
    """What a row of the text has and ``plan.json`` has not; pairs are fewest and most where the data decide, else None."""
    return {
        "written": layer.written,
        "start": layer.start,
        "peak_bytes": layer.peak_bytes,
        "pairs_min": layer.pairs_min,
        "pairs_max": layer.pairs_max,
        "visited_pairs": layer.visited,
        "full_pairs": layer.full_pairs,
        "visited_share": layer.visited_share,
    }
