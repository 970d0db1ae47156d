"""`unsc export`: the folder, its card and receipt, leaderboard rows, and everything it refuses."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

import unsc_plugin
from tests.command_line import Done, tree, unsc
from unsc_plugin.adapters import _receipt, hub
from unsc_plugin.data import load as load_data
from unsc_plugin.registry import load

torch.set_num_threads(1)
ROWS = (3, 17, 23, 41, 43)
RUN = ("run", "finetune", "--data", "wine", "--model", "logistic", "--recipe", "epochs=2", "-q")
CLASS = ("--forget", "class:0", "--metrics", "core,mia,mubench")
FILES = {"README.md", "receipt.json", "model.safetensors", "unsc_model.json"}


def finished(folder: Path, *more: str) -> Path:
    done = unsc(*RUN, *more, "--out", folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return finished(tmp_path_factory.mktemp("class") / "run", *CLASS)


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    """Return a run that forgets five rows which its command lists."""
    forget = f"indices:{','.join(map(str, ROWS))}"
    return finished(tmp_path_factory.mktemp("listed") / "run", "--forget", forget)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hub"
    done = unsc("export", "hub", run, folder, "--license", "mit")
    assert done.code == 0, done.err
    return folder


def receipt_in(folder: Path) -> dict:
    return json.loads((folder / "receipt.json").read_text())


# --------------------------------------------------------------------------- the folder


def test_the_folder_holds_the_model_of_the_run(run, exported):
    assert tree(exported) == FILES
    model = unsc_plugin.load_model(exported)
    kept = load_file(run / "model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert {oct(path.stat().st_mode & 0o777) for path in exported.iterdir()} == {"0o644"}


def test_the_hashes_that_are_printed_are_those_of_the_files(run, tmp_path):
    done = unsc("export", "hub", run / "record.json", tmp_path / "out", "--json")
    found = done.json
    assert (done.code, found["library"], found["rows"], found["url"]) == (0, "unsc_plugin", 8, None)
    assert found["files"].keys() == FILES
    for name, digest in found["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert found["receipt"] == receipt_in(tmp_path / "out")


def test_the_receipt_has_the_numbers_of_the_record(run, exported):
    receipt, record = receipt_in(exported), json.loads((run / "record.json").read_text())
    keys = "schema method request original unlearned reference before after retrain cost seeds env"
    assert set(receipt) == {*keys.split(), "command", "date"}
    assert receipt["after"] == record["metrics"]
    assert receipt["retrain"] == record["reference"]
    assert receipt["before"].keys() == receipt["after"].keys() - {"mubench.unlearn_time"}
    assert receipt["unlearned"]["sha256"] == record["hashes"]["unlearned"]
    assert receipt["original"]["sha256"] == record["hashes"]["original"]
    assert receipt["reference"]["sha256"] == record["reference_hashes"]
    assert len(receipt["reference"]["seeds"]) == 1
    assert receipt["method"]["config"] == record["config"]
    assert receipt["method"]["version"] == f"unsc-plugin {unsc_plugin.__version__}"
    assert receipt["request"]["scenario"] == "class"
    assert receipt["cost"]["run_s"] == record["cost"]["seconds_unlearn"]
    assert receipt["command"] == record["command"]


def test_before_is_what_the_run_has_shown_of_the_original(exported):
    shown = receipt_in(exported)["before"]
    done = unsc(*RUN[:1], "original", *RUN[2:], *CLASS, "--json", "--out", exported.parent / "o")
    assert done.code == 0, done.err
    measured = done.json["metrics"]
    for name in ("acc_forget", "acc_test", "avg_gap", "js_forget", "umia_auc", "relearn_retain"):
        assert shown[name] == pytest.approx(measured[name], abs=1e-9), name


# --------------------------------------------------------------------------- the card


def test_the_hub_reads_every_result_of_the_card(run, exported):
    card, after = ModelCard.load(exported / "README.md"), receipt_in(exported)["after"]
    found = {(one.metric_type, one.metric_name): one for one in card.data.eval_results}
    expected = {
        ("accuracy", "TA"): (after["acc_test"], "test"),
        ("accuracy", "RA"): (after["acc_retain"], "retain"),
        ("accuracy", "FA"): (after["acc_forget"], "forget"),
        ("mia_auc", "membership attack, AUC"): (after["umia_auc"], "forget"),
        ("gap_to_retrain", "mean accuracy gap to retraining"): (after["avg_gap"] / 100, None),
        ("mubench_overall", "MU-Bench overall"): (
            after["mubench.unlearn_overall_accuracy"],
            None,
        ),
    }
    assert {key: (one.metric_value, one.dataset_split) for key, one in found.items()} == expected
    assert all(0 <= one.metric_value <= 1 and one.verified is None for one in found.values())
    assert {one.task_type for one in found.values()} == {"tabular-classification"}
    assert {one.dataset_type for one in found.values()} == {"wine"}


def test_the_metadata_of_the_card(exported):
    data = ModelCard.load(exported / "README.md").data.to_dict()
    assert data["license"] == "mit"
    assert data["library_name"] == "unsc_plugin"
    assert data["pipeline_tag"] == "tabular-classification"
    assert data["tags"] == ["machine-unlearning", "unsc_plugin", "finetune"]
    assert data["datasets"] == ["wine"]
    receipt = receipt_in(exported)
    assert data["unlearning"]["request"] == receipt["request"]
    assert data["unlearning"]["unlearned"] == receipt["unlearned"]
    assert data["unlearning"]["method"]["name"] == "finetune"


def test_the_table_of_the_card_is_whole_and_says_which_way_is_good(exported):
    body = ModelCard.load(exported / "README.md").text
    html = MarkdownIt("commonmark").enable("table").render(body)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in html.split("<tr>")[1:]]
    assert html.count("<table>") == 1
    assert {len(cells) for cells in rows} == {7}
    assert rows[0][2:] == ["before", "after", "retrain", "gap", "which way is good"]
    assert all("better" in cells[-1] for cells in rows[1:])
    line = next(cells for cells in rows if cells[1] == "<code>acc_forget</code>")
    receipt = receipt_in(exported)
    numbers = [receipt[part]["acc_forget"] for part in ("before", "after", "retrain")]
    assert line[2:5] == [f"{number:.4f}" for number in numbers]
    assert line[5] == f"{numbers[1] - numbers[2]:+.4f}"
    assert "disagree" in body  # the gap and MU-Bench's overall mean different things
    assert "pip install unsc-plugin" in body
    assert receipt["command"] in body
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_a_hub_name_is_what_the_card_is_about(run, tmp_path):
    done = unsc("export", "hub", run, tmp_path / "out", "--push", "acme/wine-without-0")
    assert done.code == 3
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.model_name == "wine-without-0"
    assert 'snapshot_download("acme/wine-without-0")' in card.text


def test_without_the_original_there_is_no_before(run, tmp_path):
    done = unsc("export", "hub", run, tmp_path / "out", "--cache", tmp_path / "empty")
    assert done.code == 0
    assert "warning: the original model of this run is not in" in done.err
    assert receipt_in(tmp_path / "out")["before"] == {}
    assert "before unlearning" not in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "empty").exists()  # nothing was trained for it


# --------------------------------------------------------------------------- which rows


def test_a_small_forget_set_is_known_by_a_salted_hash_only(listed, tmp_path):
    for name in ("one", "two"):
        assert unsc("export", "hub", listed, tmp_path / name).code == 0
    first, again = (receipt_in(tmp_path / name)["request"] for name in ("one", "two"))
    assert first == again
    assert first.keys() == {"scenario", "n", "fraction", "salted_sha256"}
    assert first["n"] == len(ROWS)
    salt = json.loads((listed / "receipt-salt.json").read_text())["salt"]
    content = np.array(ROWS, "<i8").tobytes()
    assert first["salted_sha256"] == hashlib.sha256(bytes.fromhex(salt) + content).hexdigest()
    assert (listed / "receipt-salt.json").stat().st_mode & 0o077 == 0
    hashes = json.loads((listed / "record.json").read_text())["hashes"]
    for path in (tmp_path / "one").iterdir():
        content = path.read_bytes()
        for secret in (salt, hashes["forget"], hashes["retain"], ",".join(map(str, ROWS))):
            assert secret.encode() not in content, f"{path.name} gives {secret} away"
    receipt = receipt_in(tmp_path / "one")
    assert '"indices":"withheld"' in receipt["command"]
    assert "repeating needs their list" in (tmp_path / "one" / "README.md").read_text()


def test_the_rows_are_published_if_that_is_asked_for(listed, tmp_path):
    assert unsc("export", "hub", listed, tmp_path / "out", "--with-indices").code == 0
    receipt = receipt_in(tmp_path / "out")
    assert receipt["request"]["indices"] == list(ROWS)
    digest = hashlib.sha256(np.array(ROWS, "<i8").tobytes()).hexdigest()
    assert receipt["request"]["split_sha256"] == digest
    assert '"indices":[3,17,23,41,43]' in receipt["command"]
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert "indices" not in data["unlearning"]["request"]


def test_a_list_in_a_file_is_named_without_its_folder(tmp_path):
    rows = tmp_path / "private" / "patients.txt"
    rows.parent.mkdir()
    rows.write_text("\n".join(map(str, ROWS)))
    run = finished(tmp_path / "run", "--forget", f"file:{rows}")
    assert unsc("export", "hub", run, tmp_path / "out").code == 0
    receipt = receipt_in(tmp_path / "out")
    assert receipt["request"]["index_file"].keys() == {"name", "salted_sha256"}
    assert receipt["request"]["index_file"]["name"] == "patients.txt"
    assert "private" not in json.dumps(receipt) + (tmp_path / "out" / "README.md").read_text()


def test_a_large_forget_set_has_a_plain_hash():
    rows = np.arange(200)[::-1]
    plain = hashlib.sha256(np.arange(200, dtype="<i8").tobytes()).hexdigest()
    assert _receipt.rows_sha256(rows, None) == plain
    assert _receipt.rows_sha256(rows, "00" * 32) != plain


def test_what_is_public_of_a_forget_set():
    steps = ["random:3", "indices:1,2", '{"kind":"indices","indices":[4,5]}']
    found = _receipt.without_rows({"kind": "sequence", "steps": steps})["steps"]
    assert found[:2] == ["random:3", "indices:withheld"]
    assert json.loads(found[2]) == {"kind": "indices", "indices": "withheld"}


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("--data parquet:/home/ann/wards", "--data parquet:wards"),
        ('{"path":"/srv/a/rows.txt"}', '{"path":"rows.txt"}'),
        ("--plugin ~/mine/m.py", "--plugin m.py"),
        ("${UNSC_DATA_DIR}/cifar10", "${UNSC_DATA_DIR}/cifar10"),
        ("hf:org/name benchmarks/b/board.yaml", "hf:org/name benchmarks/b/board.yaml"),
    ],
)
def test_folders_of_this_machine_stay_here(text, public):
    assert _receipt.without_folders({"a": [text]}) == {"a": [public]}


# --------------------------------------------------------------------------- rows of leaderboards


def test_a_leaderboard_row(run, tmp_path):
    done = unsc("export", "hf-row", run, tmp_path, "--org", "acme", "--license", "mit", "--json")
    assert done.code == 0, done.err
    result_path, request_path = (tmp_path / name for name in done.json["files"])
    assert all(name.endswith(".json") for name in done.json["files"])
    stamp = r"results_\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d{6}\.json"
    assert re.fullmatch(stamp, result_path.name)
    result = json.loads(result_path.read_text())
    config = result["config"]
    assert (config["model_dtype"], config["model_sha"]) == ("torch.float32", "main")
    org, name = config["model_name"].split("/")
    data, rest = name.split("-", 1)
    backbone, method, ratio, seed = rest.rsplit("-", 3)
    assert (org, data, backbone, method, seed) == ("acme", "wine", "logistic", "finetune", "42")
    share = json.loads((run / "record.json").read_text())
    assert 0 < float(ratio) < 100
    numbers = result["results"][f"{data}_{ratio}"]
    names = ("unlearn_overall_accuracy", "dt_accuracy", "df_accuracy", "dr_accuracy")
    assert numbers == {key: share["metrics"][f"mubench.{key}"] for key in names}
    assert all(0 <= number <= 1 for number in numbers.values())
    request = json.loads(request_path.read_text())
    assert request_path.name == f"{name}_eval_request_False_float32_Original.json"
    assert (request["model"], request["status"]) == (config["model_name"], "FINISHED")
    assert (request["license"], request["precision"]) == ("mit", "float32")
    state = load_file(run / "model.safetensors")
    assert request["params"] == sum(tensor.numel() for tensor in state.values()) / 1e9
    again = unsc("export", "hf-row", run, tmp_path, "--org", "acme")
    assert (again.code, "this row has been written" in again.err) == (2, True)


def test_a_row_lacks_what_was_not_measured(listed, tmp_path):
    done = unsc("export", "hf-row", listed, tmp_path)
    assert done.code == 0
    assert "unlearn_overall_accuracy" in done.err
    (path,) = tmp_path.glob("eval-results/local/*/results_*.json")
    (numbers,) = json.loads(path.read_text())["results"].values()
    assert numbers.keys() == {"dt_accuracy", "df_accuracy", "dr_accuracy"}


def test_the_run_folder_of_mubench(run, tmp_path):
    done = unsc("export", "mubench", run, tmp_path / "out")
    assert done.code == 0, done.err
    record = json.loads((run / "record.json").read_text())
    final = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert final["dt_accuracy"] == record["metrics"]["mubench.dt_accuracy"]
    wine = load_data(load().datasets["wine"].entry, "wine")
    gone = torch.nonzero(wine.train.labels == 0)[:, 0]
    model = unsc_plugin.load_model(tmp_path / "out")
    with torch.no_grad():
        expected = model(**wine.train.subset(gone).gather(list(range(len(gone)))).inputs)
    logits = np.load(tmp_path / "out" / "pred_logit_df.npy")
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-6)
    assert unsc("export", "mubench", run, tmp_path / "out").code == 2


# --------------------------------------------------------------------------- publishing


class StandIn:
    """Stands in for the hub's client: remembers what it is asked, reaches no network."""

    calls: tuple = ()

    def create_repo(self, repository, **more):
        StandIn.calls += (("create", repository),)
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, *, repo_id, folder_path, **more):
        StandIn.calls += (("upload", repo_id, tuple(sorted(os.listdir(folder_path)))),)


@pytest.fixture
def client(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "t")
    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    monkeypatch.setattr(StandIn, "calls", ())
    return huggingface_hub


def test_a_pushed_folder(run, tmp_path, client):
    done = unsc("export", "hub", run, tmp_path / "out", "--push", "acme/wine")
    assert (done.code, "published at https://huggingface.co/acme/wine" in done.out) == (0, True)
    assert StandIn.calls == (("create", "acme/wine"), ("upload", "acme/wine", tuple(sorted(FILES))))


@pytest.mark.parametrize("fault", ["offline", "no token", "no network"])
def test_what_cannot_be_pushed_is_complete_and_says_how(run, tmp_path, client, monkeypatch, fault):
    def unreachable(self, repository, **more):
        raise ConnectionError("name resolution failed")

    if fault == "offline":
        monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", True)
    elif fault == "no token":
        monkeypatch.setattr(client, "get_token", lambda: None)
    else:
        monkeypatch.setattr(StandIn, "create_repo", unreachable)
    done = unsc("export", "hub", run, tmp_path / "out", "--push", "acme/wine")
    assert done.code == 3
    assert tree(tmp_path / "out") == FILES
    assert f"publish it with: hf upload acme/wine {tmp_path / 'out'} ." in done.err
    assert {"offline": "HF_HUB_OFFLINE", "no token": "hf auth login"}.get(fault, "") in done.err


# --------------------------------------------------------------------------- bad input


def changed(run: Path, target: Path, **fields) -> Path:
    shutil.copytree(run, target)
    record = json.loads((target / "record.json").read_text())
    (target / "record.json").write_text(json.dumps(record | fields))
    return target


def refused(done: Done, *told: str, code: int = 2) -> None:
    assert done.code == code, done.err
    for text in told:
        assert text in done.err
    assert not done.out


@pytest.mark.parametrize("form", ["hub", "mubench", "hf-row"])
def test_what_is_no_finished_run_is_refused(run, tmp_path, form):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    refused(unsc("export", form, tmp_path / "empty", out), "expected a run folder", "unsc run")
    refused(unsc("export", form, tmp_path / "nowhere", out), "expected a run folder")
    diverged = {"status": "diverged", "reason": "loss is nan at step 3", "metrics": {}}
    folder = changed(run, tmp_path / "diverged", **diverged)
    refused(unsc("export", form, folder, out), "diverged (loss is nan at step 3)")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "record.json").write_text('{"schema": 1')
    refused(unsc("export", form, tmp_path / "torn", out), "expected a whole record")
    weightless = changed(run, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    refused(unsc("export", form, weightless, out), "expected the weights of the run")
    assert not out.exists()


def test_other_weights_or_data_than_the_record_speaks_of(run, tmp_path):
    state = load_file(run / "model.safetensors")
    folder = changed(run, tmp_path / "weights")
    save_file({name: tensor + 1 for name, tensor in state.items()}, folder / "model.safetensors")
    refused(unsc("export", "hub", folder, tmp_path / "out"), "not the one that the run wrote")
    hashes = json.loads((run / "record.json").read_text())["hashes"]
    folder = changed(run, tmp_path / "data", hashes=hashes | {"data": "0" * 64})
    refused(unsc("export", "hub", folder, tmp_path / "out"), "expected data with SHA-256 000")
    assert tree(tmp_path) == {"weights", "data"} | {
        f"{one}/{path}" for one in ("weights", "data") for path in tree(run)
    }


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--license", "CC BY 4.0"), "mit, apache-2.0, cc-by-4.0 or other"),
        (("--push", "wine"), "expected ORG/NAME"),
        (("--push", "acme/../wine"), "expected ORG/NAME"),
        (("--push", "acme/"), "expected ORG/NAME"),
    ],
)
def test_malformed_names_are_refused_before_anything_is_written(run, tmp_path, more, told):
    refused(unsc("export", "hub", run, tmp_path / "out", *more), told)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_never_overwritten(run, exported):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    refused(unsc("export", "hub", run, exported), "exists and is never overwritten")
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


def test_a_place_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    refused(unsc("export", "hub", run, tmp_path / "file" / "out"), "cannot be written")


def test_a_row_of_a_strange_organisation(run, tmp_path):
    refused(unsc("export", "hf-row", run, tmp_path / "out", "--org", "a/b"), "--org")


def test_the_same_from_python(run, tmp_path):
    done = hub.export(run, tmp_path / "out")
    assert done.directory == tmp_path / "out"
    assert done.notes == ()
    assert done.receipt["request"]["n"] == receipt_in(tmp_path / "out")["request"]["n"]
