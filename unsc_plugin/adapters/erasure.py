"""ERASURE (aiim-research): our methods as its unlearners, any backbone as its model, its results.

ERASURE finds classes by their dotted path, so that nothing of it is edited::

    {"class": "unsc_plugin.adapters.erasure.PluginUnlearner",
     "parameters": {"method": "unsc", "args": {}}}
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unsc_plugin import own_data, registry
from unsc_plugin.adapters import _foreign as foreign
from unsc_plugin.adapters import _in_place as in_place
from unsc_plugin.errors import ConfigError, DataError, MissingOptional, nearest
from unsc_plugin.models import load_model
from unsc_plugin.spec import DEFAULT_RECIPE, Recipe

if TYPE_CHECKING:
    PluginUnlearner: type

__all__ = ["PluginUnlearner", "TupleModel", "read_results"]

HOME = "ERASURE_HOME"
LOGITS = 1
"""ERASURE's models return (features, logits)."""

PARAMETERS: dict[str, Any] = {
    "method": None,
    "args": {},
    "forget": "forget",
    "retain": "retain",
    "val": None,
    "batch_size": None,
    "seed": None,
}
ALLOWED = {*PARAMETERS, "cached", "alias"}
OPTIMIZERS = {"SGD": "sgd", "Adam": "adam", "AdamW": "adamw"}


def __getattr__(name: str) -> Any:
    if name == "PluginUnlearner":
        return _plugin_unlearner()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _plugin_unlearner() -> type:
    """Return the class; ERASURE is imported here.

    Raises:
        MissingOptional: it cannot be imported, nor is it in `$ERASURE_HOME`.
    """
    base: Any = _erasure("erasure.core.unlearner").Unlearner

    class PluginUnlearner(base):  # type: ignore[misc]
        """A registered method as an unlearner of ERASURE.

        Parameters: `method` (required; `name` or `name.preset`), `args` {} (its settings),
        `forget` "forget", `retain` "retain", `val` null (names of partitions), `batch_size` null
        (the data manager's), `seed` null (that of `globals`); `cached` and `alias` are ERASURE's.
        """

        def check_configuration(self) -> None:
            """Fill the parameters up.

            Raises:
                ConfigError: an unknown parameter, or no method.
            """
            super().check_configuration()
            _check(self.params)
            for key, value in PARAMETERS.items():
                self.params.setdefault(key, value)

        def init(self) -> None:
            """Make the method, so that wrong settings show before anything is trained."""
            super().init()
            self.method = registry.create(self.params["method"], **self.params["args"])

        def __unlearn__(self) -> Any:
            """Return the predictor with unlearned weights."""
            self.result = _unlearned(self)
            in_place.hand_back(self.result, self.predictor.model)
            return self.predictor

    PluginUnlearner.__module__ = __name__
    PluginUnlearner.__qualname__ = "PluginUnlearner"
    return PluginUnlearner


def _erasure(module: str) -> Any:
    """Import a module of ERASURE, from `$ERASURE_HOME` where it is not importable.

    Raises:
        MissingOptional: it is nowhere, or lacks a package of its own.
    """
    home = os.environ.get(HOME)
    try:
        if not foreign.importable("erasure") and home:
            foreign.from_folder("erasure", Path(home) / "erasure")
        with foreign.no_bytecode():
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingOptional(
            f"expected ERASURE to be importable, got: {error}; run its main.py from the checkout, "
            f"or set {HOME} to the checkout and install its requirements"
        ) from error


def _check(parameters: dict[str, Any]) -> None:
    unknown = sorted(set(parameters) - ALLOWED)
    if unknown:
        close = nearest(unknown[0], ALLOWED)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(ALLOWED))}"
        raise ConfigError(f"PluginUnlearner: unknown parameter {unknown[0]!r}; {hint}")
    if not parameters.get("method"):
        raise ConfigError("PluginUnlearner: expected the parameter method, got none; name one")


def _unlearned(host: Any) -> Any:
    """Run the method of an unlearner on its partitions.

    A partition's positions count in ERASURE's merged data (train and test together). Its own loader
    would drop the last partial batch; rows are read without it.

    Raises:
        ConfigError: no such partition.
    """
    given, manager = host.params, host.dataset
    names = {key: given[key] for key in ("forget", "retain", "val") if given[key]}
    unknown = sorted(set(names.values()) - set(manager.partitions))
    if unknown:
        raise ConfigError(
            f"PluginUnlearner: expected names of partitions, got {unknown[0]!r}; there are "
            f"{', '.join(manager.partitions)}"
        )
    loaders = {
        key: manager.get_loader_for(name, None, drop_last=False)[0] for key, name in names.items()
    }
    index: dict[str, Tensor] = {
        key: torch.as_tensor(list(manager.partitions[names[key]]))
        for key in ("forget", "retain")
        if key in names
    }
    seed = given["seed"]
    return in_place.unlearned(
        host.method,
        host.predictor.model,
        own_data.rows_of(loaders, index=index),
        host.global_ctx.config.globals["seed"] if seed is None else seed,
        recipe=_recipe(host.predictor, given["batch_size"] or manager.batch_size),
        num_classes=manager.n_classes,
        output=LOGITS,
    )


def _recipe(predictor: Any, batch_size: int) -> Recipe:
    """Return how the predictor was trained, as far as it says."""
    found: dict[str, Any] = {"batch_size": batch_size, "schedule": "constant"}
    optimizer = getattr(predictor, "optimizer", None)
    kind = OPTIMIZERS.get(type(optimizer).__name__)
    if optimizer is not None and kind is not None:
        group = optimizer.param_groups[0]
        found |= {
            "optimizer": kind,
            "lr": float(group.get("initial_lr", group["lr"])),
            "weight_decay": float(group.get("weight_decay", 0.0)),
            "momentum": float(group.get("momentum", 0.0)),
        }
    if isinstance(getattr(predictor, "epochs", None), int):
        found["epochs"] = predictor.epochs
    return DEFAULT_RECIPE.model_copy(update=found)


# --------------------------------------------------------------------------- its models


class TupleModel(nn.Module):
    """Any backbone by name as a model of ERASURE: inputs by position, (features, logits) out.

    `name` is `timm:...`, `hf:...` or a shortcut; pixels come in [0, 1] and are normalised inside.
    ERASURE itself passes `n_classes`, which `num_classes` wins over. Further keywords are those of
    :func:`unsc_plugin.load_model` (`input_shape`, `pretrained`, ...).

    Raises:
        UnscError: no such backbone, or no number of classes.

    >>> model = TupleModel("timm:test_vit", num_classes=3, input_shape=(1, 8, 8))
    >>> features, logits = model(torch.zeros(2, 1, 8, 8))
    >>> features.shape[0], logits.shape
    (2, torch.Size([2, 3]))
    """

    def __init__(
        self,
        name: str,
        num_classes: int | None = None,
        *,
        n_classes: int | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        classes = n_classes if num_classes is None else num_classes
        entries = registry.load().entries("backbones")
        self.classifier = load_model(name, num_classes=classes, entries=entries, **more)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what enters the head, (B, D), and the logits, (B, K), of one pass."""
        head = self.classifier.head
        seen: list[Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda _, given: seen.append(_pooled(given[0])))
            for layer in (head if isinstance(head, nn.ModuleList) else [head])
        ]
        try:
            logits = self.classifier(**{self.classifier.input_key: inputs})
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(seen, dim=1), logits


def _pooled(features: Tensor) -> Tensor:
    """Return one vector per row: maps are averaged over places, sequences over tokens."""
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.ndim == 3 else features


# --------------------------------------------------------------------------- its results


def read_results(path: str | Path, expected: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Return the runs in a JSON file of ERASURE's `SaveValues`, which is no JSON as a whole.

    A measure that raised an error is merely absent there. Every run therefore gets the key
    `missing`: the names that `expected` or another run of the file has, and it has not.

    Raises:
        DataError: the file cannot be read, or is none of those.
    """
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
        runs = json.loads(f"[{text.removesuffix(',')}]")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected objects joined by commas, as ERASURE's SaveValues writes them, got: "
            f"{error}"
        ) from None
    if not all(isinstance(run, dict) for run in runs):
        raise DataError(f"{path}: expected objects, one per run, got other values")
    known = set(expected).union(*runs)
    return [{**run, "missing": sorted(known - set(run))} for run in runs]
