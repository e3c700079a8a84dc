"""The host side of self-attention with separate projections: q, k, v, o, with or without q/k norms and rotary embedding."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..attention.contract import Positions
from ..ops.rope import normed_rotated, rotate
from ..spec import Site
from .layers import RMSNorm


class ProjectedHost(nn.Module):
    """Implements `attention.contract.Host` with linears q, k, v: dim → heads*D and o: heads*D → dim.

    With `site.qk_norm` the norms span all heads (norm, then split, then rotate, as in Wan).
    """

    projection_names: ClassVar[dict[str, str]] = {
        f"{which}.{part}": f"{which}.{part}" for which in "qkvo" for part in ("weight", "bias")
    }

    def __init__(self, site: Site, eps: float = 1e-6):
        super().__init__()
        self.head_dim = site.head_dim
        self.rope = site.rope
        self.q = nn.Linear(site.dim, site.inner)
        self.k = nn.Linear(site.dim, site.inner)
        self.v = nn.Linear(site.dim, site.inner)
        self.o = nn.Linear(site.inner, site.dim)
        self.norm_q = RMSNorm(site.inner, eps=eps) if site.qk_norm else None
        self.norm_k = RMSNorm(site.inner, eps=eps) if site.qk_norm else None

    def project(self, x: Tensor, which: str) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if which == "qkv":
            return self.q(x), self.k(x), self.v(x)
        return getattr(self, which)(x)  # type: ignore[no-any-return]

    def heads(
        self,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        positions: Positions | None,
        key_positions: Positions | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return (
            self._head_split(q, self.norm_q, positions),
            self._head_split(k, self.norm_k, key_positions or positions),
            self._head_split(v, None, None),
        )

    def _head_split(self, z: Tensor | None, norm: nn.Module | None, positions: Positions | None) -> Tensor | None:
        if z is None:
            return None
        if positions is not None and self.rope is not None:
            return normed_rotated(z, norm, self.head_dim, positions, self.rope)
        z = z if norm is None else norm(z)
        return z.unflatten(-1, (-1, self.head_dim))

    def rotate(self, z: Tensor, positions: Positions) -> Tensor:
        return z if self.rope is None else rotate(z, positions, self.rope)

    def out(self, y: Tensor) -> Tensor:
        return self.o(y)  # type: ignore[no-any-return]
