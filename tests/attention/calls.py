"""One call repeated with another attention: the same host, the same inputs."""

from __future__ import annotations

from typing import Any

import torch

from ultrazoo.spec import AttentionSpec
from ultrazoo.testing.scenario import Example, Scenario


def same_weights(spec: AttentionSpec, like: Scenario, **changes: Any) -> Any:
    """What `spec` answers to the call of `like`, with its host, its inputs and, where the names agree, its parameters;
    fresh where they do not."""
    other = Scenario(Example(spec, like.site, "other"), torch.float64, random_weights=False)
    weights = like.runner.attention.state_dict()
    if set(weights) == set(other.runner.attention.state_dict()):
        other.runner.attention.load_state_dict(weights)
    other.runner.host = like.runner.host
    other.timestep, other.extra, other.key_valid = like.timestep, like.extra, like.key_valid
    return other.run(like.x, **changes)
