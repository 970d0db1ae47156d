"""The door to timm: any of its ids, for images of any size and number of channels."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from unsc_plugin._backbones.classifier import Classifier, Pixels, last_layer, path_of
from unsc_plugin._backbones.trial import Size, first_that_runs, image_example, seeded, sizes
from unsc_plugin.errors import ConfigError, MissingOptional, NotApplicable, UnknownName
from unsc_plugin.spec import BackboneEntry, DataInfo

LOCAL = "local-dir:"
STEP = 32  # total stride of nearly every family; 32×32 is also the smallest input they accept
CIFAR_STEP = 8  # the same networks without the stem's two halvings


def names() -> list[str]:
    """Return every architecture of the installed timm."""
    return list(timm.list_models())


def check_name(name: str) -> None:
    """Accept an architecture, or an architecture and one of its tags.

    Raises:
        UnknownName: neither; lists the nearest.
    """
    tagged = "." in name
    if not timm.is_model(name) or (tagged and name not in timm.list_models(include_tags=True)):
        raise UnknownName("timm model", name, timm.list_models(include_tags=tagged))


def published(name: str) -> dict[str, Any]:
    """Return what an id or a folder says of its data, as fields of :class:`DataInfo`."""
    fields: dict[str, Any] = {"modality": "image", "input_shape": native_shape(name)}
    if name.startswith(LOCAL):
        fields["num_classes"] = _stored(Path(name.removeprefix(LOCAL)))["num_classes"]
    return fields


def native_shape(name: str) -> tuple[int, int, int]:
    """Return the input shape (C, H, W) that the id was published with.

    Raises:
        ConfigError: a local folder that timm did not write.
    """
    if name.startswith(LOCAL):
        channels, height, width = _stored(Path(name.removeprefix(LOCAL)))["input_shape"]
        return channels, height, width
    settings = timm.get_pretrained_cfg(name)
    channels, height, width = settings.input_size if settings else (3, 224, 224)
    return channels, height, width


def _stored(folder: Path) -> dict[str, Any]:
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape, classes = tuple(stored["pretrained_cfg"]["input_size"]), stored["num_classes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder}: expected a timm folder (config.json with num_classes and pretrained_cfg, "
            f"model.safetensors), got {error!r}; export it with timm.models.save_for_hf"
        ) from None
    arguments = stored.get("model_args") or {}
    return {"input_shape": shape, "num_classes": classes, "model_args": arguments}


def build(entry: BackboneEntry, info: DataInfo, *, seed: int, pretrained: bool) -> Classifier:
    """Return the timm model `entry.id` for the data `info`.

    Input size: `entry.input_size` if given; the native size with pretrained weights; else the
    first of :func:`trial.sizes` at which the architecture runs, so that small images stay cheap.

    Raises:
        UnknownName: no such id.
        ConfigError: an argument that the architecture does not take, or no published weights.
        MissingOptional: the weights are neither cached nor reachable.
        NotApplicable: no input size works, or no stem to replace.
    """
    local = entry.id.startswith(LOCAL)
    if not local:
        check_name(entry.id)
    if pretrained and not local and not timm.models.is_model_pretrained(entry.id):
        raise ConfigError(
            f"timm:{entry.id}: expected published weights, there are none; build it without "
            f"pretrained weights or name a tag (timm has {entry.id.split('.')[0]}.* for some)"
        )
    own, *native_sides = native_shape(entry.id)
    native: Size = (native_sides[0], native_sides[1])
    channels = info.input_shape[0]
    if entry.mean:
        channels = len(entry.mean)
    elif local or (pretrained and channels == 1):
        channels = own
    make = functools.partial(_make, entry, info, pretrained=pretrained)
    if entry.input_size:
        height, width = entry.input_size[-2:]
        attempts = [functools.partial(make, channels, (height, width), resize=True)]
    elif pretrained or local:  # a folder does not say the img_size it was built with, but this does
        attempts = [functools.partial(make, channels, native, resize=local)]
    else:
        step = CIFAR_STEP if entry.stem == "cifar" else _step(entry.id)
        tried = sizes(info.input_shape, step, native)
        attempts = [functools.partial(make, channels, size, resize=True) for size in tried]
        if channels != 3:  # some stems are written for three channels: repeat or refuse
            attempts.append(functools.partial(make, 3, native, resize=True))
    with seeded(seed):
        example = image_example(info)
    return first_that_runs(attempts, example, seed=seed, what=f"timm:{entry.id}")


def _make(
    entry: BackboneEntry,
    info: DataInfo,
    channels: int,
    size: Size,
    *,
    pretrained: bool,
    resize: bool,
) -> Classifier:
    arguments = {**entry.args, "num_classes": info.num_classes, "in_chans": channels}
    backbone = _create(entry.id, arguments, size if resize else None, pretrained)
    settings: Any = backbone.pretrained_cfg
    mean = entry.mean or _statistics(settings.get("mean"), channels)
    std = entry.std or _statistics(settings.get("std"), channels)
    if entry.stem == "cifar":
        _small_stem(backbone, entry.id)
    return Classifier(
        backbone,
        num_classes=info.num_classes,
        modality="image",
        head=_head(backbone, info.num_classes),
        pixels=Pixels(mean, std, size),
        pixel_domain=True,
    )


def _create(name: str, arguments: dict[str, Any], size: Size | None, pretrained: bool) -> nn.Module:
    """Create the model, with `img_size` where the architecture has that argument.

    Raises:
        ConfigError: an argument that the architecture does not take.
        MissingOptional: weights that are neither cached nor reachable.
        TypeError: raised by the architecture itself at this size.
    """
    make = functools.partial(timm.create_model, name, pretrained=pretrained)
    try:
        if size is not None:
            side = size[0] if size[0] == size[1] else size
            try:
                model: nn.Module = make(**arguments, img_size=side)
            except TypeError:
                model = make(**arguments)
        else:
            model = make(**arguments)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ConfigError(f"timm:{name}: expected arguments that it takes, got {error}") from None
    except OSError as error:
        raise MissingOptional(
            f"timm:{name}: expected its weights in the cache or on the network, found neither "
            f"({str(error).splitlines()[0][:120]})\nbuild it without pretrained weights, fetch "
            "them once online, or give a local folder"
        ) from None
    return model


def save(
    model: Classifier, folder: Path, *, size: Size | None = None, class_names: Sequence[str] = ()
) -> None:
    """Write a folder that plain timm reads: `timm.create_model("local-dir:...", pretrained=True)`.

    The configuration says how pixels are brought in by this classifier; what it said of the weights
    that it once started from is left out. `size` is (height, width) of the images where the
    classifier does not resize them.
    """
    backbone: Any = model.backbone
    before = backbone.pretrained_cfg
    backbone.pretrained_cfg = _corrected(before, model.pixels, size)
    more = {"label_names": list(class_names)} if class_names else {}
    try:
        timm.models.save_for_hf(
            backbone,
            str(folder),
            model_config=more,
            model_args=_building_arguments(model, backbone.pretrained_cfg),
            safe_serialization=True,
        )
    finally:
        backbone.pretrained_cfg = before


def load(folder: Path) -> nn.Module:
    """Return the model of a folder as plain timm reads it."""
    model: nn.Module = timm.create_model(f"{LOCAL}{folder.resolve()}", pretrained=True)
    return model.eval()


def can_rebuild(module: nn.Module) -> bool:
    """Return whether plain timm builds a module of these names and shapes again."""
    settings = getattr(module, "pretrained_cfg", None)
    if not isinstance(settings, Mapping) or not timm.is_model(settings.get("architecture", "")):
        return False
    arguments = {"num_classes": getattr(module, "num_classes", None)}
    arguments |= getattr(module, "_model_args", {})  # kept by newer versions of timm
    try:
        twin = timm.create_model(settings["architecture"], **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError):
        return False
    shapes = [{k: t.shape for k, t in one.state_dict().items()} for one in (module, twin)]
    return shapes[0] == shapes[1]


def _corrected(
    settings: Mapping[str, Any], pixels: Pixels | None, size: Size | None
) -> dict[str, Any]:
    """Return a model's settings without what is only true of the weights it started from."""
    kept = {key: value for key, value in settings.items() if key not in _OF_OLD_WEIGHTS}
    channels = kept["input_size"][0]
    if pixels is not None:
        size, channels = pixels.size or size, pixels.channels
        mean, std = pixels.statistics
        kept |= {"mean": tuple(mean), "std": tuple(std)}
    if size is not None:
        kept["input_size"] = (channels, *size)
    return kept | {"interpolation": "bilinear", "crop_pct": 1.0}


def _building_arguments(model: Classifier, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the architecture was built with besides the number of classes."""
    channels, *sides = settings["input_size"]
    arguments: dict[str, Any] = {"in_chans": channels}
    if model.origin is None:
        return {}  # newer versions of timm have kept them; without any, the defaults are meant
    entry = model.origin.entry
    if entry.id.startswith(LOCAL):
        arguments |= _stored(Path(entry.id.removeprefix(LOCAL)))["model_args"]
    arguments |= entry.args
    architecture = settings["architecture"]
    side = sides[0] if sides[0] == sides[1] else tuple(sides)
    try:
        timm.create_model(architecture, **arguments, img_size=side)
    except TypeError:
        return arguments
    return arguments | {"img_size": side}


_OF_OLD_WEIGHTS = {
    *("tag", "url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict"),
    *("test_input_size", "test_crop_pct", "test_pool_size", "pool_size"),
    *("label_offset", "label_names", "label_descriptions", "num_classes"),
    *("license", "origin_url", "paper_name", "paper_ids", "description", "notes"),
}


def _step(name: str) -> int:
    """Return a size that the patches divide: 32, or a multiple of an odd patch (14: 28)."""
    patch = re.search(r"patch(\d+)", name)
    side = int(patch[1]) if patch else STEP
    return STEP if STEP % side == 0 else side * max(1, STEP // side)


def _statistics(published: tuple[float, ...] | None, channels: int) -> tuple[float, ...]:
    """Return the published statistics, averaged when the number of channels is another."""
    values = tuple(published or (0.5,))
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _head(backbone: nn.Module, classes: int) -> tuple[str, ...]:
    """Return the path of the final layer of every classifier of the model, usually one."""
    found = backbone.get_classifier()  # type: ignore[operator]
    parts = list(found) if isinstance(found, tuple | list | nn.ModuleList) else [found]
    paths = []
    for part in parts:
        inner, outer = last_layer(part, classes), path_of(backbone, part)
        if inner is not None and outer is not None:
            paths.append(f"{outer}.{inner}".strip("."))
    fallback = last_layer(backbone, classes)
    return tuple(paths) or (() if fallback is None else (fallback,))


def _small_stem(backbone: nn.Module, name: str) -> None:
    """Replace a 7×7 stride-2 stem and its pooling by one 3×3 stride-1 convolution.

    He et al. 2016, section 4.2: the stem for images of 32×32.

    Raises:
        NotApplicable: the model has no such stem.
    """
    first, pool = getattr(backbone, "conv1", None), getattr(backbone, "maxpool", None)
    if not isinstance(first, nn.Conv2d) or pool is None or first.stride != (2, 2):
        raise NotApplicable(
            f"timm:{name}: stem 'cifar' expected a ResNet stem (conv1 with stride 2, then maxpool),"
            f" got {type(backbone).__name__}; use stem 'native'"
        )
    stem = nn.Conv2d(first.in_channels, first.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    backbone.conv1 = stem
    backbone.maxpool = nn.Identity()
