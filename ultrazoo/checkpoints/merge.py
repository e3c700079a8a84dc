"""Merge the LoRAs of a design into projections of its own: ``adapt: lora`` becomes ``adapt: own``.

``(W x + c) + (B (A x + a) + b)`` is one linear with the weight ``W + B A`` and the bias ``c + B a + b``; W and c are the
host's, which stay as they are for the branches that share them. Per forward a branch then computes three projections
instead of three and six thin ones; in exchange it has weights of its own. (A branch that projects the unchanged input
shares the host's projections with its neighbours while it has a LoRA, and no longer afterwards: the plan tells.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import assemble, recipe
from ..attention.branch import Branch
from ..attention.parts.adapt import NAMES, LoraSpec
from ..errors import UsageError, listed
from ..weights.plain import added, require_plain
from ..weights.slots import attention_paths, slots_of
from ..weights.tensors import Entry

if TYPE_CHECKING:
    from ..recipe import Plan


@dataclass(frozen=True)
class _Term:
    """One projection to merge: the module path of the LoRA and of the host's linear that it is added to."""

    lora: str
    host: str


def merge_lora(model: nn.Module) -> nn.Module:
    """The same model with every ``adapt: lora`` merged into ``adapt: own``, and the plan of that.

    `model` comes from build or from_pretrained. What is not merged is shared with it, not copied. Sums are taken in fp32
    (or wider) and stored in the type of the host's weights. Raises UsageError when there is nothing to merge, or for
    linears that are quantised, wrapped or not loaded.
    """
    model = getattr(model, "_orig_mod", model)
    plan = getattr(model, "plan", None)
    if plan is None:
        raise UsageError("this model has no plan: merging takes models made by build or from_pretrained")
    for term in _terms(model).values():
        for path in (term.host, f"{term.lora}.lora_A", f"{term.lora}.lora_B"):
            require_plain(model.get_submodule(path), path, "merging")
    new_plan = merged_plan(plan)
    merged = assemble.skeleton(new_plan)
    held = {slot.name: slot.get() for slot in slots_of(model)}
    entries = {name: Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()}
    values = Merging(model, merged, entries, held.__getitem__)
    with torch.no_grad():
        for slot in slots_of(merged):
            slot.put(values.tensor(slot.name).detach())
    merged.origin = {**(getattr(model, "origin", None) or {}), "merged": plan.hash}  # type: ignore[assignment]
    return merged.train(model.training)


def merged_plan(plan: Plan) -> Plan:
    """The plan with ``adapt: own`` wherever it has ``adapt: lora``; raises UsageError when it has none."""
    data = plan.resolved.data()
    changed = {key: _own(value) if key in ("attention", "steps") else value for key, value in data.items()}
    if changed == data:
        raise UsageError(f"{plan.name} has no branch with adapt: lora; there is nothing to merge")
    return recipe.make_plan(recipe.resolve(recipe.load({**changed, "weights": None})))


def _own(node: Any) -> Any:
    if isinstance(node, list):
        return [_own(one) for one in node]
    if not isinstance(node, Mapping):
        return node
    return {
        key: {"name": "own"} if key == "adapt" and _name(value) == LoraSpec.name else _own(value)
        for key, value in node.items()
    }


def _name(value: Any) -> Any:
    return value.get("name") if isinstance(value, Mapping) else value


class Merging:
    """Parameters of the `merged` model by name, made from those of `model`: `entries` tell, `get` gives them.

    Raises UsageError when the merged model is not the one before with other projections: designs for other sampling steps
    that differed in their LoRAs alone are one design afterwards, and their weights are two.
    """

    def __init__(self, model: nn.Module, merged: nn.Module, entries: Mapping[str, Entry], get: Callable[[str], Tensor]):
        self._entries, self._get = entries, get
        self._terms = _terms(model)
        lost = {name for name in entries if name.rpartition(".lora_")[0] not in self._terms}
        kept = {slot.name for slot in slots_of(merged) if slot.saved or slot.name in entries}
        lost ^= {name for name in kept if self._term(name) is None}
        if lost:
            raise UsageError(
                "merging would make one design of two: layers whose designs at other sampling steps differ in the rank of "
                f"their LoRAs alone have other parameters afterwards ({listed(sorted(lost)[:2])} …)"
            )

    def entry(self, name: str) -> Entry:
        """Shape and type of `tensor(name)`."""
        term = self._term(name)
        if term is None:
            return self._entries[name]
        host = self._entries[f"{term.host}.{name.rpartition('.')[2]}"]
        return Entry(name, host.shape, host.dtype)

    def tensor(self, name: str) -> Tensor:
        """The value of the merged model's parameter `name`."""
        term = self._term(name)
        if term is None:
            return self._get(name)
        kind = name.rpartition(".")[2]
        host = self._get(f"{term.host}.{kind}")
        b = self._get(f"{term.lora}.lora_B.weight")
        if kind == "weight":
            return added(host, self._get(f"{term.lora}.lora_A.weight"), b)
        if f"{term.lora}.lora_B.bias" not in self._entries:
            return host.clone()
        inner = self._get(f"{term.lora}.lora_A.bias")
        wide = torch.promote_types(torch.promote_types(host.dtype, b.dtype), torch.float32)
        outer = self._get(f"{term.lora}.lora_B.bias").to(wide)
        return (host.to(wide) + torch.mv(b.to(wide), inner.to(wide)) + outer).to(host.dtype)

    def _term(self, name: str) -> _Term | None:
        return None if name in self._entries else self._terms.get(name.rpartition(".")[0])


def _terms(model: nn.Module) -> dict[str, _Term]:
    """Module path of a projection (``….adapt.q``) → what it is merged from; raises UsageError for a host of fused linears."""
    hosts = {path: part for path, part in model.named_modules() if hasattr(part, "projection_names")}
    outer = attention_paths(model)
    found = {}
    for path, branch in model.named_modules():
        if not isinstance(branch, Branch) or not isinstance(branch.spec.adapt, LoraSpec):
            continue
        block = next(one for one in outer if path.startswith(f"{one}.")).rpartition(".")[0]
        beside = [(where, part) for where, part in hosts.items() if where.rpartition(".")[0] == block]
        if len(beside) != 1:
            raise UsageError(f"{path}: the host beside it does not name its projections, so that nothing can be merged")
        where, host = beside[0]
        for name in NAMES:
            base = "q" if name == "k" and branch.spec.adapt.key_from == "query" else name
            linear = host.projection_names[f"{base}.weight"].rpartition(".")[0]
            found[f"{path}.adapt.{name}"] = _Term(f"{path}.adapt.{name}", f"{where}.{linear}")
    return found
