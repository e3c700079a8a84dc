"""One layer with another attention at some denoising steps (a recipe's `steps`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import UsageError
from ..spec import AttentionSpec, Site, Start, Traits
from .contract import Attention, Call, Host


class Scheduled(Attention):
    """`base`, or the alternative whose range of steps holds `call.step`; ranges are (first, last), both included.

    Raises UsageError when the step is not known: missing step information never means sparse.
    """

    def __init__(self, base: AttentionSpec, alternatives: Sequence[tuple[int, int, AttentionSpec]], site: Site):
        super().__init__(base, site)
        self.base = base.build(site)
        self.ranges = tuple((first, last) for first, last, _ in alternatives)
        self.at = nn.ModuleList([spec.build(site) for _, _, spec in alternatives])

    @property
    def traits(self) -> Traits:
        """None of its own: the attention that a step chooses has them."""
        return Traits(start=Start("exact", "as the attention of the step"))

    def chosen(self, step: tuple[int, int] | None) -> Attention:
        """The attention that runs at `step` = (index, count)."""
        if step is None:
            raise UsageError(
                "this model's recipe has steps: call model.select(step, num_steps) before every denoising step"
            )
        for (first, last), module in zip(self.ranges, self.at, strict=True):
            if first <= step[0] <= last:
                return module  # type: ignore[return-value]
        return self.base  # type: ignore[no-any-return]

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        return self.chosen(call.step)(x, host, call)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return ", ".join(f"steps {first}-{last}" for first, last in self.ranges)
