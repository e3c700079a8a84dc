"""What a recipe stands for: presets, cycles, steps, compositions, head groups, search, weights, provenance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from tests.recipe.samples import WAN, branched, names, problems_of, resolved, small, write
from ultrazoo import recipe, registry
from ultrazoo.attention.full import FullSpec
from ultrazoo.errors import Problem
from ultrazoo.grid import Grid
from ultrazoo.spec import AttentionSpec, Site


def test_presets_are_spread_and_can_be_overridden() -> None:
    one = resolved(small(backbone={"name": "wan", "preset": "t2v_14b", "layers": 3}))
    assert (one.backbone.dim, one.backbone.layers, one.backbone.ffn_dim) == (5120, 3, 13824)
    assert resolved(small(backbone={"name": "wan", "preset": "t2v_1_3b"}, video={"grid": [1, 4, 4]})).hash != one.hash


def test_sizes_become_grids() -> None:
    video = {"width": 832, "height": 480, "frames": 81}
    assert resolved(small(video=video)).grid == Grid(21, 30, 52)
    assert resolved(small(video={"grid": [4, 5]})).grid == Grid(1, 4, 5)
    assert resolved("ultragen_4k").grid.tokens == 685_440


def test_the_winner_replaces_the_whole_node() -> None:
    one = resolved(small(attention={"*": {"name": "full", "kernel": "math"}, "odd": "full", "0": "original"}))
    assert names(one) == ["original", *["full"] * 5]
    assert [spec.kernel for spec in one.attention[1:]] == ["auto", "math", "auto", "math", "auto"]


def test_cycles_are_indexed_by_layer() -> None:
    one = resolved(small(attention={"*": {"cycle": ["full", "original", branched()]}}))
    assert names(one) == ["full", "original", "branched"] * 2
    counts = {"cycle": [[1, 1], [2, 2], [3, {"cycle": [1, 2]}]]}
    one = resolved(small(attention={"*": branched(a={"layout": {"name": "windows", "counts": counts}})}))
    assert [spec.branches["a"].layout.counts for spec in one.attention] == [
        (1, 1),
        (2, 2),
        (3, 1),
        (1, 1),
        (2, 2),
        (3, 2),
    ]


def test_layers_that_say_the_same_share_one_spec() -> None:
    one = resolved("ultragen_4k")
    assert len({id(spec) for spec in one.attention}) == 1


def test_steps_are_runs_with_what_they_change() -> None:
    one = resolved(
        small(
            sampling={"steps": 10},
            steps={"0-2,5": {"odd": "original", "0": "full"}, "*": {"5": "original"}, "last1": {"*": "original"}},
        )
    )
    assert [(run.first, run.last, sorted(run.layers)) for run in one.steps] == [
        (0, 2, [1, 3, 5]),
        (3, 4, [5]),
        (5, 5, [1, 3, 5]),
        (6, 8, [5]),
        (9, 9, [0, 1, 2, 3, 4, 5]),
    ]


def test_steps_that_change_nothing_are_no_steps() -> None:
    assert resolved(small(sampling={"steps": 4}, steps={"0-1": {"*": "full"}})).steps == ()


def test_steps_are_priced_in_the_clip() -> None:
    plain = recipe.make_plan(resolved(small(sampling={"steps": 4}, attention={"*": branched()})))
    mixed = small(sampling={"steps": 4}, attention={"*": branched()}, steps={"0-1": {"*": "full"}})
    assert recipe.make_plan(resolved(mixed)).clip.flops > plain.clip.flops


def test_compositions_expand_and_stay_visible() -> None:
    one = resolved("ultragen_1080p_released")
    assert {spec.name for spec in one.written} == {"ultragen"}
    assert names(one) == ["full"] * 3 + ["branched"] * 24 + ["full"] * 3
    layers = recipe.make_plan(one).layers
    assert (layers[5].written, layers[5].attention) == ("ultragen", "branched")


def test_written_out_and_composed_are_one_design() -> None:
    composed = resolved("ultragen_4k", "attention.*={name: ultragen, variant: paper}")
    assert composed.hash == resolved("ultragen_4k").hash


def test_head_groups() -> None:
    groups = {"0-1": "full", "2-3": branched()}
    one = resolved(small(attention={"*": {"name": "by_head", "groups": groups}}))
    assert set(names(one)) == {"by_head"}
    found = problems_of(small(attention={"*": {"name": "by_head", "groups": {"0-1": "ful"}}}))
    assert found[0].path == "attention.*.groups.0-1"
    assert problems_of(small(attention={"*": {"name": "by_head", "groups": {"0-1": "full"}}}))


def test_aliases_are_the_parts_they_name() -> None:
    assert resolved(small(attention={"*": "dense"})).hash == resolved(small()).hash


def test_search_spaces_keep_the_plain_value() -> None:
    space = {
        "attention.*.branches.one.layout.counts": {"choice": [[3, 2], [2, 2]]},
        "sampling.guidance": {"range": [1, 9, 0.5]},
        "backbone.ffn_dim": {"log_range": [64, 256]},
        "attention.*.branches.one.layout": {"choice": ["whole", {"name": "strided", "counts": 2}]},
        "video.grid.1": {"choice": [8, 9]},
    }
    source = small(attention={"*": branched()}, sampling={"steps": 4, "guidance": 5}, search={"space": space})
    one = resolved(source)
    assert one.search == space
    assert one.hash == resolved({**source, "search": None}).hash
    # its paths name entries of the recipe as written, which the resolved one need not have
    assert "search" not in one.data()


def test_weights_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "extends: dit_tiny\nweights: {path: ck/model.safetensors, format: ultrazoo}\n"
    path = write(tmp_path, "sub/mine.yaml", text)
    assert resolved(path).weights.path == str(tmp_path / "sub/ck/model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert resolved("sub/mine.yaml").weights.path == str(tmp_path / "sub/ck/model.safetensors")
    assert resolved("sub/mine.yaml", "weights.path=here.ckpt").weights.path == str(tmp_path / "here.ckpt")
    assert resolved(resolved("sub/mine.yaml").data()).weights.path == str(tmp_path / "sub/ck/model.safetensors")


@dataclass(frozen=True, kw_only=True)
class EverySecond(AttentionSpec):
    """A plugin that stands for full attention and refuses layer 3."""

    name: ClassVar[str] = "acme/second"

    def problems(self, site: Site) -> list[Problem]:
        return [Problem("", "not in layer 3")] if site.layer == 3 and site.layers == 6 else []

    def expand(self, site: Site) -> AttentionSpec:
        return FullSpec()


@pytest.fixture
def plugin():
    registry.register(EverySecond)
    yield
    registry.forget("attention", "acme/second")


@pytest.mark.usefixtures("plugin")
def test_provenance_of_plugins() -> None:
    one = resolved(small(attention={"*": "acme/second", "3": "full"}))
    assert [(row["kind"], row["name"]) for row in one.plugins] == [("attention", "acme/second")]
    assert resolved(small()).plugins == ()


@pytest.mark.usefixtures("plugin")
def test_problems_of_single_layers() -> None:
    found = problems_of(small(attention={"*": "acme/second"}))
    assert [(problem.path, problem.rule) for problem in found] == [("attention.*", "not in layer 3")]


def test_specs_can_stand_in_a_mapping() -> None:
    assert resolved(small(attention={"*": FullSpec(kernel="math")})).attention[0] == FullSpec(kernel="math")
    assert resolved(small(attention={0: "original", "*": "full"})).attention[0].name == "original"


def test_what_a_recipe_may_leave_out() -> None:
    one = resolved({"video": {"grid": [2, 4, 4]}, "backbone": WAN, "attention": {"*": "full"}})
    assert (one.name, one.dtype, one.seed, one.sampling, one.weights) == ("recipe", "bfloat16", 0, None, None)
    assert recipe.make_plan(one).clip.forwards == 1


def test_plan_json_has_the_agreed_keys() -> None:
    data = recipe.make_plan(resolved("ultragen_tiny")).to_json()
    flops = {"attention_flops", "projection_flops", "other_flops"}
    assert set(data) == {
        *(
            "schema",
            "name",
            "hash",
            "grid",
            "tokens",
            "layers",
            "totals",
            "clip",
            "fits",
            "plugins",
            "kernels",
            "recipe",
        ),
    }
    assert set(data["layers"][0]) == flops | {
        *("layer", "attention", "pairs", "keys_per_query", "extra_parameters", "branches"),
    }
    assert set(data["totals"]) == flops | {
        *("parameters", "extra_parameters", "attention_speedup", "weight_bytes", "activation_bytes"),
    }
    assert set(data["totals"]["activation_bytes"]) == {"infer", "train", "train_checkpointed"}
    assert set(data["clip"]) == {"forwards", "flops"}
    assert set(data["fits"][0]) == {"gpu", "gib", "infer", "train", "train_checkpointed"}
    assert resolved(data["recipe"]).hash == data["hash"]
