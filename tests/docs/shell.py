"""What the documents ask a reader to type: fenced blocks, commands and make targets."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

TUTORIALS = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("index", "quickstart", "recipes", "probe", "checkpoints", "export", "add-an-attention")
    ),
)
"""Pages whose every command is run."""

NOT_RUN = ("make", "source", "pip", "uv", "git")
"""First words of lines that set things up; make targets are checked to exist, the rest is not ours."""

_FENCE = re.compile(r'^```(\w*)(?: title="([^"]*)")?[^\n]*\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and where it starts. One with a title is a file that the reader makes."""

    file: str
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def pages() -> list[str]:
    """Every Markdown page that a reader finds in the checkout."""
    return sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@cache
def blocks(file: str) -> tuple[Block, ...]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return tuple(
        Block(file, text.count("\n", 0, found.start()) + 1, found[1], found[2] or "", found[3])
        for found in _FENCE.finditer(text)
    )


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block as words, comments and pipes cut off."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for stop in ("|", ">", "&&", ";"):
            if stop in words:
                words = words[: words.index(stop)]
        if words:
            found.append(words)
    return found


def inline(file: str) -> list[str]:
    """Code spans of a page, outside fenced blocks."""
    text = _FENCE.sub("", (ROOT / file).read_text(encoding="utf-8"))
    return re.findall(r"`([^`\n]+)`", text)


def runnable(block: Block) -> list[str]:
    """The lines of a shell block that do something, without those that only set things up."""
    lines = [line.strip() for line in block.text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#") and line.split()[0] not in NOT_RUN]
