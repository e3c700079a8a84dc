"""The gallery: every built-in attention with what it computes, costs and sees, made from the registry at build time.

A part that cannot be described stops the build, with its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from generated import option_tables, sentence

PAGE = "gallery.md"
GRIDS = ((4, 12, 16), (6, 16, 24), (8, 24, 32), (12, 32, 48))
"""Sizes of pictures, in tokens; the first that a design accepts and at which some part of it does not see everything."""

LAYERS = 4
"""First layers of which pictures are made."""

INTRODUCTION = """\
Every built-in attention, made from the registry when these pages were built: what `ultrazoo describe` prints, and what a
token may see. `ultrazoo show` draws the same for any recipe and size, `ultrazoo plan` prices it.

In the pictures, the cross is a query; dark tokens are those that its output may depend on, frame by frame, in the first
layers of a model; to the right, which blocks of keys (across) each block of queries (down) sees. *Visited* is the share of
full attention's query-key pairs that kernels visit with the minimal recipe (Wan2.1-T2V-1.3B, 832x480, 81 frames: 32 760
tokens); a design without pairs, such as linear attention, visits none.
"""


@dataclass(frozen=True)
class Entry:
    """One attention: a row of the table, its section and its picture."""

    name: str
    row: str
    section: str
    picture: bytes


def on_files(files: Any, config: Any) -> Any:
    """Add the gallery and its pictures to the documentation."""
    from mkdocs.structure.files import File

    made = list(entries())
    files.append(File.generated(config, PAGE, content=page(made)))
    for one in made:
        files.append(File.generated(config, picture_of(one.name), content=one.picture))
    return files


def picture_of(name: str) -> str:
    return f"gallery/{name.replace('/', '_')}.png"


def page(made: list[Entry]) -> str:
    """Markdown: a table of all, then a section each."""
    head = ["# Gallery", "", INTRODUCTION, "| attention | | starts | visited |", "| --- | --- | --- | ---: |"]
    return "\n".join([*head, *(one.row for one in made), *(one.section for one in made)]) + "\n"


def entries() -> Iterator[Entry]:
    """Every built-in attention, in the order of the registry. Raises RuntimeError, which names the one that fails."""
    from ultrazoo import registry

    for row in registry.entries("attention"):
        if not row.builtin:
            continue
        try:
            yield _entry(row.name)
        except Exception as error:
            raise RuntimeError(f"gallery: attention {row.name!r}: {type(error).__name__}: {error}") from error


def _entry(name: str) -> Entry:
    import ultrazoo
    from ultrazoo import registry
    from ultrazoo.analysis.comparison import visited_share
    from ultrazoo.catalog import describe
    from ultrazoo.cli.describing import yaml
    from ultrazoo.cost.units import percent

    found = describe(name, "attention")
    for what in ("summary", "formula", "source", "start", "recipe"):
        if not getattr(found, what):
            raise ValueError(f"has no {what}")
    visited = percent(visited_share(ultrazoo.plan(found.recipe)))
    picture, caption = _picture(registry.find("attention", name))
    lines = ["", f"## {name}", "", sentence(found.summary), "", "```text", found.formula, "```", ""]
    lines += [f"- source: {found.source}"]
    lines += ["- also called " + ", ".join(f"`{alias}`" for alias in found.aliases)] if found.aliases else []
    lines += [f"- starts {found.start}", f"- visited: {visited}"]
    lines += [f"- exports to {', '.join(found.export)}"] if found.export else []
    lines += [f"- {limit}" for limit in found.limits]
    lines += ["", f"![What a query of {name} may depend on]({picture_of(name)})", "", f"*{caption}*"]
    lines += option_tables(registry.find("attention", name))
    lines += ["", "```yaml", yaml(found.recipe), "```"]
    kind = found.start.partition(" (")[0]
    row = f"| [{name}](#{_anchor(name)}) | {_cell(found.summary)} | {kind} | {visited} |"
    return Entry(name, row, "\n".join(lines), picture)


def _anchor(name: str) -> str:
    from markdown.extensions.toc import slugify

    return str(slugify(name, "-"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _picture(cls: Any) -> tuple[bytes, str]:
    """A small picture of the design with its minimal options, and a caption that says its size."""
    from ultrazoo.analysis.blockpictures import thumbnail
    from ultrazoo.analysis.blocks import block_maps
    from ultrazoo.analysis.influence import default_query, grouped
    from ultrazoo.analysis.pictures import image
    from ultrazoo.options import parse

    written, problems = parse(cls, cls.minimal)
    if written is None:
        raise ValueError(f"its minimal options do not parse: {problems}")
    drawn, complaint = None, ""
    for grid, sites in _sites():
        legal, complaint = _expanded(written, sites)
        if not legal:
            continue
        query = default_query(grid)
        groups = grouped(sites, legal, query, [written] * len(sites))
        drawn = drawn or (grid, sites, legal, groups)
        if any(view.share < 1 for group in groups for view in group.views):
            drawn = (grid, sites, legal, groups)
            break
    if drawn is None:
        raise ValueError(f"no picture's size suits it: {complaint}")
    grid, sites, legal, groups = drawn
    maps = [block_maps(legal[group.layers[0]], sites[group.layers[0]], answers=20_000_000) for group in groups]
    bound = "; an upper bound, the data select inside" if any(group.selects for group in groups) else ""
    sizes = "x".join(map(str, grid))
    block = "x".join(map(str, next(iter(maps[0].values())).block))
    query = ", ".join(f"{axis} = {place}" for axis, place in zip("tyx", groups[0].query, strict=True))
    everything = "; a query may depend on every token" if all(group.whole.share == 1 for group in groups) else ""
    caption = f"Grid {sizes}, query {query}, blocks of {block} tokens, minimal options{everything}{bound}."
    return image(thumbnail(groups, maps)), caption


def _sites() -> Iterator[tuple[Any, list[Any]]]:
    """The first layers of the minimal recipes' backbone at the sizes of pictures."""
    from ultrazoo import registry
    from ultrazoo.grid import Grid

    wan = registry.find("backbone", "wan")
    backbone = wan(**wan.presets["t2v_1_3b"])
    for size in GRIDS:
        yield Grid(*size), list(backbone.sites(Grid(*size))[:LAYERS])


def _expanded(written: Any, sites: list[Any]) -> tuple[list[Any], str]:
    """The design of every layer as it runs, or nothing and the first problem."""
    expanded = []
    for site in sites:
        found = written.problems(site)
        spec = written if found else written.expand(site)
        found = found or spec.problems(site)
        if found:
            return [], str(found[0])
        expanded.append(spec)
    return expanded, ""
