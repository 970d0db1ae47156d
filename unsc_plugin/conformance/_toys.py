"""Toy data and requests for the checks: drawn from fixed seeds, nothing read, nothing downloaded.

Four problems, one per kind of backbone: `conv` (BatchNorm, images), `mlp` (no normalisation, rows
of a table), `vit` (one timm block) and `bert` (one Hugging Face layer, built from a configuration).
Each comes with groups too, two labels that lean on two groups, for methods that correct models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unsc_plugin import engine
from unsc_plugin.conformance._nets import ConvNet, Mlp
from unsc_plugin.method import UnlearningTask, Weights
from unsc_plugin.rows import Rows
from unsc_plugin.spec import BackboneEntry, DataInfo, Recipe, Scenario

Net = Literal["conv", "mlp", "vit", "bert"]
NETS: tuple[Net, ...] = ("conv", "mlp", "vit", "bert")
TRAIN, HELD_OUT, BATCH = 96, 30, 16
GROUPED_VAL = 240
"""Validation rows of a problem with groups: enough of every cell for two parts of them."""
SHORT = Recipe(epochs=2, lr=0.05, momentum=0.9, weight_decay=5e-4, batch_size=BATCH)
FULL = SHORT.model_copy(update={"epochs": 14})
VOCABULARY, TOKENS, COLUMNS = 24, 8, 6

Build = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Problem:
    """A toy data set and the backbone for it; `build(seed)` gives it untrained."""

    net: Net
    modality: str
    num_classes: int
    train: Rows
    val: Rows
    test: Rows
    build: Build


@dataclass(frozen=True)
class Case:
    """A trained model and a request to unlearn."""

    model: nn.Module
    task: UnlearningTask
    problem: Problem


# --------------------------------------------------------------------------- problems


@lru_cache(maxsize=16)
def problem(net: Net, num_classes: int = 3, grouped: bool = False) -> Problem:
    """Return the problem of a kind of backbone.

    `grouped`: two of three rows have the label of their group, and every fifth row another one than
    its inputs say, so that there is something to lose by confidence.
    """
    modality = {"mlp": "tabular", "bert": "text"}.get(net, "image")
    counts = (TRAIN, GROUPED_VAL if grouped else HELD_OUT, HELD_OUT)
    labels = torch.arange(sum(counts)) % num_classes
    group = None
    if grouped:
        odd = torch.arange(sum(counts)) // num_classes % 3 == 0
        group = torch.where(odd, 1 - labels, labels)
    kinds = labels
    if group is not None:
        kinds = 2 * labels + group
        labels = torch.where(torch.arange(len(labels)) % 5 == 0, 1 - labels, labels)
    inputs = _INPUTS[modality](kinds, torch.Generator().manual_seed(num_classes))
    ends = [TRAIN, TRAIN + counts[1], sum(counts)]
    parts = []
    for start, stop in zip([0, *ends], ends, strict=False):
        index = torch.arange(stop - start) if not start else -1 - torch.arange(stop - start)
        columns = {key: value[start:stop] for key, value in inputs.items()}
        side = None if group is None else group[start:stop]
        parts.append(Rows.of(columns, labels[start:stop], index, group=side))
    train, val, test = parts
    build = partial(_build, net, num_classes)
    return Problem(net, modality, num_classes, train, val, test, build)


def _images(labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    patterns = torch.randn(int(labels.max()) + 1, 3, 8, 8, generator=generator)
    noise = torch.randn(len(labels), 3, 8, 8, generator=generator)
    pixels = torch.sigmoid(0.35 * patterns[labels] + noise)
    return {"pixel_values": (pixels * 255).to(torch.uint8)}


def _tables(labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    centres = 0.8 * torch.randn(int(labels.max()) + 1, COLUMNS, generator=generator)
    return {"features": centres[labels] + torch.randn(len(labels), COLUMNS, generator=generator)}


def _texts(labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (len(labels), TOKENS)
    common = torch.randint(8, VOCABULARY, shape, generator=generator)
    typical = (1 + labels)[:, None].expand(shape)
    tokens = torch.where(torch.rand(shape, generator=generator) < 0.35, typical, common)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[::5, -2:] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


_INPUTS: Mapping[str, Callable[[Tensor, torch.Generator], dict[str, Tensor]]] = {
    "image": _images,
    "tabular": _tables,
    "text": _texts,
}


def _build(net: Net, num_classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if net == "conv":
            return ConvNet(3, num_classes)
        if net == "mlp":
            return Mlp(COLUMNS, num_classes)
    return _library_model(net, num_classes, seed)


def _library_model(net: Net, num_classes: int, seed: int) -> nn.Module:
    from unsc_plugin import models  # timm and transformers are slow to import

    if net == "vit":
        args: dict[str, Any] = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4}
        entry = BackboneEntry(source="timm", id="vit_tiny_patch16_224", args=args)
        shape: tuple[int, ...] = (3, 8, 8)
    else:
        args = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
        args |= {"intermediate_size": 16}
        entry = BackboneEntry(source="hf-config", id="bert", args=args)
        shape = (TOKENS,)
    info = DataInfo(
        name="toy",
        modality="image" if net == "vit" else "text",
        num_classes=num_classes,
        input_shape=shape,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        labels_sha256="",
    )
    return models.build(entry, info, seed=seed)


# --------------------------------------------------------------------------- models


@cache
def _trained(net: Net, num_classes: int, epochs: int, dead_stem: bool, grouped: bool) -> nn.Module:
    chosen = problem(net, num_classes, grouped)
    model = frozen_stem(chosen.build)(1) if dead_stem else chosen.build(1)
    recipe = FULL.model_copy(update={"epochs": epochs})
    engine.train(model, chosen.train, recipe, seed=1, device=engine.accelerator("cpu"))
    return model


def original(
    net: Net,
    num_classes: int = 3,
    *,
    epochs: int = FULL.epochs,
    dead_stem: bool = False,
    grouped: bool = False,
) -> nn.Module:
    """Return a copy of the model trained on all training rows, in eval mode, on the CPU.

    `dead_stem` gives the one whose first module arrives with requires_grad False.
    """
    return copy.deepcopy(_trained(net, num_classes, epochs, dead_stem, grouped))


def frozen_stem(build: Build) -> Build:
    """Return a builder whose first module is the same for every seed and takes no gradient.

    So it is with a pretrained backbone of which only the last part is trained.
    """

    def built(seed: int) -> nn.Module:
        model, shared = build(seed), build(0)
        name, stem = next(model.named_children())
        stem.load_state_dict(shared.get_submodule(name).state_dict())
        stem.requires_grad_(False)
        return model

    return built


# --------------------------------------------------------------------------- requests


def split(rows: Rows, scenario: Scenario, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the positions to forget, `size` of them if given, and those to retain.

    For :attr:`Scenario.CLASS` class 0 loses all its rows, also those that are not in the forget
    set, so that a forget set of any size still is a whole class. :attr:`Scenario.CORRECTION`
    forgets nothing unless a size is given.
    """
    if scenario is Scenario.CORRECTION and size is None:
        return torch.arange(0), torch.arange(len(rows))
    of_class = torch.nonzero(rows.labels == 0)[:, 0]
    if scenario is Scenario.CLASS:
        return of_class[:size], torch.nonzero(rows.labels != 0)[:, 0]
    if scenario is Scenario.SUBCLASS:
        forget = of_class[: 20 if size is None else size]
    else:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
        forget = order[: 24 if size is None else size].sort().values
    return forget, complement(forget, len(rows))


def complement(positions: Tensor, count: int) -> Tensor:
    """Return the positions in 0..count-1 that are not in `positions`, ascending."""
    kept = torch.ones(count, dtype=torch.bool)
    kept[positions] = False
    return torch.nonzero(kept)[:, 0]


def soft_weights(rows: Rows, strength: float) -> Weights:
    """Return ε that removes a share of every third row and a whole of every seventh."""
    eps = torch.zeros(len(rows), dtype=torch.float64)
    eps[::3] = -strength
    eps[1::3] = strength / 2
    eps[::7] = -1
    return Weights(eps)


def request(
    chosen: Problem,
    scenario: Scenario,
    *,
    recipe: Recipe = SHORT,
    positions: tuple[Tensor, Tensor] | None = None,
    weights: Weights | None = None,
    train: Rows | None = None,
    val: Rows | None = None,
    **more: Any,
) -> UnlearningTask:
    """Return the task of forgetting `positions[0]` and keeping `positions[1]`, or of `weights`."""
    train = chosen.train if train is None else train
    common: dict[str, Any] = {
        "val": chosen.val if val is None else val,
        "num_classes": chosen.num_classes,
        "recipe": recipe,
        "fresh_model": chosen.build,
        "scenario": scenario,
        "modality": chosen.modality,
    } | more
    if weights is not None:
        return UnlearningTask.from_weights(train, weights, **common)
    forget, retain = split(train, scenario) if positions is None else positions
    nothing = scenario is Scenario.CORRECTION and not len(forget)
    return UnlearningTask(
        forget=None if nothing else train.subset(forget), retain=train.subset(retain), **common
    )
