"""The records of one correction scenario: grids of numbers, curves over the strengths of a sweep.

An entry `<family>@<t>` is the point of strength t on the curve of its family; the original model is
the point t = 0 of every curve, in every unit its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unsc_plugin._board.study import Array, Study, UnitId, seed_means
from unsc_plugin.metrics import _stats as stats
from unsc_plugin.metrics import pareto

ORIGINAL = "original"
SOFT = "soft_weighted"
CRITERION = "criterion"
"""The name under which grids hold the board's criterion, whatever metric that is."""
PRIOR = "nll_prior"
ROBUST = "robust_nll"
"""A loss under attack: its natural zero is the original's loss without attack."""


@dataclass(frozen=True)
class Family:
    """Entries of one label before `@`, by rising strength; a single point has no strength."""

    name: str
    labels: tuple[str, ...]
    strengths: tuple[float, ...] = ()

    @property
    def swept(self) -> bool:
        """Whether it is a curve."""
        return bool(self.strengths)


def strength_of(label: str) -> tuple[str, float | None]:
    """Return the family of a label and its strength, None for a single point.

    >>> strength_of("soft_weighted.hard@0.25"), strength_of("retrain"), strength_of("mail@home")
    (('soft_weighted.hard', 0.25), ('retrain', None), ('mail@home', None))
    """
    name, at, text = label.rpartition("@")
    try:
        strength = float(text) if at and name else math.nan
    except ValueError:
        strength = math.nan
    return (name, strength) if math.isfinite(strength) else (label, None)


def families(labels: Iterable[str]) -> list[Family]:
    """Return the families of labels in the order in which they first appear.

    >>> [f.labels for f in families(["b@0.5", "a", "b@0.25", "b"])]
    [('b@0.25', 'b@0.5'), ('a',), ('b',)]
    """
    found: dict[tuple[str, bool], list[tuple[float, str]]] = {}
    for label in labels:
        name, strength = strength_of(label)
        found.setdefault((name, strength is not None), []).append((strength or 0.0, label))
    made = []
    for (name, swept), members in found.items():
        ordered = sorted(members)
        strengths = tuple(strength for strength, _ in ordered) if swept else ()
        made.append(Family(name, tuple(label for _, label in ordered), strengths))
    return made


def over_units(grid: Array, confidence: float) -> stats.Interval | None:
    """Return the mean over the units that are there, with Student limits; None without any.

    Limits are over train seeds, draws averaged, and over draws, seeds averaged, the wider of the
    two. Draws count where there are three or more, or where they are all that varies: fewer are
    taken as fixed, as on every board.

    Args:
        grid: (n, d), NaN where a unit has no number.
        confidence: 1 − α.
    """
    by_seed, by_draw = seed_means(grid), seed_means(grid.T)
    if not by_seed.size:
        return None
    estimate = float(np.nanmean(grid))
    enough = stats.MIN_DRAWS_RESAMPLED if by_seed.size > 1 else 2
    varied = [by_seed, *([by_draw] if by_draw.size >= enough else [])]
    halves = [stats.t_interval(values, confidence).half for values in varied]
    half = max((one for one in halves if one is not None), default=None)
    if half is None:
        return stats.Interval(estimate)
    return stats.Interval(estimate, estimate - half, estimate + half)


class Trials:
    """The numbers of one scenario under a criterion."""

    def __init__(self, study: Study, criterion: str) -> None:
        self.study, self.criterion_name = study, criterion
        self._known: dict[tuple[str, str], Array] = {}

    def grid(self, label: str, name: str) -> Array:
        """Return (n, d) values of an entry's finished units, NaN elsewhere."""
        if (label, name) not in self._known:
            self._known[label, name] = self._read(label, name)
        return self._known[label, name]

    def _read(self, label: str, name: str) -> Array:
        if name != CRITERION:
            return self.study.grid(label, name)
        values = self.study.grid(label, self.criterion_name)
        if self.criterion_name == ROBUST:
            values = values - self.study.grid(ORIGINAL, "nll")
        return values

    def share(self, label: str) -> Array:
        """Return |criterion| of an entry over that of the original, unit by unit."""
        gap = np.abs(self.grid(ORIGINAL, CRITERION))
        with np.errstate(divide="ignore", invalid="ignore"):
            left: Array = np.abs(self.grid(label, CRITERION)) / np.where(gap > 0, gap, np.nan)
        return left

    def at(self, family: Family, levels: Array, name: str) -> Array:
        """Return a family's values where its own curve first reaches a level, unit by unit.

        Linear between the points of the curve, see :func:`pareto.matched`. NaN where the level is
        not reached, or lies outside [0, 1), or behind a strength without a result.

        Args:
            family: one with strengths.
            levels: (n, d) shares of the original's |criterion|.
            name: of the values.
        """
        found = np.full(self.study.shape, np.nan)
        for unit in self.study.ids:
            found[unit] = self._crossing(family, unit, float(levels[unit]), name)
        return found

    def _crossing(self, family: Family, unit: UnitId, level: float, name: str) -> float:
        start, *rows = (self._row(label, unit, name) for label in (ORIGINAL, *family.labels))
        if not all(map(math.isfinite, start)) or start[0] == 0 or not 0 <= level < 1:
            return math.nan
        curve = list(itertools.takewhile(lambda row: all(map(math.isfinite, row)), rows))
        found = pareto.matched(start, curve, level)
        return math.nan if found is None else found[0]

    def _row(self, label: str, unit: UnitId, name: str) -> tuple[float, float]:
        return float(self.grid(label, CRITERION)[unit]), float(self.grid(label, name)[unit])

    def unmeasured(self, family: Family) -> NDArray[np.bool_]:
        """Return (n, d) whether the original or an entry of a family has no result in a unit."""
        grids = [self.grid(label, CRITERION) for label in (ORIGINAL, *family.labels)]
        missing: NDArray[np.bool_] = np.logical_or.reduce([np.isnan(grid) for grid in grids])
        return missing

    def flipped(self, label: str) -> tuple[int, int]:
        """Return in how many units the criterion has the other sign than the original's.

        Only beyond doubt: the whole bootstrap interval lies on the other side of 0. The second
        number counts the units that have an interval.
        """
        turned = judged = 0
        for unit, record in self.study.units.get(label, {}).items():
            limits = record.intervals.get(self.criterion_name)
            before = self.grid(ORIGINAL, CRITERION)[unit]
            if record.status == "ok" and limits is not None and np.isfinite(before):
                judged += 1
                turned += max(np.sign(before) * limits[0], np.sign(before) * limits[1]) < 0
        return int(turned), judged

    def unclear(self) -> int:
        """Return in how many units the original's bootstrap interval of the criterion holds 0."""
        records = [r for r in self.study.units.get(ORIGINAL, {}).values() if r.status == "ok"]
        limits = [r.intervals.get(self.criterion_name) for r in records]
        return sum(one is not None and one[0] <= 0 <= one[1] for one in limits)

    def prior(self) -> Array:
        """Return (n, d) NLL of the class prior on the test rows, NaN where no record has it."""
        found = np.full(self.study.shape, np.nan)
        for label in self.study.units:
            found = np.where(np.isnan(found), self.study.grid(label, PRIOR), found)
        return found

    def hypervolume(self, labels: Iterable[str]) -> Array:
        """Return the normalised hypervolume in (|criterion|, NLL) of entries, unit by unit.

        Reference: (|criterion| of the original, NLL of the class prior). NaN where an entry or an
        end of the reference is missing.

        Args:
            labels: of the entries.
        """
        found = np.full(self.study.shape, np.nan)
        names, prior = tuple(labels), self.prior()
        gap = np.abs(self.grid(ORIGINAL, CRITERION))
        for unit in self.study.ids:
            points = [self._row(label, unit, "nll") for label in names]
            ends = float(gap[unit]), float(prior[unit])
            if np.isfinite([*points, ends]).all() and min(ends) > 0:
                found[unit] = pareto.hypervolume([(abs(f), u) for f, u in points], ends)
        return found
