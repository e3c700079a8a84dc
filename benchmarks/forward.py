"""Build a Wan recipe in bf16 on the CPU, run one forward at a grid of your choice, and print one line of JSON.

python benchmarks/forward.py recipes/ultragen_1080p.yaml 3 34 60
"""

from __future__ import annotations

import json
import sys
import time

import torch

import ultrazoo


def main(recipe: str, grid: tuple[int, int, int]) -> dict[str, object]:
    """Facts of the run; the model runs at `grid` whatever size its recipe names."""
    model = ultrazoo.build(recipe, "dtype=bfloat16").eval()
    torch.manual_seed(0)
    # a fresh model is quiet: without this every block would add next to nothing
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.2)
    t, h, w = grid
    spec = model.spec
    latents = torch.randn(1, spec.channels, t, 2 * h, 2 * w, dtype=torch.bfloat16)
    text = torch.randn(1, 16, spec.text_dim, dtype=torch.bfloat16)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model(latents, torch.tensor([500.0]), text)
    return {
        "forward_s": time.perf_counter() - start,
        "finite": bool(torch.isfinite(out).all()) and out.shape == latents.shape,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "planned": model.plan.totals.parameters,
        "hash": model.plan.hash,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], tuple(int(word) for word in sys.argv[2:5]))))
