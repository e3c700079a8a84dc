"""Opening checkpoints: files, directories, indices; what is damaged, ambiguous or not one is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ultrazoo.errors import WeightsError
from ultrazoo.weights.reader import open_checkpoint


@pytest.fixture
def tensors():
    return {"a.weight": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16)}


def index_of(directory, mapping, name="model.safetensors.index.json"):
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def test_one_file(tmp_path, tensors):
    save_file(tensors, tmp_path / "x.safetensors", metadata={"who": "me"})
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert set(checkpoint) == set(tensors)
        assert checkpoint.metadata == {"who": "me"}
        assert checkpoint.entries["b"].shape == (5,)
        assert checkpoint.entries["b"].dtype == torch.bfloat16
        assert torch.equal(checkpoint.tensor("a.weight"), tensors["a.weight"])


@pytest.mark.parametrize("place", ["", "transformer"])
def test_a_directory_with_shards(tmp_path, tensors, place):
    directory = tmp_path / place
    directory.mkdir(exist_ok=True)
    save_file({"a.weight": tensors["a.weight"]}, directory / "d-00001-of-00002.safetensors")
    save_file({"b": tensors["b"]}, directory / "d-00002-of-00002.safetensors")
    index_of(directory, {"a.weight": "d-00001-of-00002.safetensors", "b": "d-00002-of-00002.safetensors"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert {key: torch.equal(checkpoint.tensor(key), tensors[key]) for key in checkpoint} == {
            "a.weight": True,
            "b": True,
        }
        assert len(checkpoint.files) == 2


def test_pickles_beside_a_safetensors_file_are_left_alone(tmp_path, tensors):
    # as in the original Wan directories, where the text encoder and the VAE are .pth files
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"never opened")
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(tensors)


def refused(path, words):
    with pytest.raises(WeightsError, match=words):
        open_checkpoint(path)


def test_absent(tmp_path):
    refused(tmp_path / "no", "no such file or directory; weights are read from local files only")


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated(tmp_path, tensors, keep):
    save_file(tensors, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:keep])
    refused(tmp_path / "x.safetensors", "x.safetensors is damaged, cut short or not a safetensors file")


def test_something_else_under_that_name(tmp_path):
    (tmp_path / "x.safetensors").write_text("<!DOCTYPE html><html>not found</html>")
    refused(tmp_path / "x.safetensors", "not a safetensors file")


def test_unknown_suffix(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "x.gguf", r"unknown kind of file; known are \.safetensors")


def test_empty_directory(tmp_path):
    refused(tmp_path, "holds no .safetensors file and no index")


def test_a_directory_of_pickles_names_them(tmp_path):
    (tmp_path / "m.ckpt").write_bytes(b"")
    refused(tmp_path, "it holds m.ckpt: give the file you mean")


def test_two_checkpoints_in_a_directory(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    refused(tmp_path, "several checkpoints, a.safetensors, b.safetensors")


def test_missing_shard(tmp_path, tensors):
    save_file(tensors, tmp_path / "s1.safetensors")
    index_of(tmp_path, {"a.weight": "s1.safetensors", "b": "s2.safetensors"})
    refused(tmp_path, "names s2.safetensors, which is not there")


def test_index_and_shards_of_different_models(tmp_path, tensors):
    save_file(tensors, tmp_path / "s1.safetensors")
    index_of(tmp_path, {"a.weight": "s1.safetensors"})
    refused(tmp_path, "do not belong together: 'b' is in a shard, not in the index")
    index_of(tmp_path, {"a.weight": "s1.safetensors", "b": "s1.safetensors", "c": "s1.safetensors"})
    refused(tmp_path, "'c' is in the index and in no shard")


def test_a_key_in_two_shards(tmp_path, tensors):
    save_file(tensors, tmp_path / "s1.safetensors")
    save_file(tensors, tmp_path / "s2.safetensors")
    index_of(tmp_path, {"a.weight": "s1.safetensors", "b": "s2.safetensors"})
    refused(tmp_path, "stands in more than one file")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "x.bin", "sub/x.safetensors"])
def test_an_index_cannot_point_elsewhere(tmp_path, name):
    index_of(tmp_path, {"a": name})
    refused(tmp_path, "shards are .safetensors files in the same directory")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_not_an_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "has no weight_map")


def test_index_that_is_not_json(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refused(tmp_path, "is not JSON")


def test_unknown_element_type(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(tmp_path / "x.safetensors", "'a' has element type F8_E8M0")
