"""Proofs that fail: a file that is not the model ends in .unverified, is said to be so, and no other than a good one passes."""

from __future__ import annotations

import json

import pytest
import torch

import ultrazoo
from tests.backbones.models import randomise
from tests.cli.program import here
from tests.export.conftest import TARGETS, ZERO, copied, small
from tests.export.damage import change_weight, edit, sealed
from ultrazoo.errors import CheckFailed, UsageError
from ultrazoo.export import Engine, export, to_torchscript, verify

MATTERS = "blocks.0.self_attn.v.weight"


@pytest.fixture(autouse=True)
def _prover(one_prover):
    """All proofs of this file happen in one process."""


@pytest.mark.parametrize("target", TARGETS)
def test_a_good_file_is_proved_again(capsys, made, target):
    before = made(target).file.parent / "export.json"
    content = before.read_bytes()
    ran = here(capsys, "export", "--verify", made(target).file, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["proof"]["holds"] is True
    assert len(told["proof"]["cases"]) == 4
    # what held is not written again
    assert before.read_bytes() == content


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_that_is_off_by_a_thousandth_is_found(capsys, tmp_path, made, target):
    folder = copied(made(target), tmp_path / "made")
    change_weight(folder / made(target).file.name, MATTERS, lambda weight: weight * 1.001)
    sealed(folder)
    ran = here(capsys, "export", "--verify", folder)
    assert ran.code == 3, (ran.out, ran.err)
    assert "is not the model: at batch" in ran.err
    assert "allowed is 1e-05" in ran.err


@pytest.mark.parametrize("target", TARGETS)
def test_a_zero_weight_that_is_not_zero_is_found(tmp_path, made, target):
    """Weights that are all zero have other values in the proof, so it alone would not see what they are in the file."""
    folder = copied(made(target), tmp_path / "made")
    change_weight(folder / made(target).file.name, ZERO, torch.ones_like)
    sealed(folder)
    with pytest.raises(CheckFailed, match="weights that are zero in the model are not in the file") as caught:
        verify(folder)
    assert ZERO in str(caught.value)


def test_trained_weights_have_no_stand_ins_and_are_proved_as_they_are(tmp_path):
    made = export(randomise(ultrazoo.build(small())), "torchscript", tmp_path / "first")
    assert made.content["proof"]["stand_ins"] == {}
    assert made.content["weights"]["fresh"] is False
    folder = copied(made, tmp_path / "made")
    change_weight(folder / made.file.name, "head.head.bias", lambda bias: bias + 1e-3)
    sealed(folder)
    with pytest.raises(CheckFailed, match="is not the model"):
        verify(folder)


@pytest.fixture
def broken_writer(monkeypatch):
    """TorchScript that is written with one weight changed."""
    write = to_torchscript.write

    def wrong(job, folder):
        path = write(job, folder)
        change_weight(path, MATTERS, lambda weight: weight * 1.01)
        return path

    monkeypatch.setattr(to_torchscript, "write", wrong)


def test_a_failed_proof_keeps_the_file_unverified(capsys, place, broken_writer):
    ran = here(capsys, "export", "small.yaml", "--to", "torchscript", "-o", "out")
    assert ran.code == 3
    assert ran.out == ""
    file = place / "out" / "model.torchscript.pt.unverified"
    assert "out/model.torchscript.pt.unverified is not the model" in ran.err
    assert {one.name for one in file.parent.iterdir()} == {file.name, "proof.safetensors", "export.json"}
    content = json.loads((file.parent / "export.json").read_text())
    assert content["proof"]["holds"] is False
    assert max(case["ratio"] for case in content["proof"]["cases"]) > 1e-5
    for again in (file, file.parent):
        ran = here(capsys, "export", "--verify", again)
        assert ran.code == 3, ran.err
    with pytest.raises(UsageError, match="was not proved equal to its model"):
        Engine(file.parent)
    # who insists gets it
    assert Engine(file.parent, unverified=True).file == file


def test_a_proof_that_holds_after_all_is_recorded(tmp_path, made):
    folder = copied(made("torchscript"), tmp_path / "made")
    name = made("torchscript").file.name
    (folder / name).rename(folder / f"{name}.unverified")
    edit(folder, lambda content: content["proof"].update(holds=False, why="it was interrupted"))
    found = verify(folder)
    assert found.file == folder / name
    assert found.file.exists()
    content = json.loads((folder / "export.json").read_text())
    assert content["proof"]["holds"] is True
    assert "why" not in content["proof"]
    Engine(folder)


def test_a_file_that_the_runtime_cannot_read_is_not_proved(tmp_path, made):
    folder = copied(made("torchscript"), tmp_path / "made")
    file = folder / made("torchscript").file.name
    file.write_bytes(b"no script at all")
    sealed(folder)
    with pytest.raises(CheckFailed, match="does not run"):
        verify(folder)


def truncated(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def flipped(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data))


def gone(folder, name):
    (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (truncated, "model.torchscript.pt", "is damaged: it has"),
        (flipped, "model.torchscript.pt", "is damaged: its content is not what was written"),
        (gone, "model.torchscript.pt", "is missing; export again"),
        (flipped, "proof.safetensors", "is damaged: its content is not what was written"),
        (gone, "proof.safetensors", "is missing; export again"),
        (gone, "export.json", "holds no export.json"),
        (truncated, "export.json", "cannot read"),
    ],
)
def test_damaged_files_are_told_before_anything_is_loaded(capsys, tmp_path, made, damage, name, message):
    folder = copied(made("torchscript"), tmp_path / "made")
    damage(folder, name)
    file = folder / "model.torchscript.pt"
    for place in (folder, file) if file.exists() and (folder / "export.json").exists() else (file,):
        if not place.exists():
            place = folder
        ran = here(capsys, "export", "--verify", place)
        assert ran.code == 2, (ran.out, ran.err)
        assert message in ran.err
        assert "Traceback" not in ran.err
        with pytest.raises(UsageError, match=message):
            Engine(place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("ultrazoo"), "was not written by ultrazoo"),
        (lambda content: content.update(schema=99), "has schema 99, this ultrazoo"),
        (lambda content: content.update(proof=None), "is damaged: proof"),
        (lambda content: content.update(target="tensorrt"), "is one of torchscript"),
        (lambda content: content["proof"].update(holds=None, cases=[]), "exported with --no-verify"),
    ],
)
def test_what_export_json_may_not_be(capsys, tmp_path, made, change, message):
    folder = copied(made("torchscript"), tmp_path / "made")
    edit(folder, change)
    ran = here(capsys, "export", "--verify", folder)
    assert ran.code == 2, (ran.out, ran.err)
    assert message in ran.err
