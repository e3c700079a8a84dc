"""Named GPUs: memory, peak rates, bandwidth, and the share of them that attention and matmuls reach.

Peaks are dense (no structured sparsity) with fp32 accumulation. `gib` is what nvidia-smi reports as total, rounded down:
what a process can see, not the figure on the box. Every efficiency says where it comes from; ``assumed`` means that no
measurement was at hand. `docs/cost-model.md` holds the same table for reading.
"""

from __future__ import annotations

from dataclasses import dataclass

BANDWIDTH_EFFICIENCY = 0.8
"""Share of the memory bandwidth that element-wise kernels reach; assumed for every GPU."""

FP32_ATTENTION_EFFICIENCY = 0.5
FP32_MATMUL_EFFICIENCY = 0.8
"""In fp32 no flash kernel exists and tensor cores are off by default; assumed for every GPU."""

LAYER_SHAPES = 0.9
"""A model's own matmul shapes reach about this share of the best shape measured; assumed."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. `tflops` and `tflops_fp32` are dense peaks (bf16/fp16 and fp32), `gb_per_s` the peak bandwidth.

    `attention` and `matmul` are the shares of the bf16 peak assumed for attention and for matmuls and convolutions.
    """

    name: str
    gib: float
    tflops: float
    tflops_fp32: float
    gb_per_s: float
    attention: float
    matmul: float
    attention_source: str
    matmul_source: str

    def rates(self, dtype: str) -> tuple[float, float, float, float, float]:
        """FLOP/s of attention and matmul, bytes/s, and the two efficiencies assumed, for weights of `dtype`."""
        if dtype == "float32":
            attention, matmul, peak = FP32_ATTENTION_EFFICIENCY, FP32_MATMUL_EFFICIENCY, self.tflops_fp32
        else:
            attention, matmul, peak = self.attention, self.matmul, self.tflops
        bandwidth = self.gb_per_s * 1e9 * BANDWIDTH_EFFICIENCY
        return peak * 1e12 * attention, peak * 1e12 * matmul, bandwidth, attention, matmul


_BEST = f"best matmul shape measured x {LAYER_SHAPES}"

GPUS: tuple[Gpu, ...] = (
    Gpu("RTX 4090", 23.9, 165.2, 82.6, 1008, 0.90, 0.88,
        "FlashAttention-2 at about 165 TFLOP/s (SageAttention, arXiv:2410.02367), rounded down",
        f"162 TFLOP/s, {_BEST}"),
    Gpu("RTX 5090", 31.8, 209.5, 104.8, 1792, 0.90, 0.90,
        "FlashAttention-2 = SageAttention2's 560 TOPS / 2.7, about 207 TFLOP/s, rounded down",
        f"236 TFLOP/s above the boost-clock peak, taken as the peak, {_BEST}"),
    Gpu("A100 40GB", 40.0, 312.0, 19.5, 1555, 0.65, 0.71,
        "FlashAttention-2, 50-73 % of peak (arXiv:2307.08691)", f"246 TFLOP/s, {_BEST}"),
    Gpu("L40S", 44.9, 362.0, 91.6, 864, 0.50, 0.65, "assumed", "assumed"),
    Gpu("H100 80GB", 79.6, 989.0, 67.0, 3350, 0.58, 0.72,
        "cuDNN, 115 200 tokens x 24 heads x 128 in 283.3 ms = 576 TFLOP/s (NATTEN docs)", f"790 TFLOP/s, {_BEST}"),
    Gpu("A100 80GB", 80.0, 312.0, 19.5, 2039, 0.65, 0.76,
        "FlashAttention-2, 50-73 % of peak (arXiv:2307.08691)", f"264.5 TFLOP/s, {_BEST}"),
    Gpu("H100 NVL", 93.5, 835.0, 60.0, 3900, 0.58, 0.72, "as H100 80GB, assumed", "as H100 80GB, assumed"),
    Gpu("H20 96GB", 95.5, 148.0, 44.0, 4000, 0.75, 0.86,
        "T3-Video's dense Wan-1.3B at 4K: 44 157 TMAC x 50 in 39 662 s = 111 TFLOP/s (arXiv:2512.13492)",
        f"141.9 TFLOP/s, {_BEST}"),
    Gpu("RTX PRO 6000", 95.5, 503.8, 126.0, 1792, 0.55, 0.70, "assumed", "assumed"),
    Gpu("H20 141GB", 140.4, 148.0, 44.0, 4800, 0.75, 0.86, "as H20 96GB, assumed", "as H20 96GB, assumed"),
    Gpu("H200", 140.4, 989.0, 67.0, 4800, 0.58, 0.72, "as H100 80GB (same die)", "as H100 80GB (same die)"),
    Gpu("B200", 179.0, 2250.0, 80.0, 7700, 0.54, 0.68,
        "cuDNN, 115 200 tokens x 24 heads x 128 in 135.3 ms = 1206 TFLOP/s (NATTEN docs)", f"1696 TFLOP/s, {_BEST}"),
    Gpu("MI300X", 191.9, 1307.4, 163.4, 5300, 0.35, 0.46, "assumed", f"668 TFLOP/s, {_BEST}"),
)  # fmt: skip
"""Ordered by memory."""


def gpu(name: str) -> Gpu:
    """The GPU called `name` (case ignored); raises UsageError with the near name."""
    from ..errors import UsageError, listed, near

    names = {one.name.casefold(): one for one in GPUS}
    found = names.get(name.casefold())
    if found is None:
        known = [one.name for one in GPUS]
        hint = near(name, known)
        raise UsageError(f"unknown GPU {name!r}" + (f"; {hint}" if hint else "") + f"; known: {listed(known)}")
    return found
