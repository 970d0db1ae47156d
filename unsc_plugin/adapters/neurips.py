"""The NeurIPS 2023 unlearning challenge: `unlearning(net, retain, forget, validation) -> net`.

Any of our methods as such a function, for the starting kit's notebook and its relatives, and any
such function as a method of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import default_collate as stacked

from unsc_plugin import own_data, registry
from unsc_plugin.adapters import _in_place as in_place
from unsc_plugin.adapters._pairs import Pairs, Positional
from unsc_plugin.errors import ArchitectureChanged, ConfigError, DataError
from unsc_plugin.method import Result, Split, UnlearningMethod, from_function
from unsc_plugin.spec import Recipe, Scenario

__all__ = ["Unlearning", "as_deepmind", "as_neurips", "from_neurips"]

NOTE = "val_may_be_test"
"""Note in `Result.stats`: the kit's notebook passes its test loader as `validation`."""


class Unlearning:
    """One of our methods as `unlearning(net, retain, forget, validation) -> net`.

    `net` is changed in place: it keeps its device and is returned in evaluation mode. `validation`
    is only read by methods that use it. After a call :attr:`result` holds what it cost.
    """

    def __init__(
        self,
        method: UnlearningMethod,
        *,
        seed: int = 0,
        num_classes: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        scenario: str = "random",
        recipe: Recipe | None = None,
    ) -> None:
        if (mean is None) != (std is None):
            raise ConfigError("expected both mean and std, or neither; give the missing one")
        self.method, self.seed, self.num_classes = method, seed, num_classes
        self.mean, self.std, self.recipe = mean, std, recipe
        self.scenario = Scenario(scenario)
        self.result: Result | None = None

    def __call__(
        self, net: nn.Module, retain: Any, forget: Any, validation: Any = None
    ) -> nn.Module:
        """Unlearn `forget` from `net`, in place, and return it in evaluation mode.

        Raises:
            DataError: loaders that are empty, without labels, or of inputs of different shapes.
            DivergedError: the run diverged; `net` is as it was.
        """
        data = self.read(retain, forget, validation)
        result = in_place.unlearned(
            self.method,
            net,
            data,
            self.seed,
            recipe=in_place.recipe_for(retain, self.recipe),
            scenario=self.scenario,
            num_classes=self.num_classes,
            mean=self.mean,
            std=self.std,
        )
        notes = {NOTE: True} if Split.VAL in result.read else {}
        self.result = in_place.noted(result, **notes)
        in_place.hand_back(result, net)
        return net

    def read(self, retain: Any, forget: Any, validation: Any) -> own_data.OwnData:
        """Return the loaders' rows; `validation` only where the method reads it."""
        splits = {"forget": forget, "retain": retain}
        if Split.VAL in self.method.opens and validation is not None:
            splits["val"] = validation
        restore = None if self.mean is None or self.std is None else (self.mean, self.std)
        return own_data.rows_of(splits, restore=restore)


def as_neurips(
    method: str | UnlearningMethod,
    *,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scenario: str = "random",
    recipe: Recipe | None = None,
) -> Unlearning:
    """Return a method as `unlearning(net, retain, forget, validation) -> net`.

    The order of the arguments also fits deepunlearn's `unlearn(model, retain_loader,
    forget_loader, val_loader)`. Rows are counted from 0 in the order of `forget`, then `retain`;
    their order and their batches are ours, with the batch size of the retain loader.

    Args:
        method: a registered name (`name.preset`), or a method.
        config: settings of the method that is named.
        seed: of everything that is drawn.
        num_classes: K; default: the width of the logits.
        mean: per channel, what the loaders normalised with; pixels are mapped back to [0, 1] and
            normalised next to the model, so that attacks work on pixels.
        std: see `mean`.
        scenario: the kind of request: random, class, subclass.
        recipe: how the model was trained; default: a general one.

    Raises:
        ConfigError: settings beside a method that is made; another scenario.
        UnscError: an unknown method or setting.

    >>> import torch
    >>> rows = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.arange(12) % 2)
    >>> loader = torch.utils.data.DataLoader(rows, batch_size=4)
    >>> net = nn.Linear(4, 2)
    >>> as_neurips("neggrad")(net, loader, loader, None) is net
    True
    """
    if not isinstance(method, str) and config:
        raise ConfigError("config: expected the settings inside the method; or give its name")
    if scenario not in set(Scenario):
        raise ConfigError(f"scenario: expected one of {', '.join(Scenario)}, got {scenario!r}")
    made = registry.create(method, **(config or {})) if isinstance(method, str) else method
    return Unlearning(
        made,
        seed=seed,
        num_classes=num_classes,
        mean=mean,
        std=std,
        scenario=scenario,
        recipe=recipe,
    )


def as_deepmind(
    method: str | UnlearningMethod,
    input_key: str = "image",
    target_key: str = "age_group",
    **same: Any,
) -> Callable[..., nn.Module]:
    """Return a method as `do_unlearning` of google-deepmind/unlearning_evaluation.

    `do_unlearning(retain_loader, forget_loader, val_loader, class_weights, original_model,
    print_accuracy=False)` takes loaders of named batches and returns an unlearned copy; the
    original stays as it is. `class_weights` belong to their loss and are not used. `same` are the
    keywords of :func:`as_neurips`.

    Raises:
        UnscError: an unknown method, setting or scenario.
    """
    unlearning = as_neurips(method, **same)

    def do_unlearning(
        retain_loader: Any,
        forget_loader: Any,
        val_loader: Any,
        class_weights: Any,
        original_model: nn.Module,
        print_accuracy: bool = False,
    ) -> nn.Module:
        loaders = [
            None if loader is None else _picked(loader, input_key, target_key)
            for loader in (retain_loader, forget_loader, val_loader)
        ]
        net = unlearning(copy.deepcopy(original_model), *loaders)
        if print_accuracy and unlearning.result is not None:
            data = unlearning.read(*loaders)
            for name, share in in_place.accuracies(unlearning.result.model, data).items():
                print(f"{name} accuracy: {100 * share:.2f} %")
        return net

    do_unlearning.unlearning = unlearning  # type: ignore[attr-defined]
    return do_unlearning


def _picked(loader: Any, input_key: str, target_key: str) -> Any:
    """Return the loader with (inputs, labels) in place of its named batches."""

    def pick(batch: Any) -> tuple[Any, Any]:
        missing = {input_key, target_key} - set(batch)
        if missing:
            raise DataError(
                f"expected batches with {input_key!r} and {target_key!r}, got {sorted(batch)}; say "
                "input_key=... and target_key=..."
            )
        return batch[input_key], batch[target_key]

    whole = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if not whole:
        return [pick(batch) for batch in loader]
    own = loader.collate_fn if loader.batch_size is not None else stacked
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        collate_fn=lambda items: pick(own(items)),
    )


# --------------------------------------------------------------------------- the other way round


def from_neurips(
    function: Callable[..., nn.Module],
    name: str,
    *,
    scenarios: Iterable[str] = ("class", "subclass", "random", "sequential"),
) -> type[UnlearningMethod]:
    """Register `function(net, retain, forget, validation) -> net` as a method, and return it.

    Its loaders yield (inputs, labels); `net` takes the inputs by position and normalises pixels
    itself, so that they come in [0, 1]. Devices that the function names are its own business.

    Raises:
        UnscError: a name that is not allowed, or an unknown scenario.
    """

    def adapted(model: nn.Module, retain: Any, forget: Any, val: Any) -> nn.Module:
        loaders = {key: Pairs(part) for key, part in (("r", retain), ("f", forget), ("v", val))}
        net = Positional(model, loaders["r"].key)
        names = list(net.state_dict())
        found = function(net, loaders["r"], loaders["f"], loaders["v"])
        if not isinstance(found, Positional) or list(found.state_dict()) != names:
            raise ArchitectureChanged(
                f"{name}: expected the net or a copy of it back, with the same layers, got "
                f"{type(found).__name__}; change weights, not modules"
            )
        return found.model

    adapted.__doc__, adapted.__module__ = function.__doc__ or name, function.__module__
    known = frozenset(Scenario(one) for one in scenarios)
    kind = from_function(adapted, name, scenarios=known)
    kind.__name__ = kind.__qualname__ = function.__name__.strip("<>")
    kind.function = staticmethod(function)  # type: ignore[attr-defined]
    registry.register_method(name)(kind)
    return kind
