"""`--plugin file.py`: parts of a local file, only when asked for on the command line."""

from __future__ import annotations

import pytest

from tests.plugins.fresh import good
from ultrazoo import registry
from ultrazoo.cli import main

RECIPE = """\
schema: 1
name: r
video: {grid: [1, 4, 4]}
backbone: {name: dit, preset: s_2, layers: 1}
attention: {"*": {name: mine/block}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "block.py").write_text(good("mine/block"))
    yield tmp_path
    registry.forget("attention", "mine/block")


def test_a_local_file_is_loaded_when_asked(place, capsys):
    assert main(["check", "r.yaml"]) == 2
    assert "mine/block" in capsys.readouterr().out
    assert main(["check", "r.yaml", "--plugin", "block.py"]) == 0
    registry.forget("attention", "mine/block")
    assert main(["--plugin=block.py", "describe", "mine/block"]) == 0
    assert "mine/block" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("x = 1", "defines no spec"),
        ("def", "SyntaxError"),
    ],
)
def test_a_bad_file_is_one_message(place, capsys, code, words):
    (place / "block.py").write_text(code)
    assert main(["check", "r.yaml", "--plugin", "block.py"]) == 2
    told = capsys.readouterr().err
    assert "--plugin block.py" in told
    assert words in told
    assert "Traceback" not in told


def test_a_file_that_hangs_is_given_up(place, capsys, monkeypatch):
    monkeypatch.setenv("ULTRAZOO_PLUGIN_SECONDS", "0.5")
    (place / "block.py").write_text("while True: pass")
    assert main(["check", "r.yaml", "--plugin", "block.py"]) == 2
    assert "still not done after 0.5 s" in capsys.readouterr().err


def test_a_recipe_cannot_load_a_file(place, capsys):
    (place / "r.yaml").write_text(RECIPE + "plugin: block.py\n")
    assert main(["check", "r.yaml"]) == 2
    assert "plugin" in capsys.readouterr().out
