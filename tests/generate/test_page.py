"""docs/generation.md: its commands run as written, at a smaller size and in fewer steps, on a tiny pipeline."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from tests.cli.program import here
from tests.docs.shell import ROOT, blocks, runnable
from tests.generate.runs import NATIVE
from ultrazoo.generate.families import BY_PIPELINE
from ultrazoo.generate.media import read_note

PAGE = "docs/generation.md"
SMALLER = {
    "steps: 30": "steps: 6",
    "width: 832, height: 480, frames: 81": "width: 64, height: 64, frames: 9",
    "832x480": "64x80",
    " 81": " 5",
    "preset: t2v_1_3b": ", ".join(f"{key}: {value}" for key, value in NATIVE.items()),
}


def smaller(text: str) -> str:
    for written, tried in SMALLER.items():
        text = text.replace(written, tried)
    return text


def test_commands_of_the_page_run(capsys: Any, place: Path, wan: Path) -> None:
    (place / "wan").symlink_to(wan)
    (place / "words.txt").write_text("a blue cube\n")
    said = ""
    for block in blocks(PAGE):
        if block.title:
            (place / block.title).write_text(smaller(block.text))
        elif block.language == "bash":
            for line in runnable(block):
                words, _, target = smaller(line).partition(" > ")
                ran = here(capsys, *shlex.split(words)[1:])
                assert ran.code == 0, f"{block}: {line}\n{ran.err}"
                said += ran.err
                if target:
                    (place / target).write_text(ran.out)
        elif block.language == "text":
            assert block.text in said
    assert json.loads((place / "again.json").read_text())["seed"] == 7
    note = read_note(place / "small.mp4")
    assert (note["prompt"], note["width"], note["frames"]) == ("a blue cube", 64, 5)
    assert (place / "later.mp4").is_file()
    assert list(read_note(place / "later-engine.mp4")["engine"][0]["sha256"]) == ["model.onnx"]


def test_the_page_names_every_pipeline() -> None:
    table = (ROOT / PAGE).read_text().partition("## Families")[2].partition("## A design")[0]
    assert [name for name in BY_PIPELINE if f"`{name}`" not in table] == []
