"""Exports that cannot be: what is said, before which work, and that nothing is left of them."""

from __future__ import annotations

import importlib.metadata
import json
import resource
import shutil
from collections.abc import Iterator

import pytest

from tests.cli.program import here
from tests.export.conftest import IMAGE, SMALL, copied, small
from tests.export.damage import edit
from ultrazoo import assemble
from ultrazoo.errors import OutputError, UsageError
from ultrazoo.export import export


@pytest.fixture
def no_work(monkeypatch):
    """No model may be made: what cannot be is told from the plan."""

    def refuse(*_, **__):
        raise AssertionError("a model was made")

    monkeypatch.setattr(assemble, "build", refuse)
    monkeypatch.setattr(assemble, "from_pretrained", refuse)


def left(place) -> set[str]:
    return {path.name for path in place.iterdir()} - {"small.yaml", "other.yaml"}


LINES = {
    "no target": ([], "--to is missing: one of torchscript, onnx, pt2, aoti"),
    "misspelt target": (["--to", "onx"], "got 'onx'; did you mean 'onnx'?"),
    "unknown target": (["--to", "tensorrt"], "--to is one of torchscript, onnx, pt2, aoti, got 'tensorrt'"),
    "old opset": (
        ["--to", "onnx", "--opset", "22"],
        "--opset 22 is too old: attention is one operator from opset 23 on",
    ),
    "new opset": (["--to", "onnx", "--opset", "99"], "--opset is one of 23, 24, got 99"),
    "opset of another": (["--to", "pt2", "--opset", "23"], "--opset belongs to --to onnx, the target is pt2"),
    "unknown axis": (["--to", "pt2", "--dynamic", "b,tt"], "--dynamic names axes of b, t, h, w, text, got 'tt'"),
    "no axis": (["--to", "pt2", "--dynamic", " ,"], "to leave none open use --static"),
    "both": (["--to", "pt2", "--dynamic", "h", "--static"], "either --static or --dynamic"),
    "phase of none": (
        ["--to", "pt2", "--phase", "0-3"],
        "small has no steps, so there is one phase; leave --phase out",
    ),
    "unknown dtype": (
        ["--to", "pt2", "--dtype", "float8"],
        "--dtype is one of float32, float16, bfloat16, got 'float8'",
    ),
    "bfloat16 onnx": (["--to", "onnx", "--dtype", "bfloat16"], "onnxruntime has no bfloat16 kernels on a CPU"),
    "no device": (["--to", "pt2", "--device", "abacus"], "--device 'abacus'"),
    "two recipes": (["small.yaml", "--to", "pt2"], "export takes one recipe"),
    "a file in the way": (["--to", "pt2", "-o", "small.yaml"], "exists and is not a directory"),
    "below a file": (["--to", "pt2", "-o", "small.yaml/below"], "is a file, not a directory"),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=LINES)
def test_command_lines(capsys, place, no_work, line, message):
    ran = here(capsys, "export", "small.yaml", *line)
    assert ran.code == 2, (ran.out, ran.err)
    assert message in ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert left(place) == set()


RECIPES = {
    "data dependent": (
        "sparse_videogen_tiny",
        "pt2",
        "attention 'sparse_videogen' does not export to pt2 (the order of tokens",
    ),
    "block sparse": ("radial_tiny", "onnx", "lists of blocks are data"),
    "stateful": ("delta_tiny", "torchscript", "attention 'delta' does not export to torchscript"),
    "diffusers": ("z_image_2048", "pt2", "backbone 'diffusers' is another library's model"),
    "timm": ("dinov3_large_2048", "aoti", "backbone 'timm' is another library's model"),
    "an image with time": (IMAGE, "pt2", "an image and a video are two exports"),
    "a kernel that no file holds": (
        small(attention={"*": {"name": "full", "kernel": "xformers"}}),
        "pt2",
        "attention 'full' is told to use the exact kernel 'xformers', which no pt2 file can hold; use kernel: auto, sdpa or math",
    ),
}


@pytest.mark.parametrize(("recipe", "target", "message"), RECIPES.values(), ids=RECIPES)
def test_designs_are_refused_from_the_plan(tmp_path, no_work, recipe, target, message):
    opened = ["t"] if recipe is IMAGE else None
    dtype = None if isinstance(recipe, dict) else "float32"
    with pytest.raises(UsageError) as caught:
        export(recipe, target, tmp_path / "out", dtype=dtype, dynamic=opened)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_deep_in_a_design_is_found(tmp_path, no_work):
    groups = {"0": {"name": "full"}, "1": {"name": "full", "kernel": "xformers"}}
    recipe = small(attention={"*": {"name": "by_head", "groups": groups}})
    with pytest.raises(UsageError, match=r"kernel 'xformers', which no onnx file can hold.*layers 0"):
        export(recipe, "onnx", tmp_path / "out")


def test_every_layer_that_does_not_export_is_named(tmp_path, no_work):
    recipe = small(backbone={"layers": 3}, attention={"*": {"name": "full"}, "0,2": {"name": "delta"}})
    with pytest.raises(UsageError, match=r"layers 0, 2$"):
        export(recipe, "pt2", tmp_path / "out")


STEPS = {"0-1": {"*": {"name": "full"}}}


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (None, "export one phase, --phase one of 0-1, 2-5"),
        ("2-4", "--phase 2-4: the phases of small are 0-1, 2-5"),
        ("6", "--phase 6: the phases"),
        ("first", "--phase first: the phases"),
    ],
)
def test_phases_that_are_none(tmp_path, no_work, phase, message):
    with pytest.raises(UsageError, match=message):
        export(small(steps=STEPS, sampling={"steps": 6}), "pt2", tmp_path / "out", phase=phase)


def test_the_phase_alone_must_export(tmp_path, no_work):
    """What runs at other steps is in no file of this phase."""
    recipe = small(steps={"0-1": {"*": {"name": "delta"}}}, sampling={"steps": 6})
    with pytest.raises(UsageError, match="'delta' does not export to pt2"):
        export(recipe, "pt2", tmp_path / "out", phase="0-1")
    with pytest.raises(AssertionError, match="a model was made"):
        export(recipe, "pt2", tmp_path / "out", phase="2-5")


VERSIONS = {
    "none": ({"onnx": None}, "onnx is not installed"),
    "old": ({"onnxruntime": "1.18.1"}, "onnxruntime is 1.18.1 and 1.23 is the oldest that will do"),
    "both": ({"onnxscript": None, "onnxruntime": "1.9.0"}, "onnxscript is not installed; onnxruntime is 1.9.0"),
}


@pytest.mark.parametrize(("have", "message"), VERSIONS.values(), ids=VERSIONS)
def test_a_runtime_that_is_missing_or_old(capsys, place, monkeypatch, made, have, message):
    version = importlib.metadata.version

    def told(name):
        if name in have:
            if have[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return have[name]
        return version(name)

    folder = copied(made("torchscript"), place / "made")
    edit(folder, lambda content: content.update(target="onnx"))
    monkeypatch.setattr(importlib.metadata, "version", told)
    for line in (["small.yaml", "--to", "onnx"], ["--verify", folder]):
        ran = here(capsys, "export", *line)
        assert ran.code == 2, (ran.out, ran.err)
        assert message in ran.err
        assert "pip install 'ultrazoo[export]'" in ran.err
    assert left(place) == {"made"}


def test_no_compiler(capsys, place, monkeypatch, no_work):
    monkeypatch.setenv("CXX", "no-such-compiler")
    ran = here(capsys, "export", "small.yaml", "--to", "aoti")
    assert ran.code == 2
    assert "AOTInductor needs a C++ compiler and 'no-such-compiler' is not on PATH; install g++ or set CXX" in ran.err


def test_too_little_room_is_said_before_any_work(tmp_path, monkeypatch, no_work):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"has 1 kB free, .* are needed"):
        export(SMALL, "pt2", tmp_path / "out")


@pytest.fixture
def tight() -> Iterator[None]:
    """Files of at most 20 kB can be written, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up(tmp_path, tight):
    """torch's writer of scripts would end the process."""
    with pytest.raises(OutputError, match="cannot write") as caught:
        export(SMALL, "torchscript", tmp_path / "below" / "out")
    assert str(tmp_path / "below" / "out") in str(caught.value)
    # not even the directory that was made for it
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept(capsys, place, no_work):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("years")
    ran = here(capsys, "export", "small.yaml", "--to", "pt2", "-o", "out")
    assert ran.code == 2
    assert "exists; use --force" in ran.err
    ran = here(capsys, "export", "small.yaml", "--to", "pt2", "-o", "out", "--force")
    assert ran.code == 2
    assert "was not written by ultrazoo: --force does not replace it" in ran.err
    assert (place / "out" / "thesis.tex").read_text() == "years"


def test_a_built_model_takes_no_overrides(tmp_path, saved, no_work):
    with pytest.raises(UsageError, match="is built: key=value changes nothing in it any more, got 'seed=1'"):
        export(saved, "torchscript", tmp_path / "out", "seed=1")


@pytest.mark.parametrize("name", ["nothing", "nothing.onnx"])
def test_what_is_not_there_is_not_verified(capsys, place, name):
    ran = here(capsys, "export", "--verify", name)
    assert ran.code == 2
    assert f"{name}: no such file" in ran.err


def test_a_recipe_is_not_verified(capsys, place):
    (place / "other.yaml").write_text(json.dumps(SMALL))
    ran = here(capsys, "export", "--verify", "other.yaml")
    assert ran.code == 2
    assert "other.yaml is no exported file, and --to is missing" in ran.err
