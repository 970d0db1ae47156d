"""Drift certificates that methods leave in their records, gathered per entry and scenario."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unsc_plugin.record import Record


@dataclass(frozen=True)
class Certified:
    """Certificates of one entry in one scenario.

    `drifts` of all units; `worst` the layer with the largest δ of any class and unit, with that δ;
    `free` and `wide` directions left and in all, summed over the layers, of the first unit; `full`
    layers without a free direction; `retained` rows of the retained data read per unit.
    """

    entry: str
    scenario: str
    drifts: tuple[float, ...]
    worst: tuple[str, float] | None
    free: int
    wide: int
    full: int
    retained: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean drift of the units."""
        return statistics.fmean(self.drifts)


def certified(records: Sequence[Record]) -> tuple[Certified, ...]:
    """Return the certificates of a board's finished runs, in the order of entry and scenario."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        stats = last_request(record.stats)
        drift = stats.get("certificate", {}).get("drift")
        if record.status == "ok" and drift is not None:
            groups.setdefault((record.entry, record.scenario), []).append(stats)
    return tuple(_certified(*key, found) for key, found in sorted(groups.items()))


def last_request(stats: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a method noted of its last request."""
    requests = stats.get("requests")
    return requests[-1] if requests else stats


def _certified(entry: str, scenario: str, found: Sequence[Mapping[str, Any]]) -> Certified:
    moved = [
        (max((v for v in row if v is not None), default=0.0), layer)
        for stats in found
        for layer, row in stats["certificate"]["delta"].items()
    ]
    layers = found[0]["subspaces"]["layers"]
    frozen = found[0]["subspaces"]["frozen_layers"]
    most = max(moved, default=None)
    return Certified(
        entry,
        scenario,
        tuple(stats["certificate"]["drift"] for stats in found),
        None if most is None else (most[1], most[0]),
        sum(row["free"] for row in layers),
        sum(row["d"] * row["groups"] for row in layers),
        sum("no free direction" in reason for reason in frozen.values()),
        tuple(stats["subspaces"]["samples_read"].get("retain", 0) for stats in found),
    )
