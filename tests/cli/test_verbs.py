"""What each verb answers, as text and as JSON."""

from __future__ import annotations

import json

import pytest
import yaml

import ultrazoo
from tests.cli.program import here
from ultrazoo import registry


def test_check(capsys, place):
    ran = here(capsys, "check", "tiny.yaml")
    assert (ran.code, ran.out, ran.err) == (0, "tiny.yaml: ok\n", "")
    (place / "bad.yaml").write_text(
        "schema: 1\nname: bad\nvideo: {grid: [1, 8, 8]}\nbackbone: {name: wan}\natention: 3\n"
    )
    ran = here(capsys, "check", "tiny.yaml", "bad.yaml")
    assert ran.code == 2
    assert "tiny.yaml: ok" in ran.out
    assert "atention (line 5)" in ran.out
    assert "did you mean 'attention'?" in ran.out
    rows = json.loads(here(capsys, "check", "tiny.yaml", "bad.yaml", "--json").out)
    assert [row["ok"] for row in rows] == [True, False]
    assert ("atention", 5) in {(row["path"], row["line"]) for row in rows[1]["problems"]}


def test_plan(capsys, place):
    ran = here(capsys, "plan", "tiny.yaml")
    assert ran.code == 0
    made = ultrazoo.plan("tiny.yaml")
    for words in (made.hash, "ultragen = branched", "regional", "H100 80GB", "needs tuning", "exact", "of peak"):
        assert words in ran.out
    data = json.loads(here(capsys, "plan", "tiny.yaml", "--json").out)
    assert data == json.loads(json.dumps(made.to_json()))
    assert {"schema", "name", "hash", "grid", "tokens", "layers", "totals", "clip", "fits", "plugins", "recipe"} <= set(
        data
    )
    rows = here(capsys, "plan", "tiny.yaml", "--layers").out
    assert all(f"\n{layer} " in rows for layer in (0, 1, 2))


def test_plans_side_by_side(capsys, place):
    ran = here(capsys, "plan", "tiny.yaml", "tiny.yaml", "attention.*.variant=released")
    assert ran.code == 0
    assert "attention speedup" in ran.out
    rows = json.loads(here(capsys, "plan", "tiny.yaml", "tiny.yaml", "--json").out)
    assert len(rows) == 2
    assert rows[0]["hash"] == rows[1]["hash"] == ultrazoo.plan("tiny.yaml").hash


def test_overrides_stand_anywhere_after_the_verb(capsys, place):
    data = json.loads(here(capsys, "plan", "video.frames=1", "tiny.yaml", "--json", "dtype=float32").out)
    assert data["grid"] == [1, 16, 16]
    assert data["recipe"]["dtype"] == "float32"


def test_a_path_with_an_equals_sign_is_a_recipe(capsys, place):
    folder = place / "a=1"
    folder.mkdir()
    (folder / "r.yaml").write_text((place / "tiny.yaml").read_text())
    assert here(capsys, "check", "a=1/r.yaml").code == 0
    (place / "b=2.yaml").write_text((place / "tiny.yaml").read_text())
    assert here(capsys, "check", "b=2.yaml").code == 0


def test_schema(capsys, place):
    import jsonschema

    ran = here(capsys, "schema")
    schema = json.loads(ran.out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load((place / "tiny.yaml").read_text()), schema)
    assert here(capsys, "schema", "-o", "s.json").code == 0
    assert json.loads((place / "s.json").read_text()) == schema
    ran = here(capsys, "schema", "-o", "absent/s.json")
    assert ran.code == 2
    assert "cannot write absent/s.json" in ran.err


def test_show(capsys, place):
    ran = here(capsys, "show", "tiny.yaml", "--query", "1,3,4")
    assert ran.code == 0
    assert "query t=1 y=3 x=4" in ran.out
    assert "needs tuning" in ran.out
    data = json.loads(here(capsys, "show", "tiny.yaml", "--json").out)
    assert [group["layers"] for group in data["groups"]] == [[0], [1], [2]]
    assert "query" in here(capsys, "show", "tiny.yaml", "--query", "9,9,99").err
    ran = here(capsys, "show", "tiny.yaml", "-o", "pictures", "--format", "svg")
    assert sorted(ran.out.split()) == ["pictures/tiny_influence.svg", "pictures/tiny_layers.svg"]
    assert (place / "pictures/tiny_influence.svg").read_text().startswith("<?xml")
    assert here(capsys, "show", "tiny.yaml", "-o", "pictures", "--format", "svg").code == 2
    assert here(capsys, "show", "tiny.yaml", "-o", "pictures", "--format", "svg", "--force").code == 0


@pytest.mark.parametrize(
    ("kind", "name"), [(row.kind, row.name) for row in registry.entries() if row.builtin], ids=lambda value: str(value)
)
def test_describe_gives_a_recipe_that_checks(capsys, place, kind, name):
    ran = here(capsys, "describe", name, "--kind", kind)
    assert ran.code == 0
    assert f"{kind} {name}: " in ran.out
    found = json.loads(here(capsys, "describe", name, "--kind", kind, "--json").out)
    assert found["summary"]
    assert all(row["doc"] for row in found["options"]), [row["name"] for row in found["options"] if not row["doc"]]
    if kind == "attention":
        assert found["start"].startswith(("exact", "training-free", "needs tuning"))
        assert found["export"]
        assert found["limits"]
    # the recipe as printed, not the one in memory
    text = ran.out.split("minimal recipe\n")[1]
    (place / "minimal.yaml").write_text(text)
    ran = here(capsys, "check", "minimal.yaml")
    assert (ran.code, ran.out) == (0, "minimal.yaml: ok\n")


def test_describe_tells_kinds_apart(capsys):
    # an alias of one part, and the name of another
    assert "kernel math" in here(capsys, "describe", "reference").out
    assert "layout strided" in here(capsys, "describe", "grid").out
    assert here(capsys, "describe", "Dense").code == 0


def test_env(capsys):
    ran = here(capsys, "env")
    assert ran.code == 0
    for words in ("torch", "sdpa", "flash_attn", "not installed", "cpu"):
        assert words in ran.out
    data = json.loads(here(capsys, "env", "--json").out)
    assert data["system"]["ultrazoo"] == ultrazoo.__version__
    assert {row["name"]: row["reason"] for row in data["kernels"]}["sdpa"] == ""
    assert data["devices"][0]["device"] == "cpu"


def test_shipped_recipes_are_listed(capsys):
    rows = json.loads(here(capsys, "list", "recipes", "--json").out)
    assert "ultragen_4k" in {row["name"] for row in rows}
    assert all(row["summary"] and not row["problem"] for row in rows)
