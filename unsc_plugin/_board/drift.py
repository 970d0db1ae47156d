"""Sequences of requests: whether earlier forget sets stay forgotten, and what the rest costs.

High accuracy after a sequence can simply mean that earlier instances came back, so every number
here stands beside the count of instances that are still at their goal.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unsc_plugin._board.matched import Candidate
from unsc_plugin._board.study import Study
from unsc_plugin.record import Record

Round = Mapping[str, Any]
Line = tuple[float | None, ...]


@dataclass(frozen=True)
class DriftEntry:
    """What one entry reached in a sequence; means over the units that served all requests.

    `finished` of `units` did, `diverged` ended earlier, `unserved` requests were never served.
    `earlier` of `earlier_size` are instances
    of all requests but the last that are at their goal after the last one, `whole` of `size` those
    of all requests; `came_back` were at theirs after their own request and are not any more.
    `at_goal` holds the counts per request, `retain` and `test` the accuracy after the first and the
    last request. `lines` give, per request, the share of earlier instances that are still at their
    goal, and the test accuracy.
    """

    candidate: Candidate
    units: int
    finished: int
    diverged: int
    unserved: int
    statuses: Mapping[str, int]
    sizes: Line = ()
    at_goal: Line = ()
    earlier: float | None = None
    earlier_size: float | None = None
    whole: float | None = None
    size: float | None = None
    came_back: float | None = None
    retain: tuple[float | None, float | None] = (None, None)
    test: tuple[float | None, float | None] = (None, None)
    kl_test: float | None = None
    distance: float | None = None
    share_line: Line = ()
    test_line: Line = ()

    @property
    def entry(self) -> str:
        """The name of the entry."""
        return self.candidate.entry

    @property
    def reached(self) -> bool:
        """Whether every unit ended with every instance of every request at its goal."""
        return self.finished == self.units and self.size is not None and self.whole == self.size


@dataclass(frozen=True)
class Drift:
    """One scenario of kind sequence: pinned entries, those that reached, then the others.

    `requests` is the number of them, the largest where the draws differ.
    """

    scenario: str
    requests: int
    entries: tuple[DriftEntry, ...]


def drift(study: Study, candidates: Sequence[Candidate]) -> Drift | None:
    """Gather the rounds of a scenario; None where no record has any."""
    here = [candidate for candidate in candidates if candidate.entry in study.units]
    lengths: dict[int, int] = {}
    for candidate in here:
        for (_, draw), record in study.units[candidate.entry].items():
            lengths[draw] = max(lengths.get(draw, 0), len(_rounds(record)))
    if not any(lengths.values()):
        return None
    entries = [_entry(candidate, study, lengths) for candidate in here]
    pinned = [entry for entry in entries if entry.candidate.pinned]
    others = sorted((e for e in entries if not e.candidate.pinned), key=_order)
    return Drift(study.scenario.name, max(lengths.values()), (*pinned, *others))


def _rounds(record: Record) -> list[Round]:
    found: list[Round] = record.curves.get("rounds", [])
    return found


def _order(entry: DriftEntry) -> tuple[bool, float, float, str]:
    """Sequences that are reached by test accuracy, the others by how much is forgotten."""
    whole = 0.0 if entry.whole is None or not entry.size else entry.whole / entry.size
    test = entry.test[1] or 0.0
    return (not entry.reached, -round(whole, 12), -round(test, 12), entry.entry)


def _entry(candidate: Candidate, study: Study, lengths: Mapping[int, int]) -> DriftEntry:
    records = study.units[candidate.entry]
    units = [rounds for record in records.values() if (rounds := _rounds(record))]
    whole = [_rounds(r) for r in records.values() if r.status == "ok" and _rounds(r)]
    statuses = Counter(str(one["status"]) for rounds in units for one in rounds)
    asked = sum(lengths.get(draw, 0) for _, draw in study.ids)
    requests = max(lengths.values())
    counted = DriftEntry(
        candidate,
        units=len(study.ids),
        finished=len(whole),
        diverged=sum(record.status == "diverged" for record in records.values()),
        unserved=asked - sum(statuses.values()),
        statuses=statuses,
        share_line=_line(units, requests, _earlier_share),
        test_line=_line(units, requests, lambda rounds, t: rounds[t].get("acc_test")),
    )
    if not whole:
        return counted
    first, last = [rounds[0] for rounds in whole], [rounds[-1] for rounds in whole]
    sizes = [[one["k"] for one in rounds] for rounds in whole]
    counts = [one["at_goal"] for one in last]
    return DriftEntry(
        **{
            **vars(counted),
            "sizes": _columns(sizes),
            "at_goal": _columns(counts),
            "earlier": _mean([sum(row[:-1]) for row in counts]),
            "earlier_size": _mean([sum(row[:-1]) for row in sizes]),
            "whole": _mean([sum(row) for row in counts]),
            "size": _mean([sum(row) for row in sizes]),
            "came_back": _mean([one["came_back"] for one in last]),
            "retain": (_of(first, "acc_retain"), _of(last, "acc_retain")),
            "test": (_of(first, "acc_test"), _of(last, "acc_test")),
            "kl_test": _of(last, "kl_test"),
            "distance": _of(last, "distance_first"),
        }
    )


def _line(
    units: Sequence[list[Round]],
    requests: int,
    read: Callable[[Sequence[Round], int], float | None],
) -> Line:
    """Means over the units per request, absent where a unit has no number."""
    found: list[float | None] = []
    for t in range(requests):
        values = [read(rounds, t) if t < len(rounds) else None for rounds in units]
        present = [value for value in values if value is not None]
        found.append(_mean(present) if present and len(present) == len(values) else None)
    return tuple(found)


def _earlier_share(rounds: Sequence[Round], t: int) -> float | None:
    """Return Σ_{j<t} c_{t,j} / Σ_{j<t} k_j; there is none after the first request."""
    counts, sizes = rounds[t].get("at_goal"), [one["k"] for one in rounds[:t]]
    return sum(counts[:t]) / sum(sizes) if counts and sizes else None


def _columns(rows: Sequence[Sequence[float]]) -> Line:
    """Means per request; none where the units have sequences of different lengths."""
    if len({len(row) for row in rows}) > 1:
        return ()
    return tuple(_mean(column) for column in zip(*rows, strict=True))


def _of(rounds: Sequence[Round], name: str) -> float | None:
    values = [one[name] for one in rounds if name in one]
    return _mean(values) if len(values) == len(rounds) else None


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)
