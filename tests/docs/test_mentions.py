"""The documents name only commands, flags, make targets, files and recipes that exist."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.docs.shell import ROOT, blocks, commands, inline, pages
from ultrazoo.cli.app import Settings, program

VERBS = program(Settings()).commands
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def _spoken(file: str) -> list[list[str]]:
    """Every command line of a page: fenced ones, and code spans that start like one."""
    found = [words for block in blocks(file) if block.language == "bash" for words in commands(block)]
    for span in inline(file):
        if re.match(r"(\.venv/bin/)?(ultrazoo|make) ", span):
            try:
                found.append(shlex.split(span))
            except ValueError:
                found.append(span.split())
    return found


@pytest.mark.parametrize("file", pages())
def test_every_command_exists(file: str) -> None:
    wrong = []
    for words in _spoken(file):
        words[0] = words[0].removeprefix(".venv/bin/")
        if words[0] == "make":
            wrong += [" ".join(words) for word in words[1:] if "=" not in word and word not in TARGETS]
        elif words[0] == "ultrazoo":
            wrong += _wrong_flags(words)
    assert not wrong, f"{file} mentions what does not exist: {wrong}"


def _wrong_flags(words: list[str]) -> list[str]:
    arguments = words[1:]
    while arguments and arguments[0].startswith("-"):
        if arguments[0] in ("--help", "-h", "--version"):
            return []
        if arguments[0] not in ("--debug", "--plugin"):
            return [" ".join(words)]
        arguments = arguments[2 if arguments[0] == "--plugin" else 1 :]
    if not arguments or arguments[0] not in VERBS:
        return [" ".join(words)] if arguments else []
    known = {"--help", "-h", "--debug", "--plugin"}
    for parameter in VERBS[arguments[0]].params:
        known |= {*parameter.opts, *parameter.secondary_opts}
    flags = [word.partition("=")[0] for word in arguments[1:] if re.match(r"--?[a-zA-Z]", word)]
    return [f"{' '.join(words)}: {flag}" for flag in flags if flag not in known]


@pytest.mark.parametrize("file", pages())
def test_every_recipe_and_link_exists(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    missing = [name for name in re.findall(r"\brecipes/[\w-]+\.yaml", text) if not (ROOT / name).exists()]
    missing += _dead_links(file, text)
    assert not missing, f"{file} points at what does not exist: {missing}"


def _dead_links(file: str, text: str) -> list[str]:
    generated = ("reference/parts.md", "reference/commands.md", "gallery.md", "export-proofs.md")
    dead = []
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if target.startswith(("https://", "mailto:")) or target.endswith(generated):
            continue
        if not ((ROOT / file).parent / target).exists():
            dead.append(target)
    return dead


def test_a_wrong_command_is_noticed() -> None:
    assert _wrong_flags(["ultrazoo", "plann", "x"])
    assert _wrong_flags(["ultrazoo", "plan", "x", "--jsn"])
    assert not _wrong_flags(["ultrazoo", "plan", "x", "--json"])
