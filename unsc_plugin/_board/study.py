"""The records of one scenario as numbers: grids, admission, scores, summaries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unsc_plugin.metrics import _stats as stats
from unsc_plugin.metrics import score as scoring
from unsc_plugin.record import Record

Array = NDArray[np.float64]
UnitId = tuple[int, int]

ACCURACIES = ("acc_forget", "acc_retain", "acc_test")
COSTS = ("seconds_prepare", "seconds_unlearn", "peak_bytes", "work", "work_ratio", "time_ratio")
SHOWN = (
    *ACCURACIES,
    "acc_test_forgotten",
    "js_forget",
    "gap_umia_auc",
    "gap_relearn",
    "gap_probe5",
    "tow",
    *COSTS,
)
EQUIVALENCE_LEAST = 0.01


class ScenarioSummary(NamedTuple):
    """One scenario of a board; `metrics` renames what a component reads (its criterion for C)."""

    name: str
    kind: str
    description: str = ""
    metrics: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class BoardSummary:
    """What the leaderboard must know of a board file. Units are s < train_seeds, d < draws.

    `criterion` is the metric that corrections are compared at equal values of.
    """

    name: str
    title: str
    scenarios: tuple[ScenarioSummary, ...]
    entries: tuple[str, ...] = ()
    version: int = 1
    seed: int = 0
    train_seeds: int = 5
    draws: int = 2
    reference_pool: int = 5
    admission_z: float = 3.0
    a_min: float = 0.01
    confidence: float = 0.95
    bootstrap: int = 2000
    cost_gate: float = 0.2
    weights: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    criterion: str | None = None


@dataclass(frozen=True)
class Value:
    """A mean over units, its half-width over seeds, its distance to R_A where that is known."""

    mean: float
    half: float | None = None
    delta: float | None = None
    equivalent: bool = False


@dataclass(frozen=True)
class Summary:
    """What one entry reached, in one scenario or over the board. Absent numbers have no key."""

    score: stats.Interval | None = None
    components: Mapping[str, float] = field(default_factory=dict)
    utility: float | None = None
    closeness: float | None = None
    failed: float | None = None
    values: Mapping[str, Value] = field(default_factory=dict)


class Study:
    """The records of one scenario as (train seed, draw) grids."""

    def __init__(
        self,
        scenario: ScenarioSummary,
        units: Mapping[str, Mapping[UnitId, Record]],
        n: int,
        d: int,
    ) -> None:
        self.scenario, self.units, self.shape = scenario, units, (n, d)
        self.names = dict(scenario.metrics)
        retrain = units.get("retrain", {}).values()
        self._retrain_seconds: dict[str, list[float]] = {}
        for record in retrain:
            if (seconds := _seconds(record)) is not None:
                self._retrain_seconds.setdefault(_device(record), []).append(seconds)

    def grid(self, entry: str, name: str) -> Array:
        """(n, n_d) values of finished units, NaN elsewhere."""
        return self._fill(entry, lambda record: self.number(record, name))

    def reference(self, entry: str, name: str) -> Array:
        """(n, n_d) means of R_A that the finished units were measured against."""
        return self._fill(entry, lambda record: record.reference.get(self.metric(name)))

    def metric(self, name: str) -> str:
        """Return the metric behind a column; class-wise, test accuracy is that of kept classes."""
        class_wise = self.scenario.kind in scoring.CLASS_KINDS
        return "acc_test_retained" if class_wise and name == "acc_test" else name

    def number(self, record: Record, name: str) -> float | None:
        """Return a number of a finished unit; cost ratios are derived where they can be."""
        name = self.metric(name)
        if name in record.metrics:
            return record.metrics[name]
        if name == "work_ratio":
            unit = (record.unit.train_seed, record.unit.draw)
            retrained = self.units.get("retrain", {}).get(unit)
            base = retrained.cost.get("work") if retrained else None
            return record.cost["work"] / base if base and "work" in record.cost else None
        if name == "time_ratio":
            device = _device(record)
            seconds, base = _seconds(record), self.retrain_seconds(device) if device else None
            return seconds / base if seconds is not None and base else None
        return record.cost.get(name)

    def retrain_seconds(self, device: str | None = None) -> float | None:
        """t_R: median seconds of the retrainings, on one device or on any."""
        found = [
            seconds
            for where, group in self._retrain_seconds.items()
            for seconds in group
            if device in (None, where)
        ]
        return float(np.median(found)) if found else None

    def _fill(self, entry: str, read: Callable[[Record], float | None]) -> Array:
        values = np.full(self.shape, np.nan)
        for unit, record in self.units.get(entry, {}).items():
            found = read(record) if record.status == "ok" else None
            values[unit] = np.nan if found is None else found
        return values

    def admit(self, z: float) -> scoring.Admission:
        """Admission from original and retrained models, before any method is looked at."""
        kind, names = self.scenario.kind, self.names
        gaps: dict[str, dict[str, Array]] = {}
        for entry in ("original", "retrain"):
            grids = {
                m: self.grid(entry, m) for m in scoring.component_metrics(kind, names).values()
            }
            gaps[entry] = {m: g for m, g in grids.items() if np.isfinite(g).any()}
        admission = scoring.admit(kind, gaps["original"], gaps["retrain"], z=z, names=names)
        reason = self._unanchored(admission)
        return replace(admission, reason=reason) if reason else admission

    def _unanchored(self, admission: scoring.Admission) -> str | None:
        """Why the ends of the scale are not all there: S is 1 at retrain and ~0 at original."""
        for entry in ("original", "retrain"):
            units = self.units.get(entry, {})
            if lost := [u for u in self.ids if u not in units or units[u].status != "ok"]:
                listing = ", ".join(unit_text(u) for u in lost)
                return f"{entry} has no finished run at {listing}"
        if lacking := self.absent("retrain", admission):
            return f"retrain lacks numbers: {'; '.join(lacking)}"
        absent = [a for a in self.utility if np.isnan(self.reference("retrain", a)).all(0).any()]
        return f"no retrained value of {', '.join(absent)}" if absent else None

    @property
    def ids(self) -> list[UnitId]:
        """The units of the board's grid."""
        return [(s, d) for s in range(self.shape[0]) for d in range(self.shape[1])]

    @property
    def utility(self) -> tuple[str, ...]:
        """Names of the utility accuracies."""
        return scoring.KINDS[self.scenario.kind].utility

    def absent(self, entry: str, admission: scoring.Admission) -> list[str]:
        """What an entry lacks for a score here, in words."""
        where = self.scenario.name
        units = self.units.get(entry, {})
        missing = [u for u in self.ids if u not in units or units[u].status == "cancelled"]
        if missing:
            return [f"{where}: no finished run at {', '.join(unit_text(u) for u in missing)}"]
        reasons = []
        wanted = scoring.component_metrics(self.scenario.kind, self.names)
        for name in (*(wanted[c] for c in admission.components), *self.utility):
            values = self.grid(entry, name)
            holes = [
                u
                for u in self.ids
                if u[1] in admission.draws and units[u].status == "ok" and np.isnan(values[u])
            ]
            if holes:
                why = units[holes[0]].missing.get(self.metric(name))
                units_text = ", ".join(unit_text(u) for u in holes)
                reasons.append(
                    f"{where}: {name} not measured at {units_text}" + (f" ({why})" if why else "")
                )
        return reasons


def _device(record: Record) -> str:
    return str(record.environment.get("device") or "")


def _seconds(record: Record) -> float | None:
    if record.status != "ok" or "seconds_unlearn" not in record.cost:
        return None
    return record.cost["seconds_unlearn"] + record.cost.get("seconds_prepare", 0.0)


def unit_text(unit: UnitId) -> str:
    return f"s{unit[0]}d{unit[1]}"


@dataclass(frozen=True)
class Scored:
    """Scores of the entries that have everything, in one admitted scenario."""

    entries: tuple[str, ...]
    components: tuple[str, ...]
    point: scoring.Scores
    deleted: Array
    statistic: stats.Statistic
    draws: int

    def interval(self, entry: str, confidence: float) -> stats.Interval:
        i = self.entries.index(entry)
        estimate = float(self.point.score[0, i].mean())
        return _within_unit(stats.jackknife_interval(estimate, self.deleted[:, i], confidence))


def score_study(study: Study, admission: scoring.Admission, board: BoardSummary) -> Scored:
    wanted = scoring.component_metrics(study.scenario.kind, study.names)
    metrics = [wanted[c] for c in admission.components]
    draws = list(admission.draws)

    def stack(entry: str, names: Iterable[str]) -> Array:
        return np.stack([study.grid(entry, name)[:, draws] for name in names], axis=-1)

    entries = tuple(e for e in sorted(study.units) if not study.absent(e, admission))
    reference = [np.nanmean(study.reference("retrain", a)[:, draws], axis=0) for a in study.utility]
    status = [
        [[study.units[e][s, d].status == "ok" for d in draws] for s in range(study.shape[0])]
        for e in entries
    ]
    gaps = scoring.Gaps(
        entries=np.stack([stack(e, metrics) for e in entries]),
        accuracies=np.stack([stack(e, study.utility) for e in entries]),
        finished=np.array(status, dtype=bool),
        original=stack("original", metrics),
        floor=stack("retrain", metrics),
        reference=np.stack(reference, axis=-1),
    )
    exponents = [board.weights.get(c, 1.0) for c in admission.components]
    n = study.shape[0]
    deleted = np.zeros((0, len(entries)))
    if n > 1:
        shares = (1 - np.eye(n)) / (n - 1)
        deleted = scoring.draw_scores(
            gaps, shares, exponents=exponents, a_min=board.a_min
        ).score.mean(axis=2)
    return Scored(
        entries,
        admission.components,
        scoring.draw_scores(gaps, exponents=exponents, a_min=board.a_min),
        deleted,
        scoring.scenario_statistic(gaps, exponents=exponents, a_min=board.a_min),
        len(draws),
    )


def _within_unit(interval: stats.Interval) -> stats.Interval:
    """Cut the limits of a score to [0, 1]; no score lies outside."""
    if interval.low is None or interval.high is None:
        return interval
    return stats.Interval(interval.estimate, max(interval.low, 0.0), min(interval.high, 1.0))


def summarise(
    study: Study, scored: Scored | None, entry: str, names: Sequence[str], confidence: float
) -> Summary:
    values = {}
    for name in names:
        if (value := _value(study, entry, name, confidence)) is not None:
            values[name] = value
    units = study.units.get(entry, {}).values()
    counted = [r for r in units if r.status != "cancelled"]
    failed = sum(r.status != "ok" for r in counted) / len(counted) if counted else None
    if scored is None or entry not in scored.entries:
        return Summary(failed=failed, values=values)
    i = scored.entries.index(entry)
    a = scored.point.components[0, i].mean(axis=0)
    return Summary(
        score=scored.interval(entry, confidence),
        components={
            c: float(x) for c, x in zip(scored.components, a, strict=True) if np.isfinite(x)
        },
        utility=_finite(scored.point.utility[0, i].mean()),
        closeness=_finite(scored.point.closeness[0, i].mean()),
        failed=failed,
        values=values,
    )


def _value(study: Study, entry: str, name: str, confidence: float) -> Value | None:
    grid = study.grid(entry, name)
    by_seed = seed_means(grid)
    if by_seed.size == 0:
        return None
    interval = stats.t_interval(by_seed, confidence)
    differences = seed_means(grid - study.reference(entry, name))
    delta = float(differences.mean()) if differences.size else None
    same = False
    if name in ACCURACIES and delta is not None and entry != "retrain":
        spread = study.grid("retrain", name), study.reference("retrain", name)
        if np.isfinite(spread[0] - spread[1]).all():
            margin = stats.equivalence_margin(*spread, least=EQUIVALENCE_LEAST)
            same = stats.equivalent(differences, margin)
    return Value(interval.estimate, interval.half, delta, same)


def seed_means(grid: Array) -> Array:
    """Mean over the draws that are there, for the seeds that have any."""
    rows = grid[np.isfinite(grid).any(axis=1)]
    return np.nanmean(rows, axis=1) if rows.size else np.zeros(0)


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def retrain_variance(study: Study) -> dict[str, stats.VarianceComponents]:
    if min(study.shape) < 2:
        return {}
    grids = {name: study.grid("retrain", name) for name in ACCURACIES}
    return {n: stats.variance_components(g) for n, g in grids.items() if np.isfinite(g).all()}
