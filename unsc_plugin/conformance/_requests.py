"""Checks of what a method does with a request: which rows it reads, on which models and data."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from unsc_plugin import engine
from unsc_plugin.conformance import _processes as processes_
from unsc_plugin.conformance._contract import same
from unsc_plugin.conformance._nets import journal
from unsc_plugin.conformance._toys import BATCH, NETS, Case, split
from unsc_plugin.conformance._trial import SEED, Run, Trial, expect, fault, skip
from unsc_plugin.errors import AttackFailed, ForgetSetError, NotApplicable
from unsc_plugin.rows import Rows
from unsc_plugin.runtime import first_non_finite
from unsc_plugin.spec import Scenario, Split

DATA_DOORS = {
    "unsc_plugin.data": ("load",),
    "datasets": ("load_dataset", "load_from_disk"),
    "torchvision.datasets": (),
}


# --------------------------------------------------------------------------- what is read


def access(trial: Trial) -> str:
    """Only declared splits are read, every declared split is, and no forget row is left out."""
    run, seen, _ = _watched(trial)
    forget, retain = (set(part.tolist()) for part in split(run.case.problem.train, trial.scenario))
    owned = {Split.FORGET: forget, Split.RETAIN: retain}
    undeclared = [name for name in owned if name not in trial.opens and seen & owned[name]]
    expect(not undeclared, f"rows of {', '.join(undeclared)} are read: not in `needs`")
    given = [name for name, rows in owned.items() if rows]
    unread = [n for n in given if n in trial.opens and not run.result.read.get(n)]
    expect(not unread, f"{', '.join(unread)} is in `needs`, but never read")
    strange = seen - forget - retain
    expect(not strange, f"{len(strange)} rows are read that are in no split")
    if reads_forget(trial):
        lacking = forget - seen if forget & seen else set()
        expect(not lacking, f"{len(lacking)} of {len(forget)} forget rows are never read")
    return ", ".join(f"{name}: {run.result.read.get(name, 0)} rows" for name in owned)


def reads_forget(trial: Trial) -> bool:
    """Return whether the method declares the forget set."""
    return Split.FORGET in trial.opens


def no_test(trial: Trial) -> str:
    """Validation rows are read only if declared, and no data set is opened past the task."""
    with _closed_doors():
        _, _, validation = _watched(trial)
    needed = Split.VAL in trial.opens
    expect(needed or not validation, "validation rows are read, which are not in `needs`")
    expect(not needed or bool(validation), "val is in `needs`, but never read")
    return f"{len(validation)} validation rows read"


def _watched(trial: Trial) -> tuple[Run, set[int], set[int]]:
    """Run on data that notes which positions are decoded, of the training and validation rows.

    Both are views of sets with every row of the problem, so that reading past the task shows.
    """
    chosen = trial.problem()
    train, seen = _noting(chosen.train)
    val, seen_val = _noting(chosen.val)
    case = trial.case(train=train, val=val, positions=split(train, trial.scenario))
    return trial.run(case), seen, seen_val


def _noting(rows: Rows) -> tuple[Rows, set[int]]:
    seen: set[int] = set()

    def decode(positions: Tensor) -> dict[str, Tensor]:
        seen.update(positions.tolist())
        return {key: column[positions] for key, column in rows.storage.items()}

    return Rows.of({}, rows.labels, rows.index, group=rows.group, decode=decode), seen


@contextlib.contextmanager
def _closed_doors() -> Iterator[None]:
    """Let every way of opening a data set fail in the body."""

    def refuse(*_: Any, **__: Any) -> None:
        fault("a data set is opened past the task; use task.loader and task.rows")

    modules: dict[str, Any] = sys.modules
    absent = [name for name in DATA_DOORS if name not in modules]
    with contextlib.ExitStack() as stack:
        for module in DATA_DOORS.keys() - absent:
            for name in DATA_DOORS[module]:
                stack.enter_context(mock.patch.object(modules[module], name, refuse))
        modules |= dict.fromkeys(absent)  # None there makes an import fail
        try:
            yield
        finally:
            for module in absent:
                del modules[module]


# --------------------------------------------------------------------------- kinds of requests


def edges(trial: Trial) -> str:
    """Forget sets of all sizes, two classes; an empty one is refused before any work."""
    sizes = (1, BATCH) if trial.quick else (1, 10, BATCH, BATCH + 1, 32)
    corrects = trial.scenario is Scenario.CORRECTION
    if corrects and not reads_forget(trial):
        skip("a correction that forgets no sample")
    for size in sizes:
        _complete(trial, f"{size} forget samples", positions=_positions(trial, size))
    _complete(trial, "two classes", num_classes=2)
    if not reads_forget(trial):
        return f"forget sets of {', '.join(map(str, sizes))}; K = 2"
    if not corrects:
        _refuses_nothing(trial)
    _one_batch_matters(trial)
    return f"forget sets of {', '.join(map(str, sizes))} and 0; K = 2; one batch matters"


def _positions(trial: Trial, size: int) -> tuple[Tensor, Tensor]:
    return split(trial.problem().train, trial.scenario, size)


def _complete(trial: Trial, what: str, **case: Any) -> None:
    try:
        run = trial.run(trial.case(**case))
    except Exception as error:
        fault(f"{what}: {type(error).__name__}: {error}")
    expect(run.result.status != "diverged", f"{what}: diverged ({run.result.reason})")


def _refuses_nothing(trial: Trial) -> None:
    with journal() as book:
        try:
            case = trial.case(positions=_positions(trial, 0))
            trial.method().unlearn(case.model, case.task, SEED)
        except ForgetSetError:
            expect(not book.work, "an empty forget set is refused only after forward passes")
        else:
            fault("an empty forget set is accepted; raise ForgetSetError")


def _one_batch_matters(trial: Trial) -> None:
    """Compare two forget sets of exactly one batch beside the same retain set."""
    forget, retain = _positions(trial, 2 * BATCH)
    batches = torch.split(forget, BATCH)
    results = [trial.run(trial.case(positions=(part, retain))).after for part in batches]
    expect(not same(*results), "a forget set of one batch has no effect on the result")


def architectures(trial: Trial) -> str:
    """Every toy backbone: the method runs, or says NotApplicable before it changes anything."""
    found = []
    for net in NETS[:2] if trial.quick else NETS:
        if trial.refuses(net) is not None:
            found.append(f"{net}: not applicable")
            continue
        try:
            run = trial.run(trial.case(net))
        except NotApplicable:
            fault(f"{net}: NotApplicable from run(); raise it in prepare()")
        except AttackFailed:
            found.append(f"{net}: no attack succeeds, and it says so")
            continue
        except Exception as error:
            fault(f"{net}: {type(error).__name__}: {error}")
        spoiled = first_non_finite(run.result.model)
        expect(spoiled is None and run.result.status != "diverged", f"{net}: not finite")
        found.append(f"{net}: ok")
    expect(any("ok" in text for text in found), "not applicable to any backbone")
    return ", ".join(found)


# --------------------------------------------------------------------------- devices, processes


def device(trial: Trial) -> str:
    """Runs where it is told to: without CUDA in sight; with a GPU also there, and in bf16."""
    run = trial.plain
    where = {str(t.device.type) for t in run.result.model.state_dict().values()}
    expect(where == {run.case.task.device.type}, f"the model came back on {', '.join(where)}")
    if not torch.cuda.is_available():
        return "CPU; no GPU here, so cuda and bf16 were not tried"
    if trial.quick:
        return f"{trial.device}; other devices are skipped in quick mode"
    ways: list[tuple[bool, Literal["fp32", "bf16"]]]
    ways = [(True, "fp32"), (False, "fp32"), (False, "bf16")]
    for hidden, precision in ways:
        outcome = processes_.states(trial, trial.home, 1, hide_gpu=hidden, precision=precision)
        expect(all(outcome.finite), f"{precision} on {'cpu' if hidden else 'cuda'}: not finite")
    return "CPU with CUDA hidden, cuda, cuda bf16"


def processes(trial: Trial) -> str:
    """Two processes give what one gives: 1e-5, with training steps 1e-4 (no normalisation)."""
    if trial.quick:
        skip("skipped in quick mode")
    if trial.device != "cpu":
        skip("compared on the CPU")
    reason = trial.refuses("mlp")
    if reason is not None:
        skip(f"not applicable to a net without normalisation: {reason}")
    one = trial.run(trial.case("mlp"))
    two = processes_.states(trial, "mlp", 2)
    tolerance = 1e-4 if one.journal.optimizer_steps else 1e-5
    for rank, state in enumerate(two.states):
        gap = max(float((state[name] - one.after[name]).abs().max()) for name in one.after)
        expect(gap <= tolerance, f"process {rank} of 2 is off by {gap:.1e}, allowed {tolerance:g}")
    return f"2 processes within {tolerance:g} of 1"


# --------------------------------------------------------------------------- does it unlearn


def direction(trial: Trial) -> str:
    """On the toy the forget loss rises; the gap of the groups falls, where that is corrected."""
    if trial.kind.identity:
        skip("declared identity")
    run = _converged(trial)
    if trial.scenario is Scenario.CORRECTION:
        return _closes_the_gap(trial, run)
    before, after = (_loss(run.case, model, Split.FORGET) for model in _models(run))
    expect(after > before, f"the forget loss went from {before:.4f} to {after:.4f}; it must rise")
    return f"forget loss {before:.4f} -> {after:.4f}"


def _closes_the_gap(trial: Trial, run: Run) -> str:
    if trial.control:
        skip("a control")
    before, after = (_gap(run.case, model) for model in _models(run))
    expect(abs(after) < abs(before), f"the gap of the groups went from {before:.4f} to {after:.4f}")
    return f"gap of the groups {before:.4f} -> {after:.4f}"


def _gap(case: Case, model: torch.nn.Module) -> float:
    """Return the difference of the mean probability of class 1 between the validation groups."""
    rows = case.problem.val
    chance = engine.predict(model, rows).logits.double().softmax(dim=1)[:, 1]
    assert rows.group is not None
    return float(chance[rows.group == 1].mean() - chance[rows.group == 0].mean())


def utility(trial: Trial) -> str:
    """On the toy, accuracy on the retain set stays above half of the original's."""
    if trial.control:
        skip("a control")
    run = _converged(trial)
    before, after = (_accuracy(run.case, model) for model in _models(run))
    expect(after >= before / 2, f"accuracy on the retain set fell from {before:.2f} to {after:.2f}")
    return f"retain accuracy {before:.2f} -> {after:.2f}"


def _converged(trial: Trial) -> Run:
    result = trial.learned.result
    expect(result.status != "diverged", f"diverged on the toy: {result.reason}")
    return trial.learned


def _models(run: Run) -> tuple[Any, Any]:
    return run.case.model, run.result.model


def _loss(case: Case, model: torch.nn.Module, name: Split) -> float:
    rows = case.task.guarded(frozenset({name}), 0).rows(name)
    predictions = engine.predict(model, rows)
    return float(functional.cross_entropy(predictions.logits, predictions.labels))


def _accuracy(case: Case, model: torch.nn.Module) -> float:
    rows = case.task.guarded(frozenset({Split.RETAIN}), 0).rows("retain")
    predictions = engine.predict(model, rows)
    return float((predictions.logits.argmax(1) == predictions.labels).double().mean())
