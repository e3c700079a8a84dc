"""LoRAs in and out: added to the weights, attached with peft, put into the ``adapt: lora`` of a design, or saved.

A LoRA of the backbone's linears is an ordinary one for Wan, under diffusers' names or the original ones. A design's own
LoRAs (``branched``, UltraGen) have the module paths of our models: the layout is peft's, the host they are added to is
known to the design alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import UsageError, WeightsError, listed, near
from ..weights import peft
from ..weights.disk import write_bytes
from ..weights.match import Row, table_lines
from ..weights.peft import Lora, Pair
from ..weights.plain import added, require_plain
from ..weights.staging import CONVERTED, refuse_existing, staged
from ..weights.tensors import Entry
from ..weights.writer import Written, order, write_checkpoint
from .source import Source, opened

Get = Callable[[str], Tensor]


@dataclass(frozen=True)
class Loaded:
    """What became of a LoRA: linears that it was added to or attached to, and ``adapt`` parts that were replaced."""

    path: str
    linears: tuple[str, ...]
    adapts: tuple[str, ...]
    notes: tuple[str, ...]


def load_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    how: Literal["merge", "attach"] = "merge",
    name: str = "default",
) -> Loaded:
    """Put the LoRA at `path` into a built model, in place.

    On the backbone's linears it is added to the weights (``merge``), or attached with peft under `name` (``attach``), to be
    trained on or switched off. A design's own ``adapt: lora`` takes the numbers as they are. Either
    everything fits or nothing is changed: raises WeightsError for modules and shapes that the model does not have,
    UsageError for linears that are quantised or wrapped.
    """
    if how not in ("merge", "attach"):
        raise UsageError(f"how is merge or attach, got {how!r}")
    lora = peft.read_lora(path)
    adapts, linears = _placed(lora, model)
    for module in linears if how == "merge" else ():
        require_plain(model.get_submodule(module), module, "merging a LoRA")
    held = dict(model.named_parameters())
    changes = _changes(lora, adapts, linears if how == "merge" else ())
    with torch.no_grad():
        for name_of, change in changes.items():
            held[name_of].copy_(change(held[name_of]))
    if how == "attach" and linears:
        _attach(model, {module: lora.pairs[module] for module in linears}, name)
    return Loaded(lora.path, linears, adapts, lora.notes)


def save_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    of: Literal["adapt", "attached"],
    name: str = "default",
    force: bool = False,
) -> None:
    """Write LoRAs of a model in peft's layout: those of its design (``adapt``) or those attached by peft (``attached``).

    Attached ones get diffusers' names, so that ``load_lora_adapter`` and peft find their modules in a
    ``WanTransformer3DModel``; a design's own keep theirs. Raises UsageError when there are none.
    """
    if of not in ("adapt", "attached"):
        raise UsageError(f"of is adapt or attached, got {of!r}")
    if of == "attached":
        pairs = _attached(model, name)
    else:
        pairs = _of_design(model, dict(model.named_parameters()).__getitem__)
    if not pairs:
        what = f"adapter {name!r} attached by peft" if of == "attached" else "branch with adapt: lora"
        raise UsageError(f"the model has no {what}; there is nothing to save")
    write_lora(pairs, directory, force=force)


def write_lora(pairs: Mapping[str, Pair], directory: str | os.PathLike[str], *, force: bool = False) -> list[Written]:
    """Write pairs by the names they are to have; an existing directory is refused unless `force`. Raises OutputError."""
    refuse_existing(Path(os.path.realpath(directory)), force)
    tensors = peft.tensors_of(pairs)
    entries = order([Entry(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()])
    with staged(directory, force=force) as new:
        write_bytes(new / peft.CONFIG, _json(peft.config_of(pairs)))
        # peft does not read it: it marks the directory as one that may be replaced
        write_bytes(new / "config.json", _json({CONVERTED: {"version": __version__, "format": "lora"}}))
        rows = ((entry.name, tensors[entry.name].detach().cpu()) for entry in entries)
        return write_checkpoint(new, entries, rows, stem=peft.WEIGHTS, limit=1 << 62)


def extract_lora(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
) -> list[Written]:
    """Write the ``adapt: lora`` of the design whose checkpoint is at `source` in peft's layout."""
    with opened(source, overrides) as found:
        pairs = _of_design(found.model, found.tensor)
        if not pairs:
            raise UsageError(f"{found.checkpoint.path} has no branch with adapt: lora; there is nothing to take out")
        return write_lora(pairs, out, force=force)


def with_lora(source: Source, path: str | os.PathLike[str]) -> Source:
    """A checkpoint whose tensors get the LoRA at `path` on their way; raises WeightsError when it does not fit."""
    lora = peft.read_lora(path)
    adapts, linears = _placed(lora, source.model)
    done = [f"the LoRA {lora.path} is added to {len(linears)} linears", *lora.notes]
    if adapts:
        done.append(f"{len(adapts)} LoRAs of the design are replaced by those of {lora.path}")
    return replace(source, done=tuple(done), changes={**source.changes, **_changes(lora, adapts, linears)})


def _placed(lora: Lora, model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which of the LoRA's modules are parts of a design, and which are linears of the backbone.

    Raises WeightsError with a table when a module is not in the model or has other shapes.
    """
    modules = dict(model.named_modules())
    adapts, linears = [], []
    rows: list[Row] = []
    for name, pair in lora.pairs.items():
        module = modules.get(name)
        if module is None:
            rows.append(("unexpected", f"{name}.lora_A.weight", str(tuple(pair.a.shape)), ""))
        elif _is_adapt(module):
            adapts.append(name)
            due = {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
            got = {key: tuple(tensor.shape) for key, tensor in _parts(pair).items()}
            rows += [("missing", f"{name}.{key}", "", str(due[key])) for key in due if key not in got]
            rows += [("unexpected", f"{name}.{key}", str(got[key]), "") for key in got if key not in due]
            common = [key for key in due if key in got and due[key] != got[key]]
            rows += [("wrong shape", f"{name}.{key}", str(got[key]), str(due[key])) for key in common]
        else:
            linears.append(name)
            shape = (pair.b.shape[0], pair.a.shape[1])
            weight = getattr(getattr(module, "base_layer", module), "weight", None)
            if not isinstance(module, nn.Linear) and not hasattr(module, "in_features"):
                rows.append(("unexpected", f"{name}.lora_A.weight", str(tuple(pair.a.shape)), ""))
            # a quantised weight has another shape: it is refused by its kind, not by this
            elif type(weight) is nn.Parameter and weight.is_floating_point() and tuple(weight.shape) != shape:
                rows.append(("wrong shape", f"{name}.weight", str(shape), str(tuple(weight.shape))))
    if rows:
        called = getattr(getattr(model, "plan", None), "name", type(model).__name__)
        head = f"{lora.path} (lora) does not fit {called}: {len(rows)} tensors differ, nothing was changed"
        raise WeightsError("\n".join([head, *table_lines(rows)]))
    return tuple(adapts), tuple(linears)


def _is_adapt(module: nn.Module) -> bool:
    """A part of ``adapt: lora``, and not a linear wrapped by peft, whose matrices are in dictionaries."""
    return isinstance(getattr(module, "lora_A", None), nn.Linear)


def _changes(lora: Lora, adapts: Sequence[str], linears: Sequence[str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Our parameter → its value with the LoRA, from its value without."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for module in linears:
        pair = lora.pairs[module]
        changes[f"{module}.weight"] = partial(_plus, pair=pair)
        if pair.a_bias is not None or pair.b_bias is not None:
            changes[f"{module}.bias"] = partial(_plus_bias, pair=pair)
    for module in adapts:
        for key, tensor in _parts(lora.pairs[module]).items():
            changes[f"{module}.{key}"] = partial(_instead, new=tensor)
    return changes


def _plus(weight: Tensor, pair: Pair) -> Tensor:
    return added(weight, pair.a, pair.b, pair.scale)


def _plus_bias(bias: Tensor, pair: Pair) -> Tensor:
    wide = torch.promote_types(bias.dtype, torch.float32)
    term = torch.zeros(bias.shape, dtype=wide)
    if pair.a_bias is not None:
        term += torch.mv(pair.b.to(wide), pair.a_bias.to(wide))
    if pair.b_bias is not None:
        term += pair.b_bias.to(wide)
    return (bias.to(wide) + pair.scale * term.to(bias.device)).to(bias.dtype)


def _instead(old: Tensor, new: Tensor) -> Tensor:
    return new.to(old.device, old.dtype)


def _parts(pair: Pair) -> dict[str, Tensor]:
    """The parameters of a part of ``adapt: lora``, whose scale is 1: another one goes into B and its bias."""
    b, b_bias = pair.b, pair.b_bias
    if pair.scale != 1.0:
        b = b * pair.scale
        b_bias = None if b_bias is None else b_bias * pair.scale
    parts = {"lora_A.weight": pair.a, "lora_A.bias": pair.a_bias, "lora_B.weight": b, "lora_B.bias": b_bias}
    return {key: tensor for key, tensor in parts.items() if tensor is not None}


def _of_design(model: nn.Module, get: Get) -> dict[str, Pair]:
    """Module path → pair of every part of ``adapt: lora``; `get` gives a parameter by name."""
    found = {}
    for path, module in model.named_modules():
        if _is_adapt(module):
            bias = module.lora_A.bias is not None  # type: ignore[union-attr]
            found[path] = Pair(
                get(f"{path}.lora_A.weight"),
                get(f"{path}.lora_B.weight"),
                get(f"{path}.lora_A.bias") if bias else None,
                get(f"{path}.lora_B.bias") if bias else None,
                1.0,
            )
    return found


def _attached(model: nn.Module, name: str) -> dict[str, Pair]:
    """Diffusers' module path → pair of every linear that peft has wrapped with the adapter `name`."""
    found, others = {}, set()
    for path, module in model.named_modules():
        if not hasattr(module, "base_layer") or not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            continue
        others |= set(module.lora_A)
        if name in module.lora_A:
            a, b = module.lora_A[name], module.lora_B[name]  # type: ignore[index]
            scale = float(module.scaling[name])  # type: ignore[index]
            found[peft.diffusers_name(path)] = Pair(a.weight, b.weight, a.bias, b.bias, scale)
    if not found and others:
        hint = near(name, others)
        raise UsageError(
            f"no adapter {name!r} is attached; there are {listed(sorted(others))}{f'; {hint}' if hint else ''}"
        )
    return found


def _attach(model: nn.Module, pairs: Mapping[str, Pair], name: str) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    except ImportError:
        raise UsageError("attaching a LoRA needs peft: pip install 'ultrazoo[diffusers]'; or merge it") from None

    settings = peft.config_of(pairs)
    keys = ("r", "lora_alpha", "lora_bias", "target_modules", "rank_pattern", "alpha_pattern")
    inject_adapter_in_model(LoraConfig(**{key: settings[key] for key in keys}), model, adapter_name=name)
    state = {key.removeprefix(peft.PREFIX): tensor for key, tensor in peft.tensors_of(pairs).items()}
    left = set_peft_model_state_dict(model, state, adapter_name=name).unexpected_keys
    assert not left, f"peft has no place for {listed(left[:3])}"


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
