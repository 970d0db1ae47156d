"""What a board of corrections says by itself, in whole sentences: for its method and against it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from unsc_plugin._board.cells import DASH, decimals, number
from unsc_plugin._board.corrections import COMPARED, Comparison, Corrections, Place, Row
from unsc_plugin._board.trials import ORIGINAL
from unsc_plugin.metrics import _stats as stats

QUANTITIES = {"nll": "NLL", "acc": "accuracy"}


def plus_minus(
    interval: stats.Interval | None, *, percent: bool = False, sign: bool = False
) -> str:
    """Return an estimate with its half-width behind ±, in percent or as it is; a dash if absent."""
    if interval is None:
        return number(None)
    scale = 100 if percent else 1
    half = None if interval.half is None else scale * interval.half
    digits = min(max(decimals(half), 1), 2) if percent else max(decimals(half), 3)
    text = number(scale * interval.estimate, digits, sign=sign)
    return text if half is None else f"{text} ± {number(half, digits)}"


def difference(name: str, interval: stats.Interval | None) -> str:
    """Return a difference as text, of accuracies in percentage points."""
    text = plus_minus(interval, percent=name == "acc", sign=True)
    return f"{text} pp" if name == "acc" and interval is not None else text


NOTHING = 5e-5
"""Differences of loss and accuracy below this print as 0."""


def verdict(name: str, gap: stats.Interval) -> str | None:
    """Return how the reference fares where the rival less the reference is `gap`.

    `better`, `worse`, or `tie` where the limits hold 0 or the difference would print as 0; None
    without limits.

    >>> verdict("nll", stats.Interval(0.2, 0.1, 0.3)), verdict("acc", stats.Interval(0.2, 0.1, 0.3))
    ('better', 'worse')
    """
    if gap.low is None or gap.high is None:
        return None
    if gap.low <= 0 <= gap.high or abs(gap.estimate) < NOTHING:
        return "tie"
    return "better" if (gap.low > 0) == (name == "nll") else "worse"


def level_text(share: float) -> str:
    """Return a level in percent, a dash where it is not known.

    >>> level_text(0.25), level_text(0.0425), level_text(1.2345), level_text(math.nan)
    ('25 %', '4.2 %', '123 %', '–')
    """
    if math.isnan(share):
        return DASH
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def sentences(board: Corrections, found: Comparison) -> list[str]:
    """Return the sentences of one scenario."""
    said = []
    if board.soft is not None:
        own = next(row for row in found.rows if row.swept and row.name == board.soft)
        if len(found.rows) > 1:
            said.append(f"Differences are the other entry's numbers less those of {board.soft}.")
        said += _short(own)
        for row in found.rows:
            if row.name != ORIGINAL and row is not own:
                said += _against(board.soft, row)
    return [*said, *_flips(board.criterion, found), *_noops(found)]


def _against(soft: str, row: Row) -> list[str]:
    said = []
    for name in COMPARED:
        told: dict[str, list[str]] = {"better": [], "not": [], "open": []}
        for place in row.places:
            if (gap := place.against.get(name)) is None:
                continue
            ruling = verdict(name, gap)
            text = f"{difference(name, gap)} at {level_text(place.share)}"
            tail = {"tie": ", a tie", "worse": ", worse"}.get(ruling or "", "")
            kind = "open" if ruling is None else "better" if ruling == "better" else "not"
            told[kind].append(text + tail)
        lead = f"in {QUANTITIES[name]}:"
        if told["better"]:
            said.append(f"{soft} beats {row.name} {lead} {'; '.join(told['better'])}.")
        if told["not"]:
            said.append(f"{soft} does not beat {row.name} {lead} {'; '.join(told['not'])}.")
        if told["open"]:
            said.append(
                f"{row.name} less {soft} {lead} {'; '.join(told['open'])}; without an interval, "
                "nothing is decided."
            )
    return said + (_short(row) if row.swept else _missed(soft, row))


def _short(row: Row) -> list[str]:
    """Name the levels that a family does not reach in every unit."""
    counts: dict[str, list[str]] = {}
    for place in row.places:
        if place.reached < place.units:
            counts.setdefault(units_text(place), []).append(level_text(place.share))
    return [
        f"{row.name} comes down to {_joined(levels)} of the gap in {text} units: nothing is "
        "compared there."
        for text, levels in counts.items()
    ]


def _joined(words: Sequence[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])


def _missed(soft: str, row: Row) -> list[str]:
    """Say where the reference does not come to the place of a single point."""
    [place] = row.places
    if place.against or place.beyond or place.reached < place.units or place.beside == place.units:
        return []
    return [
        f"{soft} comes down to the {level_text(place.share)} of the gap that {row.name} leaves in "
        f"{place.beside} of {place.units} units: nothing is compared there."
    ]


def units_text(place: Place) -> str:
    """Return how many units come to a place, and how many of the others lack a result."""
    text = f"{place.reached} of {place.units}"
    return f"{text} ({place.unmeasured} without a result)" if place.unmeasured else text


def _flips(criterion: str, found: Comparison) -> list[str]:
    points = [point for row in found.rows for point in row.points if row.name != ORIGINAL]
    turned = [
        f"{point.label} turned the sign of {criterion}, beyond its bootstrap interval, in "
        f"{point.flipped} of {point.judged} units."
        for point in points
        if point.flipped
    ]
    if turned or not any(point.judged for point in points):
        return turned
    return [f"No entry turned the sign of {criterion} beyond its bootstrap interval."]


def _noops(found: Comparison) -> list[str]:
    return [
        f"{point.label} left the model as it was in {sum(point.noops.values())} of {found.units} "
        f"units: {counts_text(point.noops.items())}."
        for row in found.rows
        for point in row.points
        if point.noops
    ]


def counts_text(counts: Iterable[tuple[str, int]]) -> str:
    """Return counts as text.

    >>> counts_text([("reached", 3), ("exhausted", 1)])
    '3 reached, 1 exhausted'
    """
    return ", ".join(f"{count} {name}" for name, count in counts)
