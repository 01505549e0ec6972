"""The explorers on runs that lack something: another network, no evidence, one task only, no validation, no latents, a single nodule."""
import shutil
from dataclasses import replace

import pytest

from thyroid_rlar.angle_explorer import AngleExplorer
from thyroid_rlar.attribution import Method
from thyroid_rlar.attribution_explorer import AttributionExplorer
from thyroid_rlar.latent import SKIPS_FIXED
from thyroid_rlar.latent_explorer import LatentExplorer
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
