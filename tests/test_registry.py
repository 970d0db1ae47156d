"""Names from everywhere: found once, told apart, never in each other's way."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from torch import nn

from unsc_plugin import registry
from unsc_plugin.errors import (
    BrokenPlugin,
    ConfigError,
    DuplicateName,
    MissingOptional,
    UnknownName,
    UnscError,
)
from unsc_plugin.method import MethodRef, UnlearningMethod, UnlearningTask
from unsc_plugin.methods.finetune import Finetune
from unsc_plugin.spec import Split, read_yaml


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave no registration, import path or module of a test behind."""
    monkeypatch.setattr(registry, "_session", [])
    modules, paths = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        if name.startswith(("sample_", "_unsc_plugin_file_")):
            del sys.modules[name]


METHODS = """\
from unsc_plugin.method import Scenario, Split, UnlearningMethod


class Tuned(UnlearningMethod):
    \"\"\"A method of another package.\"\"\"

    name = "tuned"
    needs = frozenset({Split.RETAIN})
    scenarios = frozenset({Scenario.CLASS, Scenario.RANDOM})

    def run(self, model, task):
        return model
"""

REGISTRY = """\
schema: 1
package: {package}
methods:
  tuned:
    target: {module}.methods:Tuned
    summary: A method of another package
    needs: [retain]
    scenarios: [class, random]
    aliases: {{other-tuned: paper}}
    presets: {{paper: {{args: {{}}, source: paper}}}}
backbones:
  sample-net: {{source: timm, id: resnet18}}
forget_sets:
  sample/class-1: {{kind: class, classes: [1]}}
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return `install(package, registry, methods)`, which puts a distribution on the path."""

    def put(
        package: str = "sample_one",
        registry_yaml: str | None = None,
        methods: str = METHODS,
        value: str | None = None,
        init: str = "",
        version: str = "1.2",
    ) -> Path:
        site = tmp_path / f"site-{package}"
        folder = site / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(init)
        (folder / "methods.py").write_text(methods)
        text = REGISTRY if registry_yaml is None else registry_yaml
        (folder / "registry.yaml").write_text(
            text.replace("{package}", package).replace("{module}", package)
            if registry_yaml is not None
            else text.format(package=package, module=package)
        )
        name = package.replace("_", "-")
        info = site / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(
            f"[unsc_plugin.registries]\n{package} = {value or package}\n"
        )
        monkeypatch.syspath_prepend(str(site))
        return folder

    return put


# --------------------------------------------------------------------------- built-in names


def test_the_built_in_file_is_read_without_torch() -> None:
    program = """
        import sys
        import unsc_plugin
        from unsc_plugin import registry
        names = registry.load()
        assert "finetune" in registry.list_methods()
        assert names.methods["finetune"].summary
        try:
            names.method("finetun")
        except LookupError as error:
            assert "finetune" in str(error)
        heavy = {"torch", "timm", "transformers", "evaluate", "datasets", "accelerate", "sklearn"}
        print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_built_in_method_agrees_with_its_entry() -> None:
    names = registry.load()
    for name, named in names.methods.items():
        if named.status != "ok":
            continue
        kind = names.method_class(name)
        assert kind.name == name
        assert named.origin == "built-in"
        suite, _, _ = name.partition("_")
        homes = (f"unsc_plugin.methods.{name}", f"unsc_plugin.adapters.{suite}")
        assert kind.__module__ in homes


def test_every_built_in_preset_can_be_made() -> None:
    names = registry.load()
    for name, named in names.methods.items():
        for tag in named.entry.presets:
            made = names.create(f"{name}.{tag}")
            for key, value in named.entry.presets[tag].args.items():
                wanted = tuple(value) if isinstance(value, list) else value
                found = getattr(made.config, key)
                if isinstance(found, MethodRef):
                    assert made.parts[key].name == found.method
                    found = dataclasses.asdict(found) if isinstance(wanted, dict) else found.method
                assert found == wanted


def test_every_method_file_has_an_entry_of_its_name() -> None:
    folder = Path(registry.__file__).parent / "methods"
    files = {path.stem for path in folder.glob("[a-z]*.py")}
    entries = {name: named.entry.target for name, named in registry.load().methods.items()}
    assert files == {name for name in entries if ".adapters." not in entries[name]}


def test_defaults_name_things_that_exist() -> None:
    names = registry.load()
    assert names.defaults is not None
    assert names.defaults.method in names.methods
    assert names.defaults.backbone in names.backbones
    assert names.defaults.dataset in names.datasets
    assert names.defaults.forget_set in names.forget_sets


def test_defaults_presets_and_overrides_in_this_order(tmp_path: Path) -> None:
    path = tmp_path / "more.yaml"
    path.write_text(
        "schema: 1\nmethods:\n  ft:\n    target: sample_ft:Ft\n    summary: x\n"
        "    needs: [retain]\n"
        "    scenarios: [class, random, sequential, subclass, weighted]\n"
        "    supports_weights: true\n    defaults: {epochs: 4, lr: 0.5, batch_size: 3}\n"
        "    presets: {paper: {args: {lr: 0.25, epochs: 5}, source: paper}}\n"
    )
    (tmp_path / "sample_ft.py").write_text(
        "from unsc_plugin.methods.finetune import Finetune\n\n\n"
        "class Ft(Finetune):\n    name = 'ft'\n"
    )
    sys.path.insert(0, str(tmp_path))
    names = registry.load([str(path)])

    def settings(name: str, **more: object) -> tuple[object, ...]:
        config = names.create(name, **more).config
        return (config.epochs, config.lr, config.batch_size)

    assert settings("ft") == (4, 0.5, 3)
    assert settings("ft.paper") == (5, 0.25, 3)
    assert settings("ft.paper", epochs=6) == (6, 0.25, 3)
    assert settings("ft", lr=None) == (4, None, 3)


def test_faulty_overrides_name_the_method_and_the_nearest_key() -> None:
    names = registry.load()
    with pytest.raises(ConfigError, match=r"method finetune\.paper: .*'epoch'.*'epochs'"):
        names.create("finetune.paper", epoch=3)
    with pytest.raises(ConfigError, match=r"method finetune: epochs: expected .*int.*'3'"):
        names.create("finetune", epochs="3")


# --------------------------------------------------------------------------- unknown names


def test_unknown_names_come_with_the_nearest() -> None:
    names = registry.load()
    with pytest.raises(UnknownName, match=r"unknown method 'finetun'; did you mean 'finetune'"):
        names.create("finetun")
    with pytest.raises(UnknownName, match=r"unknown preset 'finetune\.papr'.*'finetune\.paper'"):
        names.create("finetune.papr")
    with pytest.raises(UnknownName, match=r"--plugin") as raised:
        names.create("zzzzzz")
    assert raised.value.exit_code == 2
    assert isinstance(raised.value, LookupError)


@pytest.mark.parametrize("synonym", registry.SYNONYMS)
def test_synonyms_are_told_and_not_taken(synonym: str) -> None:
    names = registry.load()
    meant = registry.SYNONYMS[synonym]
    with pytest.raises(UnknownName) as raised:
        names.create(synonym)
    if meant in names.methods:
        assert f"did you mean {meant!r}?" in str(raised.value)


def test_amnesiac_gets_an_explanation() -> None:
    with pytest.raises(UnknownName, match=r"random_label.*subtracts"):
        registry.create("amnesiac")


# --------------------------------------------------------------------------- installed packages


def test_an_installed_package_brings_its_names(install: Callable[..., Path]) -> None:
    install()
    names = registry.load()
    assert "sample_one.methods" not in sys.modules
    assert names.methods["tuned"].origin == "sample-one 1.2"
    assert names.backbones["sample-net"].origin == "sample-one 1.2"
    assert names.forget_sets["sample/class-1"].entry.classes == (1,)
    assert names.create("tuned").needs == {Split.RETAIN}
    assert names.create("other-tuned").name == "tuned"
    assert names.method("other-tuned")[1] == "paper"
    assert "tuned" in registry.list_methods()


DICT_ENTRY = """
registry = {
    "schema": 1,
    "package": "sample-two",
    "methods": {"tuned": {"target": "sample_two.methods:Tuned", "summary": "x",
                          "needs": ["retain"], "scenarios": ["class", "random"]}},
}
path = __file__.replace("__init__.py", "registry.yaml")


def build():
    return registry
"""


@pytest.mark.parametrize("attribute", ["registry", "path", "build"])
def test_an_entry_point_may_name_a_mapping_a_path_or_a_function(
    install: Callable[..., Path], attribute: str
) -> None:
    install("sample_two", init=DICT_ENTRY, value=f"sample_two:{attribute}")
    assert registry.load().create("tuned").name == "tuned"


BROKEN_PACKAGES = {
    "raises at import": {"init": "raise RuntimeError('no GPU here')"},
    "faulty file": {"registry_yaml": "schema: 1\npackage: x\nmetods: {}\n"},
    "no YAML": {"registry_yaml": "a: [\n"},
    "no package name": {"registry_yaml": "schema: 1\n"},
    "unknown attribute": {"value": "sample_bad:nothing"},
    "a number": {"init": "registry = 3", "value": "sample_bad:registry"},
}
REASONS = {
    "raises at import": "no GPU here",
    "faulty file": "metods",
    "no YAML": "ConfigError",
    "no package name": "package",
    "unknown attribute": "nothing",
    "a number": "",
}


@pytest.mark.parametrize("case", BROKEN_PACKAGES)
def test_a_broken_package_becomes_a_row_and_keeps_the_others_working(
    install: Callable[..., Path], case: str
) -> None:
    install("sample_one")
    install("sample_bad", **BROKEN_PACKAGES[case])
    names = registry.load()
    assert names.create("tuned").name == "tuned"
    assert names.create("finetune").name == "finetune"
    (row,) = names.broken
    assert (row.status, row.origin) == ("broken", "sample-bad 1.2")
    assert REASONS[case] in row.reason
    assert row.summary == row.reason
    with pytest.raises(UnscError, match=r"sample-bad 1\.2"):
        names.create("sample_bad")
    with pytest.raises(UnknownName, match=r"sample-bad 1\.2"):
        names.create("something_of_it")


def test_a_target_that_cannot_be_imported_hurts_only_itself(install: Callable[..., Path]) -> None:
    install(methods="import not_installed_anywhere\n")
    names = registry.load()
    assert names.create("finetune").name == "finetune"
    with pytest.raises(BrokenPlugin, match=r"sample-one 1\.2.*not_installed_anywhere"):
        names.create("tuned")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "tuned"', 'name = "other"'),
        ("{Split.RETAIN}", "{Split.FORGET}"),
        ("Scenario.CLASS, ", ""),
        ("    def run", "    supports_weights = True\n\n    def run"),
    ],
)
def test_a_target_that_contradicts_its_entry_is_refused(
    install: Callable[..., Path], old: str, new: str
) -> None:
    assert old in METHODS
    install(methods=METHODS.replace(old, new))
    with pytest.raises(BrokenPlugin, match=r"sample-one 1\.2.*'tuned'.*disagree"):
        registry.load().create("tuned")


def test_a_target_that_is_no_method(install: Callable[..., Path]) -> None:
    install(methods="Tuned = 3\n")
    with pytest.raises(BrokenPlugin, match="no subclass of UnlearningMethod"):
        registry.load().create("tuned")


def test_two_origins_of_one_name_are_both_named(install: Callable[..., Path]) -> None:
    install("sample_one")
    install("sample_two")
    with pytest.raises(DuplicateName) as raised:
        registry.load()
    assert "sample-one 1.2" in str(raised.value)
    assert "sample-two 1.2" in str(raised.value)
    assert "'tuned'" in str(raised.value)


def test_a_built_in_name_cannot_be_taken(install: Callable[..., Path]) -> None:
    install(
        registry_yaml=REGISTRY.replace("tuned:\n", "finetune:\n").format(package="p", module="m")
    )
    with pytest.raises(DuplicateName, match=r"'finetune'.*built-in.*sample-one 1\.2"):
        registry.load()


def test_an_alias_cannot_take_a_name_either(install: Callable[..., Path]) -> None:
    text = REGISTRY.replace("other-tuned: paper", "finetune: paper")
    install(registry_yaml=text.format(package="p", module="sample_one"))
    try:
        made = registry.load().create("finetune")
    except DuplicateName:
        return
    assert isinstance(made, Finetune)


def test_an_alias_of_two_methods_is_a_duplicate(
    install: Callable[..., Path], tmp_path: Path
) -> None:
    install()
    path = tmp_path / "more.yaml"
    path.write_text(
        REGISTRY.format(package="p", module="sample_one")
        .replace("  tuned:", "  tuned2:")
        .replace("sample-net", "net2")
        .replace("sample/class-1", "sample/class-2")
    )
    with pytest.raises(DuplicateName, match="other-tuned"):
        registry.load([str(path)])


@pytest.mark.parametrize(
    ("requirement", "reason"),
    [
        ("not-installed-anywhere", "not-installed-anywhere is not installed"),
        ("numpy>=999", r"numpy>=999 wanted, .* installed"),
        ("numpy==0.1", "numpy"),
    ],
)
def test_what_a_file_requires_decides_about_all_its_names(
    install: Callable[..., Path], requirement: str, reason: str
) -> None:
    text = REGISTRY.replace("methods:\n", f"requires: ['{requirement}']\nmethods:\n", 1)
    install(registry_yaml=text.format(package="p", module="sample_one"))
    names = registry.load()
    assert names.methods["tuned"].status == names.backbones["sample-net"].status == "unavailable"
    with pytest.raises(MissingOptional, match=rf"'tuned' is unavailable: .*{reason}") as raised:
        names.create("tuned")
    assert raised.value.exit_code == 3
    assert names.create("finetune").name == "finetune"


@pytest.mark.parametrize("requirement", ["numpy>=1", 'not-installed; python_version < "3"'])
def test_requirements_that_are_met(install: Callable[..., Path], requirement: str) -> None:
    text = REGISTRY.replace("methods:\n", f"requires: ['{requirement}']\nmethods:\n", 1)
    install(registry_yaml=text.format(package="p", module="sample_one"))
    assert registry.load().methods["tuned"].status == "ok"


@pytest.mark.parametrize("requirement", ["numpy>=1 | ${SAMPLE_HOME}", "nowhere | ${SAMPLE_HOME}"])
def test_one_of_two_requirements_is_enough(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, requirement: str
) -> None:
    monkeypatch.setenv("SAMPLE_HOME", "/somewhere")
    requirement = requirement.replace("{", "{{").replace("}", "}}")
    text = REGISTRY.replace("methods:\n", f"requires: ['{requirement}']\nmethods:\n", 1)
    install(registry_yaml=text.format(package="p", module="sample_one"))
    assert registry.load().methods["tuned"].status == "ok"


def test_without_either_both_are_named(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAMPLE_HOME", raising=False)
    requirement = "requires: ['nowhere>=2 | ${{SAMPLE_HOME}}']\nmethods:\n"
    text = REGISTRY.replace("methods:\n", requirement, 1)
    install(registry_yaml=text.format(package="p", module="sample_one"))
    reason = "nowhere>=2 is not installed and SAMPLE_HOME is not set"
    assert registry.load().methods["tuned"].reason == reason


def test_a_path_with_an_unset_variable_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "more.yaml"
    path.write_text(
        "schema: 1\nforget_sets:\n  mine: {kind: index_file, path: '${SAMPLE_HOME}/x.npy'}\n"
    )
    monkeypatch.delenv("SAMPLE_HOME", raising=False)
    named = registry.load([str(path)]).forget_sets["mine"]
    assert (named.status, named.reason) == ("unavailable", "SAMPLE_HOME is not set")
    monkeypatch.setenv("SAMPLE_HOME", "/x")
    assert registry.load([str(path)]).forget_sets["mine"].status == "ok"


def test_entry_points_are_asked_for_in_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def entry_points(*, group: str) -> list[metadata.EntryPoint]:
        asked.append(group)
        return [metadata.EntryPoint("gone", "sample_gone", group)]

    monkeypatch.setattr(registry.metadata, "entry_points", entry_points)
    names = registry.load()
    assert asked == ["unsc_plugin.registries"]
    assert [row.origin for row in names.broken] == ["gone"]
    assert "sample_gone" in names.broken[0].reason


# --------------------------------------------------------------------------- --plugin


PLUGIN_FILE = """\
\"\"\"One decorated function and one decorated class.\"\"\"
from unsc_plugin.method import Scenario, Split, UnlearningMethod
from unsc_plugin.registry import register_method


@register_method("shrink", scenarios=("class",))
def shrink(model, forget, *, ctx, rate=0.5):
    \"\"\"Scale the head by 1 - rate.\"\"\"
    return model


@register_method("idle", summary="Does nothing")
class Idle(UnlearningMethod):
    needs = frozenset()
    scenarios = frozenset(Scenario)

    def run(self, model, task):
        return model
"""


@pytest.mark.parametrize("name", ["plugin.py", "my-plugin.py", "2nd plugin.py"])
def test_a_file_of_decorated_methods(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(PLUGIN_FILE)
    for _ in range(2):  # imported once, registered each time
        names = registry.load([str(path)])
        made = names.create("shrink", rate=0.25)
        assert made.config.rate == 0.25
        assert made.needs == {Split.FORGET}
        assert names.methods["shrink"].summary == "Scale the head by 1 - rate."
        assert names.methods["idle"].summary == "Does nothing"
        assert names.methods["idle"].origin == str(path)
        assert isinstance(names.create("idle"), UnlearningMethod)
    assert "shrink" not in registry.load().methods


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN_FILE)
    registry.load([str(path)])
    path.write_text(PLUGIN_FILE.replace("rate=0.5", "rate=0.75"))
    os.utime(path, (1, 1))
    assert registry.load([str(path)]).create("shrink").config.rate == 0.75


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("1 / 0\n", BrokenPlugin, "ZeroDivisionError"),
        ("def f(:\n", BrokenPlugin, "SyntaxError"),
        ("x = 1\n", ConfigError, "registers nothing"),
        ("import not_installed_anywhere\n", BrokenPlugin, "not_installed_anywhere"),
    ],
)
def test_a_faulty_file(tmp_path: Path, text: str, error: type[UnscError], said: str) -> None:
    path = tmp_path / "plugin.py"
    path.write_text(text)
    with pytest.raises(error, match=said) as raised:
        registry.load([str(path)])
    assert str(path) in str(raised.value)


def test_a_registry_file_and_a_class_as_plugin(tmp_path: Path) -> None:
    (tmp_path / "sample_mod").mkdir()
    (tmp_path / "sample_mod" / "__init__.py").write_text("")
    (tmp_path / "sample_mod" / "methods.py").write_text(METHODS)
    path = tmp_path / "names.yaml"
    path.write_text(REGISTRY.format(package="p", module="sample_mod"))
    sys.path.insert(0, str(tmp_path))
    names = registry.load([str(path)])
    assert names.methods["tuned"].origin == str(path)
    assert names.plugins == (str(path),)
    names = registry.load(["sample_mod.methods:Tuned"])
    assert names.methods["tuned"].origin == "sample_mod.methods:Tuned"
    assert names.create("tuned").name == "tuned"
    with pytest.raises(DuplicateName, match=r"names\.yaml.*sample_mod\.methods:Tuned"):
        registry.load([str(path), "sample_mod.methods:Tuned"])


DECORATED = METHODS.replace(
    "\n\nclass Tuned",
    "\nfrom unsc_plugin.registry import register_method\n\n\n"
    "@register_method('tuned')\nclass Tuned",
)


def test_a_decorated_class_may_be_named_as_plugin_twice(tmp_path: Path) -> None:
    (tmp_path / "sample_decorated.py").write_text(DECORATED)
    sys.path.insert(0, str(tmp_path))
    for _ in range(2):
        names = registry.load(["sample_decorated:Tuned"])
        assert names.create("tuned").name == "tuned"


def test_a_decorated_class_may_also_stand_in_a_registry_file(install: Callable[..., Path]) -> None:
    install(methods=DECORATED)
    for _ in range(2):
        assert registry.load().create("tuned").name == "tuned"


FUNCTION = """\
from unsc_plugin.registry import register_method


@register_method("tuned", scenarios=("class", "random"), deterministic=True)
def Tuned(model, retain, *, rate: float = 0.5):
    \"\"\"A method that is a function.\"\"\"
    return model
"""


def test_a_decorated_function_may_stand_in_a_registry_file(install: Callable[..., Path]) -> None:
    install(methods=FUNCTION)
    for _ in range(2):
        names = registry.load()
        made = names.create("tuned", rate=0.25)
        assert names.method_class("tuned") is type(made)
        assert (made.needs, made.config.rate, made.deterministic) == ({Split.RETAIN}, 0.25, True)
        assert names.methods["tuned"].origin == "sample-one 1.2"


def test_a_plain_function_in_a_registry_file_is_told_what_it_lacks(
    install: Callable[..., Path],
) -> None:
    install(methods=FUNCTION.replace("@register_method", "# @register_method"))
    with pytest.raises(BrokenPlugin, match=r"sample-one 1\.2.*by @register_method"):
        registry.load().create("tuned")


def test_a_decorated_function_may_be_named_as_plugin(tmp_path: Path) -> None:
    (tmp_path / "sample_function.py").write_text(FUNCTION)
    sys.path.insert(0, str(tmp_path))
    for _ in range(2):
        made = registry.load(["sample_function:Tuned"]).create("tuned")
        assert registry.config_table(type(made))[0]["type"] == "float"


@pytest.mark.parametrize(
    "plugin",
    ["nothing.txt", "no_such.yaml", "no_such.py", "no.such:Thing", "unsc_plugin.rows:Rows"],
)
def test_plugins_that_are_none(plugin: str) -> None:
    with pytest.raises(UnscError) as raised:
        registry.load([plugin])
    assert plugin in str(raised.value)


# --------------------------------------------------------------------------- register_method


def test_registered_methods_of_this_session() -> None:
    @registry.register_method("mine")
    def mine(model: nn.Module, retain: object, *, rate: float = 0.5) -> nn.Module:
        """Do little."""
        return model

    names = registry.load()
    assert names.methods["mine"].origin == __file__
    assert names.create("mine", rate=0.1).config.rate == 0.1
    assert registry.create("mine").needs == {Split.RETAIN}
    assert callable(mine)
    assert mine("x", None) == "x"


@pytest.mark.parametrize("name", ["my-method", "my_method", "2step"])
def test_every_allowed_name_can_be_registered(name: str) -> None:
    @registry.register_method(name)
    def mine(model: nn.Module, retain: object) -> nn.Module:
        return model

    assert registry.create(name).name == name


@pytest.mark.parametrize("name", ["Mine", "my.method", "my method", ""])
def test_other_names_cannot(name: str) -> None:
    def mine(model: nn.Module, retain: object) -> nn.Module:
        return model

    register = registry.register_method(name)
    if name == "":
        register(mine)
        assert "mine" in registry.load().methods
        return
    with pytest.raises(ConfigError, match="name"):
        register(mine)


def test_what_cannot_be_registered() -> None:
    with pytest.raises(ConfigError, match="method class or a function"):
        registry.register_method("x")(3)
    with pytest.raises(ConfigError, match="scenario"):
        registry.register_method("x", scenarios=("clas",))(lambda model, retain: model)
    with pytest.raises(ConfigError, match=r"'other'.*'finetune'"):
        registry.register_method("other")(Finetune)


def test_a_class_takes_its_name_from_the_decorator() -> None:
    @registry.register_method("named-here")
    class Mine(UnlearningMethod):
        """Do nothing at all."""

        needs = frozenset()
        scenarios = frozenset()

        def run(self, model: nn.Module, task: UnlearningTask) -> nn.Module:
            return model

    assert isinstance(registry.create("named-here"), Mine)


def test_two_registrations_of_one_name() -> None:
    for _ in range(2):

        @registry.register_method("mine")
        def mine(model: nn.Module, retain: object) -> nn.Module:
            return model

        def other(model: nn.Module, retain: object) -> nn.Module:
            return model

    registry.register_method("mine")(other)
    with pytest.raises(DuplicateName, match="'mine'"):
        registry.load()


def test_classes_can_be_registered_where_there_is_no_source_file() -> None:
    program = """
        from unsc_plugin.registry import create, register_method
        from unsc_plugin.method import UnlearningMethod

        @register_method("mine")
        class Mine(UnlearningMethod):
            needs, scenarios = frozenset(), frozenset()

            def run(self, model, task):
                return model

        print(create("mine").name)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "mine", done.stderr[-500:]


def test_config_table_describes_every_setting() -> None:
    rows = {row["name"]: row for row in registry.config_table(Finetune)}
    assert rows["lr_scale"]["default"] == 0.1
    assert "share" in rows["lr_scale"]["meaning"]
    assert rows["epochs"]["type"] == "int | None"
    assert all(row["meaning"] for row in rows.values())


def test_the_built_in_file_is_the_one_in_the_repository() -> None:
    document = registry._built_in()
    assert read_yaml(document.source).tree == document.tree
    assert Path(document.source).name == "registry.yaml"
