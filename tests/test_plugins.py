"""A method from outside: found, checked, run and ranked, without a file of ours being touched."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import board, python, tree, unsc

from unsc_plugin import conformance, record, registry
from unsc_plugin.registry import GROUP

CLASS_FORM = '''\
"""A class: it sees the task and uses the one training loop."""

from unsc_plugin import engine, register_method
from unsc_plugin.method import Scenario, Settings, Split, UnlearningMethod, config, option


@config
class ShortTuning(Settings):
    passes: int = option(1, "passes over the retained data", minimum=0)
    lr: float = option(0.05, "learning rate", above=0.0)


@register_method("short_tuning")
class ShortTuningMethod(UnlearningMethod):
    """Cross-entropy on D_r, as in Warnecke et al. (2021), for a fixed number of passes."""

    name = "short_tuning"
    needs = frozenset({Split.RETAIN})
    scenarios = frozenset({Scenario.CLASS, Scenario.RANDOM})
    Config = ShortTuning

    def run(self, model, task):
        return model
'''
FUNCTION_FORM = '''\
import torch

from unsc_plugin import register_method


@register_method("shrink_head", summary="Scales the head down")
def shrink_head(model, *, ctx, rate: float = 0.5):
    """Scales the head by 1 - rate. From nobody's paper (2026)."""
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(1 - rate)
    return model
'''
