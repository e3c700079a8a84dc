"""What is read off a timm model: the facts that an adapter declares sites by, and the settings it was created with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

CLASSES = ("VisionTransformer", "Eva")
"""Classes of timm whose blocks an adapter knows; their subclasses too, as far as `unsupported` finds nothing."""

ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")
ROPES = ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3", "RotaryEmbeddingMixed")


def family(model: Any) -> str | None:
    """The adapted class that `model` is of; None for another model."""
    for cls in type(model).__mro__:
        if cls.__name__ in CLASSES and cls.__module__.startswith("timm."):
            return str(cls.__name__)
    return None


def unsupported(model: Any) -> str:
    """Why no adapter serves this model, in a sentence; empty where one does."""
    name = type(model).__name__
    if family(model) is None:
        return f"{name} is not one of timm's {' and '.join(CLASSES)}"
    for place, block in enumerate(model.blocks):
        attn = getattr(block, "attn", None)
        if type(attn).__name__ not in ATTENTIONS or not type(attn).__module__.startswith("timm."):
            return f"attention of block {place} is {type(attn).__name__}; an adapter knows {', '.join(ATTENTIONS)}"
        if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
            return f"attention of block {place} shares keys between heads ({attn.num_kv_heads} for {attn.num_heads})"
        if _shape(attn) != _shape(model.blocks[0].attn):
            return f"attention of block {place} has other dimensions than that of block 0"
    if not hasattr(model.patch_embed, "grid_size"):
        return f"its patches are embedded by {type(model.patch_embed).__name__}, which has no grid"
    rope = getattr(model, "rope", None)
    if rope is None:
        return ""
    if type(rope).__name__ not in ROPES:
        return f"its rotary embedding is {type(rope).__name__}; an adapter knows {', '.join(ROPES)}"
    if getattr(rope, "in_pixels", False) or getattr(rope, "grid_type", "index") != "index" or _head_dim(model) % 4:
        return f"its rotary embedding is in pixels, not in patches, or its {_head_dim(model)} channels are no pairs of axes"
    return ""


def _shape(attn: Any) -> tuple[int, int, bool]:
    return attn.num_heads, attn.head_dim, attn.qkv is None


def _head_dim(model: Any) -> int:
    return int(model.blocks[0].attn.head_dim)


def read(model: Any) -> dict[str, Any]:
    """The facts of a supported model. `front`: runs of tokens before the patches, (kind, length)."""
    attn = model.blocks[0].attn
    rope = getattr(model, "rope", None)
    classes = int(model.cls_token is not None) if model.num_prefix_tokens else 0
    if getattr(model, "dist_token", None) is not None:
        classes += 1
    return {
        "class": family(model),
        "depth": len(model.blocks),
        "dim": model.embed_dim,
        "heads": attn.num_heads,
        "head_dim": _head_dim(model),
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "front": (("class", classes), ("register", model.num_prefix_tokens - classes)),
        "patch": tuple(model.patch_embed.patch_size),
        "channels": model.patch_embed.proj.in_channels,
        "grid": tuple(model.patch_embed.grid_size),
        "dynamic": bool(model.dynamic_img_size),
        "rope": "" if rope is None else type(rope).__name__,
        "base": 0.0 if rope is None else float(rope.temperature),
        "pairing": "halves" if getattr(attn, "rotate_half", False) else "interleaved",
    }


SETTINGS: Mapping[str, Callable[[Any], Any]] = {
    "img_size": lambda model: list(model.patch_embed.img_size),
    "dynamic_img_size": lambda model: bool(model.dynamic_img_size),
    "patch_size": lambda model: model.patch_embed.patch_size[0],
    "in_chans": lambda model: bare(model.patch_embed.proj).in_channels,
    "embed_dim": lambda model: model.embed_dim,
    "depth": lambda model: len(model.blocks),
    "qk_norm": lambda model: not isinstance(model.blocks[0].attn.q_norm, nn.Identity),
    "num_heads": lambda model: model.blocks[0].attn.num_heads,
    "num_classes": lambda model: model.num_classes,
    "global_pool": lambda model: model.global_pool,
}
"""Arguments of ``timm.create_model`` that can be read off a model."""


def settings(model: Any, usual: Any) -> dict[str, Any]:
    """Arguments by which `model` differs from `usual`, the same name created without any."""
    return {name: of(model) for name, of in SETTINGS.items() if of(model) != of(usual)}


def written(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the model whose config.json is `content`, as timm reads it; raises ValueError with the reason.

    `model_args` are what it was created with; facts of the weights fill what they leave open. Older files hold those at the
    top.
    """
    name, arguments = content.get("architecture"), content.get("model_args", {})
    facts = content.get("pretrained_cfg", content)
    if not isinstance(name, str):
        raise ValueError("names no architecture: it is not of timm")
    if not isinstance(arguments, Mapping) or not isinstance(facts, Mapping):
        raise ValueError("holds no mapping as model_args and pretrained_cfg")
    usual = {"num_classes": content.get("num_classes", facts.get("num_classes"))}
    size = facts.get("input_size")
    if size is not None:
        if not isinstance(size, list) or len(size) != 3:
            raise ValueError(f"has the input_size {size!r}, which is no (channels, height, width)")
        usual["in_chans"] = size[0]
        if facts.get("fixed_input_size") and not arguments.get("dynamic_img_size"):
            usual["img_size"] = size[1:]
    return name, {**{key: value for key, value in usual.items() if value is not None}, **arguments}


def differences(model: nn.Module, other: nn.Module) -> list[str]:
    """What one of two models alone has, or has in another size, by name. What a recipe added does not count, and neither do
    the ways to hold a linear: quantised, under a LoRA."""
    one, two = dict(_sizes("", model)), dict(_sizes("", other))
    return sorted(name for name in {*one, *two} if one.get(name) != two.get(name))


def _sizes(path: str, module: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Sizes of linears by path, and of every other parameter."""
    module = bare(module)
    if hasattr(module, "in_features"):
        # quantised linears of torch keep it behind a method
        bias = module.bias() if callable(module.bias) else module.bias
        yield path, (module.in_features, module.out_features, int(bias is not None))
        return
    below = f"{path}." if path else ""
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{below}{name}", tuple(parameter.shape)
    for name, child in module.named_children():
        if name != "processor":
            yield from _sizes(f"{below}{name}", child)


def bare(module: Any) -> Any:
    """`module` without what peft put around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module
