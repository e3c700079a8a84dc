"""Plugins that raise, leave, crash, hang, clash, shadow or speak another contract: all told apart, none harmful."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.plugins.fresh import Environment, fresh, good, package

RECIPE = """\
schema: 1
name: r
video: {{grid: [1, 4, 4]}}
backbone: {{name: dit, preset: s_2, layers: 1}}
attention: {{"*": {{name: {name}}}}}
"""
LIMIT = "20"


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = fresh(tmp_path_factory.mktemp("bad") / "env")
    source = tmp_path_factory.mktemp("packages")
    made.install(
        package(source / "a", "acme-broken", {"acme/broken": "Mine"}, "raise RuntimeError('no driver\\n for this')"),
        package(source / "b", "acme-leaves", {"acme/leaves": "Mine"}, "import sys; sys.exit(0)"),
        package(source / "c", "acme-crash", {"acme/crash": "Mine"}, "import os; os.kill(os.getpid(), 11)"),
        package(source / "d", "acme-hang", {"acme/hang": "Mine"}, "import time\nwhile True:\n    time.sleep(1)"),
        package(source / "e", "acme-empty", {"acme/empty": "Mine"}, ""),
        package(source / "f", "acme-noisy", {"acme/noisy": "Mine"}, "print('{\"ok\": false}')\n" + good("acme/noisy")),
        package(source / "g", "twin-one", {"twin/same": "Mine"}, good("twin/same")),
        package(source / "h", "twin-two", {"twin/same": "Mine"}, good("twin/same"), version="2.0"),
        package(source / "i", "acme-shadow", {"full": "Mine"}, good("full")),
        package(source / "j", "acme-future", {"acme/future": "Mine"}, good("acme/future", contract=2)),
        package(source / "k", "acme-other", {"acme/other": "Mine"}, good("acme/another")),
        package(source / "l", "acme-plain", {"plain": "Mine"}, good("plain")),
    )
    return made


def test_listing_shows_what_metadata_shows(env):
    begun = time.perf_counter()
    shown = env.ultrazoo("list", "plugins", "--json")
    # the one that hangs was not imported
    assert time.perf_counter() - begun < 10
    assert shown.returncode == 0, shown.stderr
    rows = [(row["name"], row["distribution"], row["status"]) for row in json.loads(shown.stdout)]
    assert ("acme/hang", "acme-hang", "not loaded") in rows
    assert ("twin/same", "twin-one", "duplicate") in rows
    assert ("twin/same", "twin-two", "duplicate") in rows
    assert ("full", "acme-shadow", "refused") in rows
    assert ("plain", "acme-plain", "refused") in rows


def test_check_tells_every_cause(env):
    begun = time.perf_counter()
    shown = env.ultrazoo("list", "plugins", "--check", "--timeout", LIMIT)
    assert time.perf_counter() - begun < 120
    assert shown.returncode == 3, shown.stderr
    lines = {line.split()[2]: line for line in shown.stdout.splitlines()}
    assert "broken: RuntimeError: no driver for this" in lines["acme-broken"]
    assert "broken: SystemExit: 0" in lines["acme-leaves"]
    assert "broken: the importing process was killed by SIGSEGV" in lines["acme-crash"]
    assert f"broken: import still not done after {LIMIT} s" in lines["acme-hang"]
    assert "broken: acme_empty has no 'Mine'" in lines["acme-empty"]
    assert lines["acme-noisy"].rstrip().endswith(" ok")
    assert "twin-one 1.0, twin-two 2.0" in lines["twin-one"]
    assert "tries to shadow the built-in" in lines["acme-shadow"]
    assert "speaks contract 2" in lines["acme-future"]
    assert "upgrade ultrazoo" in lines["acme-future"]
    assert "calls itself 'acme/another'" in lines["acme-other"]
    assert "cannot be used" in shown.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("acme/broken", ["acme-broken 1.0", "does not import", "RuntimeError: no driver"]),
        ("acme/leaves", ["acme-leaves 1.0", "does not import", "SystemExit"]),
        ("acme/hang", ["acme-hang 1.0", "does not import", "still not done after 3 s"]),
        ("twin/same", ["claimed by twin-one 1.0, twin-two 2.0"]),
        ("acme/future", ["speaks contract 2"]),
        ("plain", ["vendor/name"]),
    ],
)
def test_a_recipe_that_names_one_is_an_error(env, tmp_path: Path, name, words):
    (tmp_path / "r.yaml").write_text(RECIPE.format(name=name))
    shown = env.ultrazoo("build", "r.yaml", cwd=tmp_path, ULTRAZOO_PLUGIN_SECONDS="3")
    assert shown.returncode == 2, (shown.stdout, shown.stderr)
    for word in words:
        assert word in shown.stderr
    assert "attention.*.name (line 5)" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_the_others_go_on_working(env, tmp_path: Path):
    (tmp_path / "r.yaml").write_text(RECIPE.format(name="acme/noisy"))
    shown = env.ultrazoo("check", "r.yaml", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    # a built-in cannot be shadowed
    (tmp_path / "r.yaml").write_text(RECIPE.format(name="full"))
    shown = env.ultrazoo("plan", "r.yaml", "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["plugins"] == []


def test_environment_report_names_them(env):
    shown = env.ultrazoo("env", "--json")
    assert shown.returncode == 0, shown.stderr
    assert "acme/hang" in {row["name"] for row in json.loads(shown.stdout)["plugins"]}
