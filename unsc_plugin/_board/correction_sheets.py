"""The tables of a board of corrections as finished text."""

from __future__ import annotations

from collections.abc import Sequence

from unsc_plugin._board.cells import DASH, DOWN, UP, Column, Sheet, number
from unsc_plugin._board.correction_words import (
    counts_text,
    level_text,
    plus_minus,
    sentences,
    units_text,
)
from unsc_plugin._board.corrections import (
    ALLOWANCE,
    COMPARED,
    GAPS,
    KEPT,
    MEASURED,
    ROBUSTNESS,
    Comparison,
    Corrections,
    Numbers,
    Place,
    Point,
    Row,
)
from unsc_plugin._board.sheets import problem_sheets
from unsc_plugin._board.trials import CRITERION, ORIGINAL, ROBUST

PLOT, ACCURACY = "plot.svg", "accuracy.svg"
ZERO = "closer to 0 is better"
_DIRECTIONS = {
    **dict.fromkeys(("acc", "worst_group_acc", "robust_acc", "transfer_acc", "oracle_agree"), UP),
    **dict.fromkeys(("nll", "robust_nll", "oracle_js"), DOWN),
}
_LABELS = {"nll": "NLL", "worst_group_acc": "worst-group acc"}
_PERCENT = ("acc", "worst_group_acc", "robust_acc", "transfer_acc", "oracle_agree")

Cells = tuple[str, ...]


def sheets(board: Corrections) -> tuple[Sheet, ...]:
    """All tables, scenario by scenario, in the order in which they are shown."""
    made: list[Sheet] = []
    for found in board.scenarios:
        plots = not made
        made += main_sheets(board, found, plots=plots)
        made.append(words_sheet(board, found))
        made.append(_pareto_sheet(board, found, plots=plots))
        made += _deployed_sheets(board, found)
        made.append(_numbers_sheet(board, found))
        made += _apart_sheets(board, found)
    return (*made, *problem_sheets(board.problems))


def criterion_text(board: Corrections) -> str:
    """Return the size of the criterion in words."""
    less = f" − nll of {ORIGINAL}" if board.criterion == ROBUST else ""
    return f"|{board.criterion}{less}|"


def intro(board: Corrections) -> str:
    """Return what a reader must know before the first table."""
    return (
        "A correction names a goal and no forget set: there is no score and no rank. Entries are "
        f"compared where as much of the original's {criterion_text(board)} is left; `entry@t` has "
        "the strength t of a sweep. All numbers are those of the test rows, on which nothing is "
        "chosen. A dash is a number that was not measured, or that a unit lacks."
    )


def captions(board: Corrections) -> list[str]:
    """Return how intervals, levels and volumes came about."""
    summary = board.board
    return [
        f"A unit is a train seed and a draw: {summary.train_seeds} by {summary.draws} here. ± is "
        f"{100 * summary.confidence:g} %, Student t, over train seeds (draws averaged) and over "
        "draws (seeds averaged), the wider of the two; draws count where there are three or more, "
        "or where there is one seed.",
        "A level lies on every unit's own curve, which leads from the original, strength 0, from "
        "strength to strength in straight lines: where so much of the gap is first left, with its "
        "sign. A strength that overshoots has passed every smaller gap.",
        f"Differences are the other entry less {board.soft or 'the reference'}, paired by unit: "
        "an NLL above 0 or an accuracy below 0 speaks for the latter; 0 inside is a tie.",
        "Pareto set: of the means over the units, entries with every unit. Hypervolume: the part "
        f"of the rectangle below the original's {criterion_text(board)} and the NLL of the class "
        "prior that a family dominates, per unit; 1 is no gap at no loss.",
        "Deployed: per unit the strength with the smallest criterion on its selection rows, of "
        f"those with at most {ALLOWANCE:g} times the original's loss there.",
        "A sign has turned where the whole bootstrap interval over test rows lies beyond 0.",
    ]


# --------------------------------------------------------------------------- columns and cells


def _column(name: str) -> Column:
    label = _LABELS.get(name, name) + " %" * (name in _PERCENT)
    return Column(label, _DIRECTIONS.get(name, ZERO))


def _name(row: Row) -> str:
    return row.name if row.track in ("", "default") else f"{row.name} ({row.track})"


def _cell(values: Numbers, name: str) -> str:
    return plus_minus(values.get(name), percent=name in _PERCENT)


def _sheet(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Cells],
    text: Sequence[str] = (),
    image: tuple[str, str] | None = None,
) -> Sheet:
    """Return a table without the columns of numbers that nobody has."""
    kept = [
        place
        for place, column in enumerate(columns)
        if column.text or any(row[place] != DASH for row in rows)
    ]
    return Sheet(
        title,
        tuple(columns[place] for place in kept),
        tuple(tuple(row[place] for place in kept) for row in rows),
        tuple(part for part in text if part),
        image,
    )


def _against_columns(board: Corrections) -> list[Column]:
    return [
        Column("Δ NLL", f"above 0: {board.soft} is better"),
        Column("Δ acc, pp", f"below 0: {board.soft} is better"),
    ]


def _against_cells(place: Place) -> list[str]:
    return [
        plus_minus(place.against.get(name), percent=name in _PERCENT, sign=True)
        for name in COMPARED
    ]


# --------------------------------------------------------------------------- at an equal gap


def main_sheets(board: Corrections, found: Comparison, *, plots: bool = False) -> list[Sheet]:
    """The families at equal shares of the original's gap, and the entries that are one point."""
    made = []
    name, description = found.scenario.name, found.scenario.description
    if any(row.swept for row in found.rows):
        columns = (
            Column("left", "of the gap"),
            Column("entry", text=True),
            Column("units", "that come there"),
            *map(_column, KEPT),
            *_against_columns(board),
        )
        rows = [("100 %", ORIGINAL, *_place_cells(r.places[0])) for r in _originals(found)]
        swept = [row for row in found.rows if row.swept]
        for at, level in enumerate(swept[0].places):
            rows += [
                (level_text(level.share), _name(row), *_place_cells(row.places[at]))
                for row in swept
            ]
        lead = f"{description.rstrip('.')}: t" if description else "T"
        gap = f"{lead}he original's {criterion_text(board)} is {plus_minus(found.gap)}."
        image = (PLOT, f"NLL against {criterion_text(board)}") if plots else None
        made.append(_sheet(f"At an equal gap: {name}", columns, rows, (gap,), image))
    if singles := [row for row in found.rows if not row.swept]:
        made.append(_single_sheet(board, found, singles))
    return made


def _originals(found: Comparison) -> list[Row]:
    return [row for row in found.rows if row.name == ORIGINAL and not row.swept]


def _place_cells(place: Place) -> Cells:
    kept = [_cell(place.values, name) for name in KEPT]
    return (units_text(place), *kept, *_against_cells(place))


def _single_sheet(board: Corrections, found: Comparison, singles: Sequence[Row]) -> Sheet:
    columns = (
        Column("entry", text=True),
        Column("units", "finished, of all"),
        Column(board.criterion, ZERO),
        Column("left", "of the gap"),
        *map(_column, KEPT),
        *_against_columns(board),
        Column(f"{board.soft} there", "units"),
    )
    rows = []
    for row in singles:
        [place], [point] = row.places, row.points
        rows.append(
            (
                _name(row),
                f"{place.reached} of {place.units}",
                plus_minus(point.criterion),
                level_text(place.share),
                *(_cell(place.values, name) for name in KEPT),
                *_against_cells(place),
                _beside(place) if board.soft else DASH,
            )
        )
    text = (
        f"Each is compared where {board.soft} has as much of the gap left as the entry has."
        if board.soft
        else ""
    )
    return _sheet(f"Single points: {found.scenario.name}", columns, rows, (text,))


def _beside(place: Place) -> str:
    if place.beyond:
        return f"no gap closed in {place.beyond} of {place.units}"
    return f"{place.beside} of {place.units}"


# --------------------------------------------------------------------------- the other tables


def words_sheet(board: Corrections, found: Comparison) -> Sheet:
    """What follows from the numbers of a scenario, in sentences."""
    said = sentences(board, found)
    text = tuple(said) or ("Nothing can be said yet.",)
    return Sheet(f"What the numbers say: {found.scenario.name}", text=text)


def _pareto_sheet(board: Corrections, found: Comparison, *, plots: bool) -> Sheet:
    columns = (
        Column("entry", text=True),
        Column("on the Pareto set", "of its points"),
        Column("which of them", text=True),
        Column("hypervolume", UP),
    )
    rows = []
    for row in found.rows:
        front = [point for point in row.points if point.on_front]
        which = [row.name if p.strength is None else f"{p.strength:g}" for p in front]
        volume = plus_minus(row.hypervolume)
        count = f"{len(front)} of {len(row.points)}"
        rows.append((_name(row), count, ", ".join(which) or DASH, volume))
    prior = (
        f"The NLL of the class prior is {number(found.prior)}." if found.prior is not None else ""
    )
    text = (f"In {criterion_text(board)} and NLL, both better when smaller.", prior)
    image = (ACCURACY, f"Accuracy against {criterion_text(board)}") if plots else None
    return _sheet(f"Pareto: {found.scenario.name}", columns, rows, text, image)


def _deployed_sheets(board: Corrections, found: Comparison) -> list[Sheet]:
    names = [name for name in (*GAPS, *KEPT, *ROBUSTNESS) if name != board.criterion]
    columns = (
        Column("entry", text=True),
        Column("strength (units)", "chosen on selection rows", text=True),
        Column("units", "with one that is allowed"),
        _column(board.criterion),
        *map(_column, names),
    )
    rows = [
        (
            _name(row),
            ", ".join(f"{t} ({n})" for t, n in row.deployed.chosen.items()) or DASH,
            f"{sum(row.deployed.chosen.values())} of {row.deployed.units}",
            _cell(row.deployed.values, CRITERION),
            *(_cell(row.deployed.values, name) for name in names),
        )
        for row in found.rows
        if row.deployed is not None
    ]
    level = f"{100 * board.board.confidence:g} %"
    text = (
        "Test numbers of what each unit would put to use by its selection rows: means over the "
        f"units, ± the {level} t-interval over units, not over test rows."
    )
    return [_sheet(f"Deployed: {found.scenario.name}", columns, rows, (text,))] if rows else []


def _numbers_sheet(board: Corrections, found: Comparison) -> Sheet:
    names = [name for name in MEASURED if name != board.criterion]
    columns = (
        Column("entry", text=True),
        Column("runs", text=True),
        _column(CRITERION)._replace(label=board.criterion),
        *map(_column, names),
        Column("shortfall", "of the gap"),
        Column("sign turned", "units"),
        Column("plan ended", text=True),
        Column("nothing done", text=True),
        Column("realised", text=True),
    )
    rows = [
        (
            point.label,
            _statuses(point, found.units),
            plus_minus(point.criterion),
            *(_cell(point.values, name) for name in names),
            number(point.shortfall),
            f"{point.flipped} of {point.judged}" if point.judged else DASH,
            counts_text(point.stops.items()) or DASH,
            counts_text(point.noops.items()) or DASH,
            counts_text(point.realised.items()) or DASH,
        )
        for row in found.rows
        for point in row.points
    ]
    text = "Means over the units that have finished."
    return _sheet(f"All numbers: {found.scenario.name}", columns, rows, (text,))


def _statuses(point: Point, units: int) -> str:
    parts = [f"{point.statuses.get('ok', 0)} of {units} ok"]
    others = [(name, count) for name, count in sorted(point.statuses.items()) if name != "ok"]
    return ", ".join([*parts, *([counts_text(others)] if others else [])])


def _apart_sheets(board: Corrections, found: Comparison) -> list[Sheet]:
    columns = (
        Column("entry", text=True),
        Column("why it is not compared", text=True),
        Column("runs", text=True),
        Column(board.criterion, ZERO),
        *map(_column, KEPT),
    )
    rows = [
        (
            point.label,
            "; ".join(apart.reasons),
            _statuses(point, found.units),
            plus_minus(point.criterion),
            *(_cell(point.values, name) for name in KEPT),
        )
        for apart in found.apart
        for point in apart.points
    ]
    return [_sheet(f"Not compared: {found.scenario.name}", columns, rows)] if rows else []
