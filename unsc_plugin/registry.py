"""The one source of names: the built-in `registry.yaml`, installed packages, and `--plugin` files.

Nothing heavy is imported here: entries are data, targets stay dotted names until they are used.
Other packages add theirs through the entry-point group `unsc_plugin.registries`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import InvalidRequirement, Requirement

from unsc_plugin.errors import (
    BrokenPlugin,
    ConfigError,
    DuplicateName,
    MissingOptional,
    UnknownName,
    UnscError,
)
from unsc_plugin.spec import (
    BackboneEntry,
    DatasetEntry,
    Defaults,
    Document,
    ForgetSpec,
    MethodEntry,
    RegistryFile,
    Scenario,
    read_yaml,
)

if TYPE_CHECKING:
    from unsc_plugin.method import UnlearningMethod

GROUP = "unsc_plugin.registries"
SECTIONS = ("methods", "backbones", "datasets", "forget_sets")
WHERE = "names come from registry.yaml, installed packages (group unsc_plugin.registries), --plugin"

SYNONYMS = {
    "ga": "neggrad",
    "grad_ascent": "neggrad",
    "ng+": "neggrad_plus",
    "grad_diff": "neggrad_plus",
    "rl": "random_label",
    "srl": "random_label",
    "relabel": "random_label",
    "amnesiac": "random_label",
    "ft": "finetune",
    "ft_l1": "l1_sparse",
    "badt": "bad_teaching",
    "blindspot": "bad_teaching",
    "iu": "influence",
    "wfisher": "influence",
    "kgltop1": "cf_k",
    "kgltop2": "cf_k",
    "kgltop5": "cf_k",
}
"""What other code calls our methods: known to the error message, never accepted as names."""

AMNESIAC = (
    "the published amnesiac method subtracts the logged updates of batches that held forget "
    "samples; what most tables call Amnesiac is random_label"
)


@dataclass(frozen=True)
class Named:
    """One registered name: its entry, where it comes from, and whether it can be used."""

    kind: str
    name: str
    entry: MethodEntry | BackboneEntry | DatasetEntry | ForgetSpec | None
    origin: str
    status: str = "ok"
    reason: str = ""
    target: type | None = None

    @property
    def summary(self) -> str:
        """One line about the entry."""
        return getattr(self.entry, "summary", "") if self.entry else self.reason

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other names of a method, and the preset that each stands for."""
        return self.entry.aliases if isinstance(self.entry, MethodEntry) else {}


@dataclass
class Registry:
    """All names of this process; see :func:`load`."""

    methods: dict[str, Named] = field(default_factory=dict)
    backbones: dict[str, Named] = field(default_factory=dict)
    datasets: dict[str, Named] = field(default_factory=dict)
    forget_sets: dict[str, Named] = field(default_factory=dict)
    broken: list[Named] = field(default_factory=list)
    defaults: Defaults | None = None
    plugins: tuple[str, ...] = ()

    def add(self, named: Named) -> None:
        """Register a name, and its aliases.

        Raises:
            DuplicateName: two origins for one name.
        """
        for name in (named.name, *named.aliases):
            held = self._holder(named.kind, name)
            if held is not None:
                raise DuplicateName(
                    f"{named.kind[:-1].replace('_', ' ')} {name!r} is registered twice: by "
                    f"{held.origin} and by {named.origin}; rename one of them"
                )
        getattr(self, named.kind)[named.name] = named

    def _holder(self, kind: str, name: str) -> Named | None:
        """Return what answers to `name`, by its own name or by an alias."""
        section: dict[str, Named] = getattr(self, kind)
        aliased = (named for named in section.values() if name in named.aliases)
        return section.get(name) or next(aliased, None)

    def entries(self, kind: str) -> dict[str, Any]:
        """Return name -> entry of a section."""
        return {name: named.entry for name, named in getattr(self, kind).items()}

    def method(self, name: str) -> tuple[Named, str | None]:
        """Return the method and the preset that `name`, `name.tag` or an alias stands for.

        Raises:
            UnknownName: no such method or preset.
            BrokenPlugin: the plugin that should provide it could not be loaded.
            MissingOptional: what it requires is not installed.
        """
        base, _, tag = name.partition(".")
        held = self._holder("methods", base)
        if held is not None and not tag:
            base, tag = held.name, held.aliases.get(base, "")
        if base not in self.methods:
            self._raise_unknown(base or name)
        found = self.methods[base]
        if found.status == "unavailable":
            raise MissingOptional(
                f"method {base!r} is unavailable: {found.reason}; {found.origin} asks for it: "
                "install or set what is missing"
            )
        assert isinstance(found.entry, MethodEntry)
        if tag and tag not in found.entry.presets:
            raise UnknownName(
                "preset", f"{base}.{tag}", [f"{base}.{t}" for t in found.entry.presets]
            )
        return found, tag or None

    def method_class(self, name: str) -> type[UnlearningMethod]:
        """Import and return the class of a method, checked against its entry.

        Raises:
            UnknownName: no such method.
            BrokenPlugin: the target cannot be imported or contradicts its entry.
        """
        named, _ = self.method(name)
        assert isinstance(named.entry, MethodEntry)
        found = named.target or _import_target(named.entry.target, named)
        _agrees(found, named)
        return found

    def create(self, name: str, **overrides: Any) -> UnlearningMethod:
        """Return the method `name` or `name.tag` with defaults < preset < overrides.

        Raises:
            UnknownName: no such method or preset.
            ConfigError: an unknown key, a wrong type or a value out of range.
        """
        named, tag = self.method(name)
        assert isinstance(named.entry, MethodEntry)
        preset = named.entry.presets[tag].args if tag else {}
        kind = self.method_class(name)
        try:
            return self.complete(kind(**{**named.entry.defaults, **preset, **overrides}))
        except ConfigError as error:
            raise ConfigError(f"method {name}: {error}") from None

    def complete(self, method: UnlearningMethod) -> UnlearningMethod:
        """Return the method with the parts that its settings name: registered methods.

        Raises:
            UnknownName: a part is not registered.
            ConfigError: a method that is made of itself.
        """
        from unsc_plugin.method import MethodRef

        for item in dataclasses.fields(method.config):
            ref = getattr(method.config, item.name)
            if isinstance(ref, MethodRef):
                if self.method(ref.method)[0].name == method.name:
                    raise ConfigError(f"{item.name}: expected another method, got {ref.method!r}")
                method.parts[item.name] = self.create(ref.method, **ref.set)
        return method

    def _raise_unknown(self, name: str) -> None:
        for row in self.broken:
            raise_for = name in row.name.split(",") or name == row.name
            if raise_for:
                raise BrokenPlugin(
                    f"{name!r} comes from {row.origin}, which is broken: {row.reason}"
                )
        hint = WHERE
        if self.broken:
            hint += "; broken: " + ", ".join(f"{row.origin} ({row.reason})" for row in self.broken)
        if name in SYNONYMS and SYNONYMS[name] in self.methods:
            more = f" ({AMNESIAC})" if name == "amnesiac" else ""
            error = UnknownName("method", name, [], f"did you mean {SYNONYMS[name]!r}?{more}")
            raise error
        raise UnknownName("method", name, self.methods, hint)


# --------------------------------------------------------------------------- loading


def load(plugins: Sequence[str] = ()) -> Registry:
    """Return all names: built-in, from installed packages, of this session, and from `plugins`.

    Raises:
        DuplicateName: two origins for one name.
        ConfigError: the built-in file or a given plugin is invalid.
    """
    registry = Registry(plugins=tuple(plugins))
    document = _built_in()
    file = document.validate(RegistryFile)
    registry.defaults = file.defaults
    _merge(registry, file, "built-in", document.source)
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        _add_entry_point(registry, point)
    for plugin in plugins:
        _add_plugin(registry, plugin)
    for named in _session:
        if not _is_listed(registry, named):
            registry.add(named)
    return registry


def _is_listed(registry: Registry, named: Named) -> bool:
    """Say whether a file lists the very class that was decorated, too; the file's entry stands."""
    held = registry.methods.get(named.name)
    if held is None or not isinstance(held.entry, MethodEntry):
        return False
    module, _, attribute = held.entry.target.partition(":")
    return decorated(getattr(sys.modules.get(module), attribute, None)) is named.target


@lru_cache(maxsize=1)
def _built_in() -> Document:
    inside = resources.files("unsc_plugin") / "registry.yaml"
    path = Path(str(inside))
    return read_yaml(path if path.is_file() else Path(__file__).parent.parent / "registry.yaml")


def _merge(registry: Registry, file: RegistryFile, origin: str, source: str) -> None:
    reason = _unmet(file.requires)
    for kind in SECTIONS:
        for name, entry in getattr(file, kind).items():
            why = reason or _unmet(getattr(entry, "requires", ()))
            why = why or _unset_variables(getattr(entry, "path", None))
            status = "unavailable" if why else "ok"
            registry.add(Named(kind, name, entry, origin, status, why))


def _unmet(requirements: Sequence[str]) -> str:
    """Return what is unmet; `a | b` is met by either, `${NAME}` by a variable that is set."""
    for text in requirements:
        faults = [_fault(one.strip()) for one in text.split("|")]
        if all(faults):
            return " and ".join(faults)
    return ""


def _fault(text: str) -> str:
    if text.startswith("$"):
        return _unset_variables(text)
    try:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate():
            return ""
        installed = metadata.version(requirement.name)
    except InvalidRequirement:
        return f"{text!r} is no requirement"
    except metadata.PackageNotFoundError:
        return f"{text} is not installed"
    if not requirement.specifier.contains(installed, prereleases=True):
        return f"{text} wanted, {installed} installed"
    return ""


def _unset_variables(path: str | None) -> str:
    for variable in re.findall(r"\$\{(\w+)\}", path or ""):
        if not os.environ.get(variable):
            return f"{variable} is not set"
    return ""


def _add_entry_point(registry: Registry, point: metadata.EntryPoint) -> None:
    version = f" {point.dist.version}" if point.dist else ""
    origin = f"{point.dist.name if point.dist else point.name}{version}"
    try:
        document = _document_of(point)
        file = document.validate(RegistryFile)
        if not file.package:
            raise ConfigError(f"{document.source}: package: expected the distribution's name")
    except Exception as error:  # a foreign package must not take the others down
        registry.broken.append(Named("methods", point.name, None, origin, "broken", _line(error)))
        return
    _merge(registry, file, origin, document.source)


def _document_of(point: metadata.EntryPoint) -> Document:
    if ":" not in point.value:
        resource = resources.files(point.value) / "registry.yaml"
        with resources.as_file(resource) as path:
            return read_yaml(path)
    value = point.load()
    value = value() if callable(value) else value
    return Document(point.value, dict(value)) if isinstance(value, Mapping) else read_yaml(value)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _add_plugin(registry: Registry, plugin: str) -> None:
    path = Path(plugin)
    if path.suffix in (".yaml", ".yml"):
        document = read_yaml(path)
        _merge(registry, document.validate(RegistryFile), str(path), document.source)
    elif path.suffix == ".py":
        for named in _registered_by_file(path):
            registry.add(named)
    elif re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", plugin):
        with _collected():  # its decorator would register the same class once more
            found = _import_target(plugin, Named("methods", plugin, None, plugin))
        registry.add(_named_of(found, plugin))
    else:
        raise ConfigError(
            f"--plugin: expected a registry .yaml, a .py file or pkg.mod:Class, got {plugin!r}"
        )


# --------------------------------------------------------------------------- registering in Python

_session: list[Named] = []
_collecting: list[list[Named]] = []


@contextlib.contextmanager
def _collected() -> Iterator[list[Named]]:
    rows: list[Named] = []
    _collecting.append(rows)
    try:
        yield rows
    finally:
        _collecting.pop()


@lru_cache(maxsize=64)
def _loaded_file(path: Path, modified: float) -> tuple[Named, ...]:
    name = re.sub(r"\W", "_", f"_unsc_plugin_file_{abs(hash(path))}_{path.stem}")
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing beside their file
    try:
        with _collected() as rows:
            module_spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = bytecode
    return tuple(rows)


def _registered_by_file(path: Path) -> tuple[Named, ...]:
    if not path.is_file():
        raise ConfigError(f"--plugin: expected an existing file, got {path}")
    path = path.resolve()
    try:
        rows = _loaded_file(path, path.stat().st_mtime)
    except UnscError:
        raise
    except Exception as error:
        raise BrokenPlugin(f"--plugin {path}: {_line(error)}; fix the file") from error
    if not rows:
        raise ConfigError(
            f"--plugin {path}: registers nothing; decorate a method with @register_method('name')"
        )
    return rows


def register_method(
    name: str | None = None,
    *,
    scenarios: Sequence[str] = ("class", "subclass", "random", "sequential"),
    summary: str = "",
    supports_weights: bool = False,
    deterministic: bool = False,
) -> Callable[[Any], Any]:
    """Register a method class, or a function `(model, retain, forget, val=None, *, ctx, ...)`.

    A function's parameters say what it needs: `retain`, `forget` and `val` are loaders of `Batch`,
    `ctx` is the `UnlearningTask`; further keyword-only parameters with defaults are its settings.
    It returns the model. The keywords stand for the class data of the same names.

    Raises:
        ConfigError: neither a method class nor such a function; an unknown scenario; or a name that
            is not allowed.
    """
    unknown = sorted(set(scenarios) - set(Scenario))
    if unknown:
        raise ConfigError(f"expected scenarios of {', '.join(Scenario)}, got {unknown}")

    def register(target: Any) -> Any:
        from unsc_plugin.method import UnlearningMethod, from_function

        kind = target
        if not (inspect.isclass(target) and issubclass(target, UnlearningMethod)):
            if not inspect.isfunction(target):
                raise ConfigError(f"expected a method class or a function, got {target!r}")
            kind = from_function(
                target,
                name or target.__name__,
                scenarios=frozenset(Scenario(s) for s in scenarios),
                supports_weights=supports_weights,
                deterministic=deterministic,
            )
            kind.__name__ = kind.__qualname__ = target.__name__.strip("<>")  # a lambda's has them
            target.__dict__["unlearning_method"] = kind
        elif name is not None and getattr(kind, "name", name) != name:
            raise ConfigError(f"registered as {name!r}, but the class says name = {kind.name!r}")
        else:
            kind.name = getattr(kind, "name", None) or name or kind.__name__.lower()
        module = sys.modules.get(target.__module__)
        origin = getattr(module, "__file__", None) or target.__module__
        (_collecting[-1] if _collecting else _session).append(_named_of(kind, origin, summary))
        return target

    return register


def decorated(target: Any) -> Any:
    """Return the method class that :func:`register_method` made of a function, or `target`."""
    return getattr(target, "unlearning_method", target) if inspect.isfunction(target) else target


def _named_of(kind: type, origin: str, summary: str = "") -> Named:
    from unsc_plugin.method import UnlearningMethod

    if not (inspect.isclass(kind) and issubclass(kind, UnlearningMethod)):
        raise BrokenPlugin(f"{origin}: expected a subclass of UnlearningMethod, got {kind!r}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", kind.name):
        raise ConfigError(f"{origin}: expected a name of a-z, 0-9, _ and -, got {kind.name!r}")
    lines = (kind.__doc__ or "").strip().splitlines() or [""]
    entry = MethodEntry(
        target=f"{kind.__module__}:{kind.__name__}",
        summary=(summary or lines[0])[:100],
        needs=tuple(sorted(kind.needs)),
        scenarios=tuple(sorted(kind.scenarios)),
        supports_weights=kind.supports_weights,
    )
    return Named("methods", kind.name, entry, origin, target=kind)


def _import_target(target: str, named: Named) -> Any:
    module, _, attribute = target.partition(":")
    try:
        return decorated(getattr(importlib.import_module(module), attribute))
    except Exception as error:
        where = target if target == named.origin else f"{named.origin}: {target}"
        raise BrokenPlugin(f"{where}: {_line(error)}; install it, or correct the target") from error


def _agrees(found: Any, named: Named) -> None:
    from unsc_plugin.method import UnlearningMethod

    entry = named.entry
    assert isinstance(entry, MethodEntry)
    if not (inspect.isclass(found) and issubclass(found, UnlearningMethod)):
        raise BrokenPlugin(
            f"{named.origin}: {entry.target} is no subclass of UnlearningMethod; a function becomes"
            " a method by @register_method('name')"
        )
    facts = {
        "name": (named.name, found.name),
        "needs": (_sorted(entry.needs), _sorted(found.needs)),
        "scenarios": (_sorted(entry.scenarios), _sorted(found.scenarios)),
        "supports_weights": (entry.supports_weights, found.supports_weights),
    }
    faults = [
        f"{fact}: {said} in the entry, {does} in the class"
        for fact, (said, does) in facts.items()
        if said != does
    ]
    if faults:
        raise BrokenPlugin(
            f"{named.origin}: the entry of {named.name!r} and {entry.target} disagree in "
            f"{'; '.join(faults)}; make them equal"
        )


def _sorted(words: Iterable[str]) -> str:
    return ", ".join(sorted(words)) or "nothing"


# --------------------------------------------------------------------------- public shortcuts


def create(name: str, **overrides: Any) -> UnlearningMethod:
    """Return the method `name` or `name.tag` of all registered ones.

    >>> create("finetune", epochs=3).config.epochs
    3
    """
    return load().create(name, **overrides)


def list_methods() -> list[str]:
    """Return the names of all registered methods, sorted.

    >>> "retrain" in list_methods()
    True
    """
    return sorted(load().methods)


def config_table(kind: type) -> list[dict[str, Any]]:
    """Return name, type, default and meaning of every setting of a method class."""
    return [
        {
            "name": f.name,
            "type": _type_word(f.type),
            "default": f.default,
            "meaning": f.metadata.get("meaning", ""),
        }
        for f in dataclasses.fields(kind.Config)  # type: ignore[attr-defined]
    ]


def _type_word(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
