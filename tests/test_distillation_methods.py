"""`scrub` and `bad_teaching` against loops written out by hand, and what their teachers may do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_runs import EIGHTHS, PLAIN, SAME, SEED, Logistic, differing, state, table, unlearn

from unsc_plugin import engine
from unsc_plugin.conformance._nets import journal
from unsc_plugin.conformance._toys import FULL, SHORT, original, problem, request, split
from unsc_plugin.errors import ConfigError, ForgetSetError
from unsc_plugin.method import Budget, UnlearningTask, Weights
from unsc_plugin.methods import _teachers, bad_teaching, scrub
from unsc_plugin.registry import create
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Scenario, Split

torch.set_num_threads(1)

# --------------------------------------------------------------------------- a model in float64


def logistic_task(weights: Weights | None = None, **more: Any) -> UnlearningTask:
    more = {"recipe": PLAIN, "fresh_model": lambda _: Logistic(1)} | more
    return request(problem("mlp"), Scenario.RANDOM, weights=weights, **more)


def streams(weights: Weights | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return inputs, labels and weights of the forget stream and of the retained one."""
    inputs, labels, *masses = table(weights)
    made = []
    for mass in masses:
        at = torch.nonzero(mass > 0)[:, 0]
        made.append((inputs[at], labels[at], mass[at]))
    return made[0], made[1]


def kl(q: Tensor, p: Tensor) -> Tensor:
    """Return Σ q log(q/p) of probabilities, row by row."""
    return (q * (q / p).log()).sum(1)


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-9, atol=1e-10)


# --------------------------------------------------------------------------- the divergence


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_that_of_the_tempered_probabilities(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    expected = kl((teacher / temperature).softmax(1), (student / temperature).softmax(1))
    found = _teachers.divergence(teacher, student, temperature)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert bool((found > 0).all())


def test_the_divergence_of_huge_logits_is_finite_and_zero_at_equality() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0]], requires_grad=True)
    found = _teachers.divergence(logits.detach(), logits)
    found.sum().backward()
    assert found.item() == 0
    assert float(logits.grad.abs().max()) <= 1e-6
    other = _teachers.divergence(logits.detach().flip(1), logits)
    assert math.isfinite(other.item())


def test_half_precision_is_widened() -> None:
    logits = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert _teachers.divergence(logits, logits.flip(1)).dtype == torch.float32


# --------------------------------------------------------------------------- scrub


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_scrub_without_teacher_and_forget_pass_is_finetune(net: str) -> None:
    alone = unlearn("scrub", net, settings=SAME | {"msteps": 0, "gamma": 1.0, "alpha": 0.0})
    assert differing(state(alone), state(unlearn("finetune", net, settings=SAME))) == []


def reference_scrub(weights: Weights | None, epochs: int, msteps: int) -> Logistic:
    """Return the student after full-batch gradient descent, one loss after the other, by hand."""
    student, teacher = Logistic(0), Logistic(0)
    forget, retain = streams(weights)
    heat, alpha, gamma = 3.0, 0.2, 0.7
    for epoch in range(1, epochs + 1):
        rate = 0.05
        rate *= 0.1 if epoch > math.ceil(Fraction(6, 10) * epochs) else 1
        rate *= 0.1 if epoch > math.ceil(Fraction(9, 10) * epochs) else 1
        passes = [(forget, True)] if epoch <= msteps else []
        for (x, y, w), away in [*passes, (retain, False)]:
            z = student(features=x)
            with torch.no_grad():
                q = (teacher(features=x) / heat).softmax(1)
            distilled = heat**2 * kl(q, (z / heat).softmax(1))
            ce = -z.log_softmax(1)[torch.arange(len(y)), y]
            losses = -distilled if away else gamma * ce + alpha * distilled
            gradients = torch.autograd.grad((w * losses).sum() / len(w), [*student.parameters()])
            with torch.no_grad():
                for p, g in zip(student.parameters(), gradients, strict=True):
                    p -= rate * g
    return student


@pytest.mark.parametrize("weights", [None, EIGHTHS], ids=["sets", "soft"])
@pytest.mark.parametrize(("epochs", "msteps"), [(2, 1), (4, 2), (5, 3)])
def test_scrub_follows_the_published_loop(
    epochs: int, msteps: int, weights: Weights | None
) -> None:
    settings = {"alpha": 0.2, "gamma": 0.7, "temperature": 3.0, "lr": 0.05}
    method = create("scrub", epochs=epochs, msteps=msteps, forget_batch_size=1000, **settings)
    found = method.unlearn(Logistic(0), logistic_task(weights), SEED).model
    assert_close(found, reference_scrub(weights, epochs, msteps))


@pytest.mark.parametrize(
    ("epochs", "msteps", "passes"),
    [(0, 2, 0), (1, 0, 0), (1, 2, 1), (2, 2, 1), (3, 2, 2), (5, 1, 1), (5, 9, 4)],
)
def test_scrub_makes_exactly_so_many_forget_passes(epochs: int, msteps: int, passes: int) -> None:
    settings = {"epochs": epochs, "msteps": msteps, "forget_batch_size": 7, "batch_size": 20}
    result = unlearn("scrub", settings=settings)
    assert result.stats["forget_passes"] == passes
    assert result.steps == passes * 4 + epochs * 4  # ⌈24/7⌉ and ⌈72/20⌉
    assert result.read == {Split.FORGET: passes * 24, Split.RETAIN: epochs * 72}


def test_the_first_forget_step_of_scrub_has_nothing_to_climb() -> None:
    result = unlearn("scrub", settings={"epochs": 1, "gamma": 0.0, "alpha": 0.0}, recipe=PLAIN)
    assert abs(result.losses[0]) <= 1e-7
    gaps = [
        (p - q).abs().max().item()
        for p, q in zip(result.model.parameters(), original("mlp").parameters(), strict=True)
    ]
    assert max(gaps) <= 1e-6  # steps of gradients ≤ 1e-6 at rate 1.5e-3
    moved = unlearn("scrub", settings={"epochs": 1})
    assert differing(state(moved), original("mlp").state_dict())


def test_scrub_moves_away_from_its_teacher_on_forget_rows() -> None:
    far = {"epochs": 4, "lr": 0.05, "msteps": 3, "forget_batch_size": 4, "batch_size": 16}
    with_pass, without = (
        unlearn("scrub", settings=far | {"msteps": count}).model for count in (3, 0)
    )
    rows = problem("mlp").train.subset(split(problem("mlp").train, Scenario.RANDOM)[0])
    teacher, *students = (
        engine.predict(model, rows).logits for model in (original("mlp"), with_pass, without)
    )
    gaps = [float(_teachers.divergence(teacher, logits).mean()) for logits in students]
    assert gaps[0] > gaps[1]


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 7, 10, 15, 20, 35, 70])
def test_the_rate_of_scrub_falls_twice(epochs: int) -> None:
    marks = [math.ceil(Fraction(tenths, 10) * epochs) for tenths in (6, 9)]
    factor = scrub.decay(epochs)
    for done in range(epochs):
        expected = 0.1 ** sum(done >= mark for mark in marks)
        assert factor(done) == factor(done + 0.97) == expected


def test_only_retain_passes_of_scrub_move_running_statistics() -> None:
    still = {"epochs": 2, "lr": 1e-30}
    retain_only = dict(unlearn("finetune", "conv", settings=still).model.named_buffers())
    quiet = unlearn("scrub", "conv", settings=still)
    assert differing(dict(quiet.model.named_buffers()), retain_only) == []
    moving = unlearn("scrub", "conv", settings=still | {"move_statistics": True})
    assert differing(dict(moving.model.named_buffers()), retain_only)


# --------------------------------------------------------------------------- scrub.rewind

FAST = {"epochs": 5, "lr": 0.01, "msteps": 3, "forget_batch_size": 4, "batch_size": 16}


def error(model: nn.Module, rows: Rows) -> float:
    found = engine.predict(model, rows)
    return float((found.logits.argmax(1) != found.labels).double().mean())


@pytest.mark.parametrize("scenario", [Scenario.RANDOM, Scenario.CLASS])
def test_rewind_returns_the_checkpoint_nearest_to_the_validation_error(scenario: Any) -> None:
    data = problem("mlp")
    forget = data.train.subset(split(data.train, scenario)[0])
    known = data.val.subset(torch.isin(data.val.labels, forget.labels))
    models = [original("mlp")] + [
        unlearn("scrub", settings=FAST, scenario=scenario, budget=Budget(epochs=count)).model
        for count in range(1, 6)
    ]
    errors, reference = [error(model, forget) for model in models], error(models[-1], known)
    nearest = min(range(6), key=lambda at: (abs(errors[at] - reference), at))
    result = unlearn("scrub.rewind", settings=FAST, scenario=scenario)
    assert result.stats["forget_errors"] == pytest.approx(errors)
    assert result.stats["reference_error"] == pytest.approx(reference)
    assert result.stats["rewound_to"] == nearest
    assert differing(state(result), models[nearest].state_dict()) == []
    assert len(set(errors)) > 2  # or any choice would do


def test_rewind_without_epochs_returns_the_original() -> None:
    result = unlearn("scrub.rewind", "conv", settings={"epochs": 0})
    assert differing(state(result), original("conv").state_dict()) == []
    assert result.stats["rewound_to"] == 0


def test_rewind_knows_a_model_that_a_limit_left_within_an_epoch() -> None:
    result = unlearn("scrub.rewind", settings=FAST, budget=Budget(steps=8))
    assert result.status == "budget"
    assert len(result.stats["forget_errors"]) == 2  # θ_O, and six forget and two retain steps


def test_validation_rows_are_opened_for_a_rewind_only() -> None:
    assert Split.VAL not in unlearn("scrub").read
    assert unlearn("scrub.rewind").read[Split.VAL] == len(problem("mlp").val)
    unlearn("scrub", val=problem("mlp").val.subset(torch.arange(0)))


def test_rewind_needs_a_validation_row_of_the_forgotten_label() -> None:
    val = problem("mlp").val
    others = val.subset(val.labels != 0)
    with pytest.raises(ValueError, match="label of the forget set"):
        unlearn("scrub.rewind", scenario=Scenario.CLASS, val=others)
    with pytest.raises(ForgetSetError, match="val"):
        unlearn("scrub.rewind", val=val.subset(torch.arange(0)))


# --------------------------------------------------------------------------- bad teaching


def test_an_incompetent_teacher_that_is_competent_teaches_nothing() -> None:
    model = original("mlp")
    fresh: Callable[[int], nn.Module] = lambda _: original("mlp")  # noqa: E731
    result = unlearn("bad_teaching", settings={"epochs": 1}, fresh_model=fresh)
    assert abs(result.losses[0]) <= 1e-7
    rows = problem("mlp").train
    batch = bad_teaching.two_streams(
        *(rows.subset(part) for part in split(rows, Scenario.RANDOM))
    ).gather(torch.arange(96))
    taught = bad_teaching.targets(original("mlp"), fresh(0), batch)
    loss = _teachers.divergence(taught, model(**batch.inputs)).mean()
    loss.backward()
    assert abs(loss.item()) <= 1e-7
    assert max(float(p.grad.abs().max()) for p in model.parameters()) <= 1e-6


@pytest.mark.parametrize("origins", [[0, 0, 0], [1, 1, 1], [1, 0, 1]])
def test_every_row_has_its_own_teacher(origins: list[int]) -> None:
    batch = problem("mlp").train.relabelled(torch.tensor(origins * 32)).gather(torch.arange(3))
    good, bad = Logistic(0), Logistic(1)
    found = bad_teaching.targets(good, bad, batch)
    for row, origin in enumerate(origins):
        wanted = (bad if origin else good)(**batch.inputs)[row]
        torch.testing.assert_close(found[row], wanted)
    assert not found.requires_grad


@pytest.mark.parametrize("weights", [None, EIGHTHS], ids=["sets", "soft"])
@pytest.mark.parametrize(("heat", "factor"), [(1.0, 1.0), (2.0, 5.0)])
def test_the_loss_of_bad_teaching_is_that_of_both_streams(
    heat: float, factor: float, weights: Weights | None
) -> None:
    settings = {"retain_share": 1.0, "temperature": heat, "forget_weight": factor, "epochs": 2}
    method = create("bad_teaching", lr=0.1, **settings)
    result = method.unlearn(Logistic(0), logistic_task(weights), SEED)
    (x, _, r), (inputs, _, a) = streams(weights)
    good, bad, student = Logistic(0), Logistic(1), Logistic(0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1, weight_decay=0.0)
    for step in range(2):
        gone = kl((bad(features=x) / heat).softmax(1), (student(features=x) / heat).softmax(1))
        kept = kl(
            (good(features=inputs) / heat).softmax(1), (student(features=inputs) / heat).softmax(1)
        )
        loss = (factor * (r * gone).sum() + (a * kept).sum()) / (len(r) + len(a))
        assert result.losses[step] == pytest.approx(loss.item(), rel=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(result.model.head.weight, student.head.weight, rtol=1e-6, atol=1e-7)


def test_the_teachers_stay_as_they_were() -> None:
    fresh = problem("conv").build(0)
    before = copy.deepcopy(fresh.state_dict())
    with journal() as book:
        task = request(problem("conv"), Scenario.RANDOM, fresh_model=lambda _: fresh)
        result = create("bad_teaching", epochs=2, lr=0.01).unlearn(original("conv"), task, SEED)
    assert differing(fresh.state_dict(), before) == []
    assert not any(module.training for module in fresh.modules())
    assert not any(p.requires_grad for p in fresh.parameters())
    [good] = [c for c in book.copies[1:] if c.model is not result.model]
    assert differing(good.model.state_dict(), original("conv").state_dict()) == []
    storages = [
        {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        for model in (result.model, good.model, fresh)
    ]
    assert len(set.union(*storages)) == sum(map(len, storages))
    moved = dict(result.model.named_buffers())
    assert differing(moved, dict(original("conv").named_buffers())) == list(moved)


@pytest.mark.parametrize(("share", "rows"), [(0.0, 0), (0.3, 22), (1.0, 72)])
def test_the_stream_has_a_share_of_the_retain_set(share: float, rows: int) -> None:
    settings = {"retain_share": share, "epochs": 3, "batch_size": 10}
    result = unlearn("bad_teaching", settings=settings)
    assert result.steps == 3 * -(-(24 + rows) // 10)
    assert result.work == 3 * (24 + rows) * 4  # the student with gradient, one teacher without


def test_the_share_is_drawn_once_from_the_seed() -> None:
    seen: list[set[int]] = []
    rows = problem("mlp").train
    for seed in (0, 0, 1):
        seen.append(set())

        def decode(positions: Tensor) -> dict[str, Tensor]:
            seen[-1].update(positions.tolist())
            return {key: column[positions] for key, column in rows.storage.items()}

        noting = Rows.of({}, rows.labels, rows.index, decode=decode)
        unlearn("bad_teaching", settings={"epochs": 3}, seed=seed, train=noting)
    assert len(seen[0]) == 24 + 22
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


@pytest.mark.parametrize(
    ("lr", "settings", "rate"),
    [
        (0.3, {}, 1e-4),
        (5e-4, {}, 5e-5),
        (5e-4, {"lr_scale": 0.01}, 5e-6),
        (0.3, {"lr": 0.02}, 0.02),
    ],
)
def test_the_rate_of_bad_teaching(lr: float, settings: Any, rate: float) -> None:
    recipe = PLAIN.model_copy(update={"lr": lr})
    task = logistic_task(recipe=recipe)
    model = create("bad_teaching", epochs=1, **settings).unlearn(Logistic(0), task, SEED).model
    step = (model.head.weight - Logistic(0).head.weight).abs().max()
    assert step.item() == pytest.approx(rate, rel=1e-3)  # Adam's first step is the rate


def test_the_streisand_control_trains_three_times_as_long() -> None:
    plain, control = (unlearn(n, recipe=FULL) for n in ("bad_teaching", "bad_teaching.streisand"))
    assert control.epochs == 3 * plain.epochs
    assert unlearn("bad_teaching.streisand", settings={"epochs": 2}).epochs == 2


def test_the_streisand_control_is_less_sure_than_a_retrained_model() -> None:
    rows = problem("mlp").train
    forget = rows.subset(split(rows, Scenario.RANDOM)[0])
    control = unlearn("bad_teaching.streisand", settings={"lr": 0.01, "epochs": 12}, recipe=FULL)
    retrained = unlearn("retrain", recipe=FULL)
    sure = [
        float(engine.predict(r.model, forget).logits.softmax(1).max(1).values.mean())
        for r in (control, retrained)
    ]
    assert sure[0] < sure[1]


# --------------------------------------------------------------------------- both


@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize("name", ["scrub", "bad_teaching"])
def test_no_epochs_is_the_identity(name: str, net: str) -> None:
    result = unlearn(name, net, settings={"epochs": 0})
    assert differing(state(result), original(net).state_dict()) == []
    assert result.steps == 0


@pytest.mark.parametrize("name", ["scrub", "bad_teaching"])
def test_a_loss_that_is_not_finite_ends_the_run(name: str) -> None:
    data = problem("mlp").train
    nan = Rows.of({"features": torch.full_like(data.storage["features"], torch.nan)}, data.labels)
    result = unlearn(name, train=nan)
    assert result.status == "diverged"
    assert "nan" in result.reason
    assert differing(state(result), original("mlp").state_dict()) == []


BAD: list[tuple[str, dict[str, Any], str]] = [
    *[(name, {"epochs": -1}, "epochs") for name in ("scrub", "bad_teaching")],
    *[(name, {"lr": 0.0}, "lr") for name in ("scrub", "bad_teaching")],
    *[(name, {"temperature": 0.0}, "temperature") for name in ("scrub", "bad_teaching")],
    ("scrub", {"alpha": -0.1}, "alpha"),
    ("scrub", {"gamma": -0.1}, "gamma"),
    ("scrub", {"msteps": -1}, "msteps"),
    ("scrub", {"forget_batch_size": 0}, "forget_batch_size"),
    ("scrub", {"optimizer": "lion"}, "optimizer"),
    ("scrub", {"mstep": 2}, "msteps"),
    ("bad_teaching", {"retain_share": 1.1}, "retain_share"),
    ("bad_teaching", {"forget_weight": -1.0}, "forget_weight"),
    ("bad_teaching", {"epochs_factor": 0}, "epochs_factor"),
    ("bad_teaching", {"retain_shares": 0.3}, "retain_share"),
]


@pytest.mark.parametrize(("name", "settings", "field"), BAD)
def test_bad_settings_are_refused_by_name(name: str, settings: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        create(name, **settings)


@pytest.mark.parametrize("name", ["scrub", "bad_teaching"])
def test_missing_splits_and_other_preparations_are_refused(name: str) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    for part in (0, 1):
        positions = [*split(problem("mlp").train, Scenario.RANDOM)]
        positions[part] = nothing
        with pytest.raises(ForgetSetError, match=("forget", "retain")[part]):
            unlearn(name, positions=tuple(positions))
    method, task = create(name), request(problem("mlp"), Scenario.RANDOM, recipe=SHORT)
    prepared = method.prepared(original("mlp"), task, SEED)
    with pytest.raises(ConfigError, match="another model"):
        method.unlearn(original("mlp", epochs=1), task, SEED, prepared)
