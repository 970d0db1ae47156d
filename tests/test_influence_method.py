"""`influence`: every solver against its formula in dense matrices; sets and weights; refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import synthetic_bias as bias
import torch
from conftest import Mlp
from test_influence import Deep, Dense, Linear, close, drawn, eye, rows_of, seeded

from unsc_plugin.errors import ConfigError, ForgetSetError, NotApplicable
from unsc_plugin.method import Recipe, Split, UnlearningTask, Weights
from unsc_plugin.methods.influence import recursion, weighted_rows
from unsc_plugin.registry import create
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Scenario, derive

torch.set_num_threads(1)
DOUBLE = torch.float64
N, GONE, SEED = 14, 4, 11
RECIPE = Recipe(epochs=1, lr=0.1, weight_decay=0.05, batch_size=5)


def task_of(rows, eps=None, gone=GONE, **changes):
    """Return a request on sets, the first `gone` rows to be forgotten, or on weights."""
    common = {
        "num_classes": 3,
        "recipe": RECIPE,
        "fresh_model": lambda _: seeded(Linear),
        **changes,
    }
    if eps is not None:
        weights = Weights(torch.as_tensor(eps, dtype=DOUBLE))
        return UnlearningTask.from_weights(rows, weights, scenario=Scenario.WEIGHTED, **common)
    positions = torch.arange(len(rows))
    return UnlearningTask(
        forget=rows.subset(positions[:gone]), retain=rows.subset(positions[gone:]), **common
    )


def unlearned(model, task, **settings):
    result = create("influence", **settings).unlearn(model, task, SEED)
    assert result.status == "ok"
    json.dumps(dict(result.stats), allow_nan=False)
    return result


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.fixture(params=[None, "soft"], ids=["sets", "weights"])
def case(request):
    """A linear model with its gradients, GGN and weights e; θ is the weight, then the bias."""
    model, rows = seeded(Linear), rows_of(N)
    e = torch.zeros(N, dtype=DOUBLE)
    e[:GONE] = -1
    if request.param:
        e = (0.6 * drawn(N)).clamp(-1, 1)
        e[5] = -1
    task = task_of(rows, e if request.param else None)
    dense = Dense(model, ["head.weight", "head.bias"], 3)
    return model, task, e, dense, rows


SCOPES = ["head", "full"]


def mean_direction(dense, rows, e):
    """Return v of the mean form from its definition."""
    gradients, a = dense.gradients(dense.theta, rows), (1 + e).clamp(min=0)
    lost = -(e @ gradients) / N
    return lost + e.sum() / (N * a.sum()) * (a @ gradients)


@pytest.mark.parametrize("scope", SCOPES)
def test_conjugate_gradients_solve_the_damped_mean_curvature(case, scope):
    model, task, e, dense, rows = case
    found = unlearned(model, task, solver="cg", scope=scope, damping=0.02, alpha=0.7)
    matrix = dense.ggn(dense.theta, rows, torch.ones(N)) / N + 0.02 * eye(len(dense.theta))
    step = torch.linalg.solve(matrix, mean_direction(dense, rows, e))
    close(flat(found.model), dense.theta + 0.7 * step, 1e-8)


def test_the_damping_of_the_mean_curvature_is_never_raised():
    model, small = seeded(Linear), rows_of(N)
    rows = Rows.of({"features": 30 * small.storage["features"]}, small.labels)
    e = torch.cat([-torch.ones(GONE), torch.zeros(N - GONE)]).double()
    found = unlearned(model, task_of(rows), solver="cg", scope="head", damping=0.02)
    dense = Dense(model, ["head.weight", "head.bias"], 3)
    matrix = dense.ggn(dense.theta, rows, torch.ones(N)) / N + 0.02 * eye(len(dense.theta))
    step = torch.linalg.solve(matrix, mean_direction(dense, rows, e))
    close(flat(found.model), dense.theta + step, 1e-7)


@pytest.mark.parametrize("scope", SCOPES)
def test_recursion_is_the_loop_over_drawn_retained_rows(case, scope):
    model, task, e, dense, rows = case
    found = unlearned(model, task, scope=scope, samples=6, alpha=0.3)
    kept = [j for j in range(N) if float(e[j]) > -1]
    generator = torch.Generator().manual_seed(derive(SEED, "method"))
    order = [kept[i] for i in torch.randperm(len(kept), generator=generator)[:6].tolist()]
    gradients = dense.gradients(dense.theta, rows)
    k, o = mean_direction(dense, rows, e), gradients[order[0]]
    for j in order[1:]:
        tau = float(o @ gradients[j])
        k = k - float(k @ gradients[j]) / (6 + tau) * o
        o = o - tau / (6 + tau) * o
    close(flat(found.model), dense.theta + 0.3 * k)
    assert found.stats["samples"] == 6


def test_fewer_retained_rows_than_samples_are_all_used():
    rows = rows_of(N)
    found = unlearned(seeded(Linear), task_of(rows), samples=1000)
    assert found.stats["samples"] == N - GONE
    ones = torch.ones(2, dtype=DOUBLE)
    close(recursion(ones, lambda number: [ones, 2 * ones][number], 2), ones - 4 / 6 * ones)


@pytest.mark.parametrize("scope", SCOPES)
def test_influence_function_in_sum_form(case, scope):
    model, task, e, dense, rows = case
    solver = "exact" if scope == "head" else "auto"
    found = unlearned(model, task, solver=solver, scope=scope, alpha=0.9, damping=0.0)
    ridge = N * 0.05 * eye(len(dense.theta))
    matrix = dense.ggn(dense.theta, rows, torch.ones(N)) + ridge
    step = torch.linalg.solve(matrix, e @ dense.gradients(dense.theta, rows))
    close(flat(found.model), dense.theta - 0.9 * step, 1e-8)
    assert found.stats["ridge"] == pytest.approx(N * 0.05)
    assert found.stats["curvature"]["kind"] == "exact"  # the head is all of the model
    assert found.stats["stationarity"] > 0.01


@pytest.mark.parametrize("steps", [1, 3])
def test_newton_takes_steps_on_the_tilted_weighted_objective(case, steps):
    model, task, e, dense, rows = case
    found = unlearned(model, task, solver="auto", scope="head", mode="newton", steps=steps)
    theta, ridge = dense.theta, N * 0.05
    origin = dense.gradients(theta, rows).sum(0) + ridge * theta
    for _ in range(steps):
        slope = (1 + e) @ dense.gradients(theta, rows) + ridge * theta - origin
        matrix = dense.ggn(theta, rows, 1 + e) + ridge * eye(len(theta))
        theta = theta - torch.linalg.solve(matrix, slope)
    close(flat(found.model), theta, 1e-9)


def test_newton_reaches_the_retrained_logistic_regression():
    train, _, _ = bias.draw(0, (300, 10, 10))
    fitted, kept = bias.fit(train.x, train.y), np.arange(300) >= 30
    model = seeded(Linear, 20, 2, bias=False)
    half = torch.tensor(fitted) / 2
    model.head.weight.data = torch.stack([-half, half])
    rows = Rows.of({"features": torch.tensor(train.x)}, torch.tensor(train.y))
    recipe = Recipe(weight_decay=4 / 300)
    task = task_of(rows, gone=30, num_classes=2, recipe=recipe)
    found = unlearned(model, task, solver="exact", scope="head", mode="newton", steps=6)
    weights = found.model.head.weight.detach()
    retrained = bias.fit(train.x[kept], train.y[kept])
    np.testing.assert_allclose(weights[1] - weights[0], retrained, rtol=0, atol=1e-10)


# --------------------------------------------------------------------------- sets and weights


SOLVERS = {
    "recursion": {},
    "recursion on the head": {"scope": "head"},
    "cg": {"solver": "cg"},
    "auto": {"solver": "auto"},
    "head": {"solver": "exact", "scope": "head"},
    "newton": {"solver": "auto", "scope": "head", "mode": "newton", "steps": 2},
}


@pytest.mark.parametrize("settings", SOLVERS.values(), ids=SOLVERS)
def test_weights_of_sets_are_the_sets(settings):
    model, rows = seeded(Mlp).float(), rows_of(N, dtype=torch.float32)
    by_set = flat(unlearned(model, task_of(rows), **settings).model)
    by_weights = flat(unlearned(model, task_of(rows, [-1] * GONE + [0] * 10), **settings).model)
    assert torch.equal(by_set, by_weights)
    assert not torch.equal(by_set, flat(model))


@pytest.mark.parametrize("settings", SOLVERS.values(), ids=SOLVERS)
def test_no_weight_at_all_or_no_length_is_the_identity(settings):
    model, rows = seeded(Mlp).float(), rows_of(N, dtype=torch.float32)
    for task, more in ((task_of(rows, [0] * N), {}), (task_of(rows), {"alpha": 0.0})):
        assert torch.equal(flat(unlearned(model, task, **settings, **more).model), flat(model))


@pytest.mark.parametrize("settings", SOLVERS.values(), ids=SOLVERS)
def test_permuting_rows_and_weights_together_changes_nothing(settings):
    model, rows, eps = seeded(Mlp), rows_of(N), (0.5 * drawn(N)).clamp(-1, 1)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    one = unlearned(model, task_of(rows, eps), **settings).model
    other = unlearned(model, task_of(rows.subset(order), eps), **settings).model
    assert torch.equal(flat(one), flat(other))


def test_rows_that_are_kept_and_removed_in_part_come_once():
    eps = torch.zeros(N + 3, dtype=DOUBLE)
    eps[[2, 5, 6]] = torch.tensor([-1.0, -0.25, 0.5], dtype=DOUBLE)
    task = task_of(rows_of(N), eps).guarded(frozenset({Split.RETAIN, Split.FORGET}), 0)
    rows, e = weighted_rows(task)
    assert rows.index.tolist() == list(range(N))
    assert torch.equal(e, eps[:N])
    assert torch.equal(rows.labels, rows_of(N).labels)


def test_weights_that_only_rise_move_towards_their_rows():
    model, rows = seeded(Linear), rows_of(N)
    eps = [1.0] * 3 + [0.0] * (N - 3)
    found = unlearned(model, task_of(rows, eps), solver="auto", scope="head")
    dense = Dense(model, ["head.weight", "head.bias"], 3)
    before, after = dense.losses(dense.theta, rows), dense.losses(flat(found.model), rows)
    assert float(after[:3].mean()) < float(before[:3].mean())


# --------------------------------------------------------------------------- scope and refusals


def test_head_scope_moves_the_head_only():
    model, rows = seeded(Mlp), rows_of(N)
    for settings in ({}, {"solver": "cg"}, {"solver": "auto"}):
        after = unlearned(model, task_of(rows), scope="head", **settings).model
        assert torch.equal(after.body.weight, model.body.weight)
        assert not torch.equal(after.head.weight, model.head.weight)


def test_a_head_of_two_layers_is_served_without_its_matrix():
    model, rows = seeded(Deep), rows_of(N)
    found = unlearned(model, task_of(rows), solver="auto", scope="head", damping=0.1)
    assert found.stats["curvature"]["kind"] == "ggn_cg"
    with pytest.raises(NotApplicable, match="linear head"):
        unlearned(model, task_of(rows), solver="exact", scope="head")


def test_stats_say_how_it_was_solved():
    found = unlearned(seeded(Mlp), task_of(rows_of(N)), solver="auto", damping=0.1)
    curvature = found.stats["curvature"]
    assert curvature["kind"] == "ggn_cg"
    assert curvature["residual"] <= 1e-9
    assert curvature["damping"] > 0
    assert curvature["jvp_mode"] == "jvp"
    assert not {"ridge_is_approximate", "stationarity"} & set(found.stats)
    adamw = task_of(rows_of(N), recipe=RECIPE.model_copy(update={"optimizer": "adamw"}))
    head = unlearned(seeded(Mlp), adamw, solver="auto", scope="head").stats
    assert head["ridge_is_approximate"] is True
    assert head["curvature"]["kind"] == "exact"


def test_label_smoothing_of_the_recipe_enters_the_loss():
    model, rows = seeded(Linear), rows_of(N)
    smooth = task_of(rows, recipe=RECIPE.model_copy(update={"label_smoothing": 0.2}))
    found = unlearned(model, smooth, solver="exact", scope="head")
    dense = Dense(model, ["head.weight", "head.bias"], 3, smoothing=0.2)
    matrix = dense.ggn(dense.theta, rows, torch.ones(N)) + N * 0.05 * eye(len(dense.theta))
    step = torch.linalg.solve(matrix, dense.gradients(dense.theta, rows)[:GONE].sum(0))
    close(flat(found.model), dense.theta + step, 1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "newton"}, "solver auto or exact"),
        ({"solver": "cg", "mode": "newton"}, "solver auto or exact"),
        ({"solver": "auto", "steps": 2}, "mode newton"),
        ({"solver": "exact"}, "scope head"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        create("influence", **settings)


def test_without_a_forget_set_and_without_weights_nothing_is_asked():
    task = task_of(rows_of(N))
    bare = UnlearningTask(
        forget=None,
        retain=task._rows[Split.RETAIN],
        num_classes=3,
        recipe=RECIPE,
        fresh_model=lambda _: seeded(Linear),
    )
    with pytest.raises(ForgetSetError, match="forget set or weights"):
        create("influence").unlearn(seeded(Linear), bare, SEED)
