"""`unsc_plugin.unlearn`: a plain module and plain datasets in, an unlearned copy out, measured."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import unsc_plugin
from unsc_plugin.errors import (
    ConfigError,
    ForgetSetError,
    NotApplicable,
    ScenarioNotSupported,
    UnknownName,
)
from unsc_plugin.method import UnlearningTask, Weights, from_function
from unsc_plugin.models import Classifier, wrap
from unsc_plugin.registry import create
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Recipe, Scenario

RECIPE = {"epochs": 4, "lr": 0.05, "batch_size": 16}
generator = torch.Generator().manual_seed(0)
CENTRES = 3 * torch.randn(3, 6, generator=generator)
Y = torch.arange(90) % 3
X = CENTRES[Y] + torch.randn(90, 6, generator=generator)
TEST = (CENTRES[Y] + torch.randn(90, 6, generator=generator), Y)


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(60):
            optimizer.zero_grad()
            functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
    return model


def parts(keep=Y != 1):
    return {
        "forget": TensorDataset(X[~keep], Y[~keep]),
        "retain": TensorDataset(X[keep], Y[keep]),
    }


SOME = torch.arange(90) >= 9


def test_five_lines_forget_a_class(net):
    before = copy.deepcopy(net.state_dict())
    done = unsc_plugin.unlearn(net, **parts(), test=TEST, method="retrain", recipe=RECIPE)
    assert done.ok
    assert done.scenario == Scenario.CLASS
    assert type(done.model) is nn.Sequential
    assert done.model is not net
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert done.after["forget"].accuracy == 0
    assert done.after["retain"].accuracy > 0.9
    assert done.after["test_forgotten"].accuracy == 0
    assert done.before["test_forgotten"].accuracy > 0.9
    assert done.before["test_retained"].n + done.before["test_forgotten"].n == 90


def test_the_numbers_are_those_of_the_models(net):
    done = unsc_plugin.unlearn(net, **parts(SOME), test=TEST, method="finetune", recipe=RECIPE)
    for model, found in ((net, done.before), (done.model, done.after)):
        with torch.no_grad():
            logits = model(TEST[0])
        loss = float(functional.cross_entropy(logits, Y))
        confidence = logits.softmax(1)[torch.arange(90), Y].numpy()
        assert found["test"].n == 90
        assert found["test"].accuracy == float((logits.argmax(1) == Y).float().mean())
        assert found["test"].loss == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(found["test"].confidence, confidence, rtol=1e-5)


def test_it_is_the_method_on_the_task_and_nothing_else(net):
    done = unsc_plugin.unlearn(
        net, **parts(SOME), method="neggrad_plus", seed=5, recipe=RECIPE, lr=0.01, device="cpu"
    )
    rows = Rows.of({"features": X}, Y)
    task = UnlearningTask(
        forget=rows.subset(~SOME),
        retain=rows.subset(SOME),
        num_classes=3,
        recipe=Recipe(**RECIPE),
        fresh_model=lambda seed: net,
        modality="tabular",
    )
    model = wrap(net, num_classes=3, modality="tabular")
    expected = create("neggrad_plus", lr=0.01).unlearn(model, task, 5).model
    for key, value in expected.backbone.state_dict().items():
        assert torch.equal(done.model.state_dict()[key], value), key
    assert done.method.config.lr == 0.01
    assert done.seed == 5


def test_loaders_and_a_classifier_are_taken_too(net):
    loaders = {name: DataLoader(data, batch_size=7) for name, data in parts(SOME).items()}
    model = wrap(net, num_classes=3, modality="tabular")
    plain = unsc_plugin.unlearn(net, **parts(SOME), method="finetune", recipe=RECIPE)
    done = unsc_plugin.unlearn(model, **loaders, method="finetune", recipe=RECIPE)
    assert isinstance(done.model, Classifier)
    assert done.model is done.classifier
    assert torch.equal(done.model.backbone[0].weight, plain.model[0].weight)


def test_rows_of_a_class_are_also_served_by_methods_that_know_rows_only(net):
    def halve(model, forget):
        model.head.weight.data /= 2
        return model

    kind = from_function(halve, "halve", scenarios=frozenset({Scenario.RANDOM}))
    done = unsc_plugin.unlearn(
        wrap(net, num_classes=3, modality="tabular"), **parts(), method=kind()
    )
    assert done.scenario == Scenario.RANDOM


def test_weights_instead_of_sets(net):
    eps = torch.zeros(90, dtype=torch.float64)
    eps[:9] = -1
    order = {"forget": TensorDataset(X[:9], Y[:9]), "retain": TensorDataset(X[9:], Y[9:])}
    sets = unsc_plugin.unlearn(net, **order, method="finetune", recipe=RECIPE)
    soft = unsc_plugin.unlearn(net, **order, method="finetune", recipe=RECIPE, weights=Weights(eps))
    assert soft.scenario == Scenario.WEIGHTED
    assert torch.equal(soft.model[0].weight, sets.model[0].weight)


def test_a_fresh_model_of_ones_own_is_used(net):
    made = []

    def fresh(seed):
        made.append(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    given = parts(SOME)
    unsc_plugin.unlearn(net, **given, method="retrain", recipe=RECIPE, fresh_model=fresh)
    assert len(made) == 1
    net = copy.deepcopy(net)
    net.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(NotApplicable, match="give fresh_model="):
        unsc_plugin.unlearn(net, **given, method="retrain", recipe=RECIPE)


def test_a_run_that_diverges_is_a_result_with_the_original(net):
    done = unsc_plugin.unlearn(net, **parts(SOME), method="neggrad", recipe=RECIPE, lr=1e30)
    assert done.result.status == "diverged"
    assert not done.ok
    assert torch.equal(done.model[0].weight, net[0].weight)
    assert "diverged" in repr(done)
    assert "the model is the original" in repr(done)


def test_evaluate_compares_with_retraining(net):
    done = unsc_plugin.unlearn(net, **parts(SOME), test=TEST, method="original", recipe=RECIPE)
    alone = done.evaluate()
    assert alone.metrics["acc_test"] == done.after["test"].accuracy
    assert "umia_auc" in alone.metrics
    assert "js_forget" in alone.missing
    same = done.evaluate(retrained=net)
    assert same.metrics["js_forget"] == 0
    assert same.reference["acc_forget"] == same.metrics["acc_forget"]
    other = unsc_plugin.unlearn(net, **parts(SOME), method="retrain", recipe=RECIPE)
    two = done.evaluate(retrained=[other.model, net], relearn=True)
    assert two.metrics["js_forget"] > 0
    assert "relearn_retain" in two.metrics


def test_evaluate_of_a_class_knows_the_forgotten_test_rows(net):
    done = unsc_plugin.unlearn(net, **parts(), method="retrain", recipe=RECIPE)
    found = done.evaluate(test=TensorDataset(*TEST))
    assert found.metrics["acc_test_forgotten"] == 0
    with pytest.raises(ConfigError, match="expected test rows, got none"):
        done.evaluate()


def test_a_result_reads_well(net):
    done = unsc_plugin.unlearn(net, **parts(), test=TEST, method="finetune", recipe=RECIPE)
    lines = repr(done).splitlines()
    assert lines[0] == "finetune, class request, seed 0"
    assert lines[1].split()[-5:] == ["before", "after", "loss", "before", "after"]
    assert [line.split()[0] for line in lines[2:6]] == list(done.before)
    assert f"{100 * done.after['forget'].accuracy:.1f} %" in lines[2]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(done)
    assert "test_forgotten" in console.export_text()
    html = done._repr_html_()
    assert html.count("<tr>") == 5
    assert "<td>test_retained</td>" in html


def test_a_plan_says_where_it_stopped_and_warnings_are_shown(net):
    group = (torch.arange(90) // 3 + Y) % 2
    rows = [{"features": X, "labels": (Y > 0).long(), "group": group}]
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    done = unsc_plugin.unlearn(
        model, retain=rows, val=rows, method="soft_weighted", recipe=RECIPE, min_z=0.0
    )
    assert done.scenario == Scenario.CORRECTION
    assert f"plan stopped: {done.result.stats['plan']['stop']}" in repr(done)
    assert f"plan stopped: {done.result.stats['plan']['stop']}" in done._repr_html_()
    assert all(text in repr(done) for text in done.result.stats.get("warnings", []))


def test_figures_show_what_was_measured(net):
    done = unsc_plugin.unlearn(net, **parts(), test=TEST, method="finetune", recipe=RECIPE)
    bars = done.plot()
    assert [trace.name for trace in bars.data] == ["before", "after"]
    assert list(bars.data[1].y) == [100 * one.accuracy for one in done.after.values()]
    histogram = done.plot("confidence")
    assert len(histogram.data) == 2 * len(done.before)
    np.testing.assert_array_equal(histogram.data[0].x, done.before["forget"].confidence)
    with pytest.raises(ConfigError, match="expected one of accuracy, confidence, got 'pie'"):
        done.plot("pie")


def test_saving_never_overwrites(net, tmp_path):
    done = unsc_plugin.unlearn(net, **parts(), method="finetune", recipe=RECIPE)
    done.save(tmp_path / "net.safetensors")
    twin = copy.deepcopy(net)
    from safetensors.torch import load_file

    twin.load_state_dict(load_file(tmp_path / "net.safetensors"))
    assert torch.equal(twin[0].weight, done.model[0].weight)
    with pytest.raises(ConfigError, match="exists and is never overwritten"):
        done.save(tmp_path / "net.safetensors")


def test_what_does_not_fit_says_so(net):
    with pytest.raises(ForgetSetError, match="expected rows to forget, got none"):
        unsc_plugin.unlearn(net, method="finetune")
    with pytest.raises(UnknownName, match="finetune"):
        unsc_plugin.unlearn(net, **parts(), method="finetun")
    with pytest.raises(ConfigError, match="unknown setting 'lrr'; did you mean 'lr'"):
        unsc_plugin.unlearn(net, **parts(), method="finetune", lrr=1)
    with pytest.raises(ConfigError, match="epoch"):
        unsc_plugin.unlearn(net, **parts(), method="finetune", recipe={"epoch": 1})
    with pytest.raises(ScenarioNotSupported, match=r"expected one of class, .* got 'all'"):
        unsc_plugin.unlearn(net, **parts(), method="finetune", scenario="all")
    with pytest.raises(ScenarioNotSupported, match="logit_mask does not accept scenario random"):
        unsc_plugin.unlearn(net, **parts(SOME), method="logit_mask")
    with pytest.raises(ConfigError, match="expected them inside the method"):
        unsc_plugin.unlearn(net, **parts(), method=create("finetune"), lr=0.1)
    with pytest.raises(ForgetSetError, match="needs split retain"):
        unsc_plugin.unlearn(net, forget=parts()["forget"], method="finetune")
