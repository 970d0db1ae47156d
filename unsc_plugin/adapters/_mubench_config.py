"""Configuration files of MU-Bench's scripts: our block in them, translation, new ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from unsc_plugin.adapters._mubench_checkout import OWNED, SUPPORTED, check_data, check_mapping
from unsc_plugin.errors import ConfigError, ScenarioNotSupported, UnknownName
from unsc_plugin.method import build_config
from unsc_plugin.registry import Registry
from unsc_plugin.spec import Recipe, parse_yaml

BLOCK = "unsc_plugin"
ARGS = "UNSC_MUBENCH_ARGS"
PREFIX = "plugin-"
INHERITED = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "weight_decay": "weight_decay",
    "alpha": "alpha",
}
"""MU-Bench's keys that a method may take over, and the settings that they become."""

REFUSED = ("use_cl", "use_so_info", "use_mode_connectivity")

DEFECTS: Mapping[str, str] = {
    "grad_ascent": "its training set is all of D, not the forget set",
    "npo": "its training set is all of D, not the forget set",
    "delete": "its training set is all of D, not the forget set",
    "l1_sparse": "its training set is all of D, and alpha never arrives, so that the penalty is 0",
    "random_label": "the label is always the next class, (y + 1) mod K",
    "salun": "weight decay moves the weights that its mask protects; one batch of D_f crashes it",
    "bad_teaching": "its divergence is taken of raw logits and may become NaN unseen",
    "scrub": "its divergence is taken of raw logits, and it asks for a split that is not there",
    "grad_diff": "it expects columns that only TOFU has",
}
"""What was found when MU-Bench's own methods were run on image classification (2026-01)."""


@dataclass(frozen=True)
class Options:
    """What a run is told beyond MU-Bench's own configuration; keys of the block `unsc_plugin`.

    Attributes:
        home: checkout root or package folder.
        preset: preset of the method.
        set: settings of the method.
        inherit: MU-Bench keys that become settings, see :data:`INHERITED`.
        forget: `mubench` (its index list), or `class-K`: every training row of class K.
        augment: give the method the train transform instead of the fixed one.
        reference: run folder of a retrained model, for gaps.
        data_dir: folder with the data as parquet (train, test) instead of the hub.
        allow_foreign_order: take the index list although the rows are in another order.
        allow_untested: run on a transformers outside the window.
        resume: a complete run folder is no error.
        allow_push: leave `push_to_hub` as it is.
        plugins: further registry files, as `--plugin` of the command line.
    """

    home: str | None = None
    preset: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    inherit: tuple[str, ...] = ()
    forget: str = "mubench"
    augment: bool = False
    reference: str | None = None
    data_dir: str | None = None
    allow_foreign_order: bool = False
    allow_untested: bool = False
    resume: bool = False
    allow_push: bool = False
    plugins: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Options:
        """Return the options of a block.

        Raises:
            ConfigError: an unknown key, a wrong type, or a forget set of no known kind.
        """
        try:
            found: Options = build_config(cls, values)
        except ConfigError as error:
            raise ConfigError(f"{BLOCK}: {error}") from None
        unknown = [key for key in found.inherit if key not in INHERITED]
        if unknown:
            raise ConfigError(
                f"{BLOCK}.inherit: expected some of {', '.join(INHERITED)}, got {unknown[0]!r}"
            )
        found.forgotten_class  # noqa: B018  # raises for what it cannot read
        return found

    @property
    def forgotten_class(self) -> int | None:
        """The class of `class-K`, None for MU-Bench's list.

        Raises:
            ConfigError: neither of both.
        """
        word, _, number = self.forget.partition("-")
        if self.forget == "mubench":
            return None
        if word != "class" or not number.isdigit():
            raise ConfigError(
                f"{BLOCK}.forget: expected mubench or class-K such as class-0, got {self.forget!r}"
            )
        return int(number)

    def over(self, block: Options) -> Options:
        """Return these options where they were given, else those of the block; settings merge."""
        usual = Options()
        given = {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if getattr(self, one.name) != getattr(usual, one.name)
        }
        return replace(block, **{**given, "set": {**block.set, **self.set}})


def plugin_method(name: str, registry: Registry) -> str | None:
    """Return our method that an `unlearn_method` stands for, None where it is MU-Bench's own.

    Raises:
        UnknownName: `plugin-...` of no method of ours.
    """
    name = name.lower()
    if name.startswith(PREFIX):
        return registry.method(name.removeprefix(PREFIX))[0].name + _tag(registry, name)
    if name in OWNED:
        return None
    try:
        return registry.method(name)[0].name + _tag(registry, name)
    except UnknownName:
        return None


def _tag(registry: Registry, name: str) -> str:
    tag = registry.method(name.removeprefix(PREFIX))[1]
    return f".{tag}" if tag else ""


def known_method(name: str, registry: Registry) -> str | None:
    """Return what :func:`plugin_method` returns, for a name that one of both sides knows.

    Raises:
        UnknownName: nobody knows it.
    """
    found = plugin_method(name, registry)
    if found is None and name.lower() not in OWNED:
        raise UnknownName(
            "unlearn_method", name, [*OWNED, *registry.methods],
            f"MU-Bench's own: {', '.join(sorted(OWNED))}; every other name is one of ours, and "
            f"{PREFIX}NAME is always ours",
        )  # fmt: skip
    return found


def settings_of(
    options: Options, config: Mapping[str, Any], accepted: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a method and the MU-Bench keys that it does not take.

    Inherited keys < $UNSC_MUBENCH_ARGS < the block and `--set`.

    Args:
        options: of the run.
        config: MU-Bench's values of the keys of :data:`INHERITED`.
        accepted: the method's settings.

    Raises:
        ConfigError: an inherited key that the method has no setting for, or no JSON in the
            variable.
    """
    lacking = [key for key in options.inherit if INHERITED[key] not in accepted]
    if lacking:
        raise ConfigError(
            f"{BLOCK}.inherit: {lacking[0]} becomes {INHERITED[lacking[0]]!r}, which the method "
            f"does not have; its settings: {', '.join(accepted) or 'none'}"
        )
    inherited = {INHERITED[key]: config[key] for key in options.inherit if key in config}
    if "epochs" in inherited:
        inherited["epochs"] = int(inherited["epochs"])
    try:
        given = check_mapping(json.loads(os.environ.get(ARGS) or "{}"), f"${ARGS}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"${ARGS}: expected a JSON object, got {error}") from None
    ignored = [key for key in INHERITED if key in config and key not in options.inherit]
    return {**inherited, **given, **options.set}, ignored


def recipe_of(arguments: Any) -> Recipe:
    """Return how MU-Bench's arguments would train: AdamW, its learning rate falling to 0.

    Its linear decay is our half cosine.
    """
    return Recipe(
        epochs=int(arguments.num_train_epochs),
        optimizer="adamw",
        lr=float(arguments.learning_rate),
        weight_decay=float(arguments.weight_decay),
        batch_size=int(arguments.per_device_train_batch_size),
        schedule="cosine",
    )


def check_request(config: Any) -> None:
    """Refuse what our methods would silently ignore; `config` has the fields as attributes.

    Raises:
        ScenarioNotSupported: naming the field.
    """
    check_data(config.data_name)
    for name in REFUSED:
        if getattr(config, name, False):
            raise ScenarioNotSupported(
                f"{name}: expected false for a method of ours, which would ignore it; drop it"
            )


# --------------------------------------------------------------------------- translation


def translate_config(
    config: Mapping[str, Any], *, plugin: bool = True, allow_push: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration that runs in the supported window, and what was changed.

    For a method of ours nothing is evaluated or saved while unlearning, because there is no loop
    to choose from; for MU-Bench's own only what would fail is changed.

    >>> translate_config({"evaluation_strategy": "epoch"}, plugin=False)[0]["eval_strategy"]
    'epoch'
    """
    found = {key: value for key, value in config.items() if key != BLOCK}
    changes: list[str] = []

    def put(key: str, value: Any) -> None:
        if found.get(key) != value:
            changes.append(f"{key}: {found.get(key)!r} -> {value!r}")
            found[key] = value

    if "evaluation_strategy" in found:
        found["eval_strategy"] = found.pop("evaluation_strategy")
        changes.append("evaluation_strategy is called eval_strategy")
    if plugin:
        put("eval_strategy", "no")
        put("save_strategy", "no")
        put("load_best_model_at_end", False)
        if found.get("push_to_hub") and not allow_push:
            put("push_to_hub", False)
        if SUPPORTED.get(found.get("dataset_name", "")) == "image":
            put("remove_unused_columns", False)
    if found.get("metric_for_best_model") is None:
        put("metric_for_best_model", "accuracy")
    if found.get("report_to") is None:
        put("report_to", "none")
    workers, cores = found.get("dataloader_num_workers", 0), os.cpu_count() or 1
    if workers > cores:
        put("dataloader_num_workers", cores)
    return found, changes


def read_config(path: Path) -> tuple[dict[str, Any], Options]:
    """Return a configuration file, and the options of its block.

    Raises:
        ConfigError: no JSON object, or a block with unknown keys.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a JSON file, got {error}") from None
    config = check_mapping(tree, str(path))
    return config, Options.of(check_mapping(config.get(BLOCK, {}), f"{path}: {BLOCK}"))


def typed(flag: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return key -> value of `key=value` texts, values typed as YAML types them.

    Raises:
        ConfigError: another form.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"{flag}: expected key=value, got {text!r}")
        found[key] = parse_yaml(value, f"{flag} {key}").tree
    return found


# --------------------------------------------------------------------------- new configurations

_USUAL: Mapping[str, tuple[int, int, float]] = {
    "cifar10": (20, 128, 1e-5),
    "cifar100": (10, 128, 1e-5),
    "imdb": (6, 32, 5e-5),
    "ddi": (8, 32, 5e-5),
}
"""Epochs, batch size and learning rate of MU-Bench's own configurations."""


def parse_run(text: str) -> tuple[str, str, str, float, int]:
    """Return data, backbone, method, ratio and seed of `DATA/BACKBONE/METHOD/RATIO/SEED`.

    Raises:
        ConfigError: another form.
        ScenarioNotSupported: a data set that MU-Bench cannot load.
    """
    try:
        data, backbone, method, fourth, fifth = text.split("/")
        ratio, seed = float(fourth), int(fifth)
    except ValueError:
        raise ConfigError(
            f"--make-config: expected DATA/BACKBONE/METHOD/RATIO/SEED, got {text!r}; for example "
            "cifar10/resnet-18/unsc/2.0/42"
        ) from None
    check_data(data)
    return data, backbone, method, ratio, seed


def make_config(text: str, model_id: str) -> dict[str, Any]:
    """Return a configuration as MU-Bench makes them, with its keys and its place of output."""
    data, backbone, method, ratio, seed = parse_run(text)
    epochs, batch, lr = _USUAL[data]
    columns: dict[str, Any] = (
        {"image_column_name": "image", "label_column_name": "label", "remove_unused_columns": False}
        if SUPPORTED[data] == "image"
        else {"max_seq_length": 128, "metric_name": "accuracy"}
    )
    return {
        "do_train": True,
        "do_eval": True,
        "dataset_name": data,
        "model_name_or_path": model_id,
        "unlearn_method": method,
        "del_ratio": ratio,
        "seed": seed,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 256,
        "learning_rate": lr,
        "weight_decay": 1e-4,
        "warmup_steps": 0,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "overwrite_output_dir": True,
        "report_to": "none",
        "output_dir": f"../../checkpoint/unlearn/{data}/{backbone}/{method}/{ratio}/{seed}",
        "hub_model_id": f"{data}-{backbone}-{method}-{ratio}-{seed}",
        **columns,
    }


def as_json(options: Options) -> dict[str, Any]:
    """Return the options that differ from the usual ones."""
    usual = asdict(Options())
    return {key: value for key, value in asdict(options).items() if value != usual[key]}
