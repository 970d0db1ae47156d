"""`instance_wise`: goal, losses, steps, stop, stand-ins, protection, sequences, refusals.

A second implementation of the steps (:func:`steps_by_hand`, float64, autograd for every term) is
held against the method's weights after the whole run. Rows are labelled with what their net
answers, so that a request starts from a model that is right everywhere.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import json
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from unsc_plugin import attacks, engine
from unsc_plugin.conformance._nets import journal
from unsc_plugin.conformance._toys import original, problem, request
from unsc_plugin.errors import (
    AttackFailed,
    ConfigError,
    ForgetSetError,
    InputDomainError,
    NotApplicable,
    SplitAccessError,
    UnknownName,
    UnscError,
    WeightsNotSupported,
)
from unsc_plugin.method import Budget, Past, Result, UnlearningTask, Weights
from unsc_plugin.methods import _adversarial_pool as pools
from unsc_plugin.methods import instance_wise as method
from unsc_plugin.methods._adversarial_pool import DELTA, TEACHER, Pool
from unsc_plugin.methods._instance_settings import QUIRKS, Settings
from unsc_plugin.registry import create, load
from unsc_plugin.rows import Batch, Rows
from unsc_plugin.runtime import state_sha256
from unsc_plugin.spec import MethodEntry, Recipe, Scenario, Split

torch.set_num_threads(1)

SEED, DOUBLE = 4, torch.float64
CLASSES, COLUMNS = 5, 6
FEW: dict[str, Any] = {"n_adv": 3, "adv_batch": 16}
"""Few pairs, so that runs are short and the pool is gone through several times."""


class Net(nn.Module):
    """Two layers on rows of a table; `head` has as many outputs as there are classes."""

    def __init__(self, classes: int = CLASSES, seed: int = 0, normed: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Linear(COLUMNS, 12, dtype=DOUBLE)
            self.head = nn.Linear(12, classes, dtype=DOUBLE)
        self.norm = nn.BatchNorm1d(12, dtype=DOUBLE) if normed else nn.Identity()
        self.drop = nn.Dropout(0.4 if normed else 0.0)
        for layer in (self.body, self.head):
            layer.weight.data *= 2

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.body(features)))))


def table(net: nn.Module, count: int = 64, seed: int = 1) -> Rows:
    """Return rows with the net's own answers as labels; index does not start at 0."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, COLUMNS, generator=generator, dtype=DOUBLE)
    with engine.quiet(net), torch.no_grad():
        labels = net(inputs).argmax(dim=1)
    return Rows.of({"features": inputs}, labels, torch.arange(100, 100 + count))


def task_of(rows: Rows, **more: Any) -> UnlearningTask:
    """Return the request to forget `rows`; there is no other split."""
    common: dict[str, Any] = {"forget": rows, "retain": None, "num_classes": CLASSES}
    common |= {"recipe": Recipe(), "fresh_model": lambda _: nn.Identity(), "modality": "tabular"}
    return UnlearningTask(**{**common, **more})


@dataclass
class Watched:
    """States after every step of a run, the first one before it, and every stand-in batch."""

    states: list[dict[str, Tensor]] = field(default_factory=list)
    stand_ins: list[Batch] = field(default_factory=list)


def unlearn(
    model: nn.Module, task: UnlearningTask, name: str = "instance_wise", **settings: Any
) -> Result:
    """Run the method; whatever it notes must be strict JSON."""
    result = create(name, **settings).unlearn(model, task, SEED)
    json.dumps(dict(result.stats), allow_nan=False)
    return result


def watched(
    model: nn.Module, rows: Rows, name: str = "instance_wise", *, task: Any = None, **settings: Any
) -> tuple[Result, Watched]:
    """Run the method on `rows` and keep what the steps saw and made."""
    seen = Watched([copy.deepcopy(model.state_dict())])

    def observe(now: nn.Module, step: int) -> None:
        assert step == len(seen.states)
        seen.states.append({n: t.detach().clone() for n, t in now.state_dict().items()})

    take = Pool.take

    def taking(self: Pool, count: int) -> Batch:
        batch = take(self, count)
        seen.stand_ins.append(batch)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "take", taking)
        found = unlearn(model, task_of(rows, observer=observe, **(task or {})), name, **settings)
    return found, seen


def same(first: nn.Module | dict[str, Tensor], second: nn.Module | dict[str, Tensor]) -> bool:
    one, two = (m.state_dict() if isinstance(m, nn.Module) else m for m in (first, second))
    return one.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in one.items())


def least(net: nn.Module, rows: Rows) -> Tensor:
    """Return the class that the net holds for least likely, row by row."""
    return engine.predict(net, rows).logits.argmin(dim=1)


def logits_of(model: nn.Module, state: dict[str, Tensor], rows: Rows) -> Tensor:
    net = copy.deepcopy(model)
    net.load_state_dict(state)
    return engine.predict(net, rows).logits


def margins(logits: Tensor, index: Tensor) -> Tensor:
    """Return z_c − max_{j≠c} z_j, class by class."""
    rows = []
    for z, c in zip(logits.tolist(), index.tolist(), strict=True):
        rows.append(z[c] - max(value for j, value in enumerate(z) if j != c))
    return torch.tensor(rows, dtype=logits.dtype)


def met(logits: Tensor, labels: Tensor, goal: str, margin: float = 0.1) -> Tensor:
    found = margins(logits, labels)
    return found > margin if goal == "relabel" else -found > margin


# --------------------------------------------------------------------------- losses and the goal


def hinge(logits: Tensor, labels: Tensor) -> Tensor:
    return method.forget_losses(logits, labels, "misclassify", "hinge", 0.25)


def test_the_hinge_is_bounded_and_flat_beyond_its_margin() -> None:
    logits = torch.tensor(
        [[3.0, 1, 0], [1.0, 1, 0], [0.0, 1.2, 0], [0.0, 1.25, 0], [0.0, 1.3, 0], [0.0, 99, 0]],
        dtype=DOUBLE,
        requires_grad=True,
    )
    losses = hinge(logits, torch.zeros(6, dtype=torch.int64))
    expected = torch.tensor([3.25, 1.25, 0.05, 0, 0, 0], dtype=DOUBLE)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [1, -1, 0]
    assert not logits.grad[3:].any()


@pytest.mark.parametrize("p", [1 - 1e-12, 0.5, 1e-12])
def test_unlikelihood_is_minus_log_of_the_other_probabilities(p: float) -> None:
    q = 1 - p if p < 1 else 1e-12
    logits = torch.tensor([[math.log(p), math.log(q / 4), math.log(3 * q / 4)]], dtype=DOUBLE) + 7
    found = method.forget_losses(logits, torch.tensor([0]), "misclassify", "unlikelihood", 0.1)
    exact = math.log1p(math.exp(math.log(p) - math.log(q)))
    assert float(found) == pytest.approx(exact, abs=1e-12, rel=1e-12)
    assert float(found) == pytest.approx(-math.log(q), rel=1e-4)


def test_ascent_ce_and_the_correction_are_cross_entropies() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    labels = torch.tensor([0, 1, 2, 3, 0])
    expected = -logits.log_softmax(dim=1)[range(5), labels]
    up = method.forget_losses(logits, labels, "misclassify", "ce", 0.1)
    down = method.forget_losses(logits, labels, "relabel", "hinge", 0.1)
    torch.testing.assert_close(up, -expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(down, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("goal", ["misclassify", "relabel"])
def test_a_tie_does_not_meet_the_goal_and_a_nan_never_does(goal: str) -> None:
    sign = 1.0 if goal == "relabel" else -1.0
    rows = [[0.0, 0.0, -9.0], [sign * 0.25, 0.0, -9.0], [sign * 0.2500001, 0.0, -9.0]]
    logits = torch.tensor([*rows, [math.nan, 0.0, 0.0], [0.0, math.nan, 0.0], [math.nan] * 3])
    labels = torch.zeros(6, dtype=torch.int64)
    found = method.satisfied(logits, labels, goal, 0.25)
    assert found.tolist() == [False, False, True, False, False, False]
    assert method.satisfied(logits, labels, goal, 0.0).tolist()[0] is False


# --------------------------------------------------------------------------- the steps, by hand


@dataclass
class Run:
    """What the second implementation came to."""

    status: str
    steps: int
    w: float
    lam: float
    losses: list[float]
    weights: list[tuple[float, float]]
    model: nn.Module


def freedom_by_hand(anchor: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """Return one minus the mean absolute gradient of ‖z‖, stretched to [0, 1] per tensor."""
    net = copy.deepcopy(anchor).eval()
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for row in range(len(rows)):
        net.zero_grad(set_to_none=True)
        net(**rows.gather([row]).inputs).norm().backward()
        for name, p in net.named_parameters():
            if p.grad is not None:
                total[name] += p.grad.abs() / len(rows)
    return {n: 1 - (v - v.min()) / (v.max() - v.min()) for n, v in total.items()}


def steps_by_hand(
    model: nn.Module,
    rows: Rows,
    config: Settings,
    stand_ins: Iterator[Batch],
    goal: Tensor,
    *,
    anchor: nn.Module | None = None,
    moving: Callable[[str], bool] = lambda _: True,
) -> Run:
    """Do the run again: every row of the forget set at once, every term left to autograd."""
    net = copy.deepcopy(model).eval()
    held = dict((anchor or model).named_parameters())
    ones = {n: torch.ones_like(p) for n, p in held.items()}
    free = ones if config.importance == "ones" else freedom_by_hand(anchor or model, rows)
    inputs, k = rows.gather(torch.arange(len(rows))).inputs, len(rows)
    n_f, n_a = min(k, config.forget_batch), config.adv_batch
    assert k <= config.forget_batch
    alone = config.source == "none"
    w = 1.0 if alone else config.forget_weight or n_f / (n_f + n_a)
    lam, best, stale, snapshot = config.lam, -1, 0, copy.deepcopy(net.state_dict())
    parameters = {n: p for n, p in net.named_parameters() if moving(n)}
    speed = {n: torch.zeros_like(p) for n, p in parameters.items()}
    done = Run("", 0, 0, 0, [], [], net)
    margin = 0.1 if config.stop_margin is None else config.stop_margin
    for step in range(config.max_steps + 1):
        with torch.no_grad():
            ok = met(net(**inputs), goal, config.goal, margin)
        if int(ok.sum()) > best:
            best, stale, snapshot = int(ok.sum()), 0, copy.deepcopy(net.state_dict())
        else:
            stale += 1
        if int(ok.sum()) >= math.ceil(config.stop_fraction * k):
            done.status = "reached"
            break
        if step == config.max_steps:
            done.status = "cap"
            net.load_state_dict(snapshot)
            break
        if stale >= config.patience:
            stale = 0
            if w >= config.max_weight:
                lam = lam / 2 if config.growth > 1 else lam
            else:
                w = min(config.max_weight, config.growth * w)
        z, labels = net(**inputs), goal
        own = z.gather(1, labels[:, None])[:, 0]
        rest = z.masked_fill(functional.one_hot(labels, z.shape[1]).bool(), -math.inf)
        losses = {
            "hinge": (own - rest.amax(1) + margin + 1).clamp(min=0),
            "unlikelihood": -torch.log1p(-z.softmax(1).gather(1, labels[:, None])[:, 0]),
            "ce": z.log_softmax(1).gather(1, labels[:, None])[:, 0],
        }[config.ascent]
        if config.goal == "relabel":
            losses = -z.log_softmax(1).gather(1, labels[:, None])[:, 0]
        loss = w * losses[~ok].sum() / n_f
        if not alone:
            batch = next(stand_ins)
            x = batch.inputs["features"] + batch.inputs[DELTA]
            lp = net(x).log_softmax(1)
            soft = batch.inputs.get(TEACHER)
            one_hot = functional.one_hot(batch.labels, z.shape[1]).to(lp)
            loss = loss - (1 - w) * ((one_hot if soft is None else soft) * lp).sum() / len(batch)
        done.losses.append(float(loss.detach()))
        done.weights.append((w, lam))
        pulls = [(free[n] * (p - held[n].detach()).square()).sum() for n, p in parameters.items()]
        total = loss + lam / 2 * sum(pulls)
        gradients = torch.autograd.grad(total, list(parameters.values()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        scale = 1.0
        if config.max_grad_norm is not None:
            scale = min(1.0, config.max_grad_norm / (float(norm) + 1e-6))
        with torch.no_grad():
            for (name, p), g in zip(parameters.items(), gradients, strict=True):
                g = scale * g + config.weight_decay * p
                speed[name] = config.momentum * speed[name] + g
                p -= config.lr * speed[name]
    done.steps, done.w, done.lam = len(done.losses), w, lam
    return done


BY_HAND: dict[str, tuple[str, dict[str, Any]]] = {
    "neggrad": ("neggrad", {}),
    "adv": ("adv", FEW),
    "adv_imp": ("adv_imp", {**FEW, "lam": 5.0}),
    "l2sp": ("l2sp", {**FEW, "lam": 5.0}),
    "imp": ("imp", {"lam": 3.0}),
    "soft": ("soft", FEW),
    "noise_imp": ("noise_imp", FEW),
    "relabel": ("relabel", {}),
    "relabel_adv_imp": ("relabel_adv_imp", FEW),
    "unlikelihood": ("neggrad", {"ascent": "unlikelihood"}),
    "ce": ("adv", {**FEW, "ascent": "ce"}),
    "no-clip": ("neggrad", {"max_grad_norm": None, "lr": 0.001}),
    "no-momentum": ("neggrad", {"momentum": 0.0, "lr": 0.03}),
    "decay": ("neggrad", {"weight_decay": 0.5}),
    "balance": ("adv_imp", {**FEW, "patience": 2, "max_weight": 0.9, "lam": 300.0}),
    "no-growth": ("adv_imp", {**FEW, "patience": 2, "growth": 1.0, "max_steps": 60}),
    "weight": ("adv", {**FEW, "forget_weight": 0.7}),
    "cap": ("neggrad", {"max_steps": 25}),
    "fraction": ("neggrad", {"stop_fraction": 0.55}),
    "margin": ("neggrad", {"stop_margin": 1.5}),
    "pull-50": ("imp", {"stop_margin": 1e3, "max_steps": 50, "lam": 2.0, "growth": 1.0}),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_run_is_the_algorithm_to_rounding(case: str) -> None:
    name, settings = BY_HAND[case]
    net = Net()
    rows = table(net, 12)
    result, seen = watched(net, rows, f"instance_wise.{name}", **settings)
    config = create(f"instance_wise.{name}", **settings).config
    goal = rows.labels if result.targets is None else result.targets
    again = steps_by_hand(net, rows, config, iter(seen.stand_ins), goal)
    stats = result.stats
    assert (stats["status"], stats["steps"], result.steps) == (again.status,) + (again.steps,) * 2
    assert (stats["w_final"], stats["lam_final"]) == pytest.approx((again.w, again.lam))
    assert result.losses == pytest.approx(again.losses, rel=1e-10, abs=1e-12)
    for name, tensor in again.model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], tensor, rtol=0, atol=1e-10)
    expected = "cap" if case in ("cap", "pull-50", "no-growth") else "reached"
    assert stats["status"] == expected
    assert stats["k"] == 12
    assert again.steps > 5


def test_the_noted_curve_is_that_of_the_states() -> None:
    net = Net()
    rows = table(net, 12)
    result, seen = watched(net, rows, "instance_wise.imp", lam=3.0)
    free, start = freedom_by_hand(net, rows), {n: p.detach() for n, p in net.named_parameters()}
    curve = result.stats["curve"]
    assert curve[0][4] == 0
    assert [row[0] for row in curve[:4]] == [0, 1, 2, 3]
    for step, count, _, _, pulled, w, _ in curve:
        state = seen.states[step]
        assert count == int(met(logits_of(net, state, rows), rows.labels, "misclassify").sum())
        value = sum(float((free[n] * (state[n] - p).square()).sum()) for n, p in start.items()) / 2
        assert pulled == pytest.approx(value, rel=1e-9, abs=1e-15)
        assert w == 1.0
    moved = sum(float((seen.states[-1][n] - p).square().sum()) for n, p in start.items())
    assert result.stats["dist"] == pytest.approx(math.sqrt(moved), rel=1e-9)


def test_of_many_rows_only_unmet_ones_are_drawn_as_many_as_a_batch_holds() -> None:
    net = Net()
    rows = table(net, 20)
    calls: list[Tensor] = []
    spy = copy.deepcopy(net)
    spy.register_forward_pre_hook(
        lambda _, args, kwargs: (
            calls.append(kwargs["features"].detach().clone()) if torch.is_grad_enabled() else None
        ),
        with_kwargs=True,
    )
    result, seen = watched(spy, rows, "instance_wise.neggrad", forget_batch=4)
    assert result.stats["status"] == "reached"
    assert len(calls) == result.steps == len(seen.states) - 1
    drawn = []
    for step, batch in enumerate(calls):
        ok = met(logits_of(net, seen.states[step], rows), rows.labels, "misclassify")
        hit = (rows.storage["features"][:, None] == batch[None]).all(dim=2)
        at = torch.nonzero(hit.any(dim=1))[:, 0]
        assert len(batch) == len(at) == min(4, int((~ok).sum()))
        assert not ok[at].any()
        drawn.append(tuple(at.tolist()))
        losses = hinge_of(net, seen.states[step], rows)[at]
        assert result.losses[step] == pytest.approx(float(losses.sum()) / 4, rel=1e-10)
    assert len(set(drawn[:10])) > 5
    assert len({row for rows in drawn for row in rows}) == 20


def hinge_of(net: nn.Module, state: dict[str, Tensor], rows: Rows) -> Tensor:
    model = copy.deepcopy(net)
    model.load_state_dict(state)
    with torch.no_grad():
        found = model(**rows.gather(torch.arange(len(rows))).inputs)
    return (margins(found, rows.labels) + 1.1).clamp(min=0)


# --------------------------------------------------------------------------- reference form

QUIRKED: dict[str, Any] = {
    "ascent": "ce", "stop_margin": 0.0, "attack_stop": None, "attack_step": 0.1, "lam": 0.0,
    "max_grad_norm": None, "growth": 1.0,
    "quirks": ("target_fallback", "unshuffled", "keep_failures", "partial_tail", "all_rows"),
}  # fmt: skip


def test_the_published_loss_is_the_sign_flipped_mean_over_the_joined_batch() -> None:
    net = Net()
    rows = table(net, 16)
    settings = {**QUIRKED, "n_adv": 20, "max_steps": 5, "lr": 1e-4, "attack_steps": 40}
    result, seen = watched(net, rows, **settings)
    assert [len(batch) for batch in seen.stand_ins] == [256, 64, 256, 64, 256]
    weights = [row[5] for row in result.stats["curve"]]
    assert weights[:3] == pytest.approx([16 / 272, 16 / 272, 16 / 80])  # curves lag by a step
    assert (round(16 / 272, 4), 16 / 80) == (0.0588, 0.2)
    inputs = rows.gather(torch.arange(16)).inputs["features"]
    for step, batch in enumerate(seen.stand_ins):
        model = copy.deepcopy(net)
        model.load_state_dict(seen.states[step])
        joined = torch.cat([inputs, batch.inputs["features"] + batch.inputs[DELTA]])
        labels = torch.cat([rows.labels, batch.labels])
        signs = torch.cat([-torch.ones(16, dtype=DOUBLE), torch.ones(len(batch), dtype=DOUBLE)])
        with torch.no_grad():
            losses = functional.cross_entropy(model(joined), labels, reduction="none")
        assert result.losses[step] == pytest.approx(float((signs * losses).mean()), abs=1e-12)
    first, second = (seen.stand_ins[i] for i in (0, 1))
    index = torch.cat([first.index, second.index])
    assert torch.equal(index, rows.index.repeat(20))  # round by round, in forget order
    assert torch.equal(first.inputs[DELTA], seen.stand_ins[2].inputs[DELTA])


@pytest.mark.parametrize(("k", "n_a", "w"), [(16, 256, 16 / 272), (32, 256, 1 / 9), (40, 8, 0.8)])
def test_the_first_weight_is_the_share_of_forget_rows(k: int, n_a: int, w: float) -> None:
    net = Net()
    result = unlearn(net, task_of(table(net, k)), "instance_wise.adv", adv_batch=n_a, max_steps=0)
    assert result.stats["w_final"] == pytest.approx(w, rel=1e-12)


def test_all_rows_takes_the_batches_in_order_and_its_own_divisor() -> None:
    net = Net()
    rows = table(net, 10)
    calls: list[Tensor] = []
    net.register_forward_pre_hook(
        lambda _, args, kwargs: (
            calls.append(kwargs["features"]) if torch.is_grad_enabled() else None
        ),
        with_kwargs=True,
    )
    quirks = {"quirks": ("all_rows",), "forget_batch": 4, "max_steps": 4, "lr": 0.0}
    result = unlearn(net, task_of(rows), "instance_wise.neggrad", **quirks)
    whole = rows.storage["features"]
    for call, part in zip(calls, (whole[:4], whole[4:8], whole[8:], whole[:4]), strict=True):
        assert torch.equal(call, part)
    state = net.state_dict()
    losses = hinge_of(Net(), state, rows)
    expected = [float(losses[a:b].mean()) for a, b in ((0, 4), (4, 8), (8, 10), (0, 4))]
    assert result.losses == pytest.approx(expected, rel=1e-10)


def test_epochs_of_the_reference_are_passes_over_the_pool() -> None:
    net = Net()
    task = task_of(table(net, 10))
    settings = {**QUIRKED, "lr": 0.0, "n_adv": 5, "adv_batch": 16, "max_epochs": 3, "max_steps": 1}
    assert unlearn(net, task, **settings).steps == 3 * 4  # ⌈10 · 5 / 16⌉ = 4
    quirks = {"quirks": ("all_rows", "epoch_stop"), "lr": 0.0, "forget_batch": 4}
    assert unlearn(net, task, "instance_wise.neggrad", **quirks, max_epochs=2).steps == 2 * 3


def test_epoch_stop_makes_whole_epochs_and_at_least_one() -> None:
    net = Net()
    rows = table(net, 10)
    settings = {"quirks": ("all_rows", "epoch_stop"), "forget_batch": 4, "max_epochs": 400}
    result, seen = watched(net, rows, "instance_wise.neggrad", **settings)
    plain, _ = watched(net, rows, "instance_wise.neggrad", quirks=("all_rows",), forget_batch=4)
    assert result.stats["status"] == plain.stats["status"] == "reached"
    assert result.steps % 3 == 0
    assert result.steps - plain.steps >= 0
    for state in seen.states[3 : result.steps : 3]:
        assert not met(logits_of(net, state, rows), rows.labels, "misclassify").all()
    already = rows.relabelled(least(net, rows))
    assert unlearn(net, task_of(already), "instance_wise.neggrad", **settings).steps == 3


def test_train_mode_moves_batch_statistics_twice_a_step() -> None:
    model = Net(normed=True)
    value = torch.full((1, COLUMNS), 0.3, dtype=DOUBLE)
    model.norm.running_mean.fill_(5.0)
    with torch.no_grad():
        constant = model.body(value)[0]
    rows = table(model, 4)
    rows = Rows.of({"features": value.repeat(4, 1)}, torch.zeros(4, dtype=torch.int64), rows.index)
    tiny = {"eps_features": 1e-9, "attack_steps": 1, "attack_step": 1e-9, "lr": 0.0}
    result = unlearn(
        model, task_of(rows), **tiny, max_steps=10, lam=0.0, adv_batch=8, stop_margin=1e3,
        quirks=("train_mode", "keep_failures", "last_model"),
    )  # fmt: skip
    assert result.steps == 10
    share = (result.model.norm.running_mean - constant) / (5.0 - constant)
    torch.testing.assert_close(share, torch.full_like(share, 0.81**10), rtol=0, atol=1e-7)
    assert pytest.approx(0.122, abs=1e-3) == 0.81**10
    assert int(result.model.norm.num_batches_tracked) == 20


def test_last_model_returns_the_last_weights_and_else_the_best_ones_come_back() -> None:
    net = Net()
    rows = table(net, 12)
    _, seen = watched(net, rows, "instance_wise.neggrad")
    counts = [
        int(met(logits_of(net, state, rows), rows.labels, "misclassify").sum())
        for state in seen.states
    ]
    cap = next(t for t in range(1, len(counts)) if 4 < counts[t] < max(counts[:t]))
    first_best = counts.index(max(counts[:cap]))
    settings: dict[str, Any] = {"max_steps": cap}
    best = unlearn(net, task_of(rows), "instance_wise.neggrad", **settings)
    last = unlearn(net, task_of(rows), "instance_wise.neggrad", **settings, quirks=("last_model",))
    assert best.stats["status"] == last.stats["status"] == "cap"
    assert best.stats["cap_reason"] == "steps"
    assert best.stats["forgotten"] == counts[first_best]
    assert last.stats["forgotten"] == counts[cap]
    assert first_best < cap
    assert same(best.model, seen.states[first_best])
    assert same(last.model, seen.states[cap])


# --------------------------------------------------------------------------- protection


def test_without_a_pull_adv_imp_is_adv_and_without_stand_ins_it_is_neggrad() -> None:
    net = Net()
    task = task_of(table(net, 12))
    adv = unlearn(net, task, "instance_wise.adv", **FEW)
    assert same(unlearn(net, task, "instance_wise.adv_imp", lam=0.0, **FEW).model, adv.model)
    assert same(unlearn(net, task, "instance_wise.l2sp", lam=0.0, **FEW).model, adv.model)
    assert not same(unlearn(net, task, "instance_wise.adv_imp", **FEW).model, adv.model)
    neggrad = unlearn(net, task, "instance_wise.neggrad")
    assert same(unlearn(net, task, source="none", lam=0.0).model, neggrad.model)
    assert not same(adv.model, neggrad.model)


def test_a_strong_pull_holds_every_weight_that_is_not_free() -> None:
    net = Net()
    task = task_of(table(net, 12))
    settings = {"max_steps": 60, "growth": 1.0, "lr": 1e-6, "max_grad_norm": None, "source": "none"}
    settings |= {"stop_margin": 100.0, "quirks": ("last_model",)}
    moved = {}
    for lam in (1e6, 0.0):
        result = unlearn(net, task, **settings, importance="ones", lam=lam)
        assert result.stats["status"] == "cap"
        after, before = result.model.state_dict(), net.state_dict()
        moved[lam] = max(float((after[n] - t).abs().max()) for n, t in before.items())
    assert moved[1e6] < 1e-4 < moved[0.0]


def test_weights_that_matter_for_the_forget_rows_are_freer_than_the_others() -> None:
    net = Net()
    rows = table(net, 12)
    settings = {"max_steps": 60, "growth": 1.0, "lr": 1e-5, "max_grad_norm": None, "lam": 1e5}
    settings |= {"stop_margin": 100.0, "quirks": ("last_model",)}
    result = unlearn(net, task_of(rows), "instance_wise.imp", **settings)
    loose = unlearn(net, task_of(rows), "instance_wise.imp", **{**settings, "lam": 0.0})
    free, start = freedom_by_hand(net, rows), net.state_dict()
    for name, held in free.items():
        moved = (result.model.state_dict()[name] - start[name]).abs()
        without = (loose.model.state_dict()[name] - start[name]).abs()
        assert float(moved[held == 1].max()) < 0.1 * float(without.max())
        if bool(without[held == 0] > 0):  # exactly one weight of each tensor is wholly free
            assert float(moved[held == 0]) == pytest.approx(float(without[held == 0]), rel=0.05)


@pytest.mark.parametrize("settings", [{"growth": 1.0}, {"growth": 1.5}])
def test_w_only_grows_and_lambda_yields_last(settings: dict[str, Any]) -> None:
    net = Net()
    result = unlearn(
        net, task_of(table(net, 12)), **FEW, **settings, patience=1, max_weight=0.8, lr=0.0,
        max_steps=16, lam=8.0,
    )  # fmt: skip
    rows = [(row[5], row[6]) for row in result.stats["curve"]]
    first = 12 / 28
    if settings["growth"] == 1:
        assert set(rows) == {(first, 8.0)}
        return
    weights, pulls = zip(*rows, strict=True)
    assert list(weights) == sorted(weights)
    assert max(weights) == pytest.approx(0.8)
    assert all(lam == 8.0 for w, lam in rows if w < 0.8)
    assert list(pulls) == sorted(pulls, reverse=True)
    # Step 1 is the first without progress: w, w·1.5, then 0.8; every further step halves λ.
    assert result.stats["lam_final"] == 8.0 / 2**13


def test_a_first_weight_above_the_largest_stays() -> None:
    net = Net()
    settings = {**FEW, "patience": 1, "max_weight": 0.5, "lr": 0.0, "max_steps": 3, "lam": 8.0}
    result = unlearn(net, task_of(table(net, 12)), **settings, forget_weight=0.9)
    assert (result.stats["w_final"], result.stats["lam_final"]) == (0.9, 8.0 / 4)


def test_only_the_chosen_parameters_move() -> None:
    net = Net()
    rows = table(net, 12)
    result, seen = watched(net, rows, trainable=("head.*",), **FEW)
    assert torch.equal(result.model.body.weight, net.body.weight)
    assert not torch.equal(result.model.head.weight, net.head.weight)
    config = create("instance_wise", trainable=("head.*",), **FEW).config
    again = steps_by_hand(
        net, rows, config, iter(seen.stand_ins), rows.labels, moving=lambda n: n.startswith("head")
    )
    torch.testing.assert_close(
        result.model.head.weight, again.model.head.weight, rtol=0, atol=1e-10
    )
    assert all(p.requires_grad for p in result.model.parameters())


def test_a_frozen_layer_stays_and_only_the_others_are_regularised() -> None:
    net = Net()
    net.body.requires_grad_(False)
    result = unlearn(net, task_of(table(net, 12)), **FEW)
    assert torch.equal(result.model.body.weight, net.body.weight)
    assert result.stats["importance"]["constant_tensors"] == 0
    assert not any(p.requires_grad for p in result.model.body.parameters())


# --------------------------------------------------------------------------- the stop


@pytest.mark.parametrize("name", ["neggrad", "adv_imp", "relabel_adv_imp", "relabel"])
def test_reached_means_every_instance_of_the_saved_model_in_any_batch(
    name: str, tmp_path: Path
) -> None:
    model, task = original("conv"), conv_task(16)
    result = unlearn(model, task, f"instance_wise.{name}", **FEW, forget_batch=3)
    assert result.stats["status"] == "reached"
    assert result.stats["forgotten"] == result.stats["k"] == 16
    torch.save(result.model.state_dict(), tmp_path / "weights.pt")
    fresh = problem("conv").build(7)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt"))
    fresh.eval()
    rows = problem("conv").train.subset(list(range(16)))
    relabelled = name.startswith("relabel")
    goal = result.targets if relabelled else rows.labels
    assert goal is not None
    for size in (1, 5, 16):
        found = engine.predict(fresh, rows, batch_size=size).logits
        assert met(found, goal, "relabel" if relabelled else "misclassify", 0.09).all()
        answered = found.argmax(dim=1)
        assert ((answered == goal) if relabelled else (answered != goal)).all()


def conv_task(k: int, **more: Any) -> UnlearningTask:
    positions = torch.arange(k), torch.arange(k, 96)
    return request(problem("conv"), Scenario.RANDOM, positions=positions, **more)


def test_a_run_ends_at_the_first_state_that_meets_the_goal() -> None:
    net = Net()
    rows = table(net, 12)
    result, seen = watched(net, rows, "instance_wise.adv", **FEW)
    done = [
        bool(met(logits_of(net, s, rows), rows.labels, "misclassify").all()) for s in seen.states
    ]
    assert done.index(True) == len(done) - 1 == result.steps
    assert same(result.model, seen.states[-1])


def test_what_is_met_already_needs_no_step_and_no_attack() -> None:
    net = Net()
    rows = table(net, 12)
    wrong = rows.relabelled(least(net, rows))
    result = unlearn(net, task_of(wrong))
    stats = result.stats
    assert (stats["status"], result.status, result.steps) == ("reached", "ok", 0)
    assert (stats["k_already"], stats["forgotten"], stats["dist"]) == (12, 12, 0.0)
    assert same(result.model, net)
    assert stats["attack"]["generated"] == 0
    assert "warnings" not in stats  # nothing was attacked, so that no attack failed


def test_rows_that_are_met_are_counted_and_stay_out_of_the_loss() -> None:
    net = Net()
    rows = table(net, 12)
    labels = rows.labels.clone()
    labels[:5] = least(net, rows)[:5]
    half = rows.relabelled(labels)
    found = met(engine.predict(net, half).logits, labels, "misclassify")
    assert found[:5].all()
    assert not found[5:].any()
    result = unlearn(net, task_of(half), "instance_wise.neggrad")
    assert result.stats["k_already"] == 5
    expected = float(hinge_of(net, net.state_dict(), half)[5:].sum()) / 12
    assert result.losses[0] == pytest.approx(expected, rel=1e-10)


def test_without_a_learning_rate_the_cap_is_reached_and_nothing_moves() -> None:
    net = Net()
    result = unlearn(net, task_of(table(net, 12)), **FEW, lr=0.0, max_steps=7)
    assert (result.stats["status"], result.stats["forgotten"], result.steps) == ("cap", 0, 7)
    assert result.status == "ok"
    assert same(result.model, net)


def test_a_spent_budget_is_a_cap_that_returns_the_best_weights() -> None:
    net = Net()
    rows = table(net, 12)
    capped = unlearn(net, task_of(rows), "instance_wise.neggrad", max_steps=25)
    spent = unlearn(net, task_of(rows, budget=Budget(steps=25)), "instance_wise.neggrad")
    assert (spent.status, spent.stats["status"]) == ("budget", "cap")
    assert (spent.stats["cap_reason"], spent.steps) == ("budget", 25)
    assert same(spent.model, capped.model)
    assert spent.stats["forgotten"] == capped.stats["forgotten"] > 0


def test_a_budget_that_just_suffices_is_reached() -> None:
    net = Net()
    rows = table(net, 12)
    free = unlearn(net, task_of(rows), "instance_wise.neggrad")
    tight = unlearn(net, task_of(rows, budget=Budget(steps=free.steps)), "instance_wise.neggrad")
    assert tight.stats["status"] == free.stats["status"] == "reached"
    assert same(tight.model, free.model)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_a_fraction_is_a_prefix_of_the_whole_run_to_the_bit(fraction: float) -> None:
    net = Net()
    rows = table(net, 11)
    settings = {**FEW, "forget_batch": 4}
    _, seen = watched(net, rows, **settings)
    need = math.ceil(fraction * 11)
    counts = [
        int(met(logits_of(net, s, rows), rows.labels, "misclassify").sum()) for s in seen.states
    ]
    first = next(i for i, count in enumerate(counts) if count >= need)
    part = unlearn(net, task_of(rows), **settings, stop_fraction=fraction)
    assert (part.stats["status"], part.steps) == ("reached", first)
    assert part.stats["forgotten"] == counts[first]
    assert same(part.model, seen.states[first])


def test_many_instances_are_all_tested_before_the_run_may_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Net()
    rows = table(net, 30)
    monkeypatch.setattr(method, "MANY", 8)
    result, seen = watched(net, rows, "instance_wise.neggrad", forget_batch=4, lr=0.02)
    assert result.stats["status"] == "reached"
    assert met(engine.predict(result.model, rows).logits, rows.labels, "misclassify").all()
    assert same(result.model, seen.states[-1])
    capped = unlearn(
        net, task_of(rows), "instance_wise.neggrad", forget_batch=4, lr=0.02,
        max_steps=result.steps - 1,
    )  # fmt: skip
    found = met(engine.predict(capped.model, rows).logits, rows.labels, "misclassify")
    assert int(found.sum()) == capped.stats["forgotten"]


class Poisoned(Net):
    """A net that gives a NaN once its head has moved: a logit, the loss, or only a gradient."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.register_buffer("before", self.head.weight.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        logits = super().forward(features)
        if torch.equal(self.head.weight, self.before):
            return logits
        stepping = torch.is_grad_enabled() and self.head.weight.requires_grad
        if self.what == "gradient" and stepping:
            logits.register_hook(lambda gradient: gradient * math.nan)
        if (self.what == "logit" and not stepping) or (self.what == "loss" and stepping):
            nan = torch.zeros_like(logits)
            nan[0, 0] = math.nan
            return logits + nan
        return logits


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("name", ["neggrad", "adv_imp"])
@pytest.mark.parametrize("what", ["logit", "loss", "gradient"])
def test_a_nan_ends_the_run_as_diverged_with_the_original(
    what: str, name: str, clip: float | None
) -> None:
    net = Poisoned(what)
    result = unlearn(net, task_of(table(net, 12)), f"instance_wise.{name}", max_grad_norm=clip)
    assert (result.status, result.stats["status"]) == ("diverged", "diverged")
    assert same(result.model, net)
    assert result.steps <= 2
    assert result.reason is not None
    assert "step" in result.reason
    assert result.stats["forgotten"] < 12


# --------------------------------------------------------------------------- eval mode


def test_batch_statistics_are_the_same_to_the_bit_after_a_run() -> None:
    model, task = original("conv"), conv_task(12)
    for name in ("adv_imp", "soft", "noise"):
        result = unlearn(model, task, f"instance_wise.{name}", **FEW)
        before, after = model.state_dict(), result.model.state_dict()
        buffers = [n for n, _ in model.named_buffers()]
        assert len(buffers) == 6
        assert all(torch.equal(before[n], after[n]) for n in buffers)
        affine = [n for n, _ in model.named_parameters() if n.endswith(".1.weight")]
        assert affine
        assert all(not torch.equal(before[n], after[n]) for n in affine)
        assert not any(m.training for m in result.model.modules())


def test_dropout_stays_out_of_a_run() -> None:
    wet, dry = Net(normed=True), Net(normed=True)
    dry.drop.p = 0.0
    rows = table(wet, 12)
    for name in ("adv_imp", "soft", "noise_imp"):
        one, two = (
            unlearn(net, task_of(rows), f"instance_wise.{name}", **FEW) for net in (wet, dry)
        )
        assert one.steps == two.steps > 3
        assert all(
            torch.equal(a, b)
            for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True)
        )


# --------------------------------------------------------------------------- access and traces


def test_forget_rows_are_read_once_and_no_other_split_is_opened() -> None:
    net = Net()
    rows = table(net, 12)
    fetched: list[int] = []

    def decode(positions: Tensor) -> dict[str, Tensor]:
        fetched.extend(positions.tolist())
        return {"features": rows.storage["features"][positions]}

    counting = Rows.of({}, rows.labels, rows.index, decode=decode)
    result = unlearn(net, task_of(counting), **FEW)
    assert result.stats["status"] == "reached"
    assert sorted(fetched) == list(range(12))
    assert dict(result.read) == {Split.FORGET: 12}
    assert same(result.model, unlearn(net, task_of(rows), **FEW).model)


@pytest.mark.parametrize("preset", [None, *sorted(load().methods["instance_wise"].entry.presets)])  # type: ignore[union-attr]
def test_no_preset_reads_a_row_that_is_not_to_be_forgotten(preset: str | None) -> None:
    chosen, fetched = problem("conv"), set[int]()

    def decode(positions: Tensor) -> dict[str, Tensor]:
        fetched.update(positions.tolist())
        return {key: column[positions] for key, column in chosen.train.storage.items()}

    train = Rows.of({}, chosen.train.labels, chosen.train.index, decode=decode)
    forget = torch.arange(0, 96, 12)
    kept = torch.tensor([i for i in range(96) if i % 12])
    asked = request(
        chosen,
        Scenario.RANDOM,
        positions=(forget, kept),
        train=train,
        val=train.subset(kept),
        **({"first_model": original("conv")} if preset == "continual" else {}),
    )
    short = {"max_epochs": 1} if "reference" in str(preset) else {"max_steps": 3}
    name = "instance_wise" if preset is None else f"instance_wise.{preset}"
    result = unlearn(original("conv"), asked, name, **short)
    assert result.steps >= 1
    assert fetched == set(forget.tolist())
    assert dict(result.read) == {Split.FORGET: 8}


@pytest.mark.parametrize("split", ["retain", "val"])
def test_opening_another_split_raises(split: str) -> None:
    net = Net()
    rows = table(net, 20)
    whole = task_of(rows.subset(list(range(8))), **{split: rows.subset(list(range(8, 20)))})
    guarded = whole.guarded(create("instance_wise").opens, SEED)
    with pytest.raises(SplitAccessError, match=split):
        guarded.rows(split)  # type: ignore[arg-type]
    assert create("instance_wise").opens == frozenset({Split.FORGET})
    alone = task_of(rows.subset(list(range(8))))
    assert same(unlearn(net, whole, **FEW).model, unlearn(net, alone, **FEW).model)


def test_nothing_of_the_pool_outlives_a_run_and_nothing_reaches_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net()
    kept: list[weakref.ref[Any]] = []
    take, request_ = Pool.take, method._request

    def taking(self: Pool, count: int) -> Batch:
        batch = take(self, count)
        assert self._stock is not None
        kept.extend(weakref.ref(x) for x in (self, self._stock.delta, batch.inputs[DELTA]))
        return batch

    def asked(*args: Any) -> Any:
        found = request_(*args)
        assert found.free is not None
        kept.extend(weakref.ref(x) for x in (found, found.anchor, *found.free.values()))
        return found

    monkeypatch.setattr(Pool, "take", taking)
    monkeypatch.setattr(method, "_request", asked)
    monkeypatch.setenv("UNSC_CACHE", str(tmp_path / "global"))
    monkeypatch.chdir(tmp_path)
    result = unlearn(net, task_of(table(net, 12), cache=tmp_path), **FEW)
    gc.collect()
    assert len(kept) > 8
    assert [one() for one in kept if one() is not None] == []
    assert list(tmp_path.rglob("*")) == []
    assert "perturbation" not in json.dumps(dict(result.stats))


def test_the_model_and_its_anchor_stay_as_they_were() -> None:
    model = original("conv").train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.head.bias.requires_grad_(False)
    before = state_sha256(model)
    task = conv_task(12)
    anchors: list[tuple[nn.Module, str]] = []
    init = Pool.__init__

    def made(self: Pool, anchor: nn.Module, *args: Any, **more: Any) -> None:
        anchors.append((anchor, state_sha256(anchor)))
        init(self, anchor, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "__init__", made)
        for name in ("adv_imp", "soft", "noise_imp"):
            unlearn(model, task, f"instance_wise.{name}", **FEW)
    assert state_sha256(model) == before
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert not model._forward_hooks
    assert len(anchors) == 3
    assert all(state_sha256(anchor) == kept for anchor, kept in anchors)


@pytest.mark.parametrize("name", ["neggrad", "adv_imp", "noise_imp", "soft"])
def test_every_forward_pass_is_counted_as_work(name: str) -> None:
    model, task = original("conv"), conv_task(8)
    with journal() as book:
        result = unlearn(model, task, f"instance_wise.{name}", max_steps=9)
    assert result.work == book.work


# --------------------------------------------------------------------------- determinism


def test_the_seed_decides_the_weights_to_the_bit() -> None:
    task = conv_task(12)
    model = original("conv")
    for name in ("adv_imp", "noise", "relabel"):
        made = create(f"instance_wise.{name}", **FEW, max_steps=20)
        one, two, other = (made.unlearn(model, task, seed).model for seed in (1, 1, 2))
        assert same(one, two)
        assert not same(one, other)


def test_a_request_in_another_order_has_the_same_draws() -> None:
    net = Net()
    rows = table(net, 12)
    shuffled = rows.subset(torch.randperm(12, generator=torch.Generator().manual_seed(0)))
    one = unlearn(net, task_of(rows), "instance_wise.relabel")
    two = unlearn(net, task_of(shuffled), "instance_wise.relabel")
    assert one.targets is not None
    assert two.targets is not None
    first = dict(zip(rows.index.tolist(), one.targets.tolist(), strict=True))
    assert first == dict(zip(shuffled.index.tolist(), two.targets.tolist(), strict=True))


def test_nested_forget_sets_share_targets_and_perturbations() -> None:
    net = Net()
    rows = table(net, 64)
    small, large = (pool_of(net, rows.subset(list(range(k))), n_adv=4) for k in (16, 64))
    found = {}
    for pool in (small, large):
        batch = pool.take(10_000)
        keys = zip(batch.index.tolist(), batch.labels.tolist(), strict=True)
        found[pool] = {
            (at, target, round(float(delta.norm()), 9))
            for (at, target), delta in zip(keys, batch.inputs[DELTA], strict=True)
        }
    inside = {one for one in found[large] if one[0] < 116}
    assert len(inside) > 20
    assert inside == found[small]
    relabel = [
        unlearn(net, task_of(rows.subset(list(range(k)))), "instance_wise.relabel", max_steps=0)
        for k in (16, 64)
    ]
    assert relabel[0].targets is not None
    assert relabel[1].targets is not None
    assert torch.equal(relabel[0].targets, relabel[1].targets[:16])


# --------------------------------------------------------------------------- the pool


def pool_of(
    net: nn.Module, rows: Rows, *, seed: int = SEED, classes: int = CLASSES, **settings: Any
) -> Pool:
    """Return a pool of the anchor in train mode, as a run has it."""
    net = copy.deepcopy(net).train()
    return Pool(
        net,
        rows,
        Settings(**settings),
        seed=seed,
        num_classes=classes,
        place=torch.device("cpu"),
        clock=lambda: 0.0,
        predicted=engine.predict(net, rows).logits.argmax(dim=1),
    )


@cache
def pictures() -> tuple[nn.Module, Rows]:
    """Return the convolutional toy and ten of its pictures in double precision."""
    model = original("conv").double()
    rows = problem("conv").train.subset(list(range(10)))
    pixels = rows.gather(torch.arange(10)).inputs["pixel_values"].double()
    return model, Rows.of({"pixel_values": pixels}, rows.labels, rows.index)


@pytest.mark.parametrize("source", ["adversarial", "noise"])
def test_chunks_do_not_change_the_pool(source: Any) -> None:
    model, rows = pictures()
    made = {
        size: pool_of(model, rows, classes=3, attack_batch=size, n_adv=7, source=source).take(999)
        for size in (1, 7, 64)
    }
    for size in (1, 7):
        assert torch.equal(made[size].index, made[64].index)
        assert torch.equal(made[size].labels, made[64].labels)
        torch.testing.assert_close(
            made[size].inputs[DELTA], made[64].inputs[DELTA], rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("adv_batch", [1, 7, 10, 16, 20, 23, 70])
@pytest.mark.parametrize("eps", [4.0, 0.35])
def test_a_lazy_pool_is_the_eager_one_to_the_bit(adv_batch: int, eps: float) -> None:
    model, rows = pictures()
    lazy, eager = (
        pool_of(model, rows, classes=3, attack_batch=10, n_adv=4, eps=eps, lazy=flag)
        for flag in (True, False)
    )
    for _ in range(120 // adv_batch + 4):
        one, two = lazy.take(adv_batch), eager.take(adv_batch)
        assert torch.equal(one.index, two.index)
        assert torch.equal(one.labels, two.labels)
        assert torch.equal(one.inputs[DELTA], two.inputs[DELTA])


@pytest.mark.parametrize("adv_batch", [1, 6, 16, 20, 40])
def test_stand_ins_are_taken_in_turn_and_start_over_after_the_last(adv_batch: int) -> None:
    model, rows = pictures()
    whole = pool_of(model, rows, classes=3, n_adv=4, lazy=False).take(999)
    assert len(whole) == 40  # every attack of this toy reaches its target
    pool = pool_of(model, rows, classes=3, attack_batch=8, n_adv=4)
    taken = torch.cat([pool.take(adv_batch).inputs[DELTA] for _ in range(3 * 40 // adv_batch)])
    expected = whole.inputs[DELTA][torch.arange(len(taken)) % 40]
    torch.testing.assert_close(taken, expected, rtol=0, atol=1e-10)


def test_a_default_run_goes_through_more_than_its_first_stand_ins() -> None:
    model = original("conv")
    batches: list[Batch] = []
    take = Pool.take

    def taking(self: Pool, count: int) -> Batch:
        batches.append(take(self, count))
        return batches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "take", taking)
        result = unlearn(model, conv_task(24), max_steps=3)
    attack = result.stats["attack"]
    assert attack["success"] == 1
    assert attack["used"] == 3 * 256
    assert 480 >= attack["generated"] >= 480 - 64  # 24 · 20 pairs, and 768 were taken
    assert not torch.equal(batches[0].inputs[DELTA], batches[1].inputs[DELTA])


def test_pairs_are_attacked_when_they_are_needed_only() -> None:
    model, rows = pictures()
    pool = pool_of(model, rows, classes=3, attack_batch=8, n_adv=50)
    for taken in (10, 20, 30):
        pool.take(10)
        assert pool.tally.used == taken
        assert taken <= pool.tally.generated <= -(-taken // 8) * 8 + 8
    eager = pool_of(model, rows, classes=3, attack_batch=8, n_adv=5, lazy=False)
    eager.take(1)
    assert eager.tally.generated == 50


def test_any_k_pairs_in_a_row_cover_every_instance_and_rounds_differ_in_order() -> None:
    model, rows = pictures()
    pool = pool_of(model, rows, classes=3, n_adv=6)
    assert len(pool) == 60
    order = [row for row, _ in pool.pairs]
    assert [number for _, number in pool.pairs] == [i // 10 for i in range(60)]
    rounds = [tuple(order[i : i + 10]) for i in range(0, 60, 10)]
    assert all(sorted(one) == list(range(10)) for one in rounds)
    assert len(set(rounds)) == 6
    plain = pool_of(model, rows, classes=3, n_adv=2, quirks=("unshuffled",))
    assert [row for row, _ in plain.pairs] == [*range(10)] * 2


@pytest.mark.parametrize(
    ("classes", "rounds"), [(2, 20), (10, 20), (11, 22), (99, 198), (500, 200)]
)
def test_pairs_per_instance_follow_the_number_of_classes(classes: int, rounds: int) -> None:
    net = Net()
    assert len(pool_of(net, table(net, 3), classes=classes)) == 3 * rounds


CLOSE = {"attack_step": 0.003, "attack_steps": 900, "n_adv": 12, "eps": 1.0}
"""Small steps: attacks end just above the probability that ends them."""


@pytest.mark.parametrize("stop", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("how", ["plain", "bf16", "spilled"])
def test_what_is_kept_reaches_its_target_when_it_is_measured_again(
    how: str, stop: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = original("conv"), problem("conv").train.subset(list(range(10)))
    if how == "spilled":
        monkeypatch.setattr(pools, "SPILL_BYTES", 0)
    settings = {**CLOSE, "attack_stop": stop, "attack_dtype": "bf16" if how == "bf16" else "fp32"}
    pool = pool_of(model, rows, classes=3, lazy=False, **settings)
    batch = pool.take(9999)
    assert 40 < len(batch) == pool.tally.hit
    assert pool._stock is not None
    assert pool._stock.delta.dtype == (torch.float16 if how == "spilled" else torch.float32)
    pixels = batch.inputs["pixel_values"] + batch.inputs[DELTA]
    edge = 2.0**-11 if how == "spilled" else 1e-6  # rounding of float16; the forward pass clips
    assert float(pixels.min()) >= -edge
    assert float(pixels.max()) <= 1 + edge
    norm = batch.inputs[DELTA].flatten(1).norm(dim=1)
    assert float(norm.max()) <= 1 + 1e-5 + (edge if how == "spilled" else 0)
    with engine.quiet(model), torch.no_grad():
        found = model(pixel_values=pixels.clamp(0, 1)).softmax(dim=1)
    assert torch.equal(found.argmax(dim=1), batch.labels)
    assert float(found.gather(1, batch.labels[:, None]).min()) >= stop - 1e-6
    own = dict(zip(rows.index.tolist(), rows.labels.tolist(), strict=True))
    assert all(
        own[i] != t for i, t in zip(batch.index.tolist(), batch.labels.tolist(), strict=True)
    )


def test_rounding_to_half_precision_is_followed_by_a_new_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Net()
    rows = table(net, 64)
    settings: dict[str, Any] = {"attack_step": 0.01, "attack_steps": 600, "n_adv": 12}
    settings |= {"attack_batch": 768, "lazy": False, "eps_features": 5.0}
    wide = pool_of(net, rows, **settings).take(999)
    sure = confidence(net, wide, wide.inputs[DELTA].half())
    assert float(confidence(net, wide, wide.inputs[DELTA]).min()) >= 0.5 - 1e-6
    assert float(sure.min()) < 0.5 - 2e-6  # rounding undoes some
    monkeypatch.setattr(pools, "SPILL_BYTES", 0)
    pool = pool_of(net, rows, **settings)
    kept = pool.take(999)
    assert float(confidence(net, kept, kept.inputs[DELTA]).min()) >= 0.5 - 1e-6
    assert len(kept) == pool.tally.hit == int((sure >= 0.5).sum())


def confidence(net: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
    """Return the probability of every stand-in's label at x + δ."""
    with engine.quiet(net), torch.no_grad():
        found = net(batch.inputs["features"] + delta.double()).softmax(dim=1)
    return found.gather(1, batch.labels[:, None])[:, 0]


def test_stopping_early_spends_no_more_than_the_full_attack() -> None:
    model, rows = pictures()
    early, full = (
        pool_of(model, rows, classes=3, n_adv=2, attack_stop=stop, lazy=False)
        for stop in (0.5, None)
    )
    assert early.take(99).inputs[DELTA].flatten(1).norm(dim=1).mean() < 2.0
    full.take(99)
    assert full.tally.image_steps == 20 * 100
    assert 0 < early.tally.image_steps < 0.3 * full.tally.image_steps


def test_failures_are_dropped_unless_they_are_to_be_kept() -> None:
    model, rows = pictures()
    dropped, kept = (
        pool_of(model, rows, classes=3, n_adv=4, eps=0.35, lazy=False, quirks=quirks)
        for quirks in ((), ("keep_failures",))
    )
    few, all_of_them = dropped.take(999), kept.take(999)
    assert 0 < len(few) < 40 == len(all_of_them)
    assert len(few) == dropped.tally.hit == kept.tally.hit
    assert dropped.tally.success == pytest.approx(len(few) / 40)


def test_fewer_successes_than_a_batch_are_all_used_every_step() -> None:
    model, rows = pictures()
    pool = pool_of(model, rows, classes=3, n_adv=1, eps=0.35)
    first, second = pool.take(64), pool.take(64)
    assert 0 < len(first) < 10
    assert torch.equal(first.index, second.index)
    assert first.total == len(first)


@pytest.mark.parametrize("classes", [12, 30])
def test_targets_are_of_all_classes_the_logits_have(classes: int) -> None:
    net = Net(classes)
    rows = table(net, 40)
    pool = pool_of(net, rows, classes=classes, n_adv=20, lazy=False, quirks=("keep_failures",))
    targets = pool.take(9999).labels
    assert set(targets.tolist()) == set(range(classes))


def test_classes_are_counted_in_the_logits() -> None:
    net = Net(12)
    rows = table(net, 40)
    low = torch.nonzero(rows.labels < 5)[:, 0]
    assert len(low) > 5
    rows = rows.subset(low)
    settings: dict[str, Any] = {"n_adv": 30, "adv_batch": 600, "max_steps": 1}
    _, seen = watched(net, rows, "instance_wise.adv", **settings)  # the task says five classes
    assert int(seen.stand_ins[0].labels.max()) > 4
    relabelled = unlearn(net, task_of(rows), "instance_wise.relabel", max_steps=0)
    assert relabelled.targets is not None
    assert int(relabelled.targets.max()) > 4


def test_rows_that_the_model_gets_wrong_never_draw_what_it_answers() -> None:
    net = Net()
    rows = table(net, 30)
    answers = rows.labels
    wrong = rows.relabelled((answers + 1) % CLASSES)
    pool = pool_of(net, wrong, n_adv=30, lazy=False, quirks=("keep_failures",), attack_steps=1)
    batch = pool.take(9999)
    at = batch.index - 100
    assert not (batch.labels == answers[at]).any()
    assert not (batch.labels == wrong.labels[at]).any()
    counts = torch.bincount((batch.labels - answers[at]) % CLASSES, minlength=CLASSES)
    assert counts[:2].tolist() == [0, 0]
    assert counts[2:].min() > 0.8 * 300


@pytest.mark.parametrize(
    ("quirks", "expected"),
    [(("target_fallback",), (4, 8)), (("target_fallback", "ten_classes"), (5, 10))],
)
def test_quirks_of_the_targets_reach_the_pool(
    quirks: tuple[str, ...], expected: tuple[int, int]
) -> None:
    half, classes = expected
    count = {8: 8, 10: 12}[classes]
    net = Net(count)
    inputs = torch.randn(60, COLUMNS, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    rows = Rows.of({"features": inputs}, torch.full((60,), half))
    settings: dict[str, Any] = {"n_adv": 20, "lazy": False, "attack_steps": 1}
    pool = pool_of(net, rows, classes=count, quirks=(*quirks, "keep_failures"), **settings)
    labels = pool.take(9999).labels
    assert int(labels.max()) == classes - 1  # never above the ten of old
    assert float((labels == half).float().mean()) == pytest.approx(1 / classes, abs=0.03)


def test_noise_has_the_norms_of_first_adversaries_and_the_anchors_labels() -> None:
    model, rows = pictures()
    first = pool_of(model, rows, classes=3, n_adv=1, lazy=False)
    adversarial = first.take(99)
    norms = dict(
        zip(
            adversarial.index.tolist(),
            adversarial.inputs[DELTA].flatten(1).norm(dim=1),
            strict=True,
        )
    )
    pool = pool_of(model, rows, classes=3, n_adv=3, source="noise", attack_batch=4)
    batch = pool.take(99)
    assert len(batch) == 30
    length = batch.inputs[DELTA].flatten(1).norm(dim=1)
    wanted = torch.stack([norms[i] for i in batch.index.tolist()])
    assert bool((length <= wanted * (1 + 1e-9)).all())
    assert bool((length >= 0.7 * wanted).all())  # the box can only shorten
    pixels = batch.inputs["pixel_values"] + batch.inputs[DELTA]
    assert float(pixels.min()) >= -1e-9
    assert float(pixels.max()) <= 1 + 1e-9
    assert teacher_is_the_anchor(model, batch)
    rounds = batch.inputs[DELTA].flatten(1)
    cosine = functional.cosine_similarity(rounds[:, None], rounds[None], dim=2)
    assert float(cosine.fill_diagonal_(0).abs().max()) < 0.5


def test_noise_takes_the_median_norm_where_the_attack_failed() -> None:
    net = Net()
    rows = table(net, 16)
    settings: dict[str, Any] = {"n_adv": 1, "eps_features": 2.0, "lazy": False}
    kept = pool_of(net, rows, **settings, quirks=("keep_failures",))
    every, some = kept.take(99), pool_of(net, rows, **settings).take(99)
    hit = set(some.index.tolist())
    assert 3 < len(hit) < 16 == len(every)
    reached = some.inputs[DELTA].norm(dim=1).sort().values
    noise = pool_of(net, rows, **settings, source="noise").take(99)
    for index, delta in zip(noise.index.tolist(), noise.inputs[DELTA], strict=True):
        if index not in hit:
            length = float(delta.norm())
            low, high = reached[(len(hit) - 1) // 2], reached[len(hit) // 2]
            assert float(low) - 1e-9 <= length <= float(high) + 1e-9


def test_soft_labels_are_the_anchors_answers_in_eval_mode() -> None:
    model, rows = pictures()
    pool = pool_of(model, rows, classes=3, n_adv=3, adv_label="teacher", attack_batch=7)
    assert teacher_is_the_anchor(model, pool.take(16))
    assert teacher_is_the_anchor(model, pool.take(16))
    wet = Net(normed=True)
    noisy = pool_of(wet, table(wet, 9), n_adv=3, source="noise")
    assert teacher_is_the_anchor(wet, noisy.take(20))


def teacher_is_the_anchor(model: nn.Module, batch: Batch) -> bool:
    key = "pixel_values" if "pixel_values" in batch.inputs else "features"
    with engine.quiet(model), torch.no_grad():
        expected = model(**{key: batch.inputs[key] + batch.inputs[DELTA]}).softmax(dim=1)
    return bool((batch.inputs[TEACHER].double() - expected.double()).abs().max() < 1e-6)


def test_a_pool_that_never_succeeds_says_so() -> None:
    model = original("conv")
    for name in ("adv", "noise"):
        with pytest.raises(
            AttackFailed, match=r"none.*reached its target.*probability 0\.\d+.*raise eps"
        ):
            unlearn(model, conv_task(6), f"instance_wise.{name}", eps=1e-6)


def test_few_successes_are_a_warning() -> None:
    net = Net()
    rows = table(net, 16)
    settings: dict[str, Any] = {"n_adv": 2, "eps_features": 1.6, "adv_batch": 64, "max_steps": 3}
    result = unlearn(net, task_of(rows), "instance_wise.adv", **settings)
    attack = result.stats["attack"]
    assert 0 < attack["success"] < 0.2
    assert any("attacks" in line for line in result.stats["warnings"])
    assert attack["generated"] == 32
    assert attack["norm_max"] <= 1.6 * (1 + 1e-5)
    rms = attack["norm_mean"] / math.sqrt(COLUMNS)
    assert attack["rms_mean"] == pytest.approx(rms, rel=1e-5)


# --------------------------------------------------------------------------- corrections


def test_a_correction_is_given_drawn_or_second_best() -> None:
    net = Net()
    rows = table(net, 12)
    logits = engine.predict(net, rows).logits
    best = unlearn(net, task_of(rows), "instance_wise.relabel", relabel="second_best")
    assert best.targets is not None
    assert torch.equal(best.targets, logits.topk(2, dim=1).indices[:, 1])
    pairs = tuple(
        (int(i), (int(y) + 2) % CLASSES) for i, y in zip(rows.index, rows.labels, strict=True)
    )
    given = {"relabel": "given", "relabel_to": pairs[::-1]}
    mapped = unlearn(net, task_of(rows), "instance_wise.relabel", **given)
    assert mapped.targets is not None
    assert mapped.targets.tolist() == [label for _, label in pairs]
    found = engine.predict(mapped.model, rows).logits.argmax(dim=1)
    assert torch.equal(found, mapped.targets)
    raw = mapped.targets.numpy().astype("<i8").tobytes()
    assert mapped.stats["targets_sha256"] == hashlib.sha256(raw).hexdigest()
    assert not any(isinstance(value, Tensor) for value in mapped.stats.values())
    drawn = unlearn(net, task_of(rows), "instance_wise.relabel")
    expected = attacks.draw_targets(
        rows.labels, rows.index, CLASSES, seed=SEED, round=0, stream="relabel",
        predicted=logits.argmax(dim=1),
    )  # fmt: skip
    assert drawn.targets is not None
    assert torch.equal(drawn.targets, expected)
    assert unlearn(net, task_of(rows), "instance_wise.neggrad").targets is None


def test_a_tie_for_second_best_goes_to_the_lowest_class() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0], [1.0, 1.0, 1.0], [2.0, 5.0, 2.0], [9.0, 0.0, 1.0]])
    rows = Rows.of({"features": logits}, torch.tensor([0, 0, 1, 1]))
    found = method.new_labels(rows, logits, Settings(goal="relabel", relabel="second_best"), seed=0)
    assert found.tolist() == [1, 1, 0, 0]


def test_one_label_for_all_rows() -> None:
    net = Net()
    rows = table(net, 30)
    rows = rows.subset(torch.nonzero(rows.labels != 2)[:, 0])
    result = unlearn(net, task_of(rows), "instance_wise.relabel", relabel="given", relabel_to=2)
    assert result.stats["status"] == "reached"
    assert set(engine.predict(result.model, rows).logits.argmax(dim=1).tolist()) == {2}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (CLASSES, rf"0 to {CLASSES - 1}.*index \d+.*got {CLASSES}"),
        (-1, r"index \d+.*got -1"),
        ("own", r"other than the recorded.*index 100"),
        ("missing", r"a label for index 103"),
    ],
)
def test_a_label_that_cannot_be_given_is_refused(wanted: Any, message: str) -> None:
    net = Net()
    rows = table(net, 6)
    if wanted == "own":
        wanted = int(rows.labels[0])
    if wanted == "missing":
        pairs = [
            (int(i), (int(y) + 1) % CLASSES) for i, y in zip(rows.index, rows.labels, strict=True)
        ]
        wanted = tuple(pairs[:3] + pairs[4:])
    with pytest.raises(ValueError, match=message):
        unlearn(net, task_of(rows), "instance_wise.relabel", relabel="given", relabel_to=wanted)


# --------------------------------------------------------------------------- sequences


def later(first: nn.Module, past: list[Past], **more: Any) -> dict[str, Any]:
    return {"first_model": first, "past": past, "scenario": Scenario.SEQUENTIAL, **more}


def test_a_sequence_of_one_request_is_that_request() -> None:
    net = Net()
    rows = table(net, 8)
    alone = unlearn(net, task_of(rows), **FEW)
    for name in ("adv_imp", "continual"):
        one = unlearn(net, task_of(rows, **later(net, [])), f"instance_wise.{name}", **FEW)
        assert same(one.model, alone.model)
        assert one.stats.get("history_opened") in (None, 0)


@pytest.mark.parametrize("anchor", ["previous", "first"])
def test_every_request_is_held_to_its_anchor(anchor: str) -> None:
    first = Net()
    rows = table(first, 24)
    early, late = rows.subset(list(range(8))), rows.subset(list(range(8, 16)))
    done = unlearn(first, task_of(early), "instance_wise.adv", **FEW)
    past = [Past(early, done.stats)]
    result, seen = watched(done.model, late, task=later(first, past), anchor=anchor, lam=4.0, **FEW)
    held = done.model if anchor == "previous" else first
    reg = result.stats["curve"][0][4]
    assert (reg == 0) == (anchor == "previous")
    config = create("instance_wise", lam=4.0, **FEW).config
    again = steps_by_hand(done.model, late, config, iter(seen.stand_ins), late.labels, anchor=held)
    for name, tensor in again.model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], tensor, rtol=0, atol=1e-10)
    with torch.no_grad():
        batch = seen.stand_ins[0]
        found = held.eval()(batch.inputs["features"] + batch.inputs[DELTA]).argmax(dim=1)
    assert torch.equal(found, batch.labels)  # attacked at the anchor
    assert dict(result.read) == {Split.FORGET: 8}
    assert "history_opened" not in result.stats


@pytest.mark.parametrize("goal", ["misclassify", "relabel"])
def test_repair_keeps_earlier_requests_at_their_goal(goal: str) -> None:
    first = Net()
    rows = table(first, 18)
    relabel = goal == "relabel"
    parts = [rows.subset(list(range(a, a + 6))) for a in ((0, 6) if relabel else (0, 6, 12))]
    lost = {"none": 0, "repair": 0}
    for history in lost:
        model, past = first, list[Past]()
        for part in parts:
            task = task_of(part, **later(first, past))
            result = unlearn(
                model, task, "instance_wise.continual", **FEW, goal=goal, history=history, lam=2.0
            )
            model = result.model
            past = [*past, Past(part, result.stats, result.targets)]
            assert result.stats["status"] == "reached"
            for one in past:
                wanted = one.rows.labels if one.targets is None else one.targets
                found = engine.predict(model, one.rows).logits
                lost[history] += int((~met(found, wanted, goal)).sum())
            assert (result.targets is not None) == relabel
            assert result.targets is None or len(result.targets) == 6
            if history == "repair":
                assert result.stats["history_opened"] == len(past) - 1
                assert result.read[Split.FORGET] == 6 * len(past)
    assert lost["repair"] == 0
    assert lost["none"] > 0  # without it earlier instances come back, and that is to be seen


def test_second_best_is_that_of_the_first_model() -> None:
    first, now = Net(), Net(seed=5)
    rows = table(first, 12)
    task = task_of(rows, **later(first, []))
    settings = {"relabel": "second_best", "max_steps": 0}
    result = unlearn(now, task, "instance_wise.relabel", **settings)
    expected = engine.predict(first, rows).logits.topk(2, dim=1).indices[:, 1]
    assert result.targets is not None
    assert torch.equal(result.targets, expected)


# --------------------------------------------------------------------------- presets

ENTRY = load().methods["instance_wise"].entry
PUBLISHED: dict[str, Any] = {
    "ascent": "ce", "stop_margin": 0.0, "attack_step": 0.1, "attack_init": "noise",
    "attack_stop": None, "lr": 1e-3, "weight_decay": 1e-4, "max_grad_norm": None, "growth": 1.0,
    "max_epochs": 1001,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "adv_imp": {},
    "adv": {"lam": 0.0},
    "neggrad": {"source": "none", "lam": 0.0},
    "relabel": {"goal": "relabel", "source": "none", "lam": 0.0},
    "relabel_adv": {"goal": "relabel", "lam": 0.0},
    "relabel_adv_imp": {"goal": "relabel"},
    "l2sp": {"importance": "ones"},
    "imp": {"source": "none"},
    "noise": {"source": "noise", "lam": 0.0},
    "noise_imp": {"source": "noise"},
    "soft": {"adv_label": "teacher"},
    "continual": {"anchor": "first", "history": "repair"},
    "reference": PUBLISHED,
    "reference_adv": {**PUBLISHED, "lam": 0.0},
    "reference_neggrad": {**PUBLISHED, "lam": 0.0, "source": "none"},
}
DEFAULTS: dict[str, Any] = {
    "goal": "misclassify", "relabel": "random", "relabel_to": None, "ascent": "hinge",
    "stop_margin": None, "stop_fraction": 1.0, "source": "adversarial", "adv_label": "target",
    "n_adv": None, "eps": 4.0, "eps_embed": 1.0, "eps_features": 4.0, "attack_step": None,
    "attack_steps": 100, "attack_init": "zero", "attack_stop": 0.5, "attack_batch": None,
    "attack_dtype": "fp32", "lazy": True, "importance": "minmax", "importance_fn": "norm",
    "lam": 1.0, "lr": 3e-3, "momentum": 0.9, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "forget_batch": 32, "adv_batch": 256, "forget_weight": None, "growth": 1.5, "patience": 10,
    "max_weight": 0.95, "max_steps": 1000, "max_epochs": None, "trainable": None,
    "anchor": "previous", "history": "none", "quirks": (),
}  # fmt: skip


def test_the_defaults_are_the_declared_ones() -> None:
    assert dataclasses.asdict(create("instance_wise").config) == DEFAULTS
    assert dataclasses.asdict(Settings()) == DEFAULTS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_definition(preset: str) -> None:
    found = dataclasses.asdict(create(f"instance_wise.{preset}").config)
    without = {key: value for key, value in found.items() if key != "quirks"}
    expected = {key: value for key, value in {**DEFAULTS, **PRESETS[preset]}.items()}
    if preset.startswith("reference") and "max_epochs" not in PRESETS[preset]:
        raise AssertionError(preset)
    del expected["quirks"]
    # These have no effect without stand-ins, and are left at any value.
    inert = (
        {"attack_step", "attack_init", "attack_stop"} if preset == "reference_neggrad" else set()
    )
    assert {k: v for k, v in without.items() if k not in inert} == {
        k: v for k, v in expected.items() if k not in inert
    }


def test_presets_are_all_named_and_quirks_are_those_of_the_first_release() -> None:
    assert isinstance(ENTRY, MethodEntry)
    assert ENTRY.presets.keys() == PRESETS.keys()
    whole = {name: set(create(f"instance_wise.{name}").config.quirks) for name in PRESETS}
    shared = {"target_fallback", "unshuffled", "keep_failures", "partial_tail", "all_rows"}
    shared |= {"train_mode", "last_model"}
    assert whole["reference"] == shared | {"batch_importance"}
    assert whole["reference_adv"] == shared
    assert whole["reference_neggrad"] == {"all_rows", "train_mode", "last_model", "epoch_stop"}
    assert all(not quirks for name, quirks in whole.items() if not name.startswith("reference"))
    assert QUIRKS.keys() == shared | {"batch_importance", "ten_classes", "epoch_stop"}


@pytest.mark.parametrize(
    ("alias", "preset"), [("l2ul", "adv_imp"), ("l2ul_adv_imp", "adv_imp"), ("l2ul_adv", "adv")]
)
def test_an_alias_names_its_preset(alias: str, preset: str) -> None:
    assert create(alias).config == create(f"instance_wise.{preset}").config
    assert type(create(alias)) is type(create("instance_wise"))


def test_the_method_declares_what_it_needs() -> None:
    assert isinstance(ENTRY, MethodEntry)
    kind = type(create("instance_wise"))
    assert kind.needs == frozenset({Split.FORGET})
    assert {str(s) for s in kind.scenarios} == {"class", "subclass", "random", "sequential"}
    assert kind.supports_weights is False
    space = kind.search_space()
    assert space.keys() == {"lr", "lam", "attack_stop", "n_adv", "forget_weight"}
    low, high, scale = space["lr"]
    assert (high / low, scale) == (pytest.approx(100), "log")
    assert space["lam"][:2] == (0.1, 10.0)
    assert space["attack_stop"][:2] == (0.3, 0.9)
    assert space["n_adv"][:2] == (5, 200)
    fields = {f.name: f.metadata for f in dataclasses.fields(Settings)}
    for name in ("relabel", "relabel_to", "eps_embed", "eps_features", "attack_batch", "lazy"):
        assert fields[name]["inert"], name


@pytest.mark.parametrize("preset", ["reference", "reference_adv", "reference_neggrad"])
def test_the_reference_presets_run(preset: str) -> None:
    settings: dict[str, Any] = {"max_epochs": 1, "attack_steps": 40, "adv_batch": 64}
    result = unlearn(original("conv"), conv_task(8), f"instance_wise.{preset}", **settings)
    assert result.status == "ok"
    assert result.steps >= 1
    if preset == "reference":
        assert result.stats["importance"]["route"] == "batches"
    assert not torch.equal(result.model.stem[1].running_mean, original("conv").stem[1].running_mean)


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"eps": 0.0}, "eps"),
        ({"eps_embed": -1.0}, "eps_embed"),
        ({"eps_features": 0.0}, "eps_features"),
        ({"attack_step": 0.0}, "attack_step"),
        ({"attack_steps": 0}, "attack_steps"),
        ({"attack_stop": 1.0}, "attack_stop"),
        ({"attack_stop": -0.1}, "attack_stop"),
        ({"lr": -1e-3}, "lr"),
        ({"lam": -1.0}, "lam"),
        ({"lam": math.nan}, "lam"),
        ({"stop_fraction": 0.0}, "stop_fraction"),
        ({"stop_fraction": 1.1}, "stop_fraction"),
        ({"forget_weight": 0.0}, "forget_weight"),
        ({"forget_weight": 1.5}, "forget_weight"),
        ({"max_weight": 0.0}, "max_weight"),
        ({"max_weight": 1.2}, "max_weight"),
        ({"growth": 0.9}, "growth"),
        ({"patience": 0}, "patience"),
        ({"momentum": 1.0}, "momentum"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"n_adv": 0}, "n_adv"),
        ({"forget_batch": 0}, "forget_batch"),
        ({"adv_batch": 0}, "adv_batch"),
        ({"max_steps": -1}, "max_steps"),
        ({"goal": "forget"}, "goal"),
        ({"source": "retain"}, "source"),
        ({"relabel": "given"}, "relabel_to"),
        ({"relabel_to": 1}, "relabel=given"),
        ({"goal": "misclassify", "relabel": "given", "relabel_to": 1}, "goal=relabel"),
        ({"quirks": ("ten_classes",)}, "target_fallback"),
    ],
)
def test_a_setting_outside_its_range_is_refused_by_name(
    settings: dict[str, Any], names: str
) -> None:
    with pytest.raises(ValueError, match=names) as caught:
        create("instance_wise", **settings)
    assert isinstance(caught.value, ConfigError)


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="keep_failures"):
        create("instance_wise", quirks=("keep_failure",))
    with pytest.raises(ConfigError, match="patience"):
        create("instance_wise", patient=3)
    with pytest.raises(UnknownName, match="adv_imp"):
        create("instance_wise.adv_im")


def test_a_full_attack_that_cannot_reach_its_ball_is_refused() -> None:
    net = Net()
    settings: dict[str, Any] = {"attack_stop": None, "attack_steps": 3, "attack_step": 0.1}
    with pytest.raises(ValueError, match=r"steps.*eps"):
        unlearn(net, task_of(table(net, 6)), **settings)


def test_an_empty_request_and_one_with_a_row_twice_are_refused() -> None:
    net = Net()
    rows = table(net, 6)
    with pytest.raises(ForgetSetError, match="forget"):
        unlearn(net, task_of(rows.subset([])))
    with pytest.raises(ValueError, match=r"twice|duplicate|100"):
        unlearn(net, task_of(rows.subset([0, 1, 0])))


@pytest.mark.parametrize("label", [-1, CLASSES, 40])
def test_a_label_outside_the_classes_is_refused_with_its_place(label: int) -> None:
    net = Net()
    rows = table(net, 6)
    labels = rows.labels.clone()
    labels[3] = label
    with pytest.raises(ValueError, match=rf"{label}"):
        unlearn(net, task_of(rows.relabelled(labels)))


def test_a_label_that_the_logits_lack_is_refused() -> None:
    net = Net(4)
    rows = table(net, 6)
    labels = rows.labels.clone()
    labels[3] = 4  # of the five classes that the task speaks of
    for name in ("adv_imp", "neggrad"):
        with pytest.raises(ValueError, match="4"):
            unlearn(net, task_of(rows.relabelled(labels)), f"instance_wise.{name}")


class OneLogit(Net):
    def __init__(self) -> None:
        super().__init__(1)


def test_a_head_of_one_logit_is_not_applicable() -> None:
    net = OneLogit()
    rows = table(Net(), 6)
    for name in ("neggrad", "adv_imp"):
        with pytest.raises(NotApplicable, match="two classes"):
            unlearn(net, task_of(rows), f"instance_wise.{name}")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["neggrad", "adv_imp"])
def test_an_original_whose_logits_are_not_finite_is_never_forgotten(
    name: str, value: float
) -> None:
    net = Net()
    rows = table(net, 6)
    net.head.bias.data[0] = value
    with pytest.raises(UnscError, match="finite"):
        create(f"instance_wise.{name}").prepared(net, task_of(rows), SEED)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_idle_weight_that_is_not_finite_is_refused(value: float) -> None:
    net = Net()
    rows = table(net, 6)
    net.idle = nn.Parameter(torch.tensor([value], dtype=DOUBLE))
    with pytest.raises(ValueError, match="finite") as caught:
        create("instance_wise.neggrad").unlearn(net, task_of(rows), SEED)
    assert isinstance(caught.value, UnscError)


@pytest.mark.parametrize("offset", [-0.01, 0.01])
def test_pixels_outside_the_unit_interval_are_refused(offset: float) -> None:
    model, rows = pictures()
    pixels = rows.storage["pixel_values"].clone()
    pixels[0, 0, 0, 0] = -0.01 if offset < 0 else 1.01
    wrong = Rows.of({"pixel_values": pixels}, rows.labels, rows.index)
    with pytest.raises(InputDomainError, match="normalisation happens inside"):
        unlearn(model, task_of(wrong, num_classes=3, modality="image"))
    result = unlearn(
        model, task_of(wrong, num_classes=3, modality="image"), "instance_wise.neggrad"
    )
    assert result.stats["status"] == "reached"


def test_a_model_that_takes_normalised_pixels_is_refused() -> None:
    model, rows = pictures()
    model = copy.deepcopy(model)
    model.pixel_domain = False
    with pytest.raises(InputDomainError, match="mean/std"):
        unlearn(model, task_of(rows, num_classes=3, modality="image"))


def test_dark_pictures_are_a_warning() -> None:
    model, rows = pictures()
    pixels = rows.storage["pixel_values"] / 25
    dark = Rows.of({"pixel_values": pixels}, rows.labels, rows.index)
    task = task_of(dark, num_classes=3, modality="image")
    result = unlearn(model, task, max_steps=0)
    assert any("scaled twice" in line for line in result.stats["warnings"])
    plain = unlearn(model, task_of(rows, num_classes=3, modality="image"), max_steps=1)
    assert not any("scaled twice" in line for line in plain.stats.get("warnings", []))


def test_soft_weights_are_refused() -> None:
    net = Net()
    rows = table(net, 6)
    train = Rows.of(dict(rows.storage), rows.labels)
    weights = Weights(torch.tensor([-0.5, 0, 0, 0, 0, 0], dtype=DOUBLE))
    common: dict[str, Any] = {"num_classes": CLASSES, "recipe": Recipe()}
    task = UnlearningTask.from_weights(train, weights, fresh_model=lambda _: net, **common)
    with pytest.raises(WeightsNotSupported, match="soft"):
        unlearn(net, task)


def test_inputs_that_cannot_be_attacked_are_refused_before_anything_moves() -> None:
    class Named(Net):
        def forward(self, series: Tensor) -> Tensor:
            return super().forward(series)

    net = Named()
    plain = table(Net(), 6)
    rows = Rows.of({"series": plain.storage["features"]}, plain.labels)
    with pytest.raises(NotApplicable, match="expected exactly one"):
        create("instance_wise").prepared(net, task_of(rows), SEED)
    assert unlearn(net, task_of(rows), "instance_wise.neggrad").stats["status"] == "reached"


def test_tables_without_a_number_are_not_applicable_and_categories_stay() -> None:
    net = Net()
    rows = table(net, 12)
    net.feature_numeric = torch.zeros(COLUMNS, dtype=torch.bool)
    with pytest.raises(NotApplicable, match="numeric"):
        create("instance_wise").prepared(net, task_of(rows), SEED)
    net.feature_numeric[:4] = True
    _, seen = watched(net, rows, "instance_wise.adv", **FEW, max_steps=2)
    delta = seen.stand_ins[0].inputs[DELTA]
    assert not delta[:, 4:].any()
    assert delta[:, :4].any()


def test_no_parameter_to_move_is_refused_with_the_globs() -> None:
    net = Net()
    rows = table(net, 6)
    with pytest.raises(ValueError, match="tail") as caught:
        unlearn(net, task_of(rows), trainable=("tail.*",))
    assert isinstance(caught.value, ConfigError)
    with pytest.raises(ValueError, match="requires a gradient"):
        unlearn(net.requires_grad_(False), task_of(rows))


def test_repair_outside_a_sequence_is_refused() -> None:
    net = Net()
    with pytest.raises(ValueError, match="history=repair"):
        unlearn(net, task_of(table(net, 6)), history="repair")


def test_unbounded_ascent_in_half_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    monkeypatch.setattr(method, "precision", lambda _: "fp16")
    with pytest.raises(ValueError, match="fp16"):
        unlearn(net, task_of(table(net, 6)), "instance_wise.neggrad", ascent="ce")


def test_half_precision_asks_for_a_larger_margin(fresh_accelerate: None) -> None:
    device = engine.accelerator("cpu", "bf16")
    net = Net().float()
    with torch.no_grad():
        rows = table(Net(), 8)
    inputs = {"features": rows.storage["features"].float()}
    rows = Rows.of(inputs, engine.predict(net, Rows.of(inputs, rows.labels)).logits.argmax(dim=1))
    result = unlearn(net, task_of(rows, accelerator=device), **FEW)
    assert result.stats["stop_margin"] == 0.5
    assert result.stats["status"] == "reached"
    assert unlearn(net, task_of(rows), **FEW, max_steps=0).stats["stop_margin"] == 0.1


@pytest.mark.parametrize("kind", [Scenario.CLASS, Scenario.SUBCLASS])
def test_a_request_for_a_whole_class_is_a_warning(kind: Scenario) -> None:
    task = request(problem("conv"), kind)
    result = unlearn(original("conv"), task, max_steps=0)
    assert any("scattered" in line for line in result.stats["warnings"])


def test_two_classes_run_with_a_warning() -> None:
    net = Net(2)
    rows = table(net, 10)
    result = unlearn(net, task_of(rows, num_classes=2), **FEW)
    assert result.stats["status"] == "reached"
    assert any("two classes" in line for line in result.stats["warnings"])


def test_a_single_instance_is_enough() -> None:
    net = Net()
    result, seen = watched(net, table(net, 1), adv_batch=16)
    assert result.stats["status"] == "reached"
    assert len({int(label) for label in seen.stand_ins[0].labels}) > 2


# --------------------------------------------------------------------------- what is noted


def test_what_a_run_notes() -> None:
    net = Net()
    result = unlearn(net, task_of(table(net, 12)), **FEW)
    stats = result.stats
    wanted = {"status", "steps", "k", "k_already", "forgotten", "goal", "stop_margin", "w_final"}
    wanted |= {"lam_final", "attack", "importance", "curve", "dist", "seconds"}
    assert wanted <= stats.keys()
    assert "cap_reason" not in stats
    assert {"generated", "used", "success", "norm_mean", "norm_max", "rms_mean", "image_steps"} <= (
        stats["attack"].keys()
    )
    assert {"route", "mean", "median", "share_below_half", "constant_tensors"} == (
        stats["importance"].keys()
    )
    assert {"attack", "importance", "optimise"} == stats["seconds"].keys()
    assert all(value >= 0 for value in stats["seconds"].values())
    assert stats["attack"]["used"] == result.steps * 16
    assert all(len(row) == 7 for row in stats["curve"])


def test_prepared_work_is_used_again_and_gives_the_same_weights() -> None:
    net = Net(normed=True)
    task = task_of(table(net, 12))
    for name in ("adv_imp", "soft"):
        made = create(f"instance_wise.{name}", **FEW)
        state = made.prepared(net, task, SEED)
        one, two = (made.unlearn(net, task, SEED, prepared=state).model for _ in range(2))
        assert same(one, two)
        assert same(one, made.unlearn(net, task, SEED).model)


def test_micro_batches_change_only_the_rounding() -> None:
    net = Net()
    rows = table(net, 12)
    settings = {**FEW, "max_steps": 20}
    whole = unlearn(net, task_of(rows), **settings)
    parts = unlearn(net, task_of(rows, micro_batches=4), **settings)
    for one, two in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
