from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from mutants import MUTANTS, Mutant

from unsc_plugin.conformance import CHECKS, CheckResult, check_method
from unsc_plugin.conformance._nets import ConvNet

torch.set_num_threads(1)


@pytest.fixture
def _restored_process() -> Iterator[None]:
    yield
    restore()


def restore() -> None:
    torch.autograd.set_detect_anomaly(False)
    torch.set_float32_matmul_precision("highest")
    if "forward" in vars(ConvNet):  # a mutant patches the class
        del ConvNet.forward


def outcome(kind: type, check: str) -> CheckResult:
    [result] = check_method(kind, checks=[check])
    return result


@pytest.mark.usefixtures("_restored_process")
@pytest.mark.parametrize("case", MUTANTS, ids=lambda case: f"{case.check}-{case.broken.__name__}")
def test_the_named_check_fails_the_mutant_and_passes_its_twin(case: Mutant) -> None:
    broken = outcome(case.broken, case.check)
    assert not broken.passed, broken.detail
    assert re.search(case.says, broken.detail), broken.detail
    restore()
    repaired = outcome(case.repaired, case.check)
    assert repaired.passed, repaired.detail
    assert not repaired.skipped, repaired.detail


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_can_fail(check: str) -> None:
    assert check in {case.check for case in MUTANTS}
