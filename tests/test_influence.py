"""Influences, curvature, refits against dense references: autograd by rows, numpy, retraining."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import weakref

import numpy as np
import pytest
import synthetic_bias as bias
import torch
from conftest import Mlp, Normed
from scipy import stats
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unsc_plugin._solves import cholesky, conjugate_gradients
from unsc_plugin.errors import ConfigError, DataError, NotApplicable, NumericalError
from unsc_plugin.influence import Curvature, is_linear_head, objective, ridge_of
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Recipe

torch.set_num_threads(1)
DOUBLE = torch.float64
EXACT, CG = Curvature("exact"), Curvature("ggn_cg", damping=0.0, cg_tol=1e-13, cg_max_iter=500)


# --------------------------------------------------------------------------- models and rows


class Linear(nn.Module):
    """A head on the inputs themselves."""

    def __init__(self, dim=6, outputs=3, bias=True):
        super().__init__()
        self.head = nn.Linear(dim, outputs, bias=bias)

    def features(self, features):
        return features

    def forward(self, features):
        return self.head(features)


class Deep(Mlp):
    """A head of two layers."""

    def __init__(self, dim=6, classes=3, width=5):
        super().__init__(dim, classes, width)
        self.head = nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, classes))


class Tied(nn.Module):
    """The head's weight is also the hidden layer's."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.head.weight = self.body.weight

    def features(self, features):
        return torch.tanh(self.body(features))

    def forward(self, features):
        return self.head(self.features(features))


def seeded(kind, *args, seed=0, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(*args, **settings).to(DOUBLE)


def rows_of(n=13, classes=3, dim=6, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, dim, generator=generator, dtype=DOUBLE).to(dtype)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return Rows.of({"features": inputs}, labels)


def drawn(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def eye(size):
    return torch.eye(size, dtype=DOUBLE)


# --------------------------------------------------------------------------- dense references


def loss_of(logits, label, outputs, smoothing):
    """Cross-entropy by its definition, in log-probabilities."""
    if outputs == 1:
        both = torch.stack([functional.logsigmoid(-logits[0]), functional.logsigmoid(logits[0])])
    else:
        both = torch.log_softmax(logits, dim=0)
    target = torch.full_like(both, smoothing / len(both))
    target[label] += 1 - smoothing
    return -(target * both).sum()


class Dense:
    """G (n, p), H (p, p) of Σ a·l, outputs and their Jacobian (m, K, p) by autograd, flat θ."""

    def __init__(self, model, names, outputs, smoothing=0.0):
        self.model, self.names, self.outputs, self.smoothing = model, names, outputs, smoothing
        known = dict(model.named_parameters())
        self.shapes = [known[name].shape for name in names]
        self.theta = torch.cat([known[name].detach().reshape(-1) for name in names])

    def call(self, theta, inputs):
        parts = torch.split(theta, [math.prod(shape) for shape in self.shapes])
        named = {n: p.view(s) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}
        self.model.eval()
        return functional_call(self.model, named, (inputs,))

    def loss(self, theta, x, y):
        return loss_of(self.call(theta, x[None])[0], y, self.outputs, self.smoothing)

    def losses(self, theta, rows):
        pairs = zip(rows.storage["features"], rows.labels, strict=True)
        return torch.stack([self.loss(theta, x, y) for x, y in pairs]).detach()

    def gradients(self, theta, rows):
        found = []
        for x, y in zip(rows.storage["features"], rows.labels, strict=True):
            leaf = theta.clone().requires_grad_()
            found.append(torch.autograd.grad(self.loss(leaf, x, y), leaf)[0])
        return torch.stack(found)

    def jacobian(self, theta, rows):
        return jacrev(lambda t: self.call(t, rows.storage["features"]))(theta)

    def ggn(self, theta, rows, a):
        logits = self.call(theta, rows.storage["features"]).detach()
        jacobian = self.jacobian(theta, rows)
        total = torch.zeros(len(theta), len(theta), dtype=DOUBLE)
        for j, y in enumerate(rows.labels):
            curved = hessian(lambda z, y=y: loss_of(z, y, self.outputs, self.smoothing))(logits[j])
            total += a[j] * jacobian[j].T @ curved @ jacobian[j]
        return total


def head_order(here, dense_values, bias=True):
    """Return (p, ...) values in the order of the head's flat θ: class by class, bias last."""
    if not bias:
        return dense_values
    outputs = here.num_outputs
    size = here.p // outputs - 1
    place = torch.arange(here.p)
    weight, offset = place[: outputs * size].view(outputs, size), place[outputs * size :]
    return dense_values[torch.cat([weight, offset[:, None]], dim=1).reshape(-1)]


def close(one, other, tolerance=1e-12):
    one, other = torch.as_tensor(one, dtype=DOUBLE), torch.as_tensor(other, dtype=DOUBLE)
    assert one.shape == other.shape
    scale = max(float(other.abs().max()), 1e-300)
    assert float((one - other).abs().max()) <= tolerance * max(scale, 1.0)


HEADS = [(1, True, 0.0), (1, False, 0.2), (2, True, 0.1), (3, False, 0.0), (4, True, 0.3)]


@pytest.fixture(params=HEADS, ids=lambda case: "K={} bias={} smoothing={}".format(*case))
def head(request):
    outputs, has_bias, smoothing = request.param
    model = seeded(Linear, 5, outputs, bias=has_bias)
    rows = rows_of(17, max(outputs, 2), 5)
    here = objective(model, rows, ridge=0.7, label_smoothing=smoothing, batch_size=4)
    names = [name for name, _ in model.named_parameters()]
    dense = Dense(model, names, outputs, smoothing)
    return here, dense, rows, lambda values: head_order(here, values, has_bias)


NETS = {
    "mlp": (Mlp, 3),
    "normed": (Normed, 3),
    "one output": (lambda: Mlp(classes=1), 1),
    "two": (lambda: Mlp(classes=2), 2),
}


def network(kind, smoothing=0.1, **settings):
    build, outputs = NETS[kind]
    model = seeded(build)
    if kind == "normed":
        model.norm.running_mean += 0.2
        model.norm.running_var *= 0.6
    rows = rows_of(11, max(outputs, 2))
    here = objective(
        model, rows, scope="full", ridge=0.3, label_smoothing=smoothing, batch_size=4, **settings
    )
    names = [name for name, _ in model.named_parameters()]
    return here, Dense(model, names, outputs, smoothing), rows


# --------------------------------------------------------------------------- head: closed forms


def test_head_agrees_with_autograd_row_by_row(head):
    here, dense, rows, ordered = head
    assert here.dense
    close(here.theta, ordered(dense.theta))
    close(here.losses(here.theta), dense.losses(dense.theta, rows))
    gradients, c = dense.gradients(dense.theta, rows), drawn(here.n)
    close(here.gradient(here.theta, c), ordered(gradients.T @ c))
    v = drawn(here.p, 3)
    close(here.along(here.theta, v), (ordered(gradients.T).T @ v).T)
    close(here.r0, ordered(gradients.sum(0) + 0.7 * dense.theta))
    close(here.stationarity, here.r0.norm() / gradients.norm(dim=1).sum())


def test_per_sample_gradient_of_a_logistic_row_is_residual_times_features(head):
    here, _, rows, _ = head
    logits = here.outputs(here.theta, rows)
    pi = torch.sigmoid(logits) if here.num_outputs == 1 else torch.softmax(logits, 1)
    hot = rows.labels[:, None].double()
    if here.num_outputs > 1:
        hot = functional.one_hot(rows.labels, here.num_outputs).double()
    smooth = here.smoothing / max(here.num_outputs, 2)
    x = rows.storage["features"]
    if here.features.bias:
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
    for j in (0, 5):
        c = torch.zeros(here.n, dtype=DOUBLE)
        c[j] = 1
        residual = pi[j] - (1 - here.smoothing) * hot[j] - smooth
        close(here.gradient(here.theta, c), torch.outer(residual, x[j]).reshape(-1))


def test_head_curvature_agrees_with_the_hessian(head):
    here, dense, rows, ordered = head
    a = drawn(here.n).abs() + 0.1

    def total(theta):
        inputs = rows.storage["features"]
        pairs = zip(inputs, rows.labels, a, strict=True)
        return sum(weight * dense.loss(theta, x, y) for x, y, weight in pairs)

    full = hessian(total)(dense.theta)
    expected = ordered(ordered(full).T).T
    found = here.ggn_matrix(here.theta, a)
    close(found, expected)
    close(here.ggn_diagonal(here.theta, a), expected.diagonal())
    close(here.ggn_trace(here.theta, a), expected.trace())
    v = drawn(here.p, 2)
    close(here.ggn_product(here.theta, a, v), expected @ v)
    dense_solution = torch.linalg.solve(expected + 0.7 * eye(here.p), v)
    close(here.factor(here.theta, a).solve(v), dense_solution, 1e-11)
    close(here.factor(here.theta, a, EXACT).solve(v[:, 0]), dense_solution[:, 0], 1e-11)
    diagonal = here.factor(here.theta, a, Curvature("diag")).solve(v)
    close(diagonal, v / (expected.diagonal() + 0.7)[:, None])
    close(here.factor(here.theta, a, Curvature("identity")).solve(v), v)


def test_outputs_and_pullback_of_other_rows(head):
    here, dense, _, ordered = head
    other = rows_of(7, max(here.num_outputs, 2), 5, seed=3)
    close(here.outputs(here.theta, other), dense.call(dense.theta, other.storage["features"]))
    jacobian = dense.jacobian(dense.theta, other)
    c = drawn(7, here.num_outputs, 2)
    expected = torch.einsum("mKp,mKk->pk", jacobian, c)
    close(here.pullback(here.theta, other, c), ordered(expected))
    close(here.pullback(here.theta, other, c[:, :, 0]), ordered(expected)[:, 0])


# --------------------------------------------------------------------------- networks


@pytest.mark.parametrize("mode", ["jvp", "double_vjp"])
@pytest.mark.parametrize("kind", NETS)
def test_network_agrees_with_autograd_row_by_row(kind, mode):
    here, dense, rows = network(kind)
    here.stats["jvp_mode"] = mode
    assert not here.dense
    assert here.p == len(dense.theta)
    theta = dense.theta + 0.1 * drawn(here.p)
    close(here.losses(theta), dense.losses(theta, rows))
    gradients, c = dense.gradients(theta, rows), drawn(here.n)
    close(here.gradient(theta, c), gradients.T @ c)
    v = drawn(here.p, 6)
    close(here.along(theta, v), (gradients @ v).T)
    ggn = dense.ggn(theta, rows, c)
    close(here.ggn_product(theta, c, v), ggn @ v, 1e-11)
    close(here.ggn_diagonal(theta, c), ggn.diagonal(), 1e-11)


@pytest.mark.parametrize("kind", NETS)
def test_network_outputs_and_pullback(kind):
    here, dense, _ = network(kind)
    other = rows_of(5, seed=4)
    close(here.outputs(here.theta, other), dense.call(dense.theta, other.storage["features"]))
    c = drawn(5, here.num_outputs, 2)
    expected = torch.einsum("mKp,mKk->pk", dense.jacobian(dense.theta, other), c)
    close(here.pullback(here.theta, other, c), expected)
    close(here.pullback(here.theta, other, c[:, :, 1]), expected[:, 1])


def test_the_trace_estimate_is_the_mean_of_ten_fixed_probes():
    here, dense, rows = network("mlp")
    a = torch.ones(here.n, dtype=DOUBLE)
    ggn, generator = dense.ggn(here.theta, rows, a), torch.Generator().manual_seed(0)
    probes = [torch.randint(0, 2, (here.p, k), generator=generator) for k in (4, 4, 2)]
    signs = (2 * torch.cat(probes, 1) - 1).double()
    close(here.ggn_trace(here.theta, a), torch.einsum("pk,pq,qk->k", signs, ggn, signs).mean())
    assert abs(here.ggn_trace(here.theta, a) / float(ggn.trace()) - 1) < 0.6


def test_float32_network_against_float64():
    model = seeded(lambda: Mlp(20, 2, 883)).float()
    rows = rows_of(30, 2, 20, dtype=torch.float32)
    here = objective(model, rows, scope="full", ridge=1.0, batch_size=8)
    assert here.p == 20_311
    wide = Rows.of({"features": rows.storage["features"].double()}, rows.labels)
    exact = objective(copy.deepcopy(model).double(), wide, scope="full", ridge=1.0)
    v = drawn(here.p, 2)
    found, expected = here.along(here.theta, v), exact.along(exact.theta, v)
    assert float((found - expected).norm() / expected.norm()) <= 2e-6
    assert not here.precise
    assert exact.precise


# --------------------------------------------------------------------------- forward mode or not


class NoRule(torch.autograd.Function):
    """Twice the input, without a forward rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class WrongRule(NoRule):
    """Twice the input; the forward rule claims three times."""

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * tangent


@pytest.mark.parametrize("rule", [NoRule, WrongRule])
def test_without_a_sound_forward_rule_two_reverse_passes_are_used(rule):
    class Odd(Mlp):
        def features(self, features):
            return rule.apply(super().features(features))

    model, rows = seeded(Odd), rows_of()
    here = objective(model, rows, scope="full", ridge=1.0, batch_size=5)
    dense = Dense(model, [name for name, _ in model.named_parameters()], 3)
    v = drawn(here.p, 3)
    assert here.stats["jvp_mode"] is None
    close(here.along(here.theta, v), (dense.gradients(dense.theta, rows) @ v).T)
    assert here.stats["jvp_mode"] == "double_vjp"
    assert here.stats["jvp_reason"]
    assert network("mlp")[0].along(dense.theta, v).shape == (3, 11)


def test_forward_mode_is_used_where_it_works():
    here, _, _ = network("normed")
    here.along(here.theta, drawn(here.p, 1))
    assert here.stats == {"jvp_mode": "jvp"}
    factor = here.factor(here.theta, torch.ones(here.n), CG)
    factor.solve(drawn(here.p))
    assert factor.stats["jvp_mode"] == "jvp"


# --------------------------------------------------------------------------- scopes


def test_a_tied_weight_counts_once():
    model, rows = seeded(Tied), rows_of(classes=6)
    here = objective(model, rows, scope="full", ridge=1.0)
    assert here.p == 36 + 6
    dense = Dense(model, ["body.weight", "head.bias"], 6)
    v = drawn(here.p, 2)
    close(here.along(here.theta, v), (dense.gradients(dense.theta, rows) @ v).T)
    assert not is_linear_head(model)
    tied_head = objective(model, rows, scope="head", ridge=1.0)
    assert not tied_head.dense
    close(tied_head.along(here.theta, v), here.along(here.theta, v))


def test_frozen_parameters_never_enter():
    model, rows = seeded(Mlp), rows_of()
    model.body.requires_grad_(False)
    here = objective(model, rows, scope="full", ridge=1.0)
    assert here.p == model.head.weight.numel() + model.head.bias.numel()
    assert here.dense  # what is left is a linear head
    model.head.weight.requires_grad_(False)
    part = objective(model, rows, scope="head", ridge=1.0)
    assert part.p == 3
    dense = Dense(model, ["head.bias"], 3)
    close(part.gradient(part.theta, torch.ones(13)), dense.gradients(dense.theta, rows).sum(0))


def test_some_parameters_by_name_and_a_deep_head():
    model, rows = seeded(Deep), rows_of()
    here = objective(model, rows, scope=("body.bias", "head.2.weight"), ridge=1.0)
    dense = Dense(model, ["body.bias", "head.2.weight"], 3)
    v = drawn(here.p, 2)
    close(here.along(here.theta, v), (dense.gradients(dense.theta, rows) @ v).T)
    deep = objective(model, rows, scope="head", ridge=1.0)
    assert deep.p == sum(p.numel() for p in model.head.parameters())
    assert deep.kind(Curvature()) == "ggn_cg"
    with pytest.raises(NotApplicable, match="linear head"):
        deep.factor(deep.theta, torch.ones(deep.n), EXACT)


def test_features_that_do_not_enter_the_head_are_noticed():
    class Scaled(Mlp):
        def forward(self, features):
            return 2 * self.head(self.features(features))

    model, rows = seeded(Scaled), rows_of()
    here = objective(model, rows, scope="head", ridge=1.0)
    assert not here.dense
    dense = Dense(model, ["head.weight", "head.bias"], 3)
    close(here.gradient(here.theta, torch.ones(13)), dense.gradients(dense.theta, rows).sum(0))


@pytest.mark.parametrize("scope", ["head", "full", ("body.weight", "head.bias")])
def test_write_puts_theta_into_the_scope_and_nowhere_else(scope):
    model, rows = seeded(Mlp), rows_of()
    here = objective(model, rows, scope=scope, ridge=1.0)
    before = copy.deepcopy(model.state_dict())
    here.write(model, here.theta)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    here.write(model, here.theta + 1)
    again = objective(model, rows, scope=scope, ridge=1.0)
    close(again.theta, here.theta + 1)
    moved = {n for n, value in model.state_dict().items() if not torch.equal(before[n], value)}
    inside = {"head": {"head.weight", "head.bias"}, "full": set(before)}
    assert moved == (inside[scope] if isinstance(scope, str) else set(scope))


def test_wrapped_models_are_unwrapped():
    class Compiled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner

    model, rows = seeded(Mlp), rows_of()
    here = objective(Compiled(model), rows, ridge=1.0)
    close(here.theta, objective(model, rows, ridge=1.0).theta)
    target = seeded(Mlp, seed=1)
    here.write(Compiled(target), here.theta)
    assert torch.equal(target.head.weight, model.head.weight)


# --------------------------------------------------------------------------- the state of a model


class Watched(Normed):
    """Notes the mode and the kernels of every pass; raises at pass `stop`."""

    stop = None

    def features(self, features):
        self.seen.append(
            (
                any(module.training for module in self.modules()),
                self.fused_attn,
                torch.backends.mha.get_fastpath_enabled(),
                torch.backends.cuda.flash_sdp_enabled(),
                torch.is_autocast_enabled("cpu"),
            )
        )
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        return super().features(features)


@pytest.mark.parametrize("scope", ["head", "full"])
@pytest.mark.parametrize("stop", [None, 3])
def test_passes_are_quiet_and_put_everything_back(scope, stop):
    model, rows = seeded(Watched).train(), rows_of()
    model.seen, model.fused_attn, model.stop = [], True, stop
    before, fast = copy.deepcopy(model.state_dict()), torch.backends.mha.get_fastpath_enabled()
    flash = torch.backends.cuda.flash_sdp_enabled()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            here = objective(model, rows, scope=scope, ridge=1.0, batch_size=5)
            here.along(here.theta, drawn(here.p, 2))
            here.factor(here.theta, torch.ones(13), CG).solve(here.r0)
            assert torch.is_autocast_enabled("cpu")
    except KeyboardInterrupt:
        assert stop == len(model.seen)
    assert set(model.seen) == {(False, False, False, False, False)}
    assert all(module.training for module in model.modules())
    assert model.fused_attn is True
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(made) if _real(t)]
        self.entries = max([self.entries, *sizes])
        return made


def _real(item):
    return isinstance(item, torch.Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(
        item
    )


def test_no_tensor_grows_with_rows_times_parameters():
    model = seeded(lambda: Mlp(6, 3, 60))
    sizes = []
    for n in (64, 256):
        rows = rows_of(n)
        here = objective(model, rows, scope="full", ridge=1.0, batch_size=16)
        v = drawn(here.p, 2)
        with Largest() as seen:
            here.along(here.theta, v)
            here.ggn_product(here.theta, torch.ones(n), v)
        sizes.append(seen.entries)
    assert sizes[0] == sizes[1] < 64 * here.p / 8


def test_features_are_computed_once_per_rows_object_and_held_weakly():
    model, rows, calls = seeded(Mlp), rows_of(), []
    here = objective(model, rows, ridge=1.0)
    model.body.register_forward_hook(lambda *_: calls.append(1))
    one, two = rows_of(5, seed=1), rows_of(5, seed=2)
    found = [here.outputs(here.theta, other) for other in (one, two, one, two)]
    here.along(here.theta, drawn(here.p, 1))
    assert len(calls) == 2
    close(found[3], model(two.storage["features"]).detach())
    close(found[2], found[0])
    held = weakref.ref(one)
    del one
    gc.collect()
    assert held() is None
    three, known = rows_of(5, seed=3), here.features._known
    known[id(three)] = known[id(two)]  # as if the identity had been used before
    close(here.outputs(here.theta, three), model(three.storage["features"]).detach())


# --------------------------------------------------------------------------- streams


@pytest.mark.parametrize("scope", ["head", "streamed", "full"])
def test_batch_size_and_order_change_nothing(scope):
    model, rows = seeded(Normed), rows_of(23)
    settings = {"cache_bytes": 0} if scope == "streamed" else {}
    scope = "full" if scope == "full" else "head"
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    made = [
        objective(model, some, scope=scope, ridge=1.0, batch_size=size, **settings)
        for some, size in [(rows, 23), (rows, 1), (rows, 7), (rows.subset(order), 7)]
    ]
    v, a = drawn(made[0].p, 2), drawn(23).abs()
    whole, ones = made[0], torch.ones(23, dtype=DOUBLE)
    for here in made:
        back = torch.argsort(here.index)
        close(here.along(here.theta, v)[:, back], whole.along(whole.theta, v))
        close(here.losses(here.theta)[back], whole.losses(whole.theta))
        close(here.gradient(here.theta, a[here.index]), whole.gradient(whole.theta, a))
        product = here.ggn_product(here.theta, a[here.index], v)
        close(product, whole.ggn_product(whole.theta, a, v))
        if here.dense:
            close(here.ggn_matrix(here.theta, ones), whole.ggn_matrix(whole.theta, ones))


def test_rows_of_weight_zero_are_not_read():
    inputs, seen = rows_of().storage["features"], []

    def decode(positions):
        seen.extend(positions.tolist())
        return {"features": inputs[positions]}

    rows = Rows.of({}, rows_of().labels, decode=decode)
    here = objective(seeded(Mlp), rows, scope="full", ridge=1.0)
    seen.clear()
    c = torch.zeros(13)
    c[[2, 9]] = 1
    found = here.gradient(here.theta, c)
    assert seen == [2, 9]
    here.ggn_product(here.theta, c, drawn(here.p, 1))
    assert set(seen) == {2, 9}
    whole = objective(seeded(Mlp), rows_of(), scope="full", ridge=1.0)
    close(found, whole.gradient(whole.theta, c))
    assert not bool(here.gradient(here.theta, torch.zeros(13)).any())


# --------------------------------------------------------------------------- the biased table


TRAIN, VAL, _ = bias.draw()
FITTED = bias.fit(TRAIN.x, TRAIN.y)


def table(part):
    return Rows.of({"features": torch.tensor(part.x)}, torch.tensor(part.y))


def two_classes(train=TRAIN, theta=FITTED, ridge=4.0):
    """The logistic model as two classes with opposite weights: twice the ridge, half of each."""
    model = Linear(20, 2, bias=False).to(DOUBLE)
    half = torch.tensor(theta) / 2
    model.head.weight.data = torch.stack([-half, half])
    return objective(model, table(train), ridge=ridge)


def one_logit(train=TRAIN, theta=FITTED, ridge=2.0):
    model = Linear(20, 1, bias=False).to(DOUBLE)
    model.head.weight.data = torch.tensor(theta)[None]
    return objective(model, table(train), ridge=ridge)


FORMS = {"two classes": two_classes, "one logit": one_logit}


def as_logistic(theta):
    """Return the logistic weights (20,) of θ of either form."""
    return (theta if len(theta) == 20 else theta[20:] - theta[:20]).numpy()


def criteria(here, val=VAL):
    """Gradients (p, 2) of the parity gap and of the summed loss on validation rows."""
    rows = table(val)
    logits, y = here.outputs(here.theta, rows), torch.tensor(val.y).double()
    margin = logits[:, 0] if here.num_outputs == 1 else logits[:, 1] - logits[:, 0]
    chance, s = torch.sigmoid(margin), torch.tensor(val.s)
    signs = (s == 1).double() / (s == 1).sum() - (s == 0).double() / (s == 0).sum()
    slopes = torch.stack([signs * chance * (1 - chance), chance - y], dim=1)[:, None]
    sides = slopes if here.num_outputs == 1 else torch.cat([-slopes, slopes], dim=1)
    return here.pullback(here.theta, rows, sides)


def influences_of(here, settings=None, val=VAL):
    solved = here.factor(here.theta, torch.ones(here.n), settings).solve(criteria(here, val))
    return here.along(here.theta, solved)


@pytest.mark.parametrize("form", FORMS)
def test_known_influences_of_the_biased_table(form):
    here = FORMS[form]()
    parity, utility = influences_of(here)
    for found, expected in zip((parity, utility), bias.influences(TRAIN, VAL, FITTED), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)
    assert float(parity.norm()) == pytest.approx(0.0213430, abs=5e-8)
    assert float(utility.norm()) == pytest.approx(4.62394, abs=5e-6)
    cosine = parity @ utility / (parity.norm() * utility.norm())
    assert float(cosine) == pytest.approx(-0.33156, abs=5e-6)
    assert int((parity < 0).sum()) == 1109
    assert int(((parity < 0) & (utility < 0)).sum()) == 635


@pytest.mark.parametrize("form", FORMS)
def test_all_influences_together_are_the_pull_of_the_ridge(form):
    here = FORMS[form]()
    gradient = criteria(here)
    solved = here.factor(here.theta, torch.ones(here.n)).solve(gradient)
    sums = here.along(here.theta, solved).sum(dim=1)
    close(sums, -here.ridge * solved.T @ here.theta, 1e-11)
    assert float(sums[0]) == pytest.approx(-0.00194289, abs=5e-9)
    assert float(sums[1]) == pytest.approx(-0.456848, abs=5e-7)


@pytest.mark.parametrize("c", [-0.5, 0.3, 2.0])
def test_equal_weights_only_change_the_ridge(c):
    here = two_classes()
    refit = here.refit(torch.full((here.n,), c), here.theta)
    expected = bias.fit(TRAIN.x, TRAIN.y, mu=2 / (1 + c))
    np.testing.assert_allclose(as_logistic(refit.theta), expected, rtol=0, atol=1e-7)
    assert refit.stats["gradient_max"] <= 1e-9 * here.n


@pytest.mark.parametrize("form", FORMS)
def test_refit_is_the_weighted_fit(form):
    here = FORMS[form]()
    e = (0.9 * drawn(here.n)).clamp(-1, 2)
    refit = here.refit(e, here.theta)
    expected = bias.fit(TRAIN.x, TRAIN.y, weight=1 + e.numpy())
    np.testing.assert_allclose(as_logistic(refit.theta), expected, rtol=0, atol=1e-7)
    assert 1 <= refit.stats["steps"] <= 8
    still = here.refit(torch.zeros(here.n), here.theta)
    assert torch.equal(still.theta, here.theta)
    assert still.stats["steps"] == 0


def test_refit_from_far_away_is_halved_and_ends_at_the_same_place():
    here = one_logit()
    e = 0.5 * drawn(here.n).clamp(-2, 2)
    far = here.refit(e, here.theta + 40 * drawn(here.p))
    close(far.theta, here.refit(e, here.theta).theta, 1e-7)
    assert far.stats["steps"] > 3


def test_the_tilt_keeps_a_model_that_is_no_optimum():
    here = two_classes(theta=FITTED + 0.3)
    assert here.stationarity > 0.01
    zero = torch.zeros(here.n)
    assert torch.equal(here.refit(zero, here.theta).theta, here.theta)
    e = 0.2 * drawn(here.n).clamp(-2, 2)
    theta = here.refit(e, here.theta).theta
    data = here.gradient(theta, 1 + e)
    untilted = data + here.ridge * theta
    assert float((untilted - here.r0).abs().max()) <= 1e-9 * here.n
    assert two_classes().stationarity < 1e-12


def test_first_order_step_is_wrong_in_the_second_order_only():
    here, e = one_logit(), 0.5 * np.random.default_rng(0).standard_normal(1500)
    factor = here.factor(here.theta, torch.ones(here.n))
    step = factor.solve(here.gradient(here.theta, torch.tensor(e))).numpy()
    gaps = []
    for h in (1, 0.5, 0.25, 0.125):
        retrained = bias.fit(TRAIN.x, TRAIN.y, weight=1 + h * e)
        gaps.append(np.linalg.norm(retrained - (FITTED - h * step)))
    assert gaps == pytest.approx([1.84e-2, 4.46e-3, 1.10e-3, 2.75e-4], rel=0.01)
    assert all(3.4 <= before / after <= 4.6 for before, after in itertools.pairwise(gaps))


def test_a_small_target_is_met_as_predicted():
    here = one_logit()
    parity, utility = (values.numpy() for values in influences_of(here))
    gap, loss = bias.parity(VAL, FITTED), bias.log_loss(VAL.x, VAL.y, FITTED).sum()
    neutral = parity - (parity @ utility) / (utility @ utility) * utility
    drifts = []
    for target in (1e-3 * gap, 5e-4 * gap):
        e = target * neutral / (neutral @ neutral)
        theta = as_logistic(here.refit(torch.tensor(e), here.theta).theta)
        assert -e @ parity == pytest.approx(-target)
        assert bias.parity(VAL, theta) - gap == pytest.approx(-target, rel=5e-3)
        drifts.append(bias.log_loss(VAL.x, VAL.y, theta).sum() - loss)
    assert 1e-3 * gap == pytest.approx(4.577e-4, abs=5e-8)
    assert drifts[0] == pytest.approx(1.5e-4, rel=0.1)
    assert drifts[0] / drifts[1] == pytest.approx(4, rel=0.1)


def without(row, steps=3):
    """Return the fit without one row, by Newton from the fit with it."""
    weight, theta = np.ones(len(TRAIN.y)), FITTED
    weight[row] = 0
    for _ in range(steps):
        slope = bias.gradient(TRAIN.x, TRAIN.y, theta, bias.RIDGE, weight)
        theta = theta - np.linalg.solve(bias.hessian(TRAIN.x, theta, bias.RIDGE, weight), slope)
    assert np.abs(bias.gradient(TRAIN.x, TRAIN.y, theta, bias.RIDGE, weight)).max() < 1e-9
    return theta


def test_influence_ranks_rows_as_leaving_each_out_does():
    here = one_logit()
    y, s = torch.tensor(VAL.y), torch.tensor(VAL.s)
    own = (y == 1).double()
    signs = own * (s == 0) / own[s == 0].sum() - own * (s == 1) / own[s == 1].sum()
    residual = torch.sigmoid(here.outputs(here.theta, table(VAL))) - y[:, None]
    gap = here.pullback(here.theta, table(VAL), signs[:, None] * residual)
    gradients = torch.cat([criteria(here), gap[:, None]], dim=1)
    solved = here.factor(here.theta, torch.ones(here.n)).solve(gradients)
    predicted = here.along(here.theta, solved).numpy()

    def measured(theta):
        summed = bias.log_loss(VAL.x, VAL.y, theta).sum()
        return np.array([bias.parity(VAL, theta), summed, bias.loss_gap(VAL, theta)])

    true = np.stack([measured(without(j)) for j in range(here.n)], axis=1)
    true -= measured(FITTED)[:, None]
    for found, expected in zip(predicted, true, strict=True):
        assert stats.pearsonr(found, expected).statistic > 0.99
        assert stats.spearmanr(found, expected).statistic > 0.99
    chance = bias.sigmoid(TRAIN.x @ FITTED)
    inverse = np.linalg.inv(bias.hessian(TRAIN.x, FITTED, bias.RIDGE, np.ones(here.n)))
    lever = chance * (1 - chance) * np.einsum("nd,de,ne->n", TRAIN.x, inverse, TRAIN.x)
    errors = [
        np.linalg.norm(found - true[0]) / np.linalg.norm(true[0])
        for found in (predicted[0], predicted[0] / (1 - lever))
    ]
    assert errors == pytest.approx([0.019, 0.0011], rel=0.05)


# --------------------------------------------------------------------------- solvers


@pytest.mark.parametrize("form", FORMS)
def test_conjugate_gradients_reach_cholesky(form):
    here = FORMS[form]()
    a, rhs = 1 + 0.5 * drawn(here.n).clamp(-1, 1), criteria(here)
    exact = here.factor(here.theta, a, EXACT).solve(rhs)
    factor = here.factor(here.theta, a, CG)
    found = factor.solve(rhs)
    assert float((found - exact).norm() / exact.norm()) <= 1e-10
    assert factor.stats["iterations"] <= 2 * 20
    assert factor.stats["residual"] <= 1e-12
    assert "warning" not in factor.stats


@pytest.mark.parametrize("scope", ["head", "full"])
def test_heavy_damping_leaves_the_plain_inner_product(scope):
    model, rows = seeded(Mlp), rows_of()
    here = objective(model, rows, scope=scope, ridge=1e-3, floor=0.0)
    factor = here.factor(here.theta, torch.ones(13), Curvature("ggn_cg", damping=1e7))
    direction = drawn(here.p, 1)
    damped = here.along(here.theta, factor.stats["damping"] * factor.solve(direction))
    close(damped, here.along(here.theta, direction), 1e-5)


def test_network_solves_with_the_dense_damped_ggn():
    here, dense, rows = network("mlp")
    a, rhs = 0.5 + drawn(here.n).abs(), drawn(here.p, 3)
    factor = here.factor(here.theta, a, Curvature(damping=0.01))
    found = factor.solve(rhs)
    matrix = dense.ggn(here.theta, rows, a)
    damping = 0.01 * here.ggn_trace(here.theta, a) / here.p
    matrix += (0.3 + damping) * eye(here.p)
    close(found, torch.linalg.solve(matrix, rhs), 1e-9)
    assert factor.stats["kind"] == "ggn_cg"
    assert factor.stats["damping"] == pytest.approx(damping)
    assert factor.stats["residual"] <= 1e-9


def test_network_refit_is_one_damped_newton_step():
    here, dense, rows = network("two")
    e = 0.5 * drawn(here.n).clamp(-1, 1)
    start, settings = here.theta + 0.05 * drawn(here.p), Curvature(damping=0.02)
    refit = here.refit(e, start, settings)
    gradients, origin = dense.gradients(start, rows), dense.gradients(here.theta, rows)
    gradient = gradients.T @ (1 + e) + 0.3 * start - (origin.sum(0) + 0.3 * here.theta)
    damping = 0.02 * here.ggn_trace(start, 1 + e) / here.p
    matrix = dense.ggn(start, rows, 1 + e) + (0.3 + damping) * eye(here.p)
    close(refit.theta, start - torch.linalg.solve(matrix, gradient), 1e-8)
    close(here.tilted_gradient(start, e), gradient)
    close(here.tilted_gradient(here.theta, e), origin.T @ e)
    height = here.tilted_gradient(refit.theta, e).abs().max()
    assert refit.stats["gradient_max"] == pytest.approx(float(height))
    assert refit.stats["steps"] == 1
    still = here.refit(torch.zeros(here.n), here.theta, settings)
    assert torch.equal(still.theta, here.theta)


def test_a_large_head_is_solved_without_its_matrix():
    model, rows = seeded(Linear, 5, 3), rows_of(17, 3, 5)
    here = objective(model, rows, ridge=0.5)
    small = Curvature(exact_max=here.p - 1)
    assert here.kind(small) == "ggn_cg"
    assert here.kind(Curvature(exact_max=here.p)) == "exact"
    rhs, a = drawn(here.p, 2), torch.ones(17)
    factor = here.factor(here.theta, a, small)
    assert factor.stats["damping"] == pytest.approx(1e-3 * here.ggn_trace(here.theta, a) / here.p)
    matrix = here.ggn_matrix(here.theta, a) + (0.5 + factor.stats["damping"]) * eye(here.p)
    close(factor.solve(rhs), torch.linalg.solve(matrix, rhs), 1e-9)


def test_unconverged_solves_warn_or_fail():
    here = two_classes()
    rhs, ones = criteria(here), torch.ones(here.n)
    rough = here.factor(here.theta, ones, Curvature("ggn_cg", cg_max_iter=6, cg_tol=1e-12))
    rough.solve(rhs)
    assert 1e-11 < rough.stats["residual"] <= 1e-2
    assert "CG residual" in rough.stats["warning"]
    with pytest.raises(NumericalError, match="raise damping or cg_max_iter"):
        here.factor(here.theta, ones, Curvature("ggn_cg", cg_max_iter=1)).solve(rhs)


def test_conjugate_gradients_take_columns_of_any_size():
    matrix = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=DOUBLE))
    rhs = torch.tensor([[0.0, 1e-9, 1.0], [0.0, 2e-9, 1e6], [0.0, 0.0, 1.0]], dtype=DOUBLE)
    found, iterations, residual = conjugate_gradients(lambda v: matrix @ v, rhs, 1e-12, 10)
    np.testing.assert_allclose(matrix @ found, rhs, rtol=1e-11)
    assert iterations == 3
    assert residual <= 1e-12
    assert conjugate_gradients(lambda v: v, torch.zeros(3, 1), 1e-6, 5)[1:] == (0, 0.0)


def test_cholesky_adds_as_little_as_is_needed():
    flat = torch.ones(4, 4, dtype=DOUBLE)
    flat[0, 0] -= 1e-9
    assert cholesky(eye(3))[1] == 0
    lower, jitter = cholesky(flat)
    assert jitter == pytest.approx(1e-6)
    close(lower @ lower.T, flat + jitter * eye(4))
    with pytest.raises(NumericalError, match="positive definite"):
        cholesky(-eye(3))


# --------------------------------------------------------------------------- ridge, bad input


def test_ridge_is_raised_to_the_floor_and_says_so():
    rows = rows_of(50, 2)
    here = objective(seeded(Linear, 6, 2), rows, ridge=0.0)
    x = rows.storage["features"]
    floor = 1e-4 * float((x**2).sum() + 50) / 6
    assert here.ridge == pytest.approx(floor)
    assert here.stats == {"ridge_asked": 0.0}
    assert here.factor(here.theta, torch.ones(50)).stats["ridge_asked"] == 0.0
    assert objective(seeded(Linear, 6, 2), rows, ridge=0.0, floor=0.0).ridge == 0
    high = objective(seeded(Linear, 6, 2), rows, ridge=1.0)
    assert high.ridge == 1
    assert not high.stats


def test_ridge_of_a_recipe():
    assert ridge_of(Recipe(weight_decay=5e-4), 1000) == 0.5


@pytest.mark.parametrize("scope", ["head", "full"])
def test_values_that_are_not_finite_name_their_samples(scope):
    rows = rows_of()
    inputs = rows.storage["features"].clone()
    inputs[[7, 9]] = math.nan
    broken = Rows.of({"features": inputs}, rows.labels, torch.arange(100, 113))
    here = objective(seeded(Mlp), broken, scope=scope, ridge=1.0, floor=0.0)
    with pytest.raises(NumericalError, match=r"samples \[107, 109\]"):
        here.losses(here.theta)
    with pytest.raises(NumericalError, match=r"samples \[107, 109\]"):
        here.along(here.theta, drawn(here.p, 1))
    with pytest.raises(NumericalError, match=r"samples \[107, 109\]"):
        here.gradient(here.theta, torch.ones(13))


def test_a_right_hand_side_that_is_not_finite_is_refused():
    here = one_logit()
    factor = here.factor(here.theta, torch.ones(here.n))
    with pytest.raises(NumericalError, match="right-hand side"):
        factor.solve(torch.full((here.p,), math.inf))


def test_negative_weights_that_spoil_the_curvature_fail_loudly():
    here = one_logit()
    with pytest.raises(NumericalError, match="positive definite"):
        here.factor(here.theta, -torch.ones(here.n))
    with pytest.raises(NumericalError, match="positive definite"):
        here.refit(torch.full((here.n,), -2.0), here.theta)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scope": "tail"}, ConfigError, "head, full or names"),
        ({"scope": ("head.wieght",)}, ConfigError, "head.weight"),
        ({"ridge": -1.0}, ConfigError, "ridge"),
        ({"rows": rows_of(4).subset([])}, DataError, "got none"),
        ({"rows": rows_of(9, 7)}, DataError, r"labels 0\.\.2"),
        ({"model": nn.Linear(6, 3)}, NotApplicable, "no module `head`"),
        ({"model": seeded(Mlp).requires_grad_(False)}, NotApplicable, "trainable"),
    ],
)
def test_bad_input_is_refused(settings, error, message):
    asked = {"model": seeded(Mlp), "rows": rows_of(), "ridge": 1.0} | settings
    with pytest.raises(error, match=message):
        objective(asked.pop("model"), asked.pop("rows"), **asked)


@pytest.mark.parametrize(
    "settings",
    [{"kind": "lissa"}, {"damping": -1.0}, {"cg_tol": 0.0}, {"cg_max_iter": 0}, {"exact_max": -1}],
)
def test_bad_curvature_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Curvature(**settings)
