"""What fits, what is new or dropped, and the table of what does not fit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ultrazoo.errors import WeightsError
from ultrazoo.weights.keymaps import FORMATS
from ultrazoo.weights.match import collapse, match
from ultrazoo.weights.reader import open_checkpoint
from ultrazoo.weights.tensors import Entry

from . import layouts


def entries(shapes):
    return {name: Entry(name, shape, torch.float32) for name, shape in shapes.items()}


def released_names():
    """The model that the released layout fits, in our names."""
    return {FORMATS["ultragen"].ours(key): shape for key, shape in layouts.ultragen().items()}


@pytest.fixture
def hold(tmp_path):
    """Hold a checkpoint with these tensors against a model with these shapes."""

    def run(tensors, shapes, *, metadata=None, backbone="wan", **options):
        save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
        with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
            return match(checkpoint, entries(shapes), backbone=backbone, model="tiny (wan)", **options)

    return run


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_whole_checkpoint(hold, prefix):
    found = hold({prefix + k: v for k, v in layouts.tensors(layouts.wan()).items()}, layouts.wan())
    assert (found.format, found.prefix) == ("wan", prefix)
    assert dict(found.reused) == {name: prefix + name for name in layouts.wan()}
    assert (found.new, found.dropped) == ((), ())


def test_base_weights_into_a_sparse_model(hold):
    found = hold(layouts.tensors(layouts.wan()), released_names())
    assert set(found.reused) == set(layouts.wan())
    assert set(found.new) == set(released_names()) - set(layouts.wan())
    assert "blocks.1.attention.fuse.gates.0.2.bias" in found.new
    assert str(found).splitlines()[0].endswith(f"(wan): {len(layouts.wan())} tensors reused")
    assert "  new       blocks.1.attention.fuse.gates.0.2.bias" in str(found).splitlines()


def test_released_weights_into_their_model(hold):
    found = hold(layouts.tensors(layouts.ultragen()), released_names())
    assert found.format == "ultragen"
    assert set(found.reused) == set(released_names())
    assert (found.new, found.dropped) == ((), ())


def test_released_weights_into_full_attention_drop_the_extras(hold):
    found = hold(layouts.tensors(layouts.ultragen()), layouts.wan())
    assert set(found.reused) == set(layouts.wan())
    assert set(found.dropped) == set(layouts.ultragen()) - set(layouts.wan())
    assert found.data()["dropped"]


def test_another_size(hold):
    with pytest.raises(WeightsError) as caught:
        hold(layouts.tensors(layouts.wan(3, 32)), layouts.wan())
    lines = str(caught.value).splitlines()
    # one feed-forward bias per layer and the head's do not depend on the model's width
    differ = len(layouts.wan(3)) - 3
    assert lines[0].endswith(f"(wan) does not fit tiny (wan): {differ} tensors differ, nothing was loaded")
    shape = next(line for line in lines if "blocks.0-1.self_attn.q.weight" in line)
    assert " ".join(shape.split()) == "wrong shape blocks.0-1.self_attn.q.weight file (32, 32) model (24, 24) 2 tensors"
    # every kind is shown, however long the others are
    assert any("unexpected" in line and "blocks.2." in line for line in lines)
    assert any("more rows" in line for line in lines)
    assert len(lines) < 24


def test_missing_keys_are_named_as_the_file_would(hold):
    tensors = layouts.tensors({FORMATS["diffusers"].theirs(k): v for k, v in layouts.wan().items()})
    del tensors["blocks.1.attn1.to_q.weight"], tensors["proj_out.bias"]
    with pytest.raises(WeightsError, match="2 tensors differ") as caught:
        hold(tensors, layouts.wan())
    assert "blocks.1.attn1.to_q.weight" in str(caught.value)
    assert "proj_out.bias" in str(caught.value)


def test_another_model(hold):
    with pytest.raises(WeightsError, match=r"is of no known format .* it holds 2 tensors, encoder\.a, encoder\.b"):
        hold({"encoder.a": torch.ones(2), "encoder.b": torch.ones(2)}, layouts.wan())


def test_image_to_video_keys_are_unexpected(hold):
    tensors = layouts.tensors(layouts.wan()) | {"img_emb.proj.0.weight": torch.ones(3)}
    with pytest.raises(WeightsError, match=r"1 tensors differ[^§]*unexpected  img_emb\.proj\.0\.weight  file \(3,\)"):
        hold(tensors, layouts.wan())


def test_a_torn_part_is_a_mismatch(hold):
    names = released_names()
    tensors = layouts.tensors(layouts.ultragen())
    # a recipe whose low-rank adapters have no bias would run with half of each
    without = {k: v for k, v in names.items() if not ("lora" in k and k.endswith("bias"))}
    with pytest.raises(WeightsError, match=r"unexpected  blocks\.1\.self_attn\.k_lora_1\.lora_A\.bias"):
        hold(tensors, without)
    # one gate more than the file has
    more = names | {"blocks.1.attention.fuse.gates.2.0.weight": (24, 256)}
    with pytest.raises(WeightsError, match=r"missing +blocks\.1\.attention\.fuse\.gates\.2\.0\.weight"):
        hold(tensors, more)
    # a branch of its own may be new as a whole
    branch = names | {"blocks.1.attention.branches.fourth.adapt.q.weight": (24, 24)}
    assert hold(tensors, branch).new == ("blocks.1.attention.branches.fourth.adapt.q.weight",)


def test_nothing_may_be_new_in_a_saved_model(hold):
    with pytest.raises(WeightsError, match="missing"):
        hold(layouts.tensors(layouts.wan()), released_names(), whole=True, layout="ultrazoo")
    tensors = layouts.tensors(released_names())
    with pytest.raises(WeightsError, match="unexpected"):
        hold(tensors, layouts.wan(), whole=True, layout="ultrazoo")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_need_scales_that_are_elsewhere(hold, dtype):
    tensors = layouts.tensors(layouts.wan())
    tensors["head.head.weight"] = tensors["head.head.weight"].to(dtype)
    with pytest.raises(WeightsError, match=r"wrong type +head\.head\.weight +file (int8|float8_e4m3fn) +model float32"):
        hold(tensors, layouts.wan())


def test_the_format_asked_for_is_the_one_found(hold):
    tensors = layouts.tensors(layouts.ultragen())
    with pytest.raises(WeightsError, match="has the keys of format 'ultragen', not of 'wan'"):
        hold(tensors, released_names(), layout="wan")
    with pytest.raises(WeightsError, match=r"unknown format 'difusers'.*did you mean 'diffusers'"):
        hold(tensors, released_names(), layout="difusers")


def test_our_files_are_known_by_their_mark(hold):
    found = hold(layouts.tensors(layouts.wan()), layouts.wan(), metadata={"ultrazoo": "0.1.0"})
    assert found.format == "ultrazoo"
    assert hold(layouts.tensors(layouts.wan()), layouts.wan(), layout="ultrazoo").format == "ultrazoo"


def test_a_wan_file_is_not_for_another_backbone(hold):
    with pytest.raises(WeightsError, match="is a wan checkpoint, for backbone 'wan', not 'dit'"):
        hold(layouts.tensors(layouts.wan()), layouts.wan(), backbone="dit")


def test_collapse():
    keys = ["a.b", *(f"blocks.{i}.ffn.0.bias" for i in (0, 1, 2, 5)), "blocks.3.q.2.w"]
    assert collapse(keys) == ["a.b", "blocks.0-2,5.ffn.0.bias", "blocks.3.q.2.w"]
