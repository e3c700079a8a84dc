"""Train a toy Wan on moving shapes and capture it: how `ultrazoo/analysis/captures/shapes` was made.

    python -m benchmarks.shapes -o DIR

Discs and squares of two colours move over a dark ground; "latents" are the pixels of a small video. Flow matching: the model
learns the velocity ``noise - video`` at ``(1 - s) video + s noise``. Some minutes on one core; the numbers depend on the
machine's arithmetic, the design of the capture does not.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import ultrazoo

FRAMES, HEIGHT, WIDTH = 3, 20, 24
STEPS = 8
KINDS = 4
RECIPE = {
    "name": "shapes",
    "summary": "a toy Wan for videos of moving shapes",
    "video": {"grid": [FRAMES, HEIGHT // 2, WIDTH // 2]},
    "sampling": {"steps": STEPS},
    "backbone": {
        "name": "wan",
        "dim": 64,
        "layers": 4,
        "heads": 4,
        "ffn_dim": 128,
        "channels": 3,
        "text_dim": 16,
        "text_tokens": 2,
        "time_dim": 32,
        "strides": [1, 1, 1],
    },
    "attention": {"*": {"name": "full"}},
    "dtype": "float32",
}


def videos(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Videos (count, 3, F, H, W) in [-1, 1] and what they show: text (count, 2, 16), shape and colour."""
    kind = torch.randint(KINDS, (count,), generator=generator)
    start = torch.rand(count, 2, generator=generator) * torch.tensor([HEIGHT, WIDTH])
    speed = (torch.rand(count, 2, generator=generator) - 0.5) * 8
    size = 2.5 + 2.5 * torch.rand(count, 1, 1, 1, generator=generator)
    t = torch.arange(FRAMES).view(1, -1, 1, 1)
    y = torch.arange(HEIGHT).view(1, 1, -1, 1) + 0.5
    x = torch.arange(WIDTH).view(1, 1, 1, -1) + 0.5

    def along(places: Tensor, axis: int, length: int) -> Tensor:
        # what leaves on one side comes back on the other
        centre = (start[:, axis].view(-1, 1, 1, 1) + speed[:, axis].view(-1, 1, 1, 1) * t) % length
        away = (places - centre).abs()
        return torch.minimum(away, length - away)

    dy, dx = along(y, 0, HEIGHT), along(x, 1, WIDTH)
    square = (kind % 2 == 0).view(-1, 1, 1, 1)
    far = torch.where(square, torch.maximum(dy, dx), (dy * dy + dx * dx).sqrt())
    inside = (size - far).clamp(0, 1)
    colours = torch.tensor([[1.0, -0.6, -0.8], [-0.8, 0.4, 1.0]])[kind // 2].view(-1, 3, 1, 1, 1)
    ground = torch.tensor([-0.9, -0.8, -0.7]).view(1, 3, 1, 1, 1)
    words = torch.eye(16)
    text = torch.stack([words[kind % 2], words[2 + kind // 2]], dim=1)
    return ground + inside[:, None] * (colours - ground), text


def train(iterations: int, batch: int = 8, seed: int = 0) -> torch.nn.Module:
    """The toy model after `iterations` of Adam."""
    model = ultrazoo.build(RECIPE)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    begin = time.perf_counter()
    for step in range(iterations):
        video, text = videos(batch, generator)
        noise = torch.randn(video.shape, generator=generator)
        moment = torch.rand(batch, generator=generator)
        s = moment.view(-1, 1, 1, 1, 1)
        found = model((1 - s) * video + s * noise, 1000 * moment, text)
        loss = (found - (noise - video)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 200 == 0 or step == iterations - 1:
            print(f"{step}: loss {loss.item():.4f}, {time.perf_counter() - begin:.0f} s", flush=True)
    return model.eval()


def sample(model: torch.nn.Module, seed: int = 1) -> Tensor:
    """One clip by Euler steps, the model told of each."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    _, text = videos(1, generator)
    x = torch.randn(1, 3, FRAMES, HEIGHT, WIDTH, generator=generator)
    with torch.no_grad():
        for step in range(STEPS):
            model.select(step, STEPS)
            moment = 1 - step / STEPS
            x = x - model(x.to(dtype), torch.tensor([1000 * moment]), text.to(dtype)).float() / STEPS
    model.deselect()
    return x


def main() -> None:
    """Train, sample once in fp16 and keep two steps of two layers."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("-o", "--output", type=Path, required=True)
    options.add_argument("--iterations", type=int, default=800)
    given = options.parse_args()
    model = train(given.iterations).half()
    with ultrazoo.capture(model, given.output, layers="1,3", steps=(1, 6), inputs=True) as recorder:
        clip = sample(model)
    spread = float(clip.amax() - clip.amin())
    print(f"{len(recorder.capture.items)} files, {recorder.capture.nbytes} bytes; pixels spread over {spread:.2f}")


if __name__ == "__main__":
    main()
