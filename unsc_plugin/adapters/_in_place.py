"""Unlearning from inside another suite: its model is changed in place, its loaders are ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from unsc_plugin import engine, own_data
from unsc_plugin.errors import DivergedError
from unsc_plugin.method import Result, UnlearningMethod
from unsc_plugin.models import Classifier
from unsc_plugin.own_data import OwnData
from unsc_plugin.spec import DEFAULT_RECIPE, Recipe


def recipe_for(loader: Any, recipe: Recipe | None = None) -> Recipe:
    """Return the recipe, by default the general one with the batch size of the host's loader."""
    size = getattr(loader, "batch_size", None)
    if recipe is not None or not isinstance(size, int):
        return recipe or DEFAULT_RECIPE
    return DEFAULT_RECIPE.model_copy(update={"batch_size": size})


def unlearned(
    method: UnlearningMethod,
    net: nn.Module,
    data: OwnData,
    seed: int,
    *,
    recipe: Recipe,
    scenario: str | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    output: int | None = None,
) -> Result:
    """Return the result of the method on the host's model, which stays as it is."""
    classifier = own_data.classifier_of(
        net, data, num_classes=num_classes, mean=mean, std=std, output=output
    )
    task = own_data.task_of(
        data,
        num_classes=classifier.num_classes,
        fresh_model=own_data.fresh_from(classifier),
        recipe=recipe,
        scenario=scenario,
        accelerator=engine.accelerator(_device_of(net)),
    )
    return method.unlearn(classifier, task, seed)


def hand_back(result: Result, net: nn.Module) -> None:
    """Give `net` the unlearned weights; it keeps its device and is left in evaluation mode.

    Raises:
        DivergedError: the run diverged; `net` is as it was.
    """
    if result.status == "diverged":
        raise DivergedError(f"the run diverged, the model is as it was: {result.reason}")
    found: Any = result.model
    body = found if isinstance(net, Classifier) else found.backbone
    net.load_state_dict(body.state_dict(), strict=True)
    net.eval()


def noted(result: Result, **notes: Any) -> Result:
    """Return the result with more in its `stats`."""
    return dataclasses.replace(result, stats={**result.stats, **notes})


def accuracies(model: nn.Module, data: OwnData) -> dict[str, float]:
    """Return the share of right predictions on every split."""
    found = {}
    for name, rows in data.parts.items():
        seen = engine.predict(model, rows)
        found[name] = float((seen.logits.argmax(dim=1) == seen.labels).double().mean())
    return found


def _device_of(net: nn.Module) -> Any:
    """Return the kind of device that the model is on."""
    return next(iter(net.parameters()), torch.zeros(0)).device.type
