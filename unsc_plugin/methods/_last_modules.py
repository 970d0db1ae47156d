"""The last modules of a backbone in execution order: shared by `cf_k` and `eu_k`."""

from __future__ import annotations

import math

import torch
from torch import nn

from unsc_plugin import engine
from unsc_plugin.errors import ConfigError
from unsc_plugin.method import Scenario, Split, TrainingConfig, UnlearningTask, option

SCENARIOS = frozenset(
    {Scenario.CLASS, Scenario.SUBCLASS, Scenario.RANDOM, Scenario.WEIGHTED, Scenario.SEQUENTIAL}
)
NEEDS = frozenset({Split.RETAIN})
WORK_PER_EPOCH = 1.0

K = option(
    0.25,
    "number (int) or share (float) of the modules, from the end, that are trained",
    above=0,
    probe=1,
)
LR_SCALE = option(
    0.1, "learning rate as a share of the recipe's", above=0, search=(0.01, 1.0, "log")
)


def in_execution_order(model: nn.Module, task: UnlearningTask) -> list[str]:
    """Return the names of all modules that own parameters, in the order their forward passes end.

    One traced forward pass over one retained row in eval mode; a module that is used several times
    counts at its last use, one that is never used comes first.
    """
    owners = {m: n for n, m in model.named_modules() if any(True for _ in m.parameters(False))}
    order: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for module, name in owners.items()
    ]
    try:
        batch = next(iter(task.loader("retain", train=False, batch_size=1)))
        with engine.quiet(model), torch.no_grad():
            model(**batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    last_use = {name: at for at, name in enumerate(order)}
    return sorted(owners.values(), key=lambda name: last_use.get(name, -1))


def selected(model: nn.Module, task: UnlearningTask, k: int | float) -> list[str]:
    """Return the last `k` (int) or ⌈k·count⌉ (float) names of :func:`in_execution_order`.

    Raises:
        ConfigError: a float above 1, or more modules than there are.
    """
    names = in_execution_order(model, task)
    count = k if isinstance(k, int) else math.ceil(k * len(names))
    if not 1 <= count <= len(names):
        raise ConfigError(f"k: expected 1..{len(names)} modules or a share in (0, 1], got {k!r}")
    return names[-count:]


def freeze_all_but(model: nn.Module, names: list[str], task: UnlearningTask) -> list[nn.Parameter]:
    """Freeze everything outside `names` (no gradient, eval mode); return what is trained.

    A parameter that a frozen module shares stays frozen.
    """
    chosen = {model.get_submodule(name) for name in names}
    owners = [m for m in model.modules() if any(True for _ in m.parameters(False))]
    kept = {p for m in owners if m not in chosen for p in m.parameters(False)}
    if kept:
        for module in model.modules():
            module.training = module in chosen
    trained = [p for p in model.parameters() if p.requires_grad and p not in kept]
    for parameter in kept:
        parameter.requires_grad_(False)
    task.promise_frozen(_state_outside(model, chosen, kept))
    return trained


def _state_outside(model: nn.Module, chosen: set[nn.Module], kept: set[nn.Parameter]) -> list[str]:
    parameters = [n for n, p in model.named_parameters(remove_duplicate=False) if p in kept]
    buffers = [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if module not in chosen
        for key, _ in module.named_buffers(recurse=False)
    ]
    state = model.state_dict()
    return [name for name in (*parameters, *buffers) if name in state]


def train_on_retain(model: nn.Module, task: UnlearningTask, config: TrainingConfig) -> None:
    """Take steps on CE_r over what is left trainable."""
    retain = task.loader("retain", batch_size=config.batch_size)
    engine.fit_config(
        model,
        task,
        [engine.Stage(retain, engine.cross_entropy)],
        config,
        epochs=config.passes_for(task.recipe, WORK_PER_EPOCH),
    )
