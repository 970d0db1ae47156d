"""The conformance suite over everything that is registered, for `test_conformance.py`."""

from __future__ import annotations

from typing import Any

from unsc_plugin.conformance import check_method
from unsc_plugin.registry import load
from unsc_plugin.spec import MethodEntry


def entry(name: str) -> MethodEntry:
    found = load().methods[name].entry
    assert isinstance(found, MethodEntry)
    return found


UNAVAILABLE = {name: named.reason for name, named in load().methods.items() if named.status != "ok"}
"""Registered methods that this machine has not what they need for, with what is missing."""

METHODS = sorted(load().methods.keys() - UNAVAILABLE.keys())
ELSEWHERE = {
    "instance_wise.continual": "serves sequences; the suite makes single requests",
    "instance_wise.reference": "1,001 epochs of full attacks; shortened in its own tests",
    "instance_wise.reference_adv": "1,001 epochs of full attacks; shortened in its own tests",
    "instance_wise.reference_neggrad": "1,001 epochs; shortened in its own tests",
    "soft_weighted.ssd": "soft weights dampen next to nothing on the toy; has its own tests",
    "scrub.rewind": "on the toy the first of equal checkpoints is the original; has its own tests",
}
"""Presets that the tests of their method try in another way, with the reason."""

UNSEEDED = {
    "influence.head": "draws nothing: closed form",
    "influence.newton": "draws nothing: closed form",
    "soft_weighted.reference": "draws nothing: all validation rows are for fitting, closed form",
    "instance_wise.neggrad": "draws nothing where all forget rows fit into one batch",
}
"""Presets whose weights do not depend on the seed in the suite, with the reason."""

PRESETS = [
    f"{name}.{tag}"
    for name in METHODS
    for tag, preset in entry(name).presets.items()
    if preset.source != "control" and f"{name}.{tag}" not in ELSEWHERE
]
"""Presets that are meant to unlearn; a control may collapse, that is what it is for."""


def failures(method: Any, **options: Any) -> dict[str, str]:
    """Return what each failed check says."""
    return {r.id: r.detail for r in check_method(method, **options) if not r.passed}
