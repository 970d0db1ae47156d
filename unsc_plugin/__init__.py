"""Machine-unlearning methods for any timm or Hugging Face classifier, measured against retraining.

The public names; each is imported when it is first used, so that `import unsc_plugin` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unsc_plugin.api import Unlearned, unlearn
    from unsc_plugin.method import Result, UnlearningMethod, UnlearningTask, Weights
    from unsc_plugin.models import load_model
    from unsc_plugin.registry import create, list_methods, register_method

_HOMES = {
    "Result": "method",
    "Unlearned": "api",
    "UnlearningMethod": "method",
    "UnlearningTask": "method",
    "Weights": "method",
    "create": "registry",
    "list_methods": "registry",
    "load_model": "models",
    "register_method": "registry",
    "unlearn": "api",
}
__all__ = [
    "Result",
    "Unlearned",
    "UnlearningMethod",
    "UnlearningTask",
    "Weights",
    "create",
    "list_methods",
    "load_model",
    "register_method",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unsc_plugin' has no attribute {name!r}")
    return getattr(importlib.import_module(f"unsc_plugin.{_HOMES[name]}"), name)
