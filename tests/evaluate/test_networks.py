"""Feature networks from local files: what serves, what is refused, and that nothing in a pickle is run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.evaluate import clips
from ultrazoo.errors import UsageError, WeightsError
from ultrazoo.evaluate.lpips import ALEX, _published, from_tensors
from ultrazoo.evaluate.networks import find, load


def images(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 3, 40, 48) * 2 - 1, torch.rand(count, 3, 40, 48) * 2 - 1


def test_every_form_of_the_same_state_dict(tmp_path: Path):
    tensors = clips.alexnet()
    slices = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
    package = {
        (f"net.slice{slices[int(key.split('.')[1])]}.{key.removeprefix('features.')}" if "features" in key else key): t
        for key, t in tensors.items()
    }
    save_file(tensors | {"classifier.1.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "b.pth")
    torch.save({"state_dict": package}, tmp_path / "c.pt")
    a, b = images()
    found = [load("lpips", tmp_path / name)(a, b) for name in ("a.safetensors", "b.pth", "c.pt")]
    assert found[0].shape == (2,)
    assert found[0].min() > 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_torchscript_distance_serves(tmp_path: Path):
    a, b = images()
    got = load("lpips", clips.script(clips.Euclid(), tmp_path / "lpips.pt"))(a, b)
    assert got.shape == (2,)
    assert torch.equal(got, (a - b).square().mean((1, 2, 3)).sqrt())


def test_a_backbone_of_the_published_widths_takes_the_published_stages(tmp_path: Path):
    tensors = {k: t for k, t in clips.alexnet(ALEX.widths).items() if not k.startswith("lin")}
    network = from_tensors(tensors, tmp_path)
    stages = _published("alex")
    assert [tuple(stages[k].shape) for k in range(5)] == [(1, c, 1, 1) for c in ALEX.widths]
    assert torch.equal(network.weight3, stages[3])
    narrow = {k: t for k, t in clips.alexnet().items() if not k.startswith("lin")}
    with pytest.raises(WeightsError, match=r"no weights of the stages .*\[4, 5, 6, 5, 4\]"):
        from_tensors(narrow, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"encoder.weight": torch.ones(2)}, "'encoder.weight'"),
        (lambda t: {k: v for k, v in t.items() if "features.6" not in k}, "convolutions 0, 3, 8, 10"),
        (lambda t: {k: v for k, v in t.items() if k != "features.6.bias"}, "convolution 6 has a weight or a bias"),
        (lambda t: t | {"features.3.weight": torch.ones(5, 3, 5, 5)}, "convolution 3 has shapes"),
        (lambda t: t | {"lin2.model.1.weight": torch.ones(1, 7, 1, 1)}, "weights of the stages have sizes"),
        (lambda t: {k: v for k, v in t.items() if k != "lin4.model.1.weight"}, "weights of the stages have sizes"),
    ],
)
def test_a_state_dict_that_does_not_fit(tmp_path: Path, change, words):
    with pytest.raises(WeightsError) as caught:
        from_tensors(change(clips.alexnet()), tmp_path / "lpips.safetensors")
    assert words in str(caught.value)
    assert "lpips.safetensors" in str(caught.value)


class Bomb:
    """Runs a command where it is unpickled without care."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path):
    torch.save({"features.0.weight": Bomb(tmp_path / "ran")}, tmp_path / "lpips.pth")
    with pytest.raises(WeightsError, match="refused"):
        load("lpips", tmp_path / "lpips.pth")
    assert not (tmp_path / "ran").exists()


def test_damaged_files(tmp_path: Path):
    whole = clips.script(clips.Clips(), tmp_path / "fvd.pt").read_bytes()
    (tmp_path / "fvd.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"fvd\.pt"):
        load("fvd", tmp_path / "fvd.pt")
    (tmp_path / "lpips.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(WeightsError, match=r"lpips\.safetensors"):
        load("lpips", tmp_path / "lpips.safetensors")
    save_file(clips.alexnet(), tmp_path / "frames.safetensors")
    with pytest.raises(WeightsError, match="must be a TorchScript file"):
        load("frames", tmp_path / "frames.safetensors")


def test_what_a_network_gives_is_checked(tmp_path: Path):
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(WeightsError, match=r"gives \(2, 3, 8, 8\) for a batch of 2; 'frames' must give"):
        load("frames", clips.script(clips.Broken(), tmp_path / "frames.pt"))(x)
    with pytest.raises(WeightsError, match="not finite"):
        load("frames", clips.script(clips.Frame(), tmp_path / "f.pt"))(x / 0)
    with pytest.raises(WeightsError, match=r"cannot take \(2, 3, 8, 8\)"):
        load("lpips", clips.script(clips.Broken(), tmp_path / "lpips.pt"))(x, x)


def test_a_directory_of_networks(tmp_path: Path):
    with pytest.raises(UsageError, match="holds no feature network"):
        find(tmp_path)
    with pytest.raises(UsageError, match="no such directory"):
        find(tmp_path / "absent")
    (tmp_path / "lpips.pt").touch()
    (tmp_path / "fvd.ts").touch()
    assert find(tmp_path) == {"lpips": tmp_path / "lpips.pt", "fvd": tmp_path / "fvd.ts"}
    (tmp_path / "lpips.safetensors").touch()
    with pytest.raises(UsageError, match=r"holds lpips\.safetensors, lpips\.pt; keep the one"):
        find(tmp_path)
