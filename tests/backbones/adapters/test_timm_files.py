"""timm models from and to files: checkpoints and folders as timm writes them, tuned parameters of a design."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ultrazoo
from tests.backbones.adapters.states import LORA
from tests.backbones.adapters.test_timm_states import NAMES, add_lora, run
from tests.backbones.adapters.vits import GRIDS, VITS, image, made, recipe
from tests.cli.program import here
from tests.weights.models import same
from ultrazoo.errors import RecipeError, WeightsError
from ultrazoo.testing import error_ratio


def backbone(name: str) -> dict[str, Any]:
    return {"name": "timm", "model": VITS[name].model, "config": {**VITS[name].arguments}}


def saved(model: Any, tmp_path: Any, kind: str) -> Any:
    """The model in a file or folder as timm and its training script write them."""
    from timm.models import save_for_hf

    if kind in ("folder", "safetensors"):
        save_for_hf(model, tmp_path / "hub", safe_serialization="both")
        return tmp_path / "hub" / ("model.safetensors" if kind == "safetensors" else "")
    if kind == "bin":
        save_for_hf(model, tmp_path / "hub")
        return tmp_path / "hub" / "pytorch_model.bin"
    path = tmp_path / "x.pth"
    state = model.state_dict()
    torch.save({"pth": state, "training": {"epoch": 3, "arch": "x", "state_dict": state}}[kind], path)
    return path


@pytest.mark.parametrize("kind", ["folder", "safetensors", "bin", "pth", "training"])
@pytest.mark.parametrize("name", [*NAMES, "EVA-02", "rotation, learned", "two class tokens"])
def test_a_checkpoint_of_timm_is_built_into_a_recipe(tmp_path, name, kind):
    stock = made(name)
    x = image(stock, GRIDS[0])
    given = {"backbone": backbone(name), "dtype": "float32", "weights": {"path": str(saved(stock, tmp_path, kind))}}
    built = ultrazoo.build(recipe("full", **given)).eval()
    assert all(torch.equal(built.state_dict()[key], tensor) for key, tensor in stock.state_dict().items())
    assert error_ratio(run(built, x), run(stock, x)) <= 1e-5
    design = ultrazoo.build(recipe(LORA, **given)).eval()
    ultrazoo.apply(stock, recipe(LORA))
    assert same(design.state_dict(), stock.state_dict())


def test_a_checkpoint_of_another_size_or_model_is_refused(tmp_path):
    path = saved(made("DeiT-3", depth=3, num_classes=7), tmp_path, "pth")
    with pytest.raises(WeightsError, match=r"(?s)wrong shape +head\.bias.*unexpected +blocks\.2"):
        ultrazoo.build(recipe("full", backbone=backbone("DeiT-3"), weights={"path": str(path)}))
    path = saved(made("EVA-02"), tmp_path, "pth")
    with pytest.raises(WeightsError, match=r"missing +\S*blocks\.0-1\.attn\.qkv\.bias"):
        ultrazoo.build(recipe("full", backbone=backbone("DeiT-3"), weights={"path": str(path)}))


def test_a_folder_is_held_against_a_recipe(capsys, tmp_path):
    stock = made("EVA-02")
    folder = saved(stock, tmp_path, "folder")
    save_file({f"module.{key}": tensor for key, tensor in stock.state_dict().items()}, tmp_path / "x.safetensors")
    given = recipe(LORA, backbone={"name": "timm", "pretrained": str(folder)}, schema=1)
    (tmp_path / "r.yaml").write_text(json.dumps(given))
    for file, prefix in ((folder, ""), (tmp_path / "x.safetensors", "module.")):
        ran = here(capsys, "check", "--weights", file, tmp_path / "r.yaml", "--json")
        told = json.loads(ran.out)
        assert (ran.code, told["fits"], told["format"], told["prefix"]) == (0, True, "timm", prefix)
        assert told["reused"] == len(stock.state_dict())
    ran = here(
        capsys, "check", "--weights", folder, tmp_path / "r.yaml", "backbone.pretrained=null", "backbone.model=x"
    )
    assert ran.code == 2
    assert "has no model" in ran.err
    # no recipe, no layout: what it is cannot be told
    ran = here(capsys, "check", "--weights", folder)
    assert ran.code == 3
    assert "is of no known format" in ran.out


def test_tuned_parameters_of_a_design_come_back(tmp_path):
    model = made("DINOv3")
    x = image(model, GRIDS[0])
    ultrazoo.apply(model, recipe(LORA))
    torch.manual_seed(4)
    for path, parameter in model.named_parameters():
        if ".processor." in path:
            nn.init.normal_(parameter, std=0.3)
    due = run(model, x)
    ultrazoo.save(model, tmp_path / "new", parts="new")
    ultrazoo.save(add_lora(copy.deepcopy(model)), tmp_path / "wrapped", parts="new")
    assert same(*(load_file(tmp_path / one / "model.safetensors") for one in ("new", "wrapped")))
    other = made("DINOv3")
    ultrazoo.apply(other, recipe(LORA, weights={"path": str(tmp_path / "new")}))
    assert torch.equal(run(other, x), due)
    ultrazoo.save(model, tmp_path / "whole")
    assert torch.equal(run(ultrazoo.from_pretrained(tmp_path / "whole").eval(), x), due)
    fresh = made("DINOv3")
    ultrazoo.apply(fresh, recipe(LORA))
    assert error_ratio(run(fresh, x), due) > 1e-2, "null test"


# folders


@pytest.mark.parametrize("name", list(VITS))
def test_a_folder_of_timm_is_built_with_its_weights(tmp_path, name):
    stock = made(name)
    x = image(stock, GRIDS[0])
    folder = saved(stock, tmp_path, "folder")
    node = {"name": "timm", "pretrained": str(folder)}
    built = ultrazoo.build(recipe("full", backbone=node, dtype="float32")).eval()
    assert same(built.state_dict(), stock.state_dict())
    assert error_ratio(run(built, x), run(stock, x)) <= 1e-5
    # what timm itself makes of the folder
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert error_ratio(run(built, x), run(theirs, x)) <= 1e-5
    # the plan, and what is saved, say the model and not the folder
    assert str(tmp_path) not in json.dumps(built.plan.resolved.data()["backbone"])
    ultrazoo.apply(stock, recipe("full", backbone=node))


@pytest.mark.parametrize("older", [False, True], ids=["hub", "older"])
def test_a_folder_without_the_arguments_is_read_by_the_facts_of_its_weights(tmp_path, older):
    """As on timm's hub: an input size and a number of classes that are not the name's own."""
    stock = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=7, in_chans=1).eval()
    folder = saved(stock, tmp_path, "folder")
    content = json.loads((folder / "config.json").read_text())
    del content["model_args"]
    content["pretrained_cfg"] |= {"input_size": [1, 96, 96], "fixed_input_size": True}
    if older:
        content = {"architecture": content["architecture"], **content["pretrained_cfg"]}
    (folder / "config.json").write_text(json.dumps(content))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    # the file alone names the folder as well
    node = {"name": "timm", "pretrained": str(folder / "config.json")}
    built = ultrazoo.build(recipe("full", grid=(1, 6, 6), backbone=node, dtype="float32")).eval()
    assert same(sorted(built.state_dict().items()), sorted(theirs.state_dict().items()))
    x = torch.randn(2, 1, 96, 96)
    assert error_ratio(run(built, x), run(theirs, x)) <= 1e-5
    assert error_ratio(run(theirs, x), run(stock, x)) <= 1e-5


def edited(change: dict[str, Any]) -> Any:
    def write(folder: Any) -> None:
        content = {**json.loads((folder / "config.json").read_text()), **change}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return write


@pytest.mark.parametrize(
    ("spoil", "more", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), {}, "hub does not hold config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), {}, "cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), {}, "not a model's settings"),
        (edited({"architecture": None}), {}, "names no architecture: it is not of timm"),
        (
            edited({"architecture": "no_such"}),
            {},
            "backbone.pretrained .*config.json, model: timm .* has no model .no_such.",
        ),
        (edited({"architecture": "resnet10t"}), {}, "no adapter serves resnet10t"),
        (edited({"model_args": 3}), {}, "no mapping as model_args"),
        (edited({"model_args": {"no_such": 1}}), {}, "config: timm cannot make"),
        (edited({"pretrained_cfg": {"input_size": 224}}), {}, "the input_size 224"),
        (edited({}), {"config": {"depth": 2}}, "either 'config' or 'pretrained'"),
        (
            edited({}),
            {"model": "vit_tiny_patch16_224"},
            "the recipe says 'vit_tiny_patch16_224', the folder 'deit3",
        ),
    ],
)
def test_folders_that_are_no_model(tmp_path, spoil, more, words):
    folder = saved(made("DeiT-3"), tmp_path, "folder")
    spoil(folder)
    with pytest.raises(RecipeError) as caught:
        ultrazoo.plan(recipe("full", backbone={"name": "timm", "pretrained": str(folder), **more}))
    assert re.search(words, " ".join(str(caught.value).split())), str(caught.value)


def test_a_folder_of_pickles_alone_is_not_opened_unasked(tmp_path):
    saved(made("DeiT-3"), tmp_path, "bin")
    node = {"name": "timm", "pretrained": str(tmp_path / "hub")}
    with pytest.raises(WeightsError, match=r"holds no \.safetensors file.*pytorch_model\.bin: give the file you mean"):
        ultrazoo.build(recipe("full", backbone=node))
    given = {"path": str(tmp_path / "hub" / "pytorch_model.bin")}
    assert same(
        ultrazoo.build(recipe("full", backbone=node, dtype="float32", weights=given)).state_dict(),
        made("DeiT-3").state_dict(),
    )
