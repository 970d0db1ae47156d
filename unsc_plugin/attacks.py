"""Bounded, batched adversarial perturbations of pixels, of word embeddings and of table columns.

:func:`open_space` says what of the inputs may move and how far, :func:`pgd` moves it towards or
away from a class, :func:`perturbed` is the forward pass with a stored perturbation,
:func:`linear_worst_case` the closed form of binary linear classifiers. Every row is attacked for
itself: its result depends on its input, its target and its seed, never on the rows beside it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from unsc_plugin._linear_attack import linear_margin as linear_margin
from unsc_plugin._linear_attack import linear_overshoot as linear_overshoot
from unsc_plugin._linear_attack import linear_worst_case as linear_worst_case
from unsc_plugin._spaces import TINY, Inputs, boxed, in_box, lengths, masked, picked, scaled, spread
from unsc_plugin._spaces import Norm as Norm
from unsc_plugin._spaces import Space as Space
from unsc_plugin._spaces import impose as impose
from unsc_plugin._spaces import norms as norms
from unsc_plugin._spaces import open_space as open_space
from unsc_plugin.errors import ConfigError, DataError, NotApplicable
from unsc_plugin.runtime import quiet

Rule = Literal["uniform", "fallback", "fallback_ten"]

STREAMS: Mapping[str, int] = {"target": 1, "relabel": 2, "noise": 3, "order": 4, "rows": 5}
"""Names of the independent random streams of :func:`draw`."""

LOOK_EVERY = 5
"""On an accelerator, iterations between two looks at how many rows are still attacked."""

_DRAWS = {"start": 0, "radius": 1, "escape": 2, "noise": 3}
_OTHERS = 1 << 64  # seeds and indices that are negative count from the top of the 64-bit range


# --------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class PGD:
    """Settings of :func:`pgd` (projected gradient descent, Madry et al., ICLR 2018).

    Attributes:
        norm: of the ball and of the steps.
        eps: radius of the ball, in units of `Space.unit`.
        step: length of a step in the same units; None for 0.1 (L2 on pixels and features), eps/40
            (L2 on texts) or 2.5·eps/steps (linf).
        steps: most gradient steps of a row.
        targeted: raise the target's probability; else lower the label's.
        init: start at 0, at a uniform draw of the box moved into the ball, or uniform in the ball.
        starts: attacks of a row, the best is kept; after the first, `zero` starts in the ball.
        stop_confidence: a row is done once the argmax is as wanted with this probability; None
            makes all steps.
        dtype: precision of forward and backward; perturbations and norms stay wide.
        compact: leave finished rows out of the batch; on an accelerator once they are half of it.

    Raises:
        ConfigError: a value outside its range, or a full L2 attack that cannot reach its ball.

    >>> PGD(eps=-1.0)
    Traceback (most recent call last):
    unsc_plugin.errors.ConfigError: PGD: expected eps within (0, inf), got -1.0
    """

    norm: Norm = "l2"
    eps: float = 4.0
    step: float | None = None
    steps: int = 100
    targeted: bool = True
    init: Literal["zero", "noise", "ball"] = "zero"
    starts: int = 1
    stop_confidence: float | None = 0.5
    dtype: Literal["fp32", "bf16"] = "fp32"
    compact: bool = True

    def __post_init__(self) -> None:
        choices = {"norm": ("l2", "linf"), "init": ("zero", "noise", "ball")}
        for name, known in {**choices, "dtype": ("fp32", "bf16")}.items():
            _require(getattr(self, name) in known, name, f"one of {', '.join(known)}", self)
        for name in ("steps", "starts"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, name, "a whole number ≥ 1", self)
        _require(0 < self.eps < math.inf, "eps", "within (0, inf)", self)
        _require(self.step is None or 0 < self.step < math.inf, "step", "within (0, inf)", self)
        stop = self.stop_confidence
        _require(stop is None or 0 <= stop < 1, "stop_confidence", "within [0, 1), or None", self)
        if self.step is not None:
            _require_reach(self, self.step)


def full_attack(norm: Norm, budget: float, steps: int, starts: int) -> PGD:
    """Return the untargeted attack that measures robustness: all steps, of 2.5·budget/steps each.

    >>> full_attack("linf", 0.1, steps=50, starts=5).step
    0.005
    """
    return PGD(
        norm=norm,
        eps=budget,
        step=2.5 * budget / steps,
        steps=steps,
        targeted=False,
        starts=starts,
        stop_confidence=None,
    )


def _require(holds: bool, name: str, wanted: str, settings: PGD) -> None:
    if not holds:
        raise ConfigError(f"PGD: expected {name} {wanted}, got {getattr(settings, name)!r}")


def _require_reach(cfg: PGD, step: float) -> None:
    """Refuse a full L2 attack whose steps together are shorter than its radius.

    Raises:
        ConfigError: it is one.
    """
    if cfg.stop_confidence is None and cfg.norm == "l2" and cfg.steps * step < cfg.eps * (1 - 1e-9):
        raise ConfigError(
            f"PGD: expected steps·step ≥ eps for a full attack, got {cfg.steps}·{step:g} < "
            f"{cfg.eps:g}; make more or longer steps, or lower eps"
        )


# --------------------------------------------------------------------------- seeded draws


def draw(seed: int, stream: int, index: int, round: int) -> int:
    """Return u = `SeedSequence([seed, stream, index, round]).generate_state(1, uint64)[0]`.

    Depends on nothing else, so that nested forget sets share their draws and chunks change nothing.

    >>> draw(0, STREAMS["target"], 7, 0) == draw(0, 1, 7, 0) != draw(0, 2, 7, 0)
    True
    """
    entropy = [seed % _OTHERS, stream, index % _OTHERS, round]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def draw_targets(
    labels: Tensor,
    index: Tensor,
    num_classes: int,
    *,
    seed: int,
    round: int = 0,
    predicted: Tensor | None = None,
    stream: str = "target",
    rule: Rule = "uniform",
) -> Tensor:
    """Return one target class per instance, int64 (n,), on the device of `labels`.

    With u = :func:`draw` of the instance's `index` (n,) and `round`:

    - `uniform`: the (u mod (C − |excluded|))-th of the classes that are left, in ascending order;
      excluded are the label and, for C ≥ 3, the class in `predicted` (n,) where it is another one.
    - `fallback`: u mod C, replaced by C//2 where that is the label. So C//2 comes twice as often,
      and a label C//2 is drawn as its own target: a quirk of published code, for reproductions.
    - `fallback_ten`: the same with 10 in place of C.

    Raises:
        DataError: a label outside 0..C−1.
        ConfigError: fewer than two classes (ten for `fallback_ten`), or an unknown rule or stream.
    """
    drawn_from = {"uniform": num_classes, "fallback": num_classes, "fallback_ten": 10}
    if rule not in drawn_from or stream not in STREAMS:
        raise ConfigError(
            f"draw_targets: expected a rule of {', '.join(drawn_from)} and a stream of "
            f"{', '.join(STREAMS)}, got {rule!r} and {stream!r}"
        )
    if num_classes < max(2, drawn_from[rule] if rule == "fallback_ten" else 2):
        raise ConfigError(
            f"draw_targets: expected at least {max(2, drawn_from[rule])} classes for {rule!r}, "
            f"got {num_classes}; take another rule"
        )
    _require_classes(labels, num_classes, "label")
    drawn = [draw(seed, STREAMS[stream], at, round) for at in index.tolist()]
    u = np.array(drawn, dtype=np.uint64)
    own = labels.cpu().numpy()
    if rule == "uniform":
        seen = own if predicted is None or num_classes < 3 else predicted.cpu().numpy()
        low, high = np.minimum(own, seen), np.maximum(own, seen)
        two = low != high
        place = (u % (num_classes - 1 - two).astype(np.uint64)).astype(np.int64)
        place += place >= low
        place += two & (place >= high)
    else:
        count = drawn_from[rule]
        place = (u % np.uint64(count)).astype(np.int64)
        place = np.where(place == own, count // 2, place)
    targets: Tensor = torch.from_numpy(place).to(labels.device)
    return targets


def _require_classes(classes: Tensor, count: int, name: str) -> None:
    wrong = ((classes < 0) | (classes >= count)).nonzero()
    if len(wrong):
        row = int(wrong[0, 0])
        raise DataError(
            f"attack: expected {name}s in 0..{count - 1}, got {int(classes[row])} in row {row}"
        )


def noise_like(space: Space, radius: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return one Gaussian direction per row, masked, of norm `radius` (rows,), then boxed.

    A row's direction depends on its seed and its shape only; the box can only shorten it.
    """
    direction = _gaussian(space, seeds, "noise", 0)
    return in_box(space, scaled(space, direction, radius.to(direction)))


def _generators(seeds: Sequence[int], purpose: str, start: int) -> Iterator[np.random.Generator]:
    for seed in seeds:
        yield np.random.default_rng([seed % _OTHERS, _DRAWS[purpose], start])


def _gaussian(space: Space, seeds: Sequence[int], purpose: str, start: int) -> Tensor:
    """Return a unit vector per row, uniform over the directions that the mask leaves."""
    shape = space.x.shape[1:]
    normal = [g.standard_normal(shape) for g in _generators(seeds, purpose, start)]
    drawn = masked(space, torch.from_numpy(np.stack(normal)).to(space.x))
    return drawn / spread(lengths(drawn.flatten(1)).clamp(min=TINY), drawn)


def _uniform(space: Space, seeds: Sequence[int], purpose: str, start: int) -> Tensor:
    """Return numbers in [0, 1) of the shape of x."""
    shape = space.x.shape[1:]
    drawn = [g.random(shape) for g in _generators(seeds, purpose, start)]
    return torch.from_numpy(np.stack(drawn)).to(space.x)


# --------------------------------------------------------------------------- forward passes


def perturbed(model: nn.Module, inputs: Inputs, delta: Tensor, space: Space) -> Tensor:
    """Return the logits of x+δ, differentiable in δ and in the parameters of `model`.

    `model` may be another one of the same architecture, and `inputs` and `delta` any rows: of
    `space` only the key, the box, the path and the orientation are used. x+δ is clipped to the box
    once more against rounding. For texts `input_ids` go in as they are, and δ (rows, T, E) is added
    to the first output of the word-embedding module, so that it follows a table that moves.

    Raises:
        DataError: δ of another shape than the word embeddings.
    """
    if space.key == "input_ids":
        with _shifted(model, space, delta):
            return _logits(model, inputs)
    x = inputs[space.key]
    return _logits(model, {**inputs, space.key: boxed(space, x, x + delta)})


def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    logits: Tensor = model(**inputs)
    return logits


@contextlib.contextmanager
def _shifted(model: nn.Module, space: Space, delta: Tensor) -> Iterator[None]:
    """Add δ to what the word-embedding module gives at its first call inside the block."""
    shift = delta.transpose(0, 1) if space.transposed else delta
    fresh = True

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal fresh
        if not fresh:
            return None
        fresh = False
        if output.shape != shift.shape:
            raise DataError(
                f"attack: expected a perturbation of shape {tuple(output.shape)} for the output of "
                f"{space.path}, got {tuple(shift.shape)}; pass the inputs it was made for"
            )
        return output + shift.to(output)

    handle = model.get_submodule(space.path).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def pixel_view(module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Return a module that takes `pixel_values` in [0, 1] and gives `module` (pixels − mean)/std.

    `module` takes normalised pixels, by the name `pixel_values` or as its only argument, and
    returns logits. Attacks of the view are bounded in pixels.

    Raises:
        ConfigError: `mean` and `std` of different lengths, or a deviation that is not positive.

    >>> view = pixel_view(nn.Flatten(), mean=[0.5], std=[0.25])
    >>> view(pixel_values=torch.ones(1, 1, 1, 1)).item()
    2.0
    """
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise ConfigError(
            f"pixel_view: expected as many deviations > 0 as means, got {list(mean)} and "
            f"{list(std)}; give one of each per channel"
        )
    return _PixelView(module, mean, std)


class _PixelView(nn.Module):
    mean: Tensor
    std: Tensor
    pixel_domain = True

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        parameters = inspect.signature(module.forward).parameters
        self._named = "pixel_values" in parameters or any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
        )

    def forward(self, pixel_values: Tensor, **inputs: Any) -> Tensor:
        own = next((p.dtype for p in self.module.parameters()), pixel_values.dtype)
        normalised = ((pixel_values - self.mean) / self.std).to(own)
        logits: Tensor = (
            self.module(pixel_values=normalised, **inputs)
            if self._named
            else self.module(normalised)
        )
        return logits


# --------------------------------------------------------------------------- the attack


@dataclass(frozen=True)
class Perturbation:
    """What :func:`pgd` found.

    Attributes:
        delta: δ (rows, ...) in the dtype of `Space.x`.
        success: whether the argmax of the stored x+δ is as wanted (with `stop_confidence`, where
            that is set) (rows,).
        confidence: the target's probability there; untargeted, 1 − that of the label (rows,).
        norm: ‖δ/σ‖ in the attack's norm, not divided by `Space.unit` (rows,).
        image_steps: gradient evaluations × rows they were made for.
    """

    delta: Tensor
    success: Tensor
    confidence: Tensor
    norm: Tensor
    image_steps: int


def pgd(
    model: nn.Module,
    inputs: Inputs,
    target: Tensor,
    cfg: PGD,
    *,
    space: Space | None = None,
    seeds: Sequence[int] | None = None,
) -> Perturbation:
    """Return perturbations of all rows that make the model predict `target` (or not the label).

    Per row, in coordinates δ/σ, with p the target's probability and `radius` = eps·unit:

        done if argmax = target and p ≥ stop_confidence: the row is frozen
        g ← mask·∂log p/∂δ   (untargeted: −∂log p_label/∂δ)
        L2:   δ ← δ + step·g/‖g‖;   δ into the box, then into the ball
        linf: δ ← δ + step·sign g;  δ into the ball, then into the box

    at most `steps` times; then one forward pass on the stored tensor measures success, confidence
    and norm. The gradient is taken of log(p/(1−p)): the same direction, of a length that does not
    vanish where p is near 1. Rows with ‖g‖ < 1e-12, or a gradient that is not finite, take one
    random direction of their own; rows where nothing may move keep δ = 0 and never succeed.

    The model is in eval mode (:func:`runtime.quiet`) and its parameters take no gradient; modes,
    `requires_grad`, `.grad`, buffers and hooks are left as they were, also after an exception.

    Args:
        model: called as `model(**inputs)`, gives logits (rows, C).
        inputs: tensors with rows first; what has no rows is passed on as it is.
        target: the wanted class; untargeted, the true label; int64 (rows,).
        cfg: settings.
        space: what :func:`open_space` gives for these inputs, if it is known already.
        seeds: one per row; every random number of a row comes from its own seed. Default: the
            row's number.

    Raises:
        InputDomainError: see :func:`open_space`.
        NotApplicable: see :func:`open_space`; fewer than two logits; logits that no gradient
            reaches, or a graph that the model itself uses up; a start drawn from a box where there
            is none.
        DataError: a target that is no class, or not one target and seed per row.
        ConfigError: a full L2 attack that cannot reach its ball.
    """
    with _still(model):
        space = open_space(model, inputs) if space is None else space
        job = _job(inputs, target, cfg, space, seeds)
        found = _attempt(model, job, cfg, 0)
        for start in range(1, cfg.starts):
            again = ~found.success & (job.radius > 0)
            if cfg.stop_confidence is None:
                again = job.radius > 0
            rows = again.nonzero()[:, 0]
            if len(rows):
                found = _better(found, _attempt(model, job.rows(rows), cfg, start), rows)
        return found


def robust_correct(model: nn.Module, inputs: Inputs, labels: Tensor, cfg: PGD) -> Tensor:
    """Return which rows are classified right before and after an untargeted attack, bool (rows,).

    `cfg.targeted` is taken as False; where `cfg.stop_confidence` is set, a row stops as soon as it
    is misclassified.

    Raises:
        InputDomainError: see :func:`open_space`.
        NotApplicable: see :func:`pgd`.
        DataError: a label that is no class.
    """
    stop = None if cfg.stop_confidence is None else 0.0
    found = pgd(model, inputs, labels, replace(cfg, targeted=False, stop_confidence=stop))
    with _still(model), torch.no_grad():
        right = _logits(model, inputs).argmax(dim=1) == labels.to(found.success.device)
    return right & ~found.success


@contextlib.contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Run the body with the model quiet and its parameters without gradient."""
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in moving:
            parameter.requires_grad_(False)
        with quiet(model):
            yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class _Job:
    """Rows to be attacked, with what each of them needs."""

    inputs: Inputs
    target: Tensor
    space: Space
    radius: Tensor
    step: Tensor
    seeds: tuple[int, ...]

    def rows(self, positions: Tensor) -> _Job:
        return _Job(
            picked(self.inputs, self.space.key, positions),
            self.target[positions],
            self.space.rows(positions),
            self.radius[positions],
            self.step[positions],
            tuple(self.seeds[at] for at in positions.tolist()),
        )


def _job(
    inputs: Inputs, target: Tensor, cfg: PGD, space: Space, seeds: Sequence[int] | None
) -> _Job:
    count = len(space.x)
    seeds = range(count) if seeds is None else seeds
    if target.shape != (count,) or len(seeds) != count or len(inputs[space.key]) != count:
        raise DataError(
            f"attack: expected a target and a seed for each of {count} rows, got targets "
            f"{tuple(target.shape)}, {len(seeds)} seeds and {len(inputs[space.key])} inputs"
        )
    step = cfg.step
    if step is None:
        usual = cfg.eps / 40 if space.key == "input_ids" else 0.1
        step = usual if cfg.norm == "l2" else 2.5 * cfg.eps / cfg.steps
        _require_reach(cfg, step)
    unit = space.unit
    return _Job(inputs, target.to(space.x.device), space, cfg.eps * unit, step * unit, tuple(seeds))


def _attempt(model: nn.Module, job: _Job, cfg: PGD, start: int) -> Perturbation:
    """Attack all rows of `job` once, from its start of number `start`."""
    delta, image_steps = _climb(model, job, _start(job, cfg, start), cfg, start)
    with torch.no_grad(), _precision(delta, "fp32"):
        logits = perturbed(model, job.inputs, delta, job.space)
    _require_logits(logits, job.target)
    success, confidence = _reached(logits, job.target, cfg)
    length = norms(job.space, delta, cfg.norm)
    return Perturbation(delta, success & (job.radius > 0), confidence, length, image_steps)


def _better(old: Perturbation, new: Perturbation, rows: Tensor) -> Perturbation:
    """Return `old` with those of its `rows` replaced where `new` is better.

    Success counts first, then confidence.
    """
    known = old.success[rows]
    wins = (new.success & ~known) | (
        (new.success == known) & (new.confidence > old.confidence[rows])
    )
    at = rows[wins]

    def put(before: Tensor, after: Tensor) -> Tensor:
        return before.index_copy(0, at, after[wins])

    return Perturbation(
        put(old.delta, new.delta),
        put(old.success, new.success),
        put(old.confidence, new.confidence),
        put(old.norm, new.norm),
        old.image_steps + new.image_steps,
    )


def _start(job: _Job, cfg: PGD, number: int) -> Tensor:
    """Return where the rows start: see `PGD.init`.

    Raises:
        NotApplicable: a draw from a box that is not bounded.
    """
    space = job.space
    if cfg.init == "zero" and number == 0:
        return torch.zeros_like(space.x)
    if cfg.init == "noise":
        lo, hi = space.lo, space.hi
        if lo is None or hi is None or not bool((lo.isfinite() & hi.isfinite()).all()):
            raise NotApplicable(
                f"attack: expected bounds of {space.key} for a start drawn from the box, got none; "
                "use init zero or ball"
            )
        u = _uniform(space, job.seeds, "start", number)
        return impose(space, masked(space, lo + u * (hi - lo) - space.x), job.radius, cfg.norm)
    if cfg.norm == "linf":
        u = masked(space, 2 * _uniform(space, job.seeds, "start", number) - 1)
        return impose(space, scaled(space, u, job.radius), job.radius, cfg.norm)
    free = masked(space, torch.ones_like(space.x)).flatten(1).sum(dim=1).clamp(min=1)
    shares = [generator.random() for generator in _generators(job.seeds, "radius", number)]
    u = torch.from_numpy(np.array(shares)).to(space.x)
    direction = _gaussian(space, job.seeds, "start", number)
    return impose(space, scaled(space, direction, job.radius * u ** (1 / free)), job.radius)


def _climb(model: nn.Module, job: _Job, delta: Tensor, cfg: PGD, start: int) -> tuple[Tensor, int]:
    """Return δ after all steps and the number of row gradients, packing what is still active."""
    rows = _Climbing(job, delta, start)
    images = 0
    every = _look_every(delta.device)
    for step in range(cfg.steps):
        logits, point = _forward(model, rows.job, rows.delta, cfg)
        if step == 0:
            _require_logits(logits, job.target)
        if cfg.stop_confidence is not None:
            rows.frozen = rows.frozen | _reached(logits.detach(), rows.job.target, cfg)[0]
        look = step % every == 0
        active = int((~rows.frozen).sum()) if look else None
        if active == 0:
            break
        rows.move(_gradient(model, logits, point, rows.job, cfg), cfg, look)
        images += len(point)
        if cfg.compact and active is not None and _worth(active, len(point), delta.device):
            rows.pack()
    return rows.all(), images


def _worth(active: int, rows: int, device: torch.device) -> bool:
    """Whether to leave finished rows out: always on the CPU, where it costs next to nothing."""
    return active < rows if device.type == "cpu" else 2 * active <= rows


def _look_every(device: torch.device) -> int:
    return 1 if device.type == "cpu" else LOOK_EVERY  # elsewhere a look waits for the device


class _Climbing:
    """The rows of a job that are still in the batch, and where all of them stand."""

    def __init__(self, job: _Job, delta: Tensor, start: int) -> None:
        self.job, self.delta, self._start = job, delta, start
        self.frozen = job.radius <= 0
        self._whole, self._at = delta, torch.arange(len(delta), device=delta.device)
        self._known, self._escape = self.frozen, torch.zeros_like(delta[:0])

    def move(self, gradient: Tensor, cfg: PGD, look: bool) -> None:
        """Make one step of the rows that are not frozen."""
        space, job = self.job.space, self.job
        slope = masked(space, gradient)
        slope = slope if space.metric is None else slope * space.metric.to(slope)
        length = lengths(slope.flatten(1))
        lost = ~(length.isfinite() & (length >= TINY))
        slope = slope / spread(length, slope)
        if look:
            self._draw_escapes(lost & ~self.frozen & ~self._known)
        escape = self._escape if len(self._escape) else torch.zeros_like(slope)
        slope = torch.where(spread(lost, slope), escape, slope)
        slope = slope.sign() if cfg.norm == "linf" else slope
        moved = impose(space, self.delta + scaled(space, slope, job.step), job.radius, cfg.norm)
        self.delta = torch.where(spread(self.frozen, moved), self.delta, moved)

    def _draw_escapes(self, wanted: Tensor) -> None:
        """Give rows that have no gradient a direction of their own, kept while they need one."""
        at = wanted.nonzero()[:, 0]
        if not len(at):
            return
        if not len(self._escape):
            self._escape = torch.zeros_like(self.delta)
        few = self.job.rows(at)
        drawn = _gaussian(few.space, few.seeds, "escape", self._start)
        self._escape = self._escape.index_copy(0, at, drawn)
        self._known = self._known | wanted

    def pack(self) -> None:
        """Leave the frozen rows out of the batch."""
        kept = (~self.frozen).nonzero()[:, 0]
        self._whole = self.all()
        self._at, self.job, self.delta = self._at[kept], self.job.rows(kept), self.delta[kept]
        self.frozen, self._known = self.frozen[kept], self._known[kept]
        self._escape = self._escape[kept] if len(self._escape) else self._escape

    def all(self) -> Tensor:
        """Return δ of all rows of the job."""
        return self._whole.index_copy(0, self._at, self.delta)


def _forward(model: nn.Module, job: _Job, delta: Tensor, cfg: PGD) -> tuple[Tensor, Tensor]:
    """Return the logits and the leaf whose gradient is that of δ.

    Inputs are clipped to the box before they become the leaf, so that rounding at its faces does
    not cut the gradient off.
    """
    space = job.space
    with torch.enable_grad(), _precision(delta, cfg.dtype):
        if space.key == "input_ids":
            leaf = delta.detach().requires_grad_()
            return perturbed(model, job.inputs, leaf, space), leaf
        leaf = boxed(space, space.x, space.x + delta).detach().requires_grad_()
        return _logits(model, {**job.inputs, space.key: leaf}), leaf


def _precision(like: Tensor, dtype: str) -> torch.autocast:
    return torch.autocast(like.device.type, torch.bfloat16, enabled=dtype == "bf16")


def _gradient(model: nn.Module, logits: Tensor, leaf: Tensor, job: _Job, cfg: PGD) -> Tensor:
    """Return ∂ log(p/(1−p)) / ∂leaf with p the target's probability; negative if untargeted.

    Raises:
        RuntimeError: of the model itself.
        NotApplicable: no gradient arrives, or the graph was already used.
    """
    if logits.requires_grad:
        with torch.enable_grad():
            odds = _log_odds(_wide_logits(logits), job.target).sum()
        try:
            gradient = torch.autograd.grad(odds, leaf, allow_unused=True)[0]
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise NotApplicable(
                f"attack: expected a model whose graph is whole after a forward pass, but a part "
                f"of {type(model).__name__} has used it up; let it keep no tensors between passes"
            ) from error
        if gradient is not None:
            return gradient if cfg.targeted else -gradient
    raise NotApplicable(
        f"attack: expected logits that depend on {job.space.key}, but no gradient of "
        f"{type(model).__name__} reaches them; use source none or noise"
    )


def _wide_logits(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """Return log(p/(1−p)) = z_t − logsumexp_{j≠t} z_j, (rows,)."""
    column = target[:, None]
    return logits.gather(1, column)[:, 0] - logits.scatter(1, column, -math.inf).logsumexp(dim=1)


def _reached(logits: Tensor, target: Tensor, cfg: PGD) -> tuple[Tensor, Tensor]:
    """Return which rows are where the attack wants them, and with what probability."""
    scores = _wide_logits(logits).log_softmax(dim=1)
    confidence = scores.gather(1, target[:, None])[:, 0].exp()
    hit = scores.argmax(dim=1) == target
    if not cfg.targeted:
        hit, confidence = ~hit, 1 - confidence
    return hit & (confidence >= (cfg.stop_confidence or 0.0)), confidence  # never for NaN


def _require_logits(logits: Tensor, target: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise NotApplicable(
            f"attack: expected logits (rows, C) of at least two classes, got {tuple(logits.shape)}"
        )
    _require_classes(target, logits.shape[1], "target")
