"""What is measured and how: frames, outputs, every name of the default tier, invariances."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Mlp, Normed, build
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import jensenshannon
from torch import nn

from unsc_plugin import engine, evaluation, forget
from unsc_plugin.data import Splits
from unsc_plugin.errors import CacheMismatch, DataError, DivergedError
from unsc_plugin.evaluation import Evaluation, Frame, Outputs
from unsc_plugin.metrics import METRICS
from unsc_plugin.rows import Rows
from unsc_plugin.runtime import state_sha256
from unsc_plugin.spec import DataInfo, EvaluationSpec, Recipe

SPEC = EvaluationSpec.model_validate(
    {"relearn": {"steps": 4}, "probe": {"shots": 3, "repeats": 4}, "reference_pool": 2}
)
RECIPE = Recipe(epochs=1, lr=0.05, batch_size=16)
REQUESTS = {"instance": "random:40", "class": "class:1", "subclass": "subclass:fine=a1"}

CORE = {
    "acc_forget", "acc_retain", "acc_test", "delta_forget", "delta_retain", "delta_test", "tow",
    "avg_gap", "js_forget", "js_test", "disagree_forget", "relearn_retain",
    "relearn_retain_quarter", "relearn_retain_half", "gap_relearn",
}  # fmt: skip
MIA = {"umia_auc", "umia_tpr1", "umia_logistic", "gap_umia_auc"}
MUBENCH = {
    f"mubench.{name}"
    for name in (
        "dt_accuracy", "df_accuracy", "dr_accuracy", "knowledge_gap", "zrf",
        "unlearn_overall_accuracy", "overall_v1",
    )
}  # fmt: skip
OF_CLASSES = {
    "acc_test_retained", "acc_test_forgotten", "delta_test_retained", "delta_test_forgotten",
    "probe5", "gap_probe5",
}  # fmt: skip
OF_SUBCLASSES = {"acc_test_siblings", "delta_test_siblings"}
EXPECTED = {
    "instance": CORE | MIA | MUBENCH,
    "class": CORE | MIA | MUBENCH | OF_CLASSES,
    "subclass": CORE | MIA | MUBENCH | OF_CLASSES | OF_SUBCLASSES,
}
NEEDS_POOL = {
    name for name in CORE | MIA | OF_CLASSES | OF_SUBCLASSES if "pool" in METRICS[name].needs
}


def toy(train: int = 240, test: int = 420, *, siblings: bool = True) -> Splits:
    """Three classes of two sub-labels each, 6 features that say something about them."""

    def split(count: int, seed: int, start: int, sign: int) -> Rows:
        generator = np.random.default_rng(seed)
        fine = np.arange(count) % 6
        generator.shuffle(fine)
        labels = fine // 2
        features = generator.normal(size=(count, 6)) + 1.5 * np.eye(6)[fine]
        names = np.array(["a0", "a1", "b0", "b1", "c0", "c1"])[fine]
        return Rows.of(
            {"features": torch.from_numpy(features).float()},
            torch.from_numpy(labels),
            sign * torch.arange(start, start + count),
            extra={"fine": names} if siblings else {},
        )

    info = DataInfo(
        name="toy",
        modality="tabular",
        num_classes=3,
        class_names=("a", "b", "c"),
        input_shape=(6,),
        labels_sha256="0" * 64,
    )
    whole = split(train, 0, 0, 1)
    return Splits(whole, whole.subset([]), split(test, 1, 1, -1), info)


SPLITS = toy()


def frame_of(kind: str, *, seed: int = 0, draw: int = 0, spec: EvaluationSpec = SPEC) -> Frame:
    request = forget.select(forget.parse(REQUESTS[kind]), SPLITS.train, seed=3, info=SPLITS.info)
    return evaluation.frame(SPLITS, request, RECIPE, spec, seed=seed, draw=draw)


def trained(seed: int, rows: Rows, kind: type[nn.Module] = Mlp) -> nn.Module:
    model = build(kind, seed)
    engine.train(model, rows, Recipe(epochs=4, lr=0.05, batch_size=16), seed=seed)
    return model


@pytest.fixture(scope="module", params=list(REQUESTS))
def measured(request: pytest.FixtureRequest) -> tuple[Frame, Outputs, list[Outputs]]:
    """A frame, the outputs of a model trained on everything, and those of two retrained ones."""
    frame = frame_of(request.param)
    subject = evaluation.observe(trained(1, SPLITS.train), frame, relearn_seed=11)
    pool = [
        evaluation.observe(trained(seed, frame.retain), frame, relearn_seed=seed) for seed in (2, 3)
    ]
    return frame, subject, pool


def everything(frame: Frame, subject: Outputs, pool: list[Outputs]) -> Evaluation:
    return evaluation.evaluate(subject, pool, frame, original_test_accuracy=0.8)


# --------------------------------------------------------------------------- every name


def test_every_name_of_the_default_tier_is_there(
    measured: tuple[Frame, Outputs, list[Outputs]],
) -> None:
    frame, subject, pool = measured
    found = everything(frame, subject, pool)
    small = int(frame.forgotten.sum()) < 100 and frame.kind != "instance"
    absent = {"umia_tpr1"} if small else set()
    assert set(found.metrics) == EXPECTED[frame.kind] - absent
    assert set(found.missing) == absent
    assert all(np.isfinite(value) for value in found.metrics.values())
    catalogue = list(METRICS)
    places = [catalogue.index(name) for name in found.metrics]
    assert places == sorted(places)


def test_what_is_absent_has_a_reason(measured: tuple[Frame, Outputs, list[Outputs]]) -> None:
    frame, subject, _ = measured
    found = evaluation.evaluate(subject, [], frame)
    assert not NEEDS_POOL & set(found.metrics)
    assert set(found.metrics) | set(found.missing) == EXPECTED[frame.kind]
    assert not set(found.metrics) & set(found.missing)
    assert all(found.missing.values())
    assert "original" in found.missing["mubench.unlearn_overall_accuracy"]
    assert found.reference == found.reference_std == {}


def test_without_test_rows_of_the_class_attack_and_probe_say_so() -> None:
    labels = SPLITS.test.labels
    kept = dataclasses.replace(SPLITS, test=SPLITS.test.subset(torch.nonzero(labels != 1)[:, 0]))
    request = forget.select(forget.parse("class:1"), SPLITS.train, info=SPLITS.info)
    frame = evaluation.frame(kept, request, RECIPE, SPEC, seed=0)
    subject = evaluation.observe(build(Mlp), frame, relearn_seed=0)
    found = evaluation.evaluate(subject, [subject], frame, original_test_accuracy=0.5)
    gone = MIA | {"probe5", "gap_probe5", "acc_test_forgotten", "delta_test_forgotten"}
    assert set(found.missing) == gone
    assert set(found.metrics) == EXPECTED["class"] - gone
    assert "no test rows" in found.missing["umia_logistic"]


def test_a_diverging_relearn_probe_is_absent_with_its_reason() -> None:
    spec = SPEC.model_copy(update={"relearn": SPEC.relearn.model_copy(update={"lr_scale": 6.5e39})})
    frame = frame_of("instance", spec=spec)
    outputs = evaluation.observe(build(Mlp), frame, relearn_seed=0)
    found = evaluation.evaluate(outputs, [outputs], frame)
    assert "relearn_retain" not in found.metrics
    assert "diverged" in found.missing["relearn_retain"]
    assert "relearn_retain" in found.missing["gap_relearn"]


def test_groups(measured: tuple[Frame, Outputs, list[Outputs]]) -> None:
    frame, subject, pool = measured
    found = evaluation.evaluate(subject, pool, frame, groups=["core"])
    assert set(found.metrics) | set(found.missing) == EXPECTED[frame.kind] - MIA - MUBENCH
    with pytest.raises(DataError, match="got \\['moa'\\]"):
        evaluation.evaluate(subject, pool, frame, groups=["moa"])


# --------------------------------------------------------------------------- values


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def log_odds(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    p = softmax(logits)[np.arange(len(labels)), labels]
    return np.log(p / (1 - p))


def test_numbers_against_a_plain_reference(
    measured: tuple[Frame, Outputs, list[Outputs]],
) -> None:
    frame, subject, pool = measured
    found = everything(frame, subject, pool)
    test = frame.test.labels.numpy()

    def shares(outputs: Outputs) -> tuple[float, float, float]:
        rows = frame.forgotten.numpy()
        kept = ~rows if frame.kind != "instance" else np.ones(len(test), bool)
        hits = outputs.test.argmax(1) == test
        own = (outputs.forget.argmax(1) == frame.forget.labels.numpy()).mean()
        retain = (outputs.retain_eval.argmax(1) == frame.retain_eval.labels.numpy()).mean()
        return own, retain, hits[kept].mean()

    own, rest = np.array(shares(subject)), np.array([shares(member) for member in pool])
    delta = own - rest.mean(axis=0)
    assert found.metrics["acc_forget"] == pytest.approx(own[0], abs=1e-12)
    assert found.metrics["acc_retain"] == pytest.approx(own[1], abs=1e-12)
    assert found.metrics["tow"] == pytest.approx(np.prod(1 - np.abs(delta)), abs=1e-12)
    assert found.metrics["avg_gap"] == pytest.approx(100 * np.abs(delta).mean(), abs=1e-10)
    assert found.metrics["delta_forget"] == pytest.approx(100 * delta[0], abs=1e-10)
    assert found.reference["acc_forget"] == pytest.approx(rest[:, 0].mean(), abs=1e-12)
    assert found.reference_std["acc_forget"] == pytest.approx(rest[:, 0].std(ddof=1), abs=1e-12)

    def js(name: str) -> float:
        p = softmax(getattr(subject, name))
        return np.mean(
            [jensenshannon(p, softmax(getattr(m, name)), base=2, axis=1) ** 2 for m in pool]
        )

    assert found.metrics["js_forget"] == pytest.approx(js("forget"), abs=1e-9)
    assert found.metrics["js_test"] == pytest.approx(js("test"), abs=1e-9)
    for gap, name in (("gap_relearn", "relearn_retain"), ("gap_umia_auc", "umia_auc")):
        assert found.metrics[gap] == pytest.approx(
            abs(found.metrics[name] - found.reference[name]), abs=1e-12
        )


def test_attack_weighs_the_right_nonmembers(
    measured: tuple[Frame, Outputs, list[Outputs]],
) -> None:
    frame, subject, pool = measured
    found = everything(frame, subject, pool)
    rows = np.ones(len(frame.test), bool) if frame.kind == "instance" else frame.forgotten.numpy()
    labels, members = frame.test.labels.numpy()[rows], frame.forget.labels.numpy()
    inside = log_odds(subject.forget, members)
    outside = log_odds(subject.test[rows], labels)
    weight = np.array([(members == y).mean() / (labels == y).mean() for y in labels])
    wins = (inside[:, None] > outside) + 0.5 * (inside[:, None] == outside)
    assert found.metrics["umia_auc"] == pytest.approx(
        (wins * weight).sum() / (weight.sum() * len(inside)), abs=1e-12
    )


# --------------------------------------------------------------------------- frames


@pytest.mark.parametrize("kind", list(REQUESTS))
def test_a_frame_depends_on_seed_and_draw_only(kind: str) -> None:
    spec = SPEC.model_copy(update={"retain_eval": 50})
    one, again = frame_of(kind, spec=spec), frame_of(kind, spec=spec)
    assert one.identity() == again.identity()
    assert torch.equal(one.retain_eval.index, again.retain_eval.index)
    for other in (frame_of(kind, spec=spec, seed=1), frame_of(kind, spec=spec, draw=1)):
        assert other.identity() != one.identity()
        assert not torch.equal(other.retain_eval.index, one.retain_eval.index)
    if one.shots is not None:
        assert again.shots is not None
        assert np.array_equal(one.shots.positions, again.shots.positions)


def test_everything_that_decides_what_is_observed_is_in_the_identity() -> None:
    plain = frame_of("class")
    others = [
        frame_of("instance"),
        frame_of("class", spec=SPEC.model_copy(update={"retain_eval": 50})),
        dataclasses.replace(plain, recipe=RECIPE.model_copy(update={"lr": 0.1})),
        dataclasses.replace(
            plain, spec=SPEC.model_copy(update={"relearn": evaluation.EvaluationSpec().relearn})
        ),
        dataclasses.replace(plain, test=plain.test.subset(list(range(10)))),
    ]
    assert len({plain.identity(), *(other.identity() for other in others)}) == 6


@pytest.mark.parametrize("limit", [1, 7, 50, 100, 199])
def test_retain_eval_is_stratified_and_within_its_limit(limit: int) -> None:
    frame = frame_of("instance", spec=SPEC.model_copy(update={"retain_eval": limit}))
    shown, whole = frame.retain_eval.labels, frame.retain.labels
    assert len(shown) == limit
    shares = torch.bincount(whole, minlength=3) * limit / len(whole)
    assert (torch.bincount(shown, minlength=3) - shares).abs().max() <= 1
    assert set(frame.retain_eval.index.tolist()) <= set(frame.retain.index.tolist())
    assert torch.equal(frame.retain_eval.index, frame.retain_eval.index.sort().values)


@pytest.mark.parametrize("limit", ["all", 200, 10_000])
def test_retain_eval_can_be_all(limit: int | str) -> None:
    frame = frame_of("instance", spec=SPEC.model_copy(update={"retain_eval": limit}))
    assert torch.equal(frame.retain_eval.index, frame.retain.index)


def test_many_sorted_classes_keep_their_last_ones() -> None:
    # 100 classes of 10 rows, 150 wanted: rounding every share up and cutting loses a quarter.
    shown = evaluation._stratified(torch.arange(100).repeat_interleave(10), 150, seed=0)
    assert len(shown) == 150
    assert set(np.bincount(shown // 10, minlength=100)) == {1, 2}


def test_masks_of_a_class() -> None:
    frame = frame_of("class")
    assert torch.equal(frame.forgotten, SPLITS.test.labels == 1)
    assert not frame.siblings.any()
    assert np.array_equal(frame.codes, np.ones(int(frame.forgotten.sum())))


def test_masks_of_a_sub_label() -> None:
    frame = frame_of("subclass")
    fine = SPLITS.test.extra["fine"]
    assert np.array_equal(frame.forgotten.numpy(), fine == "a1")
    assert np.array_equal(frame.siblings.numpy(), fine == "a0")
    assert len(set(frame.codes)) == 1
    assert frame.shots is not None
    assert len(frame.shots.classes) == 6  # prototypes of sub-labels, not of labels


def test_sub_labels_that_test_lacks() -> None:
    bare = toy(siblings=False).test
    request = forget.select(forget.parse(REQUESTS["subclass"]), SPLITS.train, info=SPLITS.info)
    frame = evaluation.frame(dataclasses.replace(SPLITS, test=bare), request, RECIPE, SPEC, seed=0)
    assert not frame.forgotten.any()
    assert frame.shots is None
    outputs = evaluation.observe(build(Mlp), frame, relearn_seed=0)
    found = evaluation.evaluate(outputs, [], frame)
    assert "no test rows" in found.missing["acc_test_siblings"]


def test_masks_of_instances_are_empty() -> None:
    frame = frame_of("instance")
    assert not frame.forgotten.any()
    assert not frame.siblings.any()


@pytest.mark.parametrize(
    ("rows", "steps"), [(10, 50), (800, 50), (801, 51), (3200, 200), (16_000, 1000), (10**6, 1000)]
)
def test_relearn_steps_are_one_epoch_within_limits(rows: int, steps: int) -> None:
    auto = EvaluationSpec()
    frame = dataclasses.replace(frame_of("instance"), retain=range(rows), spec=auto)
    assert frame.relearn_steps == steps


def test_relearn_steps_may_be_given() -> None:
    assert frame_of("instance").relearn_steps == 4


# --------------------------------------------------------------------------- observing


@pytest.mark.parametrize("kind", [Mlp, Normed])
def test_observing_leaves_the_model_as_it_was(kind: type[nn.Module]) -> None:
    model = build(kind)
    model.train()
    model.body.weight.requires_grad_(False)
    before = state_sha256(model)
    evaluation.observe(model, frame_of("class"), relearn_seed=0)
    assert state_sha256(model) == before
    assert all(module.training for module in model.modules())
    assert not model.body.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model._forward_hooks


def test_relearning_moves_what_the_method_froze() -> None:
    frame, free, frozen = frame_of("class"), build(Mlp), build(Mlp)
    frozen.requires_grad_(False)
    one, two = (evaluation.observe(m, frame, relearn_seed=5) for m in (free, frozen))
    assert one.numbers == two.numbers


def test_relearning_sees_retained_rows_in_one_order_for_all_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frame = frame_of("instance")
    plain = engine.cross_entropy
    seen: list[list[int]] = []

    def spy(model: nn.Module, batch: engine.Batch, *rest: object, **more: object) -> torch.Tensor:
        seen[-1] += batch.index.tolist()
        return plain(model, batch, *rest, **more)

    monkeypatch.setattr(engine, "cross_entropy", spy)
    for model, seed in ((build(Mlp), 5), (build(Normed, 4), 5), (build(Mlp), 6)):
        seen.append([])
        evaluation.observe(model, frame, relearn_seed=seed)
    assert seen[0] == seen[1] != seen[2]
    assert len(seen[0]) == 4 * RECIPE.batch_size
    assert not set(seen[0]) & set(frame.forget.index.tolist())


def test_relearning_is_measured_at_a_quarter_half_and_the_end() -> None:
    frame = frame_of("class")
    model = trained(1, frame.retain)
    found = evaluation.observe(model, frame, relearn_seed=5).numbers
    for name, steps in (("_quarter", 1), ("_half", 2), ("", 4)):
        student = trained(1, frame.retain)
        engine.fit_steps(student, frame.retain, RECIPE, steps=steps, lr=0.1 * RECIPE.lr, seed=5)
        logits = engine.predict(student, frame.forget).logits
        share = float((logits.argmax(1) == frame.forget.labels).double().mean())
        assert found[f"relearn_retain{name}"] == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(poison: float) -> None:
    model = build(Mlp)
    with torch.no_grad():
        model.head.bias[0] = poison
    with pytest.raises(DivergedError, match="logit on forget"):
        evaluation.observe(model, frame_of("instance"), relearn_seed=0)


def test_evaluating_leaves_the_outputs_alone(
    measured: tuple[Frame, Outputs, list[Outputs]],
) -> None:
    frame, subject, pool = measured
    before = [outputs.sha256 for outputs in (subject, *pool)]
    first, second = everything(frame, subject, pool), everything(frame, subject, pool)
    assert [outputs.sha256 for outputs in (subject, *pool)] == before
    assert first == second


def test_evaluating_draws_from_no_global_generator(
    measured: tuple[Frame, Outputs, list[Outputs]],
) -> None:
    frame, subject, pool = measured
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    everything(frame, subject, pool)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


# --------------------------------------------------------------------------- kept outputs


def test_outputs_come_back_to_the_bit(
    measured: tuple[Frame, Outputs, list[Outputs]], tmp_path: Path
) -> None:
    _, subject, _ = measured
    path = tmp_path / "outputs.safetensors"
    subject.save(path)
    again = Outputs.load(path)
    for name in ("forget", "retain_eval", "test"):
        kept, found = getattr(subject, name), getattr(again, name)
        assert found.dtype == np.float32
        assert kept.tobytes() == found.tobytes()
    assert again.numbers == subject.numbers
    assert again.sha256 == subject.sha256


def test_outputs_that_were_changed_are_refused_with_both_hashes(
    measured: tuple[Frame, Outputs, list[Outputs]], tmp_path: Path
) -> None:
    _, subject, _ = measured
    path = tmp_path / "outputs.safetensors"
    subject.save(path)
    changed = dataclasses.replace(subject, numbers={**subject.numbers, "probe5": 0.123})
    tensors = load_file(path)
    metadata = {"numbers": '{"probe5":0.123}', "sha256": subject.sha256}
    save_file(tensors, path, metadata=metadata)
    fake = dataclasses.replace(changed, numbers={"probe5": 0.123}).sha256
    with pytest.raises(CacheMismatch, match=f"expected SHA-256 {subject.sha256}, found {fake}"):
        Outputs.load(path)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_truncated_outputs_are_refused(
    keep: int, measured: tuple[Frame, Outputs, list[Outputs]], tmp_path: Path
) -> None:
    path = tmp_path / "outputs.safetensors"
    measured[1].save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheMismatch, match="delete"):
        Outputs.load(path)


# --------------------------------------------------------------------------- invariances


def close(one: Evaluation, two: Evaluation, tolerance: float, but: tuple[str, ...] = ()) -> None:
    assert one.metrics.keys() == two.metrics.keys()
    for part in ("metrics", "reference", "reference_std"):
        for name, value in getattr(one, part).items():
            if name not in but:
                assert getattr(two, part)[name] == pytest.approx(value, abs=tolerance), name


def test_order_of_examples_changes_nothing(
    measured: tuple[Frame, Outputs, list[Outputs]],
) -> None:
    frame, subject, pool = measured
    generator = np.random.default_rng(0)
    order = {
        name: generator.permutation(len(getattr(frame, name)))
        for name in ("forget", "retain_eval", "test")
    }

    def mixed(outputs: Outputs) -> Outputs:
        rows = {name: getattr(outputs, name)[at] for name, at in order.items()}
        return dataclasses.replace(outputs, **rows)

    other = dataclasses.replace(
        frame,
        **{name: getattr(frame, name).subset(at) for name, at in order.items()},
        forgotten=frame.forgotten[order["test"]],
        siblings=frame.siblings[order["test"]],
    )
    # zrf draws its noise row by row and documents that the rows must stand in one fixed order
    but = ("mubench.zrf",)
    close(
        everything(frame, subject, pool),
        everything(other, mixed(subject), [mixed(member) for member in pool]),
        1e-12,
        but,
    )


def test_order_of_members_changes_nothing(
    measured: tuple[Frame, Outputs, list[Outputs]],
) -> None:
    frame, subject, pool = measured
    close(everything(frame, subject, pool), everything(frame, subject, pool[::-1]), 1e-12)


def test_batch_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    frame, model = frame_of("class"), trained(1, SPLITS.train)
    whole = evaluation.observe(model, frame, relearn_seed=0)
    monkeypatch.setattr(engine, "predict", partial(engine.predict, batch_size=7))
    parts = evaluation.observe(model, frame, relearn_seed=0)
    assert np.abs(whole.test - parts.test).max() < 1e-5
    close(everything(frame, whole, [whole]), everything(frame, parts, [whole]), 1e-6)


def test_float64_logits_give_the_same_numbers() -> None:
    frame, model = frame_of("class"), trained(1, SPLITS.train)
    single = evaluation.observe(model, frame, relearn_seed=0)
    model = model.double()
    with torch.no_grad():
        double = {
            name: model(getattr(frame, name).gather(range(len(getattr(frame, name)))).inputs[
                "features"
            ].double()).numpy()
            for name in ("forget", "retain_eval", "test")
        }  # fmt: skip
    exact = Outputs(**double, numbers=single.numbers)
    assert exact.test.dtype == np.float64
    close(everything(frame, single, [single]), everything(frame, exact, [single]), 1e-5)


def test_a_pool_of_the_subject_itself_has_no_distance() -> None:
    frame = frame_of("class")
    outputs = evaluation.observe(build(Mlp), frame, relearn_seed=0)
    found = everything(frame, outputs, [outputs, outputs]).metrics
    assert found["tow"] == 1
    zero = ("js_forget", "js_test", "disagree_forget", "avg_gap", "gap_relearn", "gap_probe5")
    assert [found[name] for name in zero] == [0] * len(zero)
