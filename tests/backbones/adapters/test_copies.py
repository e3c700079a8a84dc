"""Parameters that start as copies of the host's projections: in every model of another library, built and applied alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ultrazoo
from tests.backbones.adapters import vits
from tests.backbones.adapters.states import OWN, SHARED, given, recipe
from tests.backbones.adapters.tiny import TINY, made, tensors_of
from ultrazoo import assemble
from ultrazoo.attention.contract import Attention
from ultrazoo.attention.divided import DividedAttention
from ultrazoo.backbones.diffusers.processor import Processor
from ultrazoo.errors import UsageError
from ultrazoo.testing import error_ratio

pytestmark = pytest.mark.filterwarnings("ignore")

FLUX2, HUNYUAN = "Flux2Transformer2DModel", "HunyuanVideoTransformer3DModel"


def node(name: str) -> dict[str, Any]:
    return {"name": "diffusers", "model": name, "config": dict(TINY[name].settings), "text_tokens": TINY[name].text}


def vit(name: str) -> dict[str, Any]:
    return {"name": "timm", "model": vits.VITS[name].model, "config": vits.VITS[name].arguments}


def randomised(model: nn.Module) -> nn.Module:
    """The design's own parameters at random: what would differ if they were read and not copied."""
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, Attention):
            for parameter in module.parameters():
                parameter.data.normal_()
    return model


def answer(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return tensors_of(model(**given(name)))[0]


def same_start(copied: Tensor, shared: Tensor, otherwise: Tensor) -> None:
    assert error_ratio(copied, shared) <= 1e-5
    assert error_ratio(otherwise, shared) > 1e-3, "null test"


@pytest.mark.parametrize("name", TINY)
def test_own_projections_start_as_the_hosts(name):
    answers = []
    for design in (SHARED, OWN):
        model = made(name)
        ultrazoo.apply(model, recipe(design, name))
        answers.append(answer(model, name))
    same_start(answers[1], answers[0], answer(randomised(model), name))


@pytest.mark.parametrize("name", TINY)
def test_a_built_model_copies_what_a_loaded_one_does(name):
    """Host and copies of a model built afresh are those of one that was applied to, with the same host."""
    for design in (OWN, "divided"):
        source = recipe(design, name, backbone=node(name), dtype="float32")
        built = ultrazoo.build(source)
        bare = ultrazoo.build({**source, "attention": {"*": "original"}})
        ultrazoo.remove(bare)
        ultrazoo.apply(bare, recipe(design, name))
        due = dict(bare.named_parameters())
        found = dict(built.named_parameters())
        assert list(found) == list(due)
        assert not [key for key in due if not torch.equal(found[key], due[key])]


@pytest.mark.parametrize("name", vits.VITS)
@pytest.mark.parametrize("design", [OWN, "divided"], ids=["own", "divided"])
def test_of_vision_transformers_too(name, design):
    source = vits.recipe(design, backbone=vit(name), dtype="float32")
    built = ultrazoo.build(source)
    bare = ultrazoo.build({**source, "attention": {"*": "original"}})
    ultrazoo.remove(bare)
    ultrazoo.apply(bare, vits.recipe(design, backbone=vit(name)))
    due = dict(bare.named_parameters())
    assert not [key for key, found in built.named_parameters() if not torch.equal(found, due[key])]


@pytest.mark.parametrize("name", vits.FAMILIES)
def test_own_projections_of_vision_transformers(name):
    answers = []
    for design in (SHARED, OWN):
        model = vits.made(name)
        ultrazoo.apply(model, vits.recipe(design, backbone=vit(name)))
        with torch.no_grad():
            answers.append(model(vits.image(model, vits.GRIDS[0])))
    with torch.no_grad():
        same_start(answers[1], answers[0], randomised(model)(vits.image(model, vits.GRIDS[0])))


def temporal(model: nn.Module, path: str) -> tuple[nn.Module, DividedAttention]:
    attn: Any = model.get_submodule(path)
    assert isinstance(attn.processor, Processor)
    assert isinstance(attn.processor.attention, DividedAttention)
    return attn, attn.processor.attention


def test_a_packed_linear_is_cut():
    """FLUX.2: q, k, v are the first rows of a linear that also makes the feed-forward's input, and attention's output goes
    into the first columns of one that also takes its result."""
    model = made(FLUX2)
    ultrazoo.apply(model, recipe("divided", FLUX2))
    host, copy = temporal(model, "single_transformer_blocks.1.attn")
    width = copy.site.width
    for place, which in enumerate("qkv"):
        rows = host.to_qkv_mlp_proj.weight[place * width : (place + 1) * width]
        assert torch.equal(copy.temporal[which].weight, rows)
        assert copy.temporal[which].bias.count_nonzero() == 0
    assert torch.equal(copy.temporal_proj.weight, host.to_out.weight[:, :width])
    assert host.to_out.weight.shape[1] > width


def test_a_host_without_an_output_projection_is_copied_as_one_that_passes():
    model = made(HUNYUAN)
    ultrazoo.apply(model, recipe("divided", HUNYUAN))
    host, copy = temporal(model, "single_transformer_blocks.0.attn")
    assert host.to_out is None
    assert torch.equal(copy.temporal_proj.weight, torch.eye(copy.site.width))
    assert copy.temporal_proj.bias.count_nonzero() == 0


def test_a_directory_holds_copies_of_the_weights_it_was_made_from(tmp_path):
    stock = made(FLUX2)
    stock.save_pretrained(tmp_path / "stock")
    backbone = {"name": "diffusers", "pretrained": str(tmp_path / "stock"), "text_tokens": 7}
    plan = ultrazoo.plan(recipe(OWN, FLUX2, backbone=backbone, dtype="float32"))
    assemble.build_directory(plan, tmp_path / "out")
    opened = ultrazoo.from_pretrained(tmp_path / "out")
    ultrazoo.apply(stock, recipe(SHARED, FLUX2))
    same_start(answer(opened, FLUX2), answer(stock, FLUX2), answer(randomised(opened), FLUX2))


class Renamed(nn.Module):
    """A host that keeps its projections under names that nobody was told."""


def test_a_host_without_such_a_linear_says_so():
    model = made(FLUX2)
    ultrazoo.apply(model, recipe("divided", FLUX2))
    processor: Any = model.get_submodule("transformer_blocks.0.attn").processor
    with pytest.raises(UsageError, match=r"layer 0 has no linear 'to_q' .*divided.*adapt: shared"):
        processor.parameter(Renamed(), "q", "weight")
