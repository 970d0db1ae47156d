"""Instance-wise unlearning from the forget data alone: adversarial examples, weight importance."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from unsc_plugin import attacks, engine
from unsc_plugin.errors import ConfigError, DataError, DivergedError, NonFiniteError, NotApplicable
from unsc_plugin.linalg import margin
from unsc_plugin.method import Batch, Past, Scenario, Split, UnlearningMethod, UnlearningTask
from unsc_plugin.methods import _importance
from unsc_plugin.methods._adversarial_pool import DELTA, POOR, TEACHER, Pool
from unsc_plugin.methods._instance_settings import Settings
from unsc_plugin.rows import Rows

MARGIN, MARGIN_LOW = 0.1, 0.5
"""Logits by which the goal must be met, in float32 and in half precision."""
EXPLODED = 1000.0
"""A run whose logits on the forget set grow by this factor has diverged, finite or not."""
CHUNK, HELD_BYTES = 512, 2**30
"""Rows decoded at once; forget data up to this size lie on the device."""
MANY, FULL_TEST_EVERY = 1024, 10
"""Above so many instances all of them are tested at every tenth step only."""
SCALED_TWICE = 0.05
"""A brightest pixel below this over the whole forget set looks scaled twice."""

Item = Batch | tuple[Batch, ...]


class InstanceWise(UnlearningMethod):
    """Stop answering what was recorded for k instances, with nothing but the model and those.

    With w, λ, n_f and n_a fixed or balanced as below, every step descends

        L = w · 1/n_f Σ ℓ(x) + (1 − w) · 1/n_a Σ CE(x̃, t) + λ/2 · Σ_p Ō_p (θ_p − θ0_p)²

    over at most `forget_batch` instances x that do not meet the goal yet. Goal `misclassify`:
    argmax f(x) ≠ y, ℓ = max(0, m(x, y) + s + 1), m the margin of the recorded label and s
    `stop_margin`; goal `relabel`: argmax f(x) = y*, ℓ = CE(x, y*). x̃ are targeted L2 adversarial
    examples of the same instances against the frozen anchor model, labelled with their target t:
    stand-ins for data of the other classes. Ō ∈ [0, 1] is one minus the normalised importance of a
    weight for the forget data, mean |∂‖f(x)‖₂/∂θ|, so that what matters for them is free to move.

    The run stops at the first step at which all (`stop_fraction`) instances meet the goal by more
    than s. After `patience` steps without progress w grows by `growth`; at `max_weight`, λ is
    halved. `stats["status"]` is `reached`, `cap` (then the best weights are returned) or
    `diverged`. The whole run is in eval mode: BatchNorm statistics and dropout stay out of it.

    Cha, Cho, Hwang, Lee, Moon and Lee, *Learning to Unlearn: Instance-wise Unlearning for
    Pre-trained Classifiers* (AAAI 2024, arXiv 2301.11578). Departures from it, all switched off by
    `instance_wise.reference`: a bounded loss (theirs is −CE), attacks from the image itself that
    stop once they succeed, failed attacks dropped, importance per sample, frozen BatchNorm
    statistics, the balance of w and λ, and a stop test by margin after every step. What it forgets
    is more than retraining would: a retrained model still gets most of its former training data
    right.
    """

    Config = Settings

    name = "instance_wise"
    needs = frozenset({Split.FORGET})
    scenarios = frozenset({Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.SEQUENTIAL})
    supports_weights = False
    expected_failures: ClassVar[dict[str, str]] = {
        "utility": "a quarter of the toy's rows must fail, with no retained row to hold on to"
    }
    config: Settings

    def prepare(self, model: nn.Module, task: UnlearningTask) -> _Request:
        """Read the forget data once; return them with their goal and the freedom of the weights."""
        return _request(model, task, self.config)

    def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
        """Return the model that meets the goal, or the best one at the cap."""
        request: _Request = task.prepared
        config = self.config
        moving = trainable(model, config.trainable)
        train_mode = "train_mode" in config.quirks
        if not train_mode:
            task.promise_frozen(model.state_dict().keys() - moving.keys())
        with contextlib.ExitStack() as stack:
            stack.enter_context(task.counting(request.anchor))
            if not train_mode:
                stack.enter_context(engine.quiet(model))
            _Run(model, task, config, request, moving).finish()
        return model


def trainable(model: nn.Module, globs: tuple[str, ...] | None) -> dict[str, nn.Parameter]:
    """Return the parameters that may move and let only those require a gradient.

    Raises:
        ConfigError: there are none.
    """
    found = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and (globs is None or any(fnmatch.fnmatch(name, g) for g in globs))
    }
    if not found:
        wanted = "any" if globs is None else ", ".join(globs)
        raise ConfigError(
            f"trainable: expected a parameter that requires a gradient and matches {wanted}, got "
            "none; see model.named_parameters()"
        )
    for name, p in model.named_parameters():
        p.requires_grad_(name in found)
    return found


# --------------------------------------------------------------------------- the request


@dataclass(frozen=True)
class _Request:
    """What is fixed before the first step.

    `rows` are the forget data in memory, the own ones first, then those of earlier requests that
    stay forgotten; `goal` are the labels of the loss (y, or y* for a correction); `anchor` is the
    frozen model that is held on to, `predicted` its answers, `classes` and `height` the number of
    its logits and the largest |logit|, `free` Ō by parameter name.
    """

    rows: Rows
    own: int
    goal: Tensor
    anchor: nn.Module
    predicted: Tensor
    classes: int
    height: float
    free: dict[str, Tensor] | None


def _request(model: nn.Module, task: UnlearningTask, config: Settings) -> _Request:
    """Read, check and warn; choose the new labels and measure the importance.

    Raises:
        UnscError: a request or a setting that cannot be served.
    """
    own = _held(task.rows("forget"), task.device)
    past = _repaired(task, config)
    rows = _joined([own, *(_held(one.rows, task.device) for one in past)])
    old = config.anchor == "first" or config.relabel == "second_best"
    first = task.first_model if old else None
    anchor = first if first is not None and config.anchor == "first" else model
    logits = engine.predict(anchor, rows, device=task.accelerator).logits
    _check(anchor, rows, logits, task, config)
    goal = own.labels
    if config.goal == "relabel":
        asked = logits[: len(own)]
        if first is not None and config.relabel == "second_best":
            asked = engine.predict(first, own, device=task.accelerator).logits
        goal = new_labels(own, asked, config, seed=task.seed)
    kept = [one.rows.labels if one.targets is None else one.targets for one in past]
    free = _freedom(anchor, rows, task, config)
    return _Request(
        rows,
        len(own),
        torch.cat([goal, *kept]),
        anchor,
        predicted=logits.argmax(dim=1),
        classes=logits.shape[1],
        height=float(logits.abs().max()),
        free=free,
    )


def _repaired(task: UnlearningTask, config: Settings) -> tuple[Past, ...]:
    if config.history == "none":
        return ()
    if not task.sequential:
        raise ConfigError(
            "history=repair: expected a request of a sequence, got a single one, so that there are "
            "no earlier forget sets; use history=none, or --forget sequence:random:SIZExCOUNT"
        )
    return task.history()


def _held(rows: Rows, device: torch.device) -> Rows:
    """Return the rows decoded and in memory, on `device` unless they are large."""
    parts = [rows.gather(part).inputs for part in torch.split(torch.arange(len(rows)), CHUNK)]
    inputs = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    held = Rows.of(inputs, rows.labels, rows.index)
    size = sum(column.numel() * column.element_size() for column in inputs.values())
    return held.to(device) if size <= HELD_BYTES else held


def _joined(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    inputs = {key: torch.cat([one.storage[key] for one in parts]) for key in parts[0].storage}
    labels, index = (torch.cat([getattr(one, n) for one in parts]) for n in ("labels", "index"))
    return Rows.of(inputs, labels, index)


def _check(
    model: nn.Module, rows: Rows, logits: Tensor, task: UnlearningTask, config: Settings
) -> None:
    """Refuse what cannot be served; warn of what is unusual.

    Raises:
        NonFiniteError: a logit is not finite.
        DataError: a weight is not finite, or a label has no logit.
        NotApplicable: no logits of at least two classes.
        ConfigError: a loss that overflows in half precision.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise NotApplicable(
            "instance_wise needs one logit per class and at least two classes, got logits of shape "
            f"{tuple(logits.shape)}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("expected finite logits of the original model, got a NaN or infinity")
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            raise DataError(f"expected finite weights, got a NaN or an infinity in {name}")
    wrong = torch.nonzero((rows.labels < 0) | (rows.labels >= logits.shape[1]))[:, 0]
    if len(wrong):
        raise DataError(
            f"expected labels 0 to {logits.shape[1] - 1}, one per logit, got "
            f"{int(rows.labels[wrong[0]])} for index {int(rows.index[wrong[0]])}"
        )
    if config.ascent == "ce" and config.goal == "misclassify" and precision(task) == "fp16":
        raise ConfigError("ascent=ce is unbounded and overflows in fp16; use hinge, or bf16")
    if task.scenario in (Scenario.CLASS, Scenario.SUBCLASS):
        task.warn(f"instance_wise is made for scattered instances, not for a whole {task.scenario}")
    if logits.shape[1] == 2 and config.goal == "misclassify":
        task.warn(
            "two classes: to misclassify is to answer the other class, and that is the only target "
            "of the attacks"
        )
    if config.source != "none":
        _check_inputs(model, rows, task)


def _check_inputs(model: nn.Module, rows: Rows, task: UnlearningTask) -> None:
    """Open the attack's space on all rows, so that what it refuses is refused before any step.

    Raises:
        UnscError: inputs that cannot be attacked.
    """
    brightest = 0.0
    for part in torch.split(torch.arange(len(rows)), CHUNK):
        space = attacks.open_space(model, rows.gather(part).to(task.device).inputs)
        brightest = max(brightest, float(space.x.max()))
    if space.guessed_mask:
        task.warn("special tokens are unknown: only padding is kept from the attack")
    if space.key == "pixel_values" and brightest < SCALED_TWICE:
        task.warn(f"the brightest pixel is {brightest:.3g}: were the pixels scaled twice?")


def precision(task: UnlearningTask) -> str:
    """Return the mixed precision of a task: no, bf16 or fp16."""
    return str(getattr(task.accelerator, "mixed_precision", "no"))


def new_labels(rows: Rows, logits: Tensor, config: Settings, *, seed: int) -> Tensor:
    """Return y* ≠ y of every row, int64 (n,): drawn, second best, or given.

    `logits` (n, C) are the anchor's for a draw (its answer is left out), the first model's for the
    second best.

    Raises:
        ConfigError: a given label that is out of range, the old one, or missing for a row.
    """
    classes = logits.shape[1]
    if config.relabel == "random":
        return attacks.draw_targets(
            rows.labels, rows.index, classes, seed=seed, predicted=logits.argmax(dim=1),
            stream="relabel",
        )  # fmt: skip
    if config.relabel == "second_best":
        return logits.scatter(1, rows.labels[:, None], -math.inf).argmax(dim=1)
    given = config.relabel_to
    index, labels = rows.index.tolist(), rows.labels.tolist()
    table = dict(given) if isinstance(given, tuple) else dict.fromkeys(index, given)
    for at, label in zip(index, labels, strict=True):
        wanted = table.get(at)
        if wanted is None:
            raise ConfigError(f"relabel_to: expected a label for index {at}, got none; add it")
        if not 0 <= wanted < classes or wanted == label:
            raise ConfigError(
                f"relabel_to: expected a class of 0 to {classes - 1} other than the recorded "
                f"{label} for index {at}, got {wanted}"
            )
    return torch.tensor([table[at] for at in index], dtype=torch.int64)


def _freedom(
    anchor: nn.Module, rows: Rows, task: UnlearningTask, config: Settings
) -> dict[str, Tensor] | None:
    """Return Ō by name, None where every weight is pulled alike or none is."""
    flags = {name: p.requires_grad for name, p in anchor.named_parameters()}
    trainable(anchor, config.trainable)
    began, free = task.clock.seconds, None
    if config.lam and config.importance != "ones":
        found, route = _importance_of(anchor, rows, config)
        free = _importance.freedom(found, config.importance)
        task.stats["importance"] = {"route": route, **_importance.summary(free, found)}
    task.stats["seconds"] = {"importance": task.clock.seconds - began}
    for name, p in anchor.named_parameters():
        p.requires_grad_(flags[name])
    return free


def _importance_of(
    anchor: nn.Module, rows: Rows, config: Settings
) -> tuple[dict[str, Tensor], _importance.Route]:
    squared = config.importance_fn == "squared_norm"
    if "batch_importance" not in config.quirks:
        return _importance.per_sample(anchor, rows, squared=squared)
    return _importance.by_batches(anchor, rows, config.forget_batch, squared=squared), "batches"


# --------------------------------------------------------------------------- the losses


def forget_losses(
    logits: Tensor, labels: Tensor, goal: str, ascent: str, stop_margin: float
) -> Tensor:
    """Return ℓ of every row, (n,); `labels` are y for goal misclassify and y* for relabel.

    hinge: max(0, m(x, y) + s + 1); unlikelihood: −log(1 − p_y) = softplus(z_y − log Σ_{j≠y} e^z_j);
    ce: −CE(x, y); relabel: CE(x, y*).
    """
    if goal == "relabel":
        return functional.cross_entropy(logits, labels, reduction="none")
    if ascent == "hinge":
        return functional.relu(margin(logits, labels) + stop_margin + 1)
    if ascent == "ce":
        return -functional.cross_entropy(logits, labels, reduction="none")
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -math.inf).logsumexp(dim=1)
    return functional.softplus(own - others)


def satisfied(logits: Tensor, labels: Tensor, goal: str, stop_margin: float) -> Tensor:
    """Return which rows meet the goal by more than `stop_margin`, bool (n,); a NaN never does."""
    found = margin(logits, labels)
    return found > stop_margin if goal == "relabel" else -found > stop_margin


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


# --------------------------------------------------------------------------- the run


class _Run:
    """The steps of one run, and what it knows of its progress."""

    def __init__(
        self, model: nn.Module, task: UnlearningTask, config: Settings, request: _Request,
        moving: dict[str, nn.Parameter],
    ) -> None:  # fmt: skip
        self.model, self.task, self.config, self.request = model, task, config, request
        self.moving, self.k = list(moving.values()), len(request.rows)
        anchor = dict(request.anchor.named_parameters())
        self.anchor = [anchor[name].detach() for name in moving]
        self.free = None if request.free is None else [request.free[name] for name in moving]
        self.start = self.anchor  # the same weights, unless an older model is held on to
        if config.anchor == "first":
            self.start = [p.detach().clone() for p in self.moving]
        low = precision(task) in ("bf16", "fp16")
        default = MARGIN_LOW if low else MARGIN
        self.margin = default if config.stop_margin is None else config.stop_margin
        self.need = math.ceil(config.stop_fraction * self.k - 1e-9)
        self.n_f = min(self.k, config.forget_batch)
        self.pool = self._pool() if config.source != "none" else None
        self.w = self._first_weight()
        self.lam = config.lam
        self.cap = config.max_steps
        if config.max_epochs is not None:
            self.cap = config.max_epochs * self.per_epoch
        self.met = torch.zeros(self.k, dtype=torch.bool)
        self.best = self.seen = -1
        self.stale = self.already = 0
        self.snapshot: list[Tensor] = []
        self.restored = False
        self.status, self.reason = "", ""
        self.parts: dict[str, Tensor | float] = {}
        self.curve: list[list[float | None]] = []

    def _pool(self) -> Pool:
        request = self.request
        clock = self.task.clock
        return Pool(
            request.anchor,
            request.rows,
            self.config,
            seed=self.task.seed,
            num_classes=request.classes,
            place=self.task.device,
            clock=lambda: clock.seconds,
            predicted=request.predicted,
        )

    def _first_weight(self) -> float:
        if self.pool is None:
            return 1.0
        given = self.config.forget_weight
        return self.n_f / (self.n_f + self.config.adv_batch) if given is None else given

    @property
    def per_epoch(self) -> int:
        """Steps of one pass over the pool, or over the forget rows where there is none."""
        if self.pool is None:
            return -(-self.k // self.n_f)
        return -(-len(self.pool) // self.config.adv_batch)

    # -- the loop

    def finish(self) -> None:
        """Step until the goal, the cap or the budget; leave the weights that count in the model.

        Raises:
            DivergedError: a logit, the loss or a gradient is not finite.
        """
        config = self.config
        began, stats = self.task.clock.seconds, self.task.stats
        stage = engine.Stage(lambda _: self._items(), self._loss)
        try:
            engine.fit(
                self.model,
                self.task,
                [stage],
                epochs=1,
                lr=config.lr,
                optimizer="sgd",
                momentum=(config.momentum, False),
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
                before_step=self._pull,
            )
            if not self.status:
                self._end("cap", "budget")
        except DivergedError:
            self.status = "diverged"
            raise
        finally:
            attack = self.pool.seconds if self.pool is not None else 0.0
            spent = self.task.clock.seconds - began
            seconds = {"attack": attack, "optimise": spent - attack}
            stats["seconds"] = {**stats.get("seconds", {}), **seconds}
            stats.update(self._stats())
        self.task.targets = self._targets()
        if self.pool is not None and self.pool.tally.generated and self.pool.tally.success < POOR:
            self.task.warn(
                f"only {self.pool.tally.success:.0%} of the attacks reached their target; raise "
                "eps or attack_steps"
            )

    def _targets(self) -> Tensor | None:
        return self.request.goal[: self.request.own] if self.config.goal == "relabel" else None

    def _items(self) -> Iterator[Item]:
        step = 0
        while not self._done(step):
            yield self._draw(step)
            step += 1

    def _done(self, step: int) -> bool:
        """Test the goal on the present weights; balance w and λ where it comes no nearer."""
        if self._waits(step):
            return False
        whole = self._test(step)
        count = int(self.met.sum())
        if count >= self.need and not whole:
            whole = self._test(0)
            count = int(self.met.sum())
        if step == 0:
            self.already = count
        self.stale = 0 if count > self.seen else self.stale + 1
        self.seen = max(self.seen, count)
        if count > self.best and whole:
            self.best = count
            self.snapshot = [p.detach().clone() for p in self.moving]
        if step == 0 or engine.is_mark(step):
            self._point(step, count)
        if count >= self.need:
            return self._end("reached")
        if step >= self.cap:
            return self._end("cap", "steps")
        if self.stale >= self.config.patience:
            self._balance()
        return False

    def _waits(self, step: int) -> bool:
        """Whether the published stop test, once per epoch, is not due."""
        late = "epoch_stop" in self.config.quirks and step < self.cap
        return late and (step == 0 or step % self.per_epoch != 0)

    def _test(self, step: int) -> bool:
        """Find out which instances meet the goal; return whether all of them were asked.

        Raises:
            DivergedError: a logit is not finite, or far beyond those of the anchor.
        """
        whole = self.k <= MANY or step % FULL_TEST_EVERY == 0
        at = torch.arange(self.k) if whole else torch.nonzero(~self.met)[:, 0]
        rows = self.request.rows.subset(at)
        logits = engine.predict(self.model, rows, device=self.task.accelerator).logits
        if not bool(torch.isfinite(logits).all()):
            raise DivergedError(
                f"a logit on the forget set is not finite at step {self.task.steps}"
            )
        grown = float(logits.abs().max()) / max(1.0, self.request.height)
        if grown > EXPLODED:
            raise DivergedError(
                f"logits on the forget set have grown {grown:.3g}-fold at step {self.task.steps}; "
                "lower lr"
            )
        goal, config = self.request.goal[at], self.config
        self.met[at] = satisfied(logits, goal, config.goal, self.margin)
        return whole

    def _balance(self) -> None:
        self.stale = 0
        if self.w >= self.config.max_weight:
            self.lam = self.lam / 2 if self.config.growth > 1 else self.lam
        else:
            self.w = min(self.config.max_weight, self.config.growth * self.w)

    def _end(self, status: str, reason: str = "") -> bool:
        self.status, self.reason = status, reason
        if status == "cap" and "last_model" not in self.config.quirks and self.snapshot:
            with torch.no_grad():
                for p, kept in zip(self.moving, self.snapshot, strict=True):
                    p.copy_(kept)
            self.restored = True
        return True

    # -- one step

    def _draw(self, step: int) -> Item:
        self.parts = {}
        forget = self._forget_batch(step)
        if self.pool is None:
            return forget
        adversarial = self.pool.take(self.config.adv_batch)
        quirks = self.config.quirks
        if "partial_tail" in quirks or "all_rows" in quirks:
            self.w = forget.total / (forget.total + adversarial.total)
        return forget, adversarial

    def _forget_batch(self, step: int) -> Batch:
        """Return rows that do not meet the goal yet, with their goal as label, divisor n_f."""
        size, divisor = self.config.forget_batch, float(self.n_f)
        if "all_rows" in self.config.quirks:
            at = torch.split(torch.arange(self.k), size)[step % -(-self.k // size)]
            divisor = float(len(at))
        else:
            at = torch.nonzero(~self.met)[:, 0]
        if len(at) > size:
            stream, index = attacks.STREAMS["rows"], self.request.rows.index
            keys = [attacks.draw(self.task.seed, stream, int(index[i]), step) for i in at]
            at = at[sorted(range(len(at)), key=keys.__getitem__)[:size]].sort().values
        batch = self.request.rows.gather(at).to(self.task.device)
        labels = self.request.goal[at].to(self.task.device)
        return Batch(batch.inputs, labels, batch.index, batch.weight, divisor)

    def _loss(self, model: nn.Module, item: Item) -> Tensor:
        """Return this process's share of w/n_f Σ ℓ + (1 − w)/n_a Σ CE; every process does all."""
        forget, adversarial = item if isinstance(item, tuple) else (item, None)
        stand_in = None if adversarial is None else self._stand_in_loss(model, adversarial)
        config = self.config
        logits = _wide(model(**forget.inputs))
        losses = forget_losses(logits, forget.labels, config.goal, config.ascent, self.margin)
        loss = losses.sum() / forget.total
        self._part("forget", loss)
        if stand_in is not None:
            self._part("stand_in", stand_in)
            loss = self.w * loss + (1 - self.w) * stand_in
        return loss / engine.world(self.task.accelerator)

    def _stand_in_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = dict(batch.inputs)
        delta, soft = inputs.pop(DELTA), inputs.pop(TEACHER, None)
        assert self.pool is not None
        logits = _wide(attacks.perturbed(model, inputs, delta, self.pool.template))
        labels = batch.labels if soft is None else soft.to(logits.dtype)
        return functional.cross_entropy(logits, labels, reduction="sum") / batch.total

    def _pull(self) -> None:
        """Add λŌ(θ − θ0) to the gradients.

        Raises:
            DivergedError: a gradient is not finite.
        """
        found = [(i, p.grad) for i, p in enumerate(self.moving) if p.grad is not None]
        gradients = [gradient for _, gradient in found]
        if self.lam and found:
            with torch.no_grad():
                now, held = ([values[i] for i, _ in found] for values in (self.moving, self.anchor))
                pull = torch._foreach_sub(now, held)
                if self.free is not None:
                    torch._foreach_mul_(pull, [self.free[i] for i, _ in found])
                torch._foreach_add_(gradients, pull, alpha=self.lam)
        if precision(self.task) != "fp16" and found:  # there a scaler skips such steps
            norm = torch.stack(list(torch._foreach_norm(gradients))).norm()
            if not bool(torch.isfinite(norm)):
                raise DivergedError(f"a gradient is not finite at step {self.task.steps}")

    # -- what is noted

    def _part(self, name: str, value: Tensor) -> None:
        """Add a micro-batch's loss to that of the step."""
        self.parts[name] = self.parts.get(name, 0.0) + value.detach()

    def _point(self, step: int, count: int) -> None:
        parts = {key: float(value) for key, value in self.parts.items()}
        self.curve.append(
            [
                step,
                count,
                parts.get("forget"),
                parts.get("stand_in"),
                self._pulled(),
                self.w,
                self.lam,
            ]
        )

    def _pulled(self) -> float:
        """Return ½ Σ Ō (θ − θ0)²."""
        total = 0.0
        with torch.no_grad():
            for i, p in enumerate(self.moving):
                moved = (p - self.anchor[i]).square()
                total += float((moved if self.free is None else moved * self.free[i]).sum())
        return total / 2

    def _stats(self) -> dict[str, Any]:
        with torch.no_grad():
            moved = sum(
                float((p - before).double().square().sum())
                for p, before in zip(self.moving, self.start, strict=True)
            )
        found: dict[str, Any] = {
            "status": self.status,
            "steps": self.task.steps,
            "k": self.k,
            "k_already": self.already,
            "forgotten": max(self.best, 0) if self.restored else int(self.met.sum()),
            "goal": self.config.goal,
            "stop_margin": self.margin,
            "w_final": self.w,
            "lam_final": self.lam,
            "curve": self.curve,
            "dist": math.sqrt(moved),
        }
        if self.reason:
            found["cap_reason"] = self.reason
        if self.pool is not None:
            found["attack"] = self.pool.tally.stats()
        targets = self._targets()
        if targets is not None:
            found["targets_sha256"] = hashlib.sha256(
                targets.numpy().astype("<i8").tobytes()
            ).hexdigest()
        return found
