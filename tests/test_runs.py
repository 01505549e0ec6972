"""The run notebooks, through papermill as people use them, at a tiny setting."""
import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest

from thyroid_rlar import runs
from thyroid_rlar.evaluation import RISK, SEGMENTATION, write_json
from thyroid_rlar.files import DataError, release
from thyroid_rlar.methods import METHODS
from thyroid_rlar.parameters import ParameterError, RunSettings, check_parameters, read_size
from thyroid_rlar.phantom import write_phantoms
from thyroid_rlar.predictions import EvaluationSettings
from thyroid_rlar.runs import changed_parameters, open_source, run_folder

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(source="folder", data_dir="data/phantom", image_size="64x96", folds=3, stride=8, epochs=2, batch_size=4, device="cpu")
TINY = [str(part) for name, value in SMALL.items() for part in ("-p", name, value)]


def papermill(notebook: str, output: Path, *parameters: object) -> subprocess.CompletedProcess:
    "Run a notebook from another folder than the checkout, as a user might."
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs/runs" / notebook), str(output), "--no-progress-bar", *map(str, parameters)]
    return subprocess.run(command, capture_output=True, text=True, cwd=output.parent, timeout=900)


def here(notebook: str, until: str = "", **parameters: object) -> dict[str, object]:
    "Run a notebook's cells in this process, parameters where papermill puts them, up to the cell that holds a text; the notebook's variables."
    names = {"__name__": "__main__"}
    for cell in nbformat.read(ROOT / "nbs/runs" / notebook, 4).cells:
        if cell.cell_type != "code": continue
        exec(compile(cell.source, notebook, "exec"), names)
        if "parameters" in cell.metadata.get("tags", []): names.update(parameters)
        if until and until in cell.source: break
    plt.close("all")
    return names


def parameters_cell(notebook: str) -> dict[str, object]:
    nb = nbformat.read(ROOT / "nbs/runs" / notebook, 4)
    source, = [cell.source for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body}


def metrics_of(folder: Path) -> dict: return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run with spaces é")
    done = papermill("train.ipynb", folder / "train.ipynb", *TINY, "-p", "out_dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_parameters_cell_names_every_parameter_with_its_default():
    cell, settings = parameters_cell("train.ipynb"), asdict(RunSettings())
    assert cell | {"image_size": read_size(cell["image_size"])} == settings
    assert parameters_cell("evaluate.ipynb").keys() == EvaluationSettings.__dataclass_fields__.keys()


def test_run_folder_is_complete(run_dir):
    for name in ("params.json", "train.ipynb", "report.html", "metrics.json", "history.parquet", "predictions.parquet", "nodules.parquet",
                 "latents/000.npz", "latents/001.npz", "model.safetensors", "model.json", "checkpoint/state.pt"):
        assert (run_dir / name).stat().st_size > 0, name
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for group, names in (("segmentation", SEGMENTATION), ("risk", RISK)):
        for name in names: assert {"value", "low", "high", "n"} <= metrics[group][name].keys(), name
    assert metrics["segmentation"]["dice"]["low"] <= metrics["segmentation"]["dice"]["value"] <= metrics["segmentation"]["dice"]["high"]
    assert {name: len(metrics["rlar"][name]) for name in ("excess", "excess_shuffled", "strength", "cos_std")} == dict.fromkeys(
        ("excess", "excess_shuffled", "strength", "cos_std"), 2)
    assert metrics["images"] == len(pd.read_parquet(run_dir / "predictions.parquet"))


def test_an_image_with_some_of_its_evidence_counts_as_one_with_evidence():
    settings = RunSettings(source="folder", data_dir="data/phantom", image_size=(64, 96), folds=3)
    run = runs.load_data(settings, runs.open_source(settings, progress=False), progress=False)
    part, none = run.split.train[:2]
    run.data.evidence[part, 1:], run.data.evidence[none] = np.nan, np.nan
    run.measured.iloc[[part, none], run.measured.columns.get_loc("reason")] = "cut by the sector's edge"
    source, = [cell.source for cell in nbformat.read(ROOT / "nbs/runs/train.ipynb", 4).cells if '"with evidence"' in cell.source]
    *statements, table = ast.parse(source).body
    names = vars(runs) | {"settings": settings, "manifest": run.manifest, "load_data": lambda *_: run}
    exec(compile(ast.Module(statements, []), "train.ipynb", "exec"), names)
    assert eval(ast.unparse(table), names)["with evidence"].to_dict() == {
        "training": len(run.split.train) - 1, "validation": len(run.split.val), "reported": len(run.split.test)}


def test_report_opens_offline(run_dir):
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "research only" in text.lower() and "medical device" in text.lower()
    assert '<script src=' not in text and 'href="http' not in text.split("<script", 1)[0]


def test_a_run_repeats_itself(run_dir, tmp_path):
    done = papermill("train.ipynb", tmp_path / "train.ipynb", *TINY, "-p", "out_dir", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "model.safetensors").read_bytes() == (run_dir / "model.safetensors").read_bytes()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "predictions.parquet"), pd.read_parquet(run_dir / "predictions.parquet"))


def test_evaluate_agrees_with_the_run(run_dir, tmp_path):
    done = papermill("evaluate.ipynb", tmp_path / "evaluate.ipynb", "-p", "run_dir", run_dir, "-p", "out_dir", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    trained, evaluated = (json.loads((folder / "metrics.json").read_text()) for folder in (run_dir, tmp_path))
    assert evaluated == trained and {"value", "low", "high", "n"} <= evaluated["evidence_r2"]["tallness"].keys()


def test_contours_can_be_measured_on_another_scale_and_grades_cannot(run_dir, tmp_path):
    shutil.copytree(ROOT / "data/phantom", tmp_path / "data")
    labels = pd.read_csv(tmp_path / "data/labels.csv")
    labels.assign(scale="ddti", grade="4a").to_csv(tmp_path / "data/labels.csv", index=False)
    parameters = ["-p", "run_dir", run_dir, "-p", "source", "folder", "-p", "data_dir", tmp_path / "data",
                  "-p", "out_dir", tmp_path, "-p", "part", "all"]
    done = papermill("evaluate.ipynb", tmp_path / "evaluate.ipynb", *parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics_of(tmp_path)["segmentation"]["dice"]["n"] == 24 and {m["n"] for m in metrics_of(tmp_path)["risk"].values()} == {0}
    assert "Grades are not reported" in (tmp_path / "evaluate.ipynb").read_text()


def test_the_same_folder_in_other_words_goes_on(tmp_path):
    "A slash more, or a share mounted elsewhere: what the images are is known by their files."
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(ROOT / "data/phantom", data)
    s = check_parameters(SMALL | dict(data_dir=str(data), out_dir=str(out)))
    write_json(run_folder(s) / "params.json", {"parameters": asdict(s)})
    for changes in ({"data_dir": f"{data}/"}, {"data_dir": f"{tmp_path}/run/../data", "resume": True}):
        assert not changed_parameters(replace(s, **changes), out)
    moved = str(data.rename(tmp_path / "elsewhere"))
    assert not changed_parameters(replace(s, data_dir=moved, resume=True), out)
    assert "data_dir" in changed_parameters(replace(s, data_dir=moved), out)[0]


def test_two_runs_may_draw_the_phantoms_at_the_same_time(tmp_path, monkeypatch):
    s = check_parameters(dict(source="phantom", phantom_images=20, data_dir=str(tmp_path / "phantoms"), out_dir=str(tmp_path / "run")))
    def while_another_does(folder: Path, *told, **more) -> None:
        write_phantoms(folder, *told, **more)
        write_phantoms(folder, *told, **more)
    monkeypatch.setattr("thyroid_rlar.runs.write_phantoms", while_another_does)
    assert len(open_source(s, progress=False)) == 20


@pytest.mark.parametrize("notebook, parameters, message", [
    ("train.ipynb", ["-p", "rlar_lambda", "3"], "rlar_weight"),
    ("evaluate.ipynb", ["-p", "run_dir", "no/such/run"], "no/such/run"),
    ("compare.ipynb", ["-p", "fresh_heads", "no"], "fresh_heads: found 'no', expected true or false"),
])
def test_papermill_ends_with_the_error_that_says_what_is_right(tmp_path, notebook, parameters, message):
    done = papermill(notebook, tmp_path / "out.ipynb", *parameters)
    assert done.returncode != 0 and message in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("notebook, parameters, message", [
    ("train.ipynb", {"objective": "rlra"}, "rlar_shuffled"),
    ("train.ipynb", {"fold": 7}, "0 to 4 or all"),
    ("train.ipynb", {"source": "ddti"}, "data_dir"),
    ("train.ipynb", {"source": "folder", "data_dir": "no/such/folder"}, "no/such/folder"),
    ("evaluate.ipynb", {"rundir": "x"}, "run_dir"),
    ("compare.ipynb", {"runs_dir": 7}, "7: no finished runs"),
    ("compare.ipynb", {"runsdir": "x"}, "runs_dir"),
])
def test_what_is_wrong_is_an_error_that_says_what_is_right(tmp_path, notebook, parameters, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        here(notebook, **parameters, **{"out_dir": str(tmp_path / "run")} if notebook == "train.ipynb" else {})


@pytest.mark.parametrize("objective", METHODS)
def test_each_method_trains_in_the_run_notebook(tmp_path, objective):
    names = here("train.ipynb", "trainer.fit(", **SMALL | dict(objective=objective, encoder="test_efficientnet", pretrained="none", epochs=1,
                                                             image_size="32x32", out_dir=str(tmp_path)))
    trained = names["history"].query("kind == 'epoch' and split == 'train'")
    assert len(trained) == 1 and (tmp_path / "model.safetensors").is_file()
    assert names["trainer"].objective.name == json.loads((tmp_path / "params.json").read_text())["parameters"]["objective"] == objective
    release(tmp_path)


def test_a_run_whose_data_cannot_be_read_loses_nothing(run_dir, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(ROOT / "data/phantom", data)
    shutil.copytree(run_dir, out)
    record = json.loads((out / "params.json").read_text())
    record["parameters"] |= {"data_dir": str(data), "out_dir": str(out)}
    (out / "params.json").write_text(json.dumps(record))
    def content() -> dict[Path, bytes]: return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    finished = content()
    (data / "labels.csv").write_text("image\n")
    done = papermill("train.ipynb", tmp_path / "train.ipynb", *TINY, "-p", "data_dir", data, "-p", "out_dir", out)
    assert done.returncode != 0 and "labels.csv" in done.stderr, done.stderr[-2000:]
    assert content() == finished


@pytest.mark.parametrize("where", ["a file/run", "/proc/run"])      # neither can be written by root either, whom chmod does not stop
def test_a_run_folder_that_cannot_be_written_is_named(tmp_path, where):
    (tmp_path / "a file").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path / where}.*: writing: found"): run_folder(RunSettings(out_dir=str(tmp_path / where)))


def test_make_run_moves_aside_what_another_version_left(tmp_path):
    out = tmp_path / "phantom"
    out.mkdir()
    (out / "params.json").write_text(json.dumps({"parameters": {"source": "phantom", "lambda": 1}}))
    make = ["make", "-n", "run", f"BIN={Path(sys.executable).parent}", f"RUN_DIR={out}"]
    plan = subprocess.run(make, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    before_training, = [line for line in plan.splitlines() if "set_aside" in line]
    done = subprocess.run(before_training, shell=True, capture_output=True, text=True, cwd=ROOT)
    moved, = tmp_path.glob("phantom.old-*")
    assert done.returncode == 0 and str(moved) in done.stdout and "unknown parameter lambda" in done.stdout, done.stderr
    assert (moved / "params.json").is_file() and not out.exists()


def test_compare_pools_and_pairs(run_dir, tmp_path):
    here("train.ipynb", **SMALL, out_dir=str(tmp_path / "sum"), objective="sum")
    shutil.copytree(run_dir, tmp_path / "rlar")
    parameters = ["-p", "runs_dir", tmp_path, "-p", "baseline", "sum shared_map", "-p", "fresh_heads", True]
    done = papermill("compare.ipynb", tmp_path / "compare.ipynb", *parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    results, differences = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("out_of_fold", "differences"))
    assert set(results.method) == {"sum shared_map", "rlar shared_map"} and (results.low <= results.value).all()
    assert set(differences.metric) == {"dice", "excess", "excess_shuffled", "excess_fresh", "auroc_high", "qwk"}


# ---- what else people run ---------------------------------------------------------------------------------------------

def test_segmentation_alone_on_a_unet_reports_no_grade(tmp_path):
    here("train.ipynb", **SMALL | dict(out_dir=str(tmp_path), objective="seg_only", network="unet", stride=4))
    metrics = metrics_of(tmp_path)
    assert metrics["segmentation"]["dice"]["n"] > 0 and {m["n"] for m in metrics["risk"].values()} == {0}
    assert not [c for c in pd.read_parquet(tmp_path / "predictions.parquet") if c.startswith("p_")] and "evidence_r2" not in metrics


def test_risk_alone_reports_no_contour(tmp_path):
    here("train.ipynb", **SMALL, out_dir=str(tmp_path), objective="risk_only")
    assert metrics_of(tmp_path)["risk"]["qwk"]["n"] > 0 and metrics_of(tmp_path)["segmentation"]["dice"]["n"] == 0


@pytest.mark.parametrize("patience, parts", [(0, {"train"}), (1, {"train", "val"})])
def test_all_folds_train_on_everything_and_report_nothing(tmp_path, patience, parts):
    here("train.ipynb", **SMALL, out_dir=str(tmp_path), fold="all", patience=patience)
    assert metrics_of(tmp_path)["images"] == 0 and set(pd.read_parquet(tmp_path / "split.parquet").split) == parts
    assert "nothing to report" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_images_without_grades_train_the_contour_and_resume_goes_on(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(ROOT / "data/phantom", data)
    pd.read_csv(data / "labels.csv").assign(grade="").to_csv(data / "labels.csv", index=False)
    out = tmp_path / "run"
    parameters = [*TINY, "-p", "data_dir", data, "-p", "out_dir", out]
    done = papermill("train.ipynb", tmp_path / "train.ipynb", *parameters)
    assert done.returncode == 0 and "not trained and not reported" in (tmp_path / "train.ipynb").read_text(), done.stderr[-3000:]
    first = pd.read_parquet(out / "history.parquet")
    assert metrics_of(out)["segmentation"]["dice"]["n"] > 0 and metrics_of(out)["risk"]["qwk"]["n"] == 0

    (out / "metrics.json").unlink()                # as if the run had been stopped after its last epoch
    done = papermill("train.ipynb", tmp_path / "again.ipynb", *parameters, "-p", "resume", True)
    assert done.returncode == 0, done.stderr[-3000:]
    pd.testing.assert_frame_equal(pd.read_parquet(out / "history.parquet"), first)
    again = SMALL | dict(data_dir=str(data), out_dir=str(out), resume=True)
    with pytest.raises(ParameterError, match=re.escape("fold (was 0, now 1)")): here("train.ipynb", **again, fold=1)

    labels = pd.read_csv(data / "labels.csv")
    labels.assign(case=labels["case"].replace(labels["case"][0], "another")).to_csv(data / "labels.csv", index=False)
    with pytest.raises(ParameterError, match="expected the same data, or a new run"): here("train.ipynb", **again)
    release(out)


def test_phantoms_are_not_somebody_else_s_images():
    settings = RunSettings(source="phantom", data_dir="data/phantom", phantom_images=500)
    with pytest.raises(ParameterError, match="holds 24 images and not 500 phantoms"): open_source(settings)


def test_a_run_is_not_started_over_an_evaluation(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ParameterError, match="holds metrics.json but no params.json"): run_folder(RunSettings(out_dir=str(tmp_path)))
    assert (tmp_path / "metrics.json").read_text() == "{}"
