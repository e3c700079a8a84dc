"""`probe` against a dense mask in fp64, against the model itself, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import ultrazoo
from tests.analysis.captures import SITE, made_capture, recipe
from tests.oracles.probe import figures
from ultrazoo.analysis import probe_picture, probe_table
from ultrazoo.analysis.capture import blocks
from ultrazoo.analysis.capture_files import Capture
from ultrazoo.analysis.probe_host import Held, ReplayHost
from ultrazoo.errors import RecipeError, UltrazooError, UsageError
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.testing import error_ratio

STATIC = {
    "windows": {"name": "branched", "branches": {"near": {"layout": {"name": "windows", "counts": [2, 2]}}}},
    "tiles": {"name": "sliding_tile", "tile": [2, 2, 2], "window": [1, 1, 3], "short": "whole"},
    "near": {"name": "neighborhood", "kernel_size": [1, 3, 3]},
    "swin": {"name": "swin", "window": [2, 2, 3]},
    "band": {"name": "block_sparse", "order": {"name": "raster", "block": 7}, "selector": {"name": "band", "width": 1}},
}


def one(held: Capture, attention: Any, **more: Any) -> Any:
    """The only row of a probe of one design."""
    return ultrazoo.probe([recipe(attention)], held, **more).rows[0]


def mask(attention: Any, grid: Grid, layer: int) -> torch.Tensor:
    """Who sees whom, from the design's own statement: bool (heads, n, m)."""
    spec, found = parse_part("attention", attention)
    assert spec is not None, found
    site = SITE.at(grid=grid, layer=layer)
    seen = spec.expand(site).visible(site)
    return torch.from_numpy(np.broadcast_to(seen, (SITE.heads, *seen.shape[1:])).copy())


@pytest.mark.parametrize("name", STATIC)
def test_static_designs_have_the_figures_of_their_dense_mask(tmp_path, name):
    held = made_capture(tmp_path)
    point = one(held, STATIC[name]).points[0]
    tensors = held.tensors(held.items[0])
    allowed = mask(STATIC[name], Grid(3, 4, 5), 1)
    errors, recalls, share = figures(tensors["q"], tensors["k"], tensors["v"], allowed)
    assert point.measured.error == pytest.approx(errors, rel=1e-4)
    assert point.measured.recall == pytest.approx(recalls, rel=1e-4)
    # a kernel may compute what it masks, never less than what is seen
    assert point.measured.share >= share * (1 - 1e-9)
    assert min(errors) > 0.05
    assert max(recalls) < 0.95
    if name in ("windows", "swin", "band"):
        assert point.measured.share == pytest.approx(share)


def test_full_attention_is_exact_and_sees_everything(tmp_path):
    row = one(made_capture(tmp_path, batch=2, extra=4), {"name": "full"})
    assert row.error < 1e-5
    assert row.recall == pytest.approx(1, abs=1e-5)
    assert row.share == pytest.approx(1)
    assert row.remarks == []


def test_extra_tokens_count_as_keys(tmp_path):
    held = made_capture(tmp_path, extra=6, batch=2)
    point = one(held, STATIC["windows"]).points[0]
    tensors = held.tensors(held.items[0])
    k, v = (torch.cat([tensors[z], tensors[f"extra_{z}"]], dim=1) for z in "kv")
    grid = mask(STATIC["windows"], Grid(3, 4, 5), 1)
    allowed = torch.cat([grid, torch.ones(*grid.shape[:2], 6, dtype=torch.bool)], dim=2)
    errors, recalls, _ = figures(tensors["q"], k, v, allowed)
    assert point.measured.error == pytest.approx(errors, rel=1e-4)
    assert point.measured.recall == pytest.approx(recalls, rel=1e-4)
    rows = allowed[0].sum() + 6 * 66
    assert point.measured.share == pytest.approx(float(rows) / 66**2)


def test_a_choice_by_the_data_is_followed_at_the_kernel(tmp_path):
    """Top-1 of blocks by means: chosen here by loops, compared with what the watch at the kernel door saw."""
    held = made_capture(tmp_path, grid=Grid(1, 4, 6))
    rule = {"name": "pooled", "rule": {"name": "topk", "count": 1}}
    design = {"name": "block_sparse", "order": {"name": "raster", "block": 4}, "selector": rule}
    point = one(held, design).points[0]
    tensors = held.tensors(held.items[0])
    q, k = tensors["q"][0].double(), tensors["k"][0].double()
    allowed = torch.zeros(3, 24, 24, dtype=torch.bool)
    for h in range(3):
        for a in range(6):
            mean = q[4 * a : 4 * a + 4, h].mean(0)
            scores = [float(mean @ k[4 * b : 4 * b + 4, h].mean(0)) for b in range(6)]
            best = scores.index(max(scores))
            allowed[h, 4 * a : 4 * a + 4, 4 * best : 4 * best + 4] = True
    errors, recalls, share = figures(tensors["q"], tensors["k"], tensors["v"], allowed)
    assert point.measured.error == pytest.approx(errors, rel=1e-4)
    assert point.measured.recall == pytest.approx(recalls, rel=1e-4)
    assert point.measured.share == pytest.approx(share) == pytest.approx(1 / 6)


def test_recall_of_sampled_queries_is_that_of_all_within_their_spread(tmp_path):
    held = made_capture(tmp_path, grid=Grid(2, 12, 12))
    all_, some = (one(held, STATIC["near"], queries=n).recall for n in (288, 96))
    assert some == pytest.approx(all_, abs=0.05)
    assert some != all_


MODEL = {
    "name": "tiny",
    "video": {"grid": [3, 5, 7]},
    "backbone": {
        "name": "wan",
        "dim": 24,
        "layers": 2,
        "heads": 2,
        "ffn_dim": 16,
        "text_dim": 8,
        "time_dim": 8,
        "channels": 4,
    },
    "attention": {"*": {"name": "full"}},
    "dtype": "float32",
}
LIVE = {
    "ultragen": {"name": "ultragen", "variant": "paper", "windows": 2, "rank": 2},
    "kv_compress": {"name": "kv_compress"},
    "window coordinates": {
        "name": "branched",
        "branches": {"near": {"layout": {"name": "windows", "counts": [2, 2]}, "coords": {"origin": "window"}}},
    },
    "own projections": {
        "name": "branched",
        "branches": {"all": {"adapt": {"name": "own"}, "compress": {"name": "avg_pool"}}},
    },
    "linear": {"name": "linear"},
    "gates": {
        "name": "branched",
        "branches": {"near": {"layout": {"name": "windows", "counts": 2}}, "all": {}},
        "fuse": {"name": "token_gate"},
    },
}


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from where it starts: the model counts as one that was trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def arguments() -> tuple[torch.Tensor, ...]:
    return torch.randn(1, 4, 3, 10, 14), torch.tensor([400.0]), torch.randn(1, 3, 8)


@pytest.mark.parametrize("name", LIVE)
def test_a_replay_is_what_the_design_does_in_the_model(tmp_path, name, monkeypatch):
    """With block inputs: the design stands in the model's place, its parameters as probe starts them."""
    model = shaken(ultrazoo.build(MODEL))
    built: list[Any] = []
    monkeypatch.setattr("ultrazoo.analysis.probe_measure._seconds", lambda _, block: built.append(block) or 1.0)
    with ultrazoo.capture(model, tmp_path / "c", layers="1", inputs=True):
        model(*arguments())
    held = Capture.load(tmp_path / "c")
    row = one(held, LIVE[name])
    assert row.lacking == {}
    tensors = held.tensors(held.items[0])
    seen: list[torch.Tensor] = []
    host = model.blocks[1].self_attn
    monkeypatch.setattr(host, "out", lambda y: seen.append(y) or y)
    call = model.session.call(1, (3, 5, 7), torch.tensor([400.0]))
    with torch.no_grad():
        built[-1](tensors["x"], host, call)
        full = blocks(model)[1]
        full(tensors["x"], host, call)
    live, reference = (y.unflatten(-1, (2, 12)) for y in seen)
    due = [float(error_ratio(live[:, :, h], reference[:, :, h])) for h in range(2)]
    assert row.points[0].measured.error == pytest.approx(due, rel=1e-3, abs=1e-5)
    assert min(due) > 0.01


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (LIVE["ultragen"], "capture with --inputs"),
        (LIVE["own projections"], "capture with --inputs"),
        (LIVE["gates"], "reads the block's input"),
        ({"name": "divided"}, "q projection starts as the model's"),
        ({"name": "spatial_reduction"}, "block's input"),
    ],
)
def test_what_cannot_be_replayed_says_why_and_has_no_number(tmp_path, attention, why):
    row = one(made_capture(tmp_path, grid=Grid(3, 6, 6)), attention)
    assert row.points == []
    assert row.error is None
    assert row.recall is None
    assert row.seconds is None
    assert why in " ".join(row.lacking)
    assert why in " ".join(row.remarks)


def test_other_positions_need_to_know_how_the_model_turns(tmp_path):
    held = made_capture(tmp_path)
    assert one(held, LIVE["window coordinates"]).points
    models = {"": replace(held.models[""], turns=False)}
    row = one(replace(held, models=models), LIVE["window coordinates"])
    assert not row.points
    assert "in a way that a capture does not hold" in " ".join(row.lacking)


def test_figures_that_do_not_exist_are_none_with_the_reason(tmp_path):
    row = one(made_capture(tmp_path), {"name": "linear"})
    assert row.lacking == {}
    found = row.points[0].measured
    assert found.recall is None
    assert found.share is None
    assert set(found.why) == {"recall", "share"}
    compressed = one(Capture.load(tmp_path), {"name": "kv_compress"}).points[0].measured
    assert compressed.recall is None
    assert "stands for several" in compressed.why["recall"]


def test_a_placeholder_never_gives_numbers(tmp_path):
    held = made_capture(tmp_path)
    tensors = held.tensors(held.items[0])
    host = ReplayHost(SITE.at(grid=Grid(3, 4, 5)), *(tensors[name] for name in "qkv"), turns=True)
    assert isinstance(host.x, Held)
    assert tuple(host.x.unflatten(1, (3, 4, 5)).shape) == (1, 3, 4, 5, 24)
    assert tuple(host.raw["k"][:, 2:7].shape) == (1, 5, 24)
    assert torch.equal(
        host.heads(None, host.raw["k"][:, 2:7], None, None)[1], host.heads(None, host.raw["k"], None, None)[1][:, 2:7]
    )
    for look in (
        lambda x: x + 1,
        lambda x: x.unflatten(1, (3, 4, 5))[:, :1],
        lambda x: torch.cat([x, x]),
        lambda x: x.sum(),
        lambda x: torch.nn.functional.linear(x, torch.ones(2, 24)),
        lambda x: float(x[0, 0, 0]),
    ):
        with pytest.raises(UltrazooError, match="block's input"):
            look(host.x)


def test_parameters_as_they_start_are_named(tmp_path):
    row = one(made_capture(tmp_path), {"name": "sparse_linear", "block": [8, 8]})
    assert "own parameters as they start" in " ".join(row.notes)
    tuned = recipe({"name": "sparse_linear", "block": [8, 8]}, weights={"path": str(tmp_path / "tuned.safetensors")})
    found = ultrazoo.probe([tuned], tmp_path).rows[0]
    assert not found.points
    assert "its own parameters are trained" in " ".join(found.lacking)


def test_steps_and_layers_have_their_own_attention(tmp_path):
    held = made_capture(tmp_path, layers=(0, 3), step=(2, 8))
    source = {
        "name": "scheduled",
        "sampling": {"steps": 8},
        "attention": {"0": STATIC["windows"], "*": {"name": "full"}},
        "steps": {"2": {"3": STATIC["near"]}},
    }
    found = {point.item.layer: point for point in ultrazoo.probe([source], held).rows[0].points}
    assert found[0].attention == "branched"
    assert found[3].attention == "neighborhood"
    with pytest.raises(UsageError, match="counted of 4, the capture has 8"):
        ultrazoo.probe([{**source, "sampling": {"steps": 4}}], held)


def test_rows_are_ranked_and_the_front_is_what_nothing_beats(tmp_path):
    held = made_capture(tmp_path)
    sources = [recipe(STATIC[name], name=name) for name in ("windows", "near", "band")] + [
        recipe({"name": "full"}, name="full")
    ]
    found = ultrazoo.probe([*sources, recipe(LIVE["gates"], name="gates")], held)
    errors = [row.error for row in found.rows if row.error is not None]
    assert errors == sorted(errors)
    assert found.rows[0].name == "full"
    assert found.rows[-1].name == "gates"
    front = found.front("share")
    assert front[-1].name == "full"
    for row in front:
        beaten = [
            other for other in found.rows if other.whole and other.error <= row.error and other.share <= row.share
        ]
        assert beaten == [row]
    data = json.loads(json.dumps(probe_table.data(found), allow_nan=False))
    assert data["recipes"][-1]["items"] == []
    assert data["recipes"][-1]["not_replayed"][0]["layer"] == 1
    assert len(probe_table.detail(found)) == 4 * 3
    assert probe_picture.plot(found).startswith(b"\x89PNG")
    assert b"windows" in probe_picture.plot(found, "svg")


def test_nothing_is_ranked_without_a_capture_or_on_random_numbers(tmp_path):
    with pytest.raises(UsageError, match="On random weights the softmax is nearly uniform"):
        ultrazoo.probe([recipe({"name": "full"})], None)
    made_capture(tmp_path, weights="random")
    with pytest.raises(UsageError, match="random numbers that its seed gives"):
        ultrazoo.probe([recipe({"name": "full"})], tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 4, "dim": 32}, ("heads 4, the capture has 3", "dim 32, the capture has 24")),
        ({"layers": 6}, ("layers 6, the capture has 4",)),
        ({"dim": 48}, ("head_dim 16, the capture has 8", "dim 48")),
    ],
)
def test_a_recipe_of_another_model_is_refused(tmp_path, change, said):
    made_capture(tmp_path)
    backbone = {"name": "wan", "dim": 24, "heads": 3, "layers": 4, "ffn_dim": 16, **change}
    source = recipe({"name": "full"}, backbone=backbone, video={"grid": [3, 4, 5]})
    with pytest.raises(UsageError) as caught:
        ultrazoo.probe([source], tmp_path)
    for words in said:
        assert words in str(caught.value)
    own = recipe({"name": "full"}, backbone={**backbone, "dim": 24, "heads": 3, "layers": 4}, video={"grid": [9, 4, 5]})
    assert "the recipe's is (9, 4, 5)" in " ".join(ultrazoo.probe([own], tmp_path).rows[0].remarks)


def test_a_grid_that_does_not_fit_and_layers_that_do_not_exist_are_refused(tmp_path):
    made_capture(tmp_path)
    with pytest.raises(RecipeError, match=r"capture's grid \(3, 4, 5\)(.|\n)*6 along t is more than the 3 tokens"):
        ultrazoo.probe([recipe({"name": "sliding_tile", "tile": [6, 2, 2]})], tmp_path)
    with pytest.raises(RecipeError, match="layer 9 does not exist"):
        ultrazoo.probe([{"name": "x", "attention": {"9": {"name": "swin"}, "*": {"name": "full"}}}], tmp_path)
    with pytest.raises(UsageError, match="it has layers 1, steps 2"):
        ultrazoo.probe([recipe({"name": "full"})], tmp_path, layers="0")
    with pytest.raises(UsageError, match="layer 7 does not exist"):
        ultrazoo.probe([recipe({"name": "full"})], tmp_path, layers="7")


def test_damaged_captures_are_refused(tmp_path):
    held = made_capture(tmp_path / "c")
    source = [recipe({"name": "full"})]
    with pytest.raises(UsageError, match="does not exist"):
        ultrazoo.probe(source, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no capture\.json"):
        ultrazoo.probe(source, tmp_path / "empty")
    file = tmp_path / "c" / held.items[0].file
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(UsageError, match="the index says"):
        ultrazoo.probe(source, tmp_path / "c")
    file.write_bytes(b"\xff" * len(whole))
    with pytest.raises(UsageError, match="cannot be read"):
        ultrazoo.probe(source, tmp_path / "c")
    file.unlink()
    with pytest.raises(UsageError, match="is missing"):
        ultrazoo.probe(source, tmp_path / "c")
    index = tmp_path / "c" / "capture.json"
    data = json.loads(index.read_text())
    index.write_text(json.dumps({**data, "ultrazoo_capture": 99}))
    with pytest.raises(UsageError, match="no capture of version 1"):
        ultrazoo.probe(source, tmp_path / "c")
    index.write_text(json.dumps({**data, "items": [{"file": "x"}]}))
    with pytest.raises(UsageError, match="is damaged"):
        ultrazoo.probe(source, tmp_path / "c")


def test_the_shipped_capture_is_small_and_of_a_trained_model():
    held = Capture.load("shapes")
    assert held.complete
    assert sum(file.stat().st_size for file in held.directory.iterdir()) <= 1_000_000
    assert held.models[""].weights == "loaded"
    found = ultrazoo.probe([recipe(STATIC["windows"]), recipe(LIVE["ultragen"], name="ultragen")], "shapes", layers="3")
    assert [row.whole for row in found.rows] == [True, True]
    assert all(row.error is not None and math.isfinite(row.error) for row in found.rows)


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_finds(tmp_path):
    held = made_capture(tmp_path, grid=Grid(2, 12, 12), extra=3)
    for design in (STATIC["near"], {"name": "sol", "tau": 0.5, "block": 12}, LIVE["window coordinates"]):
        here, there = (one(held, design, device=device, dtype=torch.float32) for device in ("cpu", "cuda"))
        assert there.error == pytest.approx(here.error, rel=1e-2)
        assert there.recall == pytest.approx(here.recall, rel=1e-2)
        assert there.share == pytest.approx(here.share, rel=1e-2)
