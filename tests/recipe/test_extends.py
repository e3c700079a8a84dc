"""`extends`: mappings merge, lists replace, another name drops, null deletes, circles and missing files are errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.samples import problems_of, small, write
from ultrazoo import recipe
from ultrazoo.errors import RecipeError

BASE = """
name: base
summary: words of the base
source: a paper
video: {width: 160, height: 144, frames: 9}
backbone: {name: wan, dim: 48, layers: 6, heads: 4, ffn_dim: 64, text_dim: 16, text_tokens: 4, time_dim: 8}
attention:
  "*":
    name: branched
    branches:
      near: {layout: {name: windows, counts: [3, 2]}}
      far: {compress: {name: avg_pool, factor: 2}}
    fuse: {name: weights, weights: {near: 0.5, far: 0.5}}
  0-1: full
"""


def child(folder: Path, text: str, *overrides: str) -> dict:
    write(folder, "base.yaml", BASE)
    return recipe.load(write(folder, "child.yaml", text), overrides).data()


def test_mappings_merge_and_lists_replace(tmp_path: Path) -> None:
    data = child(
        tmp_path,
        """
        extends: base.yaml
        video: {frames: 5}
        attention: {"*": {branches: {near: {layout: {counts: [4]}}}}}
        """,
    )
    assert data["video"] == {"width": 160, "height": 144, "frames": 5}
    star = data["attention"]["*"]
    assert star["branches"]["near"] == {"layout": {"name": "windows", "counts": [4]}}
    assert star["branches"]["far"] == {"compress": {"name": "avg_pool", "factor": 2}}
    assert data["attention"]["0-1"] == "full"


def test_a_recipe_keeps_its_own_name_and_words(tmp_path: Path) -> None:
    data = child(tmp_path, "extends: base.yaml\n")
    assert (data["name"], data.get("summary"), data["source"]) == ("child", None, "a paper")


def test_the_same_name_merges_another_drops(tmp_path: Path) -> None:
    data = child(
        tmp_path,
        """
        extends: base.yaml
        attention:
          "*":
            branches:
              near: {layout: {name: windows, ragged: resize}}
              far: {compress: {name: stride}}
            fuse: lse
          0-1: {kernel: math}
        """,
    )
    star = data["attention"]["*"]
    assert star["branches"]["near"]["layout"] == {"name": "windows", "counts": [3, 2], "ragged": "resize"}
    assert star["branches"]["far"]["compress"] == {"name": "stride"}
    assert star["fuse"] == "lse"
    # a part written by its bare name merges as the mapping it stands for
    assert data["attention"]["0-1"] == {"name": "full", "kernel": "math"}


def test_null_deletes_entries_of_attention_and_branches(tmp_path: Path) -> None:
    data = child(
        tmp_path,
        """
        extends: base.yaml
        attention:
          "*": {branches: {far: null}, fuse: {weights: null}}
          0-1: null
        """,
    )
    assert list(data["attention"]) == ["*"]
    assert list(data["attention"]["*"]["branches"]) == ["near"]
    assert data["attention"]["*"]["fuse"] == {"name": "weights", "weights": None}


def test_null_that_deletes_nothing_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        child(tmp_path, "extends: base.yaml\nattention:\n  3-4: null\n  0-2: {branches: {x: null}}\n")
    assert [(p.path, p.line) for p in caught.value.problems] == [
        ("attention.3-4", 3),
        ("attention.0-2.branches.x", 4),
    ]


def test_a_cycle_takes_the_place_of_a_node_and_a_node_that_of_a_cycle(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", BASE)
    write(tmp_path, "cyc.yaml", 'extends: base.yaml\nattention: {"*": {cycle: [full, original]}}\n')
    data = recipe.load(write(tmp_path, "last.yaml", "extends: cyc.yaml\n")).data()
    assert data["attention"]["*"] == {"cycle": ["full", "original"]}
    data = recipe.load(write(tmp_path, "last.yaml", 'extends: cyc.yaml\nattention: {"*": {name: full}}\n')).data()
    assert data["attention"]["*"] == {"name": "full"}


def test_grid_and_pixels_put_each_other_out_of_force(tmp_path: Path) -> None:
    assert child(tmp_path, "extends: base.yaml\nvideo: {grid: [1, 4, 4]}\n")["video"] == {"grid": [1, 4, 4]}
    assert child(tmp_path, "extends: base.yaml\n", "video.grid=[1, 4, 4]")["video"] == {"grid": [1, 4, 4]}
    both = problems_of(small(video={"grid": [1, 2, 2], "width": 32}))
    assert [p.path for p in both] == ["video.width"]


def test_later_bases_win_and_diamonds_are_legal(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", BASE)
    write(tmp_path, "sub/a.yaml", "extends: ../base.yaml\nseed: 1\ndtype: float32\n")
    write(tmp_path, "sub/b.yaml", "extends: ../base.yaml\nseed: 2\n")
    data = recipe.load(write(tmp_path, "c.yaml", "extends: [sub/a.yaml, sub/b.yaml]\n")).data()
    assert (data["seed"], data["dtype"]) == (2, "float32")


def test_shipped_names_can_be_extended(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.yaml", "extends: ultragen_4k\nvideo: {frames: 29}\n")
    assert recipe.load(path).data()["video"] == {"width": 3840, "height": 2176, "frames": 29}
    assert recipe.load({"extends": "dit_tiny", "name": "mine"}).data()["backbone"]["name"] == "dit"


def test_a_circle_is_named_whole(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "seed: 1\nextends: [c.yaml]\n")
    write(tmp_path, "c.yaml", "extends: b.yaml\n")
    found = problems_of(tmp_path / "a.yaml")
    assert len(found) == 1
    assert "b.yaml → " in found[0].rule
    assert found[0].rule.count("b.yaml") == 2
    assert found[0].file is not None
    assert found[0].file.endswith("c.yaml")
    write(tmp_path, "self.yaml", "extends: self.yaml\n")
    assert "circle" in problems_of(tmp_path / "self.yaml")[0].rule


def test_a_fan_of_files_is_cut(tmp_path: Path) -> None:
    write(tmp_path, "f0.yaml", "seed: 1\n")
    for level in range(1, 12):
        write(tmp_path, f"f{level}.yaml", f"extends: [f{level - 1}.yaml, f{level - 1}.yaml]\n")
    assert any("more than 100 files" in p.rule for p in problems_of(tmp_path / "f11.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: nope.yaml\n", "nope.yaml: no such file"),
        ("extends: ultragen_4q\n", "did you mean 'ultragen_4k'?"),
        ("extends: 3\n", "expected a path or a recipe's name"),
        ("extends: [a, {b: c}]\n", "expected a path or a recipe's name"),
        ("extends: bad.yaml\n", "not YAML"),
        ("extends: list.yaml\n", "a recipe is a mapping"),
        ("extends: empty.yaml\n", "empty"),
        ("extends: .\n", "is a directory"),
    ],
)
def test_bases_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path, "bad.yaml", "a: [\n")
    write(tmp_path, "list.yaml", "- 1\n")
    write(tmp_path, "empty.yaml", "# nothing\n")
    found = problems_of(write(tmp_path, "child.yaml", text))
    assert any(words in str(problem) for problem in found)


def test_problems_name_the_file_that_wrote_them(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", BASE.replace("near: {layout", "near: {lay_out"))
    path = write(tmp_path, "child.yaml", "extends: base.yaml\nvideo: {width: 161}\n")
    found = {problem.path: problem for problem in problems_of(path)}
    assert found["attention.*.branches.near.lay_out"].file.endswith("base.yaml")
    assert found["attention.*.branches.near.lay_out"].line == 11
    assert found["video.width"].file.endswith("child.yaml")
    assert found["video.width"].line == 2
