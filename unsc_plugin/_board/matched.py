"""Methods at equal forgetting: what each has kept when it has forgotten so much, unit by unit.

Retention at unequal forgetting is partly just less forgetting, so it is never ranked: an entry has
a rank at a level only if every unit of it came there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from unsc_plugin._board.study import Array, Study, seed_means
from unsc_plugin.metrics import _stats as stats
from unsc_plugin.metrics.goal import LEVELS, first_reaching, forgotten_share
from unsc_plugin.record import Record

Point = Mapping[str, float]


@dataclass(frozen=True)
class Candidate:
    """An entry before its numbers: its role, the splits it opens, why it may have no rank."""

    entry: str
    role: str
    needs: tuple[str, ...]
    barred: tuple[str, ...] = ()

    @property
    def pinned(self) -> bool:
        """Whether it is the reference, the original or a control: shown, never ranked."""
        return self.role in ("reference", "original", "control")

    @property
    def forget_only(self) -> bool:
        """Whether the forget set is all that it opens."""
        return self.needs == ("forget",)


@dataclass(frozen=True)
class Place:
    """One entry at one level, means over the units (draws first) with limits over the seeds.

    Every finished unit is taken at its first point that reaches the level, at its last point if
    none does; `reached` of `units` have one. `share` is the forgotten share there, `forgotten` of
    `size` the same in instances. Of the units that diverged, `diverged_there` had reached the level
    before. `difference` in test accuracy is paired with the leader's.
    """

    level: float
    reached: int
    units: int
    diverged: int = 0
    diverged_there: int = 0
    share: float | None = None
    forgotten: float | None = None
    size: float | None = None
    step: float | None = None
    retain: stats.Interval | None = None
    test: stats.Interval | None = None
    difference: stats.Interval | None = None
    rank: int | None = None
    rank_forget_only: int | None = None
    leads: bool = False

    @property
    def ties(self) -> bool:
        """Whether the interval of the difference to the leader holds 0."""
        gap = self.difference
        if gap is None or gap.low is None or gap.high is None:
            return False
        return gap.low <= 0 <= gap.high


@dataclass(frozen=True)
class MatchedEntry:
    """An entry at every level, and its two ends: before the first step, and as evaluated."""

    candidate: Candidate
    start: Place
    levels: tuple[Place, ...]
    end: Place

    @property
    def entry(self) -> str:
        """The name of the entry."""
        return self.candidate.entry

    def at(self, level: float) -> Place:
        """Return the entry at a level."""
        return self.levels[LEVELS.index(level)]


@dataclass(frozen=True)
class Matched:
    """One scenario at equal forgetting; entries pinned first, then by rank at full forgetting."""

    scenario: str
    entries: tuple[MatchedEntry, ...]


def matched(study: Study, candidates: Sequence[Candidate], confidence: float) -> Matched | None:
    """Compare the entries of a scenario at equal forgetting; None where no run has a trajectory."""
    here = [c for c in candidates if c.entry in study.units]
    if not any(_points(r) for c in here for r in study.units[c.entry].values()):
        return None
    grids = {c.entry: _Grids(study, c) for c in here}
    columns = [_ranked(grids, here, level, confidence) for level in LEVELS]
    entries = []
    for number, candidate in enumerate(here):
        grid = grids[candidate.entry]
        levels = tuple(column[number] for column in columns)
        start, end = (grid.place(at, 0.0, confidence) for at in (0, -1))
        entries.append(MatchedEntry(candidate, start, levels, end))
    pinned = [entry for entry in entries if entry.candidate.pinned]
    others = sorted((e for e in entries if not e.candidate.pinned), key=_order)
    return Matched(study.scenario.name, (*pinned, *others))


def _order(entry: MatchedEntry) -> tuple[float, float, float, str]:
    full = entry.at(1.0)
    rank = np.inf if full.rank is None else full.rank
    return (rank, -full.reached, -round(full.share or 0.0, 12), entry.entry)


def _points(record: Record) -> list[Point]:
    found: list[Point] = record.curves.get("trajectory", [])
    return found


def _shares(points: Sequence[Point]) -> list[float]:
    return [forgotten_share(point["acc_forget"]) for point in points]


class _Grids:
    """The trajectories of one entry as (train seed, draw) grids of any of their points."""

    def __init__(self, study: Study, candidate: Candidate) -> None:
        self.shape, self.candidate = study.shape, candidate
        self.test = study.metric("acc_test")
        self.sizes = {
            unit: float(record.curves["k"])
            for unit, record in study.units[candidate.entry].items()
            if "k" in record.curves
        }
        records = study.units[candidate.entry]
        found = {u: points for u, record in records.items() if (points := _points(record))}
        self.points = {u: points for u, points in found.items() if records[u].status == "ok"}
        self.diverged = [_points(r) for r in records.values() if r.status == "diverged"]

    def chosen(self, level: float) -> dict[tuple[int, int], int]:
        """Return per unit which point reaches the level; the ends of a pinned entry stand alone."""
        found = {}
        for unit, points in self.points.items():
            shares = _shares(points)
            if self.candidate.pinned:
                shares = shares[-1:]
            at = first_reaching(shares, level)
            if at is not None:
                found[unit] = at + len(points) - len(shares)
        return found

    def values(self, at: Mapping[tuple[int, int], int], default: int, name: str) -> Array:
        """(n, n_d) values of a point per unit, NaN where a unit has no trajectory."""
        grid = np.full(self.shape, np.nan)
        for unit, points in self.points.items():
            point = points[at.get(unit, default)]
            grid[unit] = _number(point, self.test if name == "acc_test" else name)
        return grid

    def place(self, default: int, level: float, confidence: float) -> Place:
        """Return the means of the points `chosen` for a level, of point `default` elsewhere."""
        at = self.chosen(level) if level else {}
        counted = Place(
            level,
            len(at),
            self.shape[0] * self.shape[1],
            len(self.diverged),
            sum(first_reaching(_shares(p), level) is not None for p in self.diverged),
        )
        share = 1.0 - self.values(at, default, "acc_forget")
        if not np.isfinite(share).any():
            return counted
        size = np.full(self.shape, np.nan)
        for unit in self.points.keys() & self.sizes.keys():
            size[unit] = self.sizes[unit]
        return replace(
            counted,
            share=_mean(share),
            forgotten=_mean(share * size),
            size=_mean(size),
            step=_mean(self.values(at, default, "step")),
            retain=_interval(self.values(at, default, "acc_retain"), confidence),
            test=_interval(self.values(at, default, "acc_test"), confidence),
        )


def _number(point: Point, name: str) -> float:
    value = point.get(name)
    return np.nan if value is None else value


def _mean(grid: Array) -> float | None:
    by_seed = seed_means(grid)
    return float(by_seed.mean()) if by_seed.size else None


def _interval(grid: Array, confidence: float) -> stats.Interval | None:
    by_seed = seed_means(grid)
    return stats.t_interval(by_seed, confidence) if by_seed.size else None


def _ranked(
    grids: Mapping[str, _Grids], candidates: Sequence[Candidate], level: float, confidence: float
) -> list[Place]:
    """Return the entries at a level, ranked by test accuracy where every unit reached it."""
    places = {c.entry: grids[c.entry].place(-1, level, confidence) for c in candidates}
    scores = {
        c.entry: round(place.test.estimate, 12)
        for c in candidates
        if (place := places[c.entry]).reached == place.units
        and place.test is not None
        and not c.pinned
        and not c.barred
    }
    own = {c.entry: scores[c.entry] for c in candidates if c.forget_only and c.entry in scores}
    leader = min(scores, key=lambda entry: (-scores[entry], entry), default="")
    for entry in scores:
        difference = _test(grids[entry], level) - _test(grids[leader], level)
        places[entry] = replace(
            places[entry],
            rank=_rank(scores, entry),
            rank_forget_only=_rank(own, entry) if entry in own else None,
            difference=_interval(difference, confidence) if entry != leader else None,
            leads=entry == leader,
        )
    return [places[c.entry] for c in candidates]


def _rank(scores: Mapping[str, float], entry: str) -> int:
    """Return 1 + the number of better scores, so that equal ones share a rank."""
    return 1 + sum(score > scores[entry] for score in scores.values())


def _test(grid: _Grids, level: float) -> Array:
    return grid.values(grid.chosen(level), -1, "acc_test")
