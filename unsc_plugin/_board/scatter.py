"""The scatter of a board: closeness of forgetting against kept utility, drawn or as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unsc_plugin._board.standings import Standings

Box = tuple[float, float, float, float]
Point = tuple[float, float]
Mark = tuple[str, str, float, float]


@dataclass(frozen=True)
class Frame:
    """The plot area in pixels."""

    left: float = 70
    right: float = 836
    top: float = 62
    bottom: float = 456

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point of the unit square, with a margin of 4 % around it."""
        width, height = self.right - self.left, self.bottom - self.top
        across = self.left + width * (0.04 + x) / 1.08
        return round(across, 1), round(self.bottom - height * (0.04 + y) / 1.08, 1)


_CHARACTER, _LINE, _MARKER, _TOUCHING = 6.9, 14.0, 7.0, 12.0
_ANGLES = (0, 180, 90, 270, *(a for a in range(15, 360, 15) if a % 90))
_LEGEND = (
    ("reference", "retrain"),
    ("original", "original"),
    ("ranked", "may be ranked"),
    ("unranked", "not ranked"),
    ("control", "control"),
)


def points(board: Standings) -> list[Mark]:
    """(entry, role, forgetting a, utility u) of every entry that has both, in board order."""
    return [
        (row.entry, row.role, min(max(a, 0.0), 1.0), min(max(u, 0.0), 1.0))
        for row in board.rows
        if (a := row.summary.closeness) is not None and (u := row.summary.utility) is not None
    ]


def drawing(board: Standings) -> dict[str, Any]:
    frame = Frame()
    ticks = []
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x, y = frame.place(value, value)
        ticks.append({"x": x, "y": y, "label": f"{value:g}"})
    roles = {role for _, role, _, _ in points(board)}
    legend, x_legend = [], frame.left + 8
    for role, label in _LEGEND:
        if role in roles:
            legend.append({"role": role, "label": label, "x": x_legend, "y": 516})
            x_legend += 40 + _CHARACTER * len(label)
    return {
        "width": 860,
        "height": 536,
        "frame": frame,
        "ticks": ticks,
        "legend": legend,
        "points": place_labels(points(board), frame),
        "title": f"{board.board.title}: upper right is better",
        "description": "Forgetting against kept utility: a good method comes close to retraining.",
        "x_label": "forgetting: closeness to retraining, mean a (higher is better) →",
        "y_label": "kept utility u (higher is better) →",
    }


def place_labels(marks: Sequence[Mark], frame: Frame) -> list[dict[str, Any]]:
    """Put every label beside its marker, where it covers no marker and no other label.

    Greedy: candidates are tried from near to far, and the first free one is taken; if none is
    free, the one in the way least. Labels that do not touch their marker get a leader line.
    """
    spots = [frame.place(x, y) for _, _, x, y in marks]
    page = _Page(frame, [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in spots])
    placed = []
    for (entry, role, _, _), spot in zip(marks, spots, strict=True):
        costs = {
            box: round(page.cost(box, _leader(spot, box)), 3)
            for box in _candidates(*spot, _CHARACTER * len(entry))
        }
        box = min(costs, key=costs.__getitem__)
        leader = _leader(spot, box)
        page.add(box, leader)
        end = (round(leader[-1][0], 1), round(leader[-1][1], 1)) if leader else None
        place = {"x": spot[0], "y": spot[1], "leader": end}
        text = {"text_x": round(box[0], 1), "text_y": round(box[3] - 3.5, 1)}
        placed.append({"label": entry, "role": role, **place, **text})
    return placed


class _Page:
    """What is drawn already, and how much a further label would be in its way."""

    def __init__(self, frame: Frame, markers: Sequence[Box]) -> None:
        self.inside = (frame.left + 2, frame.top - 4, frame.right + 14, frame.bottom - 2)
        self.markers, self.labels = markers, list[Box]()
        self.leaders = list[Point]()

    def add(self, box: Box, leader: Sequence[Point]) -> None:
        self.labels.append(box)
        self.leaders += leader

    def cost(self, box: Box, leader: Sequence[Point]) -> float:
        """Covered area, area outside the frame, and leader lines across labels or markers."""
        covered = sum(_overlap(box, other) for other in (*self.labels, *self.markers))
        outside = (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, self.inside)
        crossed = sum(_holds(other, point) for other in self.labels for point in leader)
        crossed += sum(_holds(box, point) for point in self.leaders)
        others = [m for m in self.markers if leader and not _holds(m, leader[0])]
        crossed += sum(_holds(other, point) for other in others for point in leader)
        return covered + 4 * outside + 20 * crossed


def _leader(spot: Point, box: Box) -> list[Point]:
    """Points along the line from a marker to its label; none if they touch."""
    end = min(max(spot[0], box[0]), box[2]), min(max(spot[1], box[1] + 2), box[3] - 2)
    if math.hypot(end[0] - spot[0], end[1] - spot[1]) <= _TOUCHING:
        return []
    steps = [i / 12 for i in range(13)]
    return [(spot[0] + t * (end[0] - spot[0]), spot[1] + t * (end[1] - spot[1])) for t in steps]


def _holds(box: Box, point: Point) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _candidates(x: float, y: float, width: float) -> list[Box]:
    """Boxes around a marker, near ones first; right and left before above and below."""
    boxes = []
    for radius in (10, 18, 28, 40, 54, 70, 88, 108, 130):
        for angle in _ANGLES:
            cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            anchor_x, anchor_y = x + radius * cos, y - radius * sin
            left = anchor_x - width * (1 - round(cos, 6)) / 2
            top = anchor_y - _LINE * (1 + round(sin, 6)) / 2
            boxes.append((left, top, left + width, top + _LINE))
    return boxes


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def text(board: Standings, width: int = 60, height: int = 15) -> str:
    """Return the scatter as text, one letter per entry and a legend.

    Entries that share a cell show as `*`; without any scored entry one line says so.
    """
    marks = points(board)
    if not marks:
        return "no entry has a score yet, so there is nothing to plot"
    cells = [[" "] * width for _ in range(height)]
    lines = []
    for i, (entry, _, x, y) in enumerate(marks):
        letter = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[i % 52]
        row, column = height - 1 - round(y * (height - 1)), round(x * (width - 1))
        cells[row][column] = letter if cells[row][column] == " " else "*"
        lines.append(f"  {letter} {entry}: a {x:.2f}, u {y:.2f}")
    body = ["│" + "".join(row).rstrip() for row in cells]
    return "\n".join(
        [
            "kept utility u against forgetting a; upper right is better, * is several entries",
            *body,
            "└" + "─" * width,
            *lines,
        ]
    )
