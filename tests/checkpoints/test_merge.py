"""``adapt: lora`` merged into ``adapt: own``: the same output, fewer FLOPs, more parameters; refused where it would be wrong."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import ultrazoo
from tests.cli.program import here
from tests.weights import layouts
from tests.weights.models import PAPER, RELEASED, error_ratio, inputs, same, tiny
from ultrazoo.checkpoints.convert import convert
from ultrazoo.checkpoints.merge import merge_lora, merged_plan
from ultrazoo.errors import UsageError

PLAIN = {"name": "branched", "branches": {"a": {"adapt": {"name": "lora", "rank": 3}}, "b": {}}}
DESIGNS = {"paper": PAPER, "released": {**RELEASED, "full_first": 0}, "uncompressed": PLAIN}


def randomised(attention, dtype=torch.float32, **changes):
    """A built model whose every parameter is random, LoRAs and gates too."""
    model = ultrazoo.build(tiny(attention, **changes)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 + (parameter.ndim == 1))
    return model.to(dtype)


def run(model):
    latents, timestep, text = inputs()
    with torch.no_grad():
        return model(latents.to(model.dtype), timestep, text.to(model.dtype))


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_output_is_the_same(design, dtype):
    model = randomised(DESIGNS[design], dtype)
    due = run(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merge_lora(model)
    got = run(merged)
    assert error_ratio(got, due) < (1e-5 if dtype == torch.float32 else 1e-13)
    # the comparison sees a LoRA: without it the output is another one
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert error_ratio(run(model), due) > 1e-3
    assert not any("lora" in name for name in merged.state_dict())
    kept = {name: tensor for name, tensor in merged.state_dict().items() if name in before}
    assert same(kept, {name: before[name] for name in kept})


def test_the_hand_computed_sum():
    """One projection of the released design, whose keys start from the host's queries, in fp64 by hand."""
    model = randomised(DESIGNS["released"], torch.float64)
    state = model.state_dict()
    merged = merge_lora(model).state_dict()
    host, at = "blocks.1.self_attn.", "blocks.1.attention.branches.global_.adapt."
    a, b = state[f"{at}k.lora_A.weight"], state[f"{at}k.lora_B.weight"]
    due = state[f"{host}q.weight"].clone()
    for row in range(due.shape[0]):
        for column in range(due.shape[1]):
            due[row, column] += sum(b[row, r] * a[r, column] for r in range(a.shape[0]))
    assert error_ratio(merged[f"{at}k.weight"], due) < 1e-14
    bias = state[f"{host}q.bias"] + state[f"{at}k.lora_B.bias"] + (b * state[f"{at}k.lora_A.bias"]).sum(1)
    assert error_ratio(merged[f"{at}k.bias"], bias) < 1e-14


def test_bf16_is_as_close_as_its_rounding():
    model = randomised(DESIGNS["released"])
    due = run(model)
    half = randomised(DESIGNS["released"]).to(torch.bfloat16)
    plain = error_ratio(run(half).float(), due)
    assert error_ratio(run(merge_lora(half)).float(), due) < 2 * plain


@pytest.mark.parametrize("recipe", ["ultragen_1080p", "ultragen_4k"])
def test_plan_shows_fewer_flops_and_more_parameters(recipe):
    plan = ultrazoo.plan(recipe)
    after = merged_plan(plan)
    flops = [t.attention_flops + t.projection_flops + t.other_flops for t in (plan.totals, after.totals)]
    assert flops[1] < flops[0]
    assert after.totals.attention_flops == plan.totals.attention_flops
    C, rank, sparse = 1536, 64, 30
    # per branch and projection: an own matrix with its bias instead of two thin ones
    grown = sparse * 2 * 3 * (C * C + C - 2 * rank * C)
    assert after.totals.parameters - plan.totals.parameters == grown
    assert after.hash != plan.hash


def test_streamed_and_in_memory_agree(capsys, tmp_path):
    model = randomised(PAPER)
    ultrazoo.save(model, tmp_path / "d")
    ran = here(capsys, "convert", tmp_path / "d", tmp_path / "m", "--merge-lora", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["after"]["flops"] < told["before"]["flops"]
    assert told["after"]["parameters"] > told["before"]["parameters"]
    streamed = ultrazoo.from_pretrained(tmp_path / "m")
    merged = merge_lora(model)
    assert same(streamed.state_dict(), merged.state_dict())
    assert streamed.plan.hash == merged.plan.hash == told["after"]["hash"]
    assert error_ratio(run(streamed), run(model)) < 1e-5
    ultrazoo.save(merged, tmp_path / "again")
    assert same(ultrazoo.from_pretrained(tmp_path / "again").state_dict(), merged.state_dict())
    assert streamed.origin["merged"] == model.plan.hash
    text = here(capsys, "convert", tmp_path / "d", tmp_path / "m", "--merge-lora", "--force").out
    assert "adapt: lora merged into adapt: own: forward" in text


def test_a_released_file_is_merged_on_its_way(tmp_path):
    tensors = layouts.tensors(layouts.ultragen((0, 1), rank=4))
    torch.save(tensors, tmp_path / "x.ckpt")
    options = {"overrides": (f"backbone.heads={layouts.HEADS}", "attention.*.windows=2", "video.grid=[2,8,9]")}
    convert(tmp_path / "x.ckpt", tmp_path / "lora", "ultrazoo", **options)
    convert(tmp_path / "x.ckpt", tmp_path / "own", "ultrazoo", merge=True, **options)
    due, got = (run(ultrazoo.from_pretrained(tmp_path / name)) for name in ("lora", "own"))
    assert error_ratio(got, due) < 1e-5
    assert error_ratio(got * 0.5, due) > 0.1


def test_alternatives_at_other_steps_are_merged_too():
    steps = {"0-1": {"*": {**PAPER, "rank": 2, "windows": 4}}}
    model = randomised(PAPER, sampling={"steps": 4}, steps=steps)
    merged = merge_lora(model)
    assert not any("lora" in name for name in merged.state_dict())
    for step in (0, 3):
        for one in (model, merged):
            one.select(step, 4)
        assert error_ratio(run(merged), run(model)) < 1e-5


def test_alternatives_that_would_become_one_are_refused():
    model = randomised(PAPER, sampling={"steps": 4}, steps={"0-1": {"*": {**PAPER, "rank": 2}}})
    with pytest.raises(UsageError, match="merging would make one design of two"):
        merge_lora(model)


def test_nothing_to_merge(capsys, tmp_path):
    with pytest.raises(UsageError, match="has no branch with adapt: lora"):
        merge_lora(ultrazoo.build(tiny()))
    with pytest.raises(UsageError, match="has no plan"):
        merge_lora(nn.Linear(2, 2))
    ultrazoo.save(ultrazoo.build(tiny()), tmp_path / "d")
    ran = here(capsys, "convert", tmp_path / "d", tmp_path / "m", "--merge-lora")
    assert ran.code == 2
    assert "has no branch with adapt: lora" in ran.err
    ran = here(capsys, "convert", tmp_path / "d", tmp_path / "m", "--merge-lora", "--to", "wan")
    assert ran.code == 2
    assert "has no place for; use --to ultrazoo" in ran.err
    assert not (tmp_path / "m").exists()


class Int8Linear(nn.Linear):
    """As quantisation libraries make them: a linear of another class."""


def quantise(model, path):
    old = model.get_submodule(path)
    new = Int8Linear(old.in_features, old.out_features)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def test_quantised_wrapped_and_absent_linears_are_refused():
    model = randomised(PAPER)
    quantise(model, "blocks.0.self_attn.v")
    with pytest.raises(UsageError, match=r"blocks\.0\.self_attn\.v is \w+'s Int8Linear, not a plain linear"):
        merge_lora(model)
    model = randomised(PAPER)
    weight = model.blocks[1].self_attn.k.weight
    model.blocks[1].self_attn.k.weight = nn.Parameter(weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UsageError, match=r"blocks\.1\.self_attn\.k\.weight is quantised \(Tensor, float8_e4m3fn\)"):
        merge_lora(model)
    model = randomised(PAPER)
    model.blocks[0].attention.branches["regional"].adapt["q"].lora_A.to("meta")
    with pytest.raises(UsageError, match="is on the meta device"):
        merge_lora(model)
    peft = pytest.importorskip("peft")

    model = randomised(PAPER)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["self_attn.q"]), model)
    with pytest.raises(
        UsageError, match=r"blocks\.0\.self_attn\.q is wrapped \(peft's Linear\).*unload the adapter first"
    ):
        merge_lora(model)
