"""The line plots of a board: accuracy against the forgotten share, drift over the requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unsc_plugin._board.drift import Drift, Line
from unsc_plugin._board.matched import Matched, MatchedEntry, Place
from unsc_plugin._board.standings import Standings
from unsc_plugin.metrics.goal import LEVELS

MOST = 10
"""Entries in a plot: as many as can still be told apart."""

STARS = ("retrain", "original")
"""Entries that are drawn as one point, where they end."""

PER_ROW = 3
_CHARACTER, _ROW = 6.9, 22.0
_LEFT, _GAP, _TOP, _BELOW = 64.0, 74.0, 92.0, 58.0

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """The range of an axis with its ticks and its label."""

    label: str
    low: float
    high: float
    step: float

    @property
    def ticks(self) -> list[float]:
        """The values that are marked."""
        count = math.floor((self.high - self.low) / self.step + 1e-9)
        return [self.low + i * self.step for i in range(count + 1)]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a line per entry, and entries that are a single point."""

    title: str
    x: Axis
    y: Axis
    lines: dict[str, Curve]
    stars: dict[str, tuple[float, float]]


def matched_drawing(board: Standings) -> dict[str, Any]:
    """Return the values of `matched.svg`: one panel per scenario with trajectories."""
    shown = _shown_matched(board.matched)
    panels = []
    for found in board.matched:
        kept = {entry.entry: entry for entry in found.entries}
        lines = {name: _matched_curve(kept[name]) for name in shown if name in kept}
        ends = [(entry.entry, _dot(entry.end)) for entry in found.entries if entry.entry in STARS]
        stars = {name: dot for name, dot in ends if dot is not None}
        heights = [y for line in (*lines.values(), list(stars.values())) for _, y in line]
        x = Axis("forget set forgotten, % →", 0, 100, 25)
        y = percent_axis("test accuracy, % →", heights)
        panels.append(Panel(found.scenario, x, y, lines, stars))
    return drawing(
        panels,
        shown,
        title="What is kept at equal forgetting: higher is better",
        description="Points: the start; the first step with 25, 50, 75, 100 % forgotten, where "
        "every unit came there; else the end.",
    )


def _shown_matched(scenarios: Sequence[Matched]) -> list[str]:
    """Choose the entries of the plot: by rank at full forgetting, best over the scenarios first."""
    places: dict[str, list[float]] = {}
    for found in scenarios:
        others = [e for e in found.entries if not e.candidate.pinned and _dot(e.start)]
        for number, entry in enumerate(others):
            rank = entry.at(1.0).rank
            place = number + 1.0 if rank is not None else 1000.0 + number
            places.setdefault(entry.entry, []).append(place)
    means = {name: sum(each) / len(each) for name, each in places.items()}
    return sorted(means, key=lambda name: (means[name], name))[:MOST]


def _matched_curve(entry: MatchedEntry) -> Curve:
    """Return the start, the levels that every unit reached, and the end if it is further on."""
    reached = [place for place in entry.levels if place.reached == place.units]
    dots = [dot for place in (entry.start, *reached) if (dot := _dot(place)) is not None]
    end = _dot(entry.end)
    if end is not None and len(reached) < len(LEVELS) and end[0] > dots[-1][0]:
        dots.append(end)
    return [dot for at, dot in enumerate(dots) if at == 0 or dot != dots[at - 1]]


def _dot(place: Place) -> tuple[float, float] | None:
    if place.share is None or place.test is None:
        return None
    return 100 * place.share, 100 * place.test.estimate


def drift_drawing(board: Standings) -> dict[str, Any]:
    """Return the values of `drift.svg`: two panels per scenario that is a sequence."""
    names: list[str] = []
    for found in board.drift:
        pinned = [e.entry for e in found.entries if e.entry in STARS]
        others = [e.entry for e in found.entries if not e.candidate.pinned and any(e.test_line)]
        names += [name for name in (*pinned, *others) if name not in names]
    shown = names[:MOST]
    panels = [panel for found in board.drift for panel in _drift_panels(found, shown)]
    return drawing(
        panels,
        shown,
        title="Drift over the requests: higher is better in both",
        description="Means over units; a line ends where a unit has no number, "
        "for example after it diverged.",
        per_row=2,
    )


def _drift_panels(found: Drift, shown: Sequence[str]) -> list[Panel]:
    entries = {entry.entry: entry for entry in found.entries}
    x = Axis("request →", 1, max(found.requests, 2), max(1, math.ceil(found.requests / 10)))
    panels = []
    for label, lines in (
        ("earlier instances still forgotten", {n: e.share_line for n, e in entries.items()}),
        ("test accuracy", {n: e.test_line for n, e in entries.items()}),
    ):
        curves = {name: _points(lines[name]) for name in shown if name in lines}
        y = percent_axis("% →", [y for line in curves.values() for _, y in line])
        panels.append(Panel(f"{found.scenario}: {label}", x, y, curves, {}))
    return panels


def _points(line: Line) -> Curve:
    return [(t + 1.0, 100 * value) for t, value in enumerate(line) if value is not None]


def percent_axis(label: str, values: Sequence[float]) -> Axis:
    """Return an axis around `values`, at least 5 wide, with limits on its ticks, in 0..100."""
    low, high = (min(values), max(values)) if values else (0.0, 100.0)
    step = next((s for s in (1, 2, 5, 10) if (high - low) / s <= 6), 20)
    bottom = max(0, math.floor(low / step) * step)
    top = min(100, max(math.ceil(high / step) * step, bottom + 5 * step))
    return Axis(label, max(0, min(bottom, top - 5 * step)), top, step)


def drawing(
    panels: Sequence[Panel],
    shown: Sequence[str],
    *,
    title: str,
    description: str,
    per_row: int = PER_ROW,
) -> dict[str, Any]:
    """Return what the template draws: panels in rows, below them one legend for all."""
    columns = max(1, min(per_row, len(panels)))
    width = 860.0 if columns < PER_ROW else 1120.0
    across = (width - _LEFT - 24 - _GAP * (columns - 1)) / columns
    down = min(330.0, max(240.0, across * 0.78))
    drawn = []
    for number, panel in enumerate(panels):
        left = _LEFT + (number % columns) * (across + _GAP)
        top = _TOP + (number // columns) * (down + _TOP + _BELOW - 40)
        drawn.append(_placed(panel, shown, (left, top, left + across, top + down)))
    bottom = max((one["bottom"] for one in drawn), default=_TOP) + _BELOW
    starred = any(panel.stars for panel in panels)
    legend, end = _legend(shown, sorted({s for p in panels for s in p.stars}), width, bottom)
    return {
        "width": width,
        "height": end + 14,
        "left": _LEFT,
        "title": title,
        "description": description,
        "panels": drawn,
        "legend": legend,
        "starred": starred,
    }


def _placed(
    panel: Panel, shown: Sequence[str], box: tuple[float, float, float, float]
) -> dict[str, Any]:
    """Return a panel in pixels, with a margin of 4 % inside its frame."""
    left, top, right, bottom = box

    def across(value: float) -> float:
        share = (value - panel.x.low) / (panel.x.high - panel.x.low)
        return round(left + (right - left) * (0.04 + 0.92 * share), 1)

    def up(value: float) -> float:
        share = (value - panel.y.low) / (panel.y.high - panel.y.low)
        return round(bottom - (bottom - top) * (0.04 + 0.92 * share), 1)

    def label(value: float) -> str:
        return f"{value:g}"

    lines = [
        {"style": shown.index(name), "name": name, "points": [(across(x), up(y)) for x, y in line]}
        for name, line in panel.lines.items()
    ]
    stars = [{"name": name, "x": across(x), "y": up(y)} for name, (x, y) in panel.stars.items()]
    return {
        "left": round(left, 1),
        "top": round(top, 1),
        "right": round(right, 1),
        "bottom": round(bottom, 1),
        "title": panel.title,
        "x_label": panel.x.label,
        "y_label": panel.y.label,
        "x_ticks": [{"at": across(v), "label": label(v)} for v in panel.x.ticks],
        "y_ticks": [{"at": up(v), "label": label(v)} for v in panel.y.ticks],
        "lines": [line for line in lines if line["points"]],
        "stars": stars,
        "empty": not any(panel.lines.values()),
    }


def _legend(
    shown: Sequence[str], stars: Sequence[str], width: float, top: float
) -> tuple[list[dict[str, Any]], float]:
    """Return the items of the legend in rows, and where they end."""
    items, x, y = [], _LEFT, top
    for kind, names in (("line", shown), ("star", stars)):
        for style, name in enumerate(names):
            wide = 46 + _CHARACTER * len(name)
            if x > _LEFT and x + wide > width - 16:
                x, y = _LEFT, y + _ROW
            items.append(
                {"kind": kind, "style": style, "name": name, "x": round(x, 1), "y": round(y, 1)}
            )
            x += wide
    return items, y
