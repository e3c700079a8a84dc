"""Tiny models and what to compare them by."""

from __future__ import annotations

import torch

import ultrazoo
from ultrazoo import assemble

from . import layouts

PAPER = {"name": "ultragen", "windows": 2, "rank": 4}
RELEASED = {"name": "ultragen", "variant": "released", "windows": 2, "rank": 4, "full_first": 1, "full_last": 0}


def tiny(attention="full", **changes):
    """A recipe of a Wan of two layers in the sizes of `layouts`."""
    return {
        "schema": 1,
        "name": "tiny",
        "video": {"grid": [2, 8, 9]},
        "backbone": {
            "name": "wan",
            "dim": layouts.DIM,
            "layers": 2,
            "heads": layouts.HEADS,
            "ffn_dim": layouts.FFN,
            "channels": layouts.CHANNELS,
            "text_dim": layouts.TEXT,
            "time_dim": layouts.TIME,
        },
        "attention": {"*": {"name": attention} if isinstance(attention, str) else attention},
        "dtype": "float32",
        **changes,
    }


def build_directory(source, out, **options):
    return assemble.build_directory(ultrazoo.plan(source), out, **options)


def inputs(batch=2):
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(batch, layouts.CHANNELS, 2, 16, 18, generator=generator)
    text = torch.randn(batch, 7, layouts.TEXT, generator=generator)
    return latents, torch.tensor([3.0, 700.0])[:batch], text


def same(a, b):
    """Equal names, types and bits."""
    a, b = dict(a), dict(b)
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n in a
    )


def error_ratio(got, due):
    return float((got - due).square().mean().sqrt() / due.square().mean().sqrt())


def nothing_in(directory):
    return list(directory.iterdir()) == []
