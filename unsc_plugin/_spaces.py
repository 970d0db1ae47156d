"""Where inputs may be perturbed and in which units: pixels, word embeddings, table columns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unsc_plugin.errors import ConfigError, InputDomainError, NotApplicable
from unsc_plugin.runtime import quiet

Norm = Literal["l2", "linf"]
Inputs = Mapping[str, Any]

EDGE = 1e-6
"""How far rounding may carry a pixel out of [0, 1]."""

TINY = 1e-12
"""Norm below which a gradient is no direction."""


# --------------------------------------------------------------------------- spaces


@dataclass(frozen=True)
class Space:
    """What of some inputs may be perturbed, and in which units.

    Attributes:
        key: the input it belongs to: `pixel_values`, `input_ids` or `features`.
        x: what is perturbed (rows, ...), float32 or float64: pixels, the outputs (rows, T, E) of
            the word-embedding module, or features (rows, D).
        unit: length of 1 in the ball, per row (rows,); 0 for a row where nothing may move.
        lo: lower bounds, of a shape that broadcasts over the rows; None without a box.
        hi: upper bounds.
        mask: where x may move (rows, ...), broadcasting to x; None for everywhere.
        metric: σ per column (D,): norms are those of δ/σ; None for 1.
        path: the word-embedding module in the model, "" for other inputs.
        transposed: whether that module is called with tokens before rows.
        guessed_mask: whether special tokens are unknown, so that only padding is masked.
    """

    key: str
    x: Tensor
    unit: Tensor
    lo: Tensor | None = None
    hi: Tensor | None = None
    mask: Tensor | None = None
    metric: Tensor | None = None
    path: str = ""
    transposed: bool = False
    guessed_mask: bool = False

    def rows(self, positions: Any) -> Space:
        """Return the space of the rows at `positions` (an index tensor, list or slice)."""
        mask = None if self.mask is None else self.mask[positions]
        return replace(self, x=self.x[positions], mask=mask, unit=self.unit[positions])


def open_space(model: nn.Module, inputs: Inputs) -> Space:
    """Return where the inputs may be perturbed; the keys of `inputs` decide.

    | key | perturbed | box | what may move | unit |
    |---|---|---|---|---|
    | `pixel_values` | pixels | [0, 1] | all | 1 |
    | `input_ids` | word embeddings | none | real tokens that are not special | ē·√T |
    | `features` | columns | `model.feature_bounds` | `model.feature_numeric` | 1 |

    ē is the mean L2 norm of the row's embeddings at its T real, not special tokens (those of
    `attention_mask` 1 outside `model.special_token_ids`). Features are measured in units of
    `model.feature_scale`; columns of scale 0 stay fixed, and bounds are widened to hold the given
    values. The word-embedding module is the first `nn.Embedding` that one forward pass calls with
    `input_ids` or their transpose.

    Raises:
        InputDomainError: pixels outside [0, 1], or a model that takes normalised ones.
        NotApplicable: none or several of the keys, no embedding module that receives `input_ids`,
            whole-number features, or no numeric column.
        ConfigError: attributes of the model that do not fit the number of columns.
    """
    present = [key for key in _OPENERS if key in inputs]
    if len(present) != 1:
        raise NotApplicable(
            f"attack: expected exactly one of {', '.join(_OPENERS)}, got {sorted(inputs)}; "
            "perturb inputs of one kind, or use noise on features"
        )
    return _OPENERS[present[0]](model, inputs)


def _open_pixels(model: nn.Module, inputs: Inputs) -> Space:
    pixels = inputs["pixel_values"]
    wrap = "wrap with mean/std so that normalisation happens inside"
    if getattr(model, "pixel_domain", None) is False:
        raise InputDomainError(
            f"attack: expected a model that takes pixels in [0, 1], got one that does not: {wrap}"
        )
    if not pixels.is_floating_point():
        raise InputDomainError(
            f"attack: expected float pixels in [0, 1], got {pixels.dtype}; divide by their maximum"
        )
    lowest, highest = (float(end) for end in pixels.detach().aminmax())
    if not (lowest >= -EDGE and highest <= 1 + EDGE):
        raise InputDomainError(
            f"attack: expected pixels in [0, 1], got values in [{lowest:g}, {highest:g}]: {wrap}"
        )
    x = pixels.detach().to(_wide(model, pixels))
    return Space("pixel_values", x, x.new_ones(len(x)), x.new_tensor(0.0), x.new_tensor(1.0))


def _open_features(model: nn.Module, inputs: Inputs) -> Space:
    columns = inputs["features"]
    if not columns.is_floating_point():
        raise NotApplicable(
            f"attack: expected float features, got {columns.dtype} without an embedding layer; "
            "give standardised columns"
        )
    x = columns.detach().to(_wide(model, columns))
    told: dict[str, Tensor | None] = {}
    for name, dtype in (("bounds", x.dtype), ("numeric", torch.bool), ("scale", x.dtype)):
        value = getattr(model, f"feature_{name}", None)
        told[name] = None if value is None else value.to(x.device, dtype)
        if value is not None and value.shape[-1] != x.shape[-1]:
            raise ConfigError(
                f"attack: expected feature_{name} of {x.shape[-1]} columns, got "
                f"{tuple(value.shape)}; set it for the columns that the model takes"
            )
    numeric, scale, bounds = told["numeric"], told["scale"], told["bounds"]
    if scale is not None:
        numeric = (scale > 0) if numeric is None else numeric & (scale > 0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if numeric is not None and not bool(numeric.any()):
        raise NotApplicable(
            "attack: expected a numeric column to perturb, got categories only; "
            "perturb nothing (source none), or mark columns in feature_numeric"
        )
    lo, hi = (None, None) if bounds is None else (bounds[0], bounds[1])
    mask = None if numeric is None else numeric.expand(x.shape)
    return Space("features", x, x.new_ones(len(x)), lo, hi, mask, scale)


def _open_text(model: nn.Module, inputs: Inputs) -> Space:
    ids = inputs["input_ids"]
    if ids.ndim != 2:
        raise NotApplicable(
            f"attack: expected input_ids (rows, tokens), got shape {tuple(ids.shape)}; "
            "give one list of tokens per row"
        )
    path, transposed, vectors = _word_embedding(model, inputs)
    x = vectors.to(torch.float64 if vectors.dtype == torch.float64 else torch.float32)
    given = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if given is None else given == 1
    special = getattr(model, "special_token_ids", None)
    if special is not None:
        real = real & ~torch.isin(ids, torch.tensor(sorted(special)).to(ids))
    lengths = torch.where(real, torch.linalg.vector_norm(x, dim=-1), x.new_zeros(()))
    count = real.sum(dim=1).to(x.dtype)
    unit = lengths.sum(dim=1) / count.clamp(min=1).sqrt()  # = ē·√T
    return Space(
        "input_ids",
        x,
        unit,
        mask=real[..., None],
        path=path,
        transposed=transposed,
        guessed_mask=special is None,
    )


_OPENERS: Mapping[str, Callable[[nn.Module, Inputs], Space]] = {
    "pixel_values": _open_pixels,
    "input_ids": _open_text,
    "features": _open_features,
}


def _wide(model: nn.Module, x: Tensor) -> torch.dtype:
    """Return float64 for a float64 model (or inputs of one without parameters), else float32."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
    return torch.float64 if own == torch.float64 else torch.float32


def _word_embedding(model: nn.Module, inputs: Inputs) -> tuple[str, bool, Tensor]:
    """Return the path of the module that embeds the tokens, its orientation and output (n, T, E).

    A square batch gets its first row a second time, so that rows and tokens cannot be confused.

    Raises:
        NotApplicable: no `nn.Embedding` is called with the token ids.
    """
    ids = inputs["input_ids"]
    count = len(ids)
    if ids.shape[1] == count:
        inputs = picked(inputs, "input_ids", torch.tensor([*range(count), 0], device=ids.device))
        ids = inputs["input_ids"]
    found: list[tuple[str, bool, Tensor]] = []

    def watch(path: str, _: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        argument = args[0] if args else kwargs.get("input")
        for transposed, layout in ((False, ids), (True, ids.T)):
            if not found and isinstance(argument, Tensor) and torch.equal(argument, layout):
                found.append((path, transposed, output))

    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                hook = functools.partial(watch, path)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(quiet(model))
        stack.enter_context(torch.no_grad())
        model(**inputs)
    if not found:
        raise NotApplicable(
            f"attack: expected an nn.Embedding of {type(model).__name__} that receives input_ids, "
            "found none; use source none, or noise on features"
        )
    path, transposed, vectors = found[0]
    return path, transposed, (vectors.transpose(0, 1) if transposed else vectors)[:count]


def picked(inputs: Inputs, key: str, positions: Tensor) -> dict[str, Any]:
    """Return the rows at `positions` of every input that has rows."""
    count = len(inputs[key])
    return {
        name: value[positions]
        if isinstance(value, Tensor) and value.shape[:1] == (count,)
        else value
        for name, value in inputs.items()
    }


# --------------------------------------------------------------------------- norms and projections


def norms(space: Space, delta: Tensor, norm: Norm = "l2") -> Tensor:
    """Return ‖δ/σ‖ of every row (rows,), L2 or linf, in at least float32."""
    flat = _metric(space, delta).flatten(1)
    return lengths(flat) if norm == "l2" else flat.abs().amax(dim=1)


def impose(space: Space, delta: Tensor, radius: Tensor, norm: Norm = "l2") -> Tensor:
    """Return δ in the box and in the ball of `radius` (rows,).

    L2: δ ← clip(x+δ, lo, hi) − x, then δ ← δ·min(1, radius/‖δ/σ‖). The ball comes last, because
    shrinking towards x cannot leave a box that holds x. Linf: δ/σ is clipped to ±radius, then to
    the box. Needed again wherever a stored δ was rounded to another precision.
    """
    wide = delta.to(space.x)
    radius = radius.to(wide)
    if norm == "linf":
        reach = spread(radius, wide) * (1 if space.metric is None else space.metric.to(wide))
        return in_box(space, wide.clamp(-reach, reach))
    wide = in_box(space, wide)
    return wide * spread((radius / norms(space, wide).clamp(min=TINY)).clamp(max=1), wide)


def _metric(space: Space, delta: Tensor) -> Tensor:
    wide = delta if delta.dtype == torch.float64 else delta.float()
    return wide if space.metric is None else wide / space.metric.to(wide)


def scaled(space: Space, direction: Tensor, radius: Tensor) -> Tensor:
    """Return δ = σ·radius·direction for directions in metric coordinates."""
    moved = direction * spread(radius, direction)
    return moved if space.metric is None else moved * space.metric.to(moved)


def lengths(flat: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return found


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per row (rows,) in a shape that broadcasts over the rest of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def masked(space: Space, delta: Tensor) -> Tensor:
    return delta if space.mask is None else torch.where(space.mask, delta, delta.new_zeros(()))


def in_box(space: Space, delta: Tensor) -> Tensor:
    return delta if space.lo is None else boxed(space, space.x, space.x + delta) - space.x


def boxed(space: Space, x: Tensor, point: Tensor) -> Tensor:
    """Return `point` clipped to the box; that of features is widened to hold the values x."""
    if space.lo is None or space.hi is None:
        return point
    lo, hi = space.lo.to(point), space.hi.to(point)
    if space.key == "features":
        lo, hi = torch.minimum(lo, x.to(lo)), torch.maximum(hi, x.to(hi))
    return torch.clamp(point, lo, hi)
