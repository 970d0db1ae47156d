"""A run folder opened again: its record, the data and the model it speaks of, the original."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from unsc_plugin import evaluation, models, record, run
from unsc_plugin.adapters import _receipt
from unsc_plugin.adapters._receipt import Receipt
from unsc_plugin.data import expand_path
from unsc_plugin.errors import CacheMismatch, ConfigError, RecordError
from unsc_plugin.evaluation import Outputs
from unsc_plugin.forget import Request
from unsc_plugin.metrics.accuracy import accuracy
from unsc_plugin.models import Classifier
from unsc_plugin.pool import Member
from unsc_plugin.record import Record
from unsc_plugin.registry import Registry
from unsc_plugin.run import Setting
from unsc_plugin.spec import (
    BackboneEntry,
    EntrySpec,
    EvaluationSpec,
    ForgetSpec,
    MethodEntry,
    Model,
    Recipe,
    derive,
    parse_yaml,
)

CHECKED_ROWS = 8


@dataclass(frozen=True)
class Opened:
    """A finished run and what it was made of; nothing is trained to open it."""

    folder: Path
    record: Record
    setting: Setting

    @property
    def unit(self) -> run.Unit:
        """The entry at its train seed and draw."""
        tag = f".{self.record.preset}" if self.record.preset else ""
        entry = EntrySpec(method=f"{self.record.method}{tag}")
        return run.Unit(entry, self.record.unit.train_seed, self.record.unit.draw)

    @cached_property
    def request(self) -> Request:
        """What was forgotten.

        Raises:
            RecordError: other rows than the record's.
        """
        found = self.setting.request(self.unit.draw)
        for name, here in (("data", self.setting.content), ("forget", found.forget_sha256)):
            there = self.record.hashes.get(name, here)
            if here != there:
                raise RecordError(
                    f"{self.folder}: expected {name} with SHA-256 {there} as in record.json, got "
                    f"{here}; the data or the forget set have changed since the run"
                )
        return found

    @cached_property
    def model(self) -> Classifier:
        """The unlearned model.

        Raises:
            ConfigError: the folder has no weights.
            CacheMismatch: other weights than the record's.
        """
        path = self.folder / "model.safetensors"
        if not path.is_file():
            raise ConfigError(
                f"{path}: expected the weights of the run, found none; run it again: "
                f"{self.record.command} --out DIR"
            )
        model: Any = self.setting.build(0)
        models.load_checkpoint(model, path)
        there = self.record.hashes.get("unlearned")
        if there is not None and (here := models.state_sha256(model)) != there:
            raise CacheMismatch(
                f"{path}: expected a state with SHA-256 {there} as in record.json, found {here}; "
                "the file is not the one that the run wrote"
            )
        return model.eval()  # type: ignore[no-any-return]

    @property
    def outputs(self) -> Outputs:
        """The logits that the run has kept."""
        return Outputs.load(self.folder / "outputs.safetensors")

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Some test rows, as the classifier takes them."""
        test = self.setting.splits.test
        return test.gather(list(range(min(CHECKED_ROWS, len(test))))).inputs

    @property
    def fraction(self) -> float:
        """Share of the training rows that were forgotten."""
        return self.request.n / len(self.setting.splits.train)

    def before(self) -> dict[str, float]:
        """Return the numbers of the original model, none if it is not in the cache any more."""
        found = self._kept({self.record.hashes.get("original", ""), *self.record.reference_hashes})
        original = found.get(self.record.hashes.get("original", ""))
        if original is None:
            return {}
        pool = [found[one] for one in self.record.reference_hashes if one in found]
        whole = len(pool) == len(self.record.reference_hashes)
        return self._numbers(original, pool if whole else [])

    def _kept(self, wanted: set[str]) -> dict[str, Member]:
        """Return the models of the cache with these state hashes."""
        found = {}
        for path in sorted((self.setting.pool.root / "models").glob("*/*/meta.json")):
            try:
                meta = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                continue  # damaged, and so none of those that are looked for
            if meta.get("sha256") in wanted:
                found[meta["sha256"]] = Member(path.parent.name, path.parent, meta)
        return found

    def _numbers(self, original: Member, pool: Sequence[Member]) -> dict[str, float]:
        draw, train_seed = self.unit.draw, self.unit.train_seed
        own = self._outputs(original, train_seed)
        correction = self.request.kind == "correction"
        others = [self._outputs(one, train_seed if correction else j) for j, one in enumerate(pool)]
        known = {*self.record.metrics, *self.record.missing}
        groups = {"core"} | {"mubench" for name in known if name.startswith("mubench.")}
        groups |= {"mia" for name in known if "umia" in name}
        frame = self.setting.frame(draw)
        entry = self.setting.registry.method(self.record.method)[0].entry
        known_as = entry.known_as if isinstance(entry, MethodEntry) else {}
        return evaluation.evaluate(
            own,
            others,
            frame,
            original_test_accuracy=accuracy(own.test, frame.test.labels.numpy(), split="test"),
            mubench_method=known_as.get("mubench", ""),
            groups=groups,
        ).metrics

    def _outputs(self, member: Member, number: int) -> Outputs:
        draw = self.unit.draw
        return self.setting.pool.outputs(
            member,
            self.setting.frame(draw),
            self.setting.build,
            relearn_seed=derive(self.setting.seed, "eval", draw, number),
        )

    @property
    def data_id(self) -> str:
        """The hub id of the data, or their name without folders and arguments."""
        dataset = self.setting.dataset
        if dataset is not None and dataset.source == "hub" and dataset.id:
            return dataset.id
        name = self.record.experiment["data"].partition("?")[0].removeprefix("parquet:")
        return Path(name).name or "data"

    @property
    def base_model(self) -> str | None:
        """The hub id of the published weights that the original started from, None for none."""
        entry, model = self.setting.entry, self.model
        if not self.setting.pretrained or not models.HUB_ID.match(entry.id):
            return None
        if entry.source == "hf":
            return None if Path(entry.id).is_dir() else entry.id
        settings: Any = getattr(model.backbone, "pretrained_cfg", {})
        return settings.get("hf_hub_id") or None if entry.source == "timm" else None

    def command(self, with_rows: bool = False) -> str:
        """Return the command that repeats the run, without folders of this machine.

        Rows that it lists are left out unless they are asked for, and so is a sub-label that few
        rows have.
        """
        words: list[str] = shlex.split(self.record.command)
        if "--forget" in words and not with_rows:
            at = words.index("--forget") + 1
            spec = _receipt.without_rows(json.loads(words[at]))
            if spec["kind"] == "subclass" and self.request.n < _receipt.SMALL:
                spec["values"] = _receipt.WITHHELD
            words[at] = json.dumps(spec, separators=(",", ":"))
        return shlex.join(_receipt.without_folders(words))


# --------------------------------------------------------------------------- opening


def open_run(
    place: str | Path,
    registry: Registry,
    *,
    data_dir: Path | None = None,
    cache: Path | None = None,
) -> Opened:
    """Open a run folder, or the `record.json` in it.

    Raises:
        ConfigError: no such folder, or no record in it.
        RecordError: a damaged record, or that of a run that did not end well.
        UnscError: names that are not known any more, or data that are not there.
    """
    place = Path(place)
    path = place / "record.json" if place.is_dir() else place
    if not path.is_file():
        raise ConfigError(
            f"expected a run folder (record.json, model.safetensors) as `unsc run` leaves it, got "
            f"{place}; run a method first: unsc run METHOD --out DIR"
        )
    found = record.read(path)
    if found.status != "ok":
        raise RecordError(
            f"{path}: the run {found.status} ({found.reason}); there is no unlearned model to "
            "export"
        )
    told: Mapping[str, Any] = found.experiment
    try:
        entry = _read(BackboneEntry, told["backbone"])
        forget, recipe = _read(ForgetSpec, told["forget"]), _read(Recipe, told["recipe"])
        measured = _read(EvaluationSpec, told["evaluation"])
        names = {"data_name": told["data"], "model_name": told["model"], "seed": told["seed"]}
    except KeyError as error:
        raise RecordError(f"{path}: experiment: expected {error}, found none") from None
    setting = run.setting(
        registry,
        forget_sets=[forget],
        evaluation_spec=measured,
        recipe=recipe,
        data_dir=data_dir,
        cache=cache,
        pretrained=bool(told.get("pretrained")),
        name=found.scenario,
        allow_foreign_order=True,  # the record's hash says whether these are the rows
        **names,
    )
    return Opened(path.parent, found, dataclasses.replace(setting, entry=entry))


def _read(kind: type[Model], tree: Any) -> Model:
    return parse_yaml(json.dumps(tree), f"record.json: experiment: {kind.__name__}").validate(kind)


# --------------------------------------------------------------------------- its receipt


def receipt_of(opened: Opened, *, with_indices: bool = False) -> Receipt:
    """Return the receipt of a run; see :mod:`_receipt` for what it does not tell."""
    found, setting = opened.record, opened.setting
    named = setting.registry.method(found.method)[0]
    version = f"unsc-plugin {found.package_version}"
    hashes = [found.hashes["reference_file"]] if "reference_file" in found.hashes else []
    seeds = [
        derive(setting.seed, "reference", opened.unit.draw, j)
        for j in range(len(found.reference_hashes))
        if opened.request.kind != "correction"
    ]
    return Receipt(
        schema=1,
        method=_receipt.Method(
            name=opened.unit.entry.method,
            version=version if named.origin == "built-in" else Path(named.origin).name,
            config=_receipt.without_folders(found.config),
            checks=found.checks,
        ),
        request=_request(opened, with_indices),
        original=_receipt.Original(
            sha256=found.hashes["original"],
            source=_source(opened),
            trained_fraction=1 - len(opened.request.val) / len(setting.splits.train),
        ),
        unlearned=_receipt.UnlearnedModel(sha256=found.hashes["unlearned"]),
        reference=_receipt.Reference(
            kind="retrain" if found.reference else "none",
            sha256=tuple(hashes or found.reference_hashes),
            seeds=() if hashes else tuple(seeds),
        ),
        before=opened.before(),
        after=found.metrics,
        retrain=found.reference,
        cost=_cost(found.cost),
        seeds={
            "run": setting.seed,
            "method": found.seed,
            "train_seed": found.unit.train_seed,
            "draw": found.unit.draw,
        },
        env={**found.environment, "commit": found.commit},
        command=opened.command(with_indices),
        date=found.created,
    )


def _request(opened: Opened, with_indices: bool) -> _receipt.Request:
    asked = opened.request
    index = asked.forget_index
    fields: dict[str, Any] = {"scenario": str(asked.scenario), "n": asked.n}
    fields["fraction"] = opened.fraction
    if not asked.n:  # a correction by weights
        return _receipt.Request(**fields)
    salt = None
    if asked.n < _receipt.SMALL and not with_indices:
        salt = _receipt.salt_of(opened.folder)
    hashed = "split_sha256" if salt is None else "salted_sha256"
    fields[hashed] = _receipt.rows_sha256(index, salt)
    if asked.spec.path is not None:
        fields["index_file"] = _index_file(asked.spec.path, salt)
    if with_indices:
        fields["indices"] = tuple(np.sort(index).tolist())
    return _receipt.Request(**fields)


def _index_file(place: str, salt: str | None) -> _receipt.IndexFile:
    path = expand_path(place)
    content = path.read_bytes()
    if salt is None:
        return _receipt.IndexFile(name=path.name, sha256=hashlib.sha256(content).hexdigest())
    return _receipt.IndexFile(name=path.name, salted_sha256=_receipt.salted_sha256(salt, content))


def _source(opened: Opened) -> str:
    entry = opened.setting.entry
    name = f"{entry.source}:{_receipt.without_folders(entry.id)}"
    start = "published weights" if opened.setting.pretrained else "random weights"
    return f"{name}, trained from {start}"


def _cost(cost: Mapping[str, float]) -> _receipt.Cost:
    prepare, unlearn = cost.get("seconds_prepare"), cost.get("seconds_unlearn")
    ratio = cost.get("time_ratio")
    retrain = ((prepare or 0.0) + (unlearn or 0.0)) / ratio if ratio else None
    return _receipt.Cost(
        prepare_s=prepare, run_s=unlearn, retrain_s=retrain, peak_bytes=cost.get("peak_bytes")
    )
