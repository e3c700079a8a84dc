"""LoRAs in peft's own files: written by peft and diffusers and read here, written here and read by them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ultrazoo
from tests.cli.program import here
from tests.weights import layouts
from tests.weights.models import PAPER, RELEASED, error_ratio, inputs, same, tiny
from ultrazoo.checkpoints.convert import convert
from ultrazoo.checkpoints.lora import load_lora, save_lora
from ultrazoo.errors import OutputError, UsageError, WeightsError

peft = pytest.importorskip("peft")

HEADS = f"backbone.heads={layouts.HEADS}"
TARGETS = ["to_q", "to_k", "to_out.0", "ffn.net.2"]


def diffusers_model():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=layouts.HEADS,
        attention_head_dim=layouts.DIM // layouts.HEADS,
        num_layers=2,
        ffn_dim=layouts.FFN,
        text_dim=layouts.TEXT,
        freq_dim=layouts.TIME,
        in_channels=layouts.CHANNELS,
        out_channels=layouts.CHANNELS,
    ).eval()


def randomise(model, names="", std=0.2):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + (parameter.ndim == 1))


def run(model):
    latents, timestep, text = inputs()
    with torch.no_grad():
        if type(model).__name__ == "Wan":
            return model(latents, timestep, text)
        return model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]


@pytest.fixture
def base(tmp_path):
    """A tiny model of diffusers, saved; and ours with the same weights."""
    model = diffusers_model()
    randomise(model)
    model.save_pretrained(tmp_path / "base")
    return model, ultrazoo.build(tiny(weights={"path": str(tmp_path / "base")})).eval()


CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"blocks.1.attn1.to_q": 12}},
    "bias": {"r": 3, "lora_alpha": 3, "lora_bias": True},
}


@pytest.mark.parametrize("how", ["merge", "attach", "streamed"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_lora_that_peft_saved_for_diffusers(tmp_path, base, config, how):
    model, ours = base
    without = run(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS, **CONFIGS[config]))
    randomise(wrapped, "lora_")
    wrapped.save_pretrained(tmp_path / "lora")
    assert {one.name for one in (tmp_path / "lora").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    due = run(wrapped.base_model.model)
    if how == "streamed":
        options = {"lora": tmp_path / "lora", "overrides": (HEADS,)}
        done = convert(tmp_path / "base", tmp_path / "out", "ultrazoo", **options)
        assert any("is added to 12 linears" in note or "is added to 14 linears" in note for note in done.notes), (
            done.notes
        )
        ours = ultrazoo.from_pretrained(tmp_path / "out")
    else:
        found = load_lora(ours, tmp_path / "lora", how=how)
        assert "blocks.1.cross_attn.o" in found.linears
        assert "blocks.1.ffn.2" in found.linears
    assert error_ratio(run(ours), due) < 1e-5
    assert error_ratio(without, due) > 1e-2


def test_a_lora_that_diffusers_saved(tmp_path, base):
    model, ours = base
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    randomise(model, "lora_")
    model.save_lora_adapter(tmp_path / "lora")
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    found = load_lora(ours, tmp_path / "lora")
    assert any("no adapter_config.json tells the scale" in note for note in found.notes)
    assert error_ratio(run(ours), run(model)) < 1e-5


def test_attached_loras_go_back_to_diffusers(tmp_path, base):
    model, ours = base
    names = ["self_attn.q", "cross_attn.v", "ffn.0"]
    settings = {"r": 4, "lora_alpha": 8, "rank_pattern": {"ffn.0": 2}, "target_modules": names}
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), ours, adapter_name="style")
    randomise(ours, "lora_")
    save_lora(ours, tmp_path / "lora", of="attached", name="style")
    keys = set(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert "base_model.model.blocks.1.attn1.to_q.lora_A.weight" in keys
    back = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    assert error_ratio(run(back.base_model.model), run(ours)) < 1e-5
    # and in here again, bit for bit
    again = ultrazoo.build(tiny(weights={"path": str(tmp_path / "base")})).eval()
    load_lora(again, tmp_path / "lora", how="attach", name="style")
    save_lora(again, tmp_path / "second", of="attached", name="style")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "second")]
    assert same(*files)
    with pytest.raises(UsageError, match="there are style; did you mean 'style'"):
        save_lora(ours, tmp_path / "x", of="attached", name="styl")


@pytest.mark.parametrize("design", [PAPER, {**RELEASED, "full_first": 0}], ids=["paper", "released"])
def test_loras_of_a_design_out_and_in_bit_for_bit(capsys, tmp_path, design):
    model = ultrazoo.build(tiny(design)).eval()
    randomise(model)
    due = run(model)
    save_lora(model, tmp_path / "lora", of="adapt")
    ultrazoo.save(model, tmp_path / "model")
    ran = here(capsys, "convert", tmp_path / "model", tmp_path / "taken", "--to", "lora", "--json")
    assert ran.code == 0, ran.err
    taken = load_file(tmp_path / "taken" / "adapter_model.safetensors")
    assert same(load_file(tmp_path / "lora" / "adapter_model.safetensors"), taken)
    expected = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert {key.removeprefix("base_model.model.") for key in taken} == expected
    config = json.loads((tmp_path / "taken" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert peft.LoraConfig.from_pretrained(tmp_path / "taken").r == 4
    other = ultrazoo.build(tiny(design)).eval()
    randomise(other)
    randomise(other, "lora_", std=0.1)
    assert error_ratio(run(other), due) > 1e-3
    found = load_lora(other, tmp_path / "taken")
    assert len(found.adapts) == 12
    assert same(other.state_dict(), model.state_dict())
    assert torch.equal(run(other), due)
    # the same on the way from file to file
    ultrazoo.save(ultrazoo.build(tiny(design)), tmp_path / "fresh")
    convert(tmp_path / "fresh", tmp_path / "out", "ultrazoo", lora=tmp_path / "taken")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(state[name], model.state_dict()[name]) for name in expected)


def pairs(rank=4, module="blocks.0.attn1.to_q", dim=layouts.DIM):
    base = f"base_model.model.{module}"
    return {f"{base}.lora_A.weight": torch.ones(rank, dim), f"{base}.lora_B.weight": torch.ones(dim, rank)}


def write(directory, tensors, **config):
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


BAD = {
    "other model": (
        {},
        pairs(module="transformer_blocks.0.attn.to_q"),
        r"unexpected +transformer_blocks\.0\.attn\.to_q",
    ),
    "other size": (
        {},
        pairs(dim=32),
        r"wrong shape +blocks\.0\.self_attn\.q\.weight +file \(32, 32\) +model \(24, 24\)",
    ),
    "one matrix": ({}, dict(list(pairs().items())[:1]), r"blocks\.0\.attn1\.to_q has no lora_B\.weight"),
    "ranks": ({}, {**pairs(), **dict(list(pairs(3).items())[:1])}, "has lora_A .3, 24. and lora_B .24, 4."),
    "not a lora": ({}, {"x.weight": torch.ones(2)}, "is no LoRA: 1 keys are not of a LoRA in peft's layout, x.weight"),
    "ia3": ({"peft_type": "IA3"}, pairs(), "peft_type is 'IA3'"),
    "dora": ({"use_dora": True}, pairs(), "the adapter has DoRA"),
    "modules": ({"modules_to_save": ["head"]}, pairs(), "whole modules beside the LoRA"),
    "bias": ({"bias": "all"}, pairs(), "trained biases of the base model"),
    "alpha": ({"lora_alpha": "8"}, pairs(), "r and lora_alpha are not numbers"),
    "norm": ({}, pairs(module="blocks.0.attn1.norm_q"), r"unexpected +blocks\.0\.self_attn\.norm_q"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_loras_change_nothing(tmp_path, case):
    config, tensors, words = BAD[case]
    path = write(tmp_path / "lora", tensors, **config)
    model = ultrazoo.build(tiny())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((WeightsError, UsageError), match=words):
        load_lora(model, path)
    assert same(model.state_dict(), before)
    ultrazoo.save(model, tmp_path / "d")
    with pytest.raises((WeightsError, UsageError), match=words):
        convert(tmp_path / "d", tmp_path / "out", "wan", lora=path)
    assert not (tmp_path / "out").exists()


class Int4Linear(nn.Linear):
    """A quantised linear."""


def test_quantised_and_wrapped_linears_are_refused(tmp_path):
    path = write(tmp_path / "lora", pairs())
    model = ultrazoo.build(tiny())
    model.blocks[0].self_attn.q = Int4Linear(layouts.DIM, layouts.DIM)
    with pytest.raises(UsageError, match="not a plain linear"):
        load_lora(model, path)
    model = ultrazoo.build(tiny())
    load_lora(model, path, how="attach")
    with pytest.raises(UsageError, match=r"blocks\.0\.self_attn\.q is wrapped"):
        load_lora(model, path)
    with pytest.raises(UsageError, match="merge or attach"):
        load_lora(model, path, how="add")


def test_nothing_to_save_and_places_in_the_way(tmp_path):
    model = ultrazoo.build(tiny())
    for of, words in (("adapt", "has no branch with adapt: lora"), ("attached", "has no adapter 'default'")):
        with pytest.raises(UsageError, match=words):
            save_lora(model, tmp_path / "x", of=of)
    assert not (tmp_path / "x").exists()
    model = ultrazoo.build(tiny(PAPER))
    save_lora(model, tmp_path / "x", of="adapt")
    with pytest.raises(OutputError, match="exists; use --force"):
        save_lora(model, tmp_path / "x", of="adapt")
    save_lora(model, tmp_path / "x", of="adapt", force=True)


def test_the_command_line(capsys, tmp_path, base):
    path = write(tmp_path / "lora", pairs())
    ran = here(capsys, "convert", tmp_path / "base", tmp_path / "out", "--to", "diffusers", "--lora", path)
    assert ran.code == 0, ran.err
    assert "is added to 1 linears" in ran.out
    before, after = (load_file(tmp_path / d / "diffusion_pytorch_model.safetensors") for d in ("base", "out"))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == ["blocks.0.attn1.to_q.weight"]
    assert torch.allclose(after[changed[0]] - before[changed[0]], torch.full((24, 24), 4.0), atol=1e-5)
    ran = here(capsys, "convert", tmp_path / "base", tmp_path / "x", "--to", "lora", "--lora", path)
    assert ran.code == 2
    ran = here(capsys, "convert", tmp_path / "base", tmp_path / "x")
    assert ran.code == 2
    assert "say the layout to write" in ran.err
    assert not (tmp_path / "x").exists()
