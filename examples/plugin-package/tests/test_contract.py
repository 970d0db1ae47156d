import pytest

from unsc_plugin.conformance import CHECKS, check_method


@pytest.mark.parametrize("method", ["sample_finetune", "sample_shrink"])
@pytest.mark.parametrize("check", CHECKS)
def test_contract(method, check):
    [result] = check_method(method, checks=[check], quick=True)
    assert result.passed, result.detail
