"""Files and settings as strict, frozen objects: YAML with lines, recipes, experiments, boards.

Everything a person writes enters through :func:`read_yaml` and :meth:`Document.validate`; an error
names the file, the line and the path of the setting, and the nearest known key. Everything that
identifies a run leaves through :func:`canonical_json` and :func:`fingerprint`.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from unsc_plugin.errors import ConfigError, nearest

Model = TypeVar("Model", bound=BaseModel)

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
FAMILY_NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*(/[a-z0-9][a-z0-9_-]*)?$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
FamilyName = Annotated[str, Field(pattern=FAMILY_NAME_PATTERN)]


class Split(enum.StrEnum):
    """A part of the data that a method may declare in `needs`. There is no test split here."""

    FORGET = "forget"
    RETAIN = "retain"
    VAL = "val"


class Scenario(enum.StrEnum):
    """What kind of request a method accepts."""

    CLASS = "class"
    SUBCLASS = "subclass"
    RANDOM = "random"
    WEIGHTED = "weighted"
    SEQUENTIAL = "sequential"
    CORRECTION = "correction"


class Strict(BaseModel):
    """Base of all specs: unknown keys rejected, no coercion, finite numbers, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# --------------------------------------------------------------------------- identity and seeds


def canonical_json(value: Any) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, shortest round-trip floats.

    A number that is not finite has no JSON form and is a ValueError.

    >>> canonical_json({"b": 0.1, "a": (1, None)})
    '{"a":[1,null],"b":0.1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain, allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of :func:`canonical_json` as hexadecimal text."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no canonical JSON form")


def derive(seed: int, role: str, *ids: int) -> int:
    """Return a seed that depends on the board seed, a role and integer ids only.

    `SeedSequence([seed, code(role), *ids]).generate_state(1)[0]`, `code` = the first four bytes of
    the role's SHA-256, so that roles never share a stream. A role takes a fixed number of ids:
    trailing zeros change nothing.

    >>> derive(0, "original", 1) == derive(0, "original", 1) != derive(0, "retrain", 1)
    True
    """
    code = int.from_bytes(hashlib.sha256(role.encode()).digest()[:4], "big")
    return int(np.random.SeedSequence([seed, code, *ids]).generate_state(1)[0])


# --------------------------------------------------------------------------- YAML with lines

Path_ = tuple[Hashable, ...]


class _LineLoader(yaml.SafeLoader):
    """A safe loader that reads `1e-3` as a number, as YAML 1.2 does (PyYAML: only `1.0e-3`)."""


_LineLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class Document:
    """A parsed YAML file: its tree and the line (1-based) of every path in it."""

    source: str
    tree: Any
    lines: Mapping[Path_, int] = field(default_factory=dict)

    def line(self, path: Path_) -> int:
        """Return the line of `path`, or of its nearest ancestor."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def validate(self, model: type[Model]) -> Model:
        """Return the tree as `model`.

        Raises:
            ConfigError: with one line per fault: file, line, path, what was wrong, nearest key.
        """
        try:
            text = json.dumps(self.tree)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{self.source}: expected plain values (text, numbers, lists, maps), got {error}"
            ) from None
        try:
            return model.model_validate_json(text)
        except ValidationError as error:
            faults = self._faults(model, error.errors())
            raise ConfigError("\n".join(faults[:8])) from None

    def _faults(self, model: type[BaseModel], items: Iterable[Any]) -> list[str]:
        """Return a line per fault, less those above another one, which only follow from it.

        Such are the other branches of a union, and a list left too short by its faulty item.
        """
        places = [(_place(self.tree, item), item) for item in items]
        above = {place[:size] for place, _ in places for size in range(len(place))}
        return [self._fault(model, item, place) for place, item in places if place not in above]

    def _fault(self, model: type[BaseModel], item: Any, place: Path_) -> str:
        location = tuple(item["loc"])
        where = f"{self.source}:{self.line(place)}"
        path = ".".join(map(str, place)) or "(top level)"
        message = item["msg"]
        if item["type"] == "extra_forbidden":
            known = _keys_beside(model, location)
            close = nearest(str(location[-1]), known)
            message = "unknown key" + (f"; did you mean {close[0]!r}?" if close else "")
            if known and not close:
                message += f"; known keys: {', '.join(sorted(known))}"
        elif item["type"] != "missing":
            message += f" (got {item['input']!r})"[:120]
        return f"{where}: {path}: {message}"


def _place(tree: Any, item: Any) -> Path_:
    """Return the path in the file that a fault of pydantic is about (union tags dropped)."""
    path: list[Hashable] = []
    for part in item["loc"]:
        in_list = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if in_list or (isinstance(tree, Mapping) and part in tree):
            tree = tree[part]
            path.append(part)
    return (*path, item["loc"][-1]) if item["type"] == "missing" else tuple(path)


def _keys_beside(model: type[BaseModel], location: tuple[Any, ...]) -> set[str]:
    """Return the field names of the model that holds the last part of `location`."""
    found: Any = model
    for part in location[:-1]:
        found = _step(found, part)
    names: set[str] = set()
    for candidate in _models_in(found):
        names |= {f.alias or name for name, f in candidate.model_fields.items()}
    return names


def _step(annotation: Any, part: Any) -> Any:
    for candidate in _models_in(annotation):
        for name, info in candidate.model_fields.items():
            if part in (name, info.alias):
                return info.annotation
    arguments = getattr(annotation, "__args__", ())
    return arguments[-1] if arguments and not _models_in(annotation) else annotation


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for argument in getattr(annotation, "__args__", ()):
        found += _models_in(argument)
    return found


def read_yaml(path: str | Path) -> Document:
    """Read a YAML file.

    Raises:
        ConfigError: the file is missing, is no YAML, has a duplicate key or an object tag.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give an existing YAML file") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Document:
    """Parse YAML text; see :func:`read_yaml`.

    Raises:
        ConfigError: no YAML, a duplicate key, or a tag that would build an object.
    """
    lines: dict[Path_, int] = {}
    try:
        loader = _LineLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _walk(node, (), lines, source)
        tree = loader.construct_document(node) if node is not None else None
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else 1
        hint = "; only plain YAML is read" if "tag" in str(error.problem) else ""
        raise ConfigError(f"{source}:{line}: {error.problem}{hint}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply, or in itself; flatten it") from None
    return Document(source, tree, lines)


def parse_settings(query: str, name: str) -> dict[str, Any]:
    """Return what stands behind the `?` of a name, `key=value&key=value`, as YAML values.

    Raises:
        ConfigError: a part without `=`, or a value that is no YAML.

    >>> parse_settings("layers=1&act=gelu", "bert")
    {'layers': 1, 'act': 'gelu'}
    """
    found = {}
    for setting in filter(None, query.split("&")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"{name}?{query}: expected key=value after '?', got {setting!r}")
        found[key] = parse_yaml(value, f"{name}?{key}").tree
    return found


def _walk(node: yaml.Node, path: Path_, lines: dict[Path_, int], source: str) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for position, child in enumerate(node.value):
            _walk(child, (*path, position), lines, source)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise ConfigError(f"{source}:{line}: expected text as key, got a list or a map")
            place = (*path, key.value)
            if place in lines:
                raise ConfigError(
                    f"{source}:{key.start_mark.line + 1}: duplicate key {key.value!r}, first seen "
                    f"on line {lines[place]}; keep one of them"
                )
            lines[place] = key.start_mark.line + 1
            _walk(child, place, lines, source)


# --------------------------------------------------------------------------- recipes and data


class Recipe(Strict):
    """How the original and every retrained model are trained.

    `epochs` passes over the data in batches of `batch_size`; learning rate `lr`, multiplied by the
    schedule (constant, or half a cosine to 0 per step) after `warmup_epochs` of linear warm-up.
    """

    epochs: int = Field(20, ge=0)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(5e-4, ge=0)
    batch_size: int = Field(64, ge=1)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    augment: Literal["none", "crop_flip"] = "none"
    max_grad_norm: float | None = Field(None, gt=0)


DEFAULT_RECIPE = Recipe(
    epochs=10, optimizer="adamw", lr=1e-3, weight_decay=0.01, batch_size=64, schedule="cosine"
)
"""For a backbone and data set that bring none: trains most architectures without tuning."""


class DataInfo(Strict):
    """What a backbone must know of a data set to fit it, and what attacks must leave alone.

    `special_token_ids`: tokens that carry no content (texts); `feature_numeric`: which features are
    standardised numbers, the others being one-hot categories (tables). None where unknown.
    """

    name: str
    modality: Literal["image", "text", "tabular"]
    num_classes: int = Field(ge=2)
    class_names: tuple[str, ...] = ()
    input_shape: tuple[int, ...]
    vocab_size: int | None = None
    pad_token_id: int | None = None
    special_token_ids: tuple[int, ...] | None = None
    feature_numeric: tuple[bool, ...] | None = None
    row_order: str | None = None
    revision: str | None = None
    labels_sha256: str
    groups: tuple[str, ...] = ()


# --------------------------------------------------------------------------- registry.yaml

Modality = Literal["image", "text", "tabular"]


class Paper(Strict):
    """Where a method comes from."""

    title: str
    year: int
    arxiv: str | None = None
    doi: str | None = None
    repo: str | None = None


class Preset(Strict):
    """Named settings of a method with their origin."""

    args: dict[str, Any] = Field(default_factory=dict)
    where: dict[str, str] = Field(default_factory=dict)
    source: Literal["paper", "reference_code", "tuned", "control"]
    trials: int | None = None
    seeds: tuple[int, ...] = ()


class MethodEntry(Strict):
    """One method of a registry file."""

    target: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    summary: str = Field(max_length=100)
    paper: Paper | None = None
    needs: tuple[Split, ...]
    scenarios: tuple[Scenario, ...]
    modalities: Literal["all"] | tuple[Modality, ...] = "all"
    supports_weights: bool = False
    requires: tuple[str, ...] = ()
    aliases: dict[str, str] = Field(default_factory=dict)
    known_as: dict[str, str] = Field(default_factory=dict)
    beside: tuple[str, ...] = ()  # entries without which a board's row of the method says little
    defaults: dict[str, Any] = Field(default_factory=dict)
    presets: dict[Name, Preset] = Field(default_factory=dict)


class BackboneEntry(Strict):
    """One backbone shortcut; `timm:<id>`, `hf:<id>` and `hf-config:<type>` need none."""

    source: Literal["timm", "hf", "hf-config", "torch"]
    id: str
    summary: str = ""
    stem: Literal["native", "cifar"] = "native"
    args: dict[str, Any] = Field(default_factory=dict)
    modality: Modality | None = None
    input_size: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    mubench: str | None = None
    recipe: Recipe | None = None


class GroupRule(Strict):
    """One named group: rows of one of the `values`, or with low ≤ value < high, or the `rest`."""

    name: str = Field(min_length=1)
    values: tuple[str | int | float, ...] = ()
    low: float | None = None
    high: float | None = None
    rest: bool = False

    @model_validator(mode="after")
    def _one_rule(self) -> GroupRule:
        ranged = self.low is not None or self.high is not None
        if bool(self.values) + ranged + self.rest != 1:
            raise ValueError(f"group {self.name!r} needs one of values, low/high, rest: true")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"group {self.name!r} needs low < high")
        return self


class Columns(Strict):
    """Which columns hold what. Tables: `input` empty means all columns that are left over.

    `group` names the column that says who a row is about (it may be a feature too). Groups are its
    values in sorted order or, where `groups` is given, those named groups: a group's code is its
    place in the list, 1 the privileged one by convention, and a row in none of them has code -1.
    """

    input: str | tuple[str, ...] = ()
    label: str = "label"
    group: str | None = None
    groups: tuple[GroupRule, ...] = ()
    sub_labels: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _distinct_groups(self) -> Columns:
        if self.groups and self.group is None:
            raise ValueError("groups needs group, the column that they are made of")
        if len(self.groups) == 1:
            raise ValueError("groups needs at least two groups to compare")
        values = [value for rule in self.groups for value in rule.values]
        for what, names in (("name", [rule.name for rule in self.groups]), ("value", values)):
            twice = [name for at, name in enumerate(names) if name in names[:at]]
            if twice:
                raise ValueError(f"two groups have the {what} {twice[0]!r}")
        if sum(rule.rest for rule in self.groups) > 1:
            raise ValueError("only one group can be the rest")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `groups` out where there are none, so that older data keep their keys."""
        tree: dict[str, Any] = plain(self)
        return tree if self.groups else {k: v for k, v in tree.items() if k != "groups"}


class DatasetEntry(Strict):
    """One data set: where its rows are and what they mean."""

    source: Literal["hub", "parquet", "sklearn", "synthetic"]
    id: str | None = None
    path: str | None = None
    config: str | None = None
    revision: str | None = None
    summary: str = ""
    splits: dict[Literal["train", "val", "test"], str | tuple[str, ...]] = {
        "train": "train",
        "test": "test",
    }
    columns: Columns = Columns()
    modality: Modality
    num_classes: int | None = Field(None, ge=2)
    max_length: int = Field(64, ge=4)
    test_fraction: float = Field(0.25, gt=0, lt=1)
    val_fraction: float = Field(0.1, ge=0, lt=1)
    label_noise: float = Field(0.0, ge=0, lt=1)
    limit: dict[Literal["train", "test"], int] = Field(default_factory=dict)
    args: dict[str, Any] = Field(default_factory=dict)
    row_order: str | None = None
    labels_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    license: str | None = None
    mubench: str | None = None
    recipe: Recipe | None = None

    @model_validator(mode="after")
    def _has_place(self) -> DatasetEntry:
        if self.source == "parquet" and not self.path:
            raise ValueError("source parquet needs path")
        if self.source in ("hub", "sklearn", "synthetic") and not self.id:
            raise ValueError(f"source {self.source} needs id")
        return self


class ForgetSpec(Strict):
    """Which training samples are to be forgotten; the fields that matter depend on `kind`.

    A `correction` names none: the goal of the method is the request. It takes the share
    `val_fraction` of every (label, group) cell of the training rows as validation rows, anew for
    every draw; without the field those of the data set, or 0.2 where it has none.
    """

    kind: Literal[
        "class",
        "subclass",
        "random",
        "index_file",
        "indices",
        "index_prefix",
        "sequence",
        "correction",
    ]
    data: str | None = None
    scenario: Scenario | None = None
    summary: str = ""
    classes: tuple[int, ...] = ()
    column: str | None = None
    values: tuple[str | int, ...] = ()
    fraction: float | None = Field(None, gt=0, lt=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = None
    stratified: bool = True
    path: str | None = None
    indices: tuple[int, ...] = ()
    ratio: float | None = Field(None, gt=0, le=10)
    unit: Literal["percent_of_10"] | None = None
    row_order: str | None = None
    steps: tuple[str, ...] = ()
    val_fraction: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _complete(self) -> ForgetSpec:
        required = {
            "class": ("classes",),
            "subclass": ("column", "values"),
            "index_file": ("path",),
            "indices": ("indices",),
            "index_prefix": ("path",),
            "sequence": ("steps",),
        }.get(self.kind, ())
        lacking = [name for name in required if not getattr(self, name)]
        if lacking:
            raise ValueError(f"kind {self.kind} needs {' and '.join(lacking)}")
        if self.val_fraction is not None and self.kind != "correction":
            raise ValueError(f"kind {self.kind} takes no val_fraction")
        if self.kind == "random" and (self.fraction is None) == (self.n is None):
            raise ValueError("kind random needs exactly one of fraction and n")
        return self


class Defaults(Strict):
    """What is used when a flag is left out (built-in registry only)."""

    method: str | None = None
    backbone: str
    dataset: str
    forget_set: str
    seed: int


class RegistryFile(Strict):
    """A whole `registry.yaml`."""

    schema_: Literal[1] = Field(alias="schema")
    package: str | None = None
    requires: tuple[str, ...] = ()
    defaults: Defaults | None = None
    methods: dict[Name, MethodEntry] = Field(default_factory=dict)
    backbones: dict[Name, BackboneEntry] = Field(default_factory=dict)
    datasets: dict[Name, DatasetEntry] = Field(default_factory=dict)
    forget_sets: dict[FamilyName, ForgetSpec] = Field(default_factory=dict)


# --------------------------------------------------------------------------- experiments, boards


class RelearnSpec(Strict):
    """Retain-only relearn probe: number of steps and learning rate as a share of the recipe's."""

    steps: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    lr_scale: float = Field(0.1, gt=0)


class ProbeSpec(Strict):
    """Few-shot prototype probe: shots per label, repeats of the draw."""

    shots: int = Field(5, ge=1)
    repeats: int = Field(20, ge=1)


class MiaSpec(Strict):
    """Operating point of the membership attacks."""

    fpr: float = Field(0.01, gt=0, lt=1)


class AttackSpec(Strict):
    """The adaptive attack of a measurement: PGD on the test rows, in the units of the inputs."""

    norm: Literal["linf", "l2"] = "linf"
    budget: float = Field(0.1, gt=0)
    steps: int = Field(50, ge=1)
    starts: int = Field(5, ge=1)


class CorrectionSpec(Strict):
    """What corrections are measured by: groups, robustness, and the distance to the oracle.

    `metric` is what the board compares at equal values of. `oracle` retrains the model with the
    weights of a plan, so that a method that honours weights has something to be close to.
    """

    metric: Literal["dp_soft", "dp_diff", "eop_soft", "eop_diff", "eo_diff", "robust_nll"] = (
        "dp_soft"
    )
    positive_class: int | None = Field(None, ge=0)
    attack: AttackSpec | None = None
    oracle: bool = True


class EvaluationSpec(Strict):
    """The block `evaluation` of a board.

    `trajectory` keeps accuracies along the steps of every run that is no sequence, for comparison
    at equal forgetting. It changes no result; `peak_bytes` then counts the predictions made for it.
    `correction` says how requests that name a goal and no forget set are measured.
    """

    tier: Literal["default"] = "default"
    train_seeds: int = Field(5, ge=1)
    draws: int = Field(2, ge=1)
    reference_pool: int = Field(5, ge=1)
    retain_eval: Literal["all"] | Annotated[int, Field(ge=1)] = 10000
    relearn: RelearnSpec = RelearnSpec()
    probe: ProbeSpec = ProbeSpec()
    mia: MiaSpec = MiaSpec()
    cost_gate: float = Field(0.2, gt=0)
    admission_z: float = Field(3.0, ge=0)
    a_min: float = Field(0.01, gt=0, lt=1)
    confidence: float = Field(0.95, gt=0, lt=1)
    bootstrap: int = Field(2000, ge=100)
    weights: dict[Literal["J", "P", "L", "H", "C"], Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict
    )
    trajectory: bool = False
    correction: CorrectionSpec | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is newer where it is off, so that older boards keep keys and records."""
        tree: dict[str, Any] = plain(self)
        newer = {"trajectory": self.trajectory, "correction": self.correction is not None}
        return {k: v for k, v in tree.items() if newer.get(k, True)}


class ScenarioSpec(Strict):
    """One scenario of a board: data, backbone, recipe, and the forget set of every draw."""

    name: Name
    description: str = ""
    data: str
    model: str
    recipe: Recipe | None = None
    forget: tuple[str | ForgetSpec, ...] = Field(min_length=1)


class EntrySpec(Strict):
    """One row of a board: a method, possibly with settings of its own.

    `sweep` names one setting and its values: the entry becomes one per value, called
    `<label>@<value>`, which together are a curve.
    """

    method: str
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.@-]*$")] | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    sweep: dict[str, tuple[float, ...]] = Field(default_factory=dict, max_length=1)
    track: Literal["default", "budgeted", "oracle"] = "default"

    @model_validator(mode="after")
    def _one_sweep(self) -> EntrySpec:
        for key, values in self.sweep.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"sweep.{key}: expected different values, got {list(values)}")
            if key in self.set:
                raise ValueError(f"{key} is in set and in sweep; give it once")
        return self

    @property
    def label(self) -> str:
        """The name under which the entry is recorded."""
        return self.name or self.method

    @property
    def swept(self) -> tuple[EntrySpec, ...]:
        """The entry itself, or one per value of its sweep."""
        if not self.sweep:
            return (self,)
        [(key, values)] = self.sweep.items()
        return tuple(
            EntrySpec(
                method=self.method,
                name=f"{self.label}@{value:g}",
                set={**self.set, key: value},
                track=self.track,
            )
            for value in values
        )


class BoardSpec(Strict):
    """A whole `board.yaml`."""

    schema_: Literal[1] = Field(alias="schema")
    name: Name
    title: str
    version: int = Field(1, ge=1)
    seed: int = 0
    scenarios: tuple[ScenarioSpec, ...] = Field(min_length=1)
    entries: tuple[str | EntrySpec, ...] = Field(min_length=1)
    evaluation: EvaluationSpec = EvaluationSpec()

    @model_validator(mode="after")
    def _consistent(self) -> BoardSpec:
        names = [scenario.name for scenario in self.scenarios]
        if len(set(names)) < len(names):
            raise ValueError("two scenarios share a name")
        labels = [entry.label for entry in self.rows]
        doubled = sorted({label for label in labels if labels.count(label) > 1})
        if doubled:
            raise ValueError(f"entries named twice: {', '.join(doubled)}; give one a `name`")
        for scenario in self.scenarios:
            if len(scenario.forget) not in (1, self.evaluation.draws):
                raise ValueError(
                    f"scenario {scenario.name}: {len(scenario.forget)} forget sets for "
                    f"{self.evaluation.draws} draws; give one that is drawn anew, or one per draw"
                )
        return self

    @property
    def rows(self) -> tuple[EntrySpec, ...]:
        """The entries as :class:`EntrySpec` in file order, one for every value of a sweep."""
        given = (EntrySpec(method=one) if isinstance(one, str) else one for one in self.entries)
        return tuple(entry for one in given for entry in one.swept)


class Experiment(Strict):
    """One run, fully resolved: the file of `unsc run --spec`, and the `experiment` of a record."""

    method: str
    set: dict[str, Any] = Field(default_factory=dict)
    data: str
    model: str
    forget: str | ForgetSpec
    seed: int = 0
    recipe: Recipe | None = None
    evaluation: EvaluationSpec = EvaluationSpec()

    def fingerprint(self) -> str:
        """Return the SHA-256 of the canonical JSON of every field."""
        return fingerprint(self.model_dump(mode="json"))
