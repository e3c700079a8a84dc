"""Bytes: weights, activations and training state, and which GPU holds them.

Units are bytes for batch 1. The formulas, with e the bytes of one element of the recipe's dtype:

- weights: ``parameters * e``
- inference: ``e * (stream + max_i max(peak_attention_i, peak_rest_i))``: layers run one after another.
- training: ``e * (stream + sum_i saved_i)``: everything autograd keeps. The gradients on their way back need less than
  what has been freed behind them. Never below inference.
- training, every layer checkpointed: ``e * (stream + sum_i tokens_i * dim + max_i saved_i)``: one input per layer is kept
  and one layer is recomputed at a time. Never below inference.
- training state: `STATE_BYTES` per parameter (weights, gradients, AdamW), every parameter trained.

On a GPU, `RESERVED_GIB` goes to the CUDA context and library workspaces and `FRAGMENTATION` of the need to the
allocator's gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..spec import BackboneCost, Cost, Site
from .gpus import GPUS

ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

STATE_BYTES = {
    # weights + gradients + AdamW's two moments; below fp32 also an fp32 master copy, moments in fp32
    "float64": 8 + 8 + 16,
    "float32": 4 + 4 + 8,
    "bfloat16": 2 + 2 + 4 + 8,
    "float16": 2 + 2 + 4 + 8,
}
OPTIMISER = "AdamW, fp32 master weights and moments, every parameter trained"

RESERVED_GIB = 1.0
FRAGMENTATION = 0.05
GIB = 1024**3


@dataclass(frozen=True)
class ByMode:
    """One number of bytes for each way of running: inference, training, training with every layer checkpointed."""

    infer: int
    train: int
    train_checkpointed: int

    def data(self) -> dict[str, int]:
        return {"infer": self.infer, "train": self.train, "train_checkpointed": self.train_checkpointed}


@dataclass(frozen=True)
class Fit:
    """Whether batch 1 fits one GPU, for each way of running."""

    gpu: str
    gib: float
    infer: bool
    train: bool
    train_checkpointed: bool

    def data(self) -> dict[str, object]:
        return {
            "gpu": self.gpu,
            "gib": self.gib,
            "infer": self.infer,
            "train": self.train,
            "train_checkpointed": self.train_checkpointed,
        }


def activation_bytes(backbone: BackboneCost, sites: Sequence[Site], costs: Sequence[Cost], dtype: str) -> ByMode:
    """Bytes of activations for batch 1, by the formulas above; `costs[i]` is layer i's attention."""
    peaks = [max(rest, cost.peak_elements) for rest, cost in zip(backbone.layer_peak_elements, costs, strict=True)]
    saved = [rest + cost.saved_elements for rest, cost in zip(backbone.layer_saved_elements, costs, strict=True)]
    kept = sum((site.tokens + site.extra_tokens) * site.dim for site in sites)
    size, stream = ELEMENT_BYTES[dtype], backbone.stream_elements
    infer = stream + max(peaks, default=0)
    return ByMode(
        infer=size * infer,
        train=size * max(infer, stream + sum(saved)),
        train_checkpointed=size * max(infer, stream + kept + max(saved, default=0)),
    )


def memory_bytes(parameters: int, activations: ByMode, dtype: str) -> ByMode:
    """Weights (or training state) and activations together."""
    state = parameters * STATE_BYTES[dtype]
    return ByMode(
        infer=parameters * ELEMENT_BYTES[dtype] + activations.infer,
        train=state + activations.train,
        train_checkpointed=state + activations.train_checkpointed,
    )


def fits(need: ByMode) -> tuple[Fit, ...]:
    """Every GPU of the table against the bytes needed, reserve and fragmentation counted."""

    def holds(gib: float, size: int) -> bool:
        return size * (1 + FRAGMENTATION) <= (gib - RESERVED_GIB) * GIB

    return tuple(
        Fit(
            one.name,
            one.gib,
            holds(one.gib, need.infer),
            holds(one.gib, need.train),
            holds(one.gib, need.train_checkpointed),
        )
        for one in GPUS
    )
