"""docs/backbones.md: its table is what is measured now, it names every adapter, and its plugin works as it stands there."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch

import ultrazoo
from tests.backbones.adapters import restored
from tests.backbones.adapters.test_timm import WINDOWS, another_order
from tests.docs.shell import blocks
from ultrazoo import registry
from ultrazoo.backbones.diffusers import ADAPTERS
from ultrazoo.backbones.diffusers.processor import Processor
from ultrazoo.errors import UsageError
from ultrazoo.testing import error_ratio

GRID = (3, 4, 6)


def recipe(attention, **more):
    return {"name": "x", "video": {"grid": list(GRID)}, "attention": {"*": attention}, **more}


@pytest.mark.filterwarnings("ignore")
def test_the_table_is_what_is_measured():
    page = restored.PAGE.read_text(encoding="utf-8")
    table = restored.table()
    assert restored.written(page) == table, "run python -m tests.backbones.adapters.restored and look at what changed"
    assert all(f"| `{name}` |" in table for name in ADAPTERS)
    figures = [float(line.split("< ")[-1].rstrip(" |")) for line in table.splitlines()[2:]]
    assert len(figures) == len(ADAPTERS) + 5
    assert max(figures) <= 1e-5


def test_the_page_says_what_every_adapter_refuses():
    refused = restored.PAGE.read_text(encoding="utf-8").partition("## What adapters refuse")[2].partition("\n## ")[0]
    assert not [name for name in ADAPTERS if f"`{name}`" not in refused]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The package of the page, on the path with the metadata that an installer would write."""
    code = {block.title: block.text for block in blocks("docs/backbones.md") if block.title}
    for file in ("clipmodel.py", "acme_clip.py"):
        (tmp_path / file).write_text(code[file])
    info = tmp_path / "acme_clip-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-clip\nVersion: 1.0\nSummary: clips\n")
    points = code["pyproject.toml"].replace('[project.entry-points."ultrazoo.backbone"]', "[ultrazoo.backbone]")
    (info / "entry_points.txt").write_text(points.replace('"', ""))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("clipmodel")
    for name in ("clipmodel", "acme_clip"):
        sys.modules.pop(name, None)


def made(clipmodel, **settings):
    torch.manual_seed(0)
    model = clipmodel.ClipTransformer(**settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def clip(grid=GRID, channels=4):
    torch.manual_seed(1)
    return torch.randn(2, *grid, channels), torch.tensor([0.2, 0.9])


def test_somebody_elses_model_takes_recipes(plugin):
    assert "acme/clip" in registry.names("backbone")
    model = made(plugin, dim=48, heads=3, layers=3)
    keys = list(model.state_dict())
    with torch.no_grad():
        due = [model(*clip(grid)) for grid in (GRID, (1, 5, 7))]
        report = ultrazoo.apply(model, recipe("full"))
        assert list(report.models[0].replaced) == [f"blocks.{layer}.attn" for layer in range(3)]
        found = [model(*clip(grid)) for grid in (GRID, (1, 5, 7))]
        assert max(error_ratio(one, other) for one, other in zip(found, due, strict=True)) <= 1e-6
        for module in model.modules():
            if isinstance(module, Processor):
                module.attention.register_forward_hook(another_order)
        assert error_ratio(model(*clip()), due[0]) > 1e-3, "null test"
        ultrazoo.remove(model)
        ultrazoo.apply(model, recipe(WINDOWS))
        assert error_ratio(model(*clip()), due[0]) > 1e-3
        ultrazoo.remove(model)
        assert torch.equal(model(*clip()), due[0])
    assert list(model.state_dict()) == keys


def test_it_is_built_planned_and_trained(plugin):
    config = {"dim": 48, "heads": 3}
    backbone = {"name": "acme/clip", "config": config}
    near = WINDOWS["branches"]["near"]
    gated = {
        "name": "branched",
        "branches": {"near": near, "all": {}},
        "fuse": {"name": "time_gate", "order": ["near", "all"]},
    }
    built = ultrazoo.build(recipe(gated, backbone=backbone, dtype="float32"))
    stock = made(plugin, **config)
    assert built.plan.totals.parameters == sum(p.numel() for p in built.parameters())
    assert not built.load_state_dict(stock.state_dict(), strict=False).unexpected_keys
    saving = copy.deepcopy(built)
    saving.saving = True
    for model in (built, saving):
        # two sizes with as many tokens
        sum(model(*clip(grid)).square().mean() for grid in ((3, 4, 6), (3, 6, 4))).backward()
    for (name, one), other in zip(saving.named_parameters(), built.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None and other.grad.norm() > 1e-6:
            assert error_ratio(one.grad, other.grad) <= 1e-5, name


def test_another_model_still_has_no_adapter(plugin):
    with pytest.raises(UsageError, match=r"Linear has no adapter.*acme/clip"):
        ultrazoo.apply(torch.nn.Linear(2, 2), recipe("full"))
