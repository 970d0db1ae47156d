"""The unlearning receipt: what was forgotten by which method, and what was measured, in one tree.

It says which rows were forgotten without naming them. For a set of fewer than :data:`SMALL` rows a
plain hash would: whoever has the data can try all such sets. The receipt then carries the hash of
the set together with a random salt, and the salt stays beside the run, on this machine. Its owner
can so prove what was forgotten, and nobody else can find it out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from unsc_plugin.errors import ConfigError
from unsc_plugin.forget import split_sha256
from unsc_plugin.spec import Strict, parse_yaml

SMALL = 100
SALT_FILE = "receipt-salt.json"
WITHHELD = "withheld"


class Method(Strict):
    """What forgot: its name (and preset), where it comes from, its settings, its checks."""

    name: str
    version: str
    config: dict[str, Any] = Field(default_factory=dict)
    checks: dict[str, Any] | None = None


class IndexFile(Strict):
    """The list that named the rows: its name and the hash of its bytes, salted if it is short."""

    name: str
    sha256: str | None = None
    salted_sha256: str | None = None


class Request(Strict):
    """What was forgotten: how many rows and which share of the training rows.

    The hash is over the ascending positions as little-endian int64, after the salt if it is salted.
    """

    scenario: str
    n: int = Field(ge=0)
    fraction: float = Field(ge=0, le=1)
    split_sha256: str | None = None
    salted_sha256: str | None = None
    index_file: IndexFile | None = None
    indices: tuple[int, ...] | None = None


class Original(Strict):
    """The model before: the hash of its state, how it came about, the share of rows it had seen."""

    sha256: str
    source: str
    trained_fraction: float | None = Field(None, ge=0, le=1)


class UnlearnedModel(Strict):
    """The model after: the hash of its state."""

    sha256: str


class Reference(Strict):
    """What it was compared with: models retrained without the rows, or nothing."""

    kind: Literal["retrain", "none"]
    sha256: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


class Cost(Strict):
    """Seconds of preparing, of unlearning and of one retraining; the largest memory in bytes."""

    prepare_s: float | None = None
    run_s: float | None = None
    retrain_s: float | None = None
    peak_bytes: float | None = None


class Receipt(Strict):
    """The whole receipt, as `receipt.json` holds it."""

    schema_: Literal[1] = Field(1, alias="schema")
    method: Method
    request: Request
    original: Original
    unlearned: UnlearnedModel
    reference: Reference = Reference(kind="none")
    before: dict[str, float] = Field(default_factory=dict)
    after: dict[str, float] = Field(default_factory=dict)
    retrain: dict[str, float] = Field(default_factory=dict)
    cost: Cost = Cost()
    seeds: dict[str, int] = Field(default_factory=dict)
    env: dict[str, Any] = Field(default_factory=dict)
    command: str = ""
    date: str

    def tree(self) -> dict[str, Any]:
        """Return the receipt as plain values; of a request only what it has."""
        tree = self.model_dump(mode="json", by_alias=True)
        tree["request"] = _present(tree["request"])
        return tree

    def short(self) -> dict[str, Any]:
        """Return what the metadata of a model card hold: all but settings, numbers and rows."""
        tree = self.tree()
        tree["method"] = {key: tree["method"][key] for key in ("name", "version")}
        tree["request"].pop("indices", None)
        kept = ("schema", "method", "request", "original", "unlearned", "reference", "cost", "date")
        return {key: _present(tree[key]) for key in kept} | {"receipt": "receipt.json"}


def _present(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _present(item) for key, item in value.items() if item is not None}


def read_receipt(tree: Mapping[str, Any] | Receipt) -> Receipt:
    """Return a receipt from its tree, `receipt.json` parsed.

    Raises:
        ConfigError: an unknown key, or a value of another type.
    """
    if isinstance(tree, Receipt):
        return tree
    return parse_yaml(json.dumps(dict(tree)), "receipt").validate(Receipt)


# --------------------------------------------------------------------------- which rows


def salted_sha256(salt: str, content: bytes) -> str:
    """Return the SHA-256 of the salt (hexadecimal text for 32 bytes), then the content."""
    return hashlib.sha256(bytes.fromhex(salt) + content).hexdigest()


def rows_sha256(indices: np.ndarray, salt: str | None) -> str:
    """Return the hash of a set of rows: plain, or salted."""
    if salt is None:
        return split_sha256(indices)
    return salted_sha256(salt, np.sort(np.asarray(indices, "<i8")).tobytes())


def salt_of(folder: Path) -> str:
    """Return the salt of a run, drawn and kept in its folder when it is first needed.

    Raises:
        ConfigError: the folder cannot be written, or its salt cannot be read.
    """
    path = folder / SALT_FILE
    if not path.exists():
        note = "keep this file: it proves which rows the salted hash of a receipt stands for"
        text = json.dumps({"salt": secrets.token_hex(32), "note": note}, indent=2) + "\n"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            pass
        except OSError as error:
            raise ConfigError(
                f"{path}: a forget set of fewer than {SMALL} rows needs a salt, which cannot be "
                f"kept there ({error}); make the run's folder writable"
            ) from None
    try:
        salt = json.loads(path.read_text(encoding="utf-8"))["salt"]
        bytes.fromhex(salt)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: expected the salt of this run, got {error!r}") from None
    return str(salt)


# --------------------------------------------------------------------------- what may be public

_FOLDERS = re.compile(r"(?<![\w.~/}-])~?/(?:[^\s\"'{},:=/]+/)*(?=[^\s\"'{},:=/])")


def without_folders(value: Any) -> Any:
    """Return plain values with absolute paths in their texts cut down to their last part.

    >>> without_folders("--data parquet:/home/ann/wards --model hf:org/name")
    '--data parquet:wards --model hf:org/name'
    """
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    return [without_folders(item) for item in value] if isinstance(value, list) else value


def without_rows(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a forget set as a command has it, without the rows that it lists."""
    found = dict(spec)
    if found.get("indices"):
        found["indices"] = WITHHELD
    if found.get("steps"):
        found["steps"] = [_step_without_rows(step) for step in found["steps"]]
    return found


def _step_without_rows(step: str) -> str:
    if step.lstrip().startswith("{"):
        return json.dumps(without_rows(json.loads(step)))
    return f"indices:{WITHHELD}" if step.startswith("indices:") else step
