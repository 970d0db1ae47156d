"""What is put into a loaded MU-Bench, and how every bit of it is taken out again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unsc_plugin import forget
from unsc_plugin.adapters._mubench_checkout import Checkout, check_window, locate, prefix
from unsc_plugin.adapters._mubench_config import Options, check_request, plugin_method
from unsc_plugin.adapters._mubench_plan import Plan
from unsc_plugin.adapters._mubench_trainer import trainer_class
from unsc_plugin.errors import MissingOptional, RowOrderMismatch, ScenarioNotSupported
from unsc_plugin.method import Split
from unsc_plugin.registry import Registry
from unsc_plugin.registry import load as load_registry
from unsc_plugin.rows import Rows
from unsc_plugin.spec import DataInfo, DatasetEntry, ForgetSpec

FOREIGN_TOP_LEVEL = ("transformers_for_cl", "wandb", "nltk")
"""Packages that MU-Bench imports at its top level and that a plain run never uses."""

TABLE = "table"
MEASURED = "measured"


class Accuracy:
    """What `evaluate.load("accuracy")` gives, without the network."""

    @staticmethod
    def compute(*, predictions: Any, references: Any) -> dict[str, float]:
        """Return the share of predictions that are right."""
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class OfflineEvaluate:
    """The module `evaluate` with an accuracy that needs no network; all else is handed on."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def load(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return the metric of that name."""
        return Accuracy() if name == "accuracy" else self._module.load(name, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Stub(types.ModuleType):
    """A module that can be imported, and whose content says that it is missing when used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # libraries look there for what is installed

    __path__: list[str] = []  # noqa: RUF012  # a package, so that its modules can be asked for

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"

        def missing(*_: Any, **__: Any) -> Any:
            raise ImportError(f"{full} is needed, but {self.__name__} is not installed")

        return type(name, (), {"__init__": missing, "from_pretrained": staticmethod(missing)})


class Installed:
    """A MU-Bench that knows our methods; a context manager that takes them out at its end.

    Attributes:
        checkout: the MU-Bench.
        options: of the current run.
        registry: our methods.
        untested: the version of transformers if it lies outside the window.
        plan: the request of the current run.
        changes: what was changed in its configuration.
        method_names: names that scripts asked a trainer for.
    """

    def __init__(self, checkout: Checkout, options: Options, untested: str | None) -> None:
        self.checkout, self.options, self.untested = checkout, options, untested
        self.registry: Registry = load_registry(options.plugins)
        self.plan: Plan | None = None
        self.changes: list[str] = []
        self._saved: list[tuple[Any, str, Any]] = []
        self._loaded: set[str] = set()
        self._trainers: dict[str, type] = {}
        self._measured: list[tuple[dict[str, Any], str]] = []
        self._on_path = False

    # -- in and out

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()

    def uninstall(self) -> None:
        """Put back every attribute, table and module as it was; a second call does nothing."""
        global _current
        for holder, name, original in reversed(self._saved):
            setattr(holder, name, original)
        self._forget_originals(0)
        for name in self._loaded:
            if isinstance(sys.modules.get(name), _Stub):
                del sys.modules[name]
        if self._on_path and str(self.checkout.root) in sys.path:
            sys.path.remove(str(self.checkout.root))
        self._saved, self._on_path = [], False
        if _current is self:
            _current = None

    @contextlib.contextmanager
    def using(self, options: Options, changes: list[str]) -> Iterator[Installed]:
        """Run the body with the options of one run."""
        before = self.options, self.changes, self.plan, self.registry
        known = len(self._measured)
        self.options, self.changes, self.plan = options, changes, None
        if options.plugins != before[0].plugins:
            self.registry = load_registry(options.plugins)
        try:
            yield self
        finally:
            self.options, self.changes, self.plan, self.registry = before
            self._forget_originals(known)

    def module(self, name: str) -> Any:
        """Return a module of MU-Bench; `""` is its front."""
        return importlib.import_module(f"mubench.{name}".rstrip("."))

    def rebind(self, holder: Any, name: str, value: Any) -> None:
        """Set an attribute until :meth:`uninstall`."""
        self._saved.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    def note_original(self, table: dict[str, Any], key: str, value: Any) -> None:
        """Add an entry to MU-Bench's table of originals, until the end of the run."""
        table[key] = value
        self._measured.append((table, key))

    def lacks_original(self, table: dict[str, Any], key: str) -> bool:
        """Return whether an entry of the table is missing, or is one that we put there."""
        return key not in table or any(t is table and k == key for t, k in self._measured)

    def _forget_originals(self, first: int) -> None:
        for table, key in self._measured[first:]:
            table.pop(key, None)
        del self._measured[first:]

    # -- what is rebound

    def _put_in(self) -> None:
        self._import()
        front, trainers = self.module(""), self.module("trainer")
        base, evaluation = self.module("data.base"), self.module("evaluation")
        original = trainers.get_trainer

        @functools.wraps(original)
        def get_trainer(trainer_name: str) -> type:
            method = plugin_method(trainer_name, self.registry)
            return original(trainer_name) if method is None else self.trainer(method)

        prepare = base.prepare_unlearning_data

        @functools.wraps(prepare)
        def prepare_unlearning_data(unlearn_config: Any, raw_datasets: Any, **more: Any) -> Any:
            method = plugin_method(unlearn_config.unlearn_method, self.registry)
            if method is None:
                return prepare(unlearn_config, raw_datasets, **more)
            return self._prepared(prepare, base, unlearn_config, raw_datasets, method, more)

        transform = base.method_specific_transformation

        @functools.wraps(transform)
        def method_specific_transformation(unlearn_config: Any, *args: Any, **more: Any) -> Any:
            if plugin_method(unlearn_config.unlearn_method, self.registry) is not None:
                raise ScenarioNotSupported(
                    f"{unlearn_config.unlearn_method}: methods of ours run on classification data "
                    "sets of MU-Bench, not on TOFU"
                )
            return transform(unlearn_config, *args, **more)

        self.rebind(trainers, "get_trainer", get_trainer)
        self.rebind(front, "get_trainer", get_trainer)
        self.rebind(base, "prepare_unlearning_data", prepare_unlearning_data)
        self.rebind(base, "method_specific_transformation", method_specific_transformation)
        self.rebind(evaluation, "evaluate", OfflineEvaluate(evaluation.evaluate))

    def _import(self) -> None:
        """Import MU-Bench behind the shields that its import needs.

        Raises:
            MissingOptional: it cannot be imported.
        """
        root = self.checkout.root
        if root is not None and str(root) not in sys.path:
            sys.path.insert(0, str(root))
            self._on_path = True
        bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            self._stand_in()
            with offline_accuracy():
                for name in ("", "data.base", "data.preprocess", "trainer.base", "evaluation"):
                    self.module(name)
        except ImportError as error:
            self.uninstall()
            raise MissingOptional(
                f"{self.checkout.package}: cannot be imported: {error}\n"
                "pip install 'unsc-plugin[mubench]'"
            ) from error
        finally:
            sys.dont_write_bytecode = bytecode
        there = Path(self.module("").__file__).parent.resolve()
        if there != self.checkout.package:
            self.uninstall()
            raise MissingOptional(
                f"expected MU-Bench from {self.checkout.package}, but {there} is imported already; "
                "start a new process"
            )

    def _stand_in(self) -> None:
        importlib.import_module("evaluate")  # with transformers: they ask what is installed
        for name in FOREIGN_TOP_LEVEL:
            if name in sys.modules:
                continue
            try:
                importlib.import_module(name)
            except Exception:  # whatever its import runs into, a plain run does not use it
                sys.modules[name] = _Stub(name)
                self._loaded.add(name)

    # -- data

    def _prepared(
        self, prepare: Any, base: Any, config: Any, raw: Any, method: str, more: dict[str, Any]
    ) -> Any:
        """Return MU-Bench's splits for a method of ours: rows are selected, never copied."""
        check_request(config)
        kind = self.registry.method_class(method)
        original = base.prepare_df_dr

        def prepare_df_dr(_: Any, train: Any) -> tuple[Any, Any]:
            column = more.get("label_col", "label")
            val = raw["validation"][column] if "validation" in raw else []
            self.plan = self._plan(config, train[column], val)
            request = self.plan.request
            return train.select(request.forget), train.select(request.retain)

        base.prepare_df_dr = prepare_df_dr
        try:
            raw = prepare(config, raw, **{**more, "do_method_specific_transformation": False})
        finally:
            base.prepare_df_dr = original
        rows = raw["dr" if Split.RETAIN in kind.needs else "df"]
        raw["train"] = rows.select(range(len(rows)))
        return raw

    def _plan(self, config: Any, given: Any, val: Any) -> Plan:
        labels = torch.as_tensor(np.asarray(given, np.int64))
        data, options = config.data_name, self.options
        known = self.module("").num_classes_map.get(data, 2)
        info = DataInfo(
            name=data,
            modality="image",
            num_classes=max(int(known), int(labels.max()) + 1),
            input_shape=(),
            row_order="hub",
            labels_sha256=hashlib.sha256(labels.numpy().astype("<i8").tobytes()).hexdigest(),
        )
        order = self._order(data, info.labels_sha256)
        if options.forgotten_class is None:
            spec = prefix(self.checkout, data, float(config.del_ratio))
            name = "mubench" if order != "foreign" else "mubench-indices"
        else:
            spec = ForgetSpec(kind="class", classes=(options.forgotten_class,))
            name = f"class-{options.forgotten_class}"
        request = forget.select(spec, Rows.of({}, labels), info=info)
        return Plan(
            config=config,
            request=request,
            labels=labels,
            val_labels=np.asarray(val, np.int64),
            labels_sha256=info.labels_sha256,
            order=order,
            name=name,
        )

    def _order(self, data: str, found: str) -> str:
        """Return `hub`, `unknown` or, where it is allowed, `foreign`.

        Raises:
            RowOrderMismatch: the user's own files are in another order than the index list.
        """
        entries = self.registry.entries("datasets").values()
        hashes = [
            entry.labels_sha256
            for entry in entries
            if isinstance(entry, DatasetEntry) and (entry.mubench, entry.row_order) == (data, "hub")
        ]
        if found in hashes:
            return "hub"
        if self.options.data_dir is None or not hashes:
            return "unknown"
        if self.options.allow_foreign_order:
            return "foreign"
        raise RowOrderMismatch(
            f"expected the rows of {data} in the order of the hub (SHA-256 of labels "
            f"{str(hashes[0])[:16]}), got {found[:16]} in {self.options.data_dir}; give a copy in "
            "that order, or --allow-foreign-order (the result is then never comparable)"
        )

    # -- trainers

    def trainer(self, method: str) -> type:
        """Return the trainer class of a method of ours, the same one for every call."""
        if method not in self._trainers:
            self._trainers[method] = trainer_class(self, method)
        return self._trainers[method]


_current: Installed | None = None


def installed() -> Installed | None:
    """Return what is installed in this process, None if nothing is."""
    return _current


def install(
    *,
    home: str | Path | None = None,
    allow_untested: bool = False,
    augment: bool = False,
    options: Options | None = None,
) -> Installed:
    """Teach a MU-Bench our methods; everything of its own stays as it is.

    Rebound are `get_trainer` (in two places), `prepare_unlearning_data`,
    `method_specific_transformation` and the module `evaluate` of its evaluation. Nothing is written
    to the checkout. Where one is installed already, that one is returned.

    Raises:
        VersionWindow: a version of transformers that MU-Bench does not run on.
        MissingOptional: no checkout, or one that cannot be imported.
    """
    global _current
    if _current is not None:
        return _current
    options = options or Options()
    given = Options(
        home=None if home is None else str(home), allow_untested=allow_untested, augment=augment
    )
    options = given.over(options)
    untested = check_window(allow_untested=options.allow_untested)
    found = Installed(locate(options.home), options, untested)
    found._put_in()
    _current = found
    return found


@contextlib.contextmanager
def offline_accuracy() -> Iterator[None]:
    """Let `evaluate.load("accuracy")` work without a network inside the block."""
    module: Any = importlib.import_module("evaluate")
    load = module.load
    module.load = OfflineEvaluate(types.SimpleNamespace(load=load)).load
    try:
        yield
    finally:
        module.load = load
