"""MU-Bench (arXiv 2406.14796) as a host: our methods in its scripts, its index lists and folders.

`python -m unsc_plugin.adapters.mubench SCRIPT CONFIG` runs an experiment script of a checkout
unedited; `unlearn_method` may then be any method of ours. From Python:

    with mubench.install():
        import mubench as suite
        trainer = suite.get_trainer("unsc")

Nothing of MU-Bench is part of this package: a checkout (`$MUBENCH_HOME`) or the installed package
is read where it lies, and importing this module imports neither it nor transformers.
"""

from __future__ import annotations

import sys

from unsc_plugin.adapters._mubench_checkout import (
    OWNED,
    SEEDS,
    SUPPORTED,
    Checkout,
    check_window,
    deletion_indices,
    locate,
)
from unsc_plugin.adapters._mubench_config import (
    DEFECTS,
    Options,
    make_config,
    plugin_method,
    translate_config,
)
from unsc_plugin.adapters._mubench_folder import read_logits, read_run, write_run
from unsc_plugin.adapters._mubench_install import Installed, install
from unsc_plugin.adapters._mubench_runner import main, run_script
from unsc_plugin.adapters._mubench_trainer import PluginTrainer
from unsc_plugin.errors import ConfigError

__all__ = [
    "DEFECTS",
    "OWNED",
    "SEEDS",
    "SUPPORTED",
    "Checkout",
    "Installed",
    "Options",
    "PluginTrainer",
    "check_window",
    "deletion_indices",
    "install",
    "locate",
    "main",
    "make_config",
    "make_trainer",
    "plugin_method",
    "read_logits",
    "read_run",
    "run_script",
    "translate_config",
    "write_run",
]


def make_trainer(name: str) -> type[PluginTrainer]:
    """Return MU-Bench's trainer for one of our methods, installing it where it is not yet.

    Raises:
        UnknownName: no method of ours.
        ConfigError: a name that MU-Bench keeps for itself; ours is `plugin-<name>`.
        UnscError: MU-Bench cannot be installed.
    """
    found = install()
    method = plugin_method(name, found.registry)
    if method is None:
        found.registry.method(name)
        raise ConfigError(f"{name} is MU-Bench's own; our method of that name is plugin-{name}")
    trainer: type[PluginTrainer] = found.trainer(method)
    return trainer


if __name__ == "__main__":
    sys.exit(main())
