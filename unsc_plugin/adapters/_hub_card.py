"""The model card: what was forgotten, what that changed, how far to trust it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from unsc_plugin.adapters._receipt import SMALL, WITHHELD, Receipt
from unsc_plugin.metrics import DIRECTIONS, METRICS, lookup
from unsc_plugin.models import Library
from unsc_plugin.spec import Modality

TASKS: dict[Modality, str] = {
    "image": "image-classification",
    "text": "text-classification",
    "tabular": "tabular-classification",
}
LIBRARIES = {"torch": "pytorch"}
OVERALL = "mubench.unlearn_overall_accuracy"
HERE = "path/to/this/folder"
ABSENT = "–"

RESULTS = (
    ("acc_test", "accuracy", "TA", "test", 1.0),
    ("acc", "accuracy", "TA", "test", 1.0),
    ("acc_retain", "accuracy", "RA", "retain", 1.0),
    ("acc_forget", "accuracy", "FA", "forget", 1.0),
    ("umia_auc", "mia_auc", "membership attack, AUC", "forget", 1.0),
    ("avg_gap", "gap_to_retrain", "mean accuracy gap to retraining", None, 0.01),
    (OVERALL, "mubench_overall", "MU-Bench overall", None, 1.0),
)
"""Our name -> type, name and split in the metadata, and what makes a fraction of it."""


@dataclass(frozen=True)
class Card:
    """What a model card says besides its receipt.

    Attributes:
        name: of the model.
        data: what it was trained on: a hub id, or a name.
        modality: image, text or tabular.
        model: what its backbone is called.
        forgot: what was forgotten, in words that follow "made to forget".
        base_model: hub id of the published weights that it started from.
        license: identifier of its licence.
        missing: metric -> why it was not measured.
        limits: sentences for the section on limits.
        repository: where it will be published, ORG/NAME.
    """

    name: str
    data: str
    modality: Modality
    model: str = "model"
    forgot: str = ""
    base_model: str | None = None
    license: str = "unknown"
    missing: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    repository: str | None = None


def render(card: Card, receipt: Receipt, library: Library, *, prepared: bool = True) -> str:
    """Return `README.md`: metadata that the hub reads, then the text.

    `prepared` says whether what prepares the inputs (statistics of pixels, a tokenizer) is known,
    so that it lies beside the model.
    """
    body = [
        f"# {card.name}",
        _summary(card, receipt),
        "## What was measured",
        _table(receipt),
        *_reading(card, receipt),
        "## How to load it",
        _loading(card, library, prepared),
        "## Limits",
        "\n".join(f"- {one}" for one in _limits(card, receipt, library)),
        "## How to repeat it",
        _repeating(receipt),
    ]
    return f"---\n{metadata(card, receipt, library).to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"


def metadata(card: Card, receipt: Receipt, library: Library) -> Any:
    """Return the card's `huggingface_hub.ModelCardData`."""
    from huggingface_hub import EvalResult, ModelCardData

    task = TASKS[card.modality]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=card.data,
            dataset_name=card.data,
            dataset_split=split,
            metric_type=kind,
            metric_name=name,
            metric_value=receipt.after[key] * scale,
        )
        for key, kind, name, split, scale in RESULTS
        if key in receipt.after
    ]
    return ModelCardData(
        model_name=card.name,
        library_name=LIBRARIES.get(library, library),
        base_model=card.base_model,
        datasets=[card.data],
        pipeline_tag=task,
        license=card.license,
        tags=["machine-unlearning", "unsc_plugin", receipt.method.name],
        eval_results=results or None,
        unlearning=receipt.short(),
    )


# --------------------------------------------------------------------------- the text


def _summary(card: Card, receipt: Receipt) -> str:
    asked, base = receipt.request, card.base_model
    what = "correct its behaviour by weights of its training rows"
    if asked.n:
        forgot = card.forgot or f"{asked.n} of its training rows"
        what = f"forget {forgot} ({100 * asked.fraction:.2g} %)"
    origin = f" It started from [{base}](https://huggingface.co/{base})." if base else ""
    first = (
        f"{_ARTICLES[card.modality]} {card.modality} classifier (`{card.model}`), trained on "
        f"`{card.data}` and then made to {what}.{origin} The method is `{receipt.method.name}` "
        f"({receipt.method.version})."
    )
    if not asked.n:
        return first
    yardstick = (
        "The yardstick is a model that is trained again from the start without these rows. "
        "Unlearning has worked as far as this model behaves like that one; a low accuracy on the "
        "forgotten rows alone does not show it."
    )
    return "\n\n".join([first, yardstick, *_in_words(receipt)])


def _in_words(receipt: Receipt) -> Iterator[str]:
    """Yield what the model answers on the rows that it was to forget, and on others."""
    sentences = []
    for name, rows in (("acc_forget", "forgotten rows"), ("acc_test", "test rows")):
        if name not in receipt.after:
            continue
        beside = [
            f"{100 * numbers[name]:.1f} % {who}"
            for who, numbers in (
                ("before unlearning", receipt.before),
                ("by the retrained model", receipt.retrain),
            )
            if name in numbers
        ]
        also = f" ({', '.join(beside)})" if beside else ""
        sentences.append(f"Of the {rows} it gets {100 * receipt.after[name]:.1f} % right{also}.")
    if "avg_gap" in receipt.after:
        sentences.append(
            f"On average over forgotten, retained and test rows its accuracy is "
            f"{receipt.after['avg_gap']:.1f} percentage points away from retraining."
        )
    if sentences:
        yield " ".join(sentences)


def _table(receipt: Receipt) -> str:
    place = {name: at for at, name in enumerate(METRICS)}
    names = sorted(receipt.after, key=lambda name: (place.get(name, len(place)), name))
    rows = [_row(name, receipt) for name in names if _shown(name)]
    head = ("what", "metric", "before", "after", "retrain", "gap", "which way is good")
    rule = (":--", ":--", "--:", "--:", "--:", "--:", ":--")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _shown(name: str) -> bool:
    """Return whether a number is in the table; the others are in the receipt."""
    derived = name.startswith("delta_") or name.endswith(("_quarter", "_half"))
    return not derived and (not name.startswith("mubench.") or name == OVERALL)


def _row(name: str, receipt: Receipt) -> tuple[str, ...]:
    what, unit, way = name, "", ""
    if name in METRICS:
        spec = lookup(name)
        what, way = spec.summary, DIRECTIONS[spec.direction]
        unit = f" [{spec.unit}]" if spec.unit in ("pp", "bits", "nats", "s") else ""
    value, other = receipt.after[name], receipt.retrain.get(name)
    gap = None if other is None else value - other
    cells = (_number(receipt.before.get(name)), _number(value), _number(other))
    signed = ABSENT if gap is None else f"{gap:+.4f}"
    return (_cell(what), f"`{name}`{unit}", *cells, signed, way)


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _reading(card: Card, receipt: Receipt) -> Iterator[str]:
    """Yield how the table is to be read."""
    count = len(receipt.reference.sha256)
    columns = ["*before* is the original model"] if receipt.before else []
    columns.append("*after* is this model")
    if receipt.retrain:
        models = f"the mean of {count} models" if count > 1 else "a model"
        without = "without the forgotten rows" if receipt.request.n else "with the same weights"
        columns.append(f"*retrain* is {models} trained from the start {without}")
        columns.append("*gap* is after minus retrain")
    yield f"In the table {'; '.join(columns)}. A dash stands where there is no such number."
    if OVERALL in receipt.after:
        there = receipt.retrain.get(OVERALL)
        which = "" if there is None else f" (here retraining itself gets {there:.4f})"
        yield (
            f"`{OVERALL}` calls a model good whose answers on the forgotten rows are no better "
            f"than chance, whatever retraining would give{which}; the gap to retraining calls a "
            "model good that has never seen them. Where the two disagree, the gap is what this "
            "card stands for."
        )
    if card.missing:
        reasons = "; ".join(f"`{name}`: {why}" for name, why in card.missing.items())
        yield f"Not measured: {reasons}."


def _loading(card: Card, library: Library, prepared: bool) -> str:
    """Return how to load the model; `prepared`: what prepares its inputs lies beside it."""
    place = card.repository or HERE
    if library == "torch":
        lines = _by_hand()
    elif library == "timm":
        lines = _by_timm(f"hf-hub:{place}" if card.repository else f"local-dir:{place}", prepared)
    else:
        ways = _by_transformers if library == "transformers" else _by_this_package
        lines = ways(card, place, prepared)
    return "\n".join(["```python", *lines, "```"])


def _by_transformers(card: Card, place: str, prepared: bool) -> list[str]:
    model, words, given = "AutoModelForImageClassification", "AutoImageProcessor", "image"
    if card.modality == "text":
        model, words, given = "AutoModelForSequenceClassification", "AutoTokenizer", "text"
    loaded = ["", f'model = {model}.from_pretrained("{place}").eval()']
    if not prepared:
        return [f"from transformers import {model}", *loaded]
    return [
        f"from transformers import {words}, {model}",
        *loaded,
        f'prepare = {words}.from_pretrained("{place}")',
        f'logits = model(**prepare({given}, return_tensors="pt")).logits',
    ]


def _by_timm(source: str, prepared: bool) -> list[str]:
    lines = ["import timm", "", f'model = timm.create_model("{source}", pretrained=True).eval()']
    if not prepared:
        return lines
    return [
        *lines,
        "settings = timm.data.resolve_model_data_config(model)",
        "prepare = timm.data.create_transform(**settings, is_training=False)",
        "logits = model(prepare(image)[None])",
    ]


def _by_this_package(card: Card, place: str, prepared: bool) -> list[str]:
    lines, folder = ["import unsc_plugin"], f'folder = "{place}"'
    if card.repository:
        lines.append("from huggingface_hub import snapshot_download")
        folder = f'folder = snapshot_download("{place}")'
    if prepared and card.modality == "text":
        lines.append("from transformers import AutoTokenizer")
        given = ["prepare = AutoTokenizer.from_pretrained(folder)"]
        given += ['logits = model(**prepare(text, return_tensors="pt"))']
    else:
        given = [f"logits = model({_KEYS[card.modality]}=...)"]
    return [*lines, "", folder, "model = unsc_plugin.load_model(folder)", *given]


def _by_hand() -> list[str]:
    return [
        "from safetensors.torch import load_file",
        "",
        "model = ...  # a module of the class that was given to the method",
        f'model.load_state_dict(load_file("{HERE}/model.safetensors"))',
    ]


_ARTICLES = {"image": "An", "text": "A", "tabular": "A"}
_KEYS = {"image": "pixel_values", "text": "input_ids", "tabular": "features"}


def _limits(card: Card, receipt: Receipt, library: Library) -> Iterator[str]:
    yield (
        "These numbers are measurements, no proof that nothing of the forgotten rows is left: a "
        "stronger attack may still find traces."
    )
    if receipt.reference.kind == "none":
        yield "There is no retrained model to compare with, so nothing here says how close it is."
    elif len(receipt.reference.sha256) == 1:
        yield "The comparison is with a single retrained model; another seed gives another gap."
    yield "One run with one seed: how much a repetition varies was not measured."
    if receipt.method.checks is None:
        yield "The conformance checks of the method were not run together with this model."
    yield from card.limits
    if receipt.request.salted_sha256 is not None:
        yield (
            f"The forget set has fewer than {SMALL} rows, so that a plain hash could be reversed "
            "by trying; the receipt holds one with a salt, which the authors keep."
        )
    if WITHHELD in receipt.command:
        yield "The command below leaves out which rows were forgotten; repeating needs their list."
    if receipt.request.indices is not None:
        yield "The authors publish which rows were forgotten: they are in `receipt.json`."
    if library == "unsc_plugin" and card.modality == "tabular":
        yield "It takes columns as this package encodes them for the data it was trained on."
    if card.license == "unknown":
        yield "The authors have stated no licence."


def _repeating(receipt: Receipt) -> str:
    if not receipt.command:
        return "`receipt.json` has the method's settings, the seeds, the hashes and the versions."
    return (
        f"```bash\npip install unsc-plugin\n{receipt.command}\n```\n\n"
        "`receipt.json` has all of this in full: settings, seeds, hashes, every number, versions."
    )
