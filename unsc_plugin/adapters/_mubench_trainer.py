"""The bridge: a trainer of MU-Bench whose unlearning is a method of ours."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import nn

from unsc_plugin import engine, forget, own_data
from unsc_plugin.adapters import _mubench_receipt as receipt
from unsc_plugin.adapters._mubench_checkout import SUPPORTED
from unsc_plugin.adapters._mubench_config import (
    INHERITED,
    check_request,
    recipe_of,
    settings_of,
)
from unsc_plugin.adapters._mubench_plan import Host, Plan, scenario_for
from unsc_plugin.adapters._mubench_rows import Reader, Statistics, input_names, rows_of
from unsc_plugin.errors import (
    ArchitectureChanged,
    ConfigError,
    DivergedError,
    MissingOptional,
    ScenarioNotSupported,
)
from unsc_plugin.method import Result, Split, UnlearningMethod, UnlearningTask
from unsc_plugin.own_data import OwnData
from unsc_plugin.rows import Rows
from unsc_plugin.runtime import sealed, state_sha256
from unsc_plugin.spec import DataInfo, ForgetSpec, derive

VAL_FRACTION = 0.1
"""Share of D_r that a method which needs validation rows gets where the data have none."""

SPLITS = ("test", "df", "dr", "ood")


class PluginTrainer:
    """A method of ours as MU-Bench's trainer; joined with its base class by `make_trainer`.

    The method gets the forget and the retain set, never the test set. The weights that it finds are
    copied into the trainer's model. `unlearn_time` is the method's own time, `unlearn_wall_time`
    that of the whole call.
    """

    host: ClassVar[Host]
    name: ClassVar[str]
    model: Any
    args: Any
    raw_datasets: Any
    unlearn_config: Any
    data_collator: Any
    num_labels: Any
    unlearn_time: float | None

    def __init__(self, **kwargs: Any) -> None:
        self.method: UnlearningMethod
        self.result: Result | None = None
        self.ignored: list[str] = []
        self.original: dict[str, Any] = {}
        self.unlearn_wall_time: float | None = None
        self._seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        try:
            super().__init__(**kwargs)
        except OSError as error:
            if "model" in kwargs:
                raise
            raise MissingOptional(_no_base_model(kwargs["unlearn_config"], error)) from error

    # -- before the run

    def method_specific_setup(self) -> None:
        """Make the method, so that whatever is wrong with its settings is found first.

        Raises:
            ScenarioNotSupported: a request that the method does not accept, or several processes.
            ConfigError: unknown settings, or goals that the data have no groups for.
        """
        check_request(self.unlearn_config)
        if self.args.world_size > 1:
            raise ScenarioNotSupported(
                f"world_size: expected one process, got {self.args.world_size}; `unsc run` under "
                "accelerate takes several"
            )
        options, registry = self.host.options, self.host.registry
        kind = registry.method_class(self.name)
        known = {key: getattr(self.args, key) for key in INHERITED if hasattr(self.args, key)}
        known["alpha"] = getattr(self.unlearn_config, "alpha", None)
        accepted = [one.name for one in dataclasses.fields(kind.Config)]
        settings, self.ignored = settings_of(options, known, accepted)
        name = self.name
        if options.preset is not None:
            name = f"{name.partition('.')[0]}.{options.preset}"
        self.method = registry.create(name, **settings)
        self.scenario = scenario_for(self.method, self.plan.request.scenario)
        if self.ignored and kind.name != "retrain":
            print(f"not taken over by {name} (see inherit): {', '.join(self.ignored)}")

    @property
    def plan(self) -> Plan:
        """The request that was made when the data were split.

        Raises:
            ConfigError: the splits were not made by `load_unlearn_data` with this configuration.
        """
        plan = self.host.plan
        if plan is None or plan.config is not self.unlearn_config:
            raise ConfigError(
                "expected splits from mubench.data.base.load_unlearn_data with this very "
                "configuration, after install(); load them again"
            )
        return plan

    @property
    def seed(self) -> int:
        """The seed of the run, 42 where the script set none."""
        given = self.unlearn_config.random_seed
        return 42 if given is None else int(given)

    @property
    def run_seed(self) -> int:
        """The method's seed: what `unsc run --seed` derives for the same number."""
        role = "retrain" if self.method.name == "retrain" else "unlearn"
        return derive(self.seed, role, 0, 0)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.num_labels or self.model.config.num_labels)

    # -- the run

    def method_specific_unlearn(
        self,
        resume_from_checkpoint: Any = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
        **_: Any,
    ) -> None:
        """Unlearn in place of MU-Bench's training loop.

        Raises:
            ScenarioNotSupported: a checkpoint to go on from, or a search.
            DivergedError: the run diverged; the receipt is written.
            ArchitectureChanged: the method's model does not fit into the trainer's.
        """
        if resume_from_checkpoint is not None or trial is not None:
            raise ScenarioNotSupported(
                "resume_from_checkpoint: expected none, a method of ours has no epochs to go on "
                "from; empty the run folder"
            )
        self._ensure_original()
        data, statistics = self._data()
        classifier = self._wrapped(plain_attention(self.model), data, statistics)
        self.original["sha256"] = state_sha256(classifier)
        result = self.method.unlearn(classifier, self._task(data, statistics), self.run_seed)
        self.result = result
        if result.status == "diverged":
            receipt.write(receipt.Receipt.of(self, {}))
            raise DivergedError(f"{self.method.name} diverged: {result.reason}")
        backbone: Any = result.model.backbone
        try:
            self.model.load_state_dict(backbone.state_dict(), strict=True)
        except RuntimeError as error:
            raise ArchitectureChanged(f"{self.method.name}: {error}") from None
        self.model.eval()

    def unlearn(self, *args: Any, **kwargs: Any) -> Any:
        """Unlearn, and count the method's own time."""
        out = super().unlearn(*args, **kwargs)  # type: ignore[misc]
        self.unlearn_wall_time = self.unlearn_time
        if self.result is not None:
            self.unlearn_time = self.result.seconds_prepare + self.result.seconds_unlearn
        return out

    def _task(self, data: OwnData, statistics: Statistics | None) -> UnlearningTask:
        def fresh_model(seed: int) -> nn.Module:
            with sealed(seed):
                fresh: nn.Module = self._wrapped(plain_attention(self._fresh()), data, statistics)
            return fresh

        half = next((name for name in ("bf16", "fp16") if getattr(self.args, name, False)), "fp32")
        return own_data.task_of(
            data,
            num_classes=self.classes,
            fresh_model=fresh_model,
            recipe=recipe_of(self.args),
            scenario=self.scenario,
            accelerator=engine.accelerator("cpu" if self.args.use_cpu else "auto", half),  # type: ignore[arg-type]
        )

    def _wrapped(self, model: nn.Module, data: OwnData, statistics: Statistics | None) -> Any:
        mean, std = statistics or (None, None)
        return own_data.classifier_of(model, data, num_classes=self.classes, mean=mean, std=std)

    def _fresh(self) -> nn.Module:
        """Return the base model before it was trained on this data.

        Raises:
            MissingOptional: it is neither cached nor reachable.
        """
        front, config = self.host.module(""), self.unlearn_config
        name = front.model_map[config.backbone]
        try:
            found: nn.Module = front.model_cls_map[config.data_name].from_pretrained(
                name, num_labels=self.classes, ignore_mismatched_sizes=True
            )
        except OSError as error:
            raise MissingOptional(
                f"{name}: the base model to retrain from is neither cached nor reachable: {error}"
            ) from None
        return found

    # -- its data

    def _data(self) -> tuple[OwnData, Statistics | None]:
        """Return the rows that the method may open, and the statistics of pixels.

        What it does not open is never decoded: labels and positions are known from the request.
        """
        modality = SUPPORTED[self.unlearn_config.data_name]
        statistics = self._statistics() if modality == "image" else None
        request, labels = self.plan.request, self.plan.labels.numpy()
        sets = [self.raw_datasets["df"], self.raw_datasets["dr"]]
        augment = self.host.options.augment
        if augment:
            train = self.raw_datasets["orig_train"]
            sets = [train.select(request.forget), train.select(request.retain)]
        reader = self._reader(sets, statistics, fixed=not augment)
        index = [request.forget, request.retain]
        rows = rows_of(sets, [labels[at] for at in index], index, reader)
        parts = {"forget": rows[0], "retain": rows[1]}
        if Split.VAL in self.method.opens:
            parts["val"], parts["retain"] = self._validation(parts["retain"], statistics)
        for number, split in enumerate((Split.FORGET, Split.RETAIN)):
            if split in self.method.opens:
                reader.warm(number)
        opened = sorted(parts, key=lambda name: name not in self.method.opens)
        key = next(iter(parts[opened[0]].gather([0]).inputs)) if modality == "text" else ""
        input_key = "input_ids" if key else "pixel_values"
        return OwnData({name: parts[name] for name in opened}, modality, input_key), statistics  # type: ignore[arg-type]

    def _validation(self, retain: Rows, statistics: Statistics | None) -> tuple[Rows, Rows]:
        """Return validation rows, and the retained rows without them."""
        if "validation" in self.raw_datasets:
            given = self.raw_datasets["validation"]
            reader = self._reader([given], statistics)
            reader.warm(0)
            below = -1 - np.arange(len(given))  # as validation rows of data loaded by name
            return rows_of([given], [self.plan.val_labels], [below], reader)[0], retain
        info = DataInfo(
            name="", modality="image", num_classes=max(self.classes, 2), input_shape=(),
            labels_sha256="",
        )  # fmt: skip
        drawn = forget.select(
            ForgetSpec(kind="correction", val_fraction=VAL_FRACTION),
            retain,
            seed=self.seed,
            info=info,
        )
        return retain.subset(drawn.val), retain.subset(drawn.retain)

    def _reader(
        self, sets: Sequence[Any], statistics: Statistics | None, *, fixed: bool = True
    ) -> Reader:
        collate: Callable[[list[Any]], Any] = self.data_collator
        return Reader(sets, collate, input_names(self.model), restore=statistics, fixed=fixed)

    def _statistics(self) -> Statistics | None:
        """Return mean and standard deviation that MU-Bench normalises by, None if unavailable."""
        front, preprocess = self.host.module(""), self.host.module("data.preprocess")
        try:
            found = preprocess.AutoImageProcessor.from_pretrained(
                front.model_map[self.unlearn_config.backbone]
            )
            return list(found.image_mean), list(found.image_std)
        except (OSError, AttributeError, TypeError, ValueError):
            return None

    # -- measuring

    def _ensure_original(self) -> None:
        """Measure the original on the test set where MU-Bench's table has no number for it."""
        if self.original:
            return
        config = self.unlearn_config
        table = self.host.module("original_performance").orig_acc
        if config.data_name not in table:
            self.host.note_original(table, config.data_name, {})
        of_data = table[config.data_name]
        if "random" not in of_data:
            self.host.note_original(of_data, "random", 1 / self.classes)
        source = "table"
        if self.host.lacks_original(of_data, config.backbone):
            source = "measured"
            loader = self.get_eval_dataloader(self.raw_datasets["test"])  # type: ignore[attr-defined]
            self.evaluation_loop(loader, description="Original", metric_key_prefix="orig")
            logits, labels = self._seen.pop("orig")
            value = float(np.mean(logits.argmax(axis=1) == labels))
            self.host.note_original(of_data, config.backbone, {"dt": value})
        self.original |= {"value": float(of_data[config.backbone]["dt"]), "source": source}

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Run MU-Bench's loop, and keep logits and labels of the split for the receipt."""
        output = super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]
        logits = output.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        self._seen[kwargs.get("metric_key_prefix", "eval")] = np.asarray(logits), output.label_ids
        return output

    def evaluate_unlearn(
        self, eval_splits: Sequence[str] = SPLITS, ignore_keys: Any = None
    ) -> dict[str, Any]:
        """Evaluate in MU-Bench's order with a seed, and write the receipt.

        Raises:
            DivergedError: a logit is not finite; the receipt is written, and no results.
        """
        self._ensure_original()
        wanted = [one for one in SPLITS if one in eval_splits and one in self.raw_datasets]
        if len(self.raw_datasets["dr"]) < len(self.raw_datasets["df"]):
            evaluator: Any = self.unlearn_evaluator  # type: ignore[attr-defined]
            evaluator.get_knowledge_gap = lambda *_: None  # it draws |D_f| of fewer rows
        with sealed(self.seed):
            found: dict[str, Any] = super().evaluate_unlearn(wanted, ignore_keys)  # type: ignore[misc]
        receipt.write(receipt.Receipt.of(self, self._seen))
        return found


def plain_attention(model: Any) -> Any:
    """Return the model, or a twin with the plain form of attention and the same weights.

    Fused attention has no per-sample gradients and no second derivatives, and rounds otherwise than
    the models that `unsc run` builds; their states have the same names.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) in (None, "eager"):
        return model
    place = next(model.parameters())
    twin = type(model)._from_config(copy.deepcopy(config), attn_implementation="eager")
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.to(place.device, place.dtype).train(model.training)


def trainer_class(host: Host, method: str) -> type[PluginTrainer]:
    """Return the trainer of a method: the bridge on top of MU-Bench's base class."""
    base = host.module("trainer.base").UnlearningTrainer
    body = {"host": host, "name": method, "__doc__": PluginTrainer.__doc__}
    return type("PluginTrainer", (PluginTrainer, base), body)


def _no_base_model(config: Any, error: OSError) -> str:
    data, backbone = config.data_name, config.backbone
    folders = [
        f"checkpoint/{backbone}",
        f"../checkpoint/{data}/{backbone}",
        f"../../checkpoint/{data}/{backbone}",
    ]
    return (
        f"the original model of {data} and {backbone} is not here: looked in {', '.join(folders)} "
        f"and on the hub for jialicheng/{data}-{backbone} ({type(error).__name__})\ntrain it with "
        "the script train.py beside unlearn.py, or put a checkpoint into one of the folders"
    )
