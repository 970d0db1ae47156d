"""Sums of squared gradients over single rows: what Fisher information and importances are made of.

Squares of batch gradients are something else: gradients of different rows cancel before they are
squared, and the result depends on the batch size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from unsc_plugin import engine
from unsc_plugin.errors import DivergedError
from unsc_plugin.method import Loader, Rows, UnlearningTask

CHUNK_BYTES = 2**30
"""Memory that the gradients of the rows of one chunk may take."""

Named = dict[str, Tensor]
Height = Callable[[Tensor, Tensor], Tensor]
"""Logits (n, K) and labels (n,) to one value per row, (n,)."""
Route = Literal["vmap", "loop"]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ℓ = −log p_y of every row."""
    return functional.cross_entropy(logits, labels, reduction="none")


def squared_norm(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ‖z‖₂² of every row; labels are not used."""
    return logits.square().sum(dim=1)


def trainable(model: nn.Module) -> Named:
    """Return the parameters that take a gradient, by name; a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def chunks(
    model: nn.Module, task: UnlearningTask, rows: Rows, name: str, batch_size: int | None = None
) -> Loader:
    """Return a loader over `rows` by ascending index, without augmentation, shared by processes.

    Its batches have `batch_size` rows (default: the recipe's), or as many as gradients of single
    rows have room for. The order of the rows in the split therefore changes nothing.
    """
    row_bytes = sum(p.numel() * p.element_size() for p in trainable(model).values())
    room = max(1, CHUNK_BYTES // max(row_bytes, 1))
    return task.loader_over(
        in_order(rows),
        name,
        train=False,
        shuffle=False,
        batch_size=min(batch_size or task.recipe.batch_size, room),
    )


def in_order(rows: Rows) -> Rows:
    """Return the rows sorted by their index."""
    return rows.subset(torch.argsort(rows.index, stable=True))


class Squares:
    """Σ_j w_j (∂h_j/∂θ)², elementwise, h_j the height of row j; added up chunk by chunk.

    By `vmap` where the model allows it, else (in-place writes, branches on values) row by row from
    then on; `route` says which. The caller puts the model in eval mode.
    """

    def __init__(self, model: nn.Module, height: Height) -> None:
        self.model, self.height = model, height
        self.route: Route = "vmap"
        self._moving = trainable(model)
        self._sums = {name: torch.zeros_like(p, dtype=wide(p)) for name, p in self._moving.items()}

    def add(self, inputs: Named, labels: Tensor, weight: Tensor) -> None:
        """Add rows: inputs by name, labels (n,) and weights (n,), all on the model's device.

        Raises:
            OutOfMemoryError: the rows do not fit, which is no reason to go one by one, slowly.
        """
        if self.route == "vmap":
            try:
                found = self._by_vmap(inputs, labels, weight)
            except torch.cuda.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError):
                self.route = "loop"
        if self.route == "loop":
            found = self._by_loop(inputs, labels, weight)
        for name, value in found.items():
            self._sums[name] += value

    def total(self, task: UnlearningTask) -> Named:
        """Return the sums over all processes, float64 where the device has it.

        Raises:
            DivergedError: a sum is not finite.
        """
        sums = {n: engine.reduce_sum(value, task.accelerator) for n, value in self._sums.items()}
        for name, value in sums.items():
            if not bool(torch.isfinite(value).all()):
                raise DivergedError(f"squared gradients of {name} are not finite")
        return sums

    def _by_vmap(self, inputs: Named, labels: Tensor, weight: Tensor) -> Named:
        own = {name: p.detach() for name, p in self._moving.items()}

        def single(parameters: Named, row: Named, label: Tensor) -> Tensor:
            one = {key: value.unsqueeze(0) for key, value in row.items()}
            logits = functional_call(self.model, parameters, (), one)
            return self.height(logits, label.unsqueeze(0))[0]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operations without a batching rule are only slower
            found = vmap(grad(single), in_dims=(None, 0, 0))(own, inputs, labels)
        return {  # not squared in place: gradients of different parameters may share memory
            name: torch.tensordot(weight.to(g.dtype), g.square(), dims=1)
            for name, g in found.items()
        }

    def _by_loop(self, inputs: Named, labels: Tensor, weight: Tensor) -> Named:
        total = {name: torch.zeros_like(p) for name, p in self._moving.items()}
        for at in range(len(labels)):
            row = {key: value[at : at + 1] for key, value in inputs.items()}
            height = self.height(self.model(**row), labels[at : at + 1])[0]
            found = torch.autograd.grad(height, list(self._moving.values()), allow_unused=True)
            for name, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    total[name] += weight[at].to(gradient.dtype) * gradient.square()
        return total


def weighted_squares(
    model: nn.Module,
    task: UnlearningTask,
    rows: Rows,
    name: str,
    height: Height,
    batch_size: int | None = None,
) -> tuple[Named, Route]:
    """Return Σ_j w_j (∂h_j/∂θ)² over `rows` with their own weights, in eval mode, and the route.

    Raises:
        DivergedError: a sum is not finite.
    """
    squares = Squares(model, height)
    with engine.quiet(model):
        for batch in chunks(model, task, rows, name, batch_size):
            squares.add(batch.inputs, batch.labels, batch.weight)
    return squares.total(task), squares.route


def wide(like: Tensor) -> torch.dtype:
    """Return float64, or float32 where the device of `like` has nothing wider."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def combined(routes: Iterable[Route]) -> Route:
    """Return `loop` if any pass went row by row."""
    return "loop" if "loop" in set(routes) else "vmap"
