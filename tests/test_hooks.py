"""What enters a layer: columns against torch, what is found out, what is counted, what is left."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from unsc_plugin import hooks
from unsc_plugin.errors import ConfigError, NonFiniteError
from unsc_plugin.hooks import View, collect_grams, columns, exact, padding_matters, verify, views
from unsc_plugin.hooks import watching as watched
from unsc_plugin.linalg import Gram, Projector, balanced_basis
from unsc_plugin.models import build, resolve
from unsc_plugin.registry import load
from unsc_plugin.spec import DataInfo

torch.set_num_threads(1)

DOUBLE = torch.float64


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def relative(one: Tensor, other: Tensor) -> float:
    scale = torch.linalg.vector_norm(other.double())
    return float(torch.linalg.vector_norm((one - other).double()) / scale)


def only_view(module: nn.Module) -> View:
    found, frozen = views(module)
    assert not frozen
    (view,) = found
    return view


def seen_by(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, list[tuple[Tensor, ...]]]:
    """Return copies of (x, y) of every call of every view, keyed by parameter."""
    calls: dict[str, list[tuple[Tensor, ...]]] = {}

    def note(view: View, module: nn.Module, x: Tensor, y: Tensor) -> None:
        calls.setdefault(view.parameter, []).append((x.clone(), y.clone()))

    with torch.no_grad(), watched(model, views(model)[0], note):
        model(**inputs)
    return calls


def covered(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[list[View], dict[str, str]]:
    """Return the views that hold, and all the rest with its reasons."""
    found, frozen = views(model)
    wrong = verify(model, inputs, found)
    return [view for view in found if view.parameter not in wrong], {**frozen, **wrong}


def share(model: nn.Module, found: list[View]) -> float:
    """Return the share of the parameters that the views hold."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(sizes[view.parameter] for view in found) / sum(sizes.values())


class Net(nn.Module):
    """A model with one named input `x` made of the modules and the forward function given."""

    def __init__(self, forward: Callable[..., Tensor] | None = None, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        if self.run is not None:
            return self.run(self, x)
        for module in self.children():
            x = module(x)
        return x


# --------------------------------------------------------------------------- columns


def convolution(spatial: int, seed: int) -> tuple[nn.Module, Tensor]:
    """Return a random convolution in float64 and an input it takes."""
    pick = random.Random(1000 * spatial + seed)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    groups = pick.choice([1, 1, 2, 3])
    kernel = [pick.randint(1, 4 if spatial < 3 else 3) for _ in range(spatial)]
    dilation = [pick.randint(1, 3 if spatial < 3 else 2) for _ in range(spatial)]
    mode = pick.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    padding: Any = pick.choice(["same", "valid", None, None])
    stride = [1 if padding == "same" else pick.randint(1, 3) for _ in range(spatial)]
    if padding is None:
        padding = [pick.randint(0, 2) for _ in range(spatial)]
    with seeded(seed):
        module = kind(
            groups * pick.randint(1, 3),
            groups * pick.randint(1, 3),
            kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=pick.random() < 0.7,
            padding_mode=mode,
        )
    reaches = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    sides = [max(reach, 2) + pick.randint(1, 4) for reach in reaches]  # reflection needs pixels
    return module.double(), draws(pick.randint(1, 3), module.in_channels, *sides)


def transposed(spatial: int, seed: int) -> tuple[nn.Module, Tensor]:
    """Return a random transposed convolution in float64 and an input it takes."""
    pick = random.Random(2000 * spatial + seed)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]
    groups = pick.choice([1, 2, 3])
    kernel = [pick.randint(1, 3) for _ in range(spatial)]
    stride = [pick.randint(1, 3) for _ in range(spatial)]
    dilation = [pick.randint(1, 2) for _ in range(spatial)]
    more = [pick.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
    with seeded(seed):
        module = kind(
            groups * pick.randint(1, 3),
            groups * pick.randint(1, 2),
            kernel,
            stride=stride,
            padding=[pick.randint(0, 1) for _ in range(spatial)],
            output_padding=more,
            dilation=dilation,
            groups=groups,
            bias=pick.random() < 0.7,
        )
    sides = [pick.randint(3, 5) for _ in range(spatial)]
    return module.double(), draws(pick.randint(1, 3), module.in_channels, *sides)


def plain(kind: str, seed: int) -> tuple[nn.Module, Tensor]:
    with seeded(seed):
        module = nn.Linear(5, 4, bias=seed % 2 == 0) if kind == "linear" else Conv1D(4, 5)
    shape = [(7, 5), (2, 3, 5), (2, 3, 2, 5), (5,)][seed % 4]
    return module.double(), draws(*shape, seed=seed)


CASES = [
    pytest.param(make, kind, seed, id=f"{make.__name__}-{kind}-{seed}")
    for make, kinds, seeds in (
        (convolution, (1, 2, 3), 40),
        (transposed, (1, 2, 3), 15),
        (plain, ("linear", "conv1d"), 4),
    )
    for kind in kinds
    for seed in range(seeds)
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("make", "kind", "seed"), CASES)
def test_weight_times_columns_is_the_layer_and_its_gradient(make, kind, seed):
    module, x = make(kind, seed)
    view = only_view(module)
    y = module(x)
    found = columns(view, module, x, y)
    assert found.shape[:2] == (view.groups, view.d)
    rows = view.rows(module.weight.detach())
    assert rows.shape == (view.groups, view.out, view.d)
    out = (rows @ found).reshape(view.groups * view.out, -1)
    if module.bias is not None:
        out = out + module.bias.detach()[:, None]
    channels_last = view.kind in ("linear", "conv1d")
    flat = y.reshape(-1, y.shape[-1]).mT if channels_last else y.transpose(0, 1).flatten(1)
    assert torch.allclose(out, flat, rtol=0, atol=1e-12)
    assert verify(module, {"x" if view.kind == "conv1d" else "input": x}, [view]) == {}

    slope = draws(*flat.shape, seed=seed + 1)  # the gradient lives in the span of the columns
    (gradient,) = torch.autograd.grad((flat * slope).sum(), module.weight)
    wanted = slope.reshape(view.groups, view.out, -1) @ found.mT
    assert torch.allclose(view.rows(gradient), wanted, rtol=0, atol=1e-11)
    assert torch.equal(view.stored(rows, module.weight), module.weight)


def test_channel_comes_before_kernel_row_before_kernel_column():
    module = nn.Conv2d(3, 2, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)).double()
    x = draws(2, 3, 7, 9)
    found = columns(only_view(module), module, x, module(x))
    wanted = functional.unfold(x, (2, 3), dilation=(1, 2), padding=(1, 2), stride=(2, 1))
    assert torch.equal(found[0], wanted.transpose(0, 1).flatten(1))


def test_a_small_map_with_a_wide_kernel_is_not_empty():
    module = nn.Conv2d(2, 3, 3, padding=1).double()
    grams = collect_grams(module, [{"input": draws(4, 2, 2, 2)}], [only_view(module)])
    assert grams["weight"].count == 16
    assert int(torch.linalg.matrix_rank(grams["weight"].matrix[0])) > 4


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_convolution_that_pads_inside_is_understood(kernel, stride, dilation):
    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            pads = []
            for size in reversed(x.shape[2:]):
                reach = (kernel - 1) * dilation + 1
                total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
                pads += [total // 2, total - total // 2]
            return self._conv_forward(functional.pad(x, pads), self.weight, self.bias)

    model = Same(2, 3, kernel, stride=stride, dilation=dilation).double()
    for sides in ((6, 9), (7, 8), (10, 11)):
        assert verify(model, {"x": draws(2, 2, *sides)}, [only_view(model)]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        nn.ConvTranspose2d(4, 6, (2, 3), groups=2),
        nn.Linear(3, 2),
        Conv1D(2, 3),
    ],
    ids=["conv", "channels_last", "transposed", "linear", "conv1d"],
)
def test_rows_and_back_keep_every_bit(module, dtype):
    weight, view = copy.deepcopy(module).to(dtype).weight.detach(), only_view(module)
    rows = view.rows(weight)
    assert rows.dtype == dtype
    assert rows.shape == (view.groups, view.out, view.d)
    assert torch.equal(view.stored(rows, weight), weight)


def test_channels_last_images_and_weights_are_the_same_columns():
    module = nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
    x, view = draws(2, 4, 5, 6), only_view(module)
    wanted = columns(view, module, x, module(x))
    module, x = (
        module.to(memory_format=torch.channels_last),
        x.contiguous(memory_format=torch.channels_last),
    )
    assert torch.equal(columns(view, module, x, module(x)), wanted)
    assert verify(module, {"input": x}, [view]) == {}


@pytest.mark.parametrize(
    ("kernel", "side", "count"), [(3, 5, 9), (3, 3, 1), (1, 4, 16), (3, 2, 0), (5, 4, 0)]
)
def test_interior_patches_have_stride_one_and_no_padding(kernel, side, count):
    module = nn.Conv2d(2, 3, kernel, stride=2, padding=2, dilation=1).double()
    x, view = draws(3, 2, side, side), only_view(module)
    gram = collect_grams(module, [{"input": x}], [view], patches="interior")["weight"]
    assert gram.count == 3 * count
    if count == 0:
        assert not gram.matrix.any()
        return
    wanted = functional.unfold(x, kernel).transpose(0, 1).flatten(1)
    assert relative(gram.matrix[0], wanted @ wanted.mT) <= 1e-14


def test_interior_patches_leave_dilation_and_padding_mode_out():
    module = nn.Conv2d(2, 3, 2, padding=1, dilation=3, padding_mode="circular").double()
    x, view = draws(1, 2, 6, 5), only_view(module)
    found = columns(view, module, x, module(x), "interior")
    assert torch.equal(found[0], functional.unfold(x, 2).transpose(0, 1).flatten(1))


# --------------------------------------------------------------------------- candidates


def zoo() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Linear(6, 5), nn.PReLU(), nn.LayerNorm(5),
        nn.ConvTranspose1d(4, 2, 2), Conv1D(3, 6), nn.Embedding(4, 3), nn.Bilinear(2, 2, 2),
    )  # fmt: skip


def test_candidates_are_the_linear_maps_only():
    found, frozen = views(zoo())
    kinds = {view.name: (view.kind, view.groups, view.out, view.d) for view in found}
    assert kinds == {
        "0": ("conv", 1, 4, 6),
        "2": ("linear", 1, 5, 6),
        "5": ("transposed", 1, 2, 8),
        "6": ("conv1d", 1, 3, 6),
    }
    assert [view.bias for view in found] == ["0.bias", "2.bias", "5.bias", "6.bias"]
    assert frozen == {}


def test_subclasses_are_candidates_and_no_bias_is_none():
    class Mine(nn.Linear):
        pass

    view = only_view(nn.Sequential(Mine(3, 2, bias=False)))
    assert (view.kind, view.bias, view.parameter, view.modules) == (
        "linear", None, "0.weight", ("0",),
    )  # fmt: skip


def test_a_model_that_is_a_layer_is_covered():
    model = nn.Linear(3, 2)
    found, wrong = covered(model, {"input": draws(4, 3, dtype=torch.float32)})
    assert [view.parameter for view in found] == ["weight"]
    assert wrong == {}
    assert collect_grams(model, [{"input": torch.ones(4, 3)}], found)["weight"].count == 4


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (("*",), (), "a b.0 b.1 head"),
        (("b.*",), (), "b.0 b.1"),
        (("b.*", "head"), ("*.1",), "b.0 head"),
        ((), (), ""),
        (("*",), ("*",), ""),
    ],
)
def test_globs_choose_by_module_name(include, exclude, names):
    body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = Net(a=nn.Linear(2, 2), b=body, head=nn.Linear(2, 2))
    found, frozen = views(model, include, exclude)
    assert " ".join(view.name for view in found) == names
    assert len(found) + len(frozen) == 4
    assert set(frozen.values()) <= {"left out by include or exclude"}


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_glob_without_a_match_names_the_nearest_layers(where):
    model = Net(encoder=nn.Linear(2, 2), norm=nn.BatchNorm1d(2), head=nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"encodr.*nearest names: encoder"):
        views(model, **{where: ("encodr",)})
    with pytest.raises(ConfigError, match="head"):
        views(model, **{where: ("zzzzzz*",)})
    with pytest.raises(ConfigError, match="norm"):
        views(model, **{where: ("norm",)})


def test_a_model_without_layers_says_so():
    assert views(nn.BatchNorm1d(3)) == ([], {})
    with pytest.raises(ConfigError, match="no such layer"):
        views(nn.BatchNorm1d(3), ("conv*",))


def test_weights_that_came_in_frozen_stay_frozen_unless_all_did():
    model = Net(a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    model.a.weight.requires_grad_(False)
    found, frozen = views(model)
    assert [view.name for view in found] == ["b"]
    assert frozen == {"a.weight": "came in with requires_grad False"}
    model.requires_grad_(False)
    assert [view.name for view in views(model)[0]] == ["a", "b"]


def test_wide_columns_are_left_out():
    model = Net(a=nn.Linear(9, 2), b=nn.Conv2d(2, 4, 2), c=nn.Conv2d(4, 4, 3, groups=2))
    found, frozen = views(model, max_dim=8)
    assert [view.name for view in found] == ["b"]
    assert set(frozen) == {"a.weight", "c.weight"}
    assert "9" in frozen["a.weight"]
    assert "8" in frozen["a.weight"]


def test_integer_weights_are_left_out():
    model = Net(a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    model.b.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    model.requires_grad_(False)
    found, frozen = views(model)
    assert [view.name for view in found] == ["a"]
    assert "int8" in frozen["b.weight"]


def old_weight_norm(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch, alive in checkpoints
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        old_weight_norm,
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "pruned"],
)
def test_a_weight_that_is_computed_is_left_out_and_listed(change):
    model = Net(a=nn.Linear(3, 3), b=change(nn.Linear(3, 3)))
    found, frozen = views(model)
    assert [view.name for view in found] == ["a"]
    assert len(frozen) >= 1
    assert all(name.startswith("b.") for name in frozen)
    assert all(frozen.values())


def test_a_layer_with_a_parametrised_bias_is_left_out():
    model = Net(a=nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model.a, "bias", nn.Tanh())
    assert views(model) == ([], {"a.weight": "parametrised"})


# --------------------------------------------------------------------------- shared weights


def test_layers_that_share_a_weight_share_a_gram():
    model = Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4)).double()
    model.b.weight = model.a.weight
    view = only_view(model)
    assert view.modules == ("a", "b")
    assert view.parameter == "a.weight"
    assert view.bias is None  # each has its own
    inputs = {"x": draws(6, 4)}
    assert verify(model, inputs, [view]) == {}
    gram = collect_grams(model, [inputs], [view])["a.weight"]
    entering = torch.cat([inputs["x"], model.a(inputs["x"]).detach()])
    assert relative(gram.matrix[0], entering.mT @ entering) <= 1e-14
    assert gram.count == 12


def test_a_weight_shared_with_an_embedding_is_left_out():
    model = Net(table=nn.Embedding(7, 4), head=nn.Linear(4, 7))
    model.head.weight = model.table.weight
    found, frozen = views(model)
    assert found == []
    assert list(frozen) == ["table.weight"]
    assert "table" in frozen["table.weight"]


def test_a_weight_shared_under_another_name_is_left_out():
    class Holder(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.kernel = weight

    layer = nn.Linear(3, 3)
    found, frozen = views(nn.Sequential(layer, Holder(layer.weight)))
    assert found == []
    assert "shared with 1" in frozen["0.weight"]


def test_a_weight_shared_with_a_layer_left_out_is_left_out():
    model = Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    found, frozen = views(model, exclude=("b",))
    assert found == []
    assert frozen == {"a.weight": "left out by include or exclude"}


def test_a_weight_read_in_two_shapes_is_left_out():
    model = Net(a=nn.Conv1d(4, 4, 1), b=nn.Conv1d(8, 4, 1, groups=2), c=nn.Linear(2, 2))
    model.b.weight = model.a.weight
    found, frozen = views(model)
    assert [view.name for view in found] == ["c"]
    assert "different shapes" in frozen["a.weight"]


def test_calls_of_one_module_add_up():
    model = Net(lambda net, x: net.a(net.a(net.a(x))), a=nn.Linear(4, 4)).double()
    x = draws(5, 4)
    entering = torch.cat([x, model.a(x), model.a(model.a(x))]).detach()
    gram = collect_grams(model, [{"x": x}], [only_view(model)])["a.weight"]
    assert gram.count == 15
    assert relative(gram.matrix[0], entering.mT @ entering) <= 1e-14


def test_one_module_under_two_names_is_one_view():
    layer = nn.Linear(4, 4)
    model = Net(lambda net, x: net.b(net.a(x)), a=layer, b=layer).double()
    view = only_view(model)
    assert view.modules == ("a",)
    assert collect_grams(model, [{"x": draws(5, 4)}], [view])["a.weight"].count == 10


def test_shared_weights_of_which_one_layer_is_never_called_are_left_out():
    model = Net(lambda net, x: net.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    found, wrong = covered(model, {"x": torch.rand(2, 4)})
    assert found == []
    assert "b is never called" in wrong["a.weight"]


# --------------------------------------------------------------------------- verification


class Standardised(nn.Conv2d):
    """Uses (W − mean) / std in place of W."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        weight = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        return functional.conv2d(x, weight.view_as(self.weight), self.bias)


class Cosine(nn.Linear):
    """Normalises what enters it, as the heads of metric learning do."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.normalize(x, dim=-1), self.weight, self.bias)


class Pair(nn.Linear):
    """Returns its output with something beside it."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class Clamped(nn.Linear):
    """Is a linear layer on small inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-5, 5)


def test_a_standardised_weight_is_found_out():
    model = Net(a=nn.Conv2d(2, 3, 3), b=Standardised(3, 3, 1))
    found, wrong = covered(model, {"x": draws(2, 2, 5, 5, dtype=torch.float32)})
    assert [view.name for view in found] == ["a"]
    assert "not W·x + b" in wrong["b.weight"]


def test_a_layer_that_normalises_its_input_is_found_out():
    found, wrong = covered(Net(a=Cosine(4, 3)), {"x": draws(5, 4, dtype=torch.float32)})
    assert found == []
    assert "not W·x + b" in wrong["a.weight"]


def test_a_layer_that_returns_more_than_its_output_is_left_out():
    model = Net(lambda net, x: net.b(net.a(x)[0]), a=Pair(4, 4), b=nn.Linear(4, 2))
    found, wrong = covered(model, {"x": draws(5, 4, dtype=torch.float32)})
    assert [view.name for view in found] == ["b"]
    assert list(wrong) == ["a.weight"]


@pytest.mark.parametrize("first", [0, 1])
def test_every_call_is_checked(first):
    model = Net(lambda net, x: net.a(x * (1, 1000)[first]) + net.a(x * (1000, 1)[first]),
                a=Clamped(4, 4))  # fmt: skip
    assert verify(model, {"x": 0.01 * draws(3, 4, dtype=torch.float32)}, [only_view(model)])
    mild = Net(lambda net, x: net.a(x) + net.a(-x), a=Clamped(4, 4))
    assert not verify(mild, {"x": 0.01 * draws(3, 4, dtype=torch.float32)}, [only_view(mild)])


def test_layers_never_called_are_left_out_with_their_name():
    model = Net(lambda net, x: functional.linear(x, net.a.weight) + net.b(x),
                a=nn.Linear(4, 4), b=nn.Linear(4, 4))  # fmt: skip
    found, wrong = covered(model, {"x": torch.rand(2, 4)})
    assert [view.name for view in found] == ["b"]
    assert "a is never called" in wrong["a.weight"]


def test_attention_of_torch_is_left_out():
    def attend(net: Net, x: Tensor) -> Tensor:
        return net.head(net.attention(x, x, x)[0])

    model = Net(attend, attention=nn.MultiheadAttention(4, 2), head=nn.Linear(4, 2))
    found, wrong = covered(model, {"x": torch.rand(3, 2, 4)})
    assert [view.name for view in found] == ["head"]
    assert set(wrong) == {"attention.out_proj.weight"}


@pytest.mark.parametrize(("dtype", "passes"), [(torch.float32, True), (DOUBLE, False)])
def test_double_precision_is_held_to_more(dtype, passes):
    model = Net(lambda net, x: net.a(x), a=nn.Linear(4, 4)).to(dtype)
    model.a.register_forward_hook(lambda _, __, y: y * (1 + 1e-6))
    assert (verify(model, {"x": draws(5, 4, dtype=dtype)}, [only_view(model)]) == {}) == passes


def test_outputs_that_another_hook_changes_are_found_out():
    model = Net(a=nn.Linear(4, 4))
    model.a.register_forward_hook(lambda _, __, y: y + 1)
    assert verify(model, {"x": torch.rand(2, 4)}, [only_view(model)])


def test_inputs_that_another_hook_changes_are_captured_as_changed():
    model = Net(a=nn.Linear(4, 4)).double()
    model.a.register_forward_pre_hook(lambda _, args: (3 * args[0],))
    x, view = draws(5, 4), only_view(model)
    assert verify(model, {"x": x}, [view]) == {}
    found = collect_grams(model, [{"x": x}], [view])["a.weight"]
    assert relative(found.matrix[0], 9 * x.mT @ x) <= 1e-14


def test_inputs_given_by_name_are_seen():
    model = Net(lambda net, x: net.a(input=x), a=nn.Linear(4, 4)).double()
    x, view = draws(5, 4), only_view(model)
    assert verify(model, {"x": x}, [view]) == {}
    assert collect_grams(model, [{"x": x}], [view])["a.weight"].count == 5


def test_layers_of_zeros_hold():
    model = Net(a=nn.Linear(4, 4))
    nn.init.zeros_(model.a.weight)
    nn.init.zeros_(model.a.bias)
    assert verify(model, {"x": torch.rand(2, 4)}, [only_view(model)]) == {}


def test_an_image_without_a_batch_axis_is_not_mistaken():
    for module, x in ((nn.Conv2d(2, 3, 3), (2, 5, 5)), (nn.Conv1d(2, 3, 3), (2, 7))):
        wrong = verify(module, {"input": torch.rand(*x)}, [only_view(module)])
        assert list(wrong) == ["weight"]


def test_outputs_that_are_not_finite_name_the_layer():
    model = Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    nn.init.constant_(model.b.bias, math.nan)
    with pytest.raises(NonFiniteError, match="layer b"):
        verify(model, {"x": torch.rand(2, 4)}, views(model)[0])


def test_half_precision_is_never_believed_without_proof():
    """Rounding alone exceeds the tolerance, so such a model has to be raised first."""
    model = nn.Linear(64, 32).bfloat16()
    x = draws(16, 64, dtype=torch.bfloat16)
    assert verify(model, {"input": x}, [only_view(model)])
    assert not verify(model.float(), {"input": x.float()}, [only_view(model)])


# --------------------------------------------------------------------------- real models


TIMM = {
    "resnet18": (0.999, {}, 32),
    "tf_mobilenetv3_small_100": (0.990, {}, 32),
    "tf_efficientnet_b0": (0.987, {}, 32),
    "convnext_atto": (0.995, {}, 32),
    "vit_tiny_patch16_224": (0.988, {"img_size": 32}, 32),
    "swin_tiny_patch4_window7_224": (0.997, {"img_size": 56}, 56),
    "mixer_s32_224": (0.998, {"img_size": 64}, 64),
    "maxvit_rmlp_pico_rw_256": (0.990, {"img_size": 64}, 64),
    "coat_tiny": (0.991, {"img_size": 64}, 64),
    "densenet121": (0.988, {}, 32),
    "beit_base_patch16_224": (0.750, {"img_size": 32}, 32),
    "eva02_tiny_patch14_224": (0.744, {"img_size": 28}, 28),
    "resnetv2_50x1_bit": (0.001, {}, 32),
    "nf_resnet26": (0.001, {}, 32),
}


@pytest.mark.parametrize("name", TIMM)
def test_how_much_of_a_timm_model_is_covered(name):
    wanted, more, side = TIMM[name]
    with seeded(0):
        model = timm.create_model(name, num_classes=10, **more)
        inputs = {"x": torch.rand(1, 3, side, side)}
    found, wrong = covered(model, inputs)
    assert share(model, found) == pytest.approx(wanted, abs=0.02)
    bypassed = [reason for reason in wrong.values() if "never called" in reason]
    assert len(bypassed) == (12 if name.startswith(("beit", "eva02")) else 0)
    head = model.get_classifier()
    assert any(model.get_submodule(view.name) is head for view in found)


@pytest.mark.parametrize("name", ["nf_resnet26", "resnetv2_50x1_bit"])
def test_standardised_convolutions_of_timm_are_far_off(name):
    with seeded(0):
        model = timm.create_model(name, num_classes=10)
        found, wrong = covered(model, {"x": torch.rand(1, 3, 32, 32)})
    assert [view.kind for view in found] in (["linear"], ["conv"])  # the head
    errors = [float(reason.split("error ")[1].rstrip(")")) for reason in wrong.values()]
    assert min(errors) > 0.1


TEXT_TYPES = "bert roberta electra albert mpnet deberta-v2 modernbert distilbert gpt2 llama"
IMAGE_TYPES = "vit beit swin convnext resnet"
REGISTERED = load().entries("backbones")
LOCAL = [name for name, entry in REGISTERED.items() if entry.source != "hf"]  # the hub is far away


def toy(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a small classifier with an input; texts come with padding."""
    entry = resolve(name if name in REGISTERED else f"hf-config:{name}", REGISTERED)
    if name not in TEXT_TYPES.split() and entry.modality != "text":
        info = DataInfo(
            name="toy", modality="image", num_classes=5, input_shape=(3, 16, 16), labels_sha256=""
        )
        return build(entry, info, seed=3), {"pixel_values": draws(2, 3, 16, 16).float().sigmoid()}
    info = DataInfo(
        name="toy", modality="text", num_classes=5, input_shape=(9,), labels_sha256="",
        vocab_size=40, pad_token_id=0,
    )  # fmt: skip
    ids = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(7))
    ids[0, 5:] = ids[1, 7:] = 0
    return build(entry, info, seed=3), {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("name", [*TEXT_TYPES.split(), *IMAGE_TYPES.split(), *LOCAL])
def test_every_layer_of_a_small_classifier_is_covered(name):
    model, inputs = toy(name)
    found, wrong = covered(model, inputs)
    assert wrong == {}
    assert share(model, found) > 0.6
    maps = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, Conv1D))}
    assert len(found) == len(maps)


@pytest.mark.parametrize("name", TEXT_TYPES.split())
def test_what_stands_under_the_mask_does_not_enter(name):
    model, inputs = toy(name)
    model = model.double()
    found, _ = covered(model, inputs)
    mask, ids = inputs["attention_mask"].bool(), inputs["input_ids"]
    other = {**inputs, "input_ids": torch.where(mask, ids, (ids + 17) % 39 + 1)}
    before, after = (collect_grams(model, [given], found) for given in (inputs, other))
    tokens = int(mask.sum())
    seen = [view for view in found if before[view.parameter].count % tokens == 0]
    assert len(seen) >= len(found) - 3  # the rest sees pooled tokens
    for view in seen:
        one, two = before[view.parameter].matrix, after[view.parameter].matrix
        assert relative(one, two) <= 1e-12, view.parameter
    if name != "deberta-v2":  # which erases masked tokens itself
        one, two = (collect_grams(model, [g], seen, keep_padding=True) for g in (inputs, other))
        assert any(relative(two[at].matrix, gram.matrix) > 1e-3 for at, gram in one.items())


# --------------------------------------------------------------------------- Gram matrices


class Mixed(nn.Module):
    """Every kind of layer, with in-place operations before and after each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=3, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2)
        self.token = Conv1D(6, 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = functional.relu_(self.norm(self.first(x)))
        x.zero_()
        g = self.depth(h)
        h.mul_(0)
        h = self.up(functional.silu(g, inplace=True))
        g.fill_(7)
        h = h.flatten(2).mT.contiguous()
        t = self.token(h)
        h.fill_(math.nan)
        return self.head(self.drop(functional.gelu(t)).mean(1))


def mixed(seed: int = 0, dtype: torch.dtype = DOUBLE) -> Mixed:
    with seeded(seed):
        model = Mixed()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model.to(dtype)


def images(count: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return draws(count, 2, 7, 6, seed=seed, dtype=dtype)


def reference(model: nn.Module, x: Tensor) -> dict[str, Gram]:
    """Return the Gram of columns copied at the moment of each call."""
    model = copy.deepcopy(model).eval()
    found = {view.parameter: view for view in views(model)[0]}
    grams = {}
    for name, calls in seen_by(model, {"x": x}).items():
        view = found[name]
        grams[name] = Gram.zeros(view.groups, view.d)
        for entering, leaving in calls:
            module = model.get_submodule(view.name)
            grams[name].add(columns(view, module, entering, leaving))
    return grams


def same_grams(one: Mapping[str, Gram], other: Mapping[str, Gram], within: float = 1e-13) -> bool:
    assert one.keys() == other.keys()
    return all(
        one[name].count == other[name].count
        and relative(one[name].matrix, other[name].matrix) <= within
        and relative(one[name].total, other[name].total) <= 10 * within
        for name in one
    )


def test_operations_in_place_do_not_corrupt_the_capture():
    model, x = mixed(), images(5)
    wanted = reference(model, x)
    assert len(wanted) == 5
    assert all(bool(gram.matrix.isfinite().all()) for gram in wanted.values())
    assert all(float(gram.trace.min()) > 0 for gram in wanted.values())
    found, wrong = covered(model, {"x": x})
    assert wrong == {}
    assert same_grams(collect_grams(model, [{"x": x}], found), wanted)


@pytest.mark.parametrize("size", [1, 3, 5, 11])
def test_batches_do_not_matter(size):
    model, x = mixed(), images(11)
    found = views(model)[0]
    batches = ({"x": part} for part in torch.split(x, size))
    assert same_grams(collect_grams(model, batches, found), reference(model, x))


@pytest.mark.parametrize("chunk", [1, 20, 64, 1000])
@pytest.mark.parametrize("patches", ["true", "interior"])
def test_chunks_do_not_matter(monkeypatch, chunk, patches):
    model, x = mixed(), images(7)
    found = views(model)[0]
    wanted = collect_grams(model, [{"x": x}], found, patches=patches)
    monkeypatch.setattr(hooks, "CHUNK", chunk)
    assert same_grams(collect_grams(model, [{"x": x}], found, patches=patches), wanted)


def test_products_in_another_batch_shape_agree_to_single_precision():
    model, x = mixed(dtype=torch.float32), images(24, dtype=torch.float32)
    found = views(model)[0]
    whole = collect_grams(model, [{"x": x}], found)
    forgotten = collect_grams(model, [{"x": part} for part in torch.split(x[:10], 3)], found)
    retained = collect_grams(model, [{"x": x[10:]}], found)
    for name, gram in whole.items():
        gram.subtract(forgotten[name])
        assert gram.count == retained[name].count
        assert relative(gram.matrix, retained[name].matrix) <= 1e-6
        values = torch.linalg.eigvalsh(gram.matrix)
        assert (values[:, 0] >= -1e-5 * values[:, -1]).all()


def test_downdating_is_exact_in_double():
    model, x = mixed(), images(24)
    found = views(model)[0]
    whole = collect_grams(model, [{"x": x}], found)
    forgotten = collect_grams(model, [{"x": x[:10]}], found)
    for name, gram in collect_grams(model, [{"x": x[10:]}], found).items():
        whole[name].subtract(forgotten[name])
        assert relative(whole[name].matrix, gram.matrix) <= 1e-14


def test_no_batches_give_empty_grams():
    model = mixed()
    grams = collect_grams(model, [], views(model)[0])
    assert {gram.count for gram in grams.values()} == {0}
    assert not any(gram.matrix.any() for gram in grams.values())


@pytest.mark.parametrize("size", [2, 4, 11])
def test_limits_take_the_first_samples_of_each_layer(size):
    model, x = mixed(), images(11)
    found = views(model)[0]
    limits = dict(zip((view.parameter for view in found), (1, 4, 5, 30, 0), strict=True))
    batches = [{"x": part} for part in torch.split(x, size)]
    grams = collect_grams(model, batches, found, limits=limits)
    for view in found:
        wanted = collect_grams(model, [{"x": x[: limits[view.parameter]]}], [view])
        if limits[view.parameter] == 0:
            assert grams[view.parameter].count == 0
            assert not grams[view.parameter].matrix.any()
        else:
            assert same_grams({"": grams[view.parameter]}, {"": wanted[view.parameter]})


def test_a_layer_without_a_limit_takes_all():
    model, x = mixed(), images(6)
    found = views(model)[0]
    grams = collect_grams(model, [{"x": x}], found, limits={"head.weight": 2})
    assert grams["head.weight"].count == 2
    assert same_grams(
        {k: g for k, g in grams.items() if k != "head.weight"},
        {k: g for k, g in reference(model, x).items() if k != "head.weight"},
    )


def test_the_column_sum_makes_the_gram_of_a_bias():
    model, x = mixed(), images(6)
    (view,) = [view for view in views(model)[0] if view.name == "token"]
    (entering, _), = seen_by(model.eval(), {"x": x})["token.weight"]  # fmt: skip
    flat = entering.reshape(-1, 4)
    wide = torch.cat([flat, torch.full((len(flat), 1), 0.7, dtype=DOUBLE)], dim=1)
    found = collect_grams(model, [{"x": x}], [view])["token.weight"].augmented(0.7)
    assert relative(found.matrix[0], wide.mT @ wide) <= 1e-13


class Tokens(nn.Module):
    """Embeds ids, looks at the mask or not, and reads one token, all, or the real ones."""

    def __init__(self, honours: bool = True, pool: str = "mean") -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.honours, self.pool = honours, pool

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = torch.tanh(self.inner(self.table(input_ids)))
        mask = attention_mask[..., None].to(h.dtype)
        if not self.honours:
            mask = torch.ones_like(mask)
        return self.head((h * mask).sum(1) / mask.sum(1).clamp(min=1))


def texts(side: str, kind: torch.dtype = torch.long) -> dict[str, Tensor]:
    """Return three texts padded with token 0 to six tokens on one side."""
    ids = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    for row, count in enumerate((0, 2, 4)):
        pad = slice(6 - count, 6) if side == "right" else slice(0, count)
        ids[row, pad] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).to(kind)}


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
def test_masked_tokens_are_not_counted(kind):
    with seeded(0):
        model = Tokens().double()
    inputs, found = texts("right", kind), views(model)[0]
    mask = inputs["attention_mask"].bool()
    real = model.table(inputs["input_ids"])[mask].detach()
    grams = collect_grams(model, [inputs], found)
    assert grams["inner.weight"].count == int(mask.sum()) == 12
    assert relative(grams["inner.weight"].matrix[0], real.mT @ real) <= 1e-14
    assert grams["head.weight"].count == 3
    everything = collect_grams(model, [inputs], found, keep_padding=True)
    assert everything["inner.weight"].count == 18
    one = collect_grams(model, [inputs], found, limits={"inner.weight": 2})["inner.weight"]
    assert one.count == 10
    assert relative(one.matrix[0], real[:10].mT @ real[:10]) <= 1e-14  # row by row


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("honours", [True, False])
def test_a_model_that_reads_its_padding_is_found_out(side, honours):
    with seeded(0):
        model = Tokens(honours)
    assert padding_matters(model, texts(side)) == (not honours)


def test_padding_cannot_matter_where_there_is_none():
    with seeded(0):
        model = Tokens(honours=False)
    full = {key: value[:1] for key, value in texts("right").items()}
    assert bool(full["attention_mask"].all())
    assert not padding_matters(model, full)
    assert not padding_matters(model, {"features": torch.rand(2, 3)})


def test_a_first_token_like_the_padding_hides_nothing():
    with seeded(0):
        model = Tokens(honours=False)
    ids = torch.tensor([[0, 3, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    assert padding_matters(model, {"input_ids": ids, "attention_mask": mask})


# --------------------------------------------------------------------------- it all together


@pytest.mark.parametrize("seed", range(3))
def test_projected_updates_of_all_layers_leave_retained_logits_alone(seed):
    """Whatever the update, since no layer sees anything new on retained rows."""
    model, retained, forget = mixed(seed), images(1, seed), images(9, seed + 50)
    model.eval()
    with torch.no_grad():  # thin inputs, so that every layer has room
        retained[:, :, 3:] = 0
        before = model(retained), model(forget)
    found = views(model)[0]
    free = 0
    for view, gram in zip(found, collect_grams(model, [{"x": retained}], found).values(),
                          strict=True):  # fmt: skip
        projector = Projector.from_basis(balanced_basis([gram], [1.0], 1.0))
        free += projector.free > 0
        weight = model.get_parameter(view.parameter)
        step = projector.apply(view.rows(draws(*weight.shape, seed=seed)))
        with torch.no_grad():
            weight += view.stored(step, weight)
    assert free >= 2
    with torch.no_grad():
        assert relative(model(retained), before[0]) <= 1e-8
        assert relative(model(forget), before[1]) > 1e-2


# --------------------------------------------------------------------------- what is left behind


class Trouble(RuntimeError):
    pass


def settings() -> dict[str, object]:
    """Return everything around a forward pass that a capture must restore."""
    return {
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": torch.backends.cudnn.allow_tf32,
        "precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "generator": torch.get_rng_state().tolist(),
    }


@pytest.fixture
def low_precision() -> Iterator[None]:
    """Let a test run with coarse products allowed, and forbid them again."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    precision = torch.get_float32_matmul_precision()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def coarse() -> list[bool]:
    """Return what of a forward pass may be coarse."""
    places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    if hasattr(places[0], "fp32_precision"):
        products = [place.fp32_precision in ("tf32", "bf16") for place in places]
    else:
        products = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    return [*products, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()]


@pytest.mark.usefixtures("low_precision")
@pytest.mark.parametrize("fails", [False, True])
def test_inside_all_is_exact_and_outside_all_is_as_before(fails):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = settings()
        assert all(coarse())
        with contextlib.suppress(Trouble), exact():
            assert not any(coarse())
            if fails:
                raise Trouble
        assert settings() == before
        assert all(coarse())


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_of_products_comes_back(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        outside = torch.backends.cuda.matmul.allow_tf32
        with exact():
            assert not any(coarse())
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == outside
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"),
    reason="this torch has one way only to ask for coarse products",
)
def test_both_ways_to_ask_for_coarse_products_are_understood():
    place = torch.backends.cuda.matmul
    before = place.fp32_precision
    try:
        place.fp32_precision = "tf32"
        with exact():
            assert not any(coarse())
        assert place.fp32_precision == "tf32"
    finally:
        place.fp32_precision = before


def hook_count(model: nn.Module) -> int:
    return sum(
        len(held)
        for module in model.modules()
        for held in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


CAPTURES = {
    "verify": lambda model, batches, found: verify(model, next(iter(batches)), found),
    "collect": collect_grams,
}


@pytest.mark.usefixtures("low_precision")
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("where", ["nowhere", "model", "data"])
def test_nothing_is_left_behind(capture, where):
    model = mixed(dtype=torch.float32).train()
    model.norm.eval()
    model.token.weight.requires_grad_(False)
    mine = model.head.register_forward_hook(lambda *_: None)
    if where == "model":
        model.drop.forward = fail
    state, seen = copy.deepcopy(model.state_dict()), modes(model)
    flags = [p.requires_grad for p in model.parameters()]
    found = views(model)[0]

    def batches() -> Iterator[dict[str, Tensor]]:
        if where == "data" and capture == "verify":
            yield {"nonsense": torch.zeros(1)}
        yield {"x": images(3, dtype=torch.float32)}
        if where == "data":
            raise Trouble

    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = settings()
        expected = (
            contextlib.nullcontext() if where == "nowhere" else pytest.raises((Trouble, TypeError))
        )
        with expected:
            CAPTURES[capture](model, batches(), found)
        assert settings() == before
    assert modes(model) == seen
    assert hook_count(model) == 1
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    mine.remove()


def fail(x: Tensor) -> Tensor:
    raise Trouble


def test_modes_come_back_after_trouble_with_a_name():
    model = mixed().train()
    ghost = View("ghost.weight", None, ("ghost",), "linear", 1, 2, 2)
    with pytest.raises(AttributeError), watched(model, [*views(model)[0], ghost], print):
        pass
    assert all(modes(model))
    assert hook_count(model) == 0


@pytest.mark.usefixtures("low_precision")
def test_autocast_does_not_reach_the_capture():
    model, x = mixed(dtype=torch.float32), images(5, dtype=torch.float32)
    found = views(model)[0]
    wanted = collect_grams(model, [{"x": x}], found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert verify(model, {"x": x}, found) == {}
        grams = collect_grams(model, [{"x": x}], found)
    assert all(torch.equal(grams[name].matrix, wanted[name].matrix) for name in wanted)


def test_dropout_and_batch_statistics_are_off_during_a_capture():
    model, x = mixed().train(), images(5)
    found = views(model)[0]
    statistics = model.norm.running_mean.clone()
    once, again = (collect_grams(model, [{"x": x}], found) for _ in range(2))
    assert all(torch.equal(once[name].matrix, again[name].matrix) for name in once)
    assert same_grams(once, reference(model, x))
    assert torch.equal(model.norm.running_mean, statistics)


def test_a_capture_stores_no_activations():
    """What is kept does not grow with the samples."""
    model = mixed()
    found = views(model)[0]
    sizes = [
        sum(g.matrix.numel() + g.total.numel() for g in
            collect_grams(model, [{"x": images(4)}] * times, found).values())
        for times in (1, 5)
    ]  # fmt: skip
    assert sizes[0] == sizes[1]
    assert not any(isinstance(v, Tensor) for m in model.modules() for v in vars(m).values())


def test_half_precision_columns_are_summed_in_double():
    model = nn.Linear(6, 3).bfloat16()
    x = draws(400, 6, dtype=torch.bfloat16)
    gram = collect_grams(model, [{"input": part} for part in torch.split(x, 4)],
                         [only_view(model)])["weight"]  # fmt: skip
    assert gram.matrix.dtype == DOUBLE
    assert relative(gram.matrix[0], x.double().mT @ x.double()) <= 1e-2
    assert relative(gram.total[0], x.double().sum(0)) <= 1e-14


def test_geometry_tells_views_apart():
    """It is part of the key of stored Gram matrices."""
    layers = [nn.Linear(4, 6), nn.Linear(6, 4), nn.Conv1d(4, 6, 1), nn.Conv1d(4, 6, 1, groups=2),
              nn.ConvTranspose1d(4, 6, 1), Conv1D(6, 4)]  # fmt: skip
    found = [only_view(layer).geometry for layer in layers]
    assert all(one != other for one, other in itertools.combinations(found, 2))


def test_a_weight_that_is_also_used_outside_its_layer_is_found_out():
    def twice(net: Net, x: Tensor) -> Tensor:
        return net.b(net.a(x) + functional.linear(x.roll(1, -1), net.a.weight))

    model = Net(twice, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    _, wrong = covered(model, {"x": torch.rand(3, 4)})
    assert wrong == {"a.weight": "its weight is also used outside its layer"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("honest", [True, False])
def test_zeros_are_tried_with_other_numbers(honest):
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if honest else 2 * x)

    model = Net(lambda net, x: net.a(x), a=Doubling(4, 3))
    nn.init.zeros_(model.a.weight)
    assert bool(verify(model, {"x": torch.rand(5, 4)}, [only_view(model)])) != honest
    assert not model.a.weight.any()


def test_a_large_bias_hides_nothing():
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(1.1 * x)

    model = Net(lambda net, x: net.a(x), a=Shifted(4, 3))
    nn.init.constant_(model.a.bias, 1e4)
    assert verify(model, {"x": torch.rand(5, 4)}, [only_view(model)])
