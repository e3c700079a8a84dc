"""Folders that a backbone's `config` or `pretrained` names: where the settings are looked for, and what is refused."""

from __future__ import annotations

import json

import pytest

import ultrazoo
from tests.backbones.adapters.tiny import TINY
from ultrazoo.errors import RecipeError

WAN = "WanTransformer3DModel"


def recipe(**backbone):
    backbone = {"name": "diffusers", **backbone}
    return {"name": "x", "video": {"grid": [2, 4, 6]}, "backbone": backbone, "attention": {"*": "full"}}


@pytest.mark.parametrize("key", ["config", "pretrained"])
@pytest.mark.parametrize("named", ["m", "m/config.json", "pipeline", "pipeline/transformer"])
def test_a_models_folder_a_pipelines_or_the_file(tmp_path, key, named):
    content = {"_class_name": WAN, "_diffusers_version": "0.42.0", **TINY[WAN].settings}
    for folder in ("m", "pipeline/transformer"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps(content))
    due = ultrazoo.plan(recipe(model=WAN, config=TINY[WAN].settings))
    plan = ultrazoo.plan(recipe(**{key: str(tmp_path / named)}))
    assert plan.hash == due.hash
    folder = tmp_path / ("m" if named.startswith("m") else "pipeline/transformer")
    brought = plan.resolved.weights
    assert (None if brought is None else brought.path) == (str(folder) if key == "pretrained" else None)


@pytest.mark.parametrize("key", ["config", "pretrained"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not hold config.json nor transformer/config.json; give a model's folder, a pipeline's, or a"),
        ("{", "config.json cannot be read as JSON"),
        ("[1]", "config.json holds [1], not a model's settings"),
        ("{}", "the class is not said"),
        ('{"_class_name": "WanTransformer4DModel"}', "did you mean 'WanTransformer3DModel'"),
        (f'{{"_class_name": "{WAN}", "layerz": 3}}', "layerz"),
    ],
)
def test_what_is_no_model(tmp_path, key, text, words):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(RecipeError) as caught:
        ultrazoo.plan(recipe(**{key: str(tmp_path)}))
    assert words in str(caught.value)


def test_what_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"backbone\.pretrained .*absent is not there"):
        ultrazoo.plan(recipe(pretrained=str(tmp_path / "absent")))
    with pytest.raises(RecipeError, match="either 'config' or 'pretrained', not both"):
        ultrazoo.plan(recipe(pretrained=str(tmp_path), config={}))
