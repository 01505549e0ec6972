"""The benchmark notebook, through papermill as `make bench` runs it, at a tiny setting."""
import json
from pathlib import Path

import pandas as pd
import pytest
from test_runs import here, papermill

from thyroid_rlar.parameters import ParameterError

METHODS = ["sum", "rlar_one_sided", "rlar_exact", "rlar_half", "pcgrad", "upgrad", "smp_unet"]
TINY = ["-p", "networks", "default,unet", "-p", "methods", ",".join(METHODS), "-p", "rounds", 1, "-p", "threads", 1, "-p", "image_size", "32x64",
        "-p", "batch_size", 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    done = papermill("benchmark.ipynb", folder / "benchmark.ipynb", *TINY, "-p", "out_dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_json_has_the_ratios_of_each_method(folder):
    found = json.loads((folder / "bench.json").read_text())
    assert set(found) == set(METHODS)
    for method, row in found.items(): assert row.keys() == {"cpu_ratio", "wall_ratio", "memory_ratio"} and min(row.values()) > 0, method
    assert set(found["sum"].values()) == {1.0}


def test_tables_hold_everything(folder):
    bench, growth = (pd.read_parquet(folder / f"{name}.parquet") for name in ("bench", "growth"))
    assert {"network", "device", "threads", "method", "cpu_ratio", "cpu_q25", "cpu_q75", "wall_ratio", "cpu_seconds", "memory_mb"} <= set(bench)
    unet = bench[(bench.network == "unet") & (bench.device == "cpu")]
    assert unet.method.tolist() == ["sum", "rlar_one_sided", "rlar_exact", "rlar_half"]
    assert set(growth.axis) == {"image height", "images in a batch", "channels of z", "tasks"} and growth.cpu_seconds.gt(0).all()
    kept = pd.read_parquet(folder / "promises.parquet").set_index("promise")
    assert kept.loc["rlar_exact on stride_8, CPU time over sum", "met"] == "not measured"
    assert set(kept.loc[kept.index.str.contains("unet"), "met"]) <= {"yes", "by the median", "no"} and len(kept) == 16


def test_what_is_wrong_is_said():
    with pytest.raises(ParameterError, match="pcgrad"): here("benchmark.ipynb", methods="sum,pcgard")
    with pytest.raises(ParameterError, match="unknown parameter round;"): here("benchmark.ipynb", round=3)
