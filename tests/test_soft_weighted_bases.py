"""Who applies the weights of a correction: every base by sets and softly, hardening, hand-over."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import synthetic_bias as bias
import torch
from corrections import (
    FITTED,
    GAIN,
    GAP,
    REFITTED,
    TRAIN,
    VAL,
    WHOLE,
    N,
    corrected,
    logistic,
    recipe,
    request,
    retrained,
    rows_of,
    two_classes,
    weights_of,
)
from torch import nn

from unsc_plugin.conformance import _toys as toys
from unsc_plugin.errors import ConfigError, UnknownName, WeightsNotSupported
from unsc_plugin.method import (
    Budget,
    MethodRef,
    Scenario,
    Split,
    UnlearningMethod,
    UnlearningTask,
    Weights,
    build_config,
)
from unsc_plugin.methods.soft_weighted import SoftWeighted
from unsc_plugin.registry import create, load

SEED = 5
BASES = [
    "influence",
    "influence.head",
    "influence.newton",
    "retrain",
    "finetune",
    "cf_k",
    "eu_k",
    "neggrad",
    "neggrad_plus",
    "random_label",
    "fisher",
    "ssd",
    "scrub",
    "bad_teaching",
]
WEIGHTED_PRESETS = [
    f"soft_weighted.{tag}"
    for tag in (*(name for name in BASES[3:]), "newton", "oracle")
]  # fmt: skip


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    theirs = other.state_dict()
    return [
        name for name, value in one.state_dict().items() if not torch.equal(value, theirs[name])
    ]


# --------------------------------------------------------------------------- sets through weights


def handed_on(net: Any, name: str, eps: torch.Tensor, **changes: Any) -> nn.Module:
    """Return what a base makes of weights that a correction hands on."""
    task = toys.request(toys.problem(net), Scenario.CORRECTION, **changes)
    guarded = task.guarded(frozenset(Split), SEED)
    method = create(name)
    return guarded.delegate(method, toys.original(net), Weights(eps))[0]


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("name", BASES)
def test_weights_of_0_and_minus_1_are_handed_on_as_two_sets(name, net):
    rows = toys.problem(net).train
    eps = torch.zeros(len(rows), dtype=torch.float64)
    eps[toys.split(rows, Scenario.RANDOM)[0]] = -1
    by_weights = handed_on(net, name, eps)
    task = toys.request(toys.problem(net), Scenario.RANDOM)
    by_sets = create(name).unlearn(toys.original(net), task, SEED).model
    assert differing(by_sets, by_weights) == []
    assert differing(by_sets, toys.original(net)) != []


def test_a_forget_set_of_the_correction_is_handed_on_in_the_order_of_the_data():
    net = "mlp"
    rows = toys.problem(net).train
    forget, retain = toys.split(rows, Scenario.RANDOM)
    eps = torch.zeros(len(rows), dtype=torch.float64)
    eps[forget] = -1
    whole = handed_on(net, "finetune", eps)
    parted = handed_on(net, "finetune", eps, positions=(forget, retain))
    assert differing(whole, parted) == []


@pytest.mark.parametrize("steps", [8])
def test_exact_deletion_of_the_logistic_regression(steps):
    """Newton steps on hard weights are retraining on the complement."""
    eps = np.zeros(N)
    gone = np.random.default_rng(1).choice(N, 200, replace=False)
    eps[gone] = -1
    settings = {"solver": "auto", "scope": "head", "mode": "newton", "steps": steps}
    guarded = request().guarded(frozenset(Split), SEED)
    method = create("influence", **settings)
    found = guarded.delegate(method, two_classes(FITTED), Weights(torch.tensor(eps)))[0]
    kept = eps == 0
    expected = bias.fit(TRAIN.x[kept], TRAIN.y[kept])
    np.testing.assert_allclose(logistic(found), expected, rtol=0, atol=1e-10)


# --------------------------------------------------------------------------- every preset


@pytest.mark.parametrize("name", ["soft_weighted", *WEIGHTED_PRESETS])
def test_without_a_plan_no_base_is_called(name, monkeypatch):
    method = create(name, **WHOLE, min_z=1e6)
    monkeypatch.setattr(type(method.base), "run", lambda *_: pytest.fail("the base was called"))
    result = method.unlearn(two_classes(FITTED), request(), SEED)
    assert result.stats["plan"]["noop"] == "no_significant_gap"
    assert differing(result.model, two_classes(FITTED)) == []
    assert result.weights is None


@pytest.fixture(scope="module")
def plan() -> np.ndarray:
    return weights_of(corrected(target=0.4))


@pytest.mark.parametrize("name", WEIGHTED_PRESETS)
def test_every_base_gets_the_same_weights(name, plan):
    result = corrected(name, target=0.4)
    assert result.status == "ok"
    np.testing.assert_array_equal(weights_of(result), plan)
    assert result.stats["plan"]["weights_sha256"] == result.weights.sha256
    assert result.stats["realised"] == "soft"
    assert result.stats["base"]["method"] == create(name).base.name
    assert result.stats["base_runs"] == 1
    assert differing(result.model, two_classes(FITTED)) != [] or name == "soft_weighted.ssd"
    theta = logistic(result.model)
    fit = result.stats["realised_values"]["fit"]
    assert fit["f"][0] == pytest.approx(bias.parity(VAL, theta), abs=1e-6)
    assert fit["u"] == pytest.approx(bias.log_loss(VAL.x, VAL.y, theta).mean(), rel=1e-5)


@pytest.mark.parametrize("name", WEIGHTED_PRESETS)
def test_a_base_alone_does_the_same_with_the_weights(name, plan):
    """The correction adds nothing: the base makes the same model of the weights by itself."""
    result = corrected(name, target=0.4, seed=SEED)
    task = UnlearningTask.from_weights(
        rows_of(TRAIN),
        Weights(torch.tensor(plan)),
        val=rows_of(VAL),
        num_classes=2,
        recipe=recipe(),
        fresh_model=lambda _: two_classes(np.zeros(20)),
        scenario=Scenario.WEIGHTED,
        modality="tabular",
    )
    alone = create(name).base.unlearn(two_classes(FITTED), task, SEED)
    assert differing(result.model, alone.model) == []
    assert (result.steps, result.epochs) == (alone.steps, alone.epochs)
    assert result.losses == alone.losses


def test_the_oracle_is_the_weighted_retrained_model(plan):
    """Newton with enough steps is the fit with multiplicities 1 + ε."""
    base = {"method": "influence", "set": {**REFITTED["set"], "steps": 8}}
    result = corrected(target=0.4, base=base)
    np.testing.assert_allclose(logistic(result.model), retrained(plan), rtol=0, atol=1e-9)
    gaps = [
        abs(bias.parity(VAL, logistic(model)) - bias.parity(VAL, retrained(plan)))
        for model in (result.model, corrected(target=0.4).model)
    ]
    assert gaps[0] < gaps[1] < 0.03


# --------------------------------------------------------------------------- samples that must go


def raising(count: int) -> torch.Tensor:
    """Return the rows whose removal widens the gap most."""
    return torch.tensor(np.argsort(-GAIN, kind="stable")[:count].copy())


@pytest.mark.parametrize("target", [0.0, 0.3, 0.6])
def test_what_must_go_goes_and_the_gap_is_brought_back(target):
    forget = raising(60)
    gone = np.zeros(N)
    gone[forget] = -1
    assert bias.parity(VAL, retrained(gone)) > 1.1 * GAP
    result = corrected(task=request(forget), target=target)
    e, told = weights_of(result), result.stats["plan"]
    assert (e[forget] == -1).all()
    assert told["stop"] == "reached"
    assert told["fixed"] == 60
    found = bias.parity(VAL, retrained(e))
    assert found == pytest.approx((1 - target) * GAP, abs=0.02 * GAP)
    assert told["before"]["f"][0] == pytest.approx(GAP, abs=1e-10)
    assert told["planned"]["f"][0] == pytest.approx(found, abs=1e-8)
    free = np.delete(np.arange(N), forget)
    assert 0 < np.abs(e[free]).max() <= 1


def test_deletions_that_narrow_the_gap_need_no_weights_beside():
    forget = torch.tensor(np.argsort(GAIN, kind="stable")[:40].copy())
    result = corrected(task=request(forget), target=0.0, base="retrain")
    e = weights_of(result)
    assert np.flatnonzero(e).tolist() == sorted(forget.tolist())
    assert (result.stats["plan"]["stop"], result.stats["plan"]["rounds"]) == ("reached", [])
    assert result.stats["plan"]["noop"] is None
    assert result.stats["realised"] == "hard"
    plain = request(forget, scenario=Scenario.RANDOM)
    alone = create("retrain").unlearn(two_classes(FITTED), plain, 0)
    assert differing(result.model, alone.model) == []


def test_deletions_are_made_although_the_gap_is_of_chance():
    s = np.random.default_rng(0).permutation(VAL.s)
    result = corrected(task=request(raising(10), s=s), target=0.5, eps_min=-0.0, eps_max=0.0)
    e = weights_of(result)
    assert np.flatnonzero(e).tolist() == sorted(raising(10).tolist())


def test_what_cannot_be_brought_back_is_told():
    settings = {"target": 0.5, "eps_min": -0.05, "eps_max": 0.05}
    result = corrected(task=request(raising(60)), **settings)
    told = result.stats["plan"]
    assert told["stop"] == "exhausted"
    left = bias.parity(VAL, retrained(weights_of(result))) / GAP
    assert told["shortfall"][0] == pytest.approx(left - 0.5, abs=1e-6)


@pytest.mark.parametrize("solver", ["hard", "li_liu", "reweighing", "permuted"])
def test_other_rules_delete_too(solver):
    result = corrected(task=request(raising(20)), target=0.3, solver=solver)
    e, told = weights_of(result), result.stats["plan"]
    assert (e[raising(20)] == -1).all()
    if solver != "permuted":  # what a plan foresees is that of the weights before they are mixed
        found = bias.parity(VAL, retrained(e))
        assert told["planned"]["f"][0] == pytest.approx(found, abs=1e-7)


def test_no_target_at_all_needs_something_that_must_go():
    with pytest.raises(ConfigError, match="target"):
        corrected(target=0.0)


# --------------------------------------------------------------------------- methods of sets


class SetsOnly(UnlearningMethod):
    """θ ← 0.9·θ; remembers what it was asked to forget."""

    name = "sets_only"
    needs = frozenset({Split.FORGET, Split.RETAIN})
    scenarios = frozenset({Scenario.RANDOM})
    deterministic = True

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        self.forget, self.retain = (
            task.rows(split).index.tolist() for split in ("forget", "retain")
        )
        with torch.no_grad():
            model.head.weight.mul_(0.9)
        return model


def hardened(**settings: Any) -> tuple[Any, SetsOnly]:
    method = create("soft_weighted", **{**WHOLE, **settings})
    method.parts["base"] = base = SetsOnly()
    return method.unlearn(two_classes(FITTED), request(), SEED), base


def matched(e: np.ndarray, gain: np.ndarray = GAIN) -> list[int]:
    """Return the shortest prefix of the lowest weights that does as much as all weights."""
    order = [j for j in np.argsort(e, kind="stable") if e[j] < 0]
    reached, best, best_at = 0.0, 0.0, 0
    for count, j in enumerate(order, start=1):
        reached -= gain[j]
        if reached >= gain @ e:
            return sorted(order[:count])
        if reached > best:
            best, best_at = reached, count
    return sorted(order[:best_at])


@pytest.mark.parametrize("target", [0.2, 0.5, 1.0])
def test_a_method_of_sets_gets_as_many_rows_as_do_the_same(target):
    result, base = hardened(target=target)
    soft = weights_of(corrected(target=target))
    expected = matched(soft)
    assert base.forget == expected
    assert base.retain == sorted(set(range(N)) - set(expected))
    e = weights_of(result)
    assert np.flatnonzero(e == -1).tolist() == expected
    assert np.count_nonzero(e) == len(expected)
    told = result.stats["hard_set"]
    assert told["size"] == len(expected)
    assert told["improvement"] == pytest.approx(-GAIN[expected].sum(), abs=1e-10)
    assert told["threshold"] == pytest.approx(-soft[expected].max())
    assert result.stats["realised"] == "hard"
    # the weights that are told are those of the plan, not those of the set
    assert result.stats["plan"]["weights_sha256"] == Weights(torch.tensor(soft)).sha256


@pytest.mark.parametrize("threshold", [0.1, 0.4])
def test_a_threshold_is_taken_as_it_is(threshold):
    soft = weights_of(corrected(target=0.5))
    _, base = hardened(target=0.5, threshold=threshold)
    assert base.forget == np.flatnonzero(soft <= -threshold).tolist()


def test_a_threshold_that_no_weight_reaches():
    with pytest.raises(ConfigError, match="match"):
        hardened(target=0.1, threshold=0.9)


def test_weights_that_only_rise_have_no_set():
    result, base = hardened(target=0.2, eps_min=0.0)
    assert result.stats["plan"]["noop"] == "empty_hard_set"
    assert not hasattr(base, "forget")
    assert result.weights is None
    assert differing(result.model, two_classes(FITTED)) == []


def test_a_set_for_several_goals_adds_what_they_gain():
    goals = ["dp", "eop"]
    result, base = hardened(goals=goals, target=0.4)
    assert result.stats["plan"]["stop"] == "reached"
    soft = weights_of(corrected(goals=goals, target=0.4))
    own = VAL.y == 1
    positive = bias.Part(VAL.x[own], VAL.y[own], VAL.s[own])
    both = GAIN + bias.influences(TRAIN, positive, FITTED)[0]
    assert base.forget == matched(soft, both) != matched(soft)
    told = result.stats["hard_set"]
    assert told["improvement"] == pytest.approx(-both[base.forget].sum(), rel=1e-9)


def test_sets_of_a_goal_that_was_left_alone():
    """One of two goals is not significant: the set is that of the other one."""
    s = np.where((VAL.s == 1) & (np.arange(800) % 3 == 0), 2, VAL.s)
    s = np.where((s == 2) & (np.arange(800) % 2 == 0), 3, s)
    goals = [{"criterion": "dp", "groups": pair} for pair in ([1, 0], [2, 3])]
    found = []
    for chosen in (goals, goals[:1]):
        method = create("soft_weighted", **WHOLE, goals=chosen, target=0.3)
        method.parts["base"] = SetsOnly()
        result = method.unlearn(two_classes(FITTED), request(s=s), SEED)
        found.append((method.parts["base"].forget, result.stats["hard_set"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["unsc", "instance_wise"])
def test_registered_methods_of_sets_can_be_bases(name):
    small = {"max_epochs": 5} if name == "instance_wise" else {}
    ref = {"method": name, "set": small}
    task = request(train=rows_of(TRAIN).subset(torch.arange(300)))
    theta = bias.fit(TRAIN.x[:300], TRAIN.y[:300])
    method = create("soft_weighted", **WHOLE, base=ref, target=0.3, threshold=0.5)
    result = method.unlearn(two_classes(theta), task, SEED)
    assert result.status == "ok"
    assert result.stats["realised"] == "hard"
    gone = torch.nonzero(result.weights.eps == -1)[:, 0]
    assert 0 < len(gone) == result.stats["hard_set"]["size"]
    plain = request(gone, train=rows_of(TRAIN).subset(torch.arange(300)), scenario=Scenario.RANDOM)
    alone = create(name, **small).unlearn(two_classes(theta), plain, SEED)
    assert differing(result.model, alone.model) == []


def test_soft_weights_never_reach_a_method_of_sets():
    guarded = request().guarded(frozenset(Split), SEED)
    soft = Weights(torch.full((N,), -0.5, dtype=torch.float64))
    with pytest.raises(WeightsNotSupported, match="threshold"):
        guarded.delegate(SetsOnly(), two_classes(FITTED), soft)
    hard = Weights(soft.eps.clone().index_fill_(0, torch.arange(3, N), 0.0)[:N] * 2)
    base = SetsOnly()
    guarded.delegate(base, two_classes(FITTED), hard)
    assert base.forget == [0, 1, 2]


# --------------------------------------------------------------------------- the base again


def overshooting(alpha: float, **settings: Any) -> Any:
    base = {"method": "influence", "set": {"solver": "auto", "scope": "head", "alpha": alpha}}
    settings = {"fit_fraction": 0.7, "utility_stop": None, "target": 0.6} | settings
    return corrected(base=base, **settings)


def test_a_base_that_overshoots_is_asked_for_less():
    once, thrice = overshooting(3.0), overshooting(3.0, max_base_runs=3)
    assert once.stats["base_runs"] == 1
    assert once.stats["realised_values"]["selection"]["f"][0] < -0.1
    runs = thrice.stats["base_runs"]
    assert 1 < runs <= 3
    assert thrice.stats["plan"]["asked_share"] == pytest.approx(0.6 * 0.7 ** (runs - 1))
    assert np.linalg.norm(weights_of(thrice)) < np.linalg.norm(weights_of(once))
    values = thrice.stats["realised_values"]["selection"]
    assert values["f"][0] > once.stats["realised_values"]["selection"]["f"][0]
    fewer = overshooting(3.0, target=0.6 * 0.7 ** (runs - 1))
    np.testing.assert_allclose(weights_of(fewer), weights_of(thrice), rtol=0, atol=1e-12)
    np.testing.assert_allclose(  # every run starts from the original
        logistic(fewer.model), logistic(thrice.model), rtol=0, atol=1e-12
    )


def test_a_base_on_target_runs_once():
    assert overshooting(1.0, max_base_runs=3).stats["base_runs"] == 1


def test_a_robust_loss_above_the_clean_one_is_no_overshoot():
    result = corrected(
        goals=["robust"], target=0.2, fit_fraction=0.7, utility_stop=None, max_base_runs=3
    )
    assert result.stats["base_runs"] == 1


# --------------------------------------------------------------------------- hand-over


def test_steps_epochs_work_and_reads_are_added_up():
    told: list[Any] = []
    ref = {"method": "finetune", "set": {"epochs": 2}}
    result = corrected(task=request(progress=told.append), base=ref, target=0.3)
    steps = 2 * -(-N // 256)
    assert (result.steps, result.epochs, len(result.losses)) == (steps, 2, steps)
    assert sum(progress.epoch_end for progress in told) == 2
    assert result.read[Split.RETAIN] >= 3 * N  # the plan, and twice by the base
    assert result.read[Split.VAL] >= len(VAL.y)
    assert Split.FORGET not in result.read
    assert result.work >= 3 * 2 * N


@pytest.mark.parametrize("limit", [Budget(steps=3), Budget(epochs=1)])
def test_the_budget_holds_for_the_base(limit):
    ref = {"method": "finetune", "set": {"epochs": 4}}
    result = corrected(task=request(budget=limit), base=ref, target=0.3)
    assert result.status == "budget"
    assert result.steps == 3 if limit.steps else result.epochs == 1
    assert differing(result.model, two_classes(FITTED)) != []


def test_a_base_that_diverges_is_told_by_name():
    ref = {"method": "finetune", "set": {"lr": 1e300, "epochs": 3}}
    result = corrected(base=ref, target=0.3)
    assert result.status == "diverged"
    assert result.reason.startswith("finetune:")
    assert differing(result.model, two_classes(FITTED)) == []
    assert result.stats["plan"]["stop"] == "reached"


def test_only_declared_splits_are_handed_on():
    """A base that validates gets the validation rows, the test rows are nowhere."""

    class Looks(SetsOnly):
        """θ ← θ."""

        name = "looks"
        needs = frozenset({Split.RETAIN, Split.VAL})
        scenarios = frozenset({Scenario.WEIGHTED})
        supports_weights = True

        def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
            self.seen = {split: task.size(split) for split in Split}
            self.weights = task.weights
            list(task.loader("retain"))
            list(task.loader("val"))
            return model

    method = create("soft_weighted", **WHOLE, target=0.3)
    method.parts["base"] = base = Looks()
    result = method.unlearn(two_classes(FITTED), request(), SEED)
    e = weights_of(result)
    assert base.seen == {
        Split.FORGET: (e < 0).sum(), Split.RETAIN: (e > -1).sum(), Split.VAL: len(VAL.y)
    }  # fmt: skip
    assert base.weights.sha256 == result.weights.sha256
    assert result.read[Split.VAL] >= 2 * len(VAL.y)


def test_the_original_model_is_not_touched():
    model = two_classes(FITTED)
    before = copy.deepcopy(model).state_dict()
    create("soft_weighted", **WHOLE, base="neggrad", target=0.3).unlearn(model, request(), SEED)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


# --------------------------------------------------------------------------- naming a base


@pytest.mark.parametrize(
    ("ref", "name", "setting"),
    [
        ("retrain", "retrain", {}),
        ("influence.newton", "influence", {"mode": "newton"}),
        ({"method": "finetune", "set": {"epochs": 3}}, "finetune", {"epochs": 3}),
        ({"method": "finetune.paper"}, "finetune", {"lr": 0.01}),
    ],
)
def test_a_base_is_named_in_a_word_or_with_settings(ref, name, setting):
    base = create("soft_weighted", base=ref).base
    assert base.name == name
    for key, value in setting.items():
        assert getattr(base.config, key) == value


def test_the_default_base_is_the_closed_form():
    config = create("soft_weighted").base.config
    assert (config.solver, config.scope, config.mode) == ("auto", "head", "if")
    assert create("soft_weighted").config.base == MethodRef(
        "influence", {"solver": "auto", "scope": "head"}
    )


@pytest.mark.parametrize(
    ("ref", "error", "message"),
    [
        ("influense", UnknownName, "influence"),
        ("finetune.papers", UnknownName, "finetune.paper"),
        ("soft_weighted", ConfigError, "another method"),
        ("soft_weighted.hard", ConfigError, "another method"),
        ({"method": "finetune", "set": {"epoch": 3}}, ConfigError, "epochs"),
        ({"method": "finetune", "set": {"epochs": -1}}, ConfigError, "epochs"),
        ({"name": "finetune"}, ConfigError, "base"),
        (7, ConfigError, "base"),
    ],
)
def test_a_base_that_is_not_there(ref, error, message):
    with pytest.raises(error, match=message):
        create("soft_weighted", base=ref)


def test_an_instance_that_was_not_made_by_name_says_how():
    method = SoftWeighted(**WHOLE)
    with pytest.raises(ConfigError, match=r"unsc_plugin\.create"):
        method.unlearn(two_classes(FITTED), request(), SEED)
    completed = load().complete(method)
    assert completed is method
    assert method.unlearn(two_classes(FITTED), request(), SEED).status == "ok"


def test_a_reference_survives_a_file():
    ref = {"method": "finetune", "set": {"epochs": 3}}
    config = build_config(SoftWeighted.Config, {"base": ref})
    assert config.base == MethodRef("finetune", {"epochs": 3})
    assert build_config(SoftWeighted.Config, {"base": "retrain"}).base == MethodRef("retrain")


def test_every_preset_names_what_it_changes():
    for tag, settings in {
        "one_shot": {"step": 1.0, "max_rounds": 1, "trust": None},
        "hard": {"solver": "hard"},
        "hard_utility": {"solver": "hard_utility"},
        "li_liu": {"solver": "li_liu", "gamma": 0.0, "alpha": 0.2},
        "reweighing": {"solver": "reweighing"},
        "permuted": {"solver": "permuted"},
    }.items():
        method = create(f"soft_weighted.{tag}")
        assert {key: getattr(method.config, key) for key in settings} == settings
        assert method.base.name == "influence"
    assert create("soft_weighted.oracle").base.name == "retrain"
