"""`unsc list adapters`: which suites can be reached from here, found without importing them."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import unsc

HOMES = ("MUBENCH_HOME", "ERASURE_HOME", "TORCHUNLEARN_HOME")
NEEDED = {
    "mubench": ("MUBENCH_HOME", "mubench/df"),
    "erasure": ("ERASURE_HOME", "erasure"),
    "torchunlearn": ("TORCHUNLEARN_HOME", "torchunlearn/unlearn"),
}


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    for name in HOMES:
        monkeypatch.delenv(name, raising=False)


def row(name: str) -> dict[str, str]:
    done = unsc("list", "adapters", "--json")
    assert done.code == 0, done.err
    rows = {one["name"]: one for one in done.json}
    assert list(rows) == ["mubench", "neurips", "erasure", "torchunlearn", "hub"]
    return rows[name]


@pytest.mark.parametrize("name", ["neurips", "hub"])
def test_what_needs_nobody_is_there(name: str) -> None:
    assert (row(name)["status"], row(name)["reason"]) == ("ok", "")


@pytest.mark.parametrize("name", NEEDED)
def test_a_checkout_is_looked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable, inside = NEEDED[name]
    assert row(name)["status"] == "unavailable"
    assert f"{variable} is not set" in row(name)["reason"]
    assert f"{variable} is not set" in unsc("list", "adapters").out.replace("\n", " ")
    monkeypatch.setenv(variable, str(tmp_path))
    assert row(name)["status"] == "unavailable"
    assert f"{tmp_path} has no" in row(name)["reason"]
    (tmp_path / inside).mkdir(parents=True)
    assert (row(name)["status"], row(name)["reason"]) == ("ok", "")


def test_mubench_may_be_given_by_its_package_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "df").mkdir()
    monkeypatch.setenv("MUBENCH_HOME", str(tmp_path))
    assert row("mubench")["status"] == "ok"


@pytest.mark.parametrize("name", NEEDED)
def test_an_installed_package_is_found_and_not_imported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert row(name)["status"] == "ok"


@pytest.mark.parametrize(("version", "status"), [("0.1.0", "unavailable"), ("0.1.1", "ok")])
def test_the_release_without_trainers_is_not_enough(
    version: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchunlearn").mkdir()
    (tmp_path / "torchunlearn" / "__init__.py").write_text("")
    info = tmp_path / f"torchunlearn-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torchunlearn\nVersion: {version}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert row("torchunlearn")["status"] == status
    assert ("has no trainers" in row("torchunlearn")["reason"]) == (status == "unavailable")
