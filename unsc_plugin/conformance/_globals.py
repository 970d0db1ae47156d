"""The state of the process that a run must leave as it was."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def torch_state() -> dict[str, Any]:
    """Return generators, modes and flags: what no import changes."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    cudnn = torch.backends.cudnn
    return {
        "Python's generator": random.getstate(),
        "NumPy's generator": repr(np.random.get_state()),
        "torch's generator": torch.get_rng_state().tolist(),
        "CUDA's generators": [state.tolist() for state in cuda],
        "gradient mode": torch.is_grad_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cuDNN flags": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "threads": torch.get_num_threads(),
        "NumPy's error handling": np.geterr(),
    }


def process_state() -> dict[str, Any]:
    """Return :func:`torch_state`, and what a library may set when it is imported first."""
    return torch_state() | {
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "import path": list(sys.path),
        "warning filters": list(warnings.filters),
        "log levels": (logging.root.level, logging.root.manager.disable),
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ."""
    return [key for key in before if before[key] != after[key]]
