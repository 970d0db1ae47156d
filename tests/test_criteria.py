"""Criteria of a correction: values by definition, gradients by differences, cells, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import synthetic_bias as bias
import torch
from conftest import Mlp
from corrections import DOUBLE, FITTED, GAP, VAL, Linear, request, rows_of, setup_of, two_classes
from torch.nn import functional

from unsc_plugin.errors import ConfigError, DataError, NotApplicable
from unsc_plugin.influence import objective
from unsc_plugin.methods._correction_settings import Attack, CorrectionConfig
from unsc_plugin.methods._criteria import CRITERIA, Goal, build, cut, mean_loss, values
from unsc_plugin.methods._ground import Ground, attacked
from unsc_plugin.registry import create
from unsc_plugin.rows import Rows

ROWS, CLASSES = 240, 3


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def table(classes: int = CLASSES, groups: int = 2, rows: int = ROWS, seed: int = 0) -> Rows:
    """Return rows of 6 features with labels and groups that differ in number; some without one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    group = torch.randint(0, groups, (rows,), generator=generator)
    group = torch.where(torch.rand(rows, generator=generator) < 0.4, 0, group)
    group[::9] = -1
    return Rows.of({"features": drawn(rows, 6, seed=seed + 1)}, labels, group=group)


# --------------------------------------------------------------------------- values


def defined(name, rows, logits, positive, plus=1, minus=0):
    """Return the criterion by its definition: means over masks, in numpy."""
    z, y, g = logits.numpy(), rows.labels.numpy(), rows.group.numpy()
    chance = np.exp(z - z.max(1, keepdims=True))
    chance /= chance.sum(1, keepdims=True)
    loss = -np.log(chance[np.arange(len(y)), y])
    own = y == positive
    if name == "utility":
        return [loss.mean()]
    if name == "dp":
        return [chance[g == plus, positive].mean() - chance[g == minus, positive].mean()]
    if name == "eop":
        p = chance[:, positive]
        return [p[own & (g == plus)].mean() - p[own & (g == minus)].mean()]
    if name == "eo":
        found = []
        for label in range(z.shape[1]):
            p = chance[:, positive if z.shape[1] == 2 else label]
            found.append(
                p[(y == label) & (g == plus)].mean() - p[(y == label) & (g == minus)].mean()
            )
        return found
    if name == "eop_loss":
        return [loss[own & (g == minus)].mean() - loss[own & (g == plus)].mean()]
    assert name == "group_loss"
    return [loss[g == minus].mean() - loss[g == plus].mean()]


@pytest.mark.parametrize("positive", [0, 1])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "robust"])
def test_every_criterion_is_its_definition(name, classes, positive):
    rows, logits = table(classes), drawn(ROWS, classes, seed=5)
    found = build(Goal(name, positive_class=positive), rows, classes)
    expected = defined(name, rows, logits, positive)
    np.testing.assert_allclose(values(found, [logits] * len(found)), expected, rtol=0, atol=1e-14)
    assert [one.loss for one in found] == [name == "utility"] * len(expected)
    if name == "eo":
        assert [one.name for one in found] == [f"eo[y={label}]" for label in range(classes)]


def test_named_groups_count_as_they_are_named():
    rows, logits = table(groups=4, rows=600), drawn(600, 3, seed=5)
    for name in ("dp", "eop", "group_loss"):
        [there] = build(Goal(name, (2, 3), positive_class=2), rows, 3)
        [back] = build(Goal(name, (3, 2), positive_class=2), rows, 3)
        [expected] = defined(name, rows, logits, 2, plus=2, minus=3)
        assert there.value(logits) == pytest.approx(expected, abs=1e-14)
        assert back.value(logits) == pytest.approx(-expected, abs=1e-14)


@pytest.mark.parametrize("name", ["dp", "eop", "eo", "group_loss", "eop_loss"])
def test_of_more_groups_every_one_is_compared_with_all(name):
    rows, logits = table(groups=3), drawn(ROWS, 3, seed=5)
    found = build(Goal(name, positive_class=1), rows, 3)
    y, g = rows.labels, rows.group
    chance, loss = (
        logits.softmax(1),
        functional.cross_entropy(logits, rows.labels, reduction="none"),
    )
    expected, sums = [], {}
    labels = {"eop": [1], "eop_loss": [1], "eo": [0, 1, 2]}.get(name, [None])
    for code in range(3):
        for label in labels:
            own = g >= 0 if label is None else (g >= 0) & (y == label)
            side = own & (g == code)
            if "loss" in name:
                gap = loss[own].mean() - loss[side].mean()
            else:
                p = chance[:, label if name == "eo" else 1]
                gap = p[side].mean() - p[own].mean()
            expected.append(float(gap))
            sums[label] = sums.get(label, 0.0) + float(gap) * int(side.sum())
    assert len(found) == len(expected)
    assert [one.value(logits) for one in found] == pytest.approx(expected, abs=1e-14)
    assert list(sums.values()) == pytest.approx([0.0] * len(sums), abs=1e-11)


def test_label_smoothing_enters_losses_only():
    rows, logits = table(2), drawn(ROWS, 2, seed=5)
    smooth = functional.cross_entropy(logits, rows.labels, reduction="none", label_smoothing=0.1)
    g = rows.group
    [gap] = build(Goal("group_loss"), rows, 2, smoothing=0.1)
    assert gap.value(logits) == pytest.approx(float(smooth[g == 0].mean() - smooth[g == 1].mean()))
    [whole] = build(Goal("robust"), rows, 2, smoothing=0.1)
    assert whole.value(logits) == pytest.approx(float(smooth.mean()))
    [chance] = build(Goal("dp"), rows, 2, smoothing=0.1)
    assert chance.value(logits) == build(Goal("dp"), rows, 2)[0].value(logits)


def test_known_gaps_of_the_biased_table():
    ground = setup_of(goals=["dp", "eop_loss"]).ground
    first = ground.at(ground.objective.theta)
    assert first.f.tolist() == pytest.approx([0.457674, 0.7127], abs=5e-5)
    assert float(first.f[0]) == pytest.approx(GAP, abs=1e-12)
    assert float(first.f[1]) == pytest.approx(bias.loss_gap(VAL, FITTED), abs=1e-12)
    assert first.u * len(VAL.y) == pytest.approx(375.99, abs=5e-3)
    assert float(ground.errors(first)[0]) == pytest.approx(0.01695, abs=5e-6)
    assert first.u_selection is None


# --------------------------------------------------------------------------- standard errors


def test_the_error_of_a_difference_of_means():
    rows, logits = table(2), drawn(ROWS, 2, seed=5)
    p, g = logits.softmax(1)[:, 1].numpy(), rows.group.numpy()
    sides = [p[g == code] for code in (0, 1)]
    expected = math.sqrt(sum(side.var() / len(side) for side in sides))
    [gap] = build(Goal("dp"), rows, 2)
    assert gap.standard_error(logits) == pytest.approx(expected, rel=1e-12)


def test_the_error_of_a_group_against_all_counts_its_rows_once():
    rows, logits = table(2, groups=3), drawn(ROWS, 2, seed=5)
    p, g = logits.softmax(1)[:, 1].numpy(), rows.group.numpy()
    n = (g >= 0).sum()
    for code, one in enumerate(build(Goal("dp"), rows, 2)):
        own, other = p[g == code], p[(g >= 0) & (g != code)]
        # mean(own) − mean(all) = (1 − n_g/n)(mean(own) − mean(other)), two independent samples
        share = 1 - len(own) / n
        apart = own.var() / len(own) + other.var() / len(other)
        assert one.standard_error(logits) == pytest.approx(share * math.sqrt(apart), rel=1e-12)


def test_the_error_of_a_robust_loss_is_that_of_its_excess():
    setup = setup_of(goals=["robust"], attack={"budget": 0.1})
    first = setup.ground.at(setup.objective.theta)
    margin = (2 * VAL.y - 1) * (VAL.x @ FITTED)
    worst = np.logaddexp(0, -(margin - 0.1 * np.abs(FITTED).sum()))
    excess = worst - np.logaddexp(0, -margin)
    expected = excess.std() / math.sqrt(len(excess))
    assert float(setup.ground.errors(first)[0]) == pytest.approx(expected, rel=1e-6)
    assert float(first.f[0]) == pytest.approx(worst.mean(), abs=1e-6)


# --------------------------------------------------------------------------- gradients


def net(kind: str, classes: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        made = Mlp(6, classes) if kind == "network" else Linear(6, classes, bias=True)
    return made.double()


@pytest.mark.parametrize("kind", ["linear", "network"])
@pytest.mark.parametrize(
    ("name", "classes", "groups"),
    [(name, 2, 2) for name in CRITERIA] + [("eo", 3, 3), ("group_loss", 3, 3), ("dp", 3, 3)],
)
def test_gradients_against_central_differences(kind, name, classes, groups):
    model, rows = net(kind, classes), table(classes, groups)
    scope = "head" if kind == "linear" else "full"
    here = objective(model, table(classes, seed=3), scope=scope, ridge=1.0, batch_size=50)
    criteria = build(Goal(name, positive_class=1), rows, classes, smoothing=0.05)
    ground = Ground(model, here, criteria, rows, None, Attack(budget=0.2), smoothing=0.05)
    point = ground.at(here.theta)
    slopes = ground.slopes(point)
    assert slopes.shape == (here.p, len(criteria) + 1)
    moved = [ground._moved(one, point.adversarial) for one in criteria] + [ground.utility]

    def at(theta):
        return values(moved, [here.outputs(theta, one.rows) for one in moved])

    if name != "robust":
        torch.testing.assert_close(at(here.theta)[:-1], point.f, rtol=0, atol=1e-13)
    assert float(at(here.theta)[-1]) == pytest.approx(point.u, abs=1e-13)
    step = 1e-5 * torch.eye(here.p, dtype=DOUBLE)
    found = torch.stack([(at(here.theta + d) - at(here.theta - d)) / 2e-5 for d in step])
    assert float(slopes.abs().max()) > 1e-3
    torch.testing.assert_close(slopes, found, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [1, 7, ROWS])
def test_the_batch_size_changes_no_slope(size):
    model, rows = net("network", 2), table(2)
    found = []
    for batch_size in (ROWS, size):
        here = objective(model, rows, scope="full", ridge=1.0, batch_size=batch_size)
        criteria = build(Goal("dp"), rows, 2) + build(Goal("eo"), rows, 2)
        ground = Ground(model, here, criteria, rows, None, Attack())
        found.append(ground.slopes(ground.at(here.theta)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-13)


# --------------------------------------------------------------------------- attacks


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_the_attack_of_a_linear_model_is_its_worst_case(norm, dual):
    rows = rows_of(VAL)
    moved = attacked(two_classes(FITTED), rows, Attack(norm=norm, budget=0.15), batch_size=300)
    delta = moved.storage["features"] - rows.storage["features"]
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert float(length.max()) <= 0.15 * (1 + 1e-6)
    margin = (2 * VAL.y - 1) * (VAL.x @ FITTED)
    worst = (2 * VAL.y - 1) * (moved.storage["features"].numpy() @ FITTED)
    np.testing.assert_allclose(
        worst, margin - 0.15 * np.linalg.norm(FITTED, dual), rtol=0, atol=1e-6
    )
    assert torch.equal(moved.labels, rows.labels)
    assert torch.equal(moved.index, rows.index)
    assert torch.equal(moved.group, rows.group)


def test_every_point_has_an_attack_of_its_own():
    setup = setup_of(goals=["robust"], attack={"budget": 0.1})
    ground, theta = setup.ground, setup.objective.theta
    other = theta.clone()
    other[20] *= -3  # the sign of one weight of the logit of class 1
    for where in (theta, other):
        point = ground.at(where)
        weight = (where[20:] - where[:20]).numpy()
        margin = (2 * VAL.y - 1) * (VAL.x @ weight)
        worst = np.logaddexp(0, -(margin - 0.1 * np.abs(weight).sum())).mean()
        assert float(point.f[0]) == pytest.approx(worst, abs=1e-6)
        assert point.u == pytest.approx(np.logaddexp(0, -margin).mean(), abs=1e-12)
    frozen = values(
        [ground.criteria[0].on(ground.at(theta).adversarial)],
        [setup.objective.outputs(other, ground.at(theta).adversarial)],
    )
    assert float(frozen[0]) < float(ground.at(other).f[0]) - 1e-3


def test_an_attack_leaves_the_model_as_it_was():
    class Normed(Linear):
        def __init__(self) -> None:
            super().__init__(20, 2)
            self.norm = torch.nn.BatchNorm1d(20)

        def features(self, features):
            return self.norm(features)

    model = Normed().double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attacked(model, rows_of(VAL), Attack())
    assert model.norm.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_texts_are_not_attacked():
    rows = Rows.of({"input_ids": torch.ones(30, 4, dtype=torch.int64)}, torch.arange(30) % 2)

    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 2)

        def get_input_embeddings(self):
            return self.words

        def forward(self, input_ids):
            return self.head(self.words(input_ids).mean(1))

    with pytest.raises(NotApplicable, match="robust"):
        attacked(Words(), rows, Attack())


# --------------------------------------------------------------------------- two parts of the rows


@pytest.mark.parametrize("fraction", [0.5, 0.7, 0.9])
def test_every_cell_is_cut_alike(fraction):
    rows = table(3, groups=3, rows=400)
    fit, selection = cut(rows, fraction, seed=3)
    both = torch.cat([fit.index, selection.index])
    assert sorted(both.tolist()) == list(range(400))
    for label in range(3):
        for group in (-1, 0, 1, 2):
            whole, kept = (
                int(((part.labels == label) & (part.group == group)).sum()) for part in (rows, fit)
            )
            assert kept == math.ceil(fraction * whole)


def test_the_cut_follows_its_seed():
    rows = table(rows=400)
    one, again, other = (cut(rows, 0.7, seed)[0].index.tolist() for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert one == sorted(one)


def test_all_rows_for_fitting_leave_none():
    rows = table()
    assert cut(rows, 1.0, 0) == (rows, None)
    plain = Rows.of({"features": drawn(20, 2)}, torch.arange(20) % 2)
    fit, selection = cut(plain, 0.7, 0)
    assert (len(fit), len(selection)) == (14, 6)
    assert fit.labels.sum() == 7


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("goal", "classes", "error", "message"),
    [
        (Goal("parity"), 2, ConfigError, "criterion of utility, dp, eop.*'parity'"),
        (Goal("dp"), 3, ConfigError, "positive_class"),
        (Goal("eop"), 3, ConfigError, "positive_class"),
        (Goal("dp", positive_class=2), 2, ConfigError, r"within 0\.\.1, got 2"),
        (Goal("dp", positive_class=-1), 2, ConfigError, "positive_class"),
        (Goal("dp", (1, 7)), 2, DataError, "one group is empty"),
    ],
)
def test_goals_that_make_no_sense(goal, classes, error, message):
    with pytest.raises(error, match=message):
        build(goal, table(classes), classes)


def test_gaps_of_losses_need_no_positive_class():
    assert len(build(Goal("group_loss"), table(3), 3)) == 1
    assert len(build(Goal("eo"), table(3), 3)) == 3


@pytest.mark.parametrize("name", ["dp", "eop", "eo", "eop_loss", "group_loss"])
def test_rows_without_groups_cannot_be_compared(name):
    rows = table(2)
    bare = Rows.of(rows.storage, rows.labels)
    with pytest.raises(DataError, match="groups"):
        build(Goal(name), bare, 2)
    single = Rows.of(rows.storage, rows.labels, group=torch.ones(ROWS))
    with pytest.raises(DataError, match="one group is empty"):
        build(Goal(name), single, 2)
    assert len(build(Goal("robust"), bare, 2)) == 1


def test_small_cells_are_named_with_their_counts():
    rows = table(2)
    others = (rows.labels == 0) | (rows.group != 1)
    cell = torch.nonzero((rows.labels == 1) & (rows.group == 1))[:, 0]
    enough, few = (rows.subset(others.index_fill(0, cell[:count], value=True)) for count in (10, 9))
    assert [len(build(Goal(name), enough, 2)) for name in ("eop", "eo", "eop_loss")] == [1, 2, 1]
    count = int(((few.labels == 0) & (few.group == 1)).sum())
    build(Goal("dp"), few, 2)
    for name in ("eop", "eo", "eop_loss"):
        with pytest.raises(DataError, match=r"at least 10 rows.*got 9") as raised:
            build(Goal(name), few, 2)
        assert "(group 1, label 1): 9" in str(raised.value)
        assert f"(group 1, label 0): {count}" in str(raised.value)


def test_selection_rows_need_their_cells_too():
    rows = rows_of(VAL)
    minority = torch.nonzero((rows.group == 0) & (rows.labels == 1))[:, 0]
    drop = torch.ones(len(rows), dtype=torch.bool)
    drop[minority[20:]] = False
    task_rows = rows.subset(drop)
    method = create("soft_weighted", goals=["eop"])
    with pytest.raises(DataError, match="got 6"):
        method.unlearn(two_classes(FITTED), request(val=task_rows), 0)
    assert method.config.fit_fraction == 0.7


def test_utility_is_no_goal():
    with pytest.raises(ConfigError, match="utility"):
        setup_of(goals=["dp", "utility"])


def test_goals_are_names_or_tables():
    config = create("soft_weighted", goals=["dp", {"criterion": "eop", "groups": [2, 0]}]).config
    assert config.wanted == (Goal("dp"), Goal("eop", (2, 0)))
    with pytest.raises(ConfigError, match="goals"):
        create("soft_weighted", goals=[{"criterium": "dp"}])
    with pytest.raises(ConfigError, match="at least one"):
        setup_of(goals=[])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 0.0}, "target"),
        ({"fit_fraction": 1.0, "utility_stop": 0.05}, "fit_fraction"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        CorrectionConfig(**settings).check(fixed=False)
    if "target" in settings:
        CorrectionConfig(**settings).check(fixed=True)


def test_the_mean_loss_is_the_utility():
    rows, logits = table(), drawn(ROWS, 3)
    one = mean_loss(rows, smoothing=0.2)
    expected = functional.cross_entropy(logits, rows.labels, label_smoothing=0.2)
    assert one.value(logits) == pytest.approx(float(expected), abs=1e-14)
    assert one.loss
