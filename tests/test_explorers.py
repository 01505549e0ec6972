"""The explorers on runs that lack something: another network, no evidence, one task only, no validation, no latents, a single nodule."""
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from thyroid_rlar.angle_explorer import AngleExplorer
from thyroid_rlar.attribution import HIGHEST, Method, look
from thyroid_rlar.attribution_explorer import AttributionExplorer
from thyroid_rlar.latent import SKIPS_FIXED
from thyroid_rlar.latent_explorer import LatentExplorer
from thyroid_rlar.latent_figures import cohort_list
from thyroid_rlar.nodule_report import attributed, nodule_report, page
from thyroid_rlar.opened import OpenRun, most_telling, open_run
from thyroid_rlar.parameters import check_parameters
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
    for path in sorted((folder / "images").iterdir())[::2]: ImageOps.mirror(Image.open(path)).save(path)
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
