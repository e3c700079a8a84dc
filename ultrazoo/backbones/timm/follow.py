"""Where a forward of a timm model begins: its patches are embedded, whichever of its methods was called.

`forward`, `forward_features` and `forward_intermediates` all run the module ``patch_embed`` first, and the size of an
image is known nowhere else: a model with `dynamic_img_size` keeps the size that it was made for in its attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..forwards import Followed
from ..placed import Placed


class FollowedVit(Followed):
    """`Followed` by ``patch_embed``. It holds the model (which holds it), for the rotary embedding."""

    model: Any
    placed: Placed

    def attach(self, model: nn.Module, placed: Placed) -> Iterator[Any]:
        self.model, self.placed = model, placed
        embed: Any = model.patch_embed
        yield embed.register_forward_hook(self.embedded)
        yield model.register_forward_hook(self.leave, always_call=True)

    def embedded(self, embed: Any, args: Any, output: Tensor) -> None:
        """Patches (B, H, W, C) of a model for any size, (B, N, C) of one for one size, are there."""
        self.placed.require_ours(self.model)
        grid = output.shape[1:3] if output.ndim == 4 else embed.grid_size
        arguments = {"grid": tuple(grid), "rope": getattr(self.model, "rope", None), "device": output.device}
        self.begin(self.adapter.frame(self.config, arguments))
