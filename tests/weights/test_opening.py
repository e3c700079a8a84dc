"""Opening saved models that are damaged, edited or need what is not there."""

from __future__ import annotations

import json

import pytest

import ultrazoo
from ultrazoo import registry
from ultrazoo.errors import RegistryError, UsageError, WeightsError

from .models import PAPER, same, tiny


@pytest.fixture
def saved(tmp_path):
    ultrazoo.save(ultrazoo.build(tiny(PAPER)), tmp_path / "out")
    return tmp_path / "out"


def edit(directory, change):
    path = directory / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_not_a_model(tmp_path):
    with pytest.raises(UsageError, match="no such directory; models are opened from local directories only"):
        ultrazoo.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B")
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        ultrazoo.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    with pytest.raises(UsageError, match="was not written by ultrazoo; load foreign checkpoints by `weights:`"):
        ultrazoo.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot read"):
        ultrazoo.from_pretrained(tmp_path)


def test_a_damaged_config(saved):
    edit(saved, lambda content: content.pop("hash"))
    with pytest.raises(UsageError, match="is damaged: hash missing"):
        ultrazoo.from_pretrained(saved)


def test_an_edited_recipe(saved):
    def other_factor(content):
        (block,) = content["recipe"]["attention"].values()
        block["branches"]["global"]["compress"]["factor"] = 2

    edit(saved, other_factor)
    with pytest.raises(WeightsError, match=r"its recipe has hash .* the directory was edited"):
        ultrazoo.from_pretrained(saved)


def test_a_newer_schema(saved):
    edit(saved, lambda content: content.update(schema=99))
    with pytest.raises(UsageError, match=r"has schema 99.*upgrade ultrazoo"):
        ultrazoo.from_pretrained(saved)


def test_truncated_weights(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WeightsError, match="were written: it is damaged or cut short"):
        ultrazoo.from_pretrained(saved)
    path.unlink()
    with pytest.raises(WeightsError, match=r"lacks model\.safetensors"):
        ultrazoo.from_pretrained(saved)


def test_weights_of_another_model(saved, tmp_path):
    ultrazoo.save(ultrazoo.build(tiny()), tmp_path / "other")
    (saved / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    size = (saved / "model.safetensors").stat().st_size
    edit(saved, lambda content: content["weights"]["files"][0].update(bytes=size))
    with pytest.raises(WeightsError, match=r"missing +blocks\.0-1\.attention"):
        ultrazoo.from_pretrained(saved)


def test_a_missing_plugin_is_an_error_with_the_pip_line(saved):
    row = {"kind": "attention", "name": "acme/spiral", "distribution": "acme-attention", "version": "1.2"}
    edit(saved, lambda content: content.update(plugins=[row]))
    with pytest.raises(RegistryError, match=r"attention acme/spiral +pip install 'acme-attention==1\.2'"):
        ultrazoo.from_pretrained(saved)


def test_a_plugin_of_this_process_is_recorded_and_asked_for(tmp_path):
    from ultrazoo.attention.full import FullSpec

    spec = type("Mine", (FullSpec,), {"name": "test/mine", "__module__": __name__})
    registry.register(spec)
    try:
        model = ultrazoo.build(tiny("test/mine"))
        ultrazoo.save(model, tmp_path / "out")
        assert same(ultrazoo.from_pretrained(tmp_path / "out").state_dict(), model.state_dict())
    finally:
        registry.forget("attention", "test/mine")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [row["name"] for row in config["plugins"]] == ["test/mine"]
    with pytest.raises(RegistryError, match=r"attention test/mine +it was registered by a program"):
        ultrazoo.from_pretrained(tmp_path / "out")
