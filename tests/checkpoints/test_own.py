"""The new parameters of a design by themselves: saved from a loaded model, put back by `weights:`, refused where they do not fit.

Also `backbone: {name: diffusers, pretrained: …}`, whose checkpoints have the model's own names.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ultrazoo
from tests.backbones.adapters.test_parity import recipe, run
from tests.backbones.adapters.tiny import TINY, arguments, made
from tests.cli.program import here
from tests.weights.models import nothing_in, same, tiny
from ultrazoo.errors import UsageError, WeightsError
from ultrazoo.testing import error_ratio

NAMES = ["WanTransformer3DModel", "PixArtTransformer2DModel"]
DESIGN = {
    "name": "branched",
    "branches": {"coarse": {"compress": {"name": "depthwise_conv", "factor": 2}}, "near": {}},
    "fuse": {"name": "time_gate", "order": ["coarse", "near"]},
}
UNALIKE = {**DESIGN, "fuse": {"name": "time_gate", "order": ["near", "coarse"]}}

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(name, design=DESIGN, seed=1, **more):
    """A tiny model with a design in it whose new parameters are random, as if trained."""
    model = made(name)
    ultrazoo.apply(model, recipe(name, design, **more))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".processor." in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def new_of(model):
    return {key: tensor for key, tensor in model.state_dict().items() if ".processor." in key}


def output(model, name):
    with torch.no_grad():
        return run(model, arguments(name, "plain", TINY[name].grids[0]))[0]


def weights(path, **more):
    return {"weights": {"path": str(path), **more}}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["save", "safetensors", "pth", "compiled", "component"])
def test_trained_parameters_come_back_bit_for_bit(tmp_path, name, kind):
    model = trained(name)
    due = output(model, name)
    new = new_of(model)
    path = tmp_path / "x.safetensors"
    if kind == "save":
        path = tmp_path / "new"
        ultrazoo.save(model, path, parts="new")
    elif kind == "pth":
        path = tmp_path / "x.pth"
        torch.save(new, path)
    else:
        prefix = {"safetensors": "", "compiled": "_orig_mod.", "component": "transformer."}[kind]
        save_file({prefix + key: tensor for key, tensor in new.items()}, path)
    other = made(name)
    fresh = recipe(name, DESIGN, seed=9)
    report = ultrazoo.apply(other, {**fresh, **weights(path)})
    assert same(sorted(other.state_dict().items()), sorted(model.state_dict().items()))
    assert torch.equal(output(other, name), due)
    (one,) = report.models
    assert len(one.loaded.reused) == len(new)
    assert report.untuned == ()
    assert f"{len(new)} tensors of them loaded from {one.loaded.path}" in str(report)
    assert report.data()["models"][0]["weights"]["reused"] == len(new)
    # without them it is another model, and says so
    other = made(name)
    report = ultrazoo.apply(other, fresh)
    assert error_ratio(output(other, name), due) > 1e-2
    assert report.untuned == ("branched needs tuning (changes what tokens see) and no tuned weights are loaded",)
    assert f"warning: {report.untuned[0]}" in str(report)


def test_what_is_saved_is_the_design_alone(tmp_path):
    model = trained(NAMES[0])
    ultrazoo.save(model, tmp_path / "new", parts="new")
    assert same(sorted(load_file(tmp_path / "new" / "model.safetensors").items()), sorted(new_of(model).items()))
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["weights"]["parts"] == "new"
    assert config["weights"]["parameters"] == sum(tensor.numel() for tensor in new_of(model).values())
    text = (tmp_path / "new" / "README.md").read_text()
    assert "recipe.yaml" in text
    assert "from_pretrained(" not in text
    assert "The design was applied to a loaded WanTransformer3DModel" in text
    # the recipe beside them is the one to apply
    again = made(NAMES[0])
    ultrazoo.apply(again, tmp_path / "new" / "recipe.yaml", f"weights.path={tmp_path / 'new'}")
    assert same(again.state_dict(), model.state_dict())
    with pytest.raises(UsageError, match=r"holds the new parameters of a design alone: load the model"):
        ultrazoo.from_pretrained(tmp_path / "new")


def test_the_type_and_device_of_the_model_are_kept(tmp_path):
    ultrazoo.save(trained(NAMES[0]), tmp_path / "new", parts="new")
    half = made(NAMES[0]).to(torch.bfloat16)
    ultrazoo.apply(half, {**recipe(NAMES[0], DESIGN), **weights(tmp_path / "new")})
    due = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(tensor, due[key].bfloat16()) for key, tensor in new_of(half).items())


def test_the_other_steps_of_a_schedule_are_saved_too(tmp_path):
    more = {
        "sampling": {"steps": 4},
        "steps": {
            "0-1": {"*": {**DESIGN, "branches": {**DESIGN["branches"]}, "fuse": {"name": "weights", "learned": True}}}
        },
    }
    model = trained(NAMES[0], **more)
    ultrazoo.save(model, tmp_path / "new", parts="new")
    other = made(NAMES[0])
    ultrazoo.apply(other, {**recipe(NAMES[0], DESIGN, **more), **weights(tmp_path / "new")})
    assert same(sorted(other.state_dict().items()), sorted(model.state_dict().items()))


def bad(case, model, tmp_path):
    """A file that is not of the design, and words of the error."""
    new, path = new_of(model), tmp_path / "x.safetensors"
    key = next(key for key in new if "compress.conv.weight" in key)
    if case == "half":
        del new[key]
        words = rf"(?s)1 tensors differ, nothing was loaded.*missing +{key}"
    elif case == "more":
        new["blocks.0.attn1.processor.attention.x"] = torch.ones(1)
        words = r"unexpected +blocks\.0\.attn1\.processor\.attention\.x"
    elif case == "shape":
        new[key] = torch.ones(3)
        words = rf"wrong shape +{key} +file \(3,\)"
    elif case == "type":
        new[key] = new[key].to(torch.float8_e4m3fn)
        words = rf"wrong type +{key} +file float8_e4m3fn"
    elif case == "whole":
        new = {k: t.clone() for k, t in model.state_dict().items()}
        words = "tensors are not of a design inside a model .* as save.model, directory, parts='new'. writes them"
    elif case == "another program's":
        new = {"conv.weight": torch.ones(3)}
        words = r"1 of its 1 tensors are not of a design inside a model \(conv.weight\)"
    elif case == "prefix":
        new = {f"net.{k}": t for k, t in new.items()}
        words = r"missing +blocks|missing +transformer_blocks"
    save_file(new, path)
    return path, words


CASES = ["half", "more", "shape", "type", "whole", "another program's", "prefix"]


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_and_the_model_untouched(tmp_path, case):
    name = NAMES[0]
    path, words = bad(case, trained(name), tmp_path)
    model = made(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=words) as caught:
        ultrazoo.apply(model, {**recipe(name, DESIGN), **weights(path)})
    assert caught.value.exit_code == 2
    assert same(model.state_dict(), before)
    # nothing is left of the attempt: the recipe goes in without the file
    ultrazoo.apply(model, recipe(name, DESIGN))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_another_design_would_misread(tmp_path, name):
    """Names and shapes fit; the gates mix in another order."""
    ultrazoo.save(trained(name), tmp_path / "new", parts="new")
    with pytest.raises(WeightsError, match=r"(?s)would misread.*attention\.0-1\.fuse\.order"):
        ultrazoo.apply(made(name), {**recipe(name, UNALIKE), **weights(tmp_path / "new")})


def test_other_refusals(tmp_path):
    name = NAMES[0]
    model = trained(name)
    ultrazoo.save(model, tmp_path / "new", parts="new")
    given = weights(tmp_path / "new")
    with pytest.raises(WeightsError, match=r"has no parameters of its own that could be loaded.*weights=null"):
        ultrazoo.apply(made(name), {**recipe(name, "full"), **given})
    with pytest.raises(WeightsError, match=r"weights\.format 'wan' is none of backbone 'diffusers'"):
        ultrazoo.apply(made(name), {**recipe(name, DESIGN), **weights(tmp_path / "new", format="wan")})
    with pytest.raises(WeightsError, match="no such file"):
        ultrazoo.apply(made(name), {**recipe(name, DESIGN), **weights(tmp_path / "absent")})
    with pytest.raises(UsageError, match="is on the meta device and cannot take the weights"):
        ultrazoo.apply(made(name).to("meta"), {**recipe(name, DESIGN), **given})
    plain = made(name)
    ultrazoo.apply(plain, recipe(name, "full"))
    for source, words in (
        (plain, "has no parameters of its own; there is nothing to save"),
        (ultrazoo.build(tiny()), "is for models of other libraries"),
        (made(name), "has no plan"),
    ):
        with pytest.raises(UsageError, match=words):
            ultrazoo.save(source, tmp_path / "x", parts="new")
    with pytest.raises(UsageError, match="parts is all or new, got 'some'"):
        ultrazoo.save(model, tmp_path / "x", parts="some")
    assert not (tmp_path / "x").exists()


class TwoModels:
    """A pipeline with a model for each half of the noise."""

    def __init__(self):
        self.transformer, self.transformer_2 = made(NAMES[0]), made(NAMES[0])


def test_a_pipeline_with_two_models(tmp_path):
    pair = {"transformer": trained(NAMES[0], seed=1), "transformer_2": trained(NAMES[0], seed=2)}
    ultrazoo.save(pair["transformer"], tmp_path / "new" / "transformer", parts="new")
    source = {**recipe(NAMES[0], DESIGN), **weights(tmp_path / "new")}
    pipeline = TwoModels()
    with pytest.raises(
        WeightsError, match="this pipeline has transformer, transformer_2; weights are a folder with one"
    ):
        ultrazoo.apply(pipeline, source)
    # the first model had been changed already, and is itself again
    assert not new_of(pipeline.transformer)
    ultrazoo.save(pair["transformer_2"], tmp_path / "new" / "transformer_2", parts="new")
    ultrazoo.apply(pipeline, source)
    for name, model in pair.items():
        assert same(new_of(getattr(pipeline, name)), new_of(model))


def test_they_are_verified_and_never_taken_for_a_whole_checkpoint(capsys, tmp_path):
    model = trained(NAMES[0])
    ultrazoo.save(model, tmp_path / "new", parts="new")
    ran = here(capsys, "check", "--weights", tmp_path / "new")
    assert ran.code == 0, ran.out
    assert f"fits x (diffusers): {len(new_of(model))} tensors have their place" in ran.out
    ran = here(
        capsys,
        "check",
        "--weights",
        tmp_path / "new",
        tmp_path / "new" / "recipe.yaml",
        "attention.*.branches.coarse.compress.factor=3",
    )
    assert ran.code == 3
    assert "wrong shape  blocks.0-1.attn1.processor.attention.branches.coarse.compress.conv.weight" in ran.out
    ran = here(capsys, "convert", tmp_path / "new", tmp_path / "out", "--to", "wan")
    assert ran.code == 2
    assert "no whole checkpoint" in ran.err
    assert nothing_in_room(tmp_path)


def nothing_in_room(tmp_path):
    (tmp_path / "room").mkdir()
    return nothing_in(tmp_path / "room") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", ["10GB", "20KB"])
def test_a_pretrained_folder_of_diffusers_is_built_with_its_weights(tmp_path, name, limit):
    stock = made(name)
    stock.save_pretrained(tmp_path / "hub", max_shard_size=limit)
    if limit == "20KB":
        assert list((tmp_path / "hub").glob("*.index.json"))
    backbone = {"name": "diffusers", "pretrained": str(tmp_path / "hub"), "text_tokens": TINY[name].text}
    built = ultrazoo.build(recipe(name, DESIGN, backbone=backbone, dtype="float32")).eval()
    assert all(torch.equal(built.state_dict()[key], tensor) for key, tensor in stock.state_dict().items())
    ultrazoo.apply(stock, recipe(name, DESIGN))
    assert same(built.state_dict(), stock.state_dict())
    assert error_ratio(output(built, name), output(stock, name)) <= 1e-6
    # a checkpoint of another size
    lost = {key: tensor for key, tensor in made(name).state_dict().items() if not key.endswith("attn1.to_q.weight")}
    save_file(lost, tmp_path / "half.safetensors")
    with pytest.raises(WeightsError, match=r"missing +\S*blocks\.0-1\.attn1\.to_q\.weight"):
        ultrazoo.build(recipe(name, DESIGN, backbone=backbone, **weights(tmp_path / "half.safetensors")))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_diffusers_is_held_against_a_recipe(capsys, tmp_path, name):
    made(name).save_pretrained(tmp_path / "hub")
    backbone = {"name": "diffusers", "model": name, "config": str(tmp_path / "hub")}
    (tmp_path / "r.yaml").write_text(json.dumps({"schema": 1, **recipe(name, DESIGN, backbone=backbone)}))
    ran = here(capsys, "check", "--weights", tmp_path / "hub", tmp_path / "r.yaml", "--json")
    told = json.loads(ran.out)
    assert (ran.code, told["fits"], told["dropped"]) == (0, True, [])
    assert told["reused"] == told["tensors"]
    assert any(".processor.attention.fuse" in row for row in told["new"])
    # a layer more than the recipe's model has, and one tensor fewer
    held = {key: tensor.clone() for key, tensor in made(name).state_dict().items()}
    lost = next(key for key in held if key.endswith("0.attn1.to_k.bias"))
    held[lost.replace("0.attn1", "2.attn1")] = held.pop(lost)
    save_file(held, tmp_path / "x.safetensors")
    ran = here(capsys, "check", "--weights", tmp_path / "x.safetensors", tmp_path / "r.yaml")
    assert ran.code == 3
    assert f"missing     {lost}" in ran.out
    assert f"unexpected  {lost.replace('0.attn1', '2.attn1')}" in ran.out


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_model_is_saved_whole(tmp_path, name):
    model = trained(name)
    ultrazoo.save(model, tmp_path / "d")
    again = ultrazoo.from_pretrained(tmp_path / "d")
    assert same(again.state_dict(), model.state_dict())
    assert torch.equal(output(again, name), output(model, name))
