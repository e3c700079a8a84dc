"""`ultrazoo export` and `ultrazoo.export`: what is written, what is told of it, and that all of it is so."""

from __future__ import annotations

import json
import zipfile
from collections import Counter

import onnx
import pytest
import torch

import ultrazoo
from tests.backbones.models import randomise
from tests.cli.program import here
from tests.export.conftest import IMAGE, SMALL, TARGETS, ZERO, small
from tests.export.damage import change_weight, sealed
from ultrazoo.errors import CheckFailed, UsageError
from ultrazoo.export import Engine, export, record, to_onnx, verify
from ultrazoo.export.latents import latents_of
from ultrazoo.export.proof import ratio
from ultrazoo.export.sizes import inputs_at
from ultrazoo.testing.poison import restored_state


@pytest.fixture(autouse=True)
def _prover(one_prover):
    """All proofs of this file happen in one process."""


def inside(file) -> dict[str, object]:
    """What a file says of itself, with nothing beside it."""
    if file.name.endswith(".onnx"):
        props = {one.key: one.value for one in onnx.load(str(file), load_external_data=False).metadata_props}
        return json.loads(props["ultrazoo"])
    with zipfile.ZipFile(file) as package:
        (name,) = [one for one in package.namelist() if one.endswith("extra/ultrazoo")]
        return json.loads(package.read(name))


@pytest.mark.parametrize("target", TARGETS)
def test_the_directory_is_what_export_json_says(made, target):
    one = made(target)
    folder = one.file.parent
    content = json.loads((folder / "export.json").read_text())
    assert content == record.read(folder)
    assert {path.name for path in folder.iterdir()} == {one.file.name, "proof.safetensors", "export.json"}
    assert {name: row["bytes"] for name, row in content["files"].items()} == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != "export.json"
    }
    assert content["hash"] == ultrazoo.plan(SMALL).hash == ultrazoo.plan(content["recipe"]).hash
    proof = content["proof"]
    assert proof["holds"] is True
    assert max(one.ratios) <= proof["allowed"] == 1e-5
    assert proof["cases"][0]["sizes"] == content["traced_at"]
    assert len({json.dumps(case["sizes"]) for case in proof["cases"]}) == 4
    assert proof["runtime"]["kernels"]
    # what is zero had other values in the proof
    assert list(proof["stand_ins"]) == [ZERO]


@pytest.mark.parametrize("target", TARGETS)
def test_the_file_alone_says_what_it_is(made, target):
    content = made(target).content
    told = inside(made(target).file)
    assert told["version"] == ultrazoo.__version__
    for key in ("name", "hash", "recipe", "inputs", "bounds", "dtype", "latents", "weights", "torch"):
        assert told[key] == content[key], key
    assert told["bounds"]["h"] == [3, 4096]
    assert told["latents"]["strides"] == [4, 8, 8]
    assert told["latents"]["statistics"]["vae"] == "Wan2.1"


def test_latent_statistics_are_those_of_the_vae():
    from diffusers import AutoencoderKLWan

    config = AutoencoderKLWan.__init__.__wrapped__.__defaults__
    found = latents_of(ultrazoo.plan(SMALL).resolved.backbone)["statistics"]
    assert found["mean"] in config
    assert found["std"] in config
    dit = latents_of(ultrazoo.plan(IMAGE).resolved.backbone)
    assert (dit["channels"], dit["output_channels"]) == (4, 8)
    assert dit["statistics"]["std"] == [1 / 0.18215] * 4
    # another VAE is not known
    other = small(backbone={"channels": 48, "strides": [4, 16, 16]})
    assert latents_of(ultrazoo.plan(other).resolved.backbone)["statistics"] is None


def test_operators_are_those_of_the_file(made):
    model = onnx.load(str(made("onnx").file))
    assert made("onnx").content["interior"]["operators"] == dict(Counter(node.op_type for node in model.graph.node))
    assert made("onnx").content["interior"]["operators"]["Attention"] == 2
    graph = torch.jit.load(str(made("torchscript").file)).inlined_graph
    found = made("torchscript").content["interior"]["operators"]
    assert found["scaled_dot_product_attention"] == 2
    assert sum(found.values()) == sum(node.kind().startswith("aten::") for node in graph.nodes())
    assert made("pt2").content["interior"]["operators"]["scaled_dot_product_attention.default"] == 2


def test_scores_are_told_by_what_ran(made):
    assert made("pt2").content["proof"]["runtime"]["flash"] is True
    assert made("torchscript").content["proof"]["runtime"]["flash"] is True
    # onnxruntime's operator holds them on a CPU
    assert made("onnx").content["proof"]["runtime"]["flash"] is False
    fit = made("onnx").content["interior"]["scores_on_cpu"]
    assert fit["fits"] is True
    t, h, w = fit["largest_grid"]
    tokens = t * -(-h // 2) * -(-w // 2)
    windows, heads = 4, 2
    assert 0.9 < windows * heads * tokens**2 * 4 / fit["memory_bytes"] <= 1
    for target in TARGETS:
        assert made(target).content["interior"]["faster_than_tokens"] is None


@pytest.fixture(scope="module")
def model(saved):
    """The model behind the trained exports."""
    return ultrazoo.from_pretrained(saved).eval()


@pytest.mark.parametrize("target", TARGETS)
def test_an_engine_is_the_model_at_any_size_within_its_bounds(made, model, target):
    engine = Engine(made(target).file)
    for at in ({"b": 1, "t": 2, "h": 3, "w": 3, "text": 2}, {"b": 3, "t": 4, "h": 9, "w": 6, "text": 19}):
        inputs = inputs_at(engine.ports, at, torch.float32, seed=7)
        with torch.no_grad():
            due = model(*inputs.values())
        assert ratio(engine(*inputs.values()), due) <= 1e-5
        assert ratio(engine(inputs["latents"] * 1.1, inputs["timestep"], inputs["text"]), due) > 1e-3
    # another dtype is taken to that of the file
    assert ratio(engine(*(value.double() for value in inputs.values())), due) <= 1e-5
    with pytest.raises(UsageError, match=r"was not exported for t = 1 \(allowed 2 to 1024\)"):
        engine(inputs["latents"][:, :, :1], inputs["timestep"], inputs["text"])
    with pytest.raises(UsageError, match="takes 3 inputs"):
        engine(inputs["latents"])


def test_axes_that_are_not_open_have_the_size_of_the_recipe(tmp_path):
    some = export(SMALL, "torchscript", tmp_path / "some", dynamic=["h", "text"])
    assert some.content["bounds"] == {"b": [1, 1], "t": [3, 3], "h": [3, 4096], "w": [7, 7], "text": [2, 4096]}
    assert {case["sizes"]["w"] for case in some.content["proof"]["cases"]} == {7}
    none = export(SMALL, "torchscript", tmp_path / "none", dynamic=[])
    assert none.content["form"] == "index arrays, sizes fixed"
    assert [case["sizes"] for case in none.content["proof"]["cases"]] == [{"b": 1, "t": 3, "h": 5, "w": 7, "text": 6}]
    engine = Engine(tmp_path / "none")
    inputs = inputs_at(engine.ports, {"b": 1, "t": 3, "h": 5, "w": 8, "text": 6}, torch.float32)
    with pytest.raises(UsageError, match=r"w = 8 \(allowed 7\)"):
        engine(*inputs.values())


@pytest.mark.parametrize("recipe", [IMAGE, small(video={"grid": [1, 5, 7]})], ids=["dit", "wan"])
def test_an_image_is_an_export_of_its_own(tmp_path, recipe):
    found = export(recipe, "torchscript", tmp_path / "image")
    assert found.content["kind"] == "image"
    assert found.content["bounds"].get("t", [1, 1]) == [1, 1]
    assert found.content["proof"]["holds"]


def test_a_schedule_is_one_file_per_phase(tmp_path):
    recipe = small(
        sampling={"steps": 4}, steps={"0-1": {"*": {"name": "full"}}}, backbone={"layers": 1}, video={"grid": [2, 6, 8]}
    )
    with restored_state(seed=5):
        ultrazoo.save(randomise(ultrazoo.build(recipe)), tmp_path / "model")
    scheduled = ultrazoo.from_pretrained(tmp_path / "model").eval()
    early = export(tmp_path / "model", "torchscript", tmp_path / "early", phase="0-1")
    # any step of a phase names it; a model that is handed in keeps its schedule
    late = export(scheduled, "torchscript", tmp_path / "late", phase="3")
    assert (early.content["phase"], late.content["phase"]) == ([0, 1], [2, 3])
    assert early.content["weights"] == late.content["weights"]
    inputs = inputs_at(Engine(early.file).ports, {"b": 1, "t": 2, "h": 6, "w": 8, "text": 3}, torch.float32)
    answers = {name: Engine(tmp_path / name)(*inputs.values()) for name in ("early", "late")}
    for step, right, wrong in ((0, "early", "late"), (1, "early", "late"), (2, "late", "early"), (3, "late", "early")):
        scheduled.select(step, 4)
        with torch.no_grad():
            due = scheduled(*inputs.values())
        assert ratio(answers[right], due) <= 1e-5
        assert ratio(answers[wrong], due) > 1e-3


@pytest.mark.parametrize(
    ("target", "dtype", "allowed"),
    [("torchscript", "float16", 2e-3), ("torchscript", "bfloat16", 1e-2), ("onnx", "float16", 2e-3)],
)
def test_half_precision_is_the_model_in_that_precision(tmp_path, target, dtype, allowed):
    found = export(IMAGE, target, tmp_path / "half", dtype=dtype)
    assert found.content["proof"]["allowed"] == allowed
    assert max(found.ratios) <= allowed
    engine = Engine(found.file)
    inputs = inputs_at(engine.ports, {"b": 1, "h": 6, "w": 5}, torch.float32)
    assert engine(*inputs.values()).dtype == getattr(torch, dtype)
    if target == "torchscript":
        change_weight(found.file, "blocks.0.ffn.2.weight", lambda weight: weight * 1.1)
        sealed(tmp_path / "half")
        with pytest.raises(CheckFailed, match="is not the model"):
            verify(found.file)


def test_weights_of_much_lie_in_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(to_onnx, "EXTERNAL_BYTES", 1000)
    found = export(IMAGE, "onnx", tmp_path / "made")
    names = set(found.content["files"])
    assert len(names) == 3
    (data,) = names - {"model.onnx", "proof.safetensors"}
    weights = sum(one.numel() for one in ultrazoo.build(IMAGE).parameters()) * 4
    assert (tmp_path / "made" / data).stat().st_size >= weights * 0.9
    assert found.content["proof"]["holds"]
    # the two stay together wherever they are taken
    (tmp_path / "made").rename(tmp_path / "moved")
    assert verify(tmp_path / "moved").content["proof"]["holds"]
    (tmp_path / "moved" / data).unlink()
    with pytest.raises(UsageError, match="is missing; export again"):
        verify(tmp_path / "moved")


def test_without_a_proof_nothing_is_claimed(capsys, place):
    ran = here(capsys, "export", "small.yaml", "--to", "torchscript", "--no-verify")
    assert ran.code == 0, ran.err
    folder = place / "exports" / "small-torchscript"
    assert {path.name for path in folder.iterdir()} == {"model.torchscript.pt", "export.json"}
    assert "none was asked for" in ran.out
    assert "no proof was run that would tell" in ran.out
    with pytest.raises(UsageError, match="exported with --no-verify"):
        Engine(folder)
    ran = here(capsys, "export", "--verify", folder)
    assert ran.code == 2
    assert "exported with --no-verify: there is nothing to compare with" in ran.err


def test_the_command_tells_what_it_made(capsys, place):
    ran = here(capsys, "export", "small.yaml", "--to", "torchscript", "-o", "a name with spaces")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].startswith("a name with spaces/model.torchscript.pt: ")
    rows = {line[:26].strip(): line[26:].strip() for line in lines[1:]}
    assert rows["sizes"] == "b 1-64, t 2-1024, h 3-4096, w 3-4096, text 2-4096"
    assert rows["grows faster than tokens"] == "no tensor does"
    assert rows["scores"].startswith("no such tensor: the kernel is flash attention")
    assert "allowed 1e-05" in rows["proof"]
    assert "scaled_dot_product_flash_attention_for_cpu" in rows["ran in"]
    # progress is no result, and no library speaks
    said = ran.err.splitlines()
    assert said[:4] == [
        said[0],
        "writing torchscript",
        "running the model at 4 sizes",
        "proving model.torchscript.pt in a fresh process",
    ]
    assert said[0].startswith("making small (")
    assert [line.partition(":")[0] for line in said[8:]] == ["note"]
    assert "deprecated TorchScript" in said[8]
    again = here(capsys, "export", "small.yaml", "--to", "torchscript", "-o", "a name with spaces", "--force", "--json")
    assert again.code == 0, again.err
    told = json.loads(again.out)
    assert told["path"] == "a name with spaces/model.torchscript.pt"
    assert "recipe" not in told
    assert told["interior"]["operators"]["scaled_dot_product_attention"] == 2
    assert {path.name for path in place.iterdir()} == {"small.yaml", "a name with spaces"}
