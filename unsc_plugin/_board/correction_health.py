"""What is wrong with a board of corrections, and what could not be looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from unsc_plugin._board.study import BoardSummary, unit_text
from unsc_plugin._board.trials import ORIGINAL, PRIOR, SOFT, Trials
from unsc_plugin.metrics import METRICS
from unsc_plugin.metrics import score as scoring


def judged(
    trials: Sequence[Trials], labels: Sequence[str], board: BoardSummary, *, known: bool
) -> scoring.Health:
    """Return why the numbers of a board cannot be trusted, and what a reader should know.

    Args:
        trials: of every scenario.
        labels: of all entries.
        board: what the board file says.
        known: whether there is a family that the others are compared with.
    """
    failures: list[str] = []
    notes: list[str] = []
    for one in trials:
        failures += _failures(one, labels)
        notes += _notes(one, labels)
    if not known:
        notes.append(f"no sweep of {SOFT} is on the board: nothing is compared with it")
    name = trials[0].criterion_name
    if name in METRICS and METRICS[name].direction == "up":
        failures.append(f"criterion {name} is better when larger; choose a gap, as dp_soft")
    return scoring.Health(tuple(failures), tuple(notes) + board.notes)


def _failures(trials: Trials, labels: Sequence[str]) -> list[str]:
    study = trials.study
    where = study.scenario.name
    found = []
    originals = study.units.get(ORIGINAL, {})
    lost = [u for u in study.ids if u not in originals or originals[u].status != "ok"]
    if not originals:
        found.append(f"{where}: original is not on the board; run it first")
    elif lost:
        found.append(f"{where}: original has no finished run at {_listed(lost)}")
    for name in dict.fromkeys([trials.criterion_name, "nll"]):
        lacking = [u for u, r in originals.items() if r.status == "ok" and name not in r.metrics]
        if lacking:
            why = originals[lacking[0]].missing.get(name)
            reason = f" ({why})" if why else ""
            found.append(f"{where}: original has no {name} at {_listed(lacking)}{reason}")
    for label in labels:
        units = study.units.get(label, {})
        if broken := [unit for unit, record in units.items() if record.status == "failed"]:
            found.append(f"{where}: {label} failed at {_listed(broken)}")
    return found


def _notes(trials: Trials, labels: Sequence[str]) -> list[str]:
    study = trials.study
    where, all_units = study.scenario.name, len(study.ids)
    found = []
    for label in labels:
        units = study.units.get(label, {})
        for status in ("diverged", "cancelled"):
            if count := sum(record.status == status for record in units.values()):
                found.append(f"{where}: {label} {status} in {count} of {all_units} units")
    if waiting := sum(len(study.ids) - len(study.units.get(label, {})) for label in labels):
        found.append(f"{where}: {waiting} of {all_units * len(labels)} runs are not there yet")
    if count := trials.unclear():
        found.append(
            f"{where}: the original's {trials.criterion_name} is not clear of 0 in {count} of "
            f"{all_units} units: there is little to correct"
        )
    if study.units.get(ORIGINAL) and np.isnan(trials.prior()).any():
        found.append(f"{where}: no {PRIOR} in the records: no hypervolume")
    return found


def _listed(units: Iterable[tuple[int, int]]) -> str:
    return ", ".join(unit_text(unit) for unit in sorted(units))
