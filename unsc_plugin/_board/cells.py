"""What the tables of a board are made of: columns, sheets, numbers as text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

DASH = "–"
UP, DOWN = "higher is better", "lower is better"


class Column(NamedTuple):
    """A column: its label, its direction in words, whether it holds text."""

    label: str
    direction: str = ""
    text: bool = False


@dataclass(frozen=True)
class Sheet:
    """A titled table of finished text; `image` is the file of a plot and what it shows."""

    title: str
    columns: tuple[Column, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    text: tuple[str, ...] = ()
    image: tuple[str, str] | None = None


def decimals(half: float | None, default: int = 3) -> int:
    """Digits behind the point that an interval of this half-width supports, at most 4.

    One significant digit of the half-width, two where it starts with a 1.
    """
    if half is None or not math.isfinite(half) or half <= 0:
        return default
    exponent = math.floor(math.log10(half))
    digits = int(half / 10.0**exponent < 2) - exponent
    return min(max(digits, 0), 4)


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """Fixed digits behind the point, a real minus sign, no negative zero; a dash where absent."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    elif sign and value > 0:
        text = f"+{text}"
    return text.replace("-", "−")
