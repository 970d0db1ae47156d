"""The tables of what is measured on the way: methods at equal forgetting, sequences of requests."""

from __future__ import annotations

from collections.abc import Sequence

from unsc_plugin._board.cells import DASH, DOWN, UP, Column, Sheet, decimals, number
from unsc_plugin._board.drift import Drift, DriftEntry, Line
from unsc_plugin._board.matched import Matched, MatchedEntry, Place
from unsc_plugin._board.standings import Standings
from unsc_plugin.metrics import _stats as stats
from unsc_plugin.metrics.goal import LEVELS

MATCHED, DRIFT = "matched.svg", "drift.svg"
STATUSES = ("reached", "cap", "ok", "budget", "diverged")
SHOWN_REQUESTS = 12
"""So many requests are listed one by one; of more, the first and last few."""

TWO_LENSES = (
    "Full forgetting is stronger than, and different from, behaving as if retrained: the row of "
    "retrain shows where retraining leaves the forget set, and the two lenses disagree by design."
)


# --------------------------------------------------------------------------- equal forgetting


def matched_sheets(board: Standings) -> list[Sheet]:
    """Two tables per scenario with trajectories: all at full forgetting, accuracy per level."""
    made: list[Sheet] = []
    for found in board.matched:
        image = (MATCHED, "Test accuracy against the forgotten share") if not made else None
        made += [_full_sheet(board, found, image), _levels_sheet(board, found)]
    return made


def _full_sheet(board: Standings, found: Matched, image: tuple[str, str] | None) -> Sheet:
    confidence = f"{100 * board.board.confidence:g} %"
    forget_only = any(e.candidate.forget_only for e in found.entries if not e.candidate.pinned)
    columns = [
        Column("rank", DOWN),
        Column("entry", text=True),
        Column("needs", "data opened", text=True),
        *([Column("rank, forget-only", DOWN)] if forget_only else []),
        Column("units there", "of all"),
        Column("forgot", "instances, share"),
        Column("steps", DOWN),
        Column("acc_retain %", UP),
        Column("acc_test %", UP),
        Column(f"acc_test to the leader, pp [{confidence}]", "0 inside is a tie", text=True),
    ]
    rows = []
    for entry in found.entries:
        cells = _full_cells(board, entry)
        rows.append(tuple(cells if forget_only else [*cells[:3], *cells[4:]]))
    text = (
        "Every unit is taken at its first step with the whole forget set forgotten, none of it "
        "given its recorded label any more. Only entries with every unit there are ranked, by test "
        "accuracy; a run that diverged is not there. The others, and reference and controls, are "
        f"shown as evaluated. ± is {confidence} over train seeds, differences are paired by unit.",
        TWO_LENSES,
    )
    title = f"At equal forgetting, 100 %: {found.scenario}"
    return Sheet(title, tuple(columns), tuple(rows), text, image)


def _full_cells(board: Standings, entry: MatchedEntry) -> list[str]:
    place = entry.at(1.0)
    return [
        _rank(board, place.rank),
        _label(entry.candidate.entry, entry.candidate.role),
        ", ".join(entry.candidate.needs) or DASH,
        _rank(board, place.rank_forget_only),
        f"{place.reached} of {place.units}",
        _forgot(place),
        number(place.step, 1),
        _percent(place.retain),
        _percent(place.test),
        _against_leader(entry, place),
    ]


def _levels_sheet(board: Standings, found: Matched) -> Sheet:
    columns = (
        Column("entry", text=True),
        Column("needs", "data opened", text=True),
        *(Column(f"acc_test % at {100 * level:g} % (rank)", UP) for level in LEVELS),
    )
    rows = tuple(
        (
            entry.entry,
            ", ".join(entry.candidate.needs) or DASH,
            *(_level_cell(board, entry.at(level)) for level in LEVELS),
        )
        for entry in found.entries
        if not entry.candidate.pinned
    )
    text = (
        "Test accuracy at the first step with so much of the forget set forgotten, rank in "
        "brackets; where units are missing, how many came there.",
    )
    return Sheet(f"Test accuracy per forgotten share: {found.scenario}", columns, rows, text)


def _level_cell(board: Standings, place: Place) -> str:
    if place.reached < place.units:
        return f"{place.reached} of {place.units} there"
    rank = _rank(board, place.rank)
    return _percent(place.test) + ("" if rank == DASH else f" ({rank})")


def _rank(board: Standings, rank: int | None) -> str:
    return DASH if rank is None or not board.health.ok else str(rank)


def _label(entry: str, role: str) -> str:
    tag = {"reference": "reference", "original": "control", "control": "control"}.get(role)
    return f"{entry}, {tag}" if tag else entry


def _forgot(place: Place) -> str:
    if place.share is None:
        return DASH
    share = f"{number(100 * place.share, 0)} %"
    if place.forgotten is None or place.size is None:
        return share
    return f"{place.forgotten:.4g}/{place.size:.4g} ({share})"


def _percent(interval: stats.Interval | None) -> str:
    """Return percent with the half-width behind ±."""
    if interval is None:
        return DASH
    half = None if interval.half is None else 100 * interval.half
    digits = max(1, min(decimals(half, 2), 2))
    text = number(100 * interval.estimate, digits)
    return text if half is None else f"{text} ± {number(half, digits)}"


def _against_leader(entry: MatchedEntry, place: Place) -> str:
    if place.leads:
        return "leader"
    if place.rank is None:
        reasons = list(entry.candidate.barred)
        if not entry.candidate.pinned and place.reached < place.units:
            reasons = [f"{place.reached} of {place.units} reached{_shortfall(place)}", *reasons]
        return "; ".join(reasons) or DASH
    gap = place.difference
    if gap is None:
        return DASH
    digits = max(1, min(decimals(None if gap.half is None else 100 * gap.half, 2), 2))
    text = number(100 * gap.estimate, digits, sign=True)
    if gap.low is None or gap.high is None:
        return text
    limits = ", ".join(number(100 * limit, digits, sign=True) for limit in (gap.low, gap.high))
    return f"{text} [{limits}]{', ties with the leader' * place.ties}"


def _shortfall(place: Place) -> str:
    text = "" if place.share is None else f", forgot {number(100 * place.share, 0)} %"
    if place.diverged:
        text += (
            f", {place.diverged} diverged ({place.diverged_there} of them after they were there)"
        )
    return text


# --------------------------------------------------------------------------- sequences


def drift_sheets(board: Standings) -> list[Sheet]:
    """One table per scenario that is a sequence."""
    made: list[Sheet] = []
    for found in board.drift:
        image = (DRIFT, "Earlier instances still forgotten and test accuracy, per request")
        made.append(_drift_sheet(found, image if not made else None))
    return made


def _drift_sheet(found: Drift, image: tuple[str, str] | None) -> Sheet:
    columns = (
        Column("entry", text=True),
        Column("needs", "data opened", text=True),
        Column("units", "served all requests"),
        Column("reached", "every instance at its goal at the end", text=True),
        Column("earlier at goal", UP),
        Column("came back", DOWN),
        Column("all at goal", UP),
        Column("at goal per request", UP, text=True),
        Column("acc_retain %", "first → last request"),
        Column("acc_test %", "first → last request"),
        Column("KL_test bits", DOWN),
        Column("‖θ − θ_first‖", DOWN),
        Column("requests by status", text=True),
    )
    rows = tuple(
        (
            _label(entry.entry, entry.candidate.role),
            ", ".join(entry.candidate.needs) or DASH,
            f"{entry.finished} of {entry.units}",
            _verdict(entry),
            _count(entry.earlier, entry.earlier_size),
            number(entry.came_back, 1),
            _count(entry.whole, entry.size),
            _listed(entry.at_goal),
            _change(entry.retain),
            _change(entry.test),
            number(entry.kl_test, 3),
            DASH if entry.distance is None else f"{entry.distance:.3g}",
            _statuses(entry),
        )
        for entry in found.entries
    )
    text = (
        f"{found.requests} requests per unit, one after the other; after each, the runner predicts "
        "the instances of all requests so far again. At its goal is an instance that is not given "
        "its recorded label (that is given the label asked for, in a correction). Counts after the "
        "last request, means per unit. Came back: at its goal after its own request, not at the "
        "end. A sequence whose earlier sets came back is not reached; those that are reached "
        "stand first, by test accuracy. Retained rows are the same in all rounds, KL_test is from "
        "the model before the first request.",
        TWO_LENSES,
    )
    return Sheet(f"Drift over the requests: {found.scenario}", columns, rows, text, image)


def _verdict(entry: DriftEntry) -> str:
    if entry.reached:
        return "yes"
    if entry.candidate.pinned and entry.finished == entry.units:
        return "no"
    if entry.finished < entry.units:
        ended = f"{entry.diverged} diverged" if entry.diverged else "units without a result"
        return f"no: {ended}"
    return "no: earlier sets came back" if entry.came_back else "no: not all forgotten"


def _count(count: float | None, size: float | None) -> str:
    if count is None or not size:
        return DASH
    return f"{count:.4g}/{size:.4g} ({number(100 * count / size, 0)} %)"


def _listed(counts: Line) -> str:
    texts = [DASH if count is None else f"{count:.3g}" for count in counts]
    if len(texts) > SHOWN_REQUESTS:
        half = SHOWN_REQUESTS // 2
        texts = [*texts[:half], "…", *texts[-half:]]
    return " ".join(texts) or DASH


def _change(ends: Sequence[float | None]) -> str:
    first, last = (None if end is None else 100 * end for end in ends)
    return DASH if first is None and last is None else f"{number(first, 1)} → {number(last, 1)}"


def _statuses(entry: DriftEntry) -> str:
    known = [name for name in STATUSES if name in entry.statuses]
    others = sorted(set(entry.statuses) - set(known))
    counts = [f"{entry.statuses[name]} {name}" for name in (*known, *others)]
    return ", ".join([*counts, *([f"{entry.unserved} not served"] if entry.unserved else [])])
