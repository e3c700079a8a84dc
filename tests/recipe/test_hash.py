"""The hash of what a recipe means: the same for every spelling, another for every change that matters."""

from __future__ import annotations

from typing import Any

import pytest

from tests.recipe.samples import branched, resolved, small

NEAR = {"layout": {"name": "windows", "counts": [3, 2]}}
START = {
    "attention": {"*": {"name": "full"}, "odd": branched(a=NEAR, b={"compress": {"name": "avg_pool", "factor": 2}})},
    "sampling": {"steps": 4, "guidance": 5.0},
}


def hash_of(**changes: Any) -> str:
    return resolved(small(**{**START, **changes})).hash


def test_it_is_a_sha256() -> None:
    assert len(hash_of()) == 64
    assert int(hash_of(), 16) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "another"},
        {"summary": "words", "source": "a paper"},
        {"seed": 7},
        {"weights": {"path": "x.safetensors"}},
        {"schema": 1, "dtype": "bfloat16", "steps": {}, "search": None},
        {"sampling": {"guidance": 5, "steps": 4}},
        {"attention": {"odd": START["attention"]["odd"], "even": "dense"}},
        {"attention": {"*": {"cycle": ["full", START["attention"]["odd"]]}}},
        {"attention": {"0-4/2": {"name": "full", "kernel": "auto"}, "1,3,5": START["attention"]["odd"]}},
        {
            "attention": {
                **START["attention"],
                "1-5/2": branched(b={"compress": "avg_pool"}, a={**NEAR, "shift": "none"}),
            }
        },
        {"steps": {"0-1": {"0": "full"}}},
    ],
)
def test_another_spelling_or_what_is_not_the_design(changes: dict[str, Any]) -> None:
    assert hash_of(**changes) == hash_of()


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"video": {"grid": [3, 9, 11]}},
        {"sampling": {"steps": 5, "guidance": 5.0}},
        {"sampling": {"steps": 4}},
        {"sampling": None},
        {"attention": {"*": "full"}},
        {"attention": {"*": "full", "even": START["attention"]["odd"]}},
        {"attention": {**START["attention"], "0": {"name": "full", "kernel": "math"}}},
        {"backbone": {**small()["backbone"], "ffn_dim": 65}},
        {"steps": {"0-1": {"odd": "full"}}},
    ],
)
def test_another_design(changes: dict[str, Any]) -> None:
    assert hash_of(**changes) != hash_of()


def test_a_preset_is_what_it_stands_for() -> None:
    spelled = {"name": "wan", "trained": [21, 30, 52]}
    preset = {"name": "wan", "preset": "t2v_1_3b"}
    assert hash_of(backbone=spelled) == hash_of(backbone=preset)


def test_it_stays_the_same_from_release_to_release() -> None:
    # artefacts carry it: a change here makes every saved hash stale and belongs in the changelog
    fixed = {
        "video": {"width": 64, "height": 64, "frames": 5},
        "backbone": {"name": "wan", "preset": "t2v_1_3b"},
        "attention": {"*": {"name": "full"}},
    }
    assert resolved(fixed).hash == "43b2b5a1b93abcba1d53ad97b3effa56cfba94ed2600ac26a75db08a58c534ff"
