"""Checks of the training loop: time and work accounted, limits respected, callbacks told."""

from __future__ import annotations

import dataclasses
import time

from unsc_plugin.conformance._nets import Toy
from unsc_plugin.conformance._trial import Run, Trial, expect, fault, skip
from unsc_plugin.method import Budget, Progress

PAUSE = 0.2


class _Interrupt(Exception):
    """What a progress callback raises to stop a run."""


def timing(trial: Trial) -> str:
    """Callbacks are not in the seconds reported; work is what the model itself has counted."""
    told: list[Progress] = []

    def sleep_once(progress: Progress) -> None:
        if not told:
            time.sleep(PAUSE)
        told.append(progress)

    case = trial.case(progress=sleep_once)
    began = time.perf_counter()
    run = trial.run(case)
    wall = time.perf_counter() - began
    reported = run.result.seconds_prepare + run.result.seconds_unlearn
    outside = wall - reported
    expect(not told or outside >= PAUSE, "a sleeping callback is counted; report through task.tick")
    if isinstance(case.model, Toy):
        counted, work = run.journal.work, run.result.work
        expect(
            work == counted, f"work {work} reported, {counted} done; call model(...), not forward"
        )
    return f"work {run.result.work} samples" + ("" if told else "; no callback")


def budget(trial: Trial) -> str:
    """A limit on steps, epochs or seconds ends the run within one step, with status `budget`."""
    whole = _stepping(trial)
    tried = []
    if whole.result.steps > 3 or not whole.result.steps:
        steps = _limited(trial, Budget(steps=2))
        expect(steps.result.steps <= 3, f"limit of 2 steps, {steps.result.steps} taken")
        fewer = steps.journal.optimizer_steps < whole.journal.optimizer_steps
        expect(fewer, "a limit of 2 steps changes nothing; ask task.spent before every step")
        tried.append("steps")
    if whole.result.epochs > 1:
        epochs = _limited(trial, Budget(epochs=1))
        expect(epochs.result.epochs <= 1, f"limit of 1 epoch, {epochs.result.epochs} made")
        tried.append("epochs")
    seconds = _limited(trial, Budget(seconds=1e-9))
    expect(seconds.result.steps <= 1, f"no time at all, yet {seconds.result.steps} steps")
    return ", ".join([*tried, "seconds"])


def _stepping(trial: Trial) -> Run:
    """Return a run of several epochs."""
    if not trial.plain.journal.optimizer_steps:
        skip("takes no optimiser steps")
    return trial.run(method=trial.method(**_longer(trial)))


def _longer(trial: Trial) -> dict[str, int]:
    names = {item.name for item in dataclasses.fields(trial.kind.Config)}
    return {"epochs": 3} if "epochs" in names else {}


def _limited(trial: Trial, limit: Budget) -> Run:
    run = trial.run(trial.case(budget=limit), method=trial.method(**_longer(trial)))
    status = run.result.status
    expect(status == "budget", f"status {status!r} after {limit}; expected 'budget'")
    return run


def callback(trial: Trial) -> str:
    """The progress callback is told of every epoch; what it raises ends the run."""
    if not trial.plain.journal.optimizer_steps:
        skip("takes no optimiser steps")
    told: list[Progress] = []
    run = trial.run(trial.case(progress=told.append))
    expect(run.result.steps > 0, "optimiser steps are taken, none is counted; call task.tick(loss)")
    ends = sum(progress.epoch_end for progress in told)
    expect(ends >= 1, "no epoch is reported; call task.epoch_done() after every epoch")
    expect(ends == run.result.epochs, f"{run.result.epochs} epochs, {ends} reported")

    def interrupt(_: Progress) -> None:
        raise _Interrupt

    try:
        trial.run(trial.case(progress=interrupt))
    except _Interrupt:
        return f"{len(told)} calls, {ends} epochs; its exception passes through"
    fault("an exception of the callback is swallowed; a user could not stop the run")
