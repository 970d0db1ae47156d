"""Capture of what enters the linear layers of a model: views, columns, checks, Gram matrices.

A view shows a layer as `Y = W·columns(x) + b` with its true geometry. Nothing is believed: a view
is verified on a real batch before it is used, so no list of layer types is needed and a layer that
does something else with its weight is found out.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from unsc_plugin._windows import Workspace as Workspace
from unsc_plugin._windows import window_gram
from unsc_plugin.errors import ConfigError, NonFiniteError, nearest
from unsc_plugin.linalg import CHUNK, Gram

Kind = Literal["linear", "conv", "transposed", "conv1d"]
Patches = Literal["true", "interior"]
Inputs = Mapping[str, Tensor]

TOLERANCE = {torch.float64: 1e-9}
SINGLE = 1e-4
"""Largest relative Frobenius error of W·columns + b against a layer's output, float64 and below."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


# --------------------------------------------------------------------------- views


@dataclass(frozen=True)
class View:
    """One weight as rows that multiply columns, and the modules that use it.

    `parameter` is the weight's first name in the model and `bias` the bias's, None without one;
    `modules` are the names of all candidates that share the weight. W is [groups, out, d] with
    `out` outputs per group.
    """

    parameter: str
    bias: str | None
    modules: tuple[str, ...]
    kind: Kind
    groups: int
    out: int
    d: int

    @property
    def name(self) -> str:
        """Name of the first module that uses the weight."""
        return self.modules[0]

    @property
    def geometry(self) -> list[Any]:
        """What identifies the view in the key of a stored Gram."""
        return [self.parameter, list(self.modules), self.kind, self.groups, self.out, self.d]

    def rows(self, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as rows [groups, out, d]."""
        if self.kind == "conv1d":
            return weight.mT[None]
        if self.kind == "transposed":
            spatial = tuple(range(2, weight.ndim))
            split = weight.flip(spatial).reshape(self.groups, -1, *weight.shape[1:])
            return split.transpose(1, 2).reshape(self.groups, self.out, self.d)
        return weight.reshape(self.groups, self.out, self.d)

    def stored(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return rows [groups, out, d] in the shape of the weight `like`; undoes :meth:`rows`."""
        if self.kind == "conv1d":
            return rows[0].mT
        if self.kind == "transposed":
            inside = like.shape[0] // self.groups
            split = rows.reshape(self.groups, self.out, inside, *like.shape[2:])
            return split.transpose(1, 2).reshape(like.shape).flip(tuple(range(2, like.ndim)))
        return rows.reshape(like.shape)


def _kind_of(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, CONVOLUTIONS):
        return "conv"
    if isinstance(module, TRANSPOSED):
        return "transposed"
    weight = module._parameters.get("weight")
    shape = getattr(module, "nx", None), getattr(module, "nf", None)  # transformers' Conv1D
    return "conv1d" if weight is not None and tuple(weight.shape) == shape else None


def _shape_of(module: Any, kind: Kind) -> tuple[int, int, int]:
    """Return (groups, outputs per group, d)."""
    if kind == "linear":
        return 1, module.out_features, module.in_features
    if kind == "conv1d":
        return 1, module.nf, module.nx
    window = math.prod(module.kernel_size)
    groups = module.groups
    return groups, module.out_channels // groups, module.in_channels // groups * window


def views(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    *,
    max_dim: int | None = None,
) -> tuple[list[View], dict[str, str]]:
    """Return the views of all candidate layers and, for weights left out, parameter -> reason.

    Candidates are Linear layers, (transposed) convolutions of one to three dimensions, subclasses
    included, and transformers' Conv1D, whose module name matches a glob of `include` and none of
    `exclude`. Left out: weights that are no leaf parameter of their module (parametrised), came in
    with requires_grad False (unless all did), are shared with another kind of module, or have
    columns wider than `max_dim`.

    Raises:
        ConfigError: a glob that matches no candidate; lists the nearest names.
    """
    candidates = {
        name: module for name, module in model.named_modules() if _kind_of(module) is not None
    }
    for glob in (*include, *exclude):
        if glob != "*" and not fnmatch.filter(candidates, glob):
            close = nearest(glob, candidates) or list(candidates)[:5]
            raise ConfigError(
                f"glob {glob!r} matches no linear or convolutional layer; nearest names: "
                f"{', '.join(close) or 'none, the model has no such layer'}"
            )
    chosen = {
        name
        for name in candidates
        if any(fnmatch.fnmatch(name, glob) for glob in include)
        and not any(fnmatch.fnmatch(name, glob) for glob in exclude)
    }
    any_trainable = any(p.requires_grad for p in model.parameters())
    users = _users(model)
    names = {p: name for name, p in model.named_parameters()}
    found: list[View] = []
    frozen: dict[str, str] = {}
    for weight, modules in users.items():
        mine = [name for name in modules if name in candidates]
        if not mine:
            continue
        reason = _unfit(weight, modules, candidates, chosen, any_trainable)
        view = None if reason else _view(model, names[weight], mine, candidates)
        if view is not None and max_dim is not None and view.d > max_dim:
            reason = f"columns of {view.d} are wider than max_dim {max_dim}"
        if reason or view is None:
            frozen[names[weight]] = reason or "its modules read the weight in different shapes"
        else:
            found.append(view)
    for name, module in candidates.items():
        if module._parameters.get("weight") is None:
            inner = (p for key, p in module.named_parameters() if key != "bias")
            frozen |= {names[p]: f"the weight of {name} is computed from it" for p in inner}
    return found, frozen


def _users(model: nn.Module) -> dict[nn.Parameter, dict[str, str]]:
    """Return weight-like parameters -> {module name: attribute} of all modules that hold them."""
    users: dict[nn.Parameter, dict[str, str]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(parameter, {})[name] = attribute
    return {
        parameter: held
        for parameter, held in users.items()
        if any(attribute == "weight" for attribute in held.values())
    }


def _unfit(
    weight: nn.Parameter,
    modules: Mapping[str, str],
    candidates: Mapping[str, nn.Module],
    chosen: set[str],
    any_trainable: bool,
) -> str | None:
    others = [name for name in modules if name not in candidates]
    if others:
        return f"shared with {others[0]}, which is no linear layer"
    if not all(name in chosen for name in modules):
        return "left out by include or exclude"
    if any_trainable and not weight.requires_grad:
        return "came in with requires_grad False"
    if not weight.is_floating_point():
        return f"{weight.dtype} weights cannot be trained"
    if any(parametrize.is_parametrized(candidates[name]) for name in modules):
        return "parametrised"
    return None


def _view(
    model: nn.Module, parameter: str, modules: list[str], candidates: Mapping[str, nn.Module]
) -> View | None:
    kinds = {_kind_of(candidates[name]) for name in modules}
    shapes = {
        _shape_of(candidates[name], _kind_of(candidates[name]) or "linear") for name in modules
    }
    if len(kinds) > 1 or len(shapes) > 1:
        return None
    (kind,), ((groups, out, d),) = kinds, shapes
    assert kind is not None  # candidates have one
    biases = {candidates[name]._parameters.get("bias") for name in modules}
    bias = next(iter(biases)) if len(biases) == 1 else None
    name = next((n for n, p in model.named_parameters() if p is bias), None)
    return View(parameter, name, tuple(modules), kind, groups, out, d)


# --------------------------------------------------------------------------- columns


def columns(view: View, module: Any, x: Tensor, y: Tensor, patches: Patches = "true") -> Tensor:
    """Return the columns [groups, d, N] of the input `x` of a layer with output `y`.

    Linear: N rows of x flattened to [-1, d]. Convolution: N = batch × output positions, d ordered
    as (channel, kernel position), with the layer's stride, padding, dilation, groups and padding
    mode; where its own padding does not give the size of `y`, the layer pads inside (TensorFlow's
    "same"): (out−1)·s + (k−1)·dilation + 1 − in in all, the smaller half first. Transposed
    convolution: of the input with zeros between its pixels. `interior`: windows of stride 1 without
    padding or dilation, as published code reads them.
    """
    if view.kind in ("linear", "conv1d"):
        return x.reshape(-1, view.d).mT[None]
    if view.kind == "transposed":
        return _windows(_spread(module, x, y), module.kernel_size, (1,), module.dilation, view)
    if patches == "interior":
        if any(side < k for side, k in zip(x.shape[2:], module.kernel_size, strict=True)):
            return x.new_zeros(view.groups, view.d, 0)
        return _windows(x, module.kernel_size, (1,), (1,), view)
    return _windows(_padded(module, x, y), module.kernel_size, module.stride, module.dilation, view)


def _windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], view: View
) -> Tensor:
    """Return all windows of x [B, C, ...] as columns [groups, C/groups × window, B × positions]."""
    spatial = x.ndim - 2
    for axis in range(spatial):
        step = dilation[axis % len(dilation)]
        reach = (kernel[axis] - 1) * step + 1
        x = x.unfold(2 + axis, reach, stride[axis % len(stride)])[..., ::step]
    order = [1, *range(2 + spatial, 2 + 2 * spatial), 0, *range(2, 2 + spatial)]
    return x.permute(order).reshape(view.groups, view.d, -1)


def _padded(module: Any, x: Tensor, y: Tensor) -> Tensor:
    pads = _own_padding(module, x, y)
    if not any(itertools.chain(*pads)):
        return x
    flat = [side for pair in reversed(pads) for side in pair]
    if module.padding_mode == "zeros":
        return functional.pad(x, flat)
    return functional.pad(x, flat, mode=module.padding_mode)


def _own_padding(module: Any, x: Tensor, y: Tensor) -> list[tuple[int, int]]:
    """Return (left, right) per axis: the module's own padding, or what the output's size says."""
    pads = []
    for axis, (size, out) in enumerate(zip(x.shape[2:], y.shape[2:], strict=True)):
        k, step, d = module.kernel_size[axis], module.stride[axis], module.dilation[axis]
        reach = (k - 1) * d + 1
        if module.padding == "same":
            left, right = (reach - 1) // 2, reach - 1 - (reach - 1) // 2
        else:
            left = right = 0 if module.padding == "valid" else module.padding[axis]
        if (size + left + right - reach) // step + 1 != out:
            total = max((out - 1) * step + reach - size, 0)
            left, right = total // 2, total - total // 2
        pads.append((left, right))
    return pads


def _spread(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """Return x with stride − 1 zeros between its pixels, padded as a plain convolution needs it."""
    sizes, flat = [], []
    for axis, (size, out) in enumerate(zip(x.shape[2:], y.shape[2:], strict=True)):
        step = module.stride[axis]
        reach = (module.kernel_size[axis] - 1) * module.dilation[axis]
        wide = (size - 1) * step + 1
        left = reach - module.padding[axis]
        sizes.append(wide)
        flat.append((left, out + reach - wide - left))
    spread = x.new_zeros(*x.shape[:2], *sizes)
    pixels: Any = (..., *(slice(None, None, step) for step in module.stride))
    spread[pixels] = x
    return functional.pad(spread, [side for pair in reversed(flat) for side in pair])


# --------------------------------------------------------------------------- hooks


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Run the body without gradients, autocast and TF32; restore all of it."""
    switches = _precision_switches()
    before = [getattr(place, name) for place, name, _ in switches]
    try:
        for place, name, full in switches:
            setattr(place, name, full)
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False)
            if torch.cuda.is_available()
            else contextlib.nullcontext(),
        ):
            yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def _precision_switches() -> list[tuple[Any, str, Any]]:
    """Return (place, attribute, value for full float32) of all that makes products coarse.

    Newer torch has `fp32_precision` and refuses to read `allow_tf32` once the former was set.
    """
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    places = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    return [(place, "fp32_precision", "ieee") for place in places]


Seen = Callable[[View, nn.Module, Tensor, Tensor], None]


@contextlib.contextmanager
def watching(model: nn.Module, chosen: Iterable[View], seen: Seen) -> Iterator[None]:
    """Call `seen(view, module, x, y)` at every use of a view's modules; the model is in eval mode.

    The call is made inside the forward pass, before any later in-place operation can change x.
    """
    modes = {module: module.training for module in model.modules()}
    handles = []
    try:
        model.eval()
        for view in chosen:
            for name in view.modules:
                handles.append(_hooked(model.get_submodule(name), view, seen))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _hooked(module: nn.Module, view: View, seen: Seen) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        x = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        seen(view, module, x, y)

    return module.register_forward_hook(hook, with_kwargs=True)


def verify(model: nn.Module, inputs: Inputs, chosen: Sequence[View]) -> dict[str, str]:
    """Return parameter -> reason of every view that does not explain its layer on this batch.

    A view holds if its modules all fire, nothing else uses the weight, and at every call
    ‖W·columns(x) + b − y‖_F ≤ 1e-4·‖y − b‖_F (1e-9 in float64), rounding of y aside. A weight that
    is all zero is tried with random numbers in its place.

    Raises:
        NonFiniteError: the outputs of a layer are not finite.
    """
    wrong: dict[str, str] = {}
    fired: set[str] = set()

    def seen(view: View, module: nn.Module, x: Tensor, y: Any) -> None:
        fired.update(name for name in view.modules if model.get_submodule(name) is module)
        if not isinstance(y, Tensor):
            wrong[view.parameter] = f"its output is a {type(y).__name__}, not a tensor"
            return
        if not bool(torch.isfinite(y).all()):
            raise NonFiniteError(
                f"the outputs of layer {view.name} are not finite; the model or the data hold NaN "
                "or infinity"
            )
        error = _mismatch(view, module, x, y)
        if not error <= TOLERANCE.get(x.dtype, SINGLE):
            wrong[view.parameter] = f"its output is not W·x + b (relative error {error:.1e})"

    with exact(), watching(model, chosen, seen), _Elsewhere(model, chosen) as elsewhere:
        model(**inputs)
    for parameter in elsewhere.found:
        wrong.setdefault(parameter, "its weight is also used outside its layer")
    for view in chosen:
        silent = [name for name in view.modules if name not in fired]
        if silent:
            wrong[view.parameter] = f"{silent[0]} is never called; its weight is used elsewhere"
    return wrong


class _Elsewhere(TorchFunctionMode):
    """Notes the weights of views that something else than their modules computes with."""

    def __init__(self, model: nn.Module, chosen: Sequence[View]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.inside = 0
        parameters = dict(model.named_parameters())
        self.names = {id(parameters[view.parameter]): view.parameter for view in chosen}
        self.modules = [model.get_submodule(name) for view in chosen for name in view.modules]
        self.handles: list[Any] = []

    def __enter__(self) -> _Elsewhere:
        for module in self.modules:
            self.handles.append(module.register_forward_pre_hook(lambda *_: self._step(1)))
            self.handles.append(module.register_forward_hook(lambda *_: self._step(-1)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def _step(self, change: int) -> None:
        self.inside += change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside and isinstance(result, Tensor):
            for given in (*args, *(kwargs or {}).values()):
                for one in given if isinstance(given, (list, tuple)) else (given,):
                    if id(one) in self.names:
                        self.found.add(self.names[id(one)])
        return result


def _mismatch(view: View, module: Any, x: Tensor, y: Tensor) -> float:
    """Return ‖W·columns(x) + b − y‖ / ‖y − b‖, infinity where the shapes do not fit."""
    weight = module.weight
    if not bool(weight.detach().any()):
        with _filled(weight):
            return _mismatch(view, module, x, module.forward(x))
    try:
        found = columns(view, module, x, y)
    except (RuntimeError, ValueError, IndexError):
        return math.inf
    rows = view.rows(weight.detach()).to(found.dtype) @ found
    flat = rows.reshape(-1, found.shape[-1]).double()  # outputs of all groups, in their order
    wanted = (
        y.reshape(-1, y.shape[-1]).mT
        if view.kind in ("linear", "conv1d")
        else y.transpose(0, 1).reshape(y.shape[1], -1)
    ).double()
    if flat.shape != wanted.shape:
        return math.inf
    unit = min(torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps)
    rounding = 4 * unit * float(torch.linalg.vector_norm(wanted))
    bias = module._parameters.get("bias")
    if bias is not None:
        wanted = wanted - bias.detach().double()[:, None]
    scale = float(torch.linalg.vector_norm(wanted))
    error = max(float(torch.linalg.vector_norm(flat - wanted)) - rounding, 0.0)
    return error / scale if scale > 0 else error


@contextlib.contextmanager
def _filled(weight: Tensor) -> Iterator[None]:
    """Put other numbers than 0 into a weight for the body; they do not depend on any generator."""
    numbers = torch.arange(1, weight.numel() + 1, device=weight.device, dtype=torch.float64)
    weight.data.copy_((numbers * 0.6180339887 % 1 - 0.5).view_as(weight))
    try:
        yield
    finally:
        weight.data.zero_()


# --------------------------------------------------------------------------- Gram matrices


def collect_grams(
    model: nn.Module,
    batches: Iterable[Inputs],
    chosen: Sequence[View],
    *,
    limits: Mapping[str, int] | None = None,
    patches: Patches = "true",
    keep_padding: bool = False,
    room: Workspace | None = None,
) -> dict[str, Gram]:
    """Return parameter -> Gram of everything that enters the views over `batches`.

    Columns are multiplied in the model's precision and summed in float64; nothing is stored.
    Windows of a plain 2d convolution are never made: :func:`window_gram` finds their products, in
    float64. `room` is memory that several calls share.
    `limits` gives per parameter the number of first samples that are used. Token positions whose
    attention_mask is 0 are left out of layers that see [B, T, d], unless `keep_padding`.
    """
    device = next(model.parameters()).device
    grams = {view.parameter: Gram.zeros(view.groups, view.d, device) for view in chosen}
    used = room or Workspace()
    done = 0
    batch: Inputs = {}

    def seen(view: View, module: nn.Module, x: Tensor, y: Tensor) -> None:
        rows, mask = len(next(iter(batch.values()))), batch.get("attention_mask")
        limit = (limits or {}).get(view.parameter)
        if limit is not None and len(x) % rows == 0:  # windows of a sample follow one another
            left = min(max(limit - done, 0), rows)
            if not left:
                return
            x, y = x[: left * len(x) // rows], y[: left * len(y) // rows]
            mask = None if mask is None else mask[:left]
        if view.kind in ("linear", "conv1d"):
            real = None if keep_padding else mask
            flat = x.reshape(-1, view.d)
            if real is not None and x.ndim > 2 and x.shape[:2] == real.shape:
                flat = x[real.bool()].reshape(-1, view.d)
            grams[view.parameter].add(flat.mT[None])
            return
        if view.kind == "conv" and _shares(module, x, patches):
            kernel: Any = module.kernel_size
            padded = x if patches == "interior" else _padded(module, x, y)
            gram = grams[view.parameter]
            padded = padded.to(gram.matrix.device)
            gram.put(*window_gram(padded, view.groups, kernel, used))
            return
        positions = max(math.prod(y.shape[2:]), 1)
        for part, out in zip(
            torch.split(x, max(CHUNK // positions, 1)),
            torch.split(y, max(CHUNK // positions, 1)),
            strict=True,
        ):
            grams[view.parameter].add(columns(view, module, part, out, patches))

    with exact(), watching(model, chosen, seen):
        for batch in batches:
            model(**batch)
            done += len(next(iter(batch.values())))
    return grams


def _shares(module: Any, x: Tensor, patches: Patches) -> bool:
    plain = patches == "interior" or (set(module.stride) == {1} and set(module.dilation) == {1})
    return (
        plain
        and x.ndim == 4
        and min(module.kernel_size) > 1
        and module.in_channels // module.groups >= 8
        and all(side >= 2 * k for side, k in zip(x.shape[2:], module.kernel_size, strict=True))
    )


def padding_matters(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether the content of masked positions changes the logits of `inputs`.

    Masked token ids are replaced by other ids. Where that moves a logit by more than rounding, the
    model reads its padding, which must then be protected like everything else.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or mask is None or bool(mask.all()):
        return False
    real = ids[mask.bool()]
    if not len(real):
        return False
    second = next(iter(real[real != real[0]]), real[0])
    other = torch.where(mask.bool(), ids, torch.where(ids == real[0], second, real[0]))
    swapped = 0

    def swap(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal swapped
        if args and isinstance(args[0], Tensor) and torch.equal(args[0], ids):
            swapped += 1
            return (other, *args[1:])
        return None

    words = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    with exact(), watching(model, (), lambda *_: None):
        before = model(**inputs)
        handles = [module.register_forward_pre_hook(swap) for module in words]
        try:
            after = model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        if not swapped:
            after = model(**{**inputs, "input_ids": other})
    scale = before.abs().max().clamp(min=1e-30)
    return bool((before - after).abs().max() > 1e-5 * scale)
