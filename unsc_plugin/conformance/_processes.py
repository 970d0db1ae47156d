"""Runs of a method in other processes: several on one request, or one without a GPU in sight."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from unsc_plugin import engine
from unsc_plugin.conformance._toys import Net
from unsc_plugin.conformance._trial import SEED, Trial, fault, skip, trial_of
from unsc_plugin.errors import UnscError
from unsc_plugin.registry import load

PATIENCE = 60.0
SLOW_IMPORTS = ("torch._dynamo",)
"""What a first optimiser imports; the server does it once for all children."""


@dataclass(frozen=True)
class Reference:
    """How another process finds the method: a module to import, and a name or an attribute."""

    module: str
    name: str | None
    attribute: str
    plugins: tuple[str, ...]

    def trial(self) -> Trial:
        """Return the trial of the method.

        Raises:
            UnscError: the method is not found.
        """
        if self.name is None:
            found = attrgetter(self.attribute)(importlib.import_module(self.module))
            return trial_of(found)
        if not self.plugins:  # registered when its module is imported, if it is not built in
            importlib.import_module(self.module)
        return trial_of(self.name, load(self.plugins))


@dataclass(frozen=True)
class Outcomes:
    """State of the unlearned model in every process, and whether it was finite."""

    states: list[dict[str, Tensor]]
    finite: list[bool]


@dataclass(frozen=True)
class Order:
    """What a child is to do."""

    reference: Reference
    net: Net
    seed: int
    precision: Literal["fp32", "bf16"]
    on_cpu: bool
    environment: Mapping[str, str]


def states(
    trial: Trial,
    net: Net,
    world: int,
    *,
    hide_gpu: bool = True,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Outcomes:
    """Run the method on the request of `net` in `world` processes and return what each has."""
    orders = [
        Order(_reference(trial), net, trial.seed, precision, hide_gpu, environment)
        for environment in _environments(world, hide_gpu)
    ]
    # A server that is forked from, not this process: its threads and CUDA state stay out of it.
    methods = multiprocessing.get_all_start_methods()
    start = "forkserver" if "forkserver" in methods else "spawn"
    context: Any = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload([__name__, *SLOW_IMPORTS])
    links = [context.Pipe(duplex=False) for _ in orders]
    children = [
        context.Process(target=_child, args=(order, send), daemon=True)
        for order, (_, send) in zip(orders, links, strict=True)
    ]
    with _main_hidden():
        for child in children:
            child.start()
    try:
        answers = [_answer(receive) for receive, _ in links]
    finally:
        for child in children:
            child.join(5)
            if child.is_alive():
                child.kill()
    found = [{key: torch.from_numpy(value) for key, value in answer.items()} for answer in answers]
    finite = [all(bool(torch.isfinite(t.float()).all()) for t in state.values()) for state in found]
    return Outcomes(found, finite)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep children from running the main script again, which may not be guarded against it."""
    main = sys.modules["__main__"]
    with mock.patch.dict(main.__dict__, {"__spec__": None}):
        main.__dict__.pop("__file__", None)
        yield


def _reference(trial: Trial) -> Reference:
    source = trial.source
    if isinstance(source, str):
        return Reference(trial.kind.__module__, source, "", trial.plugins)
    return Reference(source.__module__, None, source.__qualname__, ())


def _environments(world: int, hide_gpu: bool) -> list[dict[str, str]]:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {}
    if world == 1:
        return [hidden]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    group |= hidden | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _answer(receive: Connection) -> dict[str, np.ndarray]:
    if not receive.poll(PATIENCE):
        fault(f"no answer from another process within {PATIENCE:.0f} s")
    try:
        kind, content = receive.recv()
    except EOFError:
        fault("another process ended without an answer")
    if kind == "lost":
        skip(f"another process cannot import the method: {content}")
    if kind == "failed":
        fault(f"in another process: {content}")
    found: dict[str, np.ndarray] = content
    return found


def _child(order: Order, send: Connection) -> None:
    os.environ.update(order.environment)
    torch.set_num_threads(1)
    try:
        trial = order.reference.trial()
    except (ImportError, AttributeError, UnscError) as error:
        send.send(("lost", f"{type(error).__name__}: {error}"))
        return
    try:
        trial.seed = order.seed
        device = engine.accelerator("cpu" if order.on_cpu else "auto", order.precision)
        run = trial.run(trial.case(order.net, accelerator=device), seed=SEED)
        state = {name: tensor.cpu().numpy() for name, tensor in run.after.items()}
        send.send(("state", state))
    except Exception as error:
        send.send(("failed", f"{type(error).__name__}: {error}"))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
