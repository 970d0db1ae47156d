"""From a finished run to something to publish: the model, its card, and a receipt of unlearning.

:func:`export` writes a folder that the model's own library reads (`from_pretrained`,
`timm.create_model("local-dir:...")`, `unsc_plugin.load_model`), with a model card and a receipt
that says what was forgotten without naming rows. :func:`export_model` does the same for a model of
the user's own. Nothing leaves this machine unless :func:`push` is called.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unsc_plugin import engine
from unsc_plugin.adapters import _hub_folder, _hub_rows
from unsc_plugin.adapters._hub_card import Card
from unsc_plugin.adapters._hub_run import Opened, open_run, receipt_of
from unsc_plugin.adapters._receipt import Receipt, read_receipt
from unsc_plugin.errors import ConfigError, MissingOptional
from unsc_plugin.models import Classifier, Library, state_sha256
from unsc_plugin.registry import Registry, load

__all__ = [
    "Card",
    "Exported",
    "Receipt",
    "export",
    "export_model",
    "export_mubench",
    "export_rows",
    "push",
]

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
ORGANISATION = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Exported:
    """What an export has written.

    Attributes:
        directory: the folder.
        files: path in it -> SHA-256.
        library: what reads the model: transformers, timm, unsc_plugin or torch (weights only).
        rows: on how many rows it gives the same logits when read again.
        receipt: what `receipt.json` holds.
        notes: what is not as good as it could be, in sentences.
        url: where it was published, None if it was not.
    """

    directory: Path
    files: Mapping[str, str]
    library: Library
    rows: int
    receipt: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())
    url: str | None = None


# --------------------------------------------------------------------------- export


def export(
    run_folder: str | Path,
    directory: str | Path,
    *,
    push: str | None = None,
    license: str | None = None,
    with_indices: bool = False,
    registry: Registry | None = None,
    data_dir: Path | None = None,
    cache: Path | None = None,
) -> Exported:
    """Write the unlearned model of a run, with its card and receipt, as a folder to publish.

    Args:
        run_folder: what `unsc run --out` wrote, or the `record.json` in it.
        directory: appears whole, or not at all.
        push: ORG/NAME on the hub to publish it as; needs a token that the user already has.
        license: identifier of the model's licence, such as `mit` or `cc-by-4.0`.
        with_indices: say in the receipt which rows were forgotten.
        registry: names that the run used; default the installed ones.
        data_dir: stands in for `$UNSC_DATA_DIR`.
        cache: where the original of the run is kept; without it "before" stays empty.

    Raises:
        ConfigError: no run folder, an existing directory, a malformed licence or repository name.
        RecordError: a run that did not end well, or data that are not those of the run any more.
        RoundTripFailed: what was written gives other logits when read again; nothing is kept.
        MissingOptional: no token or no network to publish; the folder is complete.
    """
    directory = Path(directory)
    checked_license, checked_name = _license(license), _repository(push)
    _hub_folder.refuse_existing(directory)
    opened = open_run(run_folder, registry or load(), data_dir=data_dir, cache=cache)
    receipt = receipt_of(opened, with_indices=with_indices)
    done = export_model(
        opened.model,
        directory,
        card=_card(opened, checked_license, checked_name),
        receipt=receipt,
        inputs=opened.inputs,
        tokenizer=opened.setting.splits.tokenizer,
    )
    if not receipt.before:
        note = (
            f"the original model of this run is not in {opened.setting.pool.root}, so there are no "
            "numbers from before unlearning; say where it is with --cache"
        )
        done = dataclasses.replace(done, notes=(note,))
    return _pushed(done, checked_name)


def export_model(
    model: Classifier,
    directory: str | Path,
    *,
    card: Card,
    receipt: Receipt | Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    tokenizer: Any = None,
) -> Exported:
    """Write a classifier with a card and a receipt; the way for models outside run folders.

    A wrapped module of transformers or timm is written as these libraries read it. Of any other
    only the weights can be kept, under the module's own names.

    Args:
        model: the unlearned model.
        directory: appears whole, or not at all.
        card: what the model card says besides the receipt.
        receipt: see :class:`Receipt`; its `unlearned.sha256` must be the model's.
        inputs: some rows by name, such as `pixel_values` (B, C, H, W), to compare logits on.
        tokenizer: what made the token ids, written beside the model.

    Raises:
        ConfigError: an existing directory, or a receipt of another form or model.
        RoundTripFailed: what was written gives other logits when read again; nothing is kept.
    """
    directory, found = Path(directory), read_receipt(receipt)
    _license(card.license)
    if found.unlearned.sha256 != (here := state_sha256(model)):
        raise ConfigError(
            f"receipt: expected unlearned.sha256 {here}, this model's, got {found.unlearned.sha256}"
        )
    with _hub_folder.appearing(directory) as folder:
        library = _hub_folder.fill(folder, model, card, found, inputs, tokenizer)
    files, rows = _hub_folder.sha256_of(directory), len(next(iter(inputs.values())))
    return Exported(directory, files, library, rows, found.tree())


def _card(opened: Opened, license: str, repository: str | None) -> Card:
    name = str(_hub_rows.row_name(opened))
    limits, spec = [], opened.request.spec
    if spec.kind == "random" or any(step.startswith("random:") for step in spec.steps):
        limits.append(
            "The forget set was drawn at random: the command below draws the same rows again from "
            "the same data."
        )
    return Card(
        name=repository.rpartition("/")[2] if repository else name,
        data=opened.data_id,
        modality=opened.setting.splits.info.modality,
        model=Path(opened.record.experiment["model"]).name,
        forgot=_in_words(opened),
        base_model=opened.base_model,
        license=license,
        missing=opened.record.missing,
        limits=tuple(limits),
        repository=repository,
    )


def _in_words(opened: Opened) -> str:
    """Return what was forgotten, to follow "made to forget"."""
    asked, info = opened.request, opened.setting.splits.info
    spec, rows = asked.spec, f"{asked.n} of its {len(opened.setting.splits.train)} training rows"
    if spec.kind == "class":
        names = [info.class_names[c] if info.class_names else str(c) for c in spec.classes]
        which = "class" if len(names) == 1 else "classes"
        return f"{rows}: all of {which} {', '.join(f'`{name}`' for name in names)}"
    words = {
        "random": "drawn at random",
        "subclass": f"all with one value of `{spec.column}`",
        "index_prefix": "the first of a published list of rows",
        "index_file": "named by a list",
        "indices": "named by a list",
        "sequence": f"in {len(asked.steps)} requests, one after the other",
    }
    return f"{rows}, {words[spec.kind]}" if asked.n else ""


def _license(text: str | None) -> str:
    if text is None:
        return "unknown"
    if not LICENSE.fullmatch(text):
        raise ConfigError(
            f"--license: expected the hub's identifier of a licence, such as mit, apache-2.0, "
            f"cc-by-4.0 or other, got {text!r}"
        )
    return text


def _repository(text: str | None) -> str | None:
    if text is not None and (not REPOSITORY.fullmatch(text) or "--" in text or ".." in text):
        raise ConfigError(f"--push: expected ORG/NAME, got {text!r}")
    return text


# --------------------------------------------------------------------------- publishing


def push(directory: str | Path, repository: str) -> str:
    """Upload an exported folder as ORG/NAME, with a token that the user already has.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: a malformed name.
        MissingOptional: no token, no network, or the hub refuses; the message has the command that
            publishes the folder.
    """
    _repository(repository)
    from huggingface_hub import HfApi, constants, get_token

    unpublished = f"{directory} is complete, but was not published"
    command = f"publish it with: hf upload {repository} {shlex.quote(str(directory))} ."
    if constants.HF_HUB_OFFLINE:
        raise MissingOptional(f"{unpublished}: HF_HUB_OFFLINE is set\n{command}")
    if get_token() is None:
        raise MissingOptional(f"{unpublished}: no token; get one with: hf auth login\n{command}")
    api = HfApi()
    try:
        address = str(api.create_repo(repository, exist_ok=True))
        api.upload_folder(
            repo_id=repository,
            folder_path=str(directory),
            commit_message="Unlearned model with its receipt",
        )
    except (OSError, ValueError, RuntimeError) as error:  # the errors of the client and its network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise MissingOptional(f"{unpublished}: {reason}\n{command}") from None
    return address


def _pushed(done: Exported, repository: str | None) -> Exported:
    if repository is None:
        return done
    return dataclasses.replace(done, url=push(done.directory, repository))


# --------------------------------------------------------------------------- other forms


def export_rows(
    run_folder: str | Path,
    directory: str | Path,
    *,
    org: str = "local",
    license: str | None = None,
    registry: Registry | None = None,
    data_dir: Path | None = None,
    cache: Path | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Write a run as a row of a leaderboard made from the hub's template: result and request.

    The folder may hold other rows already. `org` stands before the model's name. A number that the
    run has not measured is absent from the row.

    Returns:
        Path in the folder -> SHA-256 of the two new files, and the absent numbers.

    Raises:
        ConfigError: no run folder, a malformed name, or a row that is there already.
        RecordError: a run that did not end well.
        NotApplicable: a run that forgets no rows.
    """
    if not ORGANISATION.fullmatch(org):
        raise ConfigError(f"--org: expected the name of an organisation, got {org!r}")
    checked = _license(license)
    opened = open_run(run_folder, registry or load(), data_dir=data_dir, cache=cache)
    written = _hub_rows.write(opened, Path(directory), org=org, license=checked)
    absent = sorted(_hub_rows.NUMBERS.keys() - _hub_rows.numbers_of(opened.record).keys())
    names = [path.relative_to(directory).as_posix() for path in written]
    return {name: _hub_folder.sha256_of(Path(directory))[name] for name in names}, absent


def export_mubench(
    run_folder: str | Path,
    directory: str | Path,
    *,
    registry: Registry | None = None,
    data_dir: Path | None = None,
    cache: Path | None = None,
) -> dict[str, str]:
    """Write a run as the run folder that MU-Bench would have left.

    Returns:
        Path in the folder -> SHA-256.

    Raises:
        ConfigError: no run folder, or an existing directory.
        RecordError: a run that did not end well, or without the numbers of MU-Bench.
    """
    from unsc_plugin.adapters import mubench

    directory = Path(directory)
    _hub_folder.refuse_existing(directory)
    opened = open_run(run_folder, registry or load(), data_dir=data_dir, cache=cache)
    train, test = opened.setting.splits.train, opened.setting.splits.test
    splits = {
        "test": test,
        "df": train.subset(opened.request.forget),
        "dr": train.subset(opened.request.retain),
    }
    seen = {name: engine.predict(opened.model, rows) for name, rows in splits.items() if len(rows)}
    with _hub_folder.appearing(directory) as folder:
        mubench.write_run(
            folder,
            opened.record,
            {name: one.logits.numpy() for name, one in seen.items()},
            opened.model,
            labels={name: one.labels.numpy() for name, one in seen.items()},
        )
    return _hub_folder.sha256_of(directory)
