"""Torch files: tensors come out, code never runs."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import zipfile

import pytest
import torch

from ultrazoo.errors import WeightsError
from ultrazoo.weights.reader import open_checkpoint

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def opened(path):
    with open_checkpoint(path) as checkpoint:
        return {key: checkpoint.tensor(key).clone() for key in checkpoint}


def same(got):
    return set(got) == set(TENSORS) and all(
        torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in TENSORS.items()
    )


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("archive", [True, False])
def test_a_plain_state_dict(tmp_path, suffix, archive):
    path = tmp_path / f"x{suffix}"
    torch.save(collections.OrderedDict(TENSORS), path, _use_new_zipfile_serialization=archive)
    assert same(opened(path))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_inside_a_training_checkpoint(tmp_path, wrapper):
    torch.save({wrapper: TENSORS, "epoch": 3, "hparams": {"lr": 1e-4}}, tmp_path / "x.ckpt")
    assert same(opened(tmp_path / "x.ckpt"))


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("archive", [True, False])
def test_code_is_refused_and_does_not_run(tmp_path, archive, monkeypatch):
    # the switch that torch offers for old programs must not open this door
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trace = tmp_path / "trace"
    torch.save({**TENSORS, "evil": Evil(trace)}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=archive)
    with pytest.raises(WeightsError, match=r"x\.ckpt holds more than tensors: it wants '(posix|os)\.system'") as caught:
        open_checkpoint(tmp_path / "x.ckpt")
    assert not trace.exists()
    assert "weights_only=False" not in str(caught.value)


def test_a_bare_pickle_with_code(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(WeightsError, match=r"x\.pt"):
        open_checkpoint(tmp_path / "x.pt")
    assert not trace.exists()


def test_other_classes_are_refused(tmp_path):
    torch.save({"state_dict": TENSORS, "args": argparse.Namespace(lr=1)}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match=r"'argparse\.Namespace'"):
        open_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("archive", [True, False])
def test_truncated(tmp_path, share, archive):
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.randn(1000)}, path, _use_new_zipfile_serialization=archive)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError, match=r"x\.ckpt is (damaged|not a safe pickle)"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(3), "it holds Tensor"),
        ([torch.ones(3)], "it holds list"),
        ({}, "an empty mapping"),
        ({"epoch": 3}, "a mapping with 'epoch'"),
        ({"a": torch.ones(2), "step": 7}, "a mapping with 'a', 'step'"),
        ({"model": {"a": torch.ones(2)}, "state_dict": {"a": torch.ones(2)}}, "several state dicts, state_dict, model"),
        ({"a": torch.ones(3, 3).to_sparse()}, "'a' is not a plain tensor"),
    ],
)
def test_not_a_state_dict(tmp_path, content, words):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match=words):
        open_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_code(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "x.pt"))
    with pytest.raises(WeightsError, match="is a TorchScript archive, which holds code"):
        open_checkpoint(tmp_path / "x.pt")


def test_a_zip_that_is_not_torch(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello.txt", "hello")
    (tmp_path / "x.pth").write_bytes(buffer.getvalue())
    with pytest.raises(WeightsError, match="damaged, cut short or not a torch file"):
        open_checkpoint(tmp_path / "x.pth")
