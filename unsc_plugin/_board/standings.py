"""Records to standings: what each entry reached, who may be ranked, and where they stand.

Numbers only; the leaderboard turns them into text. Nothing here averages a missing number away, and
everything depends on the records and the board alone, in whatever order they come.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from unsc_plugin._board.certificates import Certified, certified
from unsc_plugin._board.drift import Drift, drift
from unsc_plugin._board.matched import Candidate, Matched, matched
from unsc_plugin._board.study import (
    SHOWN,
    Array,
    BoardSummary,
    ScenarioSummary,
    Scored,
    Study,
    Summary,
    UnitId,
    Value,
    retrain_variance,
    score_study,
    seed_means,
    summarise,
    unit_text,
)
from unsc_plugin.errors import RecordError
from unsc_plugin.metrics import _stats as stats
from unsc_plugin.metrics import score as scoring
from unsc_plugin.record import Record
from unsc_plugin.spec import canonical_json, derive


@dataclass(frozen=True)
class Row:
    """One line of the board. `role` is reference, original, control, ranked or unranked."""

    entry: str
    role: str
    version: str
    needs: tuple[str, ...]
    track: str
    status: str
    checks: str
    command: str
    n_hyperparameters: int | None
    summary: Summary
    reasons: tuple[str, ...] = ()
    has_reference: bool = True
    tier: int | None = None
    position: int | None = None
    rank: stats.RankSummary | None = None
    mean_rank: float | None = None


@dataclass(frozen=True)
class ScenarioResult:
    """Admission and results of one scenario, entries in the order of the board."""

    scenario: ScenarioSummary
    admission: scoring.Admission
    summaries: Mapping[str, Summary]
    variance: Mapping[str, stats.VarianceComponents]


@dataclass(frozen=True)
class Problem:
    """Runs of one entry that ended without a result, for one reason."""

    scenario: str
    entry: str
    units: tuple[str, ...]
    status: str
    reason: str


@dataclass(frozen=True)
class Standings:
    """A whole board as numbers, rows in the order in which they are shown."""

    board: BoardSummary
    health: scoring.Health
    pinned: tuple[Row, ...]
    ranked: tuple[Row, ...]
    unranked: tuple[Row, ...]
    without_reference: tuple[Row, ...]
    scenarios: tuple[ScenarioResult, ...]
    problems: tuple[Problem, ...]
    retrain_seconds: Mapping[str, float | None]
    retrained_values: Mapping[str, float]
    certificates: tuple[Certified, ...] = ()
    matched: tuple[Matched, ...] = ()
    drift: tuple[Drift, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row: pinned, ranked, unranked, without a reference."""
        return (*self.pinned, *self.ranked, *self.unranked, *self.without_reference)


def _pool(summaries: Sequence[Summary], floors: Sequence[Summary]) -> Summary:
    """Average one entry over scenarios; a number that one of them lacks stays absent."""
    if not summaries:
        return Summary()
    values = {}
    for name in sorted({name for summary in (*summaries, *floors) for name in summary.values}):
        asked = [i for i, floor in enumerate(floors) if not floor.values or name in floor.values]
        found = [summaries[i].values[name] for i in asked if name in summaries[i].values]
        if found and len(found) == len(asked):
            values[name] = _mean_value(found)
    components = {}
    for name in scoring.COMPONENTS:
        asked = [i for i, floor in enumerate(floors) if name in floor.components]
        parts = [summaries[i].components[name] for i in asked if name in summaries[i].components]
        if parts and len(parts) == len(asked):
            components[name] = float(np.mean(parts))
    return Summary(
        components=components,
        utility=_mean_or_none([s.utility for s in summaries]),
        closeness=_mean_or_none([s.closeness for s in summaries]),
        failed=_mean_or_none([s.failed for s in summaries]),
        values=values,
    )


def _mean_value(values: Sequence[Value]) -> Value:
    halves = [v.half for v in values if v.half is not None]
    return Value(
        float(np.mean([v.mean for v in values])),
        math.sqrt(sum(h * h for h in halves)) / len(values) if len(halves) == len(values) else None,
        _mean_or_none([v.delta for v in values]),
        all(v.equivalent for v in values),
    )


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    found = [v for v in values if v is not None]
    return float(np.mean(found)) if found and len(found) == len(values) else None


def standings(records: Sequence[Record], board: BoardSummary) -> Standings:
    """Rank the entries of a board.

    Args:
        records: of any number of entries, in any order; `retrain` (R_B, the floor) and `original`
            are entries like the others, told apart by their name.
        board: what the board file says.

    Raises:
        RecordError: if two records hold one unit, or one lies outside the board's grid.
    """
    return _Builder(records, board).standings()


class _Builder:
    """Holds the intermediate results of one build."""

    def __init__(self, records: Sequence[Record], board: BoardSummary) -> None:
        self.board = board
        self.records = sorted(records, key=lambda record: record.key)
        grids = by_unit(self.records, board)
        self.studies = [
            Study(s, grids[s.name], board.train_seeds, board.draws) for s in board.scenarios
        ]
        self.admissions = [study.admit(board.admission_z) for study in self.studies]
        self.scored = [
            score_study(study, admission, board) if admission.ranked else None
            for study, admission in zip(self.studies, self.admissions, strict=True)
        ]
        self.by_entry: dict[str, list[Record]] = {name: [] for name in board.entries}
        for record in self.records:
            self.by_entry.setdefault(record.entry, []).append(record)
        mubench = {k for r in self.records for k in r.metrics if k.startswith("mubench.")}
        self.names = (*SHOWN, *sorted(mubench))

    def standings(self) -> Standings:
        results = self._results()
        drafts = {entry: self._draft(entry, results) for entry in sorted(self.by_entry)}
        complete, replicates = self._replicates()
        drafts = {
            entry: self._with_interval(row, complete, replicates) for entry, row in drafts.items()
        }
        eligible = sorted((row for row in drafts.values() if row.role == "ranked"), key=_by_score)
        health = self._health(drafts, eligible, complete, replicates)
        if health.ok:
            eligible = self._ranked(eligible, complete, replicates)
        else:
            eligible.sort(key=lambda row: row.entry)
        pinned = [drafts[e] for e in ("retrain", *scoring.CONTROLS) if e in drafts]
        others = sorted((r for r in drafts.values() if r.role == "unranked"), key=_by_score)
        order = [row.entry for row in (*pinned, *eligible, *others)]
        candidates = [self._candidate(drafts[entry]) for entry in order]
        at_equal = [matched(s, candidates, self.board.confidence) for s in self.studies]
        drifts = [drift(study, candidates) for study in self.studies]
        return Standings(
            board=self.board,
            health=health,
            pinned=tuple(pinned),
            ranked=tuple(eligible),
            unranked=tuple(row for row in others if row.has_reference),
            without_reference=tuple(row for row in others if not row.has_reference),
            certificates=certified(self.records),
            matched=tuple(found for found in at_equal if found is not None),
            drift=tuple(found for found in drifts if found is not None),
            scenarios=tuple(_reordered(result, order) for result in results),
            problems=tuple(problems_of(self.records)),
            retrain_seconds={s.scenario.name: s.retrain_seconds() for s in self.studies},
            retrained_values=self._retrained_values(),
        )

    def _candidate(self, row: Row) -> Candidate:
        """Return what a comparison at equal forgetting must know of an entry."""
        role = _role(row.entry)
        barred = self._foreign(row.entry) if role == "ranked" else []
        if row.track not in ("", *scoring.RANKED_TRACKS):
            barred.append(f"track {row.track} is never ranked")
        return Candidate(row.entry, role, row.needs, tuple(barred))

    def _results(self) -> list[ScenarioResult]:
        return [
            ScenarioResult(
                study.scenario,
                admission,
                {
                    entry: summarise(study, scored, entry, self.names, self.board.confidence)
                    for entry in sorted(study.units)
                },
                retrain_variance(study),
            )
            for study, admission, scored in zip(
                self.studies, self.admissions, self.scored, strict=True
            )
        ]

    def _draft(self, entry: str, results: Sequence[ScenarioResult]) -> Row:
        records = self.by_entry[entry]
        scope = [r for r in results if r.admission.ranked] or list(results)
        summary = _pool(
            [r.summaries.get(entry, Summary()) for r in scope],
            [r.summaries.get("retrain", Summary()) for r in scope],
        )
        role = _role(entry)
        reasons = tuple(self._reasons(entry)) if role == "ranked" else ()
        first = records[0] if records else None
        return Row(
            entry=entry,
            role="unranked" if reasons else role,
            version="/".join(sorted({r.package_version for r in records})) or "",
            needs=tuple(sorted({need for r in records for need in r.needs})),
            track=_track(records),
            status=_status(records, self.board),
            checks=_checks_text(records),
            command=first.command if first else "",
            n_hyperparameters=first.n_hyperparameters if first else None,
            summary=summary,
            reasons=reasons,
            has_reference=not records or all(r.reference for r in records if r.status == "ok"),
        )

    def _reasons(self, entry: str) -> list[str]:
        records = self.by_entry[entry]
        if not records:
            return ["not run yet"]
        admitted = [
            (study, admission)
            for study, admission in zip(self.studies, self.admissions, strict=True)
            if admission.ranked
        ]
        reasons = [] if admitted else ["no scenario is admitted"]
        finished = [r for r in records if r.status == "ok"]
        if not finished:
            return [*reasons, "no unit finished"]
        candidate = scoring.Candidate(
            checks=_failing_checks(records),
            absent=[text for study, a in admitted for text in study.absent(entry, a)],
            seeds=self.board.train_seeds,
            draws=self.board.draws,
            pool=min(self.board.reference_pool, *(len(r.reference_hashes) for r in finished)),
            costs=[_costs(study, entry) for study, _ in admitted],
            track=_track(records),
            foreign=self._foreign(entry),
        )
        return reasons + scoring.eligibility(candidate, cost_gate=self.board.cost_gate)

    def _foreign(self, entry: str) -> list[str]:
        """Why records of an entry cannot be compared with the board's own, in words."""
        records = self.by_entry[entry]
        reasons = []
        if boards := sorted({str(r.board) for r in records if r.board != self.board.name}):
            reasons.append(f"run outside this board ({', '.join(boards)})")
        if len({canonical_json(r.config) for r in records}) > 1:
            reasons.append("its configuration differs between units")
        for study in self.studies:
            units, retrain = study.units.get(entry, {}), study.units.get("retrain", {})
            for what, differs in (
                ("forget set", _forget_differs),
                ("pool of retrained models", _pool_differs),
            ):
                bad = [u for u, r in units.items() if u in retrain and differs(r, retrain[u])]
                if bad:
                    listing = ", ".join(unit_text(u) for u in sorted(bad))
                    reasons.append(
                        f"{study.scenario.name}: {what} is not that of retrain at {listing}"
                    )
        return reasons

    def _replicates(self) -> tuple[tuple[str, ...], Array]:
        """Entries with a score everywhere, and their (R, E) global bootstrap scores."""
        scored = [s for s in self.scored if s is not None]
        if not scored:
            return (), np.zeros((0, 0))
        complete = tuple(sorted(set.intersection(*(set(s.entries) for s in scored))))

        def restricted(part: Scored) -> stats.Statistic:
            columns = [part.entries.index(entry) for entry in complete]
            return lambda seeds, draws: part.statistic(seeds, draws)[:, columns]

        replicates = stats.hierarchical_bootstrap(
            [restricted(s) for s in scored],
            [self.board.train_seeds] * len(scored),
            [s.draws for s in scored],
            replicates=self.board.bootstrap,
            seed=derive(self.board.seed, "bootstrap"),
        )
        return complete, replicates

    def _with_interval(self, row: Row, complete: Sequence[str], replicates: Array) -> Row:
        """Give a row its global S: by jackknife on one scenario, else by the bootstrap."""
        if row.entry not in complete:
            return row
        scored = [s for s in self.scored if s is not None]
        parts = [s.interval(row.entry, self.board.confidence) for s in scored]
        if len(scored) == 1:
            interval = parts[0]
        else:
            estimate = float(np.mean([part.estimate for part in parts]))
            interval = stats.Interval(estimate)
            if self.board.train_seeds > 1:
                column = replicates[:, complete.index(row.entry)]
                interval = stats.percentile_interval(estimate, column, self.board.confidence)
        return replace(row, summary=replace(row.summary, score=interval))

    def _health(
        self, rows: Mapping[str, Row], eligible: Sequence[Row], complete: Sequence[str], reps: Array
    ) -> scoring.Health:
        scores = {
            entry: row.summary.score.estimate
            for entry, row in rows.items()
            if row.summary.score is not None and _role(entry) != "ranked"
        }
        controls = [rows[c] for c in scoring.CONTROLS if c in scores]
        together = sorted((*eligible, *controls), key=_by_score) if eligible else []
        ranks = _rank_summaries(together, complete, reps, self.board.confidence)
        tiers = stats.tiers([(r.low, r.high) for r in ranks])
        health = scoring.board_health(
            scores,
            {row.entry: tier for row, tier in zip(together, tiers, strict=True)},
            class_kinds=any(s.kind in scoring.CLASS_KINDS for s in self.board.scenarios),
        )
        missing = tuple(
            f"{entry} is not on the board; run it first"
            for entry in ("retrain", "original")
            if not self.by_entry.get(entry)
        )
        return scoring.Health(missing + health.failures, health.notes + self.board.notes)

    def _ranked(self, rows: Sequence[Row], complete: Sequence[str], replicates: Array) -> list[Row]:
        ranks = _rank_summaries(rows, complete, replicates, self.board.confidence)
        tiers = stats.tiers([(r.low, r.high) for r in ranks])
        means = self._mean_ranks([row.entry for row in rows])
        return [
            replace(row, position=i + 1, tier=tiers[i], rank=ranks[i], mean_rank=means[i])
            for i, row in enumerate(rows)
        ]

    def _mean_ranks(self, entries: Sequence[str]) -> list[float]:
        scored = [s for s in self.scored if s is not None]
        if not entries:
            return []
        table = np.array(
            [[s.point.score[0, s.entries.index(e)].mean() for e in entries] for s in scored]
        )
        return [float(x) for x in stats.rank_replicates(table).mean(axis=0)]

    def _retrained_values(self) -> dict[str, float]:
        """Mean of R_A of the MU-Bench numbers, over scenarios and units."""
        result = {}
        for name in self.names:
            if name.startswith("mubench."):
                grids = [study.reference("retrain", name) for study in self.studies]
                if all(np.isfinite(g).any() for g in grids):
                    result[name] = float(np.mean([np.nanmean(g) for g in grids]))
        return result


def by_unit(
    records: Sequence[Record], board: BoardSummary
) -> dict[str, dict[str, dict[UnitId, Record]]]:
    grids: dict[str, dict[str, dict[UnitId, Record]]] = {s.name: {} for s in board.scenarios}
    kinds = {s.name: s.kind for s in board.scenarios}
    for record in records:
        name = f"{record.scenario}, {record.entry}, {record.unit}"
        s, d = record.unit.train_seed, record.unit.draw
        if kinds.get(record.scenario) != record.kind or s >= board.train_seeds or d >= board.draws:
            raise RecordError(
                f"expected units s < {board.train_seeds}, d < {board.draws} of the scenarios of "
                f"board {board.name}, got {name} of kind {record.kind}; move that record away or "
                "correct the board"
            )
        units = grids[record.scenario].setdefault(record.entry, {})
        if (s, d) in units:
            raise RecordError(f"expected one record per unit, got two of {name}; keep one of them")
        units[s, d] = record
    return grids


def _role(entry: str) -> str:
    if entry == "retrain":
        return "reference"
    if entry == "original":
        return "original"
    return "control" if entry in scoring.CONTROLS else "ranked"


def _by_score(row: Row) -> tuple[bool, float, str]:
    interval = row.summary.score
    return (interval is None, -round(interval.estimate, 12) if interval else 0.0, row.entry)


def _rank_summaries(
    rows: Sequence[Row], complete: Sequence[str], replicates: Array, confidence: float
) -> list[stats.RankSummary]:
    if not rows:
        return []
    columns = [complete.index(row.entry) for row in rows]
    return stats.rank_summaries(replicates[:, columns], confidence)


def _track(records: Sequence[Record]) -> str:
    return "/".join(sorted({record.track for record in records}))


def _status(records: Sequence[Record], board: BoardSummary) -> str:
    planned = len(board.scenarios) * board.train_seeds * board.draws
    counts = Counter(record.status for record in records)
    parts = [f"{counts['ok']}/{planned} ok"]
    parts += [f"{counts[s]} {s}" for s in ("failed", "diverged", "cancelled") if counts[s]]
    if planned > len(records):
        parts.append(f"{planned - len(records)} not run")
    return ", ".join(parts)


def _failing_checks(records: Sequence[Record]) -> list[str] | None:
    """Names of failing checks over all records; None if a record was never checked."""
    if any(record.checks is None for record in records):
        return None
    failing: set[str] = set()
    for record in records:
        checks = record.checks or {}
        failing |= set(checks.get("failed", ())) - set(checks.get("excused", ()))
    return sorted(failing)


def _checks_text(records: Sequence[Record]) -> str:
    checks = [record.checks for record in records if record.checks is not None]
    if not checks:
        return ""
    passed = {name for c in checks for name in c.get("passed", ())}
    failed = {name for c in checks for name in c.get("failed", ())}
    return f"{len(passed - failed)}/{len(passed | failed)}"


def _costs(study: Study, entry: str) -> scoring.CostRatios:
    ratios = [seed_means(study.grid(entry, name)) for name in ("work_ratio", "time_ratio")]
    work, time = (float(r.mean()) if r.size else None for r in ratios)
    return scoring.CostRatios(study.scenario.name, work, time, study.retrain_seconds())


def _forget_differs(record: Record, retrain: Record) -> bool:
    ours, theirs = record.hashes.get("forget"), retrain.hashes.get("forget")
    return ours is not None and theirs is not None and ours != theirs


def _pool_differs(record: Record, retrain: Record) -> bool:
    return record.status == "ok" and set(record.reference_hashes) != set(retrain.reference_hashes)


def problems_of(records: Sequence[Record]) -> list[Problem]:
    """Runs without a result, those of one cause together."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for record in records:
        if record.status != "ok":
            key = (record.scenario, record.entry, record.status, record.reason or "")
            groups.setdefault(key, []).append(str(record.unit))
    return [
        Problem(scenario, entry, tuple(units), status, reason)
        for (scenario, entry, status, reason), units in sorted(groups.items())
    ]


def _reordered(result: ScenarioResult, order: Sequence[str]) -> ScenarioResult:
    summaries = {entry: result.summaries[entry] for entry in order if entry in result.summaries}
    return replace(result, summaries=summaries)
