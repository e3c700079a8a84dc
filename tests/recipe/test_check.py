"""Every bad input is a problem with its path, rule, fix and line; all of them are listed at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipe.samples import WAN, branched, problems_of, resolved, small, write
from ultrazoo.errors import RecipeError

LOCAL = {"layout": {"name": "windows", "counts": [3, 2]}}


def wan(**changes: Any) -> dict[str, Any]:
    return {**WAN, **changes}


BAD: list[tuple[dict[str, Any], str, str]] = [
    # sections and scalars
    ({"vidoe": {}}, "vidoe", "did you mean 'video'?"),
    ({"steps_": 1}, "steps_", "unknown section"),
    ({"schema": 2}, "schema", "upgrade ultrazoo"),
    ({"schema": "1"}, "schema", "expected a whole number"),
    ({"schema": True}, "schema", "expected a whole number, got true"),
    ({"name": "a/b"}, "name", "cannot name an output directory"),
    ({"name": "../up"}, "name", "cannot name an output directory"),
    ({"name": ""}, "name", "cannot name an output directory"),
    ({"name": 3}, "name", "expected text, got 3"),
    ({"dtype": "bf16"}, "dtype", "did you mean 'bfloat16'?"),
    ({"dtype": "int8"}, "dtype", "expected one of"),
    ({"seed": -1}, "seed", "at least 0"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"seed": 1.5}, "seed", "expected a whole number"),
    ({"seed": "no"}, "seed", 'expected a whole number, got "no"'),
    ({"sampling": {"guidance": 5}}, "sampling.steps", "needs the option 'steps'"),
    ({"sampling": {"steps": 0}}, "sampling.steps", "at least 1"),
    ({"sampling": 30}, "sampling", "expected a mapping"),
    ({"weights": {"format": "wan"}}, "weights.path", "needs the option 'path'"),
    ({"weights": {"path": "x", "format": "hub"}}, "weights.format", "expected one of"),
    ({"weights": "x.safetensors"}, "weights", "expected a mapping"),
    # sizes
    ({"video": None}, "video", "needs the section"),
    ({"video": {"width": 161, "height": 144}}, "video.width", "nearest legal: 160 or 176"),
    ({"video": {"width": 160, "height": 150}}, "video.height", "nearest legal: 144 or 160"),
    ({"video": {"width": 160, "height": 144, "frames": 7}}, "video.frames", "nearest legal: 5 or 9"),
    ({"video": {"width": 8, "height": 16}}, "video.width", "nearest legal: 16"),
    ({"video": {"width": 0, "height": 16}}, "video.width", "at least 1"),
    ({"video": {"width": 16}}, "video.height", "the video has no height"),
    ({"video": {"width": "160", "height": 144}}, "video.width", "expected a whole number"),
    ({"video": {"grid": [1, 2, 3, 4]}}, "video.grid", "expected a grid"),
    ({"video": {"grid": [1, 0, 3]}}, "video.grid", "expected a grid"),
    ({"video": {"grid": [1, 2, 3], "frames": 9}}, "video.frames", "remove 'frames'"),
    ({"video": {"grid": [1, 2, 3], "fps": 9}}, "video.fps", "unknown option"),
    # backbones
    ({"backbone": None}, "backbone", "needs the section"),
    ({"backbone": {"name": "wam"}}, "backbone.name", "did you mean 'wan'?"),
    ({"backbone": "no"}, "backbone", "unknown backbone 'no'"),
    ({"backbone": {"name": False}}, "backbone.name", "expected the name of a backbone, got false"),
    ({"backbone": {"preset": "t2v_1_3b"}}, "backbone", "this backbone has no 'name'"),
    ({"backbone": {"name": "wan", "preset": "t2v_14"}}, "backbone.preset", "did you mean 't2v_14b'?"),
    ({"backbone": {"name": "wan", "preset": "xl_2"}}, "backbone.preset", "is a preset of backbone 'dit'"),
    ({"backbone": {"name": "wan", "preset": 3}}, "backbone.preset", "expected the name of a preset"),
    ({"backbone": wan(heads=5)}, "backbone.heads", "5 heads do not divide dim 48"),
    ({"backbone": wan(heads=0)}, "backbone.heads", "at least 1"),
    ({"backbone": wan(layers=0)}, "backbone.layers", "at least 1"),
    ({"backbone": wan(layers=10**9)}, "backbone", "a model has 1 to"),
    ({"backbone": wan(depth=3)}, "backbone.depth", "unknown option of backbone 'wan'"),
    ({"backbone": wan(strides=[4, 8])}, "backbone.strides", "expected a list of 3"),
    # attention
    ({"attention": None}, "attention", "expected layer keys"),
    ({"attention": {}}, "attention", "expected layer keys"),
    ({"attention": "full"}, "attention", "expected layer keys"),
    ({"attention": {"0-3": "full"}}, "attention", "layer 4-5 of backbone wan has no attention"),
    ({"attention": {"*": "ful"}}, "attention.*", "did you mean 'full'?"),
    ({"attention": {"*": "no"}}, "attention.*", "unknown attention 'no'"),
    ({"attention": {"*": {"name": "vendor/none"}}}, "attention.*.name", "pip install"),
    ({"attention": {"*": {"kernel": "auto"}}}, "attention.*", "this attention has no 'name'"),
    ({"attention": {"*": 3}}, "attention.*", "a name or a mapping with 'name', got 3"),
    ({"attention": {"*": ["full"]}}, "attention.*", "a name or a mapping with 'name'"),
    ({"attention": {"*": {"name": "full", "window": 3}}}, "attention.*.window", "unknown option of attention 'full'"),
    ({"attention": {"*": {"name": "full", "kernel": "sdpaa"}}}, "attention.*.kernel", "sdpa"),
    ({"attention": {"*": {"name": "full", "kernel": "gathered"}}}, "attention.*.kernel", "is for block maps only"),
    ({"attention": {"*": {"name": "video_sparse", "kernel": "sdpa"}}}, "attention.*", "takes no block_map"),
    (
        {
            "sampling": {"steps": 10},
            "attention": {
                "*": {
                    "name": "block_sparse",
                    "selector": {"name": "budget", "of": {"name": "pooled"}, "steps": {"0-3": 1.0, "4-10": 0.5}},
                }
            },
        },
        "attention.*.selector.steps.4-10",
        "step 10 does not exist: sampling takes 10 steps, 0-9",
    ),
    ({"attention": {"*": "full", "0-2,27": "full"}}, "attention.0-2,27", "layer 27 does not exist"),
    ({"attention": {"*": "full", "first9": "full"}}, "attention.first9", "has 6"),
    ({"attention": {"*": "full", "0-2": "full", "2-3": "full"}}, "attention.2-3", "claimed by '0-2' too"),
    ({"attention": {"*": "full", "single:0": "full"}}, "attention.single:0", "has no group 'single'"),
    ({"attention": {"*": {"name": "branched"}}}, "attention.*.branches", "needs the option 'branches'"),
    ({"attention": {"*": {"name": "branched", "branches": {}}}}, "attention.*.branches", "at least one"),
    ({"attention": {"*": {"name": "branched", "branches": [LOCAL]}}}, "attention.*.branches", "expected a mapping"),
    (
        {"attention": {"*": branched(a={"layout": {"name": "windows", "counts": [99, 2]}})}},
        "attention.*.branches.a.layout.counts",
        "99",
    ),
    (
        {"attention": {"*": branched(a={"layout": {"name": "windows", "counts": "4"}})}},
        "attention.*.branches.a.layout.counts",
        "expected a whole number",
    ),
    (
        {"attention": {"*": branched(a={"compress": {"name": "avg_pool", "factor": -2}})}},
        "attention.*.branches.a.compress.factor",
        "must be at least 1, got -2",
    ),
    (
        {"attention": {"*": branched(a={"adapt": {"name": "lora", "rank": 0}})}},
        "attention.*.branches.a.adapt.rank",
        "must be at least 1",
    ),
    ({"attention": {"*": branched(a={"adapt": "lorra"})}}, "attention.*.branches.a.adapt", "did you mean 'lora'?"),
    ({"attention": {"*": branched(a={"lay": "whole"})}}, "attention.*.branches.a.lay", "unknown option"),
    ({"attention": {"*": {**branched(a=LOCAL), "fuse": {"name": "time_gate"}}}}, "attention.*.fuse.order", "needs"),
    (
        {"attention": {"*": {**branched(a=LOCAL, b=LOCAL), "fuse": {"name": "time_gate", "order": ["a", "c"]}}}},
        "attention.*.fuse.order",
        "c",
    ),
    # an option of the windows that were there before the name changed
    (
        {"attention": {"*": branched(a={"layout": {"name": "whole", "counts": 3}})}},
        "attention.*.branches.a.layout.counts",
        "unknown option of layout 'whole'",
    ),
    # composed designs show where in their expansion it is
    (
        {"attention": {"*": {"name": "ultragen", "windows": 20}}},
        "attention.*",
        "as it expands, at branches.local.layout",
    ),
    # cycles
    ({"attention": {"*": {"cycle": []}}}, "attention.*.cycle", "at least one item"),
    ({"attention": {"*": {"cycle": ["full"], "name": "full"}}}, "attention.*.name", "stands alone"),
    ({"attention": {"*": {"cycle": ["full", "ful"]}}}, "attention.*.cycle.1", "did you mean 'full'?"),
    ({"attention": {"*": {"cycle": "full"}}}, "attention.*", "has no 'name'"),
    (
        {"attention": {"*": branched(a={"compress": {"cycle": ["stride", {"name": "avg_pool", "factor": 0}]}})}},
        "attention.*.branches.a.compress.cycle.1.factor",
        "at least 1",
    ),
    # steps
    ({"steps": {"0-1": {"*": "full"}}}, "steps", "does not say how many there are"),
    ({"steps": ["full"], "sampling": {"steps": 4}}, "steps", "expected step keys"),
    ({"steps": {"0-4": {"*": "full"}}, "sampling": {"steps": 4}}, "steps.0-4", "step 4 does not exist"),
    ({"steps": {"0": "full"}, "sampling": {"steps": 4}}, "steps.0", "expected layer keys"),
    ({"steps": {"0": {"9": "full"}}, "sampling": {"steps": 4}}, "steps.0.9", "layer 9 does not exist"),
    ({"steps": {"0": {"1": "ful"}}, "sampling": {"steps": 4}}, "steps.0.1", "did you mean 'full'?"),
    ({"steps": {"0-2": {"1": "full"}, "2-3": {"1": "full"}}, "sampling": {"steps": 4}}, "steps.2-3", "step 2"),
    # search
    ({"search": {"spaces": {}}}, "search.spaces", "did you mean 'space'?"),
    ({"search": 3}, "search", "expected a mapping"),
    ({"search": {"space": {"attention.*.nope": {"choice": [1]}}}}, "search.space.attention.*.nope", "names nothing"),
    ({"search": {"space": {"attention.*.nme": {"choice": [1]}}}}, "search.space.attention.*.nme", "did you mean"),
    ({"search": {"space": {"seed": {"choice": [1]}}}}, "search.space.seed", "names nothing"),
    (
        {"search": {"space": {"attention.*": {"choose": ["full"]}}}},
        "search.space.attention.*",
        "did you mean 'choice'?",
    ),
    ({"search": {"space": {"attention.*": {"choice": []}}}}, "search.space.attention.*.choice", "expected a list"),
    ({"search": {"space": {"attention.*": {"choice": ["full", "ful"]}}}}, "search.space.attention.*.choice.1", "full"),
    ({"search": {"space": {"backbone.dim": {"range": [48]}}}}, "search.space.backbone.dim.range", "[low, high]"),
    ({"search": {"space": {"backbone.dim": {"range": [48, 12]}}}}, "search.space.backbone.dim.range", "below"),
    (
        {"search": {"space": {"backbone.dim": {"log_range": [0, 12]}}}},
        "search.space.backbone.dim.log_range",
        "positive",
    ),
    ({"search": {"space": {"backbone.dim": {"range": [0, 12]}}}}, "search.space.backbone.dim.range.0", "does not fit"),
]


@pytest.mark.parametrize(("changes", "path", "words"), BAD, ids=[f"{row[1]}-{i}" for i, row in enumerate(BAD)])
def test_bad_input(changes: dict[str, Any], path: str, words: str) -> None:
    found = problems_of(small(**changes))
    assert any(problem.path == path and words in str(problem) for problem in found), "\n".join(map(str, found))
    with pytest.raises(RecipeError) as caught:
        resolved(small(**changes))
    assert list(caught.value.problems) == found


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "bad.yaml",
        """\
schema: 1
video: {width: 161, height: 144, frames: 8}
backbone: {name: wan, preset: t2v_1_3b}
attention:
  "*":
    name: branched
    branches:
      local: {layout: {name: windows, cuonts: [4, 4]}}
      other:
        compress: {name: avg_pool, factor: -2}
  0-2,27-30: full
  odd: {name: ful}
seed: no
""",
    )
    found = problems_of(path)
    assert [(p.line, p.path) for p in found] == [
        (2, "video.width"),
        (2, "video.frames"),
        (8, "attention.*.branches.local.layout.cuonts"),
        (10, "attention.*.branches.other.compress.factor"),
        (11, "attention.0-2,27-30"),
        (12, "attention.odd.name"),
        (13, "seed"),
    ]
    with pytest.raises(RecipeError) as caught:
        resolved(path)
    text = str(caught.value)
    assert text.startswith(f"{caught.value.source}: 7 problems\n")
    assert "attention.*.branches.local.layout.cuonts (line 8)" in text
    assert "unknown option of layout 'windows'; did you mean 'counts'?" in text
    assert "layer 30 does not exist: backbone wan/t2v_1_3b has layers 0-29" in text


def test_one_problem_of_many_layers_is_listed_once() -> None:
    wide = branched(a={"layout": {"name": "windows", "counts": [99, 2]}})
    found = problems_of(small(attention={"*": wide}))
    assert len(found) == 1


def test_problems_at_the_site_name_the_cycle_item_that_has_them() -> None:
    layouts = {"cycle": ["whole", {"name": "windows", "counts": [99, 2]}]}
    found = problems_of(small(attention={"*": branched(a={"layout": layouts})}))
    assert [problem.path for problem in found] == ["attention.*.branches.a.layout.cycle.1.counts"]


def test_a_stale_option_after_another_name_on_the_command_line_is_refused_only_when_given_again() -> None:
    start = small(attention={"*": branched()})
    assert not problems_of(start, "attention.*.branches.one.layout.name=whole")
    found = problems_of(start, "attention.*.branches.one.layout={name: whole, counts: 3}")
    assert "unknown option of layout 'whole'" in found[0].rule


def test_parts_that_no_layer_uses_are_checked_too() -> None:
    found = problems_of(small(attention={"*": {"name": "full", "kernl": "x"}, "odd": "full", "even": "full"}))
    assert [problem.path for problem in found] == ["attention.*.kernl"]


def test_a_good_recipe_has_no_problems() -> None:
    assert problems_of(small(attention={"*": branched()})) == []


def test_a_wrong_backbone_option_hides_nothing_else() -> None:
    written = {
        "name": "several",
        "video": {"width": 1921, "height": 1088, "frames": 81},
        "backbone": {"name": "wan", "preset": "t2v_1_3b", "headz": 3},
        "attention": {"*": "full", "27-30": "full"},
    }
    paths = [problem.path for problem in problems_of(written)]
    assert sorted(paths) == ["attention.27-30", "backbone.headz", "video.width"]


def test_a_wrong_backbone_value_makes_no_problems_elsewhere() -> None:
    found = problems_of(small(backbone=wan(layers="six"), attention={"0-5": "full"}))
    assert [problem.path for problem in found] == ["backbone.layers"]


BUDGET = {"name": "block_sparse", "selector": {"name": "budget", "of": "pooled", "steps": {"0-1": 1.0}}}


@pytest.mark.parametrize(
    "outer", [BUDGET, {"name": "by_head", "groups": {"0-1": BUDGET, "2-3": "full"}}], ids=["alone", "head"]
)
def test_steps_of_a_part_want_a_number_of_steps(outer: dict[str, Any]) -> None:
    """Without it a plan would be of sparse steps, and a model would run dense."""
    wanted = small(attention={"*": outer}, sampling=None)
    (problem,) = problems_of(wanted)
    assert problem.path == "attention.*"
    assert "does not say how many there are; add sampling: {steps: 30}" in str(problem)
    assert problems_of(small(attention={"*": outer}, sampling={"steps": 4})) == []
    heads = {"name": "budget", "of": "pooled", "heads": [0.1] * WAN["heads"]}
    assert problems_of(small(attention={"*": {**BUDGET, "selector": heads}}, sampling=None)) == []


@pytest.mark.parametrize("kernel", ["flash_attn", "flash_attn_3", "xformers", "flex"])
def test_a_kernel_that_takes_no_heads_of_this_size_is_a_problem(kernel: str) -> None:
    sparse = {"name": "block_sparse"} if kernel == "flex" else {"name": "full"}
    small_heads = {**WAN, "dim": 6 * WAN["heads"]}
    at = {"backbone": small_heads, "attention": {"*": {**sparse, "kernel": kernel}}}
    (problem,) = problems_of(small(**at))
    assert problem.path == "attention.*.kernel"
    assert f"{kernel!r} can never run for this backbone: head size 6 is outside" in problem.rule
