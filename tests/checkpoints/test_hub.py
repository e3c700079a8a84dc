"""`save` and `from_pretrained` in the layout of model hubs: configuration, weights or shards with an index, a card."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import ultrazoo
from tests.weights import layouts
from tests.weights.models import PAPER, same, tiny
from ultrazoo.checkpoints.convert import convert
from ultrazoo.checkpoints.merge import merge_lora
from ultrazoo.errors import UsageError
from ultrazoo.weights import writer


@pytest.mark.parametrize("limit", [10**9, 20_000], ids=["one", "sharded"])
def test_the_hub_layout(tmp_path, monkeypatch, limit):
    monkeypatch.setitem(writer.write_checkpoint.__kwdefaults__, "limit", limit)
    model = ultrazoo.build(tiny(PAPER))
    ultrazoo.save(model, tmp_path / "d")
    names = {path.name for path in (tmp_path / "d").iterdir()}
    assert names >= {"config.json", "README.md"}
    if limit == 10**9:
        assert "model.safetensors" in names
    else:
        index = json.loads((tmp_path / "d" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(model.state_dict())
        assert set(index["weight_map"].values()) == {name for name in names if name.endswith(".safetensors")}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
        held = {}
        for name in set(index["weight_map"].values()):
            held.update(load_file(tmp_path / "d" / name))
        assert same(sorted(held.items()), sorted(model.state_dict().items()))
    assert same(ultrazoo.from_pretrained(tmp_path / "d").state_dict(), model.state_dict())


def card(directory):
    """Front matter and body of a README."""
    _, front, body = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_where_the_numbers_come_from(tmp_path):
    model = ultrazoo.build(tiny(PAPER, seed=5))
    ultrazoo.save(model, tmp_path / "fresh")
    front, body = card(tmp_path / "fresh")
    assert (front["library_name"], front["ultrazoo"]["hash"]) == ("ultrazoo", model.plan.hash)
    assert "Parameters were drawn from seed 5. Whether they were trained since is not recorded here." in body
    assert "report.html" not in body
    ultrazoo.save(merge_lora(model), tmp_path / "merged")
    assert f"LoRAs of the design with recipe hash `{model.plan.hash}` were merged" in card(tmp_path / "merged")[1]
    torch.save(layouts.tensors(layouts.wan()), tmp_path / "wan.pth")
    ultrazoo.save(ultrazoo.build(tiny(PAPER, weights={"path": str(tmp_path / "wan.pth")})), tmp_path / "loaded")
    body = card(tmp_path / "loaded")[1]
    assert "Weights came from wan.pth (format wan). What it does not hold was new." in body
    # no path of this machine in what is published
    assert str(tmp_path) not in body


def test_a_converted_directory_is_not_called_untrained(tmp_path):
    from ultrazoo.cli.building import pages

    torch.save(layouts.tensors(layouts.wan()), tmp_path / "wan.pth")
    convert(
        tmp_path / "wan.pth",
        tmp_path / "d",
        "ultrazoo",
        overrides=(f"backbone.heads={layouts.HEADS}",),
        extra_files=pages,
    )
    assert {"README.md", "report.html", "config.json", "model.safetensors"} <= {
        p.name for p in (tmp_path / "d").iterdir()
    }
    body = card(tmp_path / "d")[1]
    assert "untrained" not in body
    assert "Weights came from wan.pth (format wan)." in body


def test_only_local_directories_are_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such directory; models are opened from local directories only"):
        ultrazoo.from_pretrained("someone/model")
    with pytest.raises(UsageError, match="has no plan"):
        ultrazoo.save(torch.nn.Linear(2, 2), tmp_path / "x")
    assert not (tmp_path / "x").exists()
