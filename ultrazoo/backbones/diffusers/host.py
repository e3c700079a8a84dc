"""A live diffusers attention module as the host of our attentions, for one call.

Modules are called, never read: LoRA, quantised linears, offloading and fused projections keep working.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...attention.contract import Positions
from ...ops import rope as rotary
from ...spec import Site
from ..adapter import Frame


@dataclass(frozen=True)
class Names:
    """Attribute names of one set of projections. `fused`: the linear that `fuse_projections` adds."""

    q: str = "to_q"
    k: str = "to_k"
    v: str = "to_v"
    norm_q: str = "norm_q"
    norm_k: str = "norm_k"
    out: str = "to_out"
    fused: str = "to_qkv"


STOCK = Names()
ADDED = Names("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out", "to_added_qkv")


class ModuleHost:
    """`attention.contract.Host` over the attention module `attn`; `frame` says where its grid lies.

    `across`: the q/k norms span all heads of a token instead of each head alone.
    """

    def __init__(self, attn: nn.Module, frame: Frame, site: Site, names: Names = STOCK, *, across: bool = False):
        self.attn, self.frame, self.site, self.names, self.across = attn, frame, site, names, across

    def project(self, x: Tensor, which: str) -> Any:
        fused = getattr(self.attn, self.names.fused, None) if getattr(self.attn, "fused_projections", False) else None
        if fused is not None:
            # the stock path reads only the fused copy then: the others may be stale
            parts = fused(x).chunk(3, dim=-1)
            return parts if which == "qkv" else parts["qkv".index(which)]
        if which == "qkv":
            return tuple(getattr(self.attn, name)(x) for name in (self.names.q, self.names.k, self.names.v))
        return getattr(self.attn, getattr(self.names, which))(x)

    def heads(
        self,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        positions: Positions | None,
        key_positions: Positions | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        norms = self._norm(self.names.norm_q), self._norm(self.names.norm_k)
        return (
            self._headed(q, norms[0], positions),
            self._headed(k, norms[1], key_positions or positions),
            None if v is None else v.unflatten(-1, (-1, self.site.head_dim)),
        )

    def _headed(self, z: Tensor | None, norm: Callable[[Tensor], Tensor] | None, at: Positions | None) -> Tensor | None:
        if z is None:
            return None
        if at is None or self.site.rope is None:
            z = z if norm is None else norm(z)
            return z.unflatten(-1, (-1, self.site.head_dim))
        return self.turned(z, norm, self.frame.physical(at))

    def turned(self, z: Tensor, norm: Callable[[Tensor], Tensor] | None, at: Positions) -> Tensor:
        """Norm, split and rotate raw (B, n, width) at physical positions → (B, n, heads, D)."""
        assert self.site.rope is not None
        return rotary.normed_rotated(z, norm, self.site.head_dim, at, self.site.rope)

    def _norm(self, name: str) -> Callable[[Tensor], Tensor] | None:
        norm = getattr(self.attn, name, None)
        if norm is None or self.across:
            return norm
        head_dim = self.site.head_dim
        return lambda z: norm(z.unflatten(-1, (-1, head_dim))).flatten(-2)

    def rotate(self, z: Tensor, positions: Positions) -> Tensor:
        if self.site.rope is None:
            return z
        return rotary.rotate(z, self.frame.physical(positions), self.site.rope)

    def out(self, y: Tensor) -> Tensor:
        found = getattr(self.attn, self.names.out, None)
        if found is None:
            # the output projection is the block's own
            return y
        for layer in found if isinstance(found, nn.ModuleList) else [found]:
            y = layer(y)
        return y

    def rows(self, x: Tensor, turn: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, n, heads, D) of rows x (B, n, C) beside the grid, q and k turned by `turn` where given."""
        q, k, v = self.heads(*self.project(x, "qkv"), None)
        assert q is not None and k is not None and v is not None
        return (q, k, v) if turn is None else (turn(q), turn(k), v)
