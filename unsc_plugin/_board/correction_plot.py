"""The plots of a board of corrections: what is kept against the size of the criterion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from unsc_plugin._board.correction_sheets import criterion_text
from unsc_plugin._board.corrections import Comparison, Corrections, Point, Row
from unsc_plugin._board.curves import Axis, Curve, Panel
from unsc_plugin._board.curves import drawing as panels_drawing
from unsc_plugin._board.trials import ORIGINAL

Spot = tuple[float, float]

TICKS = 6
NAMED = 3
FAR = 8
_HOW_TO_READ = (
    "Lines lead from the original over the rising strengths of a family; crosses and rings are "
    "single points. Means over units."
)
_LABELS = {"nll": "← NLL", "acc": "accuracy, % →"}
_TITLES = {
    "nll": "Loss against the gap that is left: left and low is better",
    "acc": "Accuracy against the gap that is left: left and high is better",
}


def drawing(board: Corrections, name: str) -> dict[str, Any]:
    """Return what the template draws: a panel per scenario, a line per family, single points.

    Args:
        board: the numbers.
        name: `nll` or `acc`, for the upright axis.
    """
    rows = [row for found in board.scenarios for row in found.rows if row.name != ORIGINAL]
    swept = list(dict.fromkeys(row.name for row in rows if row.swept))
    singles = list(dict.fromkeys(_single(row, swept) for row in rows if not row.swept))
    outside: list[str] = []
    panels = [_panel(board, found, name, swept, outside) for found in board.scenarios]
    drawn = panels_drawing(
        panels,
        [*swept, *singles],
        title=_TITLES[name],
        description=_HOW_TO_READ,
        per_row=2,
    )
    return {**drawn, "families": len(swept), "outside": _told(outside)}


def _told(outside: Sequence[str]) -> str:
    """Return the sentence about the points that are left out, empty if there are none."""
    counts = {name: outside.count(name) for name in dict.fromkeys(outside)}
    names = [f"{name} ({count})" for name, count in counts.items()]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"Far outside, not drawn (points): {', '.join(names[:NAMED])}{more}." if names else ""


def _single(row: Row, swept: Sequence[str]) -> str:
    """Return the name of a single point, apart from a family of that name."""
    return f"{row.name} (one point)" if row.name in swept else row.name


def _panel(
    board: Corrections, found: Comparison, name: str, swept: Sequence[str], outside: list[str]
) -> Panel:
    """Return a panel; what lies so far out that the rest would be one spot goes to `outside`."""
    start = [
        spot
        for row in found.rows
        if row.name == ORIGINAL
        for point in row.points
        if (spot := _spot(point, name))
    ]
    lines: dict[str, Curve] = {}
    for row in found.rows:
        spots = [spot for point in row.points if (spot := _spot(point, name)) is not None]
        if row.name == ORIGINAL or not spots:
            continue
        lines[row.name if row.swept else _single(row, swept)] = [*start * row.swept, *spots]
    inside = _frame(start, [spot for line in lines.values() for spot in line])
    for label, line in list(lines.items()):
        lines[label] = [spot for spot in line if inside(spot)]
        outside += [label] * (len(line) - len(lines[label]))
        if not lines[label]:
            del lines[label]
    spots = [*start, *(spot for line in lines.values() for spot in line)]
    return Panel(
        found.scenario.name,
        axis(f"← {criterion_text(board)}", [0.0, *(x for x, _ in spots)]),
        axis(_LABELS[name], [y for _, y in spots]),
        lines,
        dict.fromkeys([ORIGINAL], start[0]) if start else {},
    )


def _frame(start: Sequence[Spot], spots: Sequence[Spot]) -> Callable[[Spot], bool]:
    """Return whether a spot is to be drawn: near the original's gap or nearer, not far out.

    Far out is farther from the quartiles than eight times their distance, and beyond a gap 1.5
    times the original's, of which nothing was closed.
    """
    widest = max([1.5 * x for x, _ in start], default=math.inf)
    heights = [y for x, y in [*start, *spots] if x <= widest]
    low, high = np.quantile(heights, [0.25, 0.75]) if heights else (-math.inf, math.inf)
    fence = FAR * (high - low)
    ends = [y for _, y in start]
    bottom, top = min([low - fence, *ends]), max([high + fence, *ends])
    return lambda spot: spot[0] <= widest and bottom <= spot[1] <= top


def _spot(point: Point, name: str) -> tuple[float, float] | None:
    value = point.values.get(name)
    if point.magnitude is None or value is None:
        return None
    return point.magnitude.estimate, value.estimate * (100 if name == "acc" else 1)


def axis(label: str, values: Iterable[float]) -> Axis:
    """Return an axis around `values` with at most seven ticks, at 1, 2 or 5 times a power of ten.

    >>> found = axis("x", [0.0, 0.47])
    >>> found.low, found.high, found.step
    (0.0, 0.5, 0.1)
    """
    found = list(values)
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    wide = max(high - low, 1e-3 * max(abs(low), abs(high), 1.0))
    power = 10.0 ** math.floor(math.log10(wide / TICKS))
    step = next(k * power for k in (1, 2, 5, 10) if wide / (k * power) <= TICKS)
    bottom, top = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    ends = [round(end * step, digits) for end in (bottom, max(top, bottom + 1))]
    return Axis(label, ends[0], ends[1], round(step, digits))
