"""How much every weight matters for some rows: mean absolute gradients, one row at a time.

Cha, Cho, Hwang, Lee, Moon and Lee, *Learning to Unlearn: Instance-wise Unlearning for Pre-trained
Classifiers* (AAAI 2024, arXiv 2301.11578) weigh with it the pull to the original weights; the
gradient of the output norm is that of Aljundi et al., *Memory Aware Synapses* (ECCV 2018, arXiv
1711.09601).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from unsc_plugin import engine
from unsc_plugin.rows import Rows

CHUNK_BYTES = 2**30
"""Memory that the gradients of one chunk of rows may take."""
FLOOR = 1e-6
"""A tensor whose importance varies by less than this share of the largest is taken for constant."""

Named = dict[str, Tensor]
Route = Literal["vmap", "loop", "batches"]


def output_norm(logits: Tensor, squared: bool = False) -> Tensor:
    """Return h(x) = ‖z(x)‖₂ of every row, or ‖z(x)‖₂²; logits (n, C) to (n,)."""
    return logits.square().sum(dim=1) if squared else torch.linalg.vector_norm(logits, dim=1)


def per_sample(model: nn.Module, rows: Rows, *, squared: bool = False) -> tuple[Named, Route]:
    """Return Ω_p = (1/k) Σ_i |∂h(x_i)/∂p| of every trainable parameter, and how it was computed.

    By `vmap` of per-sample gradients where the model allows it, else row by row. The model is in
    eval mode meanwhile; a tied parameter has one entry.
    """
    with engine.quiet(model):
        try:
            return _by_vmap(model, rows, squared), "vmap"
        except (RuntimeError, ValueError, TypeError):  # in-place writes, branches on a mask
            return _by_loop(model, rows, squared), "loop"


def _trainable(model: nn.Module) -> Named:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _by_vmap(model: nn.Module, rows: Rows, squared: bool) -> Named:
    moving = _trainable(model)
    own = {name: p.detach() for name, p in moving.items()}

    def height(parameters: Named, inputs: Named) -> Tensor:
        one = {key: value.unsqueeze(0) for key, value in inputs.items()}
        return output_norm(functional_call(model, parameters, (), one), squared)[0]

    bytes_per_row = sum(p.numel() * p.element_size() for p in moving.values())
    chunk = max(1, CHUNK_BYTES // max(bytes_per_row, 1))
    total = {name: torch.zeros_like(p) for name, p in own.items()}
    for start in range(0, len(rows), chunk):
        inputs = _inputs(rows, start, chunk, next(iter(own.values())).device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operations without a batching rule are only slower
            found = vmap(grad(height), in_dims=(None, 0))(own, inputs)
        for name, gradient in found.items():
            total[name] += gradient.abs().sum(dim=0)
    return {name: value / len(rows) for name, value in total.items()}


def _by_loop(model: nn.Module, rows: Rows, squared: bool) -> Named:
    moving = _trainable(model)
    total = {name: torch.zeros_like(p) for name, p in moving.items()}
    place = next(iter(moving.values())).device
    for row in range(len(rows)):
        height = output_norm(model(**_inputs(rows, row, 1, place)), squared)[0]
        found = torch.autograd.grad(height, list(moving.values()), allow_unused=True)
        for name, gradient in zip(moving, found, strict=True):
            if gradient is not None:
                total[name] += gradient.abs()
    return {name: value / len(rows) for name, value in total.items()}


def by_batches(model: nn.Module, rows: Rows, batch_size: int, *, squared: bool = False) -> Named:
    """Return the published form Ω = Σ_b |batch_b|·|g_1 + … + g_b| / ((⌊k/bs⌋ + 1)·bs).

    g_b is the gradient of the batch mean of h in train mode; gradients are never zeroed, and their
    signs cancel inside a batch. Works on a copy, because the statistics of BatchNorm move.
    """
    student = copy.deepcopy(model).train()
    moving = _trainable(student)
    summed = {name: torch.zeros_like(p) for name, p in moving.items()}
    total = {name: torch.zeros_like(p) for name, p in moving.items()}
    place = next(iter(moving.values())).device
    for start in range(0, len(rows), batch_size):
        inputs = _inputs(rows, start, batch_size, place)
        size = min(batch_size, len(rows) - start)
        height = output_norm(student(**inputs), squared).mean()
        found = torch.autograd.grad(height, list(moving.values()), allow_unused=True)
        for name, gradient in zip(moving, found, strict=True):
            if gradient is not None:
                summed[name] += gradient
            total[name] += size * summed[name].abs()
    count = (len(rows) // batch_size + 1) * batch_size
    return {name: value / count for name, value in total.items()}


def _inputs(rows: Rows, start: int, count: int, device: torch.device) -> Named:
    at = torch.arange(start, min(start + count, len(rows)))
    return rows.gather(at).to(device).inputs


def freedom(
    importance: Mapping[str, Tensor], mode: Literal["minmax", "rank", "ones"] = "minmax"
) -> Named:
    """Return Ō in [0, 1] of every tensor: 0 at its most important weight, which is free to move.

    `minmax`: Ō = 1 − (Ω − min)/(max − min); `rank`: Ō = 1 − rank/(numel − 1), mean rank of ties;
    `ones`: Ō = 1. A tensor of one element, and one whose Ω does not vary by more than 1e-6 of the
    largest Ω of all tensors, has Ō = 1.

    >>> freedom({"w": torch.tensor([0.0, 1.0, 4.0])})["w"].tolist()
    [1.0, 0.75, 0.0]
    """
    largest = max((float(value.max()) for value in importance.values() if value.numel()), default=0)
    found = {}
    for name, value in importance.items():
        low, high = (float(value.min()), float(value.max())) if value.numel() else (0.0, 0.0)
        if mode == "ones" or value.numel() < 2 or not high - low > FLOOR * largest:
            found[name] = torch.ones_like(value)
        elif mode == "rank":
            found[name] = 1 - _ranks(value) / (value.numel() - 1)
        else:
            found[name] = 1 - (value - low) / (high - low)
    return found


def constant(importance: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors whose importance counts as constant."""
    return [name for name, free in freedom(importance).items() if bool((free == 1).all())]


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of every value from 0, ties sharing their mean."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(values.dtype)
    mean: Tensor = last - (counts.to(values.dtype) + 1) / 2
    return mean[place]


def summary(free: Mapping[str, Tensor], importance: Mapping[str, Tensor]) -> dict[str, float]:
    """Return mean and median of Ō over all weights, and the share below one half."""
    flat = torch.cat([value.reshape(-1).float() for value in free.values()])
    return {
        "mean": float(flat.mean()),
        "median": float(flat.median()) if len(flat) else math.nan,
        "share_below_half": float((flat < 0.5).float().mean()),
        "constant_tensors": len(constant(importance)),
    }
