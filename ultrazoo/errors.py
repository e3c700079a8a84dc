"""What a user is told when something is wrong: where, what was got, the rule, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, at one place.

    `path` is dotted and relative to whoever reports it (``""`` is the node itself); `rule` is one sentence that names
    what was got and what is allowed; `fix` says what to do.
    """

    path: str
    rule: str
    fix: str = ""
    line: int | None = None
    file: str | None = None

    def under(self, prefix: str) -> Problem:
        """The same problem seen from the parent: `prefix` is put in front of the path."""
        path = ".".join(part for part in (prefix, self.path) if part)
        return replace(self, path=path)

    def __str__(self) -> str:
        where = self.path or "(top)"
        if self.line is not None:
            where += f" (line {self.line})"
        return f"{where}   {self.rule}" + (f"; {self.fix}" if self.fix else "")


class UltrazooError(Exception):
    """A failure with a message meant for the user. `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(UltrazooError):
    """Wrong recipe, option, name or file: the user can mend it. Exit code 2."""

    exit_code = 2


class ProblemsError(UsageError):
    """All problems of one source at once."""

    def __init__(self, source: str, problems: Sequence[Problem]):
        self.source = source
        self.problems = tuple(problems)
        super().__init__(self.render())

    def render(self) -> str:
        count = len(self.problems)
        lines = [f"{self.source}: {count} problem{'s' if count != 1 else ''}"]
        rows = []
        for problem in self.problems:
            where = problem.path or "(top)"
            place = ""
            if problem.file and problem.file != self.source:
                place = f"{problem.file}:{problem.line}" if problem.line is not None else problem.file
            elif problem.line is not None:
                place = f"line {problem.line}"
            rows.append((where + (f" ({place})" if place else ""), problem))
        width = min(max((len(where) for where, _ in rows), default=0), 60)
        for where, problem in rows:
            lines.append(f"  {where:<{width}}   {problem.rule}" + (f"; {problem.fix}" if problem.fix else ""))
        return "\n".join(lines)


class RecipeError(ProblemsError):
    """A recipe that cannot be built."""


class SiteError(ProblemsError):
    """A part was asked to run at a place or size where it cannot."""


class RegistryError(UsageError):
    """A name that is unknown, claimed twice, broken or incompatible."""


class KernelError(UltrazooError):
    """No attention kernel can run these inputs; the message lists every candidate's reasons."""


class WeightsError(UsageError):
    """A checkpoint that does not fit, is damaged or is not safe to read."""


class OutputError(UsageError):
    """An output place that exists already, cannot be written or is too small."""


class CheckFailed(UltrazooError):
    """A requested check did not hold. Exit code 3."""

    exit_code = 3


def near(got: str, allowed: Iterable[str]) -> str:
    """``did you mean 'x'?`` when a legal name is close to `got`, else the empty string."""
    names = list(allowed)
    match = [name for name in names if name.lower() == got.lower()][:1]
    match = match or difflib.get_close_matches(got, names, n=1, cutoff=0.6)
    return f"did you mean {match[0]!r}?" if match else ""


def listed(names: Iterable[str]) -> str:
    """Names for an error message: ``a, b, c``."""
    return ", ".join(names)
