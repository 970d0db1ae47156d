"""How transformers keeps a model in a folder: weights, configuration, and what prepares its inputs.

The image processor that is written does to a picture what :class:`Pixels` does to its pixels, so
that `AutoImageProcessor` and `AutoModelForImageClassification` alone give the same logits.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import transformers
from PIL.Image import Resampling
from torch import nn
from transformers import PreTrainedTokenizerFast, ViTImageProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as IMAGE_TYPES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as TEXT_TYPES,
)

from unsc_plugin._backbones.classifier import Classifier, Pixels
from unsc_plugin._backbones.hf_models import AUTO, in_own_memory, quiet
from unsc_plugin._backbones.trial import Size

MARKS = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
"""The special tokens of the package's own word lists."""


def can_rebuild(module: nn.Module, modality: str) -> bool:
    """Return whether transformers' own classes build this module again from its configuration."""
    if not isinstance(module, transformers.PreTrainedModel):
        return False
    known = {"image": IMAGE_TYPES, "text": TEXT_TYPES}.get(modality, {})
    names = known.get(module.config.model_type, ())
    return type(module).__name__ in ((names,) if isinstance(names, str) else names)


def save(
    model: Classifier, folder: Path, *, size: Size | None = None, tokenizer: Any = None
) -> None:
    """Write weights and configuration, and the image processor or the tokenizer.

    `size` is (height, width) of the images where the classifier does not resize them. A classifier
    that does not normalise its pixels gets no image processor: it is not known what it expects.
    """
    backbone: Any = model.backbone
    before, channels = backbone.config, None
    config = backbone.config = copy.deepcopy(before)
    config._name_or_path = ""  # a folder of this machine is nobody's business
    if model.pixels is not None:
        size, channels = model.pixels.size or size, model.pixels.channels
    if size is not None and hasattr(config, "image_size"):
        whole = isinstance(config.image_size, int) and size[0] == size[1]
        config.image_size = size[0] if whole else list(size)
    try:
        with quiet():
            backbone.save_pretrained(folder, safe_serialization=True)
    finally:
        backbone.config = before
    if model.pixels is not None and size is not None:
        _processor(model.pixels, size, channels == 3).save_pretrained(folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


def _processor(pixels: Pixels, size: Size, colour: bool) -> Any:
    return ViTImageProcessor(
        do_resize=True,
        size={"height": size[0], "width": size[1]},
        resample=Resampling.BILINEAR,
        do_rescale=True,
        do_normalize=True,
        image_mean=pixels.statistics[0],
        image_std=pixels.statistics[1],
        do_convert_rgb=True if colour else None,
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer of transformers, or a word list of the package as one."""
    if not hasattr(tokenizer, "save_pretrained"):
        length = (tokenizer.truncation or {}).get("max_length")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            model_input_names=["input_ids", "attention_mask"],
            **({"model_max_length": length} if length else {}),
            **MARKS,
        )
    tokenizer.save_pretrained(folder)


def load(folder: Path, like: nn.Module, modality: str) -> nn.Module:
    """Return what transformers reads from `folder`, with the attention and precision of `like`."""
    attention = getattr(like.config, "_attn_implementation", None)
    with quiet():
        found: nn.Module = AUTO[modality].from_pretrained(
            folder, attn_implementation=attention, trust_remote_code=False
        )
    return in_own_memory(found.to(next(like.parameters()).dtype)).eval()
