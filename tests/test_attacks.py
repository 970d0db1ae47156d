"""Attacks on pixels and columns: balls, boxes, closed forms, independence, and what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from unsc_plugin import attacks, data
from unsc_plugin._data.tables import TableEncoder
from unsc_plugin.attacks import PGD, Space, draw, draw_targets, norms, open_space, perturbed, pgd
from unsc_plugin.errors import ConfigError, DataError, InputDomainError, NotApplicable
from unsc_plugin.models import Classifier, build, load_model, save_model, wrap
from unsc_plugin.spec import BackboneEntry, DataInfo, DatasetEntry

torch.set_num_threads(1)
DOUBLE = torch.float64
K = 4


# --------------------------------------------------------------------------- models and inputs


def info_of(modality="image", shape=(1, 8, 8), classes=K, **more):
    return DataInfo(
        name="toy",
        modality=modality,
        num_classes=classes,
        input_shape=shape,
        labels_sha256="",
        **more,
    )


def redrawn(model, seed=1, gain=1.0):
    """Redraw every weight N(0, gain²/inputs), so that no fresh head is nearly constant."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
        if parameter.ndim > 1:
            parameter.data.copy_(gain * noise / parameter[0].numel() ** 0.5)
    return model


def conv(dtype=DOUBLE, gain=2.0):
    """A small convolutional net with BatchNorm whose statistics are not those of a fresh one."""
    entry = BackboneEntry(source="torch", id="small-cnn", args={"widths": (8, 8)})
    model = redrawn(build(entry, info_of(), seed=0), gain=gain)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(0.1)
            module.running_var.fill_(0.5)
    return balanced(model.double(), pixels(64, seed=9)).to(dtype)


def balanced(model, inputs, spread=2.0):
    """Move the head so that on `inputs` the logits of every class have mean 0 and one deviation."""
    with torch.no_grad():
        logits, head = model(**inputs), model.backbone.head
        scale = spread / logits.std(dim=0)
        head.bias.copy_((head.bias - logits.mean(dim=0)) * scale)
        head.weight.mul_(scale[:, None])
    return model


def pixels(count=9, shape=(1, 8, 8), seed=0, dtype=DOUBLE):
    """Noise that touches both faces of the box."""
    drawn = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return {"pixel_values": (1.4 * drawn - 0.2).clamp(0, 1).to(dtype)}


def others(model, inputs):
    """A target for every row that is not what the model predicts."""
    with torch.no_grad():
        return (model(**inputs).argmax(dim=1) + 1) % K


class Linear(nn.Module):
    """logits = W·x + b of columns."""

    def __init__(self, weight, bias=None):
        super().__init__()
        weight = torch.as_tensor(weight, dtype=DOUBLE)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight), dtype=DOUBLE) if bias is None else bias)

    def forward(self, features):
        return features @ self.weight.T + self.bias


class Sure(nn.Module):
    """Always says class 0, so that every attack on it stays where it starts."""

    def forward(self, pixel_values):
        zero = 0 * pixel_values.flatten(1).sum(dim=1)
        return torch.stack([zero + 9, zero, zero], dim=1)


def entering(model, inputs, delta, space):
    """What the model itself is given as input in a perturbed forward pass."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs[space.key]), with_kwargs=True
    )
    with torch.no_grad():
        perturbed(model, inputs, delta, space)
    handle.remove()
    return seen[0]


def moved(model, inputs, found, space):
    """Length of what really happens to the inputs of a model, final clip included."""
    given = inputs[space.key]
    return (entering(model, inputs, found.delta, space) - given).flatten(1).norm(dim=1)


# --------------------------------------------------------------------------- ball and box


def test_full_attacks_stay_in_ball_and_box_and_succeed_more_with_a_larger_ball():
    model = conv(torch.float32)
    inputs = pixels(32, dtype=torch.float32)
    target, space = others(model, inputs), open_space(model, inputs)
    successes, passed = [], []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: passed.append(kwargs["pixel_values"].detach().aminmax()),
        with_kwargs=True,
    )
    for eps in (0.25, 0.5, 1.0, 2.0, 4.0):
        cfg = PGD(eps=eps, steps=max(15, int(12 * eps)), stop_confidence=None)
        found = pgd(model, inputs, target, cfg, space=space)
        given = entering(model, inputs, found.delta, space)
        assert float(moved(model, inputs, found, space).max()) <= eps * (1 + 1e-5)
        assert float(found.norm.max()) <= eps * (1 + 1e-5)
        assert given.min() >= 0
        assert given.max() <= 1
        assert found.image_steps == 32 * cfg.steps
        successes.append(int(found.success.sum()))
    assert {(float(ends.min), float(ends.max)) for ends in passed} == {(0.0, 1.0)}
    assert successes == sorted(successes)
    assert successes[0] < successes[-1]


@pytest.mark.parametrize(("eps", "exceeded"), [(0.5, True), (100.0, False)])
def test_noise_starts_on_the_sphere_when_it_would_start_outside(eps, exceeded):
    inputs = pixels(6)
    found = pgd(Sure(), inputs, torch.zeros(6, dtype=torch.long), PGD(eps=eps, init="noise"))
    assert found.image_steps == 0
    there = inputs["pixel_values"] + found.delta
    assert there.min() >= -1e-12
    assert there.max() <= 1 + 1e-12
    if exceeded:
        torch.testing.assert_close(
            found.norm, torch.full((6,), eps, dtype=DOUBLE), rtol=1e-5, atol=0
        )
    else:
        assert stats.kstest(there.flatten().numpy(), "uniform").pvalue > 1e-3


def test_ball_starts_fill_the_ball_evenly():
    """The volume inside radius r grows as r^d, so (‖δ‖/eps)^d is uniform."""
    inputs = {"pixel_values": torch.full((600, 1, 1, 3), 0.5, dtype=DOUBLE)}
    target = torch.zeros(600, dtype=torch.long)
    found = pgd(Sure(), inputs, target, PGD(eps=0.4, init="ball"))
    assert stats.kstest((found.norm / 0.4).numpy() ** 3, "uniform").pvalue > 1e-3
    linf = pgd(Sure(), inputs, target, PGD(norm="linf", eps=0.4, init="ball"))
    share = (linf.delta.flatten().numpy() / 0.4 + 1) / 2
    assert stats.kstest(share, "uniform").pvalue > 1e-3


@pytest.fixture
def normalised():
    """A net of normalised pixels, its statistics, and pixels that are mostly dark."""
    net = redrawn(nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, K)))
    mean, std = [0.2, 0.4, 0.5], [0.5, 0.25, 0.4]
    return net.double(), mean, std, pixels(8, (3, 4, 4))


def test_a_view_of_normalised_pixels_attacks_in_pixels(normalised):
    net, mean, std, inputs = normalised
    inside = wrap(net, num_classes=K, modality="image", mean=mean, std=std).double()
    view = attacks.pixel_view(net, mean, std).double()
    target = others(inside, inputs)
    for cfg in (PGD(eps=0.5, stop_confidence=None, steps=20), PGD()):
        one, two = pgd(inside, inputs, target, cfg), pgd(view, inputs, target, cfg)
        torch.testing.assert_close(one.delta, two.delta, rtol=0, atol=1e-5)
        assert bool(one.delta.any())
    assert set(view.state_dict()) == {f"module.{name}" for name in net.state_dict()}
    outside = wrap(net, num_classes=K, modality="image")
    named = attacks.pixel_view(outside, mean, std).double()
    torch.testing.assert_close(named(**inputs), inside(**inputs))
    with pytest.raises(ConfigError, match="one of each per channel"):
        attacks.pixel_view(net, [0.5], [0.0])


def test_zero_one_bounds_on_normalised_inputs_break_the_ball(normalised):
    """The mistake that spaces exclude: the same check that holds in pixels must fail here."""
    net, mean, std, inputs = normalised
    view, eps = attacks.pixel_view(net, mean, std).double(), 0.5
    cfg = PGD(eps=eps, steps=10, stop_confidence=None)
    found = pgd(view, inputs, others(view, inputs), cfg)
    right = open_space(view, inputs)
    assert float(moved(view, inputs, found, right).max()) <= eps * (1 + 1e-5)

    class Named(nn.Module):
        def forward(self, pixel_values):
            return net(pixel_values)

    x = (inputs["pixel_values"] - view.mean) / view.std
    wrong = Space("pixel_values", x, x.new_ones(8), x.new_tensor(0.0), x.new_tensor(1.0))
    outside = {"pixel_values": x}
    found = pgd(Named(), outside, torch.zeros(8, dtype=torch.long), cfg, space=wrong)
    assert float(moved(Named(), outside, found, wrong).max()) > 2 * eps
    with pytest.raises(InputDomainError, match="normalisation happens inside"):
        open_space(Named(), outside)


# --------------------------------------------------------------------------- closed forms


def test_linf_reaches_the_closed_form_of_a_linear_model():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 12, generator=generator, dtype=DOUBLE)
    x = torch.randn(5, 12, generator=generator, dtype=DOUBLE)
    model, labels = Linear(weight), torch.tensor([0, 1, 0, 1, 0])
    sign = 1 - 2 * labels.double()
    margin = sign * (x @ (weight[0] - weight[1]))
    cfg = PGD(norm="linf", eps=0.3, steps=20, targeted=False, stop_confidence=None)
    found = pgd(model, {"features": x}, labels, cfg)
    after = sign * ((x + found.delta) @ (weight[0] - weight[1]))
    expected = margin - 0.3 * (weight[0] - weight[1]).abs().sum()
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
    assert float(found.norm.max()) <= 0.3
    torch.testing.assert_close(found.norm, found.delta.abs().amax(dim=1))
    toward = pgd(model, {"features": x}, 1 - labels, replace(cfg, targeted=True))
    torch.testing.assert_close(toward.delta, found.delta)


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("sigma", [None, torch.linspace(0.5, 2, 12, dtype=DOUBLE)])
def test_early_stopped_l2_is_one_step_from_the_shortest_flip(targeted, sigma):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 12, generator=generator, dtype=DOUBLE)
    model, x = Linear(weight), torch.randn(40, 12, generator=generator, dtype=DOUBLE)
    model.feature_scale = sigma
    inputs = {"features": x}
    predicted = model(**inputs).argmax(dim=1)
    target = 1 - predicted if targeted else predicted
    logits = (x @ weight.T).detach()
    slope = (weight[0] - weight[1]) * (1 if sigma is None else sigma)
    shortest = (logits[:, 0] - logits[:, 1]).abs() / slope.norm()
    step = 0.05
    found = pgd(model, inputs, target, PGD(step=step, targeted=targeted, steps=400))
    assert bool(found.success.all())
    assert bool((found.norm >= shortest - 1e-9).all())
    assert bool((found.norm <= shortest + step + 1e-9).all())
    assert bool((found.confidence >= 0.5).all())


def test_a_full_attack_goes_on_where_the_target_is_certain():
    """The gradient of log p vanishes there, its direction does not."""
    model, x = Linear([[40.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0]], dtype=DOUBLE)
    cfg = PGD(eps=1.0, steps=20, stop_confidence=None)
    found = pgd(model, {"features": x}, torch.tensor([0]), cfg)
    torch.testing.assert_close(found.delta, torch.tensor([[1.0, 0.0]], dtype=DOUBLE))


# --------------------------------------------------------------------------- an independent loop


def alone(model, key, x, target, *, eps, step, steps, stop, sigma=1.0, mask=1.0, **more):
    """Attack one row (1, ...) by the formulas, with nothing shared with the package."""
    lo, hi = more.get("box", (-math.inf, math.inf))
    sign = 1 if more.get("targeted", True) else -1
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_()
        scores = model(**{key: x + delta}).log_softmax(dim=1)[0]
        p, hit = scores[target].exp(), scores.argmax() == target
        if sign < 0:
            p, hit = 1 - p, not hit
        if stop is not None and hit and p >= stop:
            return delta.detach()
        (gradient,) = torch.autograd.grad(sign * scores[target], delta)
        delta, slope = delta.detach(), mask * gradient * sigma
        if more.get("norm") == "linf":
            delta = delta + sigma * step * slope.sign()
            delta = torch.minimum(torch.maximum(delta, -sigma * eps + 0 * x), sigma * eps + 0 * x)
            delta = (x + delta).clamp(lo, hi) - x
        else:
            delta = delta + sigma * step * slope / slope.norm()
            delta = (x + delta).clamp(lo, hi) - x
            length = float((delta / sigma).norm())
            delta = delta * min(1.0, eps / length)
    return delta


SETTINGS = {
    "stopped": PGD(),
    "full": PGD(eps=0.7, steps=25, stop_confidence=None),
    "confident": PGD(stop_confidence=0.9, step=0.2),
    "linf": PGD(norm="linf", eps=0.05, steps=20, stop_confidence=None),
    "linf stopped": PGD(norm="linf", eps=0.2, steps=20),
    "untargeted": PGD(targeted=False, stop_confidence=0.8),
    "whole batch": PGD(compact=False),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_flat_batch_equals_one_row_at_a_time(name):
    model, inputs, cfg = conv(), pixels(9), SETTINGS[name]
    target = others(model, inputs)
    target = target if cfg.targeted else (target - 1) % K
    found = pgd(model, inputs, target, cfg)
    step = cfg.step or (0.1 if cfg.norm == "l2" else 2.5 * cfg.eps / cfg.steps)
    for row, x in enumerate(inputs["pixel_values"].split(1)):
        expected = alone(
            model,
            "pixel_values",
            x,
            int(target[row]),
            eps=cfg.eps,
            step=step,
            steps=cfg.steps,
            stop=cfg.stop_confidence,
            box=(0.0, 1.0),
            norm=cfg.norm,
            targeted=cfg.targeted,
        )
        torch.testing.assert_close(found.delta[row : row + 1], expected, rtol=0, atol=1e-10)
    assert int(found.success.sum()) >= 3


# --------------------------------------------------------------------------- independence


@pytest.mark.parametrize("init", ["zero", "noise", "ball"])
@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_change_nothing(init, chunk):
    model, inputs = conv(), pixels(15)
    target, cfg = others(model, inputs), PGD(eps=1.0, steps=12, init=init, starts=2)
    seeds = [draw(3, attacks.STREAMS["noise"], at, 0) for at in range(15)]
    whole = pgd(model, inputs, target, cfg, seeds=seeds)
    parts = []
    for at in range(0, 15, chunk):
        cut = slice(at, at + chunk)
        some = {"pixel_values": inputs["pixel_values"][cut]}
        parts.append(pgd(model, some, target[cut], cfg, seeds=seeds[cut]))
    delta = torch.cat([part.delta for part in parts])
    torch.testing.assert_close(delta, whole.delta, rtol=0, atol=1e-10)
    assert torch.equal(torch.cat([part.success for part in parts]), whole.success)
    assert not torch.allclose(pgd(model, inputs, target, cfg).delta, whole.delta) or init == "zero"


@pytest.mark.parametrize("look", [1, 5])
def test_packing_changes_nothing_but_the_work(look, monkeypatch):
    monkeypatch.setattr(attacks, "_look_every", lambda _: look)
    model, inputs = conv(), pixels(16)
    target = others(model, inputs)
    packed = pgd(model, inputs, target, PGD())
    whole = pgd(model, inputs, target, PGD(compact=False))
    torch.testing.assert_close(packed.delta, whole.delta, rtol=0, atol=1e-10)
    assert torch.equal(packed.success, whole.success)
    assert packed.image_steps < whole.image_steps < 16 * 100
    monkeypatch.setattr(attacks, "_look_every", lambda _: 1)
    often = pgd(model, inputs, target, PGD())
    torch.testing.assert_close(packed.delta, often.delta, rtol=0, atol=1e-10)
    assert often.image_steps <= packed.image_steps


def test_a_known_space_gives_the_same_attack():
    model, inputs = conv(), pixels(4)
    target = others(model, inputs)
    space = open_space(model, pixels(9)).rows([0, 1, 2, 3])
    again = {"pixel_values": space.x}
    one, two = pgd(model, again, target, PGD()), pgd(model, again, target, PGD(), space=space)
    assert torch.equal(one.delta, two.delta)


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    asks = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    hooks = [
        (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
        for m in model.modules()
    ]
    return state, gradients, asks, modes, hooks


def assert_untouched(model, before):
    state, gradients, *rest = snapshot(model)
    assert all(torch.equal(state[name], before[0][name]) for name in before[0])
    for one, two in zip(gradients, before[1], strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    assert rest == list(before[2:])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model, inputs = conv(), pixels(6)
    model.train()
    model.backbone.body[1].eval()
    next(model.parameters()).requires_grad_(False)
    model(**inputs).sum().backward()
    calls = []

    def watch(*_):
        calls.append((model.training, any(p.requires_grad for p in model.parameters())))
        if fails and len(calls) == 3:
            raise ZeroDivisionError

    model.register_forward_hook(watch)
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist()
    before = snapshot(model)
    if fails:
        with pytest.raises(ZeroDivisionError):
            pgd(model, inputs, torch.zeros(6, dtype=torch.long), PGD())
    else:
        pgd(model, inputs, torch.zeros(6, dtype=torch.long), PGD(init="ball"))
    assert_untouched(model, before)
    assert set(calls) == {(False, False)}
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == np.random.get_state()[1].tolist()


def test_attacks_work_where_gradients_are_switched_off():
    model, inputs = conv(), pixels(3)
    with torch.no_grad():
        found = pgd(model, inputs, others(model, inputs), PGD())
    assert bool(found.delta.any())
    assert not found.delta.requires_grad


# --------------------------------------------------------------------------- stopping and starts


@pytest.mark.parametrize("stop", [0.0, 0.5, 0.95])
def test_success_is_what_the_stored_tensor_gives(stop):
    model, inputs = conv(torch.float32), pixels(24, dtype=torch.float32)
    target = others(model, inputs)
    cfg = PGD(eps=1.0, stop_confidence=stop, steps=20)
    found = pgd(model, inputs, target, cfg)
    full = pgd(model, inputs, target, replace(cfg, stop_confidence=None))
    with torch.no_grad():
        scores = perturbed(model, inputs, found.delta, open_space(model, inputs)).softmax(dim=1)
    p = scores.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(found.confidence, p)
    hit = (scores.argmax(dim=1) == target) & (p >= stop)
    assert torch.equal(found.success, hit)
    assert int(hit.sum()) > 0
    assert found.image_steps <= full.image_steps
    assert torch.equal(found.norm, norms(open_space(model, inputs), found.delta))


def test_a_row_that_is_already_there_does_not_move():
    model, inputs = conv(), pixels(5)
    target = (others(model, inputs) - 1) % K
    found = pgd(model, inputs, target, PGD(stop_confidence=0.0))
    assert not found.delta.any()
    assert bool(found.success.all())
    assert found.image_steps == 0


@pytest.mark.parametrize("init", ["zero", "noise", "ball"])
def test_several_starts_keep_the_best_of_each_row(init):
    model, inputs = conv(), pixels(20)
    target = others(model, inputs)
    cfg = PGD(eps=0.6, steps=8, init=init, stop_confidence=None)
    one, three = pgd(model, inputs, target, cfg), pgd(model, inputs, target, replace(cfg, starts=3))
    assert bool((three.success >= one.success).all())
    same = three.success == one.success
    assert bool((three.confidence[same] >= one.confidence[same]).all())
    assert bool((three.confidence > one.confidence).any())
    assert three.image_steps == 3 * one.image_steps
    stopped = replace(cfg, starts=3, stop_confidence=0.5)
    again = pgd(model, inputs, target, stopped)
    first = pgd(model, inputs, target, replace(stopped, starts=1))
    assert torch.equal(again.delta[first.success], first.delta[first.success])
    assert int(again.success.sum()) >= int(first.success.sum())


def test_rows_without_a_gradient_take_a_direction_of_their_own():
    class Plateau(nn.Module):
        """Flat around x, and class 1 far out in any direction."""

        def forward(self, features):
            away = torch.relu(features.norm(dim=1) - 1)
            return torch.stack([1 - away, away], dim=1)

    inputs = {"features": torch.tensor([[0.0, 0.1], [0.1, 0.0], [0.0, 0.1]], dtype=DOUBLE)}
    target = torch.ones(3, dtype=torch.long)
    found = pgd(Plateau(), inputs, target, PGD(), seeds=[5, 6, 7])
    assert bool(found.success.all())
    assert not torch.allclose(found.delta[0], found.delta[2])
    again = pgd(Plateau(), {"features": inputs["features"][2:]}, target[2:], PGD(), seeds=[7])
    torch.testing.assert_close(again.delta, found.delta[2:])
    for look in (2, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attacks, "_look_every", lambda _, look=look: look)
            assert bool(pgd(Plateau(), inputs, target, PGD(), seeds=[5, 6, 7]).success.all())


def test_directions_stay_with_their_rows_when_others_leave_the_batch():
    class Steps(nn.Module):
        """Rises to 0, is flat up to 0.3 and rises again; class 1 is beyond 0.5."""

        def forward(self, features):
            x = features[:, 0]
            height = x.clamp(max=0) + (x - 0.3).clamp(min=0)
            return torch.stack([0 * x + 0.2, height], dim=1)

    def attack(start, seeds):
        x = torch.tensor(start, dtype=DOUBLE)[:, None]
        target = torch.ones(len(start), dtype=torch.long)
        return pgd(Steps(), {"features": x}, target, PGD(step=0.05), seeds=seeds).success

    upward = [seed for seed in range(20) if attack([0.1], [seed])][:4]
    assert len(upward) == 4
    assert bool(attack([0.1, 0.1, -1.0, -1.1], upward).all())


def test_logits_that_are_not_finite_are_no_success():
    class Broken(nn.Module):
        def forward(self, features):
            return features[:, :2] * torch.tensor([math.nan, 1.0], dtype=DOUBLE)

    inputs = {"features": torch.ones(3, 2, dtype=DOUBLE)}
    for target in (0, 1):
        for stop in (None, 0.5):
            cfg = PGD(eps=1.0, steps=20, stop_confidence=stop)
            found = pgd(Broken(), inputs, torch.full((3,), target), cfg)
            assert not found.success.any()
            assert bool(found.delta.isfinite().all())


def test_bf16_is_for_the_passes_only():
    model, inputs = conv(torch.float32), pixels(16, dtype=torch.float32)
    target, seen = others(model, inputs), []
    model.backbone.body[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    found = pgd(model, inputs, target, PGD(dtype="bf16"))
    assert seen[:-1] == [torch.bfloat16] * (len(seen) - 1)
    assert seen[-1] == torch.float32  # success is measured in full precision
    assert found.delta.dtype == found.norm.dtype == torch.float32
    exact = pgd(model, inputs, target, PGD())
    assert set(seen[-5:]) == {torch.float32}
    assert not torch.equal(found.delta, exact.delta)
    assert float((found.norm - exact.norm).abs().mean()) < 0.15
    assert int(found.success.sum()) >= 12


def test_robust_rows_are_right_before_and_after():
    model, inputs = conv(), pixels(40)
    labels = (others(model, inputs) - 1) % K
    labels[:5] = (labels[:5] + 1) % K
    weak, strong = (PGD(eps=eps, steps=60) for eps in (0.2, 4.0))
    kept = attacks.robust_correct(model, inputs, labels, weak)
    assert not kept[:5].any()
    assert 0 < int(kept.sum()) < 35
    assert not attacks.robust_correct(model, inputs, labels, strong).any()
    found = pgd(model, inputs, labels, replace(weak, targeted=False, stop_confidence=0.0))
    with torch.no_grad():
        after = perturbed(model, inputs, found.delta, open_space(model, inputs)).argmax(dim=1)
    assert torch.equal(kept[5:], (after == labels)[5:])
    full = attacks.robust_correct(model, inputs, labels, replace(weak, stop_confidence=None))
    assert bool((full <= (model(**inputs).argmax(dim=1) == labels)).all())


# --------------------------------------------------------------------------- projections and noise


def test_a_rounded_perturbation_is_put_back():
    model, inputs = conv(torch.float32), pixels(8, dtype=torch.float32)
    space = open_space(model, inputs)
    found = pgd(model, inputs, others(model, inputs), PGD(eps=0.5, steps=9, stop_confidence=None))
    rounded = (found.delta * 1.02).half()
    radius = torch.full((8,), 0.5)
    back = attacks.impose(space, rounded, radius)
    assert float(norms(space, rounded).max()) > 0.5
    assert float(norms(space, back).max()) <= 0.5 * (1 + 1e-5)
    assert back.dtype == torch.float32
    there = inputs["pixel_values"] + back
    assert float(there.min()) >= -1e-7
    assert float(there.max()) <= 1 + 1e-7
    clipped = attacks.impose(space, rounded, radius / 10, norm="linf")
    assert float(norms(space, clipped, "linf").max()) <= 0.05 * (1 + 1e-5)
    inner = rounded.float() / 4
    inside = attacks.impose(space, inner, radius)
    boxed = (inputs["pixel_values"] + inner).clamp(0, 1) - inputs["pixel_values"]
    torch.testing.assert_close(inside, boxed)


def test_noise_has_the_asked_norm_and_depends_on_its_seed_only():
    inputs = {"pixel_values": torch.full((6, 1, 8, 8), 0.5)}
    space = open_space(Sure(), inputs)
    radius = torch.linspace(0, 1, 6)
    noise = attacks.noise_like(space, radius, [1, 2, 3, 4, 5, 2**64 - 1])
    torch.testing.assert_close(norms(space, noise), radius)
    again = attacks.noise_like(space.rows([4, 2]), radius[[4, 2]], [5, 3])
    assert torch.equal(again, noise[[4, 2]])
    assert not torch.allclose(noise[1] / radius[1], noise[2] / radius[2])
    values = torch.cat([noise[at].flatten() / radius[at] * 8 for at in (1, 2, 3, 4)])
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    corner = open_space(Sure(), {"pixel_values": torch.zeros(1, 1, 8, 8)})
    cut = attacks.noise_like(corner, torch.ones(1), [1])
    assert float(cut.min()) == 0
    assert 0.5 < float(norms(corner, cut)) < 1


def test_the_forward_pass_is_differentiable_for_another_model():
    model, other, inputs = conv(), conv(gain=1.5), pixels(4)
    space = open_space(model, inputs)
    found = pgd(model, inputs, others(model, inputs), PGD())
    delta = found.delta.clone().requires_grad_()
    logits = perturbed(other, inputs, delta, space)
    expected = other(pixel_values=(inputs["pixel_values"] + found.delta).clamp(0, 1))
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert bool(delta.grad.any())
    assert all(parameter.grad is not None for parameter in other.parameters())
    half = {"pixel_values": inputs["pixel_values"][2:]}
    torch.testing.assert_close(perturbed(other, half, delta[2:], space), expected[2:])


# --------------------------------------------------------------------------- targets


@pytest.fixture(scope="module")
def u():
    """200,000 draws, made once; every rule is a function of them."""
    return np.array([draw(0, 1, at, 0) for at in range(200_000)], dtype=np.uint64)


def drawn(monkeypatch, u, label, classes, **more):
    monkeypatch.setattr(attacks, "draw", lambda seed, stream, index, round: int(u[index]))
    labels = torch.full((len(u),), label)
    if "predicted" in more:
        more["predicted"] = torch.full((len(u),), more["predicted"])
    found = draw_targets(labels, torch.arange(len(u)), classes, seed=0, **more)
    assert found.dtype == torch.int64
    return np.bincount(found.numpy(), minlength=classes)


def test_draws_are_those_of_the_seed_sequence():
    sequence = np.random.SeedSequence([5, 2, 7, 1])
    assert draw(5, attacks.STREAMS["relabel"], 7, 1) == sequence.generate_state(1, np.uint64)[0]
    assert (
        len({draw(*key) for key in [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 2)]}) == 4
    )
    assert draw(0, 1, -1, 0) != draw(0, 1, 1, 0)


@pytest.mark.parametrize("label", range(10))
def test_targets_are_uniform_over_the_other_classes(label, u, monkeypatch):
    counts = drawn(monkeypatch, u, label, 10)
    assert counts[label] == 0
    assert stats.chisquare(np.delete(counts, label)).pvalue > 1e-3


@pytest.mark.parametrize(("label", "predicted"), [(0, 9), (9, 0), (4, 3), (3, 4), (5, 5)])
def test_targets_leave_out_what_the_model_predicts(label, predicted, u, monkeypatch):
    counts = drawn(monkeypatch, u, label, 10, predicted=predicted)
    gone = sorted({label, predicted})
    assert not counts[gone].any()
    assert stats.chisquare(np.delete(counts, gone)).pvalue > 1e-3


def test_two_classes_leave_one_target(u, monkeypatch):
    assert drawn(monkeypatch, u, 0, 2, predicted=1).tolist() == [0, len(u)]
    assert drawn(monkeypatch, u, 2, 3, predicted=0).tolist() == [0, len(u), 0]


@pytest.mark.parametrize(("label", "expected"), [(0, 0.2), (5, 0.1), (9, 0.2)])
def test_the_fallback_rule_prefers_the_middle_class(label, expected, u, monkeypatch):
    shares = drawn(monkeypatch, u, label, 10, rule="fallback") / len(u)
    assert shares[5] == pytest.approx(expected, abs=0.005)
    assert shares[label] == pytest.approx(0.1 if label == 5 else 0, abs=0.005)
    other = [shares[c] for c in range(10) if c not in (5, label)]
    assert other == pytest.approx([0.1] * len(other), abs=0.005)


def test_classes_beyond_ten(u, monkeypatch):
    assert drawn(monkeypatch, u, 3, 100).nonzero()[0].tolist() == [c for c in range(100) if c != 3]
    many = drawn(monkeypatch, u, 50, 100, rule="fallback") / len(u)
    assert many[50] == pytest.approx(0.01, abs=0.002)
    assert drawn(monkeypatch, u, 0, 100, rule="fallback")[50] / len(u) == pytest.approx(
        0.02, abs=0.002
    )
    ten = drawn(monkeypatch, u, 3, 100, rule="fallback_ten") / len(u)
    assert ten[10:].sum() == 0
    assert ten[5] == pytest.approx(0.2, abs=0.005)


def test_nested_forget_sets_share_their_targets():
    labels = torch.arange(64) % K
    index = torch.arange(100, 164)
    large = draw_targets(labels, index, K, seed=3, round=2, predicted=labels)
    small = draw_targets(labels[:16], index[:16], K, seed=3, round=2, predicted=labels[:16])
    assert torch.equal(large[:16], small)
    assert not torch.equal(large, draw_targets(labels, index, K, seed=3, round=1))
    assert not torch.equal(large, draw_targets(labels, index, K, seed=4, round=2))
    assert not torch.equal(large, draw_targets(labels, index, K, seed=3, round=2, stream="relabel"))


@pytest.mark.parametrize(
    ("labels", "classes", "more", "error", "says"),
    [
        ([0, 4], 4, {}, DataError, r"0\.\.3, got 4 in row 1"),
        ([-1], 4, {}, DataError, r"got -1 in row 0"),
        ([0], 1, {}, ConfigError, "at least 2"),
        ([0], 9, {"rule": "fallback_ten"}, ConfigError, "at least 10"),
        ([0], 9, {"rule": "unifrom"}, ConfigError, "unifrom"),
        ([0], 9, {"stream": "targets"}, ConfigError, "targets"),
    ],
)
def test_targets_that_cannot_be_drawn(labels, classes, more, error, says):
    index = torch.arange(len(labels))
    with pytest.raises(error, match=says):
        draw_targets(torch.tensor(labels), index, classes, seed=0, **more)


# --------------------------------------------------------------------------- tables


def table(dtype=DOUBLE, columns=7):
    """A perceptron of columns of which 1, 4 and 6 are categories, with bounds and scales."""
    model = build(
        BackboneEntry(source="torch", id="mlp", args={"activation": "tanh"}),
        info_of("tabular", (columns,), feature_numeric=tuple(c not in (1, 4, 6) for c in range(7))),
        seed=0,
    )
    redrawn(model, gain=2.0).to(dtype)
    draws = torch.Generator().manual_seed(2)
    x = torch.randn(12, columns, generator=draws, dtype=DOUBLE).to(dtype)
    model.feature_scale = torch.linspace(0.5, 2, columns)
    model.feature_bounds = torch.stack([x.amin(dim=0) - 0.1, x.amax(dim=0) + 0.1])
    return model, {"features": x}


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_categories_stay_bit_for_bit_and_bounds_and_ball_hold(norm):
    model, inputs = table()
    x, target = inputs["features"], others(model, inputs)
    eps = 1.0 if norm == "l2" else 0.5
    space = open_space(model, inputs)
    for cfg in (
        PGD(norm=norm, eps=eps, steps=30, stop_confidence=None),
        PGD(norm=norm, eps=eps, init="ball"),
        PGD(norm=norm, eps=eps, init="noise", steps=5),
    ):
        found = pgd(model, inputs, target, cfg)
        given = entering(model, inputs, found.delta, space)
        assert torch.equal(given[:, [1, 4, 6]], x[:, [1, 4, 6]])
        assert not found.delta[:, [1, 4, 6]].any()
        lo, hi = model.feature_bounds
        assert bool(((given >= lo) & (given <= hi)).all())
        scaled = (given - x) / model.feature_scale.double()
        length = scaled.norm(dim=1) if norm == "l2" else scaled.abs().amax(dim=1)
        assert float(length.max()) <= eps * (1 + 1e-5)
        torch.testing.assert_close(found.norm, length)
        assert bool(found.success.any())


def test_attacks_on_columns_equal_one_row_at_a_time():
    model, inputs = table()
    target, sigma = others(model, inputs), model.feature_scale.double()
    mask = model.feature_numeric.double()
    lo, hi = model.feature_bounds
    for norm, eps in (("l2", 1.0), ("linf", 0.4)):
        cfg = PGD(norm=norm, eps=eps, steps=20, stop_confidence=None)
        found = pgd(model, inputs, target, cfg)
        for row, x in enumerate(inputs["features"].split(1)):
            expected = alone(
                model,
                "features",
                x,
                int(target[row]),
                eps=eps,
                step=0.1 if norm == "l2" else 2.5 * eps / 20,
                steps=20,
                stop=None,
                sigma=sigma,
                mask=mask,
                box=(lo, hi),
                norm=norm,
            )
            torch.testing.assert_close(found.delta[row : row + 1], expected, rtol=0, atol=1e-10)


def test_values_outside_the_bounds_stay_where_they_are_or_come_closer():
    model, inputs = table()
    model.feature_bounds = torch.stack([torch.full((7,), -0.5), torch.full((7,), 0.5)])
    x, space = inputs["features"], open_space(model, inputs)
    plain = perturbed(model, inputs, torch.zeros_like(x), space)
    assert torch.equal(plain, model(**inputs))
    found = pgd(model, inputs, others(model, inputs), PGD(eps=1.0, steps=20, stop_confidence=None))
    given = entering(model, inputs, found.delta, space)
    assert bool((given <= x.clamp(min=0.5) + 1e-12).all())
    assert bool((given >= x.clamp(max=-0.5) - 1e-12).all())


def test_noise_on_columns_is_measured_in_deviations():
    model, inputs = table()
    model.feature_bounds = None
    space = open_space(model, inputs)
    noise = attacks.noise_like(space, torch.full((12,), 0.7), range(12))
    assert not noise[:, [1, 4, 6]].any()
    lengths = (noise / model.feature_scale.double()).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((12,), 0.7, dtype=DOUBLE))


def test_columns_of_scale_zero_stay():
    model, inputs = table()
    model.feature_scale = torch.tensor([0.0, 1, 1, 1, 1, 1, 1])
    found = pgd(model, inputs, others(model, inputs), PGD())
    assert not found.delta[:, 0].any()
    assert bool(found.delta[:, 2].any())
    assert bool(found.norm.isfinite().all())


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm", "l1"),
        ("eps", 0.0),
        ("eps", -1.0),
        ("eps", math.inf),
        ("eps", math.nan),
        ("step", 0.0),
        ("step", math.nan),
        ("steps", 0),
        ("steps", 2.5),
        ("starts", 0),
        ("init", "random"),
        ("stop_confidence", 1.0),
        ("stop_confidence", -0.1),
        ("dtype", "fp16"),
    ],
)
def test_settings_outside_their_range(field, value):
    with pytest.raises(ConfigError, match=f"expected {field} .*, got"):
        PGD(**{field: value})


def test_full_attacks_must_be_able_to_reach_their_ball():
    with pytest.raises(ConfigError, match="steps·step ≥ eps"):
        PGD(step=0.1, steps=39, stop_confidence=None)
    assert PGD(step=0.1, steps=40, stop_confidence=None).steps == 40
    assert PGD(step=0.1, steps=3).stop_confidence == 0.5
    with pytest.raises(ConfigError, match="make more or longer steps"):
        pgd(conv(), pixels(1), torch.zeros(1).long(), PGD(steps=39, stop_confidence=None))


def test_pixels_outside_the_box_are_refused():
    model, good = conv(), pixels(2)["pixel_values"]
    for wrong in (good * 255, good - 0.5, good + math.nan):
        with pytest.raises(InputDomainError, match="normalisation happens inside"):
            open_space(model, {"pixel_values": wrong})
    with pytest.raises(InputDomainError, match="float pixels"):
        open_space(model, {"pixel_values": (good * 255).to(torch.uint8)})
    rounded = {"pixel_values": good + 9e-7}
    target, highest = others(model, rounded), []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: highest.append(float(kwargs["pixel_values"].detach().max())),
        with_kwargs=True,
    )
    found = pgd(model, rounded, target, PGD(eps=0.3))
    handle.remove()
    assert max(highest) == 1
    given = entering(model, rounded, found.delta, open_space(model, rounded))
    assert float(given.max()) <= 1
    foreign = wrap(nn.Flatten(), num_classes=64, modality="image")
    with pytest.raises(InputDomainError, match="got one that does not: wrap with mean/std"):
        open_space(foreign, {"pixel_values": good})


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"speech": torch.zeros(2, 3)},
        {"pixel_values": torch.zeros(2, 3), "input_ids": torch.zeros(2, 3).long()},
    ],
)
def test_inputs_of_no_or_several_kinds_are_refused(inputs):
    with pytest.raises(NotApplicable, match="exactly one of pixel_values, input_ids, features"):
        open_space(conv(), inputs)


def test_tables_that_cannot_be_attacked():
    model, inputs = table()
    with pytest.raises(NotApplicable, match=r"float features, got torch\.int64"):
        open_space(model, {"features": inputs["features"].long()})
    model.feature_bounds = None
    with pytest.raises(NotApplicable, match="expected bounds of features"):
        pgd(model, inputs, torch.zeros(12).long(), PGD(init="noise"))
    model.feature_numeric = torch.zeros(7, dtype=torch.bool)
    with pytest.raises(NotApplicable, match="expected a numeric column"):
        open_space(model, inputs)
    model.feature_numeric = torch.ones(6, dtype=torch.bool)
    with pytest.raises(ConfigError, match="feature_numeric of 7 columns"):
        open_space(model, inputs)


@pytest.mark.parametrize(
    ("target", "seeds", "says"),
    [
        ([0, 1], None, "a target and a seed for each of 3 rows"),
        ([0, 1, 2], [1, 2], "2 seeds"),
        ([0, 1, K], None, rf"0\.\.{K - 1}, got {K} in row 2"),
        ([-1, 1, 0], None, "got -1 in row 0"),
    ],
)
def test_targets_and_seeds_must_fit(target, seeds, says):
    with pytest.raises(DataError, match=says):
        pgd(conv(), pixels(3), torch.tensor(target), PGD(), seeds=seeds)


def test_models_without_classes_or_without_a_gradient():
    one = Linear([[1.0, 2.0]])
    inputs = {"features": torch.ones(2, 2, dtype=DOUBLE)}
    with pytest.raises(NotApplicable, match="at least two classes"):
        pgd(one, inputs, torch.zeros(2).long(), PGD())

    class Cut(Linear):
        def forward(self, features):
            return super().forward(features.detach())

    class Used(Linear):
        def forward(self, features):
            squares = features * features
            if squares.requires_grad:
                torch.autograd.grad((squares * squares).sum(), squares, retain_graph=True)
                torch.autograd.grad((squares.exp()).sum(), features)
            return super().forward(squares)

    with pytest.raises(NotApplicable, match="no gradient of Cut reaches"):
        pgd(Cut(torch.eye(2)), inputs, torch.zeros(2).long(), PGD(stop_confidence=0.9))
    with pytest.raises(NotApplicable, match="a part of Used has used it up"):
        pgd(Used(torch.eye(2)), inputs, torch.zeros(2).long(), PGD(stop_confidence=0.9))


# --------------------------------------------------------------------------- what models are told


def test_tables_say_which_columns_are_numbers(tmp_path):
    encoder = TableEncoder.fit(
        {
            "a": np.array([1.0, 2.0, 2.0]),
            "b": np.array(["x", "y", "z"], object),
            "c": np.array([0.0, 3.0, 3.0]),
            "d": np.array(["u", "v", "v"], object),
        }
    )
    assert dict(zip(encoder.names, encoder.numeric, strict=True)) == {
        "a": True,
        "c": True,
        "b=x": False,
        "b=y": False,
        "b=z": False,
        "d=v": False,
    }
    entry = DatasetEntry(source="synthetic", id="table", modality="tabular", args={"n": 60})
    splits = data.load(entry, "toy")
    numeric = splits.info.feature_numeric
    values = splits.train.gather(range(20)).inputs["features"]
    hot = ((values == 0) | (values == 1)).all(dim=0)
    assert numeric is not None
    assert torch.equal(torch.tensor(numeric), ~hot)
    assert hot.any()
    model = build(BackboneEntry(source="torch", id="mlp"), splits.info, seed=0)
    assert torch.equal(model.feature_numeric, ~hot)
    assert not any("feature" in name for name in model.state_dict())
    inputs = splits.train.gather(range(20)).inputs
    found = pgd(copy.deepcopy(model).to("cpu"), inputs, torch.zeros(20).long(), PGD(eps=1.0))
    assert not found.delta[:, hot].any()
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).feature_numeric, ~hot)


def test_descriptions_without_the_new_fields_are_still_read():
    text = '{"name":"x","modality":"tabular","num_classes":2,"input_shape":[3],"labels_sha256":""}'
    old = DataInfo.model_validate_json(text)
    assert old.special_token_ids is None
    model = build(BackboneEntry(source="torch", id="mlp"), old, seed=0)
    assert isinstance(model, Classifier)
    assert model.feature_numeric is None
