"""Checks that a run changes what it should, leaves alone what it should, and says when it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from unsc_plugin import engine
from unsc_plugin.conformance._contract import State, same
from unsc_plugin.conformance._globals import differences, process_state
from unsc_plugin.conformance._nets import Toy
from unsc_plugin.conformance._toys import BATCH, SHORT, Case, frozen_stem
from unsc_plugin.conformance._trial import SEED, Trial, expect
from unsc_plugin.errors import NumericalError
from unsc_plugin.rows import Rows
from unsc_plugin.runtime import state_sha256
from unsc_plugin.spec import Recipe

DRIFT_TOLERANCE = 1e-6


def changes(trial: Trial) -> str:
    """Some parameter of the returned model differs from the original."""
    run = trial.plain
    names = [name for name, _ in run.case.model.named_parameters()]
    moved = [name for name in names if not torch.equal(run.before[name], run.after[name])]
    if trial.kind.identity:
        expect(not moved, f"declared identity, but {len(moved)} parameters changed")
        return "identity: nothing changed, as declared"
    expect(bool(moved), "the returned model is the original: no parameter has changed")
    return f"{len(moved)} of {len(names)} parameter tensors changed"


def input_untouched(trial: Trial) -> str:
    """Model and data that were handed in are the same afterwards: state, behaviour, rows."""
    case = trial.case()
    case = trial.case(train=_owned(case.problem.train), val=_owned(case.problem.val))
    before = _appearance(case)
    trial.run(case)
    after = _appearance(case)
    wrong = [key for key in before if before[key] != after[key]]
    expect(not wrong, f"changed from outside: {', '.join(wrong)}; work on the copy you are given")
    return "model and rows as before"


def _owned(rows: Rows) -> Rows:
    """Return the rows on storage of their own."""
    storage = {key: value.clone() for key, value in rows.storage.items()}
    group = None if rows.group is None else rows.group.clone()
    return Rows.of(storage, rows.labels.clone(), rows.index.clone(), group=group)


def _appearance(case: Case) -> dict[str, Any]:
    model, rows = case.model, case.problem.test
    data = [part for part in case.task._rows.values() if part is not None]
    tensors = [t for part in data for t in (part.labels, part.index, part.weight)]
    tensors += [t for part in data for t in part.storage.values()]
    return {
        "the model's state": state_sha256(model),
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "training mode": [module.training for module in model.modules()],
        "hooks": hooks_of(model),
        "the model's outputs": _digest([engine.predict(model, rows).logits]),
        "the data": _digest(tensors),
    }


def _digest(tensors: list[Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def hooks_of(model: nn.Module) -> list[int]:
    """Return the number of hooks of every module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [sum(len(getattr(m, kind)) for kind in kinds) for m in model.modules()]


def teacher(trial: Trial) -> str:
    """Copies taken by the method share no storage with the student, and stay as they were."""
    run = trial.plain
    student = run.result.model
    mine = _storages(student)
    others = [copied for copied in run.journal.copies[1:] if copied.model is not student]
    for copied in run.journal.copies:
        shared = copied.model is not student and mine & _storages(copied.model)
        expect(not shared, "a copy shares its storage with the returned model; use copy.deepcopy")
    for copied in others:
        still = [name for name, _ in copied.model.named_parameters()]
        state = copied.model.state_dict()
        fixed = all(torch.equal(state[name], copied.state[name]) for name in still)
        drifted = fixed and not same(dict(state), copied.state)
        expect(not drifted, "a copy's BatchNorm statistics moved while its weights did not; eval()")
    modes = run.journal.modes.get(student, [])
    left = any(modes) and not modes[-1]
    expect(not left, "the student was left in eval mode between its training steps")
    return f"{len(others)} copies" if others else "no copies are made"


def _storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in model.state_dict().values() if t.numel()}


def losses(trial: Trial) -> str:
    """Losses are finite and made of probabilities; one that is not finite ends the run."""
    run = trial.plain
    expect(run.result.status != "diverged", f"diverged with default settings: {run.result.reason}")
    with _ProbabilitiesOnly():
        trial.run()
    if not run.journal.optimizer_steps:
        return "takes no steps"
    spoiled = _spoiled(trial)
    if spoiled is None:
        return f"{len(run.result.losses)} finite losses"
    told = f"{len(run.result.losses)} finite losses; NaN"
    try:
        status = trial.run(spoiled).result.status
    except NumericalError:
        return f"{told} is refused before the first step"
    expect(status == "diverged", f"all inputs are NaN, yet the run ends as {status!r}")
    return f"{told} ends the run as diverged"


class _ProbabilitiesOnly(TorchFunctionMode):
    """Refuse a divergence or a likelihood of anything but log-probabilities."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (functional.kl_div, functional.nll_loss):
            first = args[0] if args else kwargs["input"]
            _expect_sums_to_one(first, log=True, what=f"the input of {func.__name__}")
        if func is functional.kl_div:
            target = args[1] if len(args) > 1 else kwargs["target"]
            log = kwargs.get("log_target", args[5] if len(args) > 5 else False)
            _expect_sums_to_one(target, log=log, what="the target of kl_div")
        return func(*args, **kwargs)


def _expect_sums_to_one(values: Tensor, *, log: bool, what: str) -> None:
    sums = (values.detach().exp() if log else values.detach()).sum(dim=1)
    form = "log-probabilities" if log else "probabilities"
    fine = torch.allclose(sums, torch.ones_like(sums), atol=1e-2)
    expect(fine, f"{what} is no row of {form}; apply {'log_' if log else ''}softmax first")


def _spoiled(trial: Trial) -> Case | None:
    """Return a case whose inputs are NaN, or None where inputs are integers."""
    case = trial.case()
    if case.problem.modality == "text":
        return None

    def nan(rows: Rows) -> Rows:
        storage = {key: torch.full(v.shape, torch.nan) for key, v in rows.storage.items()}
        return Rows.of(storage, rows.labels, rows.index, group=rows.group)

    return trial.case(train=nan(case.problem.train), val=nan(case.problem.val))


def finite(trial: Trial) -> str:
    """Parameters and outputs finite; state, requires_grad, mode and hooks as on arrival."""
    run = trial.plain
    before, after = run.case.model, run.result.model
    outputs = engine.predict(after, run.case.problem.test).logits
    expect(bool(torch.isfinite(outputs).all()), "outputs are not finite")
    shape = [(n, t.shape, t.dtype) for n, t in run.before.items()]
    expect(shape == [(n, t.shape, t.dtype) for n, t in run.after.items()], "another state_dict")
    grads = [[p.requires_grad for p in model.parameters()] for model in (before, after)]
    expect(grads[0] == grads[1], "requires_grad is not as it was on arrival")
    expect(not any(m.training for m in after.modules()), "the returned model is not in eval mode")
    expect(hooks_of(before) == hooks_of(after), "hooks are left on the returned model; remove them")
    return "finite, and of the same form"


def frozen(trial: Trial) -> str:
    """Promised and non-trainable weights stay to the bit under weight decay, momentum, AdamW."""
    toy = isinstance(trial.case().model, Toy)
    promised = 0
    for recipe in _hard_recipes():
        more: dict[str, Any] = {"recipe": recipe}
        if toy:
            more["fresh_model"] = frozen_stem(trial.case().problem.build)
        case = trial.case(dead_stem=toy, **more)
        run = trial.run(case)
        dead = [name for name, p in case.model.named_parameters() if not p.requires_grad]
        moved = [name for name in dead if not torch.equal(run.before[name], run.after[name])]
        expect(not moved, f"requires_grad was False on arrival, yet {moved[:1]} changed")
        promised = len(dead)
    return f"{promised} frozen tensors unchanged" if toy else "promises kept"


def _hard_recipes() -> tuple[Recipe, Recipe]:
    harsh = {"weight_decay": 0.1, "momentum": 0.9}
    return (
        SHORT.model_copy(update=harsh),
        SHORT.model_copy(update=harsh | {"optimizer": "adamw", "lr": 0.01}),
    )


def seed(trial: Trial) -> str:
    """The same seed gives the same weights, another seed others (none if deterministic)."""
    settings = _small_batches(trial)
    method = trial.method(**settings)
    first = trial.run(method=method).after
    with _scrambled():
        again = trial.run(method=method).after
        fresh = trial.run(method=trial.method(**settings)).after
    expect(_repeats(first, again, trial), "the same seed gives other weights in a second run")
    expect(_repeats(first, fresh, trial), "the same seed gives other weights in a new instance")
    other = trial.run(seed=SEED + 1, method=method).after
    if trial.kind.deterministic or trial.kind.identity:
        expect(_repeats(first, other, trial), "declared deterministic, but the seed matters")
        return "repeatable; the seed does not matter, as declared"
    expect(not same(first, other), "another seed gives the same weights; use task.generator")
    return "repeatable; another seed differs"


def _small_batches(trial: Trial) -> dict[str, int]:
    """Return a batch size that leaves an order to be drawn, if the method has one to set."""
    names = {item.name for item in dataclasses.fields(trial.kind.Config)}
    return {"batch_size": BATCH} if "batch_size" in names else {}


def _repeats(one: State, other: State, trial: Trial) -> bool:
    if trial.device == "cpu":
        return same(one, other)
    return all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


@contextlib.contextmanager
def _scrambled() -> Iterator[None]:
    """Move the global generators elsewhere for the body."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _Stop(Exception):
    """Raised by a check inside a run, to see what the run leaves behind."""


def global_state(trial: Trial) -> str:
    """Generators, modes, flags, environment, filters as before; also after an exception."""
    case = trial.plain.case
    with _watched_process("after a run"):
        trial.run(case)
    rows, calls = case.problem.train, 0

    def decode(positions: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise _Stop
        return {key: column[positions] for key, column in rows.storage.items()}

    raising = Rows.of({}, rows.labels, rows.index, group=rows.group, decode=decode)
    breaking = trial.case(train=raising)
    with _watched_process("after an exception"), contextlib.suppress(_Stop):
        trial.run(breaking)
    expect(not trial.disturbed, f"not restored: {', '.join(sorted(trial.disturbed))}")
    return "restored, also after an exception"


@contextlib.contextmanager
def _watched_process(when: str) -> Iterator[None]:
    before = process_state()
    yield
    wrong = differences(before, process_state())
    expect(not wrong, f"not restored {when}: {', '.join(wrong)}")


def no_leak(trial: Trial) -> str:
    """Models of a run die with its result; three runs hold no more memory than one."""
    method, case = trial.method(), trial.case()

    def once() -> list[weakref.ref[nn.Module]]:
        run = trial.run(case, method=method)
        return [weakref.ref(copied.model) for copied in run.journal.copies]

    alive = once()
    gc.collect()
    kept = sum(found() is not None for found in alive)
    expect(not kept, f"{kept} models of the run are still held; keep none on self or in a module")
    if trial.quick:
        return "no model is kept"
    after_one = _tensor_bytes()
    once()
    once()
    grown = _tensor_bytes() - after_one
    expect(grown <= 0, f"{grown} bytes of tensors more after the third run than after the first")
    return "nothing is kept"


def _tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor) and item.layout is torch.strided:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
