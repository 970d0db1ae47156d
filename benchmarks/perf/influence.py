"""All influences in one forward-mode pass against per-sample gradients; the Hessian of a head.

Three measurements, ours and the usual way one after the other in one process, orders alternating:

* ∇l_j·u of all rows of a perceptron for two given directions u, against `vmap(grad)` in chunks
  and a product with u: the gradients stored, as published, or every chunk dropped after its
  product. CPU-seconds, bytes of live tensors, and how far each is from float64.
* the exact Hessian of a linear head against the sum of an n x p x p tensor made by einsum.
* a logistic regression on 30,000 x 100: features, Hessian, solves, all influences, one refit.

    python benchmarks/perf/influence.py [--json] [--quick] [--threads 1] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unsc_plugin.influence import Objective, objective
from unsc_plugin.rows import Rows

WIDTH = 100
CHUNK, BATCH = 256, 1024
"""Rows at once, per-sample gradients and ours: where each side is about at its fastest."""


class Perceptron(nn.Module):
    """D-100-100-1 with ReLU: 20,301 parameters for D = 100; a logit."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(columns, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
        )
        self.head = nn.Linear(WIDTH, 1)

    def features(self, features: Tensor) -> Tensor:
        return self.body(features)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.features(features))


class Logistic(nn.Module):
    """A linear layer on the inputs."""

    def __init__(self, columns: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(columns, classes)

    def features(self, features: Tensor) -> Tensor:
        return features

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)


def table(n: int, columns: int, classes: int, dtype: torch.dtype = torch.float64) -> Rows:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, columns, generator=generator, dtype=torch.float64).to(dtype)
    return Rows.of({"features": x}, torch.randint(0, classes, (n,), generator=generator))


def timed(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def paired(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> list:
    """Return (ours, theirs) CPU-seconds of every round; the order alternates."""
    ours(), theirs()
    pairs = []
    for number in range(rounds):
        if number % 2:
            slow, fast = timed(theirs), timed(ours)
        else:
            fast, slow = timed(ours), timed(theirs)
        pairs.append((fast, slow))
    return pairs


def ratio(pairs: list) -> float:
    return statistics.median(slow / fast for fast, slow in pairs)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, whatever the allocator keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in tensors((args, kwargs))}
        for tensor in tensors(made):
            storage = tensor.untyped_storage()
            if id(storage) not in before and storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def freed(self, size: int) -> None:
        self.now -= size


def tensors(tree) -> list[Tensor]:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and not wrapped(t)]


def peak(call: Callable[[], object]) -> int:
    """Return bytes of the tensors alive at the highest point of the call, beyond those before."""
    with Live() as live:
        call()
    return live.peak


# --------------------------------------------------------------------------- per-sample influences


def gradient_chunks(model: nn.Module, rows: Rows) -> Iterator[Tensor]:
    """Yield per-sample gradients (CHUNK, p)."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    x = rows.storage["features"]
    y = rows.labels.to(x.dtype)

    def loss(parameters, one, label):
        logit = functional_call(model, parameters, (one[None],))[0, 0]
        return functional.binary_cross_entropy_with_logits(logit, label)

    for start in range(0, len(rows), CHUNK):
        stop = start + CHUNK
        parts = vmap(grad(loss), in_dims=(None, 0, 0))(own, x[start:stop], y[start:stop])
        yield torch.cat([g.flatten(1) for g in parts.values()], dim=1)


def stored(model: nn.Module, rows: Rows, directions: Tensor) -> Tensor:
    """Return G·u with G (n, p) in memory, the published way; (p, k) to (k, n)."""
    return (torch.cat(list(gradient_chunks(model, rows))) @ directions).T


def streamed(model: nn.Module, rows: Rows, directions: Tensor) -> Tensor:
    """Return the same, every chunk multiplied and dropped."""
    return torch.cat([chunk @ directions for chunk in gradient_chunks(model, rows)]).T


def influences(n: int, columns: int, rounds: int) -> dict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Perceptron(columns)
    rows, wide = table(n, columns, 2, torch.float32), table(n, columns, 2)
    here = objective(model, rows, scope="full", ridge=1.0, batch_size=BATCH)
    u = torch.randn(here.p, 2, generator=torch.Generator().manual_seed(1))

    def ours() -> Tensor:
        return here.along(here.theta, u)

    ours()  # finds out that forward mode works, and imports what it needs
    ways = {"vmap": stored, "vmap_streamed": streamed}
    calls = {name: partial(way, model, rows, u) for name, way in ways.items()}
    peaks = {name: peak(call) for name, call in {"": ours, **calls}.items()}
    pairs = {name: paired(ours, call, rounds) for name, call in calls.items()}
    found, other = ours(), calls["vmap"]()
    exact = streamed(model.double(), wide, u.double())
    scale = exact.abs().max()
    return {
        "ratio_vmap": ratio(pairs["vmap"]),
        "ratio_vmap_streamed": ratio(pairs["vmap_streamed"]),
        "max_relative_error": float((found - exact).abs().max() / scale),
        "max_relative_error_vmap": float((other - exact).abs().max() / scale),
        "peak_bytes": peaks[""],
        "peak_bytes_vmap": peaks["vmap"],
        "peak_bytes_vmap_streamed": peaks["vmap_streamed"],
        "seconds_influences": statistics.median(fast for fast, _ in pairs["vmap"]),
        "parameters": here.p,
        "samples": n,
        "jvp_mode": here.stats["jvp_mode"],
    }


# --------------------------------------------------------------------------- the Hessian of a head


def by_einsum(here: Objective, rows: Rows) -> Tensor:
    """Return the sum of all per-sample Hessians (n, p, p)."""
    x = rows.storage["features"]
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    pi = torch.softmax(here.outputs(here.theta, rows), dim=1)
    curved = torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :]
    size = here.p
    return torch.einsum("nkl,ni,nj->nkilj", curved, x, x).reshape(-1, size, size).sum(0)


def head_hessian(n: int, columns: int, classes: int, rounds: int) -> dict:
    rows = table(n, columns, classes)
    here = objective(Logistic(columns, classes).double(), rows, ridge=1.0)
    ones = torch.ones(n)

    def ours() -> Tensor:
        return here.ggn_matrix(here.theta, ones)

    def theirs() -> Tensor:
        return by_einsum(here, rows)

    found = ours()
    peaks = peak(ours), peak(theirs)
    pairs = paired(ours, theirs, rounds)
    expected = theirs()
    return {
        "ratio_hessian": ratio(pairs),
        "max_relative_error_hessian": float((found - expected).abs().max() / expected.abs().max()),
        "peak_bytes_hessian": peaks[0],
        "peak_bytes_einsum": peaks[1],
        "hessian": f"{n} x {columns}, {classes} classes",
    }


def logistic(n: int, columns: int) -> float:
    """Return CPU-seconds from the model to all influences of two criteria and one refit."""
    rows, model = table(n, columns, 2), Logistic(columns, 2).double()
    criteria = torch.randn(
        2 * (columns + 1), 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    e = torch.zeros(n, dtype=torch.float64)
    e[::10] = -1

    def whole() -> None:
        here = objective(model, rows, ridge=2.0)
        factor = here.factor(here.theta, torch.ones(n))
        here.along(here.theta, factor.solve(criteria))
        here.refit(e, here.theta)

    return timed(whole)


# --------------------------------------------------------------------------- the command


def report(result: dict) -> None:
    mib = {key: f"{value / 2**20:.1f} MiB" for key, value in result.items() if "bytes" in key}
    print(
        f"influences of {result['samples']} rows, p = {result['parameters']}, 2 directions, "
        f"{result['jvp_mode']}: {result['seconds_influences']:.3f} CPU-s\n"
        f"  vmap(grad) stored / ours {result['ratio_vmap']:.1f}, streamed / ours "
        f"{result['ratio_vmap_streamed']:.1f}\n"
        f"  peak {mib['peak_bytes']} against {mib['peak_bytes_vmap']} stored and "
        f"{mib['peak_bytes_vmap_streamed']} streamed\n"
        f"  largest error against float64 {result['max_relative_error']:.1e}, vmap(grad) "
        f"{result['max_relative_error_vmap']:.1e}\n"
        f"Hessian of a head, {result['hessian']}: einsum / ours {result['ratio_hessian']:.1f}\n"
        f"  peak {mib['peak_bytes_hessian']} against {mib['peak_bytes_einsum']}, largest "
        f"difference {result['max_relative_error_hessian']:.1e}\n"
        f"logistic regression {result['logistic']}: {result['seconds_logistic_30k_100']:.2f} CPU-s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="small sizes, for tests")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quick = options.quick
    rounds = 1 if quick else options.rounds
    sizes = (2_000, 20) if quick else (30_000, 100)
    result = influences(512 if quick else 4_000, 20 if quick else 100, rounds)
    result |= head_hessian(200 if quick else 2_000, 10 if quick else 50, 4, rounds)
    result |= {
        "seconds_logistic_30k_100": logistic(*sizes),
        "logistic": f"{sizes[0]} x {sizes[1]}",
        "threads": options.threads,
    }
    if options.json:
        print(json.dumps(result))
    else:
        report(result)


if __name__ == "__main__":
    main()
