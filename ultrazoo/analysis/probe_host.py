"""A host that gives back what was captured: an attention runs through it as it would in the model.

Projections of the block's own input are placeholders: put into `heads` at the grid's positions they come out as the captured
q, k and v; without or with other positions as those, turned back or elsewhere. What can only be had from the block's input or
its projections raises `CannotReplay`, unless the capture holds them: nothing is made up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.contract import Positions, grid_positions
from ..backbones.adapter import Frame
from ..errors import UltrazooError
from ..ops import rope as rotary
from ..ops.norm import rms_norm
from ..spec import Rope, Site

NORMS = ("none", "rms of all heads", "rms of a head", "layer of a head")
NEEDS_INPUT = "which the capture does not hold; capture with --inputs"


class CannotReplay(UltrazooError):
    """A design asks for something that a capture does not hold; the message says what."""


_FACTS = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "device", "dtype", "ndim", "requires_grad", "is_meta")),
        *(getattr(Tensor, name).__get__ for name in ("layout", "is_cuda")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size, Tensor.__len__),
        Tensor.is_complex,
    }
)
"""What may be asked of a placeholder: facts, no numbers."""

_NEW = frozenset({"new_empty", "new_zeros", "new_ones", "new_full"})
"""Names of what makes a tensor of the same kind."""

_VIEWS = frozenset(
    {Tensor.unflatten, Tensor.flatten, Tensor.view, Tensor.reshape, Tensor.view_as, Tensor.transpose, Tensor.permute}
    | {Tensor.unsqueeze, Tensor.detach, Tensor.contiguous}
)
"""What gives another placeholder: the same numbers in another shape."""


class Held(Tensor):
    """A placeholder with shape, dtype and device. `numbers` gives the real tensor, or raises CannotReplay."""

    numbers: Any
    which: str
    rows: slice | None

    @staticmethod
    def like(shape: Sequence[int], z: Tensor, which: str, numbers: Any, rows: slice | None = None) -> Held:
        made = torch.zeros(1, dtype=z.dtype, device=z.device).expand(*shape).as_subclass(Held)
        made.which, made.numbers, made.rows = which, numbers, rows
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FACTS or getattr(func, "__name__", "") in _NEW:
                return func(*args, **(kwargs or {}))
            if func in _VIEWS:
                shape, more = func(*args, **(kwargs or {})).shape, kwargs or {}
                return Held.like(shape, args[0], "view", lambda: func(*_real(args), **_real(dict(more))))
            if func is Tensor.__getitem__ and (rows := _rows(*args)) is not None:
                shape = func(*args).shape
                return Held.like(shape, args[0], args[0].which, lambda: args[0].numbers()[:, rows], rows)
            return func(*_real(args), **_real(dict(kwargs or {})))


def _rows(z: Any, index: Any) -> slice | None:
    """The tokens that ``z[:, a:b]`` takes of a placeholder that is whole; None for any other index."""
    if not isinstance(z, Held) or z.rows is not None or z.dim() != 3 or not isinstance(index, tuple) or len(index) != 2:
        return None
    whole, rows = index
    return rows if whole == slice(None) and isinstance(rows, slice) else None


def _real(value: Any) -> Any:
    if isinstance(value, Held):
        return value.numbers()
    if isinstance(value, (list, tuple)):
        return type(value)(_real(one) for one in value)
    if isinstance(value, dict):
        return {key: _real(one) for key, one in value.items()}
    return value


class _Projection(nn.Module):
    """A linear whose numbers are buffers: whoever gives parameters their start leaves them alone."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class ReplayHost(nn.Module):
    """`attention.contract.Host` over captured q, k, v (B, N, heads, D).

    `x` (B, N, C) is the block's input, None where it is not there; `weights` and `notes` the layer's projections and norms.
    `turns`: whether `site.rope` and `coordinates` say how q and k were rotated. After a forward `heads_out` holds what went
    into the output projection, (B, N, heads * D). `learn` is told of q and k (B, N, heads, D) at other positions.
    """

    shares_projections = True

    def __init__(
        self,
        site: Site,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor | None = None,
        weights: tuple[Mapping[str, Tensor], Mapping[str, str]] | None = None,
        turns: bool = False,
        coordinates: Sequence[Sequence[float]] | None = None,
    ):
        super().__init__()
        self.site, self.turns = site, turns
        self.captured = {"q": q, "k": k, "v": v}
        self.places = None
        if coordinates is not None:
            self.places = tuple(torch.tensor(axis, dtype=torch.float64) for axis in coordinates)
        self.weights, self.notes = ({}, {}) if weights is None else (dict(weights[0]), dict(weights[1]))
        for which in "qkv":
            if f"{which}.weight" in self.weights:
                setattr(
                    self, which, _Projection(self.weights[f"{which}.weight"].to(q), self.weights[f"{which}.bias"].to(q))
                )
        batch, tokens = q.shape[:2]
        self._input = x
        self.x = x if x is not None else Held.like((batch, tokens, site.dim), q, "x", self._no_input)
        width = q.shape[2] * q.shape[3]
        self.raw = {
            which: Held.like((batch, tokens, width), q, which, lambda which=which: self._projected(which))
            for which in "qkv"
        }
        self._made: dict[str, Tensor] = {}
        self.heads_out: Tensor | None = None
        self.result: Tensor | None = None
        self.learn: Callable[[str, Tensor], None] | None = None
        self._plain: dict[str, Tensor] = {}

    def _no_input(self) -> Tensor:
        raise CannotReplay(f"it reads the block's input, {NEEDS_INPUT}")

    def _projected(self, which: str) -> Tensor:
        """The raw projection of the block's input, made when somebody looks at its numbers."""
        if self._input is None or not self.weights:
            raise CannotReplay(
                f"it changes {which} before norm and rotation (its own projection or a LoRA), which takes the block's input and "
                f"projections, {NEEDS_INPUT}"
            )
        if which not in self._made:
            self._made[which] = getattr(self, which)(self._input)
        return self._made[which]

    # the host of the contract

    def project(self, x: Tensor, which: str) -> Any:
        if x is self.x:
            return tuple(self.raw[one] for one in "qkv") if which == "qkv" else self.raw[which]
        if not self.weights:
            raise CannotReplay(f"it projects other tokens than the block's own (compression), {NEEDS_INPUT}")
        made = tuple(getattr(self, one)(x) for one in (which if which == "qkv" else (which,)))
        return made if which == "qkv" else made[0]

    def heads(
        self,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        positions: Positions | None,
        key_positions: Positions | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return (
            self._head(q, "q", positions),
            self._head(k, "k", key_positions or positions),
            self._head(v, "v", None),
        )

    def _head(self, z: Tensor | None, role: str, at: Positions | None) -> Tensor | None:
        if z is None:
            return None
        if isinstance(z, Held) and z.which == role:
            held = self.captured[role]
            if role == "v" or self.site.rope is None or (z.rows is None and self._is_grid(at)):
                return held if z.rows is None else held[:, z.rows]
            plain = self._unturned(held)
            if z.rows is not None:
                return plain[:, z.rows] if at is None else self._turned(plain[:, z.rows], at)
            if at is None:
                self._plain[role] = plain
                return plain
            return self._learned(role, self._turned(plain, at))
        if not self.weights:
            raise CannotReplay(f"it norms and rotates something that is not the captured {role}, {NEEDS_INPUT}")
        z = z.numbers() if isinstance(z, Held) else z
        gain, bias = self.weights.get(f"norm_{role}"), self.weights.get(f"norm_{role}.bias")
        kind, eps = self.notes.get(f"norm_{role}", "none"), float(self.notes.get(f"eps_{role}", "1e-6"))
        split = normed(z, kind, gain, bias, eps, self.site.head_dim)
        return split if role == "v" or at is None or self.site.rope is None else self._turned(split, at)

    def _is_grid(self, at: Positions | None) -> bool:
        if at is None or at.rule != "none":
            return False
        due = grid_positions(self.site.grid)
        pairs = zip(due[:3], at[:3], strict=True)
        return all(a.shape == b.shape and torch.equal(a.double(), b.double().cpu()) for a, b in pairs)

    def _turned(self, z: Tensor, at: Positions) -> Tensor:
        return turned(z, at, self._rope(), self.places)

    def _unturned(self, z: Tensor) -> Tensor:
        """q or k at the grid's positions as they were before their rotation."""
        at = _physical(grid_positions(self.site.grid, z.device), self.places)
        return rotary.rotate(z, at._replace(t=-at.t, h=-at.h, w=-at.w), self._rope())

    def _rope(self) -> Rope:
        if not self.turns:
            raise CannotReplay(
                "it rotates queries or keys to other positions, and this model turns them in a way that a capture does not hold"
            )
        assert self.site.rope is not None
        return self.site.rope

    def _learned(self, role: str, z: Tensor) -> Tensor:
        if self.learn is not None:
            self.learn(role, z)
        return z

    def rotate(self, z: Tensor, positions: Positions) -> Tensor:
        if self.site.rope is None:
            return z
        made = self._turned(z, positions)
        role = next((one for one, plain in self._plain.items() if plain is z), None)
        return made if role is None else self._learned(role, made)

    def out(self, y: Tensor) -> Tensor:
        self.heads_out = y
        # a view, so that what comes back can be told from what a design makes of it
        self.result = y.view_as(y)
        return self.result


def turned(z: Tensor, at: Positions, rope: Rope, coordinates: Any) -> Tensor:
    """Rotate (B, N, heads, D) by what a capture says of a model: axes and base, and what index 0, 1, … are called."""
    return rotary.rotate(z, _physical(at, coordinates), rope)


def _physical(at: Positions, coordinates: Any) -> Positions:
    return at if coordinates is None else Frame((1, 1, 1), coordinates=tuple(coordinates)).physical(at)


def normed(z: Tensor, kind: str, gain: Tensor | None, bias: Tensor | None, eps: float, head_dim: int) -> Tensor:
    """Norm of raw (B, n, width) by one of `NORMS`, split into heads (B, n, heads, D)."""
    split = z.unflatten(-1, (-1, head_dim))
    if kind == "none":
        return split
    fits = gain is None or gain.numel() == (z.shape[-1] if kind == "rms of all heads" else head_dim)
    if not fits:
        # another kind's gain: not this one
        return torch.full_like(split, float("nan"))
    if kind == "rms of all heads":
        one = torch.ones(z.shape[-1], dtype=z.dtype, device=z.device) if gain is None else gain.to(z)
        return rms_norm(z, one, eps).unflatten(-1, (-1, head_dim))
    if kind == "rms of a head":
        one = torch.ones(head_dim, dtype=z.dtype, device=z.device) if gain is None else gain.to(z)
        return rms_norm(split, one, eps)
    weight = None if gain is None else gain.to(z)
    return F.layer_norm(split, (head_dim,), weight, None if bias is None else bias.to(z), eps)
