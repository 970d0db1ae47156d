"""What surrounds a run: global state kept, work counted, time and memory measured.

Nothing here knows what unlearning is; `method.UnlearningMethod.unlearn` uses it so that an author
is never trusted for the seed, the time or the state of the process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch  # public torch does not tell how many rows vmap holds


@contextlib.contextmanager
def sealed(seed: int) -> Iterator[None]:
    """Run the body with every global generator seeded, and put all global state back afterwards.

    Covers Python, NumPy and torch (CPU and CUDA) generators, the gradient mode, the default dtype,
    the cuDNN flags, deterministic algorithms and the number of threads; also after an exception.
    """
    python, numpy_state = random.getstate(), np.random.get_state()
    torch_state, grad, dtype = (
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    cudnn = torch.backends.cudnn
    flags = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    threads = torch.get_num_threads()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        torch.set_grad_enabled(True)
        cudnn.benchmark, cudnn.deterministic = False, True
        with torch.inference_mode(False):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = flags
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode (no dropout, no moving statistics); restore the modes after.

    A module that keeps a tensor made of parameters while in eval mode (`attention_bias_cache` of
    timm's levit, efficientformer and tiny_vit) is itself left in train mode, its children are not,
    and its cache is emptied before and after: weights may move in the body, no output is stale.
    """
    modes = {module: module.training for module in model.modules()}
    caching = [
        m for m in model.modules() if isinstance(getattr(m, "attention_bias_cache", 0), dict)
    ]
    model.eval()
    for module in caching:
        module.training = True
        module.attention_bias_cache.clear()  # type: ignore[union-attr, operator]
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module in caching:
            module.attention_bias_cache.clear()  # type: ignore[union-attr, operator]


@functools.cache
def warm_up() -> None:
    """Let torch import what it imports at the first optimiser step, before any clock runs."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(strict, warn_only=warn_only)


class Clock:
    """Wall-clock seconds that stop while :meth:`paused` is open."""

    def __init__(self) -> None:
        self._start, self._out = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the start, without the pauses."""
        return time.perf_counter() - self._start - self._out

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the body out of :attr:`seconds`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._out += time.perf_counter() - began


def rows_of(batch: Tensor) -> int:
    """Return the number of rows of a batch, those of all rows that `vmap` sends through at once.

    Inside `torch.func.vmap` a tensor has the shape of one row of what it stands for.
    """
    count = len(batch)
    while functorch.is_functorch_wrapped_tensor(batch):
        whole = functorch.get_unwrapped(batch)
        if functorch.is_batchedtensor(batch):
            count *= whole.shape[functorch.maybe_get_bdim(batch)]
        batch = whole
    return count


class WorkCounter:
    """Counts samples forwarded: without gradient × 1, with gradient × 3.

    A forward hook on a whole model; copies of the model made inside a run count too, because a
    function is not copied with the model that holds it.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._paused = False

        def count(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            if tensors and not self._paused:
                self.samples += rows_of(tensors[0]) * (3 if torch.is_grad_enabled() else 1)

        self._hook = count

    def watch(self, model: nn.Module) -> None:
        """Start counting the forward passes of `model`."""
        if self._hook not in model._forward_hooks.values():
            model.register_forward_hook(self._hook, with_kwargs=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the forward passes of the body uncounted."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def forget(self, model: nn.Module) -> None:
        """Take the hook out of `model`."""
        for key in [k for k, hook in model._forward_hooks.items() if hook is self._hook]:
            del model._forward_hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)


class PeakMemory:
    """Peak bytes of a run above its start: CUDA allocations, else resident memory on Linux.

    `bytes` is None where neither can be read.
    """

    _clear, _status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start: int | None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        else:
            self._start = self._resident("VmRSS") if self._reset() else None

    @property
    def bytes(self) -> int | None:
        """Bytes at the highest point since the start, less what was held at the start."""
        if self._start is None:
            return None
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device)) - self._start
        return max(self._resident("VmHWM") - self._start, 0)

    def _reset(self) -> bool:
        try:
            self._clear.write_text("5")  # "5" resets the high-water mark (proc(5))
        except OSError:
            return False
        return True

    def _resident(self, name: str) -> int:
        for line in self._status.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        return 0


def state_sha256(model: nn.Module) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of every state tensor, names sorted."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def first_non_finite(model: nn.Module, original: nn.Module | None = None) -> str | None:
    """Return the name of the first state tensor that is not finite, else None.

    Tensors that were not finite in `original` (masks of −∞) are left out.
    """
    before = original.state_dict() if original is not None else {}
    for name, tensor in model.state_dict().items():
        if not _finite(tensor) and (name not in before or _finite(before[name])):
            return name
    return None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
