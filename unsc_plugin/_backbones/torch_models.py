"""Four small networks of our own: for tests, for tables, and for data that fits on a laptop."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unsc_plugin._backbones.classifier import Classifier, Pixels
from unsc_plugin.errors import ConfigError, NotApplicable, UnknownName, nearest
from unsc_plugin.spec import BackboneEntry, DataInfo

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class Body(nn.Module):
    """A body and a linear head: logits = head(body(x)), x an image (B, C, H, W) or a row (B, D)."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, K)."""
        logits: Tensor = self.head(self.body(inputs))
        return logits


class TinyText(nn.Module):
    """Mean of the embeddings of all real tokens, then a perceptron: order of words is ignored."""

    def __init__(self, embeddings: nn.Embedding, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.body = body
        self.head = nn.Linear(width, classes)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of word vectors."""
        return self.embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits (B, K) for token ids (B, T); without a mask, padding is left out."""
        if attention_mask is None:
            padding = self.embeddings.padding_idx
            attention_mask = (
                torch.ones_like(input_ids) if padding is None else (input_ids != padding).long()
            )
        vectors = self.embeddings(input_ids)
        kept = attention_mask[..., None].to(vectors.dtype)
        mean = (vectors * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)
        logits: Tensor = self.head(self.body(mean))
        return logits


def build(entry: BackboneEntry, info: DataInfo) -> Classifier:
    """Return the network `entry.id` for the data `info`.

    Raises:
        UnknownName: no such network.
        NotApplicable: the network does not take this modality.
        ConfigError: an argument that it does not take.
    """
    if entry.id not in NETWORKS:
        raise UnknownName("torch backbone", entry.id, NETWORKS)
    modalities, make = NETWORKS[entry.id]
    if info.modality not in modalities:
        raise NotApplicable(
            f"torch backbone {entry.id!r}: expected {' or '.join(modalities)} data, got "
            f"{info.modality}; use {'tiny-text' if info.modality == 'text' else 'mlp'}"
        )
    known = [name for name in inspect.signature(make).parameters if name != "info"]
    for name in entry.args:
        if name not in known:
            close = nearest(name, known)
            hint = (
                f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
            )
            raise ConfigError(f"torch backbone {entry.id!r}: unknown argument {name!r}; {hint}")
    pixels = None
    if info.modality == "image":
        channels, height, width = info.input_shape
        size = tuple(entry.input_size[-2:]) if entry.input_size else (height, width)
        pixels = Pixels(
            entry.mean or (0.5,) * channels, entry.std or (0.5,) * channels, (size[0], size[1])
        )
        info = info.model_copy(update={"input_shape": (pixels.channels, *size)})
    return Classifier(
        make(info, **entry.args),
        num_classes=info.num_classes,
        modality=info.modality,
        head=("head",),
        pixels=pixels,
        pixel_domain=pixels is not None,
    )


def _mlp(info: DataInfo, hidden: Sequence[int] = (64, 128, 64), activation: str = "relu") -> Body:
    width = math.prod(info.input_shape)
    body = nn.Sequential(nn.Flatten(), *_layers(width, hidden, activation))
    return Body(body, hidden[-1] if hidden else width, info.num_classes)


def _logistic(info: DataInfo) -> Body:
    return _mlp(info, hidden=())


def _small_cnn(info: DataInfo, widths: Sequence[int] = (16, 32, 64)) -> Body:
    """3×3 convolution, BatchNorm, ReLU per width; halved between them while 2 pixels are left."""
    layers: list[nn.Module] = []
    channels, height, width = info.input_shape
    for place, out in enumerate(widths):
        if place and min(height, width) > 1:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        layers += [
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
        channels = out
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Body(body, channels, info.num_classes)


def _tiny_text(
    info: DataInfo, width: int = 64, hidden: Sequence[int] = (64,), activation: str = "relu"
) -> TinyText:
    if info.vocab_size is None:
        raise ConfigError(f"data {info.name!r}: expected vocab_size for a text backbone, got none")
    embeddings = nn.Embedding(info.vocab_size, width, padding_idx=info.pad_token_id)
    body = nn.Sequential(*_layers(width, hidden, activation))
    return TinyText(embeddings, body, hidden[-1] if hidden else width, info.num_classes)


def _layers(width: int, hidden: Sequence[int], activation: str) -> list[nn.Module]:
    if activation not in ACTIVATIONS:
        raise UnknownName("activation", activation, ACTIVATIONS)
    layers: list[nn.Module] = []
    for out in hidden:
        layers += [nn.Linear(width, out), ACTIVATIONS[activation]()]
        width = out
    return layers


NETWORKS: dict[str, tuple[tuple[str, ...], Callable[..., nn.Module]]] = {
    "mlp": (("image", "tabular"), _mlp),
    "logistic": (("image", "tabular"), _logistic),
    "small-cnn": (("image",), _small_cnn),
    "tiny-text": (("text",), _tiny_text),
}
