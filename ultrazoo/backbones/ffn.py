"""The feed-forward of a layer: an MLP on every token, or SANA's gated convolution over neighbouring tokens.

GLUMBConv (SANA, arXiv 2410.10629, section 2.2; over frames as well in SANA-Video, arXiv 2509.24695): a 1x1 convolution to
twice ``ratio * C`` channels and SiLU, a depthwise 3x3 over (H, W), one half of the channels times SiLU of the other, a 1x1
back to C without bias; with `temporal` then ``y + conv(y)`` of 3 taps over frames without bias. It gives the locality that
linear attention lacks. Borders are padded with zeros, frames too. SANA-Video's block-causal form, in which a chunk's last
frame does not look ahead, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import Problem
from ..ops.init import Constant, marked
from ..spec import Options, option
from .layers import in_chunks


@dataclass(frozen=True, kw_only=True)
class FfnSpec(Options):
    """A row of the table `FFN`: sizes for `dim` channels, `hidden` those that the backbone gives an MLP."""

    def problems_at(self, dim: int, chunk: int | None) -> list[Problem]:
        """What is wrong at `dim` channels with so many tokens at a time, paths relative to the backbone."""
        return []

    def parameters(self, dim: int, hidden: int) -> int:
        raise TypeError(f"{type(self).__name__} does not say how large it is")

    def flops(self, dim: int, hidden: int, tokens: int) -> int:
        raise TypeError(f"{type(self).__name__} does not say what it costs")

    def peak_elements(self, dim: int, hidden: int, tokens: int, chunk: int | None) -> int:
        """Most elements alive at once inside, beside the input, without gradients."""
        raise TypeError(f"{type(self).__name__} does not say what it needs")

    def saved_elements(self, dim: int, hidden: int, tokens: int) -> int:
        """What autograd keeps, beside the input and the result."""
        raise TypeError(f"{type(self).__name__} does not say what it keeps")

    def build(self, dim: int, hidden: int) -> nn.Module:
        """The module, for `feed_forward`."""
        raise TypeError(f"{type(self).__name__} has no module")


@dataclass(frozen=True, kw_only=True)
class MlpSpec(FfnSpec):
    """Linear, GELU, linear; its hidden channels are the backbone's."""

    name: ClassVar[str] = "mlp"

    def parameters(self, dim: int, hidden: int) -> int:
        return 2 * dim * hidden + hidden + dim

    def flops(self, dim: int, hidden: int, tokens: int) -> int:
        return 4 * tokens * dim * hidden

    def peak_elements(self, dim: int, hidden: int, tokens: int, chunk: int | None) -> int:
        if chunk is None or chunk >= tokens:
            # pre-activation and activation
            return 2 * tokens * hidden
        # the output, and the same for one chunk
        return tokens * dim + chunk * (2 * hidden + dim)

    def saved_elements(self, dim: int, hidden: int, tokens: int) -> int:
        return 2 * tokens * hidden

    def build(self, dim: int, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))


@dataclass(frozen=True, kw_only=True)
class GluMbConvSpec(FfnSpec):
    """Gated depthwise convolution over the token grid (SANA); `temporal` adds 3 taps over frames (SANA-Video)."""

    name: ClassVar[str] = "glumbconv"

    ratio: float = option(2.5, "hidden channels over dim, before the gate twice as many; SANA-Video: 3", gt=0)
    temporal: bool = option(False, "a convolution over frames after it, which starts at zero")

    def hidden(self, dim: int) -> int:
        return int(self.ratio * dim)

    def problems_at(self, dim: int, chunk: int | None) -> list[Problem]:
        found = []
        if self.hidden(dim) < 1:
            found.append(
                Problem(
                    "ffn.ratio", f"{self.ratio} of {dim} channels is less than one", f"use ≥ {-(-1000 // dim) / 1000}"
                )
            )
        if chunk is not None:
            rule = f"{chunk} tokens at a time, but glumbconv mixes a token with its neighbours on the grid"
            found.append(Problem("ffn_chunk", rule, "use null, or ffn: mlp"))
        return found

    def parameters(self, dim: int, hidden: int) -> int:
        inner = self.hidden(dim)
        spatial = (dim + 1) * 2 * inner + (9 + 1) * 2 * inner + inner * dim
        return spatial + 3 * dim * dim * self.temporal

    def flops(self, dim: int, hidden: int, tokens: int) -> int:
        inner = self.hidden(dim)
        return 2 * tokens * (3 * dim * inner + 9 * 2 * inner + 3 * dim * dim * self.temporal)

    def peak_elements(self, dim: int, hidden: int, tokens: int, chunk: int | None) -> int:
        # twice as many channels before the gate, in and out of the depthwise convolution
        return 4 * tokens * self.hidden(dim)

    def saved_elements(self, dim: int, hidden: int, tokens: int) -> int:
        # before and after SiLU and after the depthwise convolution, twice as many channels; the gate and the product
        return tokens * (8 * self.hidden(dim) + dim * self.temporal)

    def build(self, dim: int, hidden: int) -> nn.Module:
        return GluMbConv(dim, self.hidden(dim), self.temporal)


FFN: Mapping[str, type[FfnSpec]] = {"mlp": MlpSpec, "glumbconv": GluMbConvSpec}


class GluMbConv(nn.Module):
    """x (B, N, C) over grid (T, H, W) → (B, N, C). Weights start as torch starts them, those over frames at zero."""

    def __init__(self, dim: int, hidden: int, temporal: bool):
        super().__init__()
        self.expand = nn.Conv2d(dim, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.project = nn.Conv2d(hidden, dim, 1, bias=False)
        self.temporal: nn.Module | None = None
        if temporal:
            frames = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0), bias=False)
            self.temporal = marked(frames, weight=Constant(0.0))

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        batch, (frames, rows, columns) = x.shape[0], grid
        # channels stay last in memory: (B, N, C) → (B*T, C, H, W)
        z = x.reshape(batch * frames, rows, columns, -1).permute(0, 3, 1, 2)
        y, gate = self.depthwise(F.silu(self.expand(z))).chunk(2, dim=1)
        y = self.project(y * F.silu(gate)).permute(0, 2, 3, 1)  # (B*T, H, W, C)
        if self.temporal is not None:
            y = y.reshape(batch, frames, rows * columns, -1).permute(0, 3, 1, 2)  # (B, C, T, H*W)
            y = (y + self.temporal(y)).permute(0, 2, 3, 1)
        return y.reshape(x.shape)


def feed_forward(ffn: nn.Module, x: Tensor, grid: tuple[int, int, int], chunk: int | None) -> Tensor:
    """Run what `FfnSpec.build` made on x (B, N, C) over `grid`; an MLP `chunk` tokens at a time, None means all."""
    if isinstance(ffn, GluMbConv):
        return ffn(x, grid)  # type: ignore[no-any-return]
    return in_chunks(ffn, x, chunk)
