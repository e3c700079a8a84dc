"""Names of parameters in checkpoints of other programs, as tables that read both ways.

Each row is (our name, their name) with placeholders that stand for the same text on both sides. Our names are those of
the native backbones, which follow the original Wan 2.1 layout; extra parameters of a layer's attention are under
``blocks.<i>.attention``. Rows of the released UltraGen checkpoints are for the branches ``local``, ``regional`` and
``global`` (``global_`` in a state dict) with gates in the order ``[[local, regional], global]``.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

PLACES = {
    "i": r"\d+",
    "p": "weight|bias",
    "l": "0|2",
    "x": "q|k|v",
    "n": "norm_q|norm_k",
    "ab": "lora_A|lora_B",
    "any": ".+",
}
"""What a placeholder matches."""

PREFIXES = ("", "module.", "_orig_mod.", "model.", "transformer.", "model.diffusion_model.", "pipe.dit.")
"""Wrappers that training programs and single-file packers put in front of every key."""

Rows = tuple[tuple[str, str], ...]

_WAN: Rows = (
    ("patch_embedding.{p}", "patch_embedding.{p}"),
    ("text_embedding.{l}.{p}", "text_embedding.{l}.{p}"),
    ("time_embedding.{l}.{p}", "time_embedding.{l}.{p}"),
    ("time_projection.1.{p}", "time_projection.1.{p}"),
    ("blocks.{i}.modulation", "blocks.{i}.modulation"),
    ("blocks.{i}.norm3.{p}", "blocks.{i}.norm3.{p}"),
    ("blocks.{i}.self_attn.{x}.{p}", "blocks.{i}.self_attn.{x}.{p}"),
    ("blocks.{i}.self_attn.o.{p}", "blocks.{i}.self_attn.o.{p}"),
    ("blocks.{i}.self_attn.{n}.weight", "blocks.{i}.self_attn.{n}.weight"),
    ("blocks.{i}.cross_attn.{x}.{p}", "blocks.{i}.cross_attn.{x}.{p}"),
    ("blocks.{i}.cross_attn.o.{p}", "blocks.{i}.cross_attn.o.{p}"),
    ("blocks.{i}.cross_attn.{n}.weight", "blocks.{i}.cross_attn.{n}.weight"),
    ("blocks.{i}.ffn.{l}.{p}", "blocks.{i}.ffn.{l}.{p}"),
    ("head.head.{p}", "head.head.{p}"),
    ("head.modulation", "head.modulation"),
)

_DIFFUSERS: Rows = (
    ("patch_embedding.{p}", "patch_embedding.{p}"),
    ("text_embedding.0.{p}", "condition_embedder.text_embedder.linear_1.{p}"),
    ("text_embedding.2.{p}", "condition_embedder.text_embedder.linear_2.{p}"),
    ("time_embedding.0.{p}", "condition_embedder.time_embedder.linear_1.{p}"),
    ("time_embedding.2.{p}", "condition_embedder.time_embedder.linear_2.{p}"),
    ("time_projection.1.{p}", "condition_embedder.time_proj.{p}"),
    ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
    ("blocks.{i}.norm3.{p}", "blocks.{i}.norm2.{p}"),
    ("blocks.{i}.self_attn.{x}.{p}", "blocks.{i}.attn1.to_{x}.{p}"),
    ("blocks.{i}.self_attn.o.{p}", "blocks.{i}.attn1.to_out.0.{p}"),
    ("blocks.{i}.self_attn.{n}.weight", "blocks.{i}.attn1.{n}.weight"),
    ("blocks.{i}.cross_attn.{x}.{p}", "blocks.{i}.attn2.to_{x}.{p}"),
    ("blocks.{i}.cross_attn.o.{p}", "blocks.{i}.attn2.to_out.0.{p}"),
    ("blocks.{i}.cross_attn.{n}.weight", "blocks.{i}.attn2.{n}.weight"),
    ("blocks.{i}.ffn.0.{p}", "blocks.{i}.ffn.net.0.proj.{p}"),
    ("blocks.{i}.ffn.2.{p}", "blocks.{i}.ffn.net.2.{p}"),
    ("head.head.{p}", "proj_out.{p}"),
    ("head.modulation", "scale_shift_table"),
)

_EXTRA = "blocks.{i}.attention."
_SELF = "blocks.{i}.self_attn."

# "hierachcal" is how the released files spell it
_ULTRAGEN: Rows = (
    *_WAN,
    (_EXTRA + "branches.global_.adapt.{x}.{ab}.{p}", _SELF + "{x}_lora_1.{ab}.{p}"),
    (_EXTRA + "branches.regional.adapt.{x}.{ab}.{p}", _SELF + "{x}_lora_2.{ab}.{p}"),
    (_EXTRA + "branches.global_.compress.conv.{p}", _SELF + "downsample_conv.{p}"),
    (_EXTRA + "branches.global_.lift.conv.{p}", _SELF + "upsample_conv.{p}"),
    (_EXTRA + "branches.regional.compress.conv.{p}", _SELF + "downsample_conv_hierachcal.{p}"),
    (_EXTRA + "branches.regional.lift.conv.{p}", _SELF + "upsample_conv_hierachcal.{p}"),
    (_EXTRA + "fuse.gates.0.{l}.{p}", _SELF + "alpha_time_embedding.{l}.{p}"),
    (_EXTRA + "fuse.gates.0.4.{p}", _SELF + "alpha_time_projection.1.{p}"),
    (_EXTRA + "fuse.gates.1.{l}.{p}", _SELF + "alpha_time_embedding2.{l}.{p}"),
    (_EXTRA + "fuse.gates.1.4.{p}", _SELF + "alpha_time_projection2.1.{p}"),
)


@dataclass(frozen=True)
class Format:
    """One layout of keys.

    `rows` map names both ways. A checkpoint is of this format when each of `signs` matches a key. `backbone` is the
    only backbone it can be read into, None for any; `design` the attention that its extra weights belong to.
    """

    name: str
    summary: str
    rows: Rows
    signs: tuple[str, ...]
    backbone: str | None = None
    design: str = ""

    def ours(self, key: str) -> str | None:
        """Our name of a key of theirs, None when the format knows no such key."""
        return _translate(self._inward, key)

    def theirs(self, name: str) -> str | None:
        """Their key for a name of ours, None when the format has no place for it."""
        return _translate(self._outward, name)

    def extras(self, layer: int) -> list[str]:
        """Our names of the extra parameters that the format has in a layer with its design."""
        found = []
        for ours, _ in self.rows:
            if not ours.startswith(_EXTRA):
                continue
            places = re.findall(r"\{(\w+)\}", ours)
            choices = [[str(layer)] if place == "i" else PLACES[place].split("|") for place in places]
            found += [ours.format(**dict(zip(places, one, strict=True))) for one in itertools.product(*choices)]
        return found

    def recognises(self, keys: Iterable[str]) -> bool:
        keys = list(keys)
        return bool(self.signs) and all(any(re.search(sign, key) for key in keys) for sign in self.signs)

    @cached_property
    def _inward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(theirs), ours) for ours, theirs in self.rows]

    @cached_property
    def _outward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(ours), theirs) for ours, theirs in self.rows]


FORMATS: Mapping[str, Format] = {
    one.name: one
    for one in (
        Format(
            "ultragen",
            "the released UltraGen checkpoints: Wan 2.1 keys and the extra ones of the sparse layers",
            _ULTRAGEN,
            (r"^blocks\.\d+\.self_attn\.q_lora_[12]\.",),
            "wan",
            "{name: ultragen, variant: released}",
        ),
        Format(
            "diffusers",
            "WanTransformer3DModel as diffusers saves it",
            _DIFFUSERS,
            (r"^condition_embedder\.", r"^blocks\.\d+\.attn1\."),
            "wan",
        ),
        Format(
            "ultrazoo",
            "what this program writes",
            (("{any}", "{any}"),),
            (r"(^|\.)attention\.",),
        ),
        Format(
            "wan",
            "the original Wan 2.1 and 2.2 checkpoints",
            _WAN,
            (r"^time_projection\.1\.", r"^blocks\.\d+\.self_attn\.q\.", r"^head\.head\."),
            "wan",
        ),
    )
}
"""Formats in the order in which a checkpoint is held against them."""


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    text = ""
    for number, part in enumerate(parts):
        text += f"(?P<{part}>{PLACES[part]})" if number % 2 else re.escape(part)
    return re.compile(text)


def _translate(table: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    for pattern, target in table:
        match = pattern.fullmatch(name)
        if match:
            return target.format(**match.groupdict())
    return None


def strip_prefix(keys: Iterable[str]) -> str:
    """The wrappers in front of every key (``module.model.``), the empty string when there are none."""
    keys = list(keys)
    prefix = ""
    while True:
        found = [one for one in PREFIXES if keys and one and all(key.startswith(prefix + one) for key in keys)]
        if not found:
            return prefix
        prefix += max(found, key=len)


def beginnings(keys: Iterable[str]) -> dict[str, int]:
    """What stands before the first dot of the keys, and of how many."""
    return dict(Counter(key.partition(".")[0] + "." for key in keys if "." in key))
