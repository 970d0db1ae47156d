"""The door to transformers: classifiers from the hub, from a folder, or small ones from a config.

Attention is always the plain ("eager") implementation: per-sample gradients and second derivatives
go through it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as IMAGE_TYPES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as TEXT_TYPES,
)

from unsc_plugin._backbones.classifier import Classifier, Pixels, last_layer
from unsc_plugin._backbones.trial import Size, first_that_runs, image_example, seeded, sizes
from unsc_plugin.errors import (
    CheckpointError,
    ConfigError,
    MissingOptional,
    NotApplicable,
    UnknownName,
    nearest,
)
from unsc_plugin.spec import BackboneEntry, DataInfo, Modality

STEP = 32  # total stride of the convolutional families
NATIVE: Size = (224, 224)
HALF = (0.5, 0.5, 0.5)
AUTO: dict[str, Any] = {
    "image": AutoModelForImageClassification,
    "text": AutoModelForSequenceClassification,
}

# Small enough to train on two CPU cores. A key counts only where the type has it as one number.
SMALL_WIDTHS = {
    64: ("hidden_size", "d_model", "dim", "n_embd", "embedding_size"),
    2: (
        *("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_decoder_layers"),
        *("encoder_layers", "decoder_layers", "num_attention_heads", "n_heads", "n_head"),
        *("num_heads", "encoder_attention_heads", "decoder_attention_heads"),
        "num_key_value_heads",
    ),
    128: (
        *("intermediate_size", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"),
        *("d_ff", "d_inner", "n_inner"),
    ),
    32: ("d_kv", "d_head", "head_dim"),
}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]}
SMALL_TYPES: dict[str, dict[str, Any]] = {
    "swin": {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "swinv2": {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "convnext": {**STAGES, "num_stages": 4},
    "convnextv2": {**STAGES, "num_stages": 4},
    "resnet": {**STAGES, "embedding_size": 16, "layer_type": "basic"},
    "regnet": {**STAGES, "embedding_size": 16, "groups_width": 8},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "levit": {},
}
POSITIONS = ("max_position_embeddings", "n_positions")


def config_types() -> list[str]:
    """Return every model type that has an image or a sequence classifier."""
    return sorted({*IMAGE_TYPES, *TEXT_TYPES})


def modality_of(model_type: str) -> Modality | None:
    """Return what a model type reads; None when it is unknown or reads both."""
    image, text = model_type in IMAGE_TYPES, model_type in TEXT_TYPES
    if image == text:
        return None
    return "image" if image else "text"


def build_from_config(entry: BackboneEntry, info: DataInfo, *, seed: int) -> Classifier:
    """Return a randomly initialised model of type `entry.id`, small unless `entry.args` say else.

    Image types get the data's number of channels. With a patch size they take the data's size
    rounded up to whole patches (2 pixels below 16, else 4); convolutional ones the first of
    :func:`trial.sizes` that runs. Text types get the data's vocabulary and as many positions as
    its rows have tokens.

    Raises:
        UnknownName: no such model type.
        ConfigError: an argument that the configuration does not have, or values it refuses.
        NotApplicable: the type has no classifier for this modality.
    """
    known = IMAGE_TYPES if info.modality == "image" else TEXT_TYPES
    if entry.id not in known:
        if entry.id not in config_types():
            raise UnknownName("hf-config model type", entry.id, config_types())
        raise NotApplicable(
            f"hf-config:{entry.id}: expected {modality_of(entry.id)} data, got {info.modality}"
        )
    default = CONFIG_MAPPING[entry.id]()
    overrides = _checked(default, entry.args, f"hf-config:{entry.id}")
    small = SMALL_TYPES[entry.id] if entry.id in SMALL_TYPES else _small(default)
    what = f"hf-config:{entry.id}"
    if info.modality == "text":
        settings = small | _text_settings(default, info) | overrides
        attempts = [functools.partial(_random, entry, info, settings, None)]
        return first_that_runs(attempts, _text_example(info, settings), seed=seed, what=what)
    settings = small | {"num_channels": _channels(entry, info)} | overrides
    attempts = []
    for size, more in _image_settings(default, entry, info, settings):
        attempts.append(functools.partial(_random, entry, info, more, size))
    with seeded(seed):
        example = image_example(info)
    return first_that_runs(attempts, example, seed=seed, what=what)


def build_from_hub(
    entry: BackboneEntry, info: DataInfo, *, seed: int, pretrained: bool
) -> Classifier:
    """Return the model of a hub id or folder, with its weights or with random ones.

    The architecture, its input size and its channels stay as published; images are brought to them.

    Raises:
        MissingOptional: neither cached nor reachable.
        ConfigError: a folder or repository that holds no classifier of transformers, or data that
            does not fit it (vocabulary, number of tokens).
        CheckpointError: the weights miss parts of the body.
    """
    config = _hub_config(entry, info)
    _check_text(config, entry, info)
    load = functools.partial(_from_hub, entry, info, config, pretrained)
    with seeded(seed):
        example = image_example(info) if info.modality == "image" else None
    if example is None:
        example = _text_example(info, config.to_dict())
    model = first_that_runs([load], example, seed=seed, what=f"hf:{entry.id}")
    tokenizer = tokenizer_for(entry.id) if info.modality == "text" else None
    if tokenizer is not None:
        model.special_token_ids = frozenset(tokenizer.all_special_ids)
    return model


def tokenizer_for(name: str) -> Any | None:
    """Return the tokenizer of a hub id or folder, None when there is none to load."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError):
        return None


def published(name: str) -> dict[str, Any]:
    """Return what a hub id or folder says of its data, as fields of :class:`DataInfo`."""
    config = _config(name, {})
    modality = modality_of(config.model_type) or "text"
    fields: dict[str, Any] = {"modality": modality, "num_classes": max(2, config.num_labels)}
    if modality == "image":
        size = _published_pixels(name, config)[2]
        return fields | {"input_shape": (getattr(config, "num_channels", 3), *size)}
    reserved = (config.pad_token_id or 0) + 2  # some families count positions from pad + 1
    tokens = max(1, min(128, (_positions(config) or 512) - reserved))
    return fields | {
        "input_shape": (tokens,),
        "vocab_size": config.vocab_size,
        "pad_token_id": config.pad_token_id,
    }


# --------------------------------------------------------------------------- from a config


def _random(
    entry: BackboneEntry, info: DataInfo, settings: Mapping[str, Any], size: Size | None
) -> Classifier:
    try:
        with quiet():
            config = CONFIG_MAPPING[entry.id](**settings, **_labels(info))
    except (ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"hf-config:{entry.id}: refused by the configuration: {reason}") from None
    pixels = None
    if size is not None:
        channels = config.num_channels
        pixels = Pixels(entry.mean or (0.5,) * channels, entry.std or (0.5,) * channels, size)
    return _classifier(_from_config(config, info.modality), info, pixels)


def _small(default: Any) -> dict[str, Any]:
    have = default.to_dict()
    return {
        key: value
        for value, keys in SMALL_WIDTHS.items()
        for key in keys
        if key in have and (isinstance(have[key], int) or key == "n_inner")
    }


def _checked(default: Any, args: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return `args` under the names of the configuration.

    Raises:
        ConfigError: a key that the configuration does not have.
    """
    aliases: dict[str, str] = dict(default.attribute_map)
    known = {key for key in default.to_dict() if not key.startswith("_")} | set(aliases)
    for key in args:
        if key not in known:
            close = nearest(key, known)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"{what}: unknown configuration key {key!r}; {hint}")
    return {aliases.get(key, key): value for key, value in args.items()}


def _text_settings(default: Any, info: DataInfo) -> dict[str, Any]:
    """Vocabulary, padding and positions of the data; special tokens outside it are dropped.

    Some families count positions from pad + 1, hence the extra ones.

    Raises:
        ConfigError: data without a vocabulary size.
    """
    if info.vocab_size is None:
        raise ConfigError(f"data {info.name!r}: expected vocab_size for a text backbone, got none")
    have = default.to_dict()
    pad = info.pad_token_id
    if pad is None:
        own = have.get("pad_token_id")
        pad = own if own is not None and own < info.vocab_size else 0
    settings: dict[str, Any] = {"vocab_size": info.vocab_size, "pad_token_id": pad}
    settings |= {key: info.input_shape[0] + pad + 2 for key in POSITIONS if key in have}
    for key in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if isinstance(have.get(key), int) and have[key] >= info.vocab_size:
            settings[key] = None
    return settings


def _image_settings(
    default: Any, entry: BackboneEntry, info: DataInfo, settings: dict[str, Any]
) -> Iterator[tuple[Size, dict[str, Any]]]:
    have = default.to_dict()
    given = entry.input_size[-2:] if entry.input_size else settings.get("image_size")
    fixed = (given, given) if isinstance(given, int) else given
    step = STEP
    if isinstance(have.get("patch_size"), int) and "hidden_sizes" not in have:
        small = max(fixed or info.input_shape[1:]) < 16
        stages = len(settings.get("depths", (1,)))
        step = settings.setdefault("patch_size", 2 if small else 4) * 2 ** (stages - 1)
    tried = [tuple(fixed)] if fixed else sizes(info.input_shape, step, NATIVE)
    for height, width in tried:
        more = dict(settings)
        if "image_size" in have:
            square = isinstance(have["image_size"], int) and height == width
            more["image_size"] = height if square else [height, width]
        yield (height, width), more


def _channels(entry: BackboneEntry, info: DataInfo) -> int:
    return len(entry.mean) if entry.mean else info.input_shape[0]


# --------------------------------------------------------------------------- from the hub


def _hub_config(entry: BackboneEntry, info: DataInfo) -> Any:
    default = _config(entry.id, {})
    overrides = _checked(default, entry.args, f"hf:{entry.id}")
    modality = modality_of(default.model_type)
    if modality not in (None, info.modality):
        raise NotApplicable(f"hf:{entry.id}: expected {modality} data, got {info.modality}")
    return _config(entry.id, overrides | _labels(info))


def _config(name: str, overrides: Mapping[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **overrides)
    except OSError as error:
        raise _missing(name, error) from None
    except (ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"hf:{name}: expected a model type that transformers ships, got: {reason}; "
            "code from a repository is never run"
        ) from None


def _missing(name: str, error: Exception) -> MissingOptional:
    reason = str(error).strip().splitlines()[0][:160]
    return MissingOptional(
        f"hf:{name}: expected it in the cache, on the network or as a folder, found none "
        f"({reason})\noffline use: a local folder (hf:/path/to/folder), a model from a "
        "configuration (hf-config:bert, hf-config:vit), or fetch it once online"
    )


def _check_text(config: Any, entry: BackboneEntry, info: DataInfo) -> None:
    if info.modality != "text":
        return
    limit = _positions(config)
    if limit is not None and info.input_shape[0] > limit:
        raise ConfigError(
            f"hf:{entry.id}: expected at most {limit} tokens per row, got {info.input_shape[0]}; "
            "load the data with a smaller maximal length"
        )
    if info.vocab_size is not None and info.vocab_size > config.vocab_size:
        raise ConfigError(
            f"hf:{entry.id}: expected token ids below {config.vocab_size}, the data has "
            f"{info.vocab_size}; tokenize it with this model's tokenizer"
        )


def _positions(config: Any) -> int | None:
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _from_hub(entry: BackboneEntry, info: DataInfo, config: Any, pretrained: bool) -> Classifier:
    if not pretrained:
        backbone = _from_config(config, info.modality)
    else:
        backbone = _with_weights(entry.id, config, info.modality)
    pixels = None
    if info.modality == "image":
        mean, std, size = _published_pixels(entry.id, config)
        if entry.input_size:
            size = (entry.input_size[-2], entry.input_size[-1])
        pixels = Pixels(entry.mean or mean, entry.std or std, size)
    return _classifier(backbone, info, pixels)


def _with_weights(name: str, config: Any, modality: str) -> nn.Module:
    try:
        with quiet():
            backbone, report = AUTO[modality].from_pretrained(
                name,
                config=config,
                ignore_mismatched_sizes=True,
                attn_implementation="eager",
                trust_remote_code=False,
                output_loading_info=True,
            )
    except OSError as error:
        raise _missing(name, error) from None
    except Exception as error:  # a damaged file: safetensors and pickle errors have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"hf:{name}: expected weights that load safely, got {reason}; copy them again"
        ) from None
    prefix = f"{backbone.base_model_prefix}."  # absent from some versions' reports
    body = backbone.base_model.state_dict().keys()
    missing = {key.removeprefix(prefix) for key in report["missing_keys"]}
    lost = sorted(key for key in missing & body if "pooler" not in key)
    if lost:
        raise CheckpointError(
            f"hf:{name}: expected weights of every layer of {type(backbone).__name__}, found none "
            f"for {', '.join(lost[:4])} and {max(0, len(lost) - 4)} more; check the folder"
        )
    return in_own_memory(backbone.float())


def _published_pixels(name: str, config: Any) -> tuple[tuple[float, ...], tuple[float, ...], Size]:
    """Return mean, std and size of a model's image processor, halves where it names none."""
    try:
        processor = ImageProcessingMixin.get_image_processor_dict(name)[0]
    except (OSError, ValueError):
        processor = {}
    channels = getattr(config, "num_channels", 3)
    normalises = processor.get("do_normalize", True)
    mean = tuple(processor.get("image_mean") or HALF[:1] * channels) if normalises else ()
    std = tuple(processor.get("image_std") or HALF[:1] * channels) if normalises else ()
    size = getattr(config, "image_size", None) or processor.get("crop_size")
    return mean or (0.0,) * channels, std or (1.0,) * channels, _side(size or processor.get("size"))


def _side(size: Any) -> Size:
    if isinstance(size, int):
        return (size, size)
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge", NATIVE[0])
        return (int(size.get("height", edge)), int(size.get("width", edge)))
    return (int(size[0]), int(size[1])) if size else NATIVE


# --------------------------------------------------------------------------- both


def _from_config(config: Any, modality: str) -> nn.Module:
    if config.architectures is None:  # types with several classifiers are looked up by this list
        config.architectures = []
    with quiet():
        model: nn.Module = AUTO[modality].from_config(config, attn_implementation="eager")
    return model.float()


def _classifier(backbone: nn.Module, info: DataInfo, pixels: Pixels | None) -> Classifier:
    head = last_layer(backbone, info.num_classes)
    return Classifier(
        backbone,
        num_classes=info.num_classes,
        modality=info.modality,
        head=() if head is None else (head,),
        pixels=pixels,
        pixel_domain=pixels is not None,
    )


def _labels(info: DataInfo) -> dict[str, Any]:
    if len(info.class_names) != info.num_classes:
        return {"num_labels": info.num_classes}
    names = dict(enumerate(info.class_names))
    return {"id2label": names, "label2id": {name: place for place, name in names.items()}}


def _text_example(info: DataInfo, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Two rows of one ordinary token, closed by the end token that encoder-decoders look for."""
    special = {value for key, value in settings.items() if key.endswith("_token_id")}
    vocabulary = int(settings["vocab_size"])
    token = next((t for t in range(vocabulary) if t not in special), 0)
    ids = torch.full((2, info.input_shape[0]), token)
    end = settings.get("eos_token_id")
    if isinstance(end, int) and end < vocabulary:
        ids[:, -1] = end
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def quiet() -> Iterator[None]:
    """Hush progress bars, and the report of newly initialised heads: a new head was asked for."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def in_own_memory(module: nn.Module) -> nn.Module:
    """Return `module` with its weights copied out of the file that they were mapped from.

    There they start at any address, and kernels round differently at an odd one: the same weights
    would give other bits.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    return module
