"""One fit loop and one predict loop over accelerate; nothing else in the package steps or predicts.

Gradients of the losses of one step are summed over micro-batches and processes. A loss that is
divided by `Batch.total`, the rows of the whole step, is therefore the exact weighted mean for any
number of processes and micro-batches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from unsc_plugin.errors import ConfigError, DataError, MissingOptional
from unsc_plugin.method import Batch, Budget, Context, Loader, Progress, Recipe, TrainingConfig
from unsc_plugin.rows import Rows, joint
from unsc_plugin.runtime import quiet

__all__ = [
    "FIT_VERSION",
    "Predictions",
    "Stage",
    "accelerator",
    "cross_entropy",
    "fit",
    "fit_recipe",
    "joint",
    "predict",
    "quiet",
    "reduce_sum",
    "train",
    "weighted_mean",
]

FIT_VERSION = 1
"""Raised whenever the loop changes results; part of the cache key of every trained model."""

Item = Batch | tuple[Batch, ...]
Loss = Callable[[nn.Module, Any], Tensor]


def accelerator(
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    *,
    log_with: str | None = None,
    project_dir: str | None = None,
) -> Accelerator:
    """Return the accelerator of this process: device, mixed precision, trackers.

    Under `accelerate launch` or `torchrun` it joins the group of processes.

    Raises:
        MissingOptional: a device that this machine does not have.
        ConfigError: this process has an accelerator of another device or precision already.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device, True):
        raise MissingOptional(f"device {device} is not there; use auto or cpu")
    try:
        return Accelerator(
            cpu=device == "cpu" or not any(there.values()),
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=log_with,
            project_dir=project_dir,
        )
    except ValueError as error:
        raise ConfigError(
            f"accelerate cannot run on {device} in {precision} in this process: {error}"
        ) from None


class _Plain:
    """What :func:`fit` needs of an accelerator where none is given: one process, fp32."""

    num_processes = 1
    scaler = None
    autocast = contextlib.nullcontext

    @staticmethod
    def backward(loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


# --------------------------------------------------------------------------- losses


def weighted_mean(losses: Tensor, batch: Batch) -> Tensor:
    """Return this process's part of Σ w·loss / B over the whole step; losses (B,) to scalar.

    B is the number of rows of the step: weights of 0 and 1 − a chosen set − give the plain mean of
    the set form bit for bit, and a step fades as its weights go to 0.
    """
    return (losses * batch.weight.to(losses.dtype)).sum() / batch.total


def cross_entropy(
    model: nn.Module, batch: Batch, labels: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Return the weighted mean cross-entropy of `model` on `batch`, against `labels` if given."""
    logits = model(**batch.inputs)
    target = batch.labels if labels is None else labels
    losses = functional.cross_entropy(
        logits, target, reduction="none", label_smoothing=label_smoothing
    )
    return weighted_mean(losses, batch)


# --------------------------------------------------------------------------- modes


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextlib.contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Use batch statistics in the body but leave the running statistics alone, to the bit."""
    norms = [module for module in _batch_norms(model) if module.track_running_stats]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True


@contextlib.contextmanager
def _batch_norm_eval(model: nn.Module) -> Iterator[None]:
    norms = [module for module in _batch_norms(model) if module.training]
    for module in norms:
        module.eval()
    try:
        yield
    finally:
        for module in norms:
            module.train()


# --------------------------------------------------------------------------- fitting


@dataclass(frozen=True)
class Stage:
    """One pass of an epoch: where items come from, the loss of an item, what BatchNorm does.

    `batches(epoch)` gives the items of an epoch (a `Loader` may stand in for it). `statistics` is
    `move` (train mode), `keep` (batch statistics, running ones untouched: passes over forget data
    only) or `eval` (running statistics used, untouched). `steps` is the number of items per epoch
    where it cannot be read from the loader.
    """

    batches: Loader | Callable[[int], Iterable[Item]]
    loss: Loss
    statistics: Literal["move", "keep", "eval"] = "move"
    steps: int | None = None

    def items(self, epoch: int) -> Iterable[Item]:
        """Return the items of an epoch."""
        return self.batches if isinstance(self.batches, Loader) else self.batches(epoch)

    def __len__(self) -> int:
        if self.steps is not None:
            return self.steps
        return len(self.batches) if isinstance(self.batches, Loader) else 0


def fit(
    model: nn.Module,
    context: Context,
    stages: Sequence[Stage],
    *,
    epochs: int,
    lr: float,
    optimizer: Literal["sgd", "adam", "adamw"] | None = None,
    momentum: tuple[float, bool] | None = None,
    weight_decay: float | None = None,
    max_grad_norm: float | None = None,
    schedule: Callable[[float], float] | None = None,
    micro_batches: int | None = None,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    on_epoch_end: Callable[[int], bool] | None = None,
) -> None:
    """Run `epochs` epochs of `stages` on the trainable parameters of `model`, in place.

    Every item is one optimiser step: the losses of its micro-batches are back-propagated, gradients
    summed over processes, `before_step` called (gradients are final but for clipping), clipped,
    stepped, `after_step` called. The optimiser's class, `momentum` (and whether it is Nesterov's)
    and weight decay are the recipe's unless given, the number of micro-batches the context's.
    `schedule(epochs done, a float)` multiplies `lr`. `on_epoch_end` returning True stops; so does
    the context's budget, within one step.

    Raises:
        DivergedError: a loss is not finite.
    """
    device = context.accelerator or _Plain
    parameters = [p for p in model.parameters() if p.requires_grad]
    if epochs <= 0 or not parameters:
        return
    inner = _optimizer(parameters, context.recipe, lr, optimizer, momentum, weight_decay)
    stepper = AcceleratedOptimizer(inner, scaler=device.scaler) if context.accelerator else inner
    stepper.zero_grad()
    per_epoch = sum(len(stage) for stage in stages)
    parts = micro_batches or context.micro_batches
    for epoch in range(epochs):
        done = 0
        for stage in stages:
            for item in stage.items(epoch):
                if context.spent:
                    _mean_statistics(model, device)
                    return
                if schedule is not None:
                    _scale(inner, lr * schedule(epoch + done / per_epoch if per_epoch else epoch))
                loss = _backward(model, stage, item, device, parts)
                sum_gradients(parameters, device)
                _step(stepper, parameters, device, max_grad_norm, before_step)
                if after_step is not None:
                    after_step()
                context.tick(loss)
                context.observe(model)
                done += 1
        _mean_statistics(model, device)
        context.epoch_done()
        if on_epoch_end is not None and on_epoch_end(epoch):
            return


def _optimizer(
    parameters: list[nn.Parameter],
    recipe: Recipe,
    lr: float,
    kind: str | None,
    momentum: tuple[float, bool] | None,
    weight_decay: float | None,
) -> torch.optim.Optimizer:
    kind = kind or recipe.optimizer
    speed, nesterov = momentum or (recipe.momentum, recipe.nesterov)
    decay = recipe.weight_decay if weight_decay is None else weight_decay
    if kind == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=lr,
            momentum=speed,
            nesterov=nesterov and speed > 0,
            weight_decay=decay,
        )
    family = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
    return family(parameters, lr=lr, weight_decay=decay)


def _scale(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@contextlib.contextmanager
def _mode(model: nn.Module, stage: Stage, item: Item) -> Iterator[None]:
    parts = item if isinstance(item, tuple) else (item,)
    if stage.statistics == "eval" or min(len(part) for part in parts) < 2:
        with _batch_norm_eval(model):  # batch statistics of one row do not exist
            yield
    elif stage.statistics == "keep":
        with statistics_kept(model):
            yield
    else:
        yield


def _backward(model: nn.Module, stage: Stage, item: Item, device: Any, micro_batches: int) -> float:
    total = 0.0
    for part in _micro(item, micro_batches):
        with _mode(model, stage, part), device.autocast():
            value = stage.loss(model, part)
        device.backward(value)
        total += float(value.detach())
    if device.num_processes > 1:
        total = float(reduce_sum(torch.tensor(total, dtype=_wide(device)), device))
    return total


def _wide(device: Any) -> torch.dtype:
    return torch.float32 if device.device.type == "mps" else torch.float64


def _micro(item: Item, parts: int) -> Iterable[Item]:
    """Return the micro-batches of a step; of a joint step as many as its smallest batch has."""
    if parts <= 1:
        return [item]
    if isinstance(item, Batch):
        return item.split(parts)
    count = min(parts, *(len(batch) for batch in item))
    return list(zip(*(batch.split(count) for batch in item), strict=True))


def _mean_statistics(model: nn.Module, device: Any) -> None:
    """Give BatchNorm the mean of all processes' running statistics, so that one model comes out."""
    if device.num_processes == 1:
        return
    for module in _batch_norms(model):
        for buffer in module.buffers(recurse=False):
            mean = reduce_sum(buffer.float(), device) / device.num_processes
            buffer.copy_(mean if buffer.is_floating_point() else mean.round())


def sum_gradients(parameters: Sequence[nn.Parameter], device: Any) -> None:
    """Add the gradients of all processes up, in place; one flat buffer per dtype.

    A parameter that no process used keeps no gradient, as it does with one process.
    """
    if device.num_processes == 1:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters])
    everywhere = reduce_sum(used.to(device.device), device).tolist()
    shared = [p for p, count in zip(parameters, everywhere, strict=True) if count]
    for dtype in sorted({p.dtype for p in shared}, key=str):
        group = [p for p in shared if p.dtype == dtype]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = reduce_sum(torch.cat([g.reshape(-1) for g in gradients]), device)
        parts = torch.split(flat, [p.numel() for p in group])
        for p, part in zip(group, parts, strict=True):
            p.grad = part.view_as(p).clone()


def _step(
    stepper: AcceleratedOptimizer | torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    device: Any,
    max_grad_norm: float | None,
    before_step: Callable[[], None] | None,
) -> None:
    if device.scaler is not None and (before_step is not None or max_grad_norm is not None):
        device.unscale_gradients(stepper)
    if before_step is not None:
        before_step()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    stepper.step()
    stepper.zero_grad()


def recipe_schedule(recipe: Recipe, epochs: int) -> Callable[[float], float] | None:
    """Return the recipe's factor of the learning rate as a function of epochs done, or None if 1.

    Linear from 0 over `warmup_epochs`, then constant, or ½(1 + cos πt) with t in [0, 1] over the
    rest.
    """
    warm = recipe.warmup_epochs
    if recipe.schedule == "constant" and not warm:
        return None

    def factor(done: float) -> float:
        if done < warm:
            return max(done / warm, 1e-3)
        if recipe.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (done - warm) / max(epochs - warm, 1e-9)))

    return factor


def fit_recipe(
    model: nn.Module,
    context: Context,
    loader: Loader,
    *,
    epochs: int | None = None,
    weight_decay: float | None = None,
) -> None:
    """Train `model` on `loader` exactly as the recipe says; originals and retrained models use it.

    `epochs` and `weight_decay`, where given, stand over the recipe's.

    Raises:
        DivergedError: a loss is not finite.
    """
    recipe = context.recipe
    epochs = recipe.epochs if epochs is None else epochs
    model.train()
    fit(
        model,
        context,
        [Stage(loader, lambda m, b: cross_entropy(m, b, label_smoothing=recipe.label_smoothing))],
        epochs=epochs,
        lr=recipe.lr,
        weight_decay=weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        schedule=recipe_schedule(recipe, epochs),
    )


def train(
    model: nn.Module,
    rows: Rows,
    recipe: Recipe,
    *,
    seed: int,
    device: Accelerator | None = None,
    micro_batches: int = 1,
    progress: Callable[[Progress], None] | None = None,
) -> Context:
    """Train `model` in place on `rows` by `recipe`; the order of the rows depends on `seed` only.

    The returned context holds steps, losses and seconds.

    Raises:
        DivergedError: a loss is not finite.
    """
    context = Context(
        recipe, seed, accelerator=device, micro_batches=micro_batches, progress=progress
    )
    fit_recipe(model, context, loader_for(rows, context, "retain", augment=recipe.augment))
    model.eval()
    return context


def loader_for(rows: Rows, context: Context, name: str, *, augment: str = "none") -> Loader:
    """Return a shuffled loader over `rows` with the recipe's batch size, sharded over processes."""
    group = context.accelerator
    return Loader(
        rows,
        context.recipe.batch_size,
        seed=context.seed,
        name=name,
        shuffle=True,
        augment=augment,
        rank=group.process_index if group else 0,
        world=group.num_processes if group else 1,
        device=context.device,
    )


def fit_steps(
    model: nn.Module,
    rows: Rows,
    recipe: Recipe,
    *,
    steps: int,
    lr: float,
    seed: int,
    device: Accelerator | None = None,
    at: Sequence[int] = (),
    observe: Callable[[int], None] | None = None,
) -> None:
    """Take `steps` cross-entropy steps on `rows` at constant `lr`, weight decay 0, no augmentation.

    `observe(step)` is called after every step listed in `at`.

    Raises:
        DivergedError: a loss is not finite.
    """
    context = Context(recipe, seed, accelerator=device, budget=Budget(steps=steps))
    loader = loader_for(rows, context, "relearn")
    model.train()
    marks = set(at)

    def after() -> None:
        done = context.steps + 1
        if observe is not None and done in marks:
            observe(done)

    fit(
        model,
        context,
        [Stage(loader, cross_entropy)],
        epochs=-(-steps // max(len(loader), 1)),
        lr=lr,
        weight_decay=0.0,
        after_step=after,
    )
    model.eval()


def fit_config(
    model: nn.Module,
    context: Context,
    stages: Sequence[Stage],
    config: TrainingConfig,
    *,
    epochs: int,
    **more: Any,
) -> None:
    """Call :func:`fit` with the learning rate and the clipping of a method's configuration.

    Raises:
        DivergedError: a loss is not finite.
    """
    more = {
        "lr": config.learning_rate(context.recipe),
        "max_grad_norm": config.max_grad_norm,
    } | more
    fit(model, context, stages, epochs=epochs, **more)


def is_mark(step: int) -> bool:
    """Return whether a step is a rounded power of √2: 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, ..."""
    return step > 0 and round(2 ** (round(2 * math.log2(step)) / 2)) == step


# --------------------------------------------------------------------------- predicting


@dataclass(frozen=True)
class Predictions:
    """Logits float32 (N, K), labels and index int64 (N,), features float32 (N, D) or None; CPU."""

    logits: Tensor
    labels: Tensor
    index: Tensor
    features: Tensor | None = None


def predict(
    model: nn.Module,
    rows: Rows,
    *,
    device: Accelerator | None = None,
    batch_size: int = 512,
    features: bool = False,
) -> Predictions:
    """Return the outputs of `model` on `rows` in row order, in eval mode, without augmentation.

    Processes share the rows; every process gets the full result. The modes of `model` are restored.

    Raises:
        DataError: no rows.
    """
    if not len(rows):
        raise DataError("predict: expected rows, got an empty split")
    where = device.device if device else next((p.device for p in model.parameters()), None)
    rank, world = (device.process_index, device.num_processes) if device else (0, 1)
    loader = Loader(rows, batch_size, rank=rank, world=world, device=where)
    position = torch.arange(len(rows))
    parts: list[list[Tensor]] = []
    autocast = device.autocast if device else contextlib.nullcontext
    with quiet(model), torch.no_grad():
        for start, batch in zip(range(0, len(rows), batch_size), loader, strict=True):
            mine = position[start : start + batch_size][rank::world]
            mine = mine if len(mine) else position[start : start + 1]
            with autocast():
                outputs = [model(**batch.inputs)]
                if features:
                    outputs.append(model.features(**batch.inputs))  # type: ignore[operator]
            parts.append([mine.to(where), *(out.float() for out in outputs)])
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    if device is not None and world > 1:
        columns = _gathered(columns, device, len(rows))
    found = [column.cpu() for column in columns[1:]]
    return Predictions(found[0], rows.labels, rows.index, found[1] if features else None)


def _gathered(columns: list[Tensor], device: Accelerator, count: int) -> list[Tensor]:
    """Gather the columns of all processes, drop padding and duplicates, sort by position."""
    padded = [
        device.pad_across_processes(column, dim=0, pad_index=-1 if at == 0 else 0)
        for at, column in enumerate(columns)
    ]
    whole = [device.gather_for_metrics(column) for column in padded]
    first = torch.full((count,), -1, dtype=torch.int64, device=whole[0].device)
    real = torch.nonzero(whole[0] >= 0)[:, 0]
    first[whole[0][real]] = real
    return [column[first] for column in whole]


def reduce_sum(tensor: Tensor, device: Accelerator | None) -> Tensor:
    """Return the sum of `tensor` over all processes."""
    if device is None or device.num_processes == 1:
        return tensor
    summed: Tensor = device.reduce(tensor.to(device.device), reduction="sum")
    return summed


def broadcast(value: Any, device: Accelerator | None, source: int = 0) -> Any:
    """Return the `value` of process `source` on every process, to the bit."""
    if device is None or device.num_processes == 1:
        return value
    return broadcast_object_list([value], from_process=source)[0]


def world(device: Accelerator | None) -> int:
    """Return the number of processes."""
    return 1 if device is None else int(device.num_processes)


def rank(device: Accelerator | None) -> int:
    """Return the number of this process, from 0."""
    return 0 if device is None else int(device.process_index)


def barrier(device: Accelerator | None) -> None:
    """Wait until every process is here."""
    if device is not None and device.num_processes > 1:
        device.wait_for_everyone()


def everywhere(flag: bool, device: Accelerator | None) -> bool:
    """Return whether `flag` holds on every process."""
    votes = reduce_sum(torch.tensor(float(flag)), device)
    return int(votes) == world(device)
