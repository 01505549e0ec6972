"""nbs/runs/probe.ipynb, through papermill as people use it, at a tiny setting."""
from pathlib import Path

import pandas as pd
import pytest
from test_runs import SMALL, here, papermill, parameters_cell

from thyroid_rlar.interference import ProbeSettings


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    "Two finished runs, one of each network, in one folder."
    folder = tmp_path_factory.mktemp("runs with spaces é")
    for network, stride in (("shared_map", 8), ("unet", 4)):
        out = folder / network
        here("train.ipynb", **SMALL | dict(out_dir=str(out), objective="sum", epochs=1, network=network, stride=stride))
    return folder


def test_probe_measures_the_images_that_each_run_left_out(runs, tmp_path):
    few = ["-p", "shares", "1e-4,1e-3", "-p", "images", 3]
    done = papermill("probe.ipynb", tmp_path / "probe.ipynb", "-p", "run_dirs", runs, "-p", "out_dir", tmp_path, *few)
    assert done.returncode == 0, done.stderr[-3000:]
    levels, interference = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("levels", "interference"))
    for table in (levels, interference):
        assert set(table.method) == {"sum shared_map", "sum unet"}
        for network, part in table.groupby("network"):
            split = pd.read_parquet(runs / network / "split.parquet").set_index("image_id")
            images = part.image_id.unique()
            assert len(images) == 3 and set(split.split[images]) == {"test"} and set(part.group) == set(split.group[images])
    assert len(levels) == 2 * 3 * 6 * 2 and levels[["cosine", "norm_seg", "norm_risk", "excess"]].notna().all(axis=None)
    assert len(interference) == 2 * 3 * 2 * 2 and interference.drop(columns="fold").notna().all(axis=None)
    assert set(interference.share) == {1e-4, 1e-3}


def test_probe_goes_on_where_it_was_stopped(runs, tmp_path):
    one = dict(out_dir=str(tmp_path), shares=1e-4, images=1)        # too few for any interval
    here("probe.ipynb", run_dirs=str(runs / "unet"), **one)
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    first = pd.read_parquet(tmp_path / "levels.parquet")
    here("probe.ipynb", run_dirs=f"{runs / 'unet'}, {runs / 'shared_map'}", **one)
    assert len(parts) == 2 and all(path.stat().st_mtime_ns == written for path, written in parts.items())
    both = pd.read_parquet(tmp_path / "levels.parquet")
    pd.testing.assert_frame_equal(both[both.network == "unet"].reset_index(drop=True), first)


@pytest.mark.parametrize("parameters, message", [({"run_dir": "x"}, "run_dirs"), ({"run_dirs": "no/such/runs"}, "no finished run in")])
def test_what_is_wrong_is_an_error_that_says_what_is_right(parameters, message):
    with pytest.raises(ValueError, match=message): here("probe.ipynb", **parameters)


def test_the_parameters_cell_names_every_parameter():
    assert parameters_cell("probe.ipynb").keys() == ProbeSettings.__dataclass_fields__.keys()
