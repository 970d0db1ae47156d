"""Every script under benchmarks/perf prints one JSON object with its ratios; none is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "perf"
SHORT = {
    "attack.py": (["--quick"], {"image_step_ratio", "time_ratio", "target_success"}),
    "influence.py": (
        ["--quick"],
        {"ratio_vmap", "ratio_hessian", "max_relative_error", "peak_bytes"}
        | {"seconds_logistic_30k_100"},
    ),
    "overhead.py": (["--rounds", "1", "--steps", "10"], {"ratio", "device"}),
    "metrics.py": (["--quick"], set()),
    "weight_qp.py": (["--quick"], {"qp 2000", "attainable 2000"}),
    "unsc_subspace.py": (
        ["--quick"],
        {
            "ratio_one_class",
            "ratio_nine_classes",
            "max_sine",
            "second_request_ratio",
            "second_request_retain_batches",
        },
    ),
}


def test_every_script_is_listed():
    assert {path.name for path in FOLDER.glob("*.py")} == set(SHORT)


@pytest.mark.parametrize("name", sorted(SHORT))
def test_json_is_one_object(name, tmp_path):
    options, keys = SHORT[name]
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), "--json", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.loads(done.stdout)
    assert keys <= set(found)
    assert all(value > 0 for value in found.values() if isinstance(value, float))
