"""A user's own datasets and model -> rows, classifier and task.

A split may be a torch dataset, a loader, two tensors, or any iterable of batches. What to forget
and what to keep become views of one storage, so that every method finds what it finds in data
loaded by name.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unsc_plugin._own_sources import Collate as Collate  # part of this module's public face
from unsc_plugin._own_sources import (
    Reader,
    Statistics,
    check_disjoint,
    source,
    views,
)
from unsc_plugin.errors import DataError, ForgetSetError, NotApplicable
from unsc_plugin.method import UnlearningTask, Weights
from unsc_plugin.models import INPUT_KEYS, Classifier, wrap
from unsc_plugin.rows import Rows
from unsc_plugin.runtime import sealed
from unsc_plugin.spec import DEFAULT_RECIPE, Modality, Recipe, Scenario, fingerprint

TEST_OFFSET = 10**9
"""Validation rows count -1, -2, ..., test rows -1-10⁹, ..., as in data loaded by name."""


@dataclass(frozen=True)
class OwnData:
    """A user's splits as rows, under the names they were given.

    All splits but those called val... and test... are views of one storage; `input_key` is the
    input that carries the data (`pixel_values`, `input_ids`, `features`).
    """

    parts: Mapping[str, Rows]
    modality: Modality
    input_key: str

    def get(self, name: str) -> Rows | None:
        """Return the rows of a split, None if it was not given."""
        return self.parts.get(name)


def rows_of(
    splits: Mapping[str, Any],
    *,
    modality: Modality | None = None,
    label_key: str | None = None,
    collate: Collate | None = None,
    index: Mapping[str, Tensor] | None = None,
    in_memory: bool | None = None,
    restore: Statistics | None = None,
) -> OwnData:
    """Return the user's splits as rows.

    Args:
        splits: name -> a map-style dataset with items (inputs, label) or with named items; a
            `DataLoader` (its dataset and collate function; order and dropped batches are ours); a
            pair (inputs, labels) of tensors or arrays; any iterable of batches, read once; or rows.
            Splits called val... and test... stand alone, all others share one storage.
        modality: image, text or tabular; read off the inputs where it is not given.
        label_key: the key of the labels in named items; default labels, label, targets, target.
        collate: makes a batch of a list of items; default the loader's, else torch's.
        index: name -> positions int64 (n,) in the original training set; default 0, 1, 2, ... in
            the order of `splits`.
        in_memory: read datasets once (their random transforms are then drawn once), or decode at
            every access; default: once if they fit in 1 GiB.
        restore: (mean, std) that pixels were normalised with; they are mapped back to [0, 1].

    Raises:
        DataError: an empty split, items that cannot be read, labels that are no class numbers.
        ForgetSetError: subsets of one dataset that share rows.

    >>> pair = (torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))
    >>> rows_of({"forget": pair, "retain": pair}).parts["retain"].index.tolist()
    [4, 5, 6, 7]
    """
    if splits and all(isinstance(part, Rows) for part in splits.values()):
        key = next(key for key in INPUT_KEYS.values() if _has(next(iter(splits.values())), key))
        return OwnData(dict(splits), _modality_named(key), key)
    check_disjoint(splits)
    sources = {}
    for name, part in splits.items():
        reader = Reader(name, label_key, modality, restore)
        sources[name] = source(name, part, reader, collate, in_memory)
        if not len(sources[name]):
            raise DataError(f"{name}: expected rows, got none; leave the split out")
    together = [name for name in sources if not name.startswith(("val", "test"))]
    parts = dict(views({name: sources[name] for name in together}, index or {}))
    for name in sources.keys() - set(together):
        start = TEST_OFFSET if name.startswith("test") else 0
        count = -1 - start - torch.arange(len(sources[name]))
        ((_, parts[name]),) = views({name: sources[name]}, {name: count, **(index or {})})
    first = next(iter(sources.values())).columns([0])
    keys = [key for key in INPUT_KEYS.values() if key in first]
    if not keys:
        raise DataError(
            f"expected an input called {' or '.join(INPUT_KEYS.values())}, got "
            f"{sorted(first.keys() - {'labels'})}; rename it in the items"
        )
    found = {name: parts[name] for name in splits}
    return OwnData(found, modality or _modality_named(keys[0]), keys[0])


def _has(rows: Rows, key: str) -> bool:
    return key in rows.gather([0]).inputs


def _modality_named(key: str) -> Modality:
    return next(modality for modality, named in INPUT_KEYS.items() if named == key)


# --------------------------------------------------------------------------- model and task


def classifier_of(
    model: nn.Module,
    data: OwnData,
    *,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pixel_domain: bool = False,
    head: str | nn.Module | None = None,
    output: int | None = None,
) -> Classifier:
    """Return a classifier around the user's own module (not a copy), tried on two rows.

    `num_classes` defaults to the width of the logits. With `mean` and `std` the module expects
    pixels normalised by them; the rows then hold pixels in [0, 1]. See :func:`models.wrap`.

    Raises:
        NotApplicable: no logits (B, K) come out.
        DataError: labels outside 0..K-1.
    """
    rows = next(iter(data.parts.values()))
    place = next(iter(model.parameters()), torch.zeros(0)).device
    example = rows.gather(list(range(min(2, len(rows))))).to(place).inputs
    if isinstance(model, Classifier):
        found = model
    else:
        found = wrap(
            model,
            num_classes=num_classes,
            modality=data.modality,
            head=head,
            pixel_domain=pixel_domain,
            mean=mean,
            std=std,
            input_key=data.input_key,
            output=output,
            example=example,
        )
    for name, part in data.parts.items():
        if int(part.labels.max()) >= found.num_classes:
            raise DataError(
                f"{name}: expected labels 0..{found.num_classes - 1} for a model with "
                f"{found.num_classes} outputs, got {int(part.labels.max())}"
            )
    return found


def scenario_of(forget: Rows | None, retain: Rows | None) -> Scenario:
    """Return `class` if no retained row has a forgotten label, else `random`.

    Without rows to forget the request is a `correction`.
    """
    if forget is None:
        return Scenario.CORRECTION
    if retain is None:
        return Scenario.RANDOM
    return (
        Scenario.RANDOM
        if bool(torch.isin(forget.labels, retain.labels).any())
        else (Scenario.CLASS)
    )


def fresh_from(model: nn.Module) -> Callable[[int], nn.Module]:
    """Return seed -> a copy of `model`, every layer initialised anew by its `reset_parameters`.

    Hugging Face models are made from their configuration. Scales that a constructor sets after
    its layers (zero-initialised blocks) are those of the layers; give `fresh_model` where that
    matters.

    Raises:
        NotApplicable: when called, where a layer has parameters that it cannot initialise.
    """

    def fresh(seed: int) -> nn.Module:
        with sealed(seed):
            found = copy.deepcopy(model)
            body = found.backbone if isinstance(found, Classifier) else found
            if hasattr(body, "save_pretrained") and hasattr(body, "config"):
                made: Callable[[Any], nn.Module] = type(body)
                body.load_state_dict(made(body.config).state_dict())
            else:
                _reset(body)
            return found

    return fresh


def _reset(module: nn.Module) -> None:
    for path, layer in module.named_modules():
        reset = getattr(layer, "reset_parameters", getattr(layer, "_reset_parameters", None))
        if callable(reset):
            reset()
        elif next(iter(layer.parameters(recurse=False)), None) is not None:
            raise NotApplicable(
                f"expected layers that can be initialised anew, got {path or 'the model'} "
                f"({type(layer).__name__}) with parameters and no reset_parameters; give "
                "fresh_model=(seed -> model)"
            )


def task_of(
    data: OwnData,
    *,
    num_classes: int,
    fresh_model: Callable[[int], nn.Module],
    recipe: Recipe | None = None,
    scenario: Scenario | str | None = None,
    weights: Weights | None = None,
    **more: Any,
) -> UnlearningTask:
    """Return the task of the parts forget, retain and val; `more` is what a task takes.

    With `weights` ε (N,) over the rows of forget and retain together these are its streams.

    Raises:
        ForgetSetError: rows in two sets, or weights for fewer rows.
    """
    forget, retain, val = (data.get(name) for name in ("forget", "retain", "val"))
    common = {
        "val": val,
        "num_classes": num_classes,
        "recipe": recipe or DEFAULT_RECIPE,
        "fresh_model": fresh_model,
        "modality": data.modality,
        "data_fingerprint": fingerprint(_marks(data.parts)),
        **more,
    }
    if weights is not None:
        given = [part for part in (forget, retain) if part is not None]
        if not given:
            raise ForgetSetError("expected retain rows that the weights are about, got none")
        train = given[0] if len(given) == 1 else given[0].merged(given[1])
        kind = Scenario(scenario or Scenario.WEIGHTED)
        return UnlearningTask.from_weights(train, weights, scenario=kind, **common)
    kind = Scenario(scenario) if scenario else scenario_of(forget, retain)
    return UnlearningTask(forget=forget, retain=retain, scenario=kind, **common)


def _marks(parts: Mapping[str, Rows]) -> list[Any]:
    """Return what tells these rows from others: positions, labels, and the inputs in memory."""
    digests: dict[int, str] = {}  # of the storage that several parts share, once
    for rows in parts.values():
        if id(rows.storage) not in digests:
            digest = hashlib.sha256()
            for column in rows.storage.values():
                digest.update(column.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            digests[id(rows.storage)] = digest.hexdigest()
    return [
        [name, rows.index.tolist(), rows.labels.tolist(), digests[id(rows.storage)]]
        for name, rows in parts.items()
    ]
