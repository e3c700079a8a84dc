"""Every bad recipe that we know of: a clear message with path, line and fix, exit code 2, nothing written."""

from __future__ import annotations

import pytest

from tests.cli.program import here

HEAD = """\
schema: 1
name: bad
video: {width: 256, height: 256, frames: 9}
backbone: {name: wan, preset: t2v_1_3b, layers: 4, dim: 48, heads: 2, ffn_dim: 96}
"""
WINDOWS = "{name: branched, branches: {local: {layout: {name: windows, counts: [4, 4]}}}}"

BAD = {
    "unknown key": (HEAD + 'attention: {"*": {name: full}}\nwieghts: null\n', ["wieghts (line 6)", "'weights'"]),
    "unknown option": (
        HEAD
        + 'attention:\n  "*":\n    name: branched\n    branches:\n      local: {layout: {name: windows, cuonts: [4, 4]}}\n',
        [
            "attention.*.branches.local.layout.cuonts (line 9)",
            "unknown option of layout 'windows'",
            "did you mean 'counts'?",
        ],
    ),
    "unknown name": (HEAD + 'attention: {"*": {name: ulltragen}}\n', ["attention.*.name", "did you mean 'ultragen'?"]),
    "unknown backbone": (HEAD.replace("name: wan", "name: wam") + 'attention: {"*": full}\n', ["did you mean 'wan'?"]),
    "unknown plugin": (
        HEAD + 'attention: {"*": {name: acme/rings}}\n',
        ["acme/rings", "no installed package", "pip install"],
    ),
    "preset of another backbone": (
        HEAD.replace("preset: t2v_1_3b", "preset: xl_2") + 'attention: {"*": full}\n',
        ["xl_2", "is a preset of backbone 'dit'"],
    ),
    "wrong type": (HEAD + 'attention: {"*": {name: ultragen, rank: many}}\n', ["rank", "a whole number", "many"]),
    "true is no number": (HEAD + 'attention: {"*": {name: ultragen, rank: true}}\n', ["rank", "a whole number"]),
    "no where a name is due": (HEAD + 'attention: {"*": {name: no}}\n', ["attention.*.name", "'no'"]),
    "stale key after another name": (
        HEAD + 'attention: {"*": {name: full, variant: paper}}\n',
        ["variant", "unknown option of attention 'full'"],
    ),
    "layer that does not exist": (
        HEAD + 'attention:\n  "*": full\n  "0-2,27-30": full\n',
        ["attention.0-2,27-30 (line 7)", "layer 27", "layers 0-3"],
    ),
    "key that matches nothing": (HEAD + 'attention: {"*": full, "single:0-9": full}\n', ["single"]),
    "overlapping keys": (HEAD + 'attention: {"*": full, "0-2": full, "2-3": full}\n', ["layer 2", "0-2"]),
    "steps beyond sampling": (
        HEAD + 'sampling: {steps: 4}\nattention: {"*": full}\nsteps: {"0-9": {"*": full}}\n',
        ["steps.0-9", "4"],
    ),
    "not YAML": ("schema: 1\nname: [unclosed\n", ["line 3"]),
    "tabs": ("schema: 1\nname:\n\t- x\n", ["line 3"]),
    "duplicate key": (HEAD + "name: again\nattention: {'*': full}\n", ["name", "line 5"]),
    "Python tag": (HEAD + 'attention: {"*": !!python/object/apply:os.system ["touch exploded"]}\n', ["line 5", "tag"]),
    "environment": (HEAD.replace("name: bad", "name: '${oc.env:HOME}'") + 'attention: {"*": full}\n', ["oc.env"]),
    "import target": (HEAD + 'attention: {"*": {name: full, _target_: os.system}}\n', ["_target_"]),
    "list": ("- 1\n- 2\n", ["mapping"]),
    "empty": ("", []),
    "binary": (None, ["UTF-8"]),
    "size the VAE cannot make": (
        HEAD.replace("width: 256", "width: 250") + 'attention: {"*": full}\n',
        ["video", "250", "240", "256"],
    ),
    "frames the VAE cannot make": (
        HEAD.replace("frames: 9", "frames: 8") + 'attention: {"*": full}\n',
        ["frames", "5", "9"],
    ),
    "more windows than rows": (
        HEAD + 'attention: {"*": ' + WINDOWS.replace("[4, 4]", "[40, 4]") + "}\n",
        ["branches.local.layout.counts", "40"],
    ),
    "heads that do not divide": (
        HEAD.replace("heads: 2", "heads: 5") + 'attention: {"*": full}\n',
        ["backbone.heads", "5"],
    ),
    "negative factor": (
        HEAD + 'attention: {"*": {name: branched, branches: {a: {compress: {name: avg_pool, factor: -2}}}}}\n',
        ["compress.factor", "-2", "at least"],
    ),
    "unknown dtype": (HEAD + 'attention: {"*": full}\ndtype: float12\n', ["dtype", "float12"]),
    "negative frames": (HEAD.replace("frames: 9", "frames: -9") + 'attention: {"*": full}\n', ["frames", "-9"]),
    "weights without a path": (HEAD + 'attention: {"*": full}\nweights: {format: wan}\n', ["weights.path"]),
    "newer schema": (HEAD.replace("schema: 1", "schema: 2") + 'attention: {"*": full}\n', ["schema", "2"]),
    "extends itself": ("extends: bad.yaml\n" + HEAD, ["extends", "bad.yaml"]),
    "extends nothing": ("extends: abscent\n" + HEAD, ["abscent"]),
}


@pytest.mark.parametrize("verb", ["check", "plan", "build"])
@pytest.mark.parametrize("what", BAD)
def test_bad_recipe(capsys, place, what, verb):
    text, words = BAD[what]
    (place / "bad.yaml").write_bytes(b"\xff\xfe\x00\x01" if text is None else text.encode())
    ran = here(capsys, verb, "bad.yaml")
    told = ran.out + ran.err
    assert ran.code == 2, told
    assert "bad.yaml: " in told
    assert "problem" in told
    for word in words:
        assert word in told, told
    assert "Traceback" not in told
    # what is no result is not on stdout
    assert (ran.err == "") == (verb == "check")
    assert {path.name for path in place.iterdir()} == {"bad.yaml", "tiny.yaml"}


def test_all_problems_at_once(capsys, place):
    (place / "bad.yaml").write_text(
        HEAD.replace("width: 256", "width: 250")
        + 'attention:\n  "*": {name: ultragen, rnk: 3}\n  "9": full\nseed: many\nweigths: null\n'
    )
    ran = here(capsys, "plan", "bad.yaml")
    assert ran.err.splitlines()[0] == "bad.yaml: 5 problems"
    for word in ("video", "rnk", "attention.9", "seed", "weigths"):
        assert word in ran.err


def test_all_wrong_recipes_at_once(capsys, place):
    (place / "bad.yaml").write_text(HEAD + 'attention: {"*": {name: ultragen, rnk: 3}}\n')
    ran = here(capsys, "plan", "bad.yaml", "tiny.yaml", "nosuch.yaml", "bad.yaml")
    assert (ran.code, ran.out) == (2, "")
    assert [line for line in ran.err.splitlines() if line[0] != " "] == [
        "bad.yaml: 1 problem",
        "nosuch.yaml: 1 problem",
    ]
    assert "rnk" in ran.err
    assert "no such file" in ran.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("attention.*.variant=paperr", ["variant", "did you mean 'paper'?"]),
        ("attention.7.name=full", ["attention.7", "layer 7"]),
        ("video.widht=250", ["video.widht", "did you mean 'width'?"]),
        ("video.width=", ["video.width"]),
        ("seed=[", ["seed"]),
        ("backbone.preset=t2v_14", ["preset", "did you mean 't2v_14b'?"]),
        ("name=${oc.env:HOME}", ["oc.env"]),
        ("attention.*={name: full, variant: paper}", ["variant", "unknown option of attention 'full'"]),
    ],
)
def test_bad_override(capsys, place, override, words):
    ran = here(capsys, "plan", "tiny.yaml", override)
    assert ran.code == 2, ran.out
    for word in words:
        assert word in ran.err, ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_extends_cycle_of_two(capsys, place):
    (place / "a.yaml").write_text("extends: b.yaml\n")
    (place / "b.yaml").write_text("extends: a.yaml\n")
    ran = here(capsys, "check", "a.yaml")
    assert ran.code == 2
    assert "a.yaml" in ran.out
    assert "b.yaml" in ran.out
    assert "circle" in ran.out


def test_missing_recipe(capsys, place):
    ran = here(capsys, "plan", "tny.yaml")
    assert ran.code == 2
    assert "no such file" in ran.err
    assert "did you mean 'tiny.yaml'?" in ran.err
    ran = here(capsys, "plan", "ultragen_4kk")
    assert ran.code == 2
    assert "did you mean 'ultragen_4k'?" in ran.err
    assert here(capsys, "plan", str(place)).code == 2


def test_another_name_drops_the_options_of_the_base(capsys, place):
    ran = here(capsys, "plan", "tiny.yaml", "attention.*.name=full", "--json")
    assert ran.code == 0, ran.err
