"""Names of backbones and the classifiers behind them: the only door to timm and transformers.

A name is `timm:<id>`, `hf:<hub id or folder>`, `hf-config:<type>[?key=value&...]` (built from a
configuration, never downloaded), a shortcut of the registry, or a folder that was exported.
Resizing and normalisation live inside the :class:`Classifier`, so that a distance in input space is
a distance in pixels for every backbone.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from unsc_plugin._backbones.classifier import (
    INPUT_KEYS,
    Classifier,
    Origin,
    Pixels,
    wrap,
)
from unsc_plugin._backbones.trial import seeded
from unsc_plugin._backbones.weights import load_checkpoint, save_weights, state_sha256
from unsc_plugin.errors import ConfigError, NotApplicable, UnknownName
from unsc_plugin.spec import BackboneEntry, DataInfo, Modality, Strict, parse_settings, read_yaml

__all__ = [
    "INPUT_KEYS",
    "Classifier",
    "build",
    "library_of",
    "load_checkpoint",
    "load_model",
    "load_native",
    "resolve",
    "save_model",
    "save_native",
    "save_weights",
    "state_sha256",
    "tokenizer_for",
    "wrap",
]

Source = Literal["timm", "hf", "hf-config", "torch"]
Library = Literal["transformers", "timm", "unsc_plugin", "torch"]
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
LOCAL = "local-dir:"
DESCRIPTION = "unsc_model.json"
WEIGHTS = "model.safetensors"


class _Stored(Strict):
    """The description beside exported weights: enough to build the architecture again."""

    schema_: Literal[1] = Field(1, alias="schema")
    source: Source
    id: str
    stem: Literal["native", "cifar"] = "native"
    args: dict[str, Any] = Field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: tuple[int, ...] | None = None
    modality: Modality
    num_classes: int = Field(ge=2)
    class_names: tuple[str, ...] = ()
    input_shape: tuple[int, ...]
    vocab_size: int | None = None
    pad_token_id: int | None = None
    special_token_ids: tuple[int, ...] | None = None
    feature_numeric: tuple[bool, ...] | None = None


# --------------------------------------------------------------------------- names


def resolve(name: str, entries: Mapping[str, BackboneEntry]) -> BackboneEntry:
    """Return what `name` stands for; nothing is built or downloaded.

    `entries` are the registry's shortcuts. A folder is one written by :func:`save_model`, by
    `timm.models.save_for_hf` or by `save_pretrained`.

    Raises:
        UnknownName: no such shortcut, timm id, model type or folder; lists the nearest.
        ConfigError: a name with `..`, or a setting behind `?` that is no YAML value.

    >>> resolve("hf-config:bert?num_hidden_layers=1", {}).args
    {'num_hidden_layers': 1}
    """
    if ".." in name:
        raise ConfigError(f"backbone {name!r}: expected a name without '..'; give an absolute path")
    kind, colon, rest = name.partition(":")
    if colon and kind in ("timm", "hf", "hf-config"):
        return _PREFIXED[kind](rest)
    if name in entries:
        return entries[name]
    if Path(name).is_dir():
        return _resolve_folder(Path(name).resolve())
    raise UnknownName(
        "backbone",
        name,
        _all_names(entries),
        "known forms: a registry shortcut, timm:<id>, hf:<hub id or folder>, hf-config:<type>, "
        "the path of an exported folder",
    )


def tokenizer_for(entry: BackboneEntry) -> Any | None:
    """Return the tokenizer that belongs to a hub model or folder, else None."""
    if entry.source != "hf":
        return None
    from unsc_plugin._backbones import hf_models

    return hf_models.tokenizer_for(entry.id)


def _timm_name(name: str) -> BackboneEntry:
    from unsc_plugin._backbones import timm_models

    timm_models.check_name(name)
    return BackboneEntry(source="timm", id=name, modality="image")


def _hub_name(name: str) -> BackboneEntry:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return BackboneEntry(source="hf", id=str(folder.resolve()))
    if not HUB_ID.match(name):
        raise UnknownName("Hugging Face model", name, (), "expected hub/id or an existing folder")
    return BackboneEntry(source="hf", id=name)


def _config_name(rest: str) -> BackboneEntry:
    from unsc_plugin._backbones import hf_models

    model_type, _, query = rest.partition("?")
    if model_type not in hf_models.config_types():
        raise UnknownName("hf-config model type", model_type, hf_models.config_types())
    args = parse_settings(query, f"hf-config:{model_type}")
    modality = hf_models.modality_of(model_type)
    return BackboneEntry(source="hf-config", id=model_type, args=args, modality=modality)


_PREFIXED: dict[str, Callable[[str], BackboneEntry]] = {
    "timm": _timm_name,
    "hf": _hub_name,
    "hf-config": _config_name,
}


def _resolve_folder(folder: Path) -> BackboneEntry:
    if (folder / DESCRIPTION).is_file():
        stored = _description(folder)
        kept = ("source", "stem", "args", "mean", "std", "input_size", "modality")
        fields = {key: getattr(stored, key) for key in kept}
        return BackboneEntry(id=f"{LOCAL}{folder}", **fields)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}: expected an exported model ({DESCRIPTION} or config.json), got {error}"
        ) from None
    if "architecture" in config:
        return BackboneEntry(source="timm", id=f"{LOCAL}{folder}", modality="image")
    return BackboneEntry(source="hf", id=str(folder))


def _description(folder: Path) -> _Stored:
    return read_yaml(folder / DESCRIPTION).validate(_Stored)


def _all_names(entries: Mapping[str, BackboneEntry]) -> list[str]:
    from unsc_plugin._backbones import hf_models, timm_models

    return [
        *entries,
        *(f"timm:{name}" for name in timm_models.names()),
        *(f"hf-config:{name}" for name in hf_models.config_types()),
    ]


# --------------------------------------------------------------------------- building


def build(
    entry: BackboneEntry, info: DataInfo, *, seed: int, pretrained: bool = False
) -> Classifier:
    """Return the classifier of `entry` for the data `info`, in evaluation mode, on the CPU.

    Weights are drawn from a private generator seeded with `seed`: the same seed gives the same
    bits, and the global generators stay where they are. With `pretrained`, published weights (or
    those of the folder) replace all but a head of another width.

    Raises:
        NotApplicable: the backbone does not read this modality, or runs at no size of this data.
        ConfigError: arguments that the backbone does not take; weights asked for where none exist.
        MissingOptional: weights that are neither cached nor reachable.
        CheckpointError: a folder whose weights do not fit.
    """
    if entry.modality not in (None, info.modality):
        raise NotApplicable(
            f"backbone {entry.id!r} reads {entry.modality} data, got {info.modality} data "
            f"({info.name}); take another backbone"
        )
    folder = Path(entry.id.removeprefix(LOCAL))
    if entry.id.startswith(LOCAL) and (folder / DESCRIPTION).is_file():
        entry = entry.model_copy(update={"id": _description(folder).id})
        model = build(entry, info, seed=seed)
        if pretrained:
            load_checkpoint(model, folder / WEIGHTS)
        return model.eval()
    model = _build(entry, info, seed, pretrained)
    _tell_inputs(model, info)
    model.origin = Origin(_as_built(entry, model.pixels), info)
    return model.eval()


def _tell_inputs(model: Classifier, info: DataInfo) -> None:
    """Set what the data say of their inputs, unless the model's own tokenizer has said it."""
    if model.special_token_ids is None and info.special_token_ids is not None:
        model.special_token_ids = frozenset(info.special_token_ids)
    if info.feature_numeric is not None:
        model.feature_numeric = torch.tensor(info.feature_numeric)


def _build(entry: BackboneEntry, info: DataInfo, seed: int, pretrained: bool) -> Classifier:
    """Pass the work to the door of the source; each is imported when it is first needed.

    Raises:
        NotApplicable: another modality, or a stem that only timm models have.
        ConfigError: published weights of a source that has none.
    """
    if entry.stem != "native" and entry.source != "timm":
        raise NotApplicable(f"backbone {entry.id!r}: stem 'cifar' expected source timm")
    if pretrained and entry.source in ("torch", "hf-config"):
        raise ConfigError(
            f"backbone {entry.id!r}: expected published weights, source {entry.source} has none; "
            "build it without pretrained weights, or load a checkpoint"
        )
    if entry.source == "torch":
        from unsc_plugin._backbones import torch_models

        with seeded(seed):
            return torch_models.build(entry, info)
    reads = ("image",) if entry.source == "timm" else ("image", "text")
    if info.modality not in reads:
        raise NotApplicable(
            f"{entry.source}:{entry.id}: expected {' or '.join(reads)} data, got {info.modality}"
        )
    if entry.source == "timm":
        from unsc_plugin._backbones import timm_models

        return timm_models.build(entry, info, seed=seed, pretrained=pretrained)
    from unsc_plugin._backbones import hf_models

    if entry.source == "hf":
        return hf_models.build_from_hub(entry, info, seed=seed, pretrained=pretrained)
    return hf_models.build_from_config(entry, info, seed=seed)


def _as_built(entry: BackboneEntry, pixels: Pixels | None) -> BackboneEntry:
    """Return the entry with the size and statistics that were chosen."""
    if pixels is None:
        return entry
    chosen = {
        "mean": tuple(pixels.mean.flatten().tolist()),
        "std": tuple(pixels.std.flatten().tolist()),
        "input_size": (pixels.channels, *(pixels.size or ())),
    }
    return entry.model_copy(update=chosen)


# --------------------------------------------------------------------------- folders


def save_model(model: Classifier, folder: str | Path) -> None:
    """Write `model` as a folder that :func:`load_model` reads: weights and a description.

    Raises:
        NotApplicable: a wrapped module or a hub model; those are exported by their own libraries
            (`model.backbone.save_pretrained`, `timm.models.save_for_hf`).
    """
    origin = model.origin
    if origin is None or origin.entry.source == "hf" or origin.entry.id.startswith(LOCAL):
        raise NotApplicable(
            "save_model: expected a classifier built from timm:, hf-config: or a torch backbone; "
            "save others with model.backbone.save_pretrained, or their weights with save_weights"
        )
    entry, info = origin.entry, origin.info
    names = _Stored.model_fields
    fields = {key: value for key, value in info if key in names} | {
        key: value for key, value in entry if key in names and key != "modality"
    }
    text = _Stored(schema=1, **fields).model_dump_json(by_alias=True, indent=2)
    folder = Path(folder)
    save_weights(model, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def load_model(
    name: str | Path,
    *,
    num_classes: int | None = None,
    input_shape: Sequence[int] | None = None,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    modality: Modality | None = None,
    pretrained: bool | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    entries: Mapping[str, BackboneEntry] | None = None,
) -> Classifier:
    """Return a classifier by name or from an exported folder.

    What is not given comes from the model where it is published (folder, hub, timm).
    `pretrained` defaults to True for a folder and False otherwise; `checkpoint` is loaded last.

    Raises:
        UnknownName: no such backbone.
        ConfigError: a number of classes or an input shape that nothing says.

    >>> load_model("timm:test_vit", num_classes=3, input_shape=(1, 8, 8)).num_classes
    3
    """
    entry = resolve(str(name), entries or {})
    is_folder = entry.id.startswith(LOCAL) or Path(entry.id).is_absolute()
    given = {
        "num_classes": num_classes,
        "input_shape": None if input_shape is None else tuple(input_shape),
        "vocab_size": vocab_size,
        "pad_token_id": pad_token_id,
        "modality": modality,
    }
    fields = _published(entry) | {key: value for key, value in given.items() if value is not None}
    for key in ("num_classes", "input_shape", "modality"):
        if key not in fields:
            raise ConfigError(
                f"load_model({str(name)!r}): expected {key}, got none; give {key}=..."
            )
    info = DataInfo(name="unnamed", labels_sha256="", **fields)
    model = build(
        entry, info, seed=seed, pretrained=is_folder if pretrained is None else pretrained
    )
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def _published(entry: BackboneEntry) -> dict[str, Any]:
    """Return what the backbone itself says of its data."""
    folder = Path(entry.id.removeprefix(LOCAL))
    if entry.id.startswith(LOCAL) and (folder / DESCRIPTION).is_file():
        names = DataInfo.model_fields
        return {key: value for key, value in _description(folder) if key in names}
    if entry.source == "timm":
        from unsc_plugin._backbones import timm_models

        return timm_models.published(entry.id)
    if entry.source == "hf":
        from unsc_plugin._backbones import hf_models

        return hf_models.published(entry.id)
    return {} if entry.modality is None else {"modality": entry.modality}


# --------------------------------------------------------------------------- folders of others


def library_of(model: Classifier) -> Library:
    """Return which library builds `model` again from a folder alone.

    `torch` is for a wrapped module of the user's own: only its weights can be kept.
    """
    if model.origin is not None:
        entry = model.origin.entry
        if entry.source in ("hf", "hf-config"):
            return "transformers"
        return "timm" if entry.source == "timm" and entry.stem == "native" else "unsc_plugin"
    from unsc_plugin._backbones import hf_folders, timm_models

    if hf_folders.can_rebuild(model.backbone, model.modality):
        return "transformers"
    return "timm" if timm_models.can_rebuild(model.backbone) else "torch"


def save_native(
    model: Classifier,
    folder: Path,
    *,
    size: tuple[int, int] | None = None,
    tokenizer: Any = None,
) -> Library:
    """Write `model` as the library that can build it again reads it, and return that library.

    transformers: `save_pretrained` with an image processor or the tokenizer; timm: `save_for_hf`
    with a configuration that is true of this model; unsc_plugin: :func:`save_model`; torch: the
    weights under the names of the wrapped module. All weights are safetensors.

    Args:
        model: the classifier.
        folder: an existing one.
        size: (height, width) of the images, where the classifier does not resize them.
        tokenizer: what made the token ids, if the model reads texts.
    """
    library = library_of(model)
    if library == "timm":
        from unsc_plugin._backbones import timm_models

        names = model.origin.info.class_names if model.origin is not None else ()
        timm_models.save(model, folder, size=size, class_names=names)
        return library
    if library == "unsc_plugin":
        save_model(model, folder)
    elif library == "torch":
        save_weights(model.backbone, folder / WEIGHTS)
    if library == "transformers" or tokenizer is not None:
        from unsc_plugin._backbones import hf_folders

        if library == "transformers":
            hf_folders.save(model, folder, size=size, tokenizer=tokenizer)
        else:
            hf_folders.save_tokenizer(tokenizer, folder)
    return library


def load_native(folder: Path, like: Classifier) -> Classifier:
    """Return a copy of `like` whose backbone is what its own library alone reads from `folder`.

    Raises:
        CheckpointError: weights that do not fit.
    """
    library = library_of(like)
    if library == "unsc_plugin":
        return load_model(folder)
    twin = copy.deepcopy(like).cpu()
    if library == "torch":
        for tensor in twin.state_dict().values():
            tensor.zero_()
        load_checkpoint(twin, folder / WEIGHTS)
    elif library == "timm":
        from unsc_plugin._backbones import timm_models

        twin.backbone = timm_models.load(folder)
    else:
        from unsc_plugin._backbones import hf_folders

        twin.backbone = hf_folders.load(folder, like.backbone, like.modality)
    return twin.eval()
