"""What the parts of the bridge to MU-Bench know of each other: the request, the host, the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from unsc_plugin.adapters._mubench_checkout import Checkout
from unsc_plugin.adapters._mubench_config import Options
from unsc_plugin.errors import ConfigError, ScenarioNotSupported
from unsc_plugin.forget import Request
from unsc_plugin.method import Result, Scenario, UnlearningMethod
from unsc_plugin.registry import Registry


@dataclass(frozen=True, eq=False)
class Plan:
    """The request of one run: whose configuration, which rows, and what is known of their order.

    `order` is `hub` where the labels are those of the hub's row order, `foreign` where they are not
    and that was allowed, `unknown` where nothing is known; `name` is what results are filed under.
    """

    config: Any
    request: Request
    labels: torch.Tensor
    val_labels: np.ndarray
    labels_sha256: str
    order: str
    name: str


class Host(Protocol):
    """A MU-Bench with our methods in it, as its trainers see it."""

    checkout: Checkout
    options: Options
    registry: Registry
    untested: str | None
    plan: Plan | None
    changes: list[str]

    def module(self, name: str) -> Any:
        """Return a module of MU-Bench."""
        ...

    def note_original(self, table: dict[str, Any], key: str, value: Any) -> None:
        """Add an entry to MU-Bench's table of originals for the time of the run."""
        ...

    def lacks_original(self, table: dict[str, Any], key: str) -> bool:
        """Return whether an entry of the table is missing, or is one that we put there."""
        ...


class Run(Protocol):
    """A trainer's run, as its receipt sees it."""

    method: UnlearningMethod
    args: Any
    unlearn_config: Any
    unlearn_time: float | None
    unlearn_wall_time: float | None
    result: Result | None
    ignored: list[str]
    original: dict[str, Any]

    @property
    def host(self) -> Host:
        """The MU-Bench that it runs in."""
        ...

    @property
    def name(self) -> str:
        """The method as the registry knows it."""
        ...

    @property
    def plan(self) -> Plan:
        """The request."""
        ...

    @property
    def seed(self) -> int:
        """The seed of the configuration."""
        ...

    @property
    def run_seed(self) -> int:
        """The seed of the method."""
        ...


def scenario_for(method: UnlearningMethod, asked: Scenario) -> Scenario:
    """Return the scenario under which a method serves a request.

    A method that corrects towards a goal deletes the forget set besides: its weights stay −1.

    Raises:
        ScenarioNotSupported: the method accepts neither.
        ConfigError: a goal that needs groups, which MU-Bench's data do not have.
    """
    if asked in method.scenarios:
        return asked
    if Scenario.CORRECTION in method.scenarios:
        goals = [one.criterion for one in getattr(method.config, "wanted", ())]
        lacking = [name for name in goals if name != "robust"]
        if lacking:
            raise ConfigError(
                f"{method.name}: goal {lacking[0]!r} compares groups, and MU-Bench's data have "
                'none; set goals to ["robust"] ("unsc_plugin": {"set": {"goals": ["robust"]}}), '
                "or run it on data with groups: unsc run"
            )
        return Scenario.CORRECTION
    known = ", ".join(sorted(method.scenarios))
    hint = (
        'set "unsc_plugin": {"forget": "class-0"} to forget a class'
        if Scenario.CLASS in method.scenarios and asked == Scenario.RANDOM
        else "take another method"
    )
    raise ScenarioNotSupported(
        f"{method.name} does not accept scenario {asked}, which MU-Bench's request is; it "
        f"supports: {known}; {hint}"
    )
