"""The explorers on runs that lack something: another network, no evidence, one task only, no validation, no latents, a single nodule."""
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from thyroid_rlar.angle_explorer import AngleExplorer, LiveAngles
from thyroid_rlar.attribution import HIGHEST, Method, look
from thyroid_rlar.attribution_explorer import AttributionExplorer
from thyroid_rlar.latent import SKIPS_FIXED
from thyroid_rlar.latent_explorer import LatentExplorer
from thyroid_rlar.latent_figures import cohort_list, paint
from thyroid_rlar.nodule_report import attributed, nodule_report, page
from thyroid_rlar.opened import OpenRun, most_telling, open_run
from thyroid_rlar.parameters import check_parameters
from thyroid_rlar.phantom import make_phantom
from thyroid_rlar.predictions import EvaluationSettings, load_run, open_evaluation, unseen
from thyroid_rlar.runs import load_data, make_trainer, open_source, run_folder

CHEAP = (Method("grad_cam"), Method(steps=4, tolerance=1e9), Method("occlusion", window=32, stride=32))
SMALL = dict(encoder="test_efficientnet", pretrained="none")
ODD = {
    "smp_unet": dict(network="smp_unet", objective="sum", evidence_weight=0, ordinal=False),
    "contours_only": SMALL | dict(objective="seg_only", fold="all"),
    "grades_only": SMALL | dict(objective="risk_only", evidence_weight=0),
}


@pytest.fixture(scope="module", params=ODD)
def run(request, tmp_path_factory) -> OpenRun:
    "A run of one epoch."
    folder = tmp_path_factory.mktemp(request.param) / "run"
    s = check_parameters(dict(source="folder", data_dir="data/phantom", out_dir=str(folder), image_size="64x96", epochs=1, batch_size=8, device="cpu",
                              folds=3) | ODD[request.param])
    make_trainer(s, load_data(s, open_source(s, progress=False), progress=False), run_folder(s)).fit()
    (folder / "metrics.json").write_text("{}")
    return open_run(folder, "all", progress=False)


def test_every_explorer_shows_it(run):
    e = LatentExplorer(run, method="pca")
    assert e.view is not None
    e.choose(seg=0.3, risk=-0.2)
    assert (e.decoded().dice <= 1).all() and e.static().data
    assert (SKIPS_FIXED in e.notes()) == (run.net.settings.network != "shared_map")
    for color in e.controls["color"].options: e.choose(color=color[1])
    e.choose(picked=tuple(run.rows[:5]))
    assert "save all 5 as CSV" in e.cohort_list.value
    e.step(1)
    e.close(); e.close()
    assert AngleExplorer(run).view is not None
    a = AttributionExplorer(run, CHEAP)
    for target in list(a.targets)[:2] + list(a.targets)[-1:]:
        a.choose(target=target, detail="parts")
        assert a.static().data
    a.choose(detail="random")
    assert len(a.details()) == 3
    row = int(most_telling(run.table).row[0])
    assert "not a medical device" in page(nodule_report(run, row, attributed(run, row, Method("grad_cam"))))


def test_a_run_that_kept_no_latents(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "bare", ignore=shutil.ignore_patterns("latents", "checkpoint"))
    bare = open_run(tmp_path / "bare", "all", progress=False)
    e = AngleExplorer(bare)
    assert e.view is not None and "No latents were kept" in e.note.value
    assert LatentExplorer(bare, method="pca").static().data


def test_a_single_nodule(run):
    alone = replace(run, table=run.table.iloc[:1], latents=run.latents[:1], folder=None)
    e = LatentExplorer(alone)
    assert e.view is not None and "PCA instead of UMAP" in e.note.value and not len(e.near())
    e.step(1)
    assert e.state.row == alone.rows[0] and e.static().data


def test_images_are_known_by_their_files(run, tmp_path):
    folder = tmp_path / "mirrored"
    shutil.copytree("data/phantom", folder)
    for k, path in enumerate(sorted((folder / "images").iterdir())[::2]):
        Image.fromarray(make_phantom(500 + k, size=Image.open(path).size[::-1]).image).save(path)
    e = open_run(run.folder, "all", "folder", str(folder), progress=False)
    new = e.table.split == "new"
    assert new.sum() == 12 and set(e.table.image_id[new]) == e.others
    assert e.table.split[~new].tolist() == run.table.split[~new.to_numpy()].tolist()
    assert not e.watched()[new].any() and (e.watched() == run.watched())[~new].all()
    assert "flatters" not in page(nodule_report(e, int(e.rows[new.to_numpy().argmax()])))


def test_images_under_other_names_are_the_same_images(run, tmp_path):
    folder = tmp_path / "renamed"
    shutil.copytree("data/phantom", folder)
    labels = pd.read_csv(folder / "labels.csv", dtype=str, keep_default_na=False)
    for path in (folder / "images").iterdir(): path.rename(path.with_name(f"other-{path.name}"))
    labels.assign(image=labels.image.str.replace("images/", "images/other-")).to_csv(folder / "labels.csv", index=False)
    e = open_run(run.folder, "all", "folder", str(folder), progress=False)
    assert e.table.split.tolist() == run.table.split.tolist() and not e.watched().any()
    assert e.table.image_id.isin(e.others).all()


def test_images_that_were_saved_again_are_the_same_images(run, tmp_path):
    "As JPEG, a little brighter, under other names and cases: neither evaluation nor explorer takes them for new."
    folder = tmp_path / "again"
    shutil.copytree("data/phantom", folder)
    for path in (folder / "images").iterdir():
        Image.open(path).convert("L").point(lambda grey: min(255, grey * 1.05)).save(path.with_name(f"copy-{path.stem}.jpg"), quality=85)
        path.unlink()
    labels = pd.read_csv(folder / "labels.csv", dtype=str, keep_default_na=False)
    labels = labels.assign(image=labels.image.str.replace("images/", "images/copy-").str.replace(".png", ".jpg"), case="other-" + labels.case)
    labels.to_csv(folder / "labels.csv", index=False)
    trained = load_run(run.folder)
    e = EvaluationSettings(run.folder, "folder", str(folder), tmp_path, part="all")
    data, _, note = open_evaluation(e, trained, progress=False)
    assert (unseen(data.prepared, trained.split) == unseen(run.data.prepared, trained.split)).all() and "TRAINED ON" in note
    again = open_run(run.folder, "all", "folder", str(folder), progress=False)
    assert again.table.split.tolist() == run.table.split.tolist() and set(again.table.image_id) == again.others
    before = replace(trained, split=trained.split.drop(columns="look"))
    _, _, note = open_evaluation(e, before, progress=False)
    assert "none of them" in note and "known by their files alone" in note


def test_the_report_of_a_run_of_one_task(run):
    r = nodule_report(run, run.rows[0])
    norms = r.angle.set_index("column").value
    assert np.isfinite(norms.norm_seg) == ("seg" in run.tasks) and np.isfinite(norms.norm_risk) == ("risk" in run.tasks)
    assert ("The run was not trained on both tasks." in page(r)) == (not {"seg", "risk"} <= set(run.tasks))


def test_a_nodule_of_the_highest_grade_is_explained_as_such(run):
    row, highest = run.rows[0], len(run.scale) - 1
    with mock.patch("thyroid_rlar.nodule_report.look", lambda *told: replace(look(*told), grade=highest)):
        assert any(HIGHEST in name for name in attributed(run, row, Method("grad_cam"))) == ("risk" in run.tasks)
    with mock.patch("thyroid_rlar.nodule_report.look", lambda *told: replace(look(*told), grade=0)):
        assert any("the next grade" in name for name in attributed(run, row, Method("grad_cam"))) == ("risk" in run.tasks)


def test_a_still_attribution_names_what_its_target_is_there(run):
    a = AttributionExplorer(run, CHEAP)
    told = {"next": HIGHEST, "mask": "the model finds no nodule"}
    subject, nothing = replace(a.subject(), grade=len(run.scale) - 1), np.zeros_like(run.predicted(run.rows[0]))
    for name, target in a.targets.items():
        a.choose(target=name)
        with mock.patch.object(a, "subject", lambda: subject), mock.patch.object(run, "predicted", lambda row: nothing):
            title = a.static().layout.title.text
        assert all((words in title) == (target.kind == kind) for kind, words in told.items()), title


def test_heads_that_nobody_trained_are_not_shown(run):
    e, trained = LatentExplorer(run, method="pca"), run.tasks
    assert e.view is not None
    assert [fig is not None for fig in (e.grade_fig, e.evidence_fig)] == [task in trained for task in ("risk", "evidence")]
    assert ("predicted grade" in e.sentence.value, "segmentation loss" in e.sentence.value) == ("risk" in trained, "seg" in trained)
    drawn = {trace.name for trace in e.static().data if trace.type == "bar"}
    assert ("after the step" in drawn) == ("risk" in trained)
    assert ("not trained on evidence" in " ".join(e.notes())) == ("evidence" not in trained)
    assert (nodule_report(run, run.rows[0]).missing.get("contour") == "the model was not trained on contours") == ("seg" not in trained)


def test_the_directions_angle_is_said_as_soon_as_it_is_known(run):
    e = LatentExplorer(run, method="pca")
    assert e.view is not None
    both = {"seg", "risk"} <= set(run.tasks)
    assert ("Angle of the directions" in e.sentence.value) == both
    e.choose(where="pooled")
    assert ("(pooled)" in e.sentence.value) == both
    still = LatentExplorer(run, method="pca").static().layout.annotations[-1].text
    assert ("Angle of the directions" in still) == both


def test_two_changes_at_once_are_both_shown(run):
    e = LatentExplorer(run, method="umap")
    assert e.view is not None
    e.choose(method="pca", color="group")
    assert list(e.map_fig.data[0].marker.color) == paint(run, "group").colors


@pytest.mark.parametrize("objective", ["rlar", "seg_only"])
def test_a_training_that_is_watched_ends_as_one_that_is_not(tmp_path, objective):
    ended = []
    for name, watching in (("alone", []), ("watched", [LiveAngles()])):
        s = check_parameters(SMALL | dict(source="folder", data_dir="data/phantom", out_dir=str(tmp_path / name), image_size="64x96", epochs=2,
                                          batch_size=8, device="cpu", folds=3, objective=objective))
        make_trainer(s, load_data(s, open_source(s, progress=False), progress=False), run_folder(s), watching).fit()
        ended.append(load_file(tmp_path / name / "model.safetensors"))
    assert not watching[0].failed and watching[0].explorer is not None
    assert all(torch.equal(weights, ended[1][name]) for name, weights in ended[0].items())


def test_states_that_cannot_be_shown_change_nothing(run):
    a, e = AttributionExplorer(run, CHEAP), LatentExplorer(run, method="pca")
    for explorer, changes in ((a, {"signed": "no"}), (a, {"signed": None}), (e, {"seg": np.array([0.1, 0.2])}), (e, {"risk": "far"})):
        before = explorer.state
        with pytest.raises(ValueError, match=next(iter(changes))): explorer.choose(**changes)
        assert explorer.state == before
    with pytest.raises(ValueError, match="signed"): AttributionExplorer(run, CHEAP, signed="no")


def test_a_refreshed_angle_explorer_keeps_its_map(run):
    e = AngleExplorer(run)
    assert e.view is not None
    e.refresh(run.history, run.nodules)
    drawn = e.map()
    assert "(0%)" not in drawn.axes[0].replace(" ", "") and np.ptp(drawn.now.x) > 0
    e.state = replace(e.state, method="umap")
    e.refresh(run.history, run.nodules)
    assert "umap" in e.maps._maps and "is being made" not in e.note.value


def test_cohort_of_ungraded_nodules(run):
    bare = replace(run, table=run.table.assign(grade=None))
    assert "None" not in cohort_list(bare, bare.rows[:3])


def test_a_size_that_one_row_lacks_is_measured(run, tmp_path):
    folder = tmp_path / "sizes"
    shutil.copytree("data/phantom", folder)
    labels = pd.read_csv(folder / "labels.csv", dtype=str, keep_default_na=False)
    names = labels.image.unique()
    labels.assign(size_cm=np.where(labels.image == names[0], "2.5", "")).to_csv(folder / "labels.csv", index=False)
    e = open_run(run.folder, "all", "folder", str(folder), progress=False)
    sizes = {name: nodule_report(e, row).calculation.size_mm for name, row in zip(e.table.image_id, e.rows)}
    assert sizes[Path(names[0]).stem] == 25 and all(size and size != 25 for name, size in sizes.items() if name != Path(names[0]).stem)
