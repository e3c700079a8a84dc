"""A layer's projections and norms as numbers, read through the live host and held against it.

A projection is affine: its matrix is what it does to unit vectors, LoRAs and quantisation included. A norm is one of three
kinds, tried in turn; the kind that gives what the host gives is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import Site
from .probe_host import NORMS, normed

ERROR = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Most that what is computed from a capture may differ from what the host gives, RMS over RMS."""


def projections(host: Any, x: Tensor, site: Site) -> tuple[dict[str, Tensor], dict[str, str]] | str:
    """Tensors ``q.weight`` (width, C), ``q.bias``, …, ``norm_q``, ``norm_k`` and notes on the norms, or why there are none.

    The host gives q and k (B, n, heads, D) of x (B, n, C) without rotation; what the tensors give must be that.
    """
    unit = torch.eye(site.dim, device=x.device, dtype=x.dtype)[None]
    nothing = torch.zeros(1, 1, site.dim, device=x.device, dtype=x.dtype)
    tensors: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for which, raw, zero in zip("qkv", host.project(unit, "qkv"), host.project(nothing, "qkv"), strict=True):
        tensors[f"{which}.weight"] = (raw - zero)[0].T.contiguous()
        tensors[f"{which}.bias"] = zero[0, 0].contiguous()
    some = x[:1, : min(64, x.shape[1])]
    due = host.heads(*host.project(some, "qkv"), None)
    for which, wanted in zip("qkv", due, strict=True):
        raw = some @ tensors[f"{which}.weight"].T + tensors[f"{which}.bias"]
        module = None if which == "v" else _norm_of(host, which)
        gain, bias, eps = _parts(module)
        for kind in NORMS:
            if close(normed(raw, kind, gain, bias, eps, site.head_dim), wanted):
                notes[f"norm_{which}"], notes[f"eps_{which}"] = kind, repr(eps)
                break
        else:
            return f"the norm of {which} is of a kind that a capture does not know"
        if gain is not None:
            tensors[f"norm_{which}"] = gain
        if bias is not None:
            tensors[f"norm_{which}.bias"] = bias
    return tensors, notes


def _norm_of(host: Any, which: str) -> Any:
    names = getattr(host, "names", None)
    if names is not None:
        return getattr(host.attn, getattr(names, f"norm_{which}"), None)
    return getattr(host, f"norm_{which}", None)


def _parts(module: Any) -> tuple[Tensor | None, Tensor | None, float]:
    gain, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = getattr(module, "eps", None)
    return (
        None if gain is None else gain.detach().clone(),
        None if bias is None else bias.detach().clone(),
        1e-6 if eps is None else float(eps),
    )


def close(got: Tensor, wanted: Tensor) -> bool:
    """Whether numbers made anew may stand for the host's own, by the type of `wanted`."""
    error = (got.float() - wanted.float()).norm() / wanted.float().norm()
    return bool(error <= ERROR.get(wanted.dtype, 2e-2))
