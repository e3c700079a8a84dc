"""What each verb answers, as text and as JSON."""

from __future__ import annotations

import json

import pytest
import yaml

import ultrazoo
from tests.cli.program import here
from ultrazoo import registry
from ultrazoo.cost.units import interval


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
    # what plan.json holds, and what the text has beside it
    agreed = json.loads(json.dumps(made.to_json()))
    assert {**data, "layers": None, "totals": None} == {
        **agreed,
        "layers": None,
        "totals": None,
        "seconds": data["seconds"],
    }
    assert agreed["totals"].items() <= data["totals"].items()
    for row, layer in zip(agreed["layers"], data["layers"], strict=True):
        assert all(layer[key] == value for key, value in row.items())
    assert [row["gpu"] for row in data["seconds"]] == [row.gpu for row in made.seconds]
    assert {"schema", "name", "hash", "grid", "tokens", "layers", "totals", "clip", "fits", "plugins", "recipe"} <= set(
        data
    )
    rows = here(capsys, "plan", "tiny.yaml", "--layers").out
    assert all(f"\n{layer} " in rows for layer in (0, 1, 2))


def test_plan_as_json_has_what_the_text_says(capsys, place):
    made = ultrazoo.plan("tiny.yaml", "attention.1={name: skip_softmax}")
    data = json.loads(here(capsys, "plan", "tiny.yaml", "attention.1={name: skip_softmax}", "--json").out)
    for one, row in zip(made.layers, data["layers"], strict=True):
        assert (row["written"], row["start"], row["peak_bytes"]) == (one.written, one.start, one.peak_bytes)
        assert (row["pairs_min"], row["pairs_max"]) == (one.pairs_min, one.pairs_max)
        visited = one.pairs if one.visited_pairs is None else one.visited_pairs
        assert (row["visited_pairs"], row["full_pairs"]) == (visited, one.full_pairs)
        assert row["visited_share"] == visited / one.full_pairs
    assert data["layers"][1]["pairs_min"] < data["layers"][1]["pairs_max"]
    assert data["totals"]["peak_bytes"] == max(one.peak_bytes for one in made.layers)
    assert data["totals"]["flops"] == made.totals.flops
    assert 0 < data["totals"]["visited_share"] <= 1
    dry = json.loads(here(capsys, "build", "tiny.yaml", "attention.1={name: skip_softmax}", "--dry-run", "--json").out)
    assert dry == data


def test_rows_of_layers_are_for_one_plan(capsys, place):
    for line in (("tiny.yaml", "tiny.yaml"), ("tiny.yaml", "--plot", "x.png")):
        ran = here(capsys, "plan", *line, "--layers")
        assert (ran.code, ran.out) == (2, "")
        assert "--layers is for one plan" in ran.err
    assert not (place / "x.png").exists()


def test_describe_says_which_numbers_are_legal(capsys):
    ran = here(capsys, "describe", "subblock")
    assert "a number, 0 ≤ x < 1 " in ran.out
    assert "a list of 2 whole numbers, x ≥ 1 " in ran.out
    options = json.loads(here(capsys, "describe", "subblock", "--json").out)["options"]
    bounds = {row["name"]: row["bounds"] for row in options}
    assert (bounds["sparsity"], bounds["kernel"]) == ({"ge": 0, "lt": 1}, {})


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({}, ""),
        ({"ge": 1}, "x ≥ 1"),
        ({"gt": 0}, "x > 0"),
        ({"le": 4}, "x ≤ 4"),
        ({"lt": 0.5}, "x < 0.5"),
        ({"gt": 0, "le": 1000000}, "0 < x ≤ 1000000"),
    ],
)
def test_intervals(bounds, words):
    assert interval(bounds) == words


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
    names = [f"pictures/tiny_{what}.svg" for what in ("blocks", "influence", "layers")]
    assert sorted(ran.out.split()) == names
    assert "coverage: after 1 layer" in ran.err
    assert (place / "pictures/tiny_influence.svg").read_text().startswith("<?xml")
    assert here(capsys, "show", "tiny.yaml", "-o", "pictures", "--format", "svg").code == 2
    assert here(capsys, "show", "tiny.yaml", "-o", "pictures", "--format", "svg", "--force").code == 0


def test_show_says_who_met_whom(capsys, place):
    ran = here(capsys, "show", "tiny.yaml", "--layer", "1", "--block", "1,8,8", "--query", "0,0,0")
    assert ran.code == 0
    assert "layer 1: ultragen = branched; 12 blocks of 1x8x8 tokens, every query looked at" in ran.out
    assert "layer 0" not in ran.out
    assert "coverage: after 1 layer every token can have influenced every other (exact, from all 768 tokens" in ran.out
    data = json.loads(here(capsys, "show", "tiny.yaml", "--json", "--layer", "1", "--block", "1,8,8").out)
    assert data["coverage"]["layers"] == 1
    (group,) = data["groups"]
    assert (group["layers"], group["blocks"]["local"]["block"]) == ([1], [1, 8, 8])
    assert len(group["blocks"]["all"]["share"]) == 12
    for wrong in (("--layer", "3"), ("--block", "1,1,1"), ("--block", "x")):
        ran = here(capsys, "show", "tiny.yaml", *wrong)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err


@pytest.mark.parametrize("name", [row.name for row in registry.entries("attention") if row.builtin])
def test_every_attention_can_be_shown_and_compared(capsys, place, name):
    """By its minimal recipe: views, maps and coverage have answers, and it stands beside full attention."""
    recipe = here(capsys, "describe", name, "--kind", "attention").out.split("minimal recipe\n")[1]
    (place / "minimal.yaml").write_text(recipe)
    sizes = ["video={grid: [6, 16, 24]}", "backbone={name: wan, layers: 2, dim: 1536, heads: 12}"]
    ran = here(capsys, "show", "minimal.yaml", *sizes, "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert data["coverage"]["unknown"] == ""
    for group in data["groups"]:
        assert group["branches"][-1]["tokens"] > 0
        share = group["blocks"]["all"]["share"]
        assert all(0 < share[i][i] <= 1 for i in range(len(share)))
    rows = json.loads(here(capsys, "plan", "tiny.yaml", "minimal.yaml", *sizes, "--json").out)
    assert 0 <= rows[1]["visited share"] <= 1.2
    assert rows[1]["coverage"]["layers"] == data["coverage"]["layers"]
    assert rows[1]["peak in one attention"] > 0


def test_plan_says_coverage_and_peak_memory(capsys, place):
    text = here(capsys, "plan", "tiny.yaml").out
    assert "peak: most bytes alive at once inside the attention" in text
    assert "coverage" not in text
    assert "coverage: after 1 layer" in here(capsys, "plan", "tiny.yaml", "--coverage").out
    data = json.loads(here(capsys, "plan", "tiny.yaml", "--coverage", "--json").out)
    assert data["coverage"]["found"] == "all"
    made = ultrazoo.plan("tiny.yaml")
    want = made.resolved.attention[1].cost(made.resolved.sites[1]).peak_elements * 2
    assert made.layers[1].peak_bytes == want
    assert f"{want / 2**20:.2f} MiB" in text


def test_plot_of_plans(capsys, place):
    ran = here(capsys, "plan", "tiny.yaml", "tiny.yaml", "--plot", "out/plans.svg")
    assert (ran.code, ran.err) == (0, "out/plans.svg\n")
    assert "tiny #2" in (place / "out/plans.svg").read_text()
    assert "visited share" in ran.out
    ran = here(capsys, "plan", "tiny.yaml", "--plot", "out/plans.svg")
    assert (ran.code, ran.out) == (2, "")
    assert "--force overwrites it" in ran.err
    assert here(capsys, "plan", "tiny.yaml", "--plot", "out/plans.svg", "--force", "--json").code == 0
    assert "tiny #2" not in (place / "out/plans.svg").read_text()
    assert here(capsys, "plan", "tiny.yaml", "--plot", "one.png").code == 0
    assert (place / "one.png").read_bytes().startswith(b"\x89PNG")
    for wrong in ("plans.pdf", "plans", "tiny.yaml/x.png"):
        assert here(capsys, "plan", "tiny.yaml", "--plot", wrong).code == 2
    assert "--force overwrites the file of --plot" in here(capsys, "plan", "tiny.yaml", "--force").err


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
        # a design that does not export says so, and why
        assert found["export"] or "does not export" in found["limits"]
        assert found["limits"]
        assert found["formula"]
        assert found["source"]
        for heading in ("source", "start", "formula\n  ", "limits\n", "minimal recipe\n"):
            assert heading in ran.out, heading
        assert ("option " in ran.out) == bool(found["options"])
        assert all(row["required"] or f"{row['name']} " in ran.out for row in found["options"])
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


@pytest.mark.parametrize(
    ("name", "other"),
    [("radial", "selector"), ("linear", "far_field"), ("skip_softmax", "kernel")],
)
def test_a_name_of_an_attention_and_a_part_is_the_attention(capsys, name, other):
    ran = here(capsys, "describe", name)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"attention {name}: ")
    assert "also a" in ran.out
    assert f"{other} (--kind {other})" in ran.out
    assert json.loads(here(capsys, "describe", name, "--json").out)["others"] == [other]
    assert here(capsys, "describe", name, "--kind", other).out.startswith(f"{other} {name}: ")


def test_what_is_said_of_a_kernel_is_said_once(capsys):
    row = next(line for line in here(capsys, "list", "kernels").out.splitlines() if line.startswith("skip_softmax"))
    assert row.count("lossy") == 1


def test_a_plan_says_where_weights_start(capsys, place):
    assert "weights" in here(capsys, "plan", "tiny.yaml").out
    assert "none named: every parameter starts as the seed says" in here(capsys, "plan", "ultragen_4k").out
    named = here(capsys, "plan", "tiny.yaml", "weights={path: w.safetensors, format: wan}").out
    assert "w.safetensors (wan)" in named
    assert "none named" not in named


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
