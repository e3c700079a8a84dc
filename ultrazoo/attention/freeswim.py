"""FreeSwim (arXiv 2511.14712): windows of the training extent that slide inwards at borders, all frames, scaled scores.

A named composition of `neighborhood`: ``kernel_size = (full, 2 dh + 1, 2 dw + 1)`` with (dh, dw) half the training grid, so that
every query sees what the model saw in training, and scores times ``sqrt(log_n(2 n) / D)`` with n the tokens of a training frame
(the published code keeps 30 x 52 for models trained at other sizes; here n follows `trained`). An axis shorter than the window
is seen whole, as in training.

This is the window path of the source. Its second path, full attention on refresh steps whose cross-attention output replaces the
window path's, belongs to a pipeline and is not here; a recipe's `steps` can give some steps full attention. Training-free, as a
second pass over an upsampled base video (strength 0.7, flow shift 9).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..errors import Problem
from ..grid import Grid
from ..spec import AttentionSpec, Rope, Site, Start, Traits, option
from .neighborhood import NeighborhoodSpec


@dataclass(frozen=True, kw_only=True)
class FreeswimSpec(AttentionSpec):
    """A sliding window of the size the model was trained at, in every frame."""

    name: ClassVar[str] = "freeswim"
    source: ClassVar[str] = "FreeSwim, arXiv 2511.14712; code 9f35a72"
    formula: ClassVar[str] = (
        "y_i = W_o softmax over |dy| <= h/2, |dx| <= w/2 of (q_i k_j sqrt(log_n(2n) / D)) v_j, n = h w"
    )

    trained: tuple[int, int] = option((30, 52), "rows and columns of tokens that the model was trained at", ge=2)
    scaled: bool = option(True, "scale scores by sqrt(log_n(2n)); false: as the host does")
    kernel: str = option("auto", "a registered kernel, or auto")

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns that a query sees: itself and half the training grid on either side."""
        return 2 * (self.trained[0] // 2) + 1, 2 * (self.trained[1] // 2) + 1

    def problems(self, site: Site) -> list[Problem]:
        return self.expand(site).problems(site)

    def expand(self, site: Site) -> AttentionSpec:
        tokens = self.trained[0] * self.trained[1]
        scale = math.sqrt(math.log(2 * tokens, tokens) / site.head_dim) if self.scaled else None
        return NeighborhoodSpec(kernel_size=("full", *self.window), short="whole", scale=scale, kernel=self.kernel)

    def traits(self) -> Traits:
        inner = NeighborhoodSpec(kernel_size=3).traits()
        start = Start("training-free", "arXiv 2511.14712: second pass over an upsampled base video")
        return Traits(start=start, export=inner.export, min_grid=inner.min_grid, notes=inner.notes)

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        return [
            (cls(trained=(2, 5)), site),
            (cls(trained=(3, 2), scaled=False), site.at(grid=Grid(1, 4, 5), has_timestep=False)),
            (cls(trained=(4, 3)), site.at(grid=Grid(2, 4, 5), rope=None)),
        ]
