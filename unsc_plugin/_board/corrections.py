"""Records of corrections to numbers: entries compared where as much of the original's gap is left.

A correction names a goal and no forget set, so there is no retrained pool, no score and no rank.
Every comparison is paired by unit (train seed and draw), and a level that a unit does not reach
stays absent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unsc_plugin._board.correction_health import judged
from unsc_plugin._board.standings import Problem, by_unit, problems_of
from unsc_plugin._board.study import Array, BoardSummary, ScenarioSummary, Study, unit_text
from unsc_plugin._board.trials import (
    CRITERION,
    ORIGINAL,
    SOFT,
    Family,
    Trials,
    families,
    over_units,
)
from unsc_plugin.metrics import _stats as stats
from unsc_plugin.metrics import pareto
from unsc_plugin.metrics import score as scoring
from unsc_plugin.record import Record
from unsc_plugin.spec import canonical_json

LEVELS = (0.75, 0.5, 0.25)
"""Shares of the original's |criterion| at which entries are compared."""
KEPT = ("nll", "acc", "worst_group_acc")
COMPARED = ("nll", "acc")
ALLOWANCE = 1.05
"""Times the original's loss on the selection rows that a deployed strength may have."""
GAPS = ("dp_diff", "eop_diff", "eo_diff", "dp_soft", "eop_soft", "group_acc_gap")
ROBUSTNESS = ("robust_acc", "robust_nll", "transfer_acc")
ORACLE = ("oracle_js", "oracle_agree", "oracle_gap_diff")
MEASURED = (*GAPS, *KEPT, *ROBUSTNESS, *ORACLE)

Numbers = Mapping[str, stats.Interval]
Counts = Mapping[str, int]


@dataclass(frozen=True)
class Place:
    """A family where a level of the original's |criterion| is left, each unit on its own curve.

    `share` is the mean level; of a single point it is where the point happens to lie, `beyond`
    counting the units where that is no less than the original's. `reached` of `units` come there,
    `unmeasured` of the others lack a result; `beside` have `soft_weighted` there too. `values` are
    means over the units, `against` the same less those of `soft_weighted`; both only where every
    unit has them.
    """

    share: float
    reached: int
    units: int
    unmeasured: int = 0
    beyond: int = 0
    beside: int = 0
    values: Numbers = field(default_factory=dict)
    against: Numbers = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """One entry: everything that was measured, and how its runs went, counted by units.

    `magnitude` is |criterion|, `flipped` counts units whose criterion has turned its sign beyond
    its bootstrap interval, of `judged` that have one.
    """

    label: str
    strength: float | None
    statuses: Counts
    criterion: stats.Interval | None
    magnitude: stats.Interval | None
    values: Numbers
    shortfall: float | None
    stops: Counts
    noops: Counts
    realised: Counts
    flipped: int
    judged: int
    on_front: bool = False


@dataclass(frozen=True)
class Deployed:
    """What a family would put to use: per unit the strength that is best on the selection rows."""

    chosen: Counts
    units: int
    values: Numbers = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A family: its points, its places at the levels or where its single point lies."""

    name: str
    swept: bool
    track: str
    points: tuple[Point, ...]
    places: tuple[Place, ...]
    hypervolume: stats.Interval | None = None
    deployed: Deployed | None = None


@dataclass(frozen=True)
class Apart:
    """A family that is shown and never compared, and why."""

    name: str
    reasons: tuple[str, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Comparison:
    """One scenario; `prior` is the NLL of the class prior, `gap` the original's |criterion|."""

    scenario: ScenarioSummary
    units: int
    gap: stats.Interval | None
    prior: float | None
    rows: tuple[Row, ...]
    apart: tuple[Apart, ...] = ()


@dataclass(frozen=True)
class Corrections:
    """A whole board of corrections; `soft` names the family that all others are compared with."""

    board: BoardSummary
    health: scoring.Health
    criterion: str
    soft: str | None
    scenarios: tuple[Comparison, ...]
    problems: tuple[Problem, ...]


def corrections(records: Sequence[Record], board: BoardSummary) -> Corrections:
    """Compare the entries of a board of corrections.

    Args:
        records: of kind `correction`, in any order; `original` is an entry like the others.
        board: what the board file says; `criterion` is what entries are compared at equal values
            of.

    Raises:
        RecordError: if two records hold one unit, or one lies outside the board's grid.
    """
    ordered = sorted(records, key=lambda record: record.key)
    grids = by_unit(ordered, board)
    criterion = board.criterion or "dp_soft"
    trials = [
        Trials(Study(s, grids[s.name], board.train_seeds, board.draws), criterion)
        for s in board.scenarios
    ]
    labels = list(dict.fromkeys([*board.entries, *sorted({r.entry for r in ordered})]))
    reasons = {label: _apart(label, trials, board) for label in labels}
    everyone = families(labels)
    barred = {
        family: tuple(dict.fromkeys(r for label in family.labels for r in reasons[label]))
        for family in everyone
    }
    compared = [family for family in everyone if not barred[family]]
    soft = _soft(compared, ordered)
    scenarios = tuple(
        _Comparing(one, compared, soft, board.confidence).result(
            [(family, why) for family, why in barred.items() if why]
        )
        for one in trials
    )
    return Corrections(
        board=board,
        health=judged(trials, labels, board, known=soft is not None),
        criterion=criterion,
        soft=None if soft is None else soft.name,
        scenarios=scenarios,
        problems=tuple(problems_of(ordered)),
    )


def _soft(compared: Iterable[Family], records: Iterable[Record]) -> Family | None:
    """Return the family that the others are compared with: by its name, else by what it runs."""
    swept = [family for family in compared if family.swept]
    solved = {r.entry for r in records if r.method == SOFT and r.config.get("solver") == "qp"}
    named = [family for family in swept if family.name == SOFT]
    return next(iter([*named, *(f for f in swept if set(f.labels) <= solved)]), None)


def _apart(label: str, trials: Sequence[Trials], board: BoardSummary) -> list[str]:
    """Say why records of an entry cannot be compared with the board's others."""
    records = [r for one in trials for r in one.study.units.get(label, {}).values()]
    reasons = []
    if any(record.config.get("protocol") == "reference" for record in records):
        reasons.append("protocol reference: published formulas, never compared")
    if boards := sorted({str(r.board) for r in records if r.board != board.name}):
        reasons.append(f"run outside this board ({', '.join(boards)})")
    if len({canonical_json(record.config) for record in records}) > 1:
        reasons.append("its configuration differs between units")
    for one in trials:
        originals = one.study.units.get(ORIGINAL, {})
        foreign = [
            unit_text(unit)
            for unit, record in sorted(one.study.units.get(label, {}).items())
            if unit in originals and _other_original(record, originals[unit])
        ]
        if foreign:
            units = ", ".join(foreign)
            reasons.append(f"{one.study.scenario.name}: another original model at {units}")
    return reasons


def _other_original(record: Record, original: Record) -> bool:
    ours, theirs = record.hashes.get("original"), original.hashes.get("original")
    return ours is not None and theirs is not None and ours != theirs


# --------------------------------------------------------------------------- one scenario


class _Comparing:
    """The comparison of one scenario while it is made."""

    def __init__(
        self, trials: Trials, compared: Sequence[Family], soft: Family | None, confidence: float
    ) -> None:
        self.trials, self.study = trials, trials.study
        self.compared, self.soft, self.confidence = compared, soft, confidence
        self.units = self.study.shape[0] * self.study.shape[1]

    def result(self, barred: Sequence[tuple[Family, tuple[str, ...]]]) -> Comparison:
        front = self._front()
        gap = np.abs(self.trials.grid(ORIGINAL, CRITERION))
        prior = over_units(self.trials.prior(), self.confidence)
        return Comparison(
            scenario=self.study.scenario,
            units=self.units,
            gap=over_units(gap, self.confidence),
            prior=None if prior is None else prior.estimate,
            rows=tuple(self._row(family, front) for family in self.compared),
            apart=tuple(
                Apart(family.name, why, self._points(family, set())) for family, why in barred
            ),
        )

    def _row(self, family: Family, front: set[str]) -> Row:
        gap = self.trials.share(family.labels[0])
        levels = [np.full(self.study.shape, level) for level in LEVELS] if family.swept else [gap]
        volume = self.trials.hypervolume(family.labels)
        return Row(
            name=family.name,
            swept=family.swept,
            track="/".join(sorted({r.track for u in family.labels for r in self._records(u)})),
            points=self._points(family, front),
            places=tuple(self._place(family, level) for level in levels),
            hypervolume=self._everywhere(volume),
            deployed=self._deployed(family) if family.swept else None,
        )

    def _place(self, family: Family, levels: Array) -> Place:
        """Return a swept family at a level, or a single point at its own, beside the soft one."""
        there = self._at(family, levels, CRITERION)
        beside = np.full(self.study.shape, np.nan)
        differences = {}
        if self.soft is not None and family != self.soft:
            beside = self.trials.at(self.soft, levels, CRITERION)
            differences = {
                name: self._at(family, levels, name) - self.trials.at(self.soft, levels, name)
                for name in COMPARED
            }
        known = np.isfinite(levels)
        return Place(
            share=float(levels[known].mean()) if known.any() else math.nan,
            reached=int(np.isfinite(there).sum()),
            units=self.units,
            unmeasured=int((np.isnan(there) & self.trials.unmeasured(family)).sum()),
            beyond=int((levels[known] >= 1).sum()),
            beside=int(np.isfinite(beside).sum()),
            values=self._known({name: self._at(family, levels, name) for name in KEPT}),
            against=self._known(differences),
        )

    def _at(self, family: Family, levels: Array, name: str) -> Array:
        if family.swept:
            return self.trials.at(family, levels, name)
        return self.trials.grid(family.labels[0], name)

    def _known(self, grids: Mapping[str, Array]) -> Numbers:
        found = {name: self._everywhere(grid) for name, grid in grids.items()}
        return {name: interval for name, interval in found.items() if interval is not None}

    def _everywhere(self, grid: Array) -> stats.Interval | None:
        """Return the mean of a grid without holes, else nothing."""
        return over_units(grid, self.confidence) if np.isfinite(grid).all() else None

    def _points(self, family: Family, front: set[str]) -> tuple[Point, ...]:
        strengths = family.strengths or (None,)
        return tuple(
            self._point(label, strength, label in front)
            for label, strength in zip(family.labels, strengths, strict=True)
        )

    def _point(self, label: str, strength: float | None, on_front: bool) -> Point:
        grid = self.trials.grid(label, CRITERION)
        values = {
            name: over_units(self.trials.grid(label, name), self.confidence) for name in MEASURED
        }
        records = self._records(label)
        notes = [record.stats for record in records if record.status == "ok"]
        plans = [found.get("plan", {}) for found in notes]
        missing = [max(plan["shortfall"]) for plan in plans if plan.get("shortfall")]
        flipped, judged = self.trials.flipped(label)
        return Point(
            label=label,
            strength=strength,
            statuses=Counter(record.status for record in records),
            criterion=over_units(grid, self.confidence),
            magnitude=over_units(np.abs(grid), self.confidence),
            values={name: found for name, found in values.items() if found is not None},
            shortfall=float(np.mean(missing)) if missing else None,
            stops=_counted(plan.get("stop") for plan in plans),
            noops=_counted(plan.get("noop") for plan in plans),
            realised=_counted(found.get("realised") for found in notes),
            flipped=flipped,
            judged=judged,
            on_front=on_front,
        )

    def _records(self, label: str) -> list[Record]:
        return list(self.study.units.get(label, {}).values())

    def _front(self) -> set[str]:
        """Return the entries on the Pareto set of the means over all units."""
        means = {}
        for label in (label for family in self.compared for label in family.labels):
            grids = np.abs(self.trials.grid(label, CRITERION)), self.trials.grid(label, "nll")
            if np.isfinite(grids).all():
                means[label] = tuple(float(grid.mean()) for grid in grids)
        labels = list(means)
        return {labels[place] for place in pareto.pareto_set(list(means.values()))}

    def _deployed(self, family: Family) -> Deployed | None:
        """Return the numbers of the strength that the selection rows choose; None without such."""
        seen = {
            unit: {
                strength: found
                for strength, label in zip(family.strengths, family.labels, strict=True)
                if (found := _selection(self.study.units.get(label, {}).get(unit))) is not None
            }
            for unit in self.study.ids
        }
        if not any(seen.values()):
            return None
        chosen = {unit: _chosen(found) for unit, found in seen.items()}
        grids = {name: np.full(self.study.shape, np.nan) for name in (CRITERION, *MEASURED)}
        by_strength = dict(zip(family.strengths, family.labels, strict=True))
        for unit, strength in chosen.items():
            for name, grid in grids.items():
                if strength is not None:
                    grid[unit] = self.trials.grid(by_strength[strength], name)[unit]
        counted = Counter(chosen.values())
        order = {f"{t:g}": counted[t] for t in family.strengths if counted[t]}
        return Deployed(order, self.units, self._known(grids))


def _chosen(found: Mapping[float, tuple[float, float, float]]) -> float | None:
    """Return the strength that one unit would put to use; None if none is allowed."""
    strengths = sorted(found)
    if not strengths:
        return None
    metric, loss, before = zip(*(found[strength] for strength in strengths), strict=True)
    return pareto.deployed(strengths, metric, loss, before[0], allowance=ALLOWANCE)


def _selection(record: Record | None) -> tuple[float, float, float] | None:
    """Return (largest |criterion|, loss, the original's loss) on the selection rows, if measured.

    A plan without effect has no numbers of its own: its model is the original.
    """
    if record is None or record.status != "ok":
        return None
    seen = record.stats.get("realised_values", {}).get("selection")
    before = record.stats.get("plan", {}).get("before", {}).get("u_selection")
    if seen is None or before is None or not seen["f"]:
        return None
    numbers = [*seen["f"], seen["u"], before]
    if not all(isinstance(one, int | float) for one in numbers):
        return None  # text stands for a number that is not finite
    return max(abs(f) for f in seen["f"]), float(seen["u"]), float(before)


def _counted(names: Iterable[Any]) -> Counts:
    return dict(sorted(Counter(str(name) for name in names if name).items()))
