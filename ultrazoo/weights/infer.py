"""Which Wan a checkpoint is of: sizes from the shapes of its tensors, heads from the ``config.json`` beside it.

The q and k norms span all heads, so that no tensor tells how many heads there are. Every released Wan has heads of 128
channels; where those do not divide the width, the number has to be given. What else no tensor tells (the size of the
video, how many windows) is taken from the released models, and said.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbones.wan import WanSpec
from ..errors import WeightsError, listed
from ..recipe.layers import spans
from .keymaps import Format
from .reader import Checkpoint
from .tensors import Entry

HEAD_DIM = 128
GRID = (21, 30, 52)
"""Tokens of Wan's 832x480 with 81 frames."""

SIZES = ("dim", "layers", "ffn_dim", "channels", "text_dim", "time_dim", "patch")


@dataclass(frozen=True)
class Inferred:
    """A recipe for a checkpoint; `notes` say what in it no tensor decides. `heads_known`: someone said how many."""

    recipe: dict[str, Any]
    notes: tuple[str, ...]
    heads_known: bool


def infer(checkpoint: Checkpoint, form: Format, prefix: str) -> Inferred:
    """The recipe of a checkpoint in one of Wan's layouts; raises WeightsError when the tensors that tell are not there."""
    ours = {}
    for key, entry in checkpoint.entries.items():
        name = form.ours(key[len(prefix) :])
        if name is not None:
            ours[name] = entry
    sizes = _sizes(checkpoint, form, ours)
    backbone, notes, known = _backbone(checkpoint, sizes)
    attention, found = _attention(ours, sizes["layers"])
    floats: Counter[str] = Counter()
    for entry in ours.values():
        floats[str(entry.dtype).removeprefix("torch.")] += entry.numel
    dtype = floats.most_common(1)[0][0]
    recipe = {
        "schema": 1,
        "name": _name(checkpoint.path),
        "summary": f"made from the shapes of a checkpoint in the format {form.name}",
        "video": {"grid": list(GRID)},
        "backbone": backbone,
        "attention": attention,
        "dtype": dtype if dtype in ("float64", "float32", "float16", "bfloat16") else "bfloat16",
    }
    video = "no tensor tells the size of the video: 832x480 and 81 frames are taken (video.…=… for another)"
    return Inferred(recipe, (*notes, *found, video), known)


def _sizes(checkpoint: Checkpoint, form: Format, ours: Mapping[str, Entry]) -> dict[str, Any]:
    due = {
        "patch_embedding.weight": 5,
        "text_embedding.0.weight": 2,
        "time_embedding.0.weight": 2,
        "blocks.0.ffn.0.weight": 2,
    }
    absent = [
        form.theirs(name) or name for name, rank in due.items() if name not in ours or len(ours[name].shape) != rank
    ]
    if absent:
        raise WeightsError(
            f"{checkpoint.path} ({form.name}): the sizes of the model stand in {listed(absent)}, which "
            f"{'is' if len(absent) == 1 else 'are'} not there or of another rank; is the checkpoint whole?"
        )
    patch = ours["patch_embedding.weight"].shape
    layers = {int(found[1]) for name in ours if (found := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "dim": patch[0],
        "layers": max(layers) + 1,
        "ffn_dim": ours["blocks.0.ffn.0.weight"].shape[0],
        "channels": patch[1],
        "text_dim": ours["text_embedding.0.weight"].shape[1],
        "time_dim": ours["time_embedding.0.weight"].shape[1],
        "patch": list(patch[2:]),
    }


def _backbone(checkpoint: Checkpoint, sizes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], bool]:
    """The backbone's section, notes, and whether the number of heads is known and not a stand-in."""
    config = _config(checkpoint.path)
    heads = config.get("num_attention_heads", config.get("num_heads"))
    for preset, values in WanSpec.presets.items():
        spec = WanSpec(**values)
        if all(_plain(getattr(spec, key)) == sizes[key] for key in SIZES) and heads in (None, spec.heads):
            return {"name": "wan", "preset": preset}, [], True
    notes, known = [], True
    dim = sizes["dim"]
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        if dim % HEAD_DIM == 0:
            heads = dim // HEAD_DIM
            notes.append(f"no config.json tells the heads: {heads} of {HEAD_DIM} channels, as in every released Wan")
        else:
            # any legal number has these shapes; whoever needs the right one asks for it
            known = False
            heads = next((n for n in range(max(1, dim // HEAD_DIM), 0, -1) if dim % n == 0 and dim // n % 2 == 0), 1)
    elif dim % heads:
        raise WeightsError(
            f"{checkpoint.path}: its config.json says {heads} heads, the weights are {dim} channels wide: "
            "they do not belong together"
        )
    backbone = {"name": "wan", **sizes, "heads": heads}
    if isinstance(config.get("eps"), float):
        backbone["eps"] = config["eps"]
    return backbone, notes, known


def _config(path: Path) -> dict[str, Any]:
    """The ``config.json`` beside the weights, empty where there is none or it is of no use."""
    try:
        content = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("_class_name") not in ("WanTransformer3DModel", "WanModel"):
        return {}
    return content


def _attention(ours: Mapping[str, Entry], layers: int) -> tuple[dict[str, Any], list[str]]:
    """The layer map: UltraGen's released block where there are extra weights, full attention elsewhere."""
    extra = sorted({int(name.split(".")[1]) for name in ours if ".attention." in name})
    if not extra:
        return {"*": {"name": "full"}}, []
    block: dict[str, Any] = {"name": "ultragen", "variant": "released", "full_first": 0, "full_last": 0}
    for option, suffix, axis in (
        ("rank", "branches.global_.adapt.q.lora_A.weight", 0),
        ("factor", "branches.global_.compress.conv.weight", 2),
    ):
        entry = ours.get(f"blocks.{extra[0]}.attention.{suffix}")
        if entry is not None and len(entry.shape) > axis:
            block[option] = entry.shape[axis]
    note = "no tensor tells how many windows: 4, as released (attention.….windows=… for another)"
    attention = {spans(extra): block} if len(extra) < layers else {}
    return {"*": {"name": "full"} if attention else block, **attention}, [note]


def _name(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", path.name.split(".")[0]).strip("_.+-")
    return name[:100] or "converted"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
