"""The plugin under `plugins/` and one made by `new-plugin`, installed into a fresh environment and driven from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ultrazoo
from tests.plugins.fresh import ROOT, Environment, fresh
from ultrazoo.cli import main
from ultrazoo.errors import UsageError

ROLLING = ROOT / "plugins" / "ultrazoo-rolling"
SMALL = """\
schema: 1
name: small
video: {grid: [7, 8, 8]}
backbone: {name: wan, preset: t2v_1_3b, layers: 2, dim: 48, heads: 2, ffn_dim: 96, text_dim: 32}
attention: {"0": {name: longvideo/rolling, chunk: 2, window: 2, sinks: 1}, "1": {name: acme/ring-frames, gain: 2.0}}
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package as `ultrazoo new-plugin` writes it."""
    folder = tmp_path_factory.mktemp("written") / "acme-ring-frames"
    assert main(["new-plugin", "acme/ring-frames", "-o", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory, written: Path) -> Environment:
    made = fresh(tmp_path_factory.mktemp("fresh") / "env")
    made.install(ROLLING, written)
    return made


def test_listing_reads_metadata_only(env):
    shown = env.ultrazoo("list", "plugins", "--json")
    assert shown.returncode == 0, shown.stderr
    rows = {row["name"]: row for row in json.loads(shown.stdout)}
    assert rows["longvideo/rolling"]["status"] == rows["acme/ring-frames"]["status"] == "not loaded"
    assert rows["longvideo/rolling"]["distribution"] == "ultrazoo-rolling"
    assert rows["longvideo/wan_1_3b_rolling"]["kind"] == "recipe"
    code = (
        "import sys; from ultrazoo.cli import main; code = main(['list']); "
        "sys.exit(code or sorted({'ultrazoo_rolling', 'acme_ring_frames', 'torch'} & set(sys.modules)) or 0)"
    )
    shown = env.run("-c", code)
    assert shown.returncode == 0, shown.stderr
    assert "ultrazoo-rolling 0.1.0 (not loaded)" in shown.stdout


def test_check_imports_each_apart(env):
    shown = env.ultrazoo("list", "plugins", "--check")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert shown.stdout.count(" ok\n") == 2


def test_describe_and_plan(env):
    shown = env.ultrazoo("describe", "longvideo/rolling")
    assert shown.returncode == 0, shown.stderr
    for words in ("ultrazoo-rolling 0.1.0", "frames before its chunk", "needs tuning", "arXiv 2509.22622"):
        assert words in shown.stdout
    shown = env.ultrazoo("plan", "longvideo/wan_1_3b_rolling", "--json")
    assert shown.returncode == 0, shown.stderr
    plan = json.loads(shown.stdout)
    assert [(row["distribution"], row["version"]) for row in plan["plugins"]] == [("ultrazoo-rolling", "0.1.0")]


def test_a_build_remembers_its_plugins(env, tmp_path, capsys, monkeypatch):
    (tmp_path / "small.yaml").write_text(SMALL)
    shown = env.ultrazoo("build", "small.yaml", "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    directory = tmp_path / "outputs" / "small"
    plan = json.loads((directory / "plan.json").read_text())
    assert {row["distribution"] for row in plan["plugins"]} == {"ultrazoo-rolling", "acme-ring-frames"}
    code = (
        "import torch, ultrazoo; m = ultrazoo.from_pretrained('outputs/small', dtype='float32')\n"
        "assert float(m.blocks[1].attention.gain.detach().mean()) == 2.0\n"
        "y = m(torch.randn(1, 16, 7, 16, 16), torch.tensor([500.0]), torch.randn(1, 8, 32))\n"
        "y.square().mean().backward()\n"
        "assert y.shape == (1, 16, 7, 16, 16) and m.blocks[1].attention.gain.grad is not None"
    )
    shown = env.run("-c", code, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    # here the plugins are not installed: the message says what to install
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"pip install .*ultrazoo-rolling"):
        ultrazoo.from_pretrained("outputs/small")
    assert main(["plan", "outputs/small/recipe.yaml"]) == 2
    told = capsys.readouterr().err
    assert "'longvideo/rolling'" in told
    assert "pip install" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_tests_of_the_plugin_pass(env):
    done = env.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ROLLING, ROLLING / "tests")
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
def test_tests_of_a_written_package_pass_as_written(env, written):
    done = env.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=written)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
