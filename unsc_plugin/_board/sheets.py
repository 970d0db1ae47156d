"""The tables of a board as finished text: what is shown, in which order, to which precision."""

from __future__ import annotations

import math
from collections.abc import Sequence

from unsc_plugin._board import curve_sheets
from unsc_plugin._board.cells import DASH, DOWN, UP, Column, Sheet
from unsc_plugin._board.cells import decimals as _decimals
from unsc_plugin._board.cells import number as _number
from unsc_plugin._board.standings import Problem, Row, ScenarioResult, Standings
from unsc_plugin._board.study import Summary, Value
from unsc_plugin.metrics import _stats as stats
from unsc_plugin.metrics import score as scoring

MUBENCH = "mubench."
WILCOXON_FROM = 6
INTRO = (
    "S is 1 for a retrained model and about 0.01 for the original: it multiplies how close "
    "forgetting comes to retraining (geometric mean of the components a) with the kept utility u. "
    "Values in brackets after a gap are the floor: retrained models measured against other "
    "retrained models. A dash is a number that was not measured."
)
TO_RETRAIN, TO_FLOOR = "closer to retrain is better", "lower is better, down to the floor"


def sheets(board: Standings) -> tuple[Sheet, ...]:
    """All tables of a board, in the order in which they are shown."""
    made = [_admission_sheet(board), ranking_sheet(board)]
    made += unranked_sheets(board)
    made += [_rank_sheet(board)] if any(row.rank for row in board.ranked) else []
    made += _pairwise_sheets(board)
    made += curve_sheets.matched_sheets(board)
    made += curve_sheets.drift_sheets(board)
    made += _mubench_sheets(board)
    made += [_scenario_sheet(board, result) for result in board.scenarios]
    made.append(_cost_sheet(board))
    made += [_certificate_sheet(board)] if board.certificates else []
    return (*made, *problem_sheets(board.problems))


def unranked_sheets(board: Standings) -> list[Sheet]:
    """The rows without a rank, and those without a retrained model beside them."""
    made = [_unranked_sheet(board)] if board.unranked else []
    return made + ([_bare_sheet(board)] if board.without_reference else [])


# --------------------------------------------------------------------------- numbers as text


def _interval(interval: stats.Interval | None) -> str:
    if interval is None:
        return DASH
    digits = max(2, _decimals(interval.half, 3))
    text = _number(interval.estimate, digits)
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{_number(interval.low, digits)}, {_number(interval.high, digits)}]"


def _accuracy(value: Value | None) -> str:
    """Percent, with the distance to the retrained pool in percentage points."""
    if value is None:
        return DASH
    digits = min(_decimals(None if value.half is None else 100 * value.half, 2), 2)
    text = _number(100 * value.mean, digits)
    if value.delta is None:
        return text
    return f"{text} ({_number(100 * value.delta, digits, sign=True)}{' ≈' * value.equivalent})"


def _measured(value: Value | None, floor: Value | None = None) -> str:
    if value is None:
        return DASH
    digits = max(3, _decimals(value.half))
    text = _number(value.mean, digits)
    return text if floor is None else f"{text} ({_number(floor.mean, digits)})"


def _ratio(value: Value | None) -> str:
    if value is None:
        return DASH
    return _number(value.mean, 3) if value.mean < 10 else _number(value.mean, 1)


def _amount(value: float | None) -> str:
    """Three significant digits, with a suffix from ten thousand on."""
    if value is None:
        return DASH
    for least, unit, suffix in (
        (1e12, 1e12, "T"),
        (1e9, 1e9, "G"),
        (1e6, 1e6, "M"),
        (1e4, 1e3, "k"),
    ):
        if abs(value) >= least:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _rank(value: float) -> str:
    return f"{value:g}"


# --------------------------------------------------------------------------- tables


def _entry(row: Row) -> str:
    label = f"{row.entry} ({row.version})" if row.version else row.entry
    tag = {"reference": "reference", "original": "control", "control": "control"}.get(row.role)
    return f"{label}, {tag}" if tag else label


def _components(board: Standings) -> tuple[str, ...]:
    """The component columns: C only where a scenario has it."""
    used = {c for s in board.board.scenarios for c in scoring.component_metrics(s.kind)}
    return tuple(c for c in scoring.COMPONENTS if c != "C" or c in used)


_MEASURES = (
    ("acc_forget", Column("acc_forget % (Δ pp)", TO_RETRAIN)),
    ("acc_retain", Column("acc_retain % (Δ pp)", TO_RETRAIN)),
    ("acc_test", Column("acc_test % (Δ pp)", "higher is better; Δ 0 is retrain")),
    ("js_forget", Column("JS_f bits (floor)", TO_FLOOR)),
    ("gap_umia_auc", Column("ΔAUC (floor)", TO_FLOOR)),
    ("gap_relearn", Column("relearn gap (floor)", TO_FLOOR)),
    ("tow", Column("ToW (floor)", "higher is better, up to the floor")),
)
_RATIOS = (
    ("work_ratio", Column("work ratio", DOWN)),
    ("time_ratio", Column("time ratio", DOWN)),
)


def _measure_cells(
    summary: Summary, floor: Summary, measures: Sequence[tuple[str, Column]]
) -> list[str]:
    cells = []
    for name, _ in measures:
        value = summary.values.get(name)
        if name.startswith("acc_"):
            cells.append(_accuracy(value))
        else:
            cells.append(_measured(value, floor.values.get(name)))
    return cells


def _score_columns(board: Standings) -> list[Column]:
    return [*(Column(f"a_{c}", UP) for c in _components(board)), Column("u", UP)]


def _score_cells(board: Standings, summary: Summary) -> list[str]:
    parts = [_number(summary.components.get(c), 2) for c in _components(board)]
    return [*parts, _number(summary.utility)]


def _confidence(board: Standings) -> str:
    return f"{100 * board.board.confidence:g} %"


def _main_columns(board: Standings) -> list[Column]:
    level = _confidence(board)
    return [
        Column("tier", "lower is better"),
        Column("entry (version)", text=True),
        Column("needs", "data opened", text=True),
        Column(f"S [{level}]", "higher is better; retrain is 1"),
        Column(f"rank [{level}]", DOWN),
        *_score_columns(board),
        *(column for _, column in _MEASURES),
        *(column for _, column in _RATIOS),
        Column("checks", "passed of all"),
        Column("track", text=True),
        Column("status", text=True),
        Column("command", text=True),
    ]


def _main_cells(board: Standings, row: Row) -> tuple[str, ...]:
    floor = _floor(board)
    rank = DASH
    if row.position is not None and row.rank is not None:
        rank = f"{row.position} [{_rank(row.rank.low)}, {_rank(row.rank.high)}]"
    return (
        DASH if row.tier is None else str(row.tier),
        _entry(row),
        ", ".join(row.needs) or DASH,
        _interval(row.summary.score),
        rank,
        *_score_cells(board, row.summary),
        *_measure_cells(row.summary, floor, _MEASURES),
        *(_ratio(row.summary.values.get(name)) for name, _ in _RATIOS),
        row.checks or DASH,
        row.track or DASH,
        row.status,
        f"`{row.command}`" if row.command else DASH,
    )


def _floor(board: Standings) -> Summary:
    return next((r.summary for r in board.pinned if r.role == "reference"), Summary())


def ranking_sheet(board: Standings) -> Sheet:
    """Reference and controls, then the entries that may be ranked."""
    if not board.health.ok:
        title, text = "Entries, without ranks", "The board fails its health check: no ranks."
    elif not board.ranked:
        title, text = "Ranking", "No entry may be ranked yet; the reasons stand below."
    else:
        title = "Ranking"
        text = "Reference and controls are pinned first; entries follow by falling S."
    rows = tuple(_main_cells(board, row) for row in (*board.pinned, *board.ranked))
    return Sheet(title, tuple(_main_columns(board)), rows, (text,))


def _unranked_sheet(board: Standings) -> Sheet:
    columns = _main_columns(board)
    position = columns.index(Column("needs", "data opened", text=True))
    columns[position:position] = [Column("why it has no rank", text=True)]
    del columns[0]
    rows = []
    for row in board.unranked:
        cells = list(_main_cells(board, row))
        cells[position:position] = ["; ".join(row.reasons)]
        rows.append(tuple(cells[1:]))
    rank = next(i for i, column in enumerate(columns) if column.label.startswith("rank"))
    trimmed = tuple(tuple(c for i, c in enumerate(row) if i != rank) for row in rows)
    return Sheet("Not ranked", tuple(c for i, c in enumerate(columns) if i != rank), trimmed)


def _bare_sheet(board: Standings) -> Sheet:
    columns = (
        Column("entry (version)", text=True),
        *(Column(f"{name} %") for name in ("acc_forget", "acc_retain", "acc_test")),
        Column("status", text=True),
        Column("command", text=True),
    )
    rows = tuple(
        (
            _entry(row),
            *(
                _accuracy(row.summary.values.get(n))
                for n in ("acc_forget", "acc_retain", "acc_test")
            ),
            row.status,
            f"`{row.command}`",
        )
        for row in board.without_reference
    )
    note = (
        "These runs had no retrained model beside them: nothing says what their numbers should be."
    )
    return Sheet("Without a retrained reference", columns, rows, (note,))


def _admission_sheet(board: Standings) -> Sheet:
    columns = (
        Column("scenario", text=True),
        Column("draw"),
        Column("component", text=True),
        Column("metric", text=True),
        Column("gap of original"),
        Column("gap of retrain (floor)"),
        Column("separation, standard errors", f"above {board.board.admission_z:g} is admitted"),
        Column("admitted", text=True),
    )
    rows = tuple(
        (
            result.scenario.name,
            str(test.draw),
            f"{test.component} ({'required' if test.required else 'optional'})",
            test.metric,
            _number(test.original),
            _number(test.floor),
            "∞" if test.separation == math.inf else _number(test.separation, 1),
            "yes" if test.admitted else "no",
        )
        for result in board.scenarios
        for test in sorted(result.admission.tests, key=lambda t: t.draw)
    )
    verdicts = [_verdict(result) for result in board.scenarios]
    intro = "Decided from original and retrained models alone, before any method is looked at."
    return Sheet("Admission", columns, rows, (intro, *verdicts))


def _verdict(result: ScenarioResult) -> str:
    admission = result.admission
    label = f"{result.scenario.name} ({result.scenario.kind})"
    if not admission.ranked:
        return f"{label}: not ranked; {admission.reason}."
    draws = ", ".join(str(draw) for draw in admission.draws)
    return f"{label}: ranked on {', '.join(admission.components)} in draws {draws}."


def _rank_sheet(board: Standings) -> Sheet:
    columns = (
        Column("entry", text=True),
        Column("median rank", DOWN),
        Column(f"rank interval, {_confidence(board)}", DOWN),
        Column("P(best)", UP),
        Column("mean rank over scenarios", DOWN),
    )
    rows = []
    for row in board.ranked:
        assert row.rank is not None
        limits = f"{_rank(row.rank.low)} to {_rank(row.rank.high)}"
        median, best = _rank(row.rank.median), _number(row.rank.p_best, 2)
        rows.append((row.entry, median, limits, best, _number(row.mean_rank, 1)))
    return Sheet("Ranks", columns, tuple(rows))


def _pairwise_sheets(board: Standings) -> list[Sheet]:
    entries = [row.entry for row in board.ranked if row.rank is not None]
    scenarios = [result for result in board.scenarios if result.admission.ranked]
    if len(scenarios) < WILCOXON_FROM or len(entries) < 2:
        return []
    scores = [[_estimate(result.summaries[e]) for e in entries] for result in scenarios]
    p = stats.wilcoxon_holm(scores)
    columns = (Column("entry", text=True), *(Column(entry) for entry in entries))
    rows = tuple(
        (entry, *(DASH if i == j else _number(p[i, j]) for j in range(len(entries))))
        for i, entry in enumerate(entries)
    )
    note = "Two-sided p of the signed-rank test over scenarios, adjusted by Holm."
    return [Sheet("Pairwise tests", columns, rows, (note,))]


def _estimate(summary: Summary) -> float:
    assert summary.score is not None
    return summary.score.estimate


def _mubench_sheets(board: Standings) -> list[Sheet]:
    names = sorted({n for r in board.rows for n in r.summary.values if n.startswith(MUBENCH)})
    if not names:
        return []
    columns = (Column("entry", text=True), *(Column(name.removeprefix(MUBENCH)) for name in names))
    pool = board.retrained_values
    rows = [("retrained pool R_A", *(_number(pool.get(n)) for n in names))] if pool else []
    first = [r for e in ("retrain", "original") for r in board.pinned if r.entry == e]
    rest = sorted(
        (r for r in board.rows if r not in first),
        key=lambda r: (-_estimate(r.summary) if r.summary.score else 1.0, r.entry),
    )
    for row in (*first, *rest):
        cells = [_number(v.mean) if (v := row.summary.values.get(n)) else DASH for n in names]
        rows.append((row.entry, *cells))
    note = (
        "Target: chance accuracy on D_f, not the retrained model. MU-Bench's own definitions; "
        "compare with the rows of retraining. Never used for the ranking above."
    )
    return [Sheet("MU-Bench", columns, tuple(rows), (note,))]


def _scenario_sheet(board: Standings, result: ScenarioResult) -> Sheet:
    class_wise = result.scenario.kind in scoring.CLASS_KINDS
    measures = [*_MEASURES]
    if class_wise:
        measures[3:3] = [("acc_test_forgotten", Column("acc_test, forgotten % (Δ pp)", TO_RETRAIN))]
        measures[7:7] = [("gap_probe5", Column("probe gap (floor)", TO_FLOOR))]
    columns = (
        Column("entry", text=True),
        Column(f"S [{_confidence(board)}]", "higher is better; retrain is 1"),
        *_score_columns(board),
        *(column for _, column in measures),
        *(column for _, column in _RATIOS),
        Column("units without result", DOWN),
    )
    floor = result.summaries.get("retrain", Summary())
    rows = tuple(
        (
            entry,
            _interval(summary.score),
            *_score_cells(board, summary),
            *_measure_cells(summary, floor, measures),
            *(_ratio(summary.values.get(name)) for name, _ in _RATIOS),
            DASH if summary.failed is None else f"{100 * summary.failed:.0f} %",
        )
        for entry, summary in result.summaries.items()
    )
    text = [result.scenario.description, _verdict(result)]
    if class_wise:
        text.append("acc_test is that of the kept classes.")
    spread = [
        f"{name} {', '.join(_number(100 * part, 2) for part in parts)}"
        for name, parts in result.variance.items()
    ]
    if spread:
        text.append(f"sd of retrain by seed, draw, residual in pp: {'; '.join(spread)}.")
    title = f"Scenario {result.scenario.name}"
    return Sheet(title, columns, rows, tuple(part for part in text if part))


def _cost_sheet(board: Standings) -> Sheet:
    columns = (
        Column("entry", text=True),
        Column("seconds, prepare", DOWN),
        Column("seconds, unlearn", DOWN),
        Column("peak memory, MiB", DOWN),
        Column("work, sample passes", DOWN),
        *(column for _, column in _RATIOS),
        Column("hyperparameters", DOWN),
    )
    rows = []
    for row in board.rows:
        values = row.summary.values
        mean = {name: value.mean for name, value in values.items()}
        peak = mean.get("peak_bytes")
        count = row.n_hyperparameters
        rows.append(
            (
                row.entry,
                _amount(mean.get("seconds_prepare")),
                _amount(mean.get("seconds_unlearn")),
                _amount(None if peak is None else peak / 2**20),
                _amount(mean.get("work")),
                *(_ratio(values.get(name)) for name, _ in _RATIOS),
                DASH if count is None else str(count),
            )
        )
    medians = [
        f"{name} {_amount(seconds)} s"
        for name, seconds in board.retrain_seconds.items()
        if seconds is not None
    ]
    text = (
        "Means over finished units. Work counts samples forwarded without gradient once and with "
        f"gradient three times. The gate is {board.board.cost_gate:g} of retraining, for time only "
        f"where retraining takes {scoring.TIMED_FROM_SECONDS:g} s or more."
    )
    retrained = f"Median seconds of a retraining: {', '.join(medians)}." if medians else ""
    return Sheet("Cost", columns, tuple(rows), tuple(t for t in (text, retrained) if t))


def _certificate_sheet(board: Standings) -> Sheet:
    columns = (
        Column("entry", text=True),
        Column("scenario", text=True),
        Column("units"),
        Column("drift, mean (largest)", DOWN),
        Column("layer that moved most (δ)", text=True),
        Column("free directions, of all"),
        Column("layers without a null space"),
        Column("retained rows read per unit", DOWN),
    )
    rows = tuple(
        (
            found.entry,
            found.scenario,
            str(len(found.drifts)),
            f"{_number(found.mean)} ({_number(max(found.drifts))})",
            DASH if found.worst is None else f"{found.worst[0]} ({_number(found.worst[1])})",
            f"{found.free} of {found.wide}",
            str(found.full),
            _range(found.retained),
        )
        for found in board.certificates
    )
    text = (
        "From Gram matrices of the retained training data alone; per layer and class in the "
        "records. δ is the exact relative change of a layer's response to the original retained "
        "inputs. Drift, the sum over the layers of the largest δ of any class, is exact for the "
        "logits when only the head is trained, and 0 implies unchanged logits; for several layers "
        "it is an estimate, not a proof: ‖Z_u − Z_o‖/‖Z_o‖ on the retained training set was .2 to "
        ".55 times drift in some 70 toy configurations, never above 1."
    )
    return Sheet("Certificates of retained drift", columns, rows, (text,))


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def problem_sheets(problems: Sequence[Problem]) -> list[Sheet]:
    """Failed, diverged and cancelled runs with their reasons."""
    columns = tuple(
        Column(name, text=True) for name in ("scenario", "entry", "units", "status", "reason")
    )
    rows = tuple((p.scenario, p.entry, ", ".join(p.units), p.status, p.reason) for p in problems)
    return [Sheet("Runs without a result", columns, rows)] if rows else []


def captions(board: Standings) -> list[str]:
    """Return how the intervals, ranks and marks of this board came about."""
    summary = board.board
    admitted = [result for result in board.scenarios if result.admission.ranked]
    level = _confidence(board)
    lines = [
        f"Of one scenario: {level} over {summary.train_seeds} train seeds, Student t for metrics "
        "and a delete-one-seed jackknife for S. The draws are fixed, not resampled."
    ]
    if len(admitted) > 1:
        which = "resampled" if len(admitted) >= stats.MIN_SCENARIOS_RESAMPLED else "fixed"
        drawn = any(len(r.admission.draws) >= stats.MIN_DRAWS_RESAMPLED for r in admitted)
        lines.append(
            f"Of the board: {level} of {summary.bootstrap} bootstrap replicates; scenarios "
            f"{which}, train seeds resampled jointly for entry, original and retrain, draws "
            f"{'resampled where there are three or more' if drawn else 'fixed'}."
        )
    lines += [
        f"Ranks come from {summary.bootstrap} bootstrap replicates. An entry shares the tier of a "
        "leader whose rank interval its own overlaps.",
        "≈ marks equivalence to retraining: two one-sided t tests at 5 % inside twice the spread "
        "of retrained models, at least 1 pp.",
        "Main columns are means over the ranked scenarios, or over all where none is ranked.",
    ]
    if summary.weights:
        weights = ", ".join(f"{c} {w:g}" for c, w in sorted(summary.weights.items()))
        lines.append(f"This board weighs the components of S unequally: {weights}.")
    return lines
