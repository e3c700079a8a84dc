"""LoRAs in the layout of peft: ``adapter_config.json`` and ``adapter_model.safetensors``.

A key is ``base_model.model.<module>.lora_A.weight``; the scale is ``lora_alpha / r``, or over the root of r with rslora,
and rank and alpha may differ by module. Module names are those of diffusers' Wan, of the original Wan, or ours (for the
``adapt: lora`` of a design). Diffusers saves the same without a config, as ``pytorch_lora_weights.safetensors`` with the
prefix ``transformer.``. A bias of the first matrix, which the released UltraGen has and peft does not, stands under
``lora_A.bias``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import WeightsError, listed
from .keymaps import FORMATS
from .reader import Checkpoint, open_checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model"
PREFIX = "base_model.model."
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

_KEY = re.compile(
    r"(?:base_model\.model\.|transformer\.|diffusion_model\.)?(?P<module>.+)\.lora_(?P<which>[AB])\.(?P<kind>weight|bias)"
)
_REFUSED = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "transposed weights",
    "modules_to_save": "whole modules beside the LoRA",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRAs of bare parameters",
}
"""Options of peft that give a LoRA another meaning than ``W + scale B A``."""


@dataclass(frozen=True)
class Pair:
    """The low-rank term of one linear: A (rank, in), B (out, rank), their biases or None, and the factor."""

    a: Tensor
    b: Tensor
    a_bias: Tensor | None
    b_bias: Tensor | None
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Lora:
    """A LoRA by our names of the modules. `notes` say what no file decided."""

    path: str
    pairs: Mapping[str, Pair]
    notes: tuple[str, ...]


def read_lora(path: str | os.PathLike[str]) -> Lora:
    """Read a LoRA from a directory in peft's layout or from one file of its weights, into memory.

    Raises WeightsError for an adapter of another kind, for keys that are no LoRA's and for a matrix without its other.
    """
    place = Path(path)
    directory = place if place.is_dir() else place.parent
    config = _config(directory / CONFIG)
    with open_checkpoint(_file(place)) as checkpoint:
        found = _matrices(checkpoint)
        pairs = {}
        for module, parts in found.items():
            if ("A", "weight") not in parts or ("B", "weight") not in parts:
                lost = "A" if ("A", "weight") not in parts else "B"
                raise WeightsError(f"{checkpoint.path}: {module} has no lora_{lost}.weight; the file is not whole")
            a, b = parts["A", "weight"], parts["B", "weight"]
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise WeightsError(
                    f"{checkpoint.path}: {module} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; a LoRA of a linear "
                    "has (rank, in) and (out, rank)"
                )
            name = ours(module)
            if name in pairs:
                raise WeightsError(f"{checkpoint.path}: two of its LoRAs are of {name}")
            scale = _scale(config, module, a.shape[0])
            pairs[name] = Pair(a, b, parts.get(("A", "bias")), parts.get(("B", "bias")), scale)
        notes = () if config else (f"no {CONFIG} tells the scale: 1 is taken",)
        return Lora(str(checkpoint.path), pairs, notes)


def ours(module: str) -> str:
    """Our path of a module that another program calls `module`; itself where it is ours already or nobody's."""
    for form in (FORMATS["diffusers"], FORMATS["wan"]):
        name = form.ours(f"{module}.weight")
        if name is not None:
            return name.removesuffix(".weight")
    return module


def diffusers_name(module: str) -> str:
    """What diffusers calls our module; itself where it has none such."""
    name = FORMATS["diffusers"].theirs(f"{module}.weight")
    return module if name is None else name.removesuffix(".weight")


def config_of(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """``adapter_config.json`` for pairs by the names under which they are written."""
    ranks = [pair.rank for pair in pairs.values()]
    rank = max(set(ranks), key=ranks.count)
    alphas = {name: pair.scale * pair.rank for name, pair in pairs.items()}
    alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": any(pair.b_bias is not None for pair in pairs.values()),
        "target_modules": sorted(pairs),
        "rank_pattern": {name: pair.rank for name, pair in pairs.items() if pair.rank != rank},
        "alpha_pattern": {name: _number(value) for name, value in alphas.items() if value != alpha},
    }


def tensors_of(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Key → tensor of ``adapter_model.safetensors``."""
    found = {}
    for name, pair in pairs.items():
        for key, tensor in (
            ("lora_A.weight", pair.a),
            ("lora_A.bias", pair.a_bias),
            ("lora_B.weight", pair.b),
            ("lora_B.bias", pair.b_bias),
        ):
            if tensor is not None:
                found[f"{PREFIX}{name}.{key}"] = tensor
    return found


def _file(place: Path) -> Path:
    if not place.is_dir():
        return place
    for name in (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin", DIFFUSERS_FILE):
        if (place / name).is_file():
            return place / name
    raise WeightsError(f"{place} holds no LoRA: neither {WEIGHTS}.safetensors nor {WEIGHTS}.bin nor {DIFFUSERS_FILE}")


def _config(path: Path) -> dict[str, Any]:
    """The settings of the adapter, empty where there is no config; raises WeightsError for other adapters than LoRA."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        kind = content.get("peft_type") if isinstance(content, dict) else type(content).__name__
        raise WeightsError(f"{path}: peft_type is {kind!r}; LoRAs (LORA) are read")
    wrong = [what for option, what in _REFUSED.items() if content.get(option)]
    if content.get("bias", "none") != "none":
        wrong.append("trained biases of the base model")
    if wrong:
        raise WeightsError(f"{path}: the adapter has {listed(wrong)}, which is more than a LoRA of linears")
    if not isinstance(content.get("lora_alpha"), int | float) or not isinstance(content.get("r"), int):
        raise WeightsError(f"{path}: r and lora_alpha are not numbers")
    return content


def _matrices(checkpoint: Checkpoint) -> dict[str, dict[tuple[str, str], Tensor]]:
    found: dict[str, dict[tuple[str, str], Tensor]] = {}
    other = []
    for key in checkpoint:
        match = _KEY.fullmatch(key)
        if match is None:
            other.append(key)
        else:
            # the file is closed before the pairs are used
            found.setdefault(match["module"], {})[match["which"], match["kind"]] = checkpoint.tensor(key).clone()
    if other or not found:
        what = f"{len(other)} keys are not of a LoRA in peft's layout, {listed(other[:3])}" if other else "it is empty"
        raise WeightsError(f"{checkpoint.path} is no LoRA: {what}; keys end in .lora_A.weight and .lora_B.weight")
    return found


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    if not config:
        return 1.0
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # as peft reads it: the end of a module's path, or a regular expression for it
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
