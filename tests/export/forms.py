"""Forms of attention that no example of the contract suite has, by attention and name, as recipe data."""

from __future__ import annotations

from typing import Any


def _branched(fuse: Any = None, **branches: Any) -> dict[str, Any]:
    return {"branches": branches} | ({} if fuse is None else {"fuse": fuse})


def _windows(*counts: int, **more: Any) -> dict[str, Any]:
    return {"layout": {"name": "windows", "counts": list(counts)}, **more}


def _coarse(name: str, factor: Any = 2, **more: Any) -> dict[str, Any]:
    return {"compress": {"name": name, "factor": factor, **more}}


_NEAR = _windows(2, 2)
_STRETCHED = {
    f"rope_{rule}": _branched(
        near=_windows(2, 2, coords={"rule": rule}), far={**_coarse("avg_pool"), "coords": {"rule": rule}}
    )
    for rule in ("interpolate", "ntk", "yarn")
}

MORE: dict[str, dict[str, dict[str, Any]]] = {
    "branched": {
        "lse_rope": _branched(
            "lse",
            near=_windows(2, 2, 2, shift={"name": "repartition"}),
            far={"layout": {"name": "strided", "counts": [1, 2, 3]}},
        ),
        "time_gate_head": _branched(
            {"name": "time_gate", "order": ["near", "far"], "per": "head", "init": {"near": 0.7, "far": 0.3}},
            near=_NEAR,
            far=_coarse("stride", 2, lift="bilinear"),
        ),
        "time_gate_scalar": _branched(
            {"name": "time_gate", "order": ["near", "far"], "per": "scalar", "hidden": 8},
            near=_NEAR,
            far=_coarse("depthwise_conv", 3, lift="bilinear"),
        ),
        "token_gate_softmax": _branched(
            {"name": "token_gate", "per": "scalar"},
            near=_NEAR,
            far=_coarse("depthwise_conv", [2, 2, 2], lift="nearest"),
        ),
        "token_gate_channel": _branched(
            {"name": "token_gate", "per": "channel", "act": "sigmoid"},
            near=_NEAR,
            far={**_coarse("depthwise_conv", 2, of="keys"), "adapt": {"name": "own", "bias": False}},
        ),
        "lora_from_query": _branched(
            {"name": "weights", "weights": {"near": 0.4, "far": 0.6}},
            near=_NEAR,
            far={
                **_coarse("avg_pool", [2, 3, 2]),
                "adapt": {"name": "lora", "rank": 3, "init": "random", "key_from": "query"},
            },
        ),
        "roll_amount": _branched(
            near={"layout": {"name": "windows", "size": [0, 3, 4]}, "shift": {"name": "roll", "amount": [1, 3]}}
        ),
        "roll_counts": _branched(near=_windows(2, 3, 2, shift={"name": "roll"}, coords={"origin": "window"})),
        **_STRETCHED,
    },
}
