"""What `probe` measures, in fp64 from a dense mask, head by head and query by query."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weights(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """Softmax of one head over the allowed keys: q (n, D), k (m, D), allowed bool (n, m) → (n, m), rows one by one."""
    q, k = q.double(), k.double()
    rows = []
    for i in range(q.shape[0]):
        scores = [float(q[i] @ k[j]) / math.sqrt(q.shape[1]) for j in range(k.shape[0])]
        top = max(score for j, score in enumerate(scores) if allowed[i, j])
        shares = [math.exp(s - top) if allowed[i, j] else 0.0 for j, s in enumerate(scores)]
        total = sum(shares)
        rows.append([share / total for share in shares])
    return torch.tensor(rows, dtype=torch.float64)


def figures(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> tuple[list[float], list[float], float]:
    """Error and recall of every head, and the share of pairs, of softmax over `allowed`.

    q (B, n, heads, D), k and v (B, m, heads, D), allowed bool (heads, n, m).
    """
    batch, n, heads, _ = q.shape
    m = k.shape[1]
    errors, recalls = [], []
    for h in range(heads):
        difference = reference = mass = 0.0
        for b in range(batch):
            everything = weights(q[b, :, h], k[b, :, h], torch.ones(n, m, dtype=torch.bool))
            some = weights(q[b, :, h], k[b, :, h], allowed[h])
            full, sparse = everything @ v[b, :, h].double(), some @ v[b, :, h].double()
            for i in range(n):
                difference += float(((sparse[i] - full[i]) ** 2).sum())
                reference += float((full[i] ** 2).sum())
                mass += sum(float(everything[i, j]) for j in range(m) if allowed[h, i, j])
        errors.append(math.sqrt(difference / reference))
        recalls.append(mass / (batch * n))
    return errors, recalls, float(allowed.double().mean())
