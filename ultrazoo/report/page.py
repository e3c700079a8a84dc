"""report.html: one self-contained page about a plan. Style, pictures and text are inline; it requests nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from .. import __version__
from ..analysis.show import show
from ..cost import Seconds, units
from ..cost.memory import FRAGMENTATION, OPTIMISER, RESERVED_GIB
from . import tables
from .style import CSS

if TYPE_CHECKING:
    from ..recipe import Plan


def html(plan: Plan) -> str:
    """The whole page. Every name and text of the recipe is escaped."""
    parts = [_head(plan), _facts(plan), _starts(plan), _pictures(plan), _layers(plan), _totals(plan), _memory(plan)]
    if plan.seconds:
        parts.append(_seconds(plan.seconds))
    parts += [_recipe(plan), _foot(plan)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(plan.name)}: ultrazoo report</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def size_text(plan: Plan) -> str:
    """``3840×2176, 81 frames`` or, where a recipe gives the grid itself, nothing."""
    video = plan.resolved.video
    if video.width is None or video.height is None:
        return ""
    frames = f", {video.frames} frames" if video.frames > 1 else ""
    return f"{video.width}×{video.height}{frames}"


def grid_text(plan: Plan) -> str:
    return "×".join(map(str, plan.grid))


def backbone_text(plan: Plan) -> str:
    """``wan/t2v_1_3b`` where the backbone is one of its presets, else the name alone."""
    backbone = plan.resolved.backbone
    made = {name: type(backbone)(**options) for name, options in backbone.presets.items()}
    preset = next((name for name, one in made.items() if one == backbone), None)
    return f"{backbone.name}/{preset}" if preset else backbone.name


def _head(plan: Plan) -> str:
    resolved = plan.resolved
    size = size_text(plan)
    about = [f"backbone {backbone_text(plan)}", *([size] if size else []), f"grid {grid_text(plan)}", resolved.dtype]
    source = f'<p class="lead">Source: {escape(resolved.source)}</p>' if resolved.source else ""
    return (
        f'<header><h1>{escape(plan.name)}</h1><p class="lead">{escape(resolved.summary)}</p>{source}'
        f'<p class="lead">{escape(" · ".join(about))}</p></header>'
    )


def _facts(plan: Plan) -> str:
    totals = plan.totals
    facts = [
        (units.count(plan.grid.tokens), "tokens"),
        (units.flops(totals.flops), "one forward"),
        (units.flops(totals.attention_flops), "of it attention"),
        (units.ratio(totals.attention_speedup), "less attention than full"),
        (units.params(totals.parameters), "parameters"),
        (units.params(totals.extra_parameters), "of them new"),
        (units.gib(totals.weight_bytes), f"weights in {plan.resolved.dtype}"),
        (units.flops(plan.clip.flops), f"a clip, {plan.clip.forwards} forwards"),
    ]
    cards = "".join(f'<div class="fact"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in facts)
    return f'<div class="facts">{cards}</div>'


def _starts(plan: Plan) -> str:
    return (
        "<h2>How it starts</h2><p>What a fresh block does on pretrained weights: <b>exact</b> equals the pretrained model, "
        "<b>training-free</b> is published as usable without tuning, <b>needs tuning</b> is not.</p>"
        + _table(("layers", "attention", "start"), tables.starts(plan.layers))
    )


def _pictures(plan: Plan) -> str:
    shown = show(plan)
    images = shown.images("png")
    answer = "".join(f"<p>{escape(line.strip())}</p>" for line in shown.coverage.text().splitlines())
    return (
        "<h2>Who sees whom</h2>"
        + _image(images["influence"], "Tokens that can influence one query, per branch and group of layers")
        + "<p>Possible dependence of one token's output on the input, through compression and lift. Layers that look "
        "alike share a row.</p>"
        + answer
        + _image(images["blocks"], "Blocks of keys that each block of queries sees")
        + "<h2>Cost per layer</h2>"
        + _image(images["layers"], "FLOPs of each layer")
    )


def _layers(plan: Plan) -> str:
    rows = tables.layer_rows(plan.layers, plan.grid.tokens)
    head = "".join(
        f"<th{' class=n' if i > 1 else ''}>{escape(name)}</th>" for i, name in enumerate(tables.LAYER_HEADINGS)
    )
    body = "".join(
        f"<tr{' class=branch' if row.branch else ''}>"
        + "".join(f"<td{' class=n' if i > 1 else ''}>{escape(cell)}</td>" for i, cell in enumerate(row.cells))
        + "</tr>"
        for row in rows
    )
    note = (
        "<p>Figures of one layer; batch 1, forward; matmul, convolution and attention, 2 FLOPs per multiply-add. "
        "Peak memory: most bytes alive at once inside the attention, beside its input, at inference.</p>"
    )
    return f'{note}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _totals(plan: Plan) -> str:
    totals, sampling = plan.totals, plan.resolved.sampling
    rows = [
        ("attention", units.flops(totals.attention_flops)),
        ("projections", units.flops(totals.projection_flops)),
        ("everything else", units.flops(totals.other_flops)),
        ("one forward", units.flops(totals.flops)),
        (f"a clip, {plan.clip.forwards} forwards{_sampling_text(sampling)}", units.flops(plan.clip.flops)),
        ("parameters", units.count(totals.parameters)),
        ("new parameters", units.count(totals.extra_parameters)),
    ]
    return "<h2>Totals</h2>" + _table(("", ""), rows, numbers={1}, bare=True) + _companions(plan)


def _companions(plan: Plan) -> str:
    found = plan.priced.companions
    if not found:
        return ""
    rows = [(one.role, one.name, units.params(one.parameters), units.flops(one.flops), one.source) for one in found]
    return "<p>Beside it, for one clip and in no other figure of this page:</p>" + _table(
        ("", "", "parameters", "FLOPs", "source"), rows, numbers={2, 3}
    )


def _sampling_text(sampling: object) -> str:
    steps, guidance = getattr(sampling, "steps", None), getattr(sampling, "guidance", None)
    if steps is None:
        return ""
    return f" ({steps} steps" + (f", guidance {guidance:g})" if guidance is not None else ")")


def _memory(plan: Plan) -> str:
    active = plan.totals.activation_bytes
    rows = [
        ("weights", units.gib(plan.totals.weight_bytes)),
        ("activations, inference", units.gib(active.infer)),
        ("activations, training", units.gib(active.train)),
        ("activations, training with every layer checkpointed", units.gib(active.train_checkpointed)),
    ]
    marks = {True: "yes", False: "no"}
    body = "".join(
        f'<tr><td>{escape(fit.gpu)}</td><td class="n">{fit.gib:.1f} GiB</td>'
        + "".join(f'<td class="{marks[ok]}">{marks[ok]}</td>' for ok in (fit.infer, fit.train, fit.train_checkpointed))
        + "</tr>"
        for fit in plan.fits
    )
    heads = ("GPU", "memory", "inference", "training", "training, checkpointed")
    return (
        "<h2>Memory</h2>"
        + _table(("", ""), rows, numbers={1}, bare=True)
        + f"<p>Batch 1, this transformer alone on one GPU. Training state: {escape(OPTIMISER)}. {RESERVED_GIB:g} GiB and "
        f"{FRAGMENTATION:.0%} of the need are kept for the CUDA context and the allocator.</p>".replace("%", " %")
        + '<div class="wide"><table><thead><tr>'
        + "".join(f"<th>{head}</th>" for head in heads)
        + f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _seconds(seconds: Sequence[Seconds]) -> str:
    rows = [
        (
            one.gpu, units.duration(one.forward), "–" if one.clip is None else units.duration(one.clip),
            units.duration(one.attention), units.duration(one.linear), units.duration(one.memory), one.assumed,
        )
        for one in seconds
    ]  # fmt: skip
    heads = ("GPU", "forward", "clip", "attention", "matmul", "memory", "assumed")
    return (
        "<h2>Predicted time</h2><p>One GPU, batch 1, the transformer alone: no text encoder, no VAE. Attention, matmul "
        "and memory traffic are added, not overlapped. A prediction, not a measurement.</p>"
        + _table(heads, rows, numbers={1, 2, 3, 4, 5})
    )


def _recipe(plan: Plan) -> str:
    import yaml

    text = yaml.safe_dump(plan.resolved.data(), sort_keys=False, allow_unicode=True, width=100)
    plugins = [
        (str(row.get("name", "")), f"{row.get('distribution', '')} {row.get('version', '')}".strip())
        for row in plan.resolved.plugins
    ]
    used = "<h2>Plugins</h2>" + _table(("name", "package"), plugins) if plugins else ""
    return f"{used}<h2>Resolved recipe</h2><pre><code>{escape(text)}</code></pre>"


def _foot(plan: Plan) -> str:
    return (
        f"<footer>Recipe hash <code>{escape(plan.hash)}</code> · seed {plan.resolved.seed} · "
        f"ultrazoo {escape(__version__)}</footer>"
    )


def _image(content: bytes, alt: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>'


def _table(
    heads: Iterable[str],
    rows: Iterable[Sequence[str]],
    numbers: frozenset[int] | set[int] = frozenset(),
    bare: bool = False,
) -> str:
    """A table of escaped cells; columns in `numbers` are right-aligned, `bare` leaves the headings out."""

    def cell(tag: str, column: int, text: str) -> str:
        return f"<{tag}{' class=n' if column in numbers else ''}>{escape(text)}</{tag}>"

    head = "" if bare else "<thead><tr>" + "".join(cell("th", i, h) for i, h in enumerate(heads)) + "</tr></thead>"
    body = "".join("<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'
