"""One face for every backbone: named inputs in, logits out, pixels handled inside."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unsc_plugin.errors import ConfigError, DataError, NotApplicable
from unsc_plugin.spec import BackboneEntry, DataInfo, Modality

INPUT_KEYS: dict[Modality, str] = {
    "image": "pixel_values",
    "text": "input_ids",
    "tabular": "features",
}
HEAD_TOLERANCE = 1e-4

FeatureCall = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


class Pixels(nn.Module):
    """Maps pixels in [0, 1] (B, C, H, W) to what a backbone was made for.

    One channel is repeated to `channels`; the image is resized to `size` (bilinear, with an
    antialiasing filter when it shrinks); then x ← (x − mean) / std per channel. The statistics are
    constants of the architecture, so they are not part of the state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def channels(self) -> int:
        """Number of channels that the backbone takes."""
        return len(self.mean)

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel, in as few digits as give the same float32."""
        columns = (self.mean.flatten().cpu().numpy(), self.std.flatten().cpu().numpy())
        mean, std = ([float(str(value)) for value in column] for column in columns)
        return mean, std

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the backbone's input, (B, channels, *size).

        Raises:
            DataError: neither one channel nor the backbone's number of channels.
        """
        if pixels.shape[-3] != self.channels:
            if pixels.shape[-3] != 1:
                raise DataError(
                    f"expected 1 or {self.channels} channels, got pixels of shape "
                    f"{tuple(pixels.shape)}; build the backbone for this data set"
                )
            pixels = pixels.expand(-1, self.channels, -1, -1)
        if self.size is not None and tuple(pixels.shape[-2:]) != self.size:
            shrinks = pixels.shape[-2] > self.size[0] or pixels.shape[-1] > self.size[1]
            pixels = functional.interpolate(
                pixels, self.size, mode="bilinear", align_corners=False, antialias=shrinks
            )
        return (pixels - self.mean) / self.std


@dataclass(frozen=True)
class Origin:
    """What a built classifier was made from; enough to build the same architecture again."""

    entry: BackboneEntry
    info: DataInfo


class Classifier(nn.Module):
    """A backbone with named inputs, logits, penultimate features and its final layer.

    `forward(**inputs)` gives logits (B, K); keys that the backbone does not take are ignored.
    `features(**inputs)` gives (B, D), what enters :attr:`head`. Where `head` is an `nn.Linear`,
    logits = head(features) in evaluation mode.

    Attributes:
        backbone: the wrapped module; every parameter is in it.
        modality: image, text or tabular.
        num_classes: K.
        input_key: the key of the inputs that the data fills.
        pixel_domain: whether the classifier takes pixels in [0, 1] and normalises them itself.
        special_token_ids: tokens that carry no content, None when unknown.
        feature_scale: per column of a table, the standard deviation σ (D,), None for 1.
        feature_bounds: per column of a table, lowest and highest value (2, D), None for none.
        feature_numeric: which columns of a table are numbers (D,) bool, None for all.
        origin: what it was built from, None for a wrapped module.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_classes: int,
        modality: Modality,
        head: Sequence[str] = (),
        pixels: Pixels | None = None,
        pixel_domain: bool = False,
        input_key: str | None = None,
        output: int | None = None,
        features: FeatureCall | None = None,
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixels = pixels
        self.num_classes = num_classes
        self.modality: Modality = modality
        self.input_key = input_key or INPUT_KEYS[modality]
        self.pixel_domain = pixel_domain
        self.origin = origin
        self.special_token_ids: frozenset[int] | None = None
        self.feature_scale: Tensor | None = None
        self.feature_bounds: Tensor | None = None
        self.feature_numeric: Tensor | None = None
        self._head = tuple(head)
        self._head_alone = True
        self._output = output
        self._features = features
        self._keywords = _keywords(backbone, self.input_key)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return logits (B, K), float32 or wider."""
        return self._logits(self.outputs(**inputs))

    def outputs(self, **inputs: Tensor) -> Any:
        """Return what the backbone gives: a tensor, a tuple or a Hugging Face output."""
        return self._outputs(self._prepared(inputs))

    def features(self, **inputs: Tensor) -> Tensor:
        """Return what enters the head, (B, D): pooled, after any dropout of the training mode."""
        prepared = self._prepared(inputs)
        if self._features is not None:
            return self._features(self.backbone, prepared)
        with _captured(self._final_modules()) as seen:
            logits = self._logits(self._outputs(prepared))
        return torch.cat([_per_row(*pair, logits) for pair in seen.values()], dim=1)

    @property
    def head(self) -> nn.Module:
        """The final module; a `ModuleList` where logits are not the output of one layer.

        That is so for distilled transformers, which average two classifiers.
        """
        modules = self._final_modules()
        return modules[0] if self._head_alone and len(modules) == 1 else nn.ModuleList(modules)

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Run once on `inputs`: the logits' shape must fit, and a linear head must give them.

        A layer that is followed by something else (a softmax, a scale) is no head: it is then
        handed out inside a `ModuleList`, so that nothing mistakes it for one. Parameters,
        statistics and the training mode stay as they are.

        Raises:
            NotApplicable: other logits than (B, num_classes).
        """
        with _evaluating(self), torch.no_grad():
            logits = self(**inputs)
            if len(self._head) == 1 and isinstance(self.head, nn.Linear):
                again = self.head(self.features(**inputs))
                same = again.shape == logits.shape and torch.allclose(
                    again, logits, rtol=HEAD_TOLERANCE, atol=HEAD_TOLERANCE
                )
                self._head_alone = bool(same)

    def _final_modules(self) -> list[nn.Module]:
        if not self._head:
            raise NotApplicable(
                f"expected a final layer with {self.num_classes} outputs, found none in "
                f"{type(self.backbone).__name__}; wrap the model with head='path.of.the.layer'"
            )
        return [self.backbone.get_submodule(path) for path in self._head]

    def _prepared(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.input_key not in inputs and "inputs_embeds" not in inputs:
            raise DataError(f"expected the input {self.input_key!r}, got {sorted(inputs)}")
        dtype = next((p.dtype for p in self.backbone.parameters()), torch.float32)
        ready = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        if self.pixels is not None and self.input_key in ready:
            ready[self.input_key] = self.pixels(ready[self.input_key]).to(dtype)
        return ready

    def _outputs(self, prepared: Mapping[str, Tensor]) -> Any:
        if self._keywords is None:
            return self.backbone(prepared[self.input_key])
        if self._keywords:
            prepared = {key: prepared[key] for key in prepared if key in self._keywords}
        return self.backbone(**prepared)

    def _logits(self, outputs: Any) -> Tensor:
        logits = _pick(outputs, self.num_classes, self._output)
        if logits is None or logits.ndim != 2 or logits.shape[1] != self.num_classes:
            got = "no such tensor" if logits is None else f"shape {tuple(logits.shape)}"
            raise NotApplicable(
                f"expected logits of shape (rows, {self.num_classes}) from "
                f"{type(self.backbone).__name__}, got {got}; say which item with output=..."
            )
        narrow = logits.dtype in (torch.float16, torch.bfloat16)
        return logits.float() if narrow else logits


def wrap(
    module: nn.Module,
    *,
    num_classes: int | None = None,
    modality: Modality,
    head: str | nn.Module | None = None,
    features: FeatureCall | None = None,
    pixel_domain: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_key: str | None = None,
    output: int | None = None,
    example: Mapping[str, Tensor] | None = None,
) -> Classifier:
    """Return a classifier around any module that gives logits, a tuple or a Hugging Face output.

    The module is not copied. A module that expects normalised pixels gets `mean` and `std` here and
    then takes pixels in [0, 1]; without them, `pixel_domain` says whether it already does.
    `head` is the final layer or its path (default: the last layer with `num_classes` outputs);
    `features(module, inputs)` replaces "what enters the head"; `output` picks an item of a tuple
    (default: the first of shape (B, num_classes)). With `example` inputs the choice is checked, and
    `num_classes` defaults to the width of the logits.

    Raises:
        ConfigError: `head` is no part of the module, only one of `mean` and `std` is given, or
            neither `num_classes` nor an `example`.
        NotApplicable: `example` gives other logits than (B, num_classes).

    >>> model = wrap(nn.Linear(4, 3), num_classes=3, modality="tabular")
    >>> model(features=torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """
    if (mean is None) != (std is None):
        raise ConfigError("wrap: expected both mean and std, or neither; give the missing one")
    pixels = Pixels(mean, std) if mean is not None and std is not None else None
    place = next(iter(module.parameters()), torch.zeros(0))
    pixels = None if pixels is None else pixels.to(place.device)
    if num_classes is None:
        num_classes = _width(module, modality, pixels, input_key, output, example)
    classifier = Classifier(
        module,
        num_classes=num_classes,
        modality=modality,
        head=_head_path(module, head, num_classes),
        pixels=pixels,
        pixel_domain=pixel_domain or pixels is not None,
        input_key=input_key,
        output=output,
        features=features,
    )
    classifier.training = module.training
    if example is not None:
        classifier.check(example)
    return classifier


def _width(
    module: nn.Module,
    modality: Modality,
    pixels: Pixels | None,
    input_key: str | None,
    output: int | None,
    example: Mapping[str, Tensor] | None,
) -> int:
    """Return the number of outputs of `module` on `example`.

    Raises:
        ConfigError: no example.
        NotApplicable: outputs that do not say which of them are the logits.
    """
    if example is None:
        raise ConfigError("wrap: expected num_classes, or example inputs to find it; got neither")
    probe = Classifier(module, num_classes=1, modality=modality, pixels=pixels, input_key=input_key)
    with _evaluating(module), torch.no_grad():
        found = probe.outputs(**example)
    found = _pick(found, 0, output) if not isinstance(found, Tensor) else found
    if found is None or found.ndim != 2:
        got = "several tensors" if found is None else f"shape {tuple(found.shape)}"
        raise NotApplicable(
            f"expected logits of shape (rows, classes) from {type(module).__name__}, got {got}; "
            "say num_classes=... and output=..."
        )
    return found.shape[1]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode, and every part back into its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _head_path(module: nn.Module, head: str | nn.Module | None, classes: int) -> tuple[str, ...]:
    if head is None:
        found = last_layer(module, classes)
        return () if found is None else (found,)
    paths = [path for path, part in module.named_modules() if path == head or part is head]
    if not paths:
        raise ConfigError(
            f"wrap: expected head to be a layer of {type(module).__name__}, got {head!r}; "
            "give the module itself or its path in named_modules()"
        )
    return (paths[0],)


def last_layer(module: nn.Module, outputs: int) -> str | None:
    """Return the path of the last registered layer with `outputs` outputs, linear ones first.

    The body of a Hugging Face model is passed over: its width may equal the number of classes.

    >>> last_layer(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)), 3)
    '2'
    """
    body = f"{getattr(module, 'base_model_prefix', '') or ' '}."
    named = [(path, layer) for path, layer in module.named_modules() if not path.startswith(body)]
    linear = [p for p, m in named if isinstance(m, nn.Linear) and m.out_features == outputs]
    convolved = [p for p, m in named if isinstance(m, nn.Conv2d) and m.out_channels == outputs]
    found = linear or convolved
    return found[-1] if found else None


def path_of(module: nn.Module, part: nn.Module) -> str | None:
    """Return the path of `part` in `module`, None if it is not in it."""
    return next((path for path, found in module.named_modules() if found is part), None)


def _keywords(backbone: nn.Module, input_key: str) -> frozenset[str] | None:
    """Names to pass by; None: one positional argument; empty: everything by name."""
    parameters = inspect.signature(backbone.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if input_key in named:
        return frozenset(named)
    positional = any(p.kind is not p.VAR_KEYWORD for p in parameters if p.name != "args")
    return None if positional else frozenset()


def _pick(outputs: Any, classes: int, position: int | None) -> Tensor | None:
    if isinstance(outputs, Tensor):
        return outputs
    if position is not None:
        return outputs[position]  # type: ignore[no-any-return]
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]  # type: ignore[no-any-return]
    if hasattr(outputs, "logits"):
        return outputs.logits  # type: ignore[no-any-return]
    items = outputs.values() if isinstance(outputs, Mapping) else outputs
    fitting = (x for x in items if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == classes)
    return next(fitting, None)


@contextmanager
def _captured(modules: Sequence[nn.Module]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Collect (input, output) of each module's last call inside the block."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(
        place: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        seen[place] = (args[0] if args else next(iter(kwargs.values())), output)

    handles = [
        module.register_forward_hook(functools.partial(keep, place), with_kwargs=True)
        for place, module in enumerate(modules)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _per_row(entering: Tensor, leaving: Tensor, logits: Tensor) -> Tensor:
    """Return one vector per row of what entered the head.

    Decoders score every token and return the scores of one: that token's vector is taken, found
    by its scores, because which token it is differs between families and versions. Convolutional
    heads: the mean over positions.
    """
    if entering.ndim == 4:
        return entering.mean(dim=(2, 3))
    if entering.ndim == 3:
        distance = (leaving - logits[:, None].to(leaving.dtype)).abs().sum(dim=2)
        chosen = distance.detach().argmin(dim=1)
        index = chosen[:, None, None].expand(-1, 1, entering.shape[2])
        return entering.gather(1, index).squeeze(1)
    return entering
