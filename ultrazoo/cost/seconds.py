"""Predicted seconds on named GPUs, with every assumed efficiency beside the figure.

``seconds = visited attention FLOPs / (peak * attention efficiency) + other FLOPs / (peak * matmul efficiency)
+ bytes moved / (bandwidth * bandwidth efficiency)``, nothing overlapped. The bytes moved are a lower bound of what eager
element-wise kernels move: every weight read once, and every tensor that autograd would keep written once and read once.
One GPU, batch 1, the transformer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..spec import BackboneCost, Cost
from .gpus import BANDWIDTH_EFFICIENCY, GPUS
from .memory import ELEMENT_BYTES


@dataclass(frozen=True)
class Work:
    """What one forward asks of a GPU: attention FLOPs as kernels visit them, all other FLOPs, bytes moved."""

    attention_flops: int
    linear_flops: int
    moved_bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(
            self.attention_flops + other.attention_flops,
            self.linear_flops + other.linear_flops,
            self.moved_bytes + other.moved_bytes,
        )

    def times(self, count: int) -> Work:
        return Work(self.attention_flops * count, self.linear_flops * count, self.moved_bytes * count)


@dataclass(frozen=True)
class Seconds:
    """Predicted time on one GPU: one forward (and its three parts) and a whole clip, None when no sampling is given."""

    gpu: str
    forward: float
    clip: float | None
    attention: float
    linear: float
    memory: float
    attention_efficiency: float
    matmul_efficiency: float
    bandwidth_efficiency: float

    @property
    def assumed(self) -> str:
        """The efficiencies, for a line of text: ``attention 58 %, matmul 72 %, bandwidth 80 % of peak``."""
        return (
            f"attention {self.attention_efficiency:.0%}, matmul {self.matmul_efficiency:.0%}, "
            f"bandwidth {self.bandwidth_efficiency:.0%} of peak"
        ).replace("%", " %")

    def data(self) -> dict[str, object]:
        return {
            "gpu": self.gpu,
            "forward": self.forward,
            "clip": self.clip,
            "attention": self.attention,
            "linear": self.linear,
            "memory": self.memory,
            "attention_efficiency": self.attention_efficiency,
            "matmul_efficiency": self.matmul_efficiency,
            "bandwidth_efficiency": self.bandwidth_efficiency,
        }


def visited_flops(cost: Cost) -> int:
    """Attention FLOPs that kernels spend: those of the pairs, and of what they compute and mask or pad."""
    return cost.attention_flops * cost.visited // cost.pairs if cost.pairs else cost.attention_flops


def work(backbone: BackboneCost, costs: Sequence[Cost], parameters: int, dtype: str) -> Work:
    """One forward's work; `costs[i]` is the attention that layer i runs."""
    linear = backbone.outside_flops + sum(backbone.layer_flops)
    linear += sum(cost.all_projection_flops + cost.other_flops for cost in costs)
    saved = sum(backbone.layer_saved_elements) + sum(cost.saved_elements for cost in costs)
    return Work(
        attention_flops=sum(visited_flops(cost) for cost in costs),
        linear_flops=linear,
        moved_bytes=ELEMENT_BYTES[dtype] * (parameters + 2 * saved),
    )


def predict(forward: Work, clip: Work | None, dtype: str) -> tuple[Seconds, ...]:
    """Seconds on every GPU of the table; no rate is known for float64, which gives an empty tuple."""
    if dtype == "float64":
        return ()
    rows = []
    for one in GPUS:
        attention_rate, matmul_rate, bandwidth, attention, matmul = one.rates(dtype)
        parts = (
            forward.attention_flops / attention_rate,
            forward.linear_flops / matmul_rate,
            forward.moved_bytes / bandwidth,
        )
        total = None
        if clip is not None:
            total = (
                clip.attention_flops / attention_rate + clip.linear_flops / matmul_rate + clip.moved_bytes / bandwidth
            )
        rows.append(Seconds(one.name, sum(parts), total, *parts, attention, matmul, BANDWIDTH_EFFICIENCY))
    return tuple(rows)
