"""Numbers for people: FLOPs, bytes, seconds, counts."""

from __future__ import annotations

from collections.abc import Mapping

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _scaled(value: float, unit: str) -> str:
    for size, prefix in _PREFIXES:
        if abs(value) >= size * 0.9995:
            return f"{_three(value / size)} {prefix}{unit}"
    return f"{_three(value)} {unit}".rstrip()


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


def flops(value: float) -> str:
    """``86.6 PFLOP``."""
    return _scaled(value, "FLOP")


def params(value: int) -> str:
    """``1.42 G``: parameters and other counts."""
    return _scaled(value, "")


def count(value: int) -> str:
    """``685 440``: every digit, grouped."""
    return f"{value:,}".replace(",", " ")


def gib(value: float) -> str:
    """Bytes as GiB or MiB: ``2.65 GiB``."""
    return f"{_three(value / 2**30)} GiB" if value >= 2**30 else f"{_three(value / 2**20)} MiB"


def duration(seconds: float) -> str:
    """``0.42 s``, ``3 min 20 s``, ``4 h 12 min``, ``3 d 5 h``."""
    if seconds < 1e-3:
        return f"{_three(seconds * 1e6)} µs"
    if seconds < 1:
        return f"{_three(seconds * 1e3)} ms"
    if seconds < 99.95:
        return f"{_three(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def ratio(value: float | None) -> str:
    """``12.19×``; a dash where there is none."""
    return "–" if value is None else f"{value:.2f}×"


def percent(value: float) -> str:
    """A share with two significant digits below ten percent: ``0.46 %``, ``8.2 %``, ``58 %``."""
    scaled = 100 * value
    if scaled == 0 or scaled >= 9.95:
        return f"{scaled:.0f} %"
    return f"{scaled:.2g} %"


def interval(bounds: Mapping[str, float]) -> str:
    """Legal numbers from `ge` or `gt` and `le` or `lt`: ``0 ≤ x < 1``, ``x ≥ 1``; empty where every number is legal."""
    low = next(((mark, bounds[key]) for key, mark in (("gt", "<"), ("ge", "≤")) if key in bounds), None)
    high = next(((mark, bounds[key]) for key, mark in (("lt", "<"), ("le", "≤")) if key in bounds), None)
    right = "" if high is None else f" {high[0]} {high[1]:.10g}"
    if low is None:
        return f"x{right}" if right else ""
    if right:
        return f"{low[1]:.10g} {low[0]} x{right}"
    return f"x {'>' if low[0] == '<' else '≥'} {low[1]:.10g}"


def ranged(what: str, bounds: Mapping[str, float]) -> str:
    """What an option takes, with its legal numbers: ``a number, 0 ≤ x < 1``."""
    return ", ".join(part for part in (what, interval(bounds)) if part)


def layer_list(layers: tuple[int, ...] | list[int]) -> str:
    """Layer numbers in the notation of recipes: ``0-2, 27-29``, ``0-28/2``."""
    numbers = sorted(set(layers))
    parts = []
    i = 0
    while i < len(numbers):
        step = numbers[i + 1] - numbers[i] if i + 1 < len(numbers) else 1
        j = i
        while j + 1 < len(numbers) and numbers[j + 1] - numbers[j] == step:
            j += 1
        # two numbers that are not neighbours are no run
        if j == i or (j == i + 1 and step != 1):
            parts.append(str(numbers[i]))
            i += 1
            continue
        parts.append(f"{numbers[i]}-{numbers[j]}" + (f"/{step}" if step != 1 else ""))
        i = j + 1
    return ", ".join(parts)
