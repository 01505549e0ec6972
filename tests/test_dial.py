"""The dial's run notebook, through papermill as people use it, at a tiny setting; and its stored results."""
import json

import pandas as pd
import pytest
from test_runs import ROOT, papermill, parameters_cell

from thyroid_rlar.dial import BIAS_SD, DialSettings, check_dial

TINY = ["-p", "dials", "-1,1", "-p", "seeds", "0", "-p", "epochs", "1", "-p", "phantom_images", "20", "-p", "image_size", "32x64"]
TURN = ["objective", "seed", "conflict"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dial with spaces é")
    done = papermill("dial.ipynb", folder / "dial.ipynb", *TINY, "-p", "out_dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_parameters_cell_has_the_defaults():
    assert check_dial(parameters_cell("dial.ipynb")) == DialSettings()
    assert parameters_cell("dial.ipynb").keys() == DialSettings.__dataclass_fields__.keys()


def test_every_turn_is_read_against_both_labels(study):
    table = pd.read_parquet(study / "dial.parquet")
    counts = table.groupby([*TURN, "labels"]).size()
    assert len(counts) == 2 * 1 * 2 * 2 and counts.nunique() == 1
    assert table.filter(regex="^(losses|answers)_").abs().le(1.001).all().all() and table.notna().all().all()
    biased = table[table.labels == "biased"].reset_index()
    clean = table[table.labels == "clean"].reset_index()
    assert (biased.answers_pooled == clean.answers_pooled).all()            # they know no labels
    grown = biased.log_area_label - clean.log_area_label
    assert grown.corr(biased.bias) > 0.9                                    # the reader's contours, not the true ones
    for conflict, part in biased.groupby("conflict"): assert part.bias.corr(part.grade) == pytest.approx(conflict)


def test_a_second_run_adds_only_what_is_missing(study):
    turns = {path: path.stat().st_mtime_ns for path in study.glob("*/angles.parquet")}
    (study / "rlar-d+1-s0" / "angles.parquet").unlink()                     # as if stopped in the last turn
    done = papermill("dial.ipynb", study / "again.ipynb", *TINY, "-p", "out_dir", study)
    assert done.returncode == 0, done.stderr[-3000:]
    again = {path: path.stat().st_mtime_ns for path in study.glob("*/angles.parquet")}
    assert [path.parent.name for path in turns if again[path] != turns[path]] == ["rlar-d+1-s0"] and again.keys() == turns.keys()


def test_an_unknown_parameter_stops_the_run_before_anything_is_made(study):
    before = sorted(study.rglob("*"))
    done = papermill("dial.ipynb", study.parent / "wrong.ipynb", *TINY, "-p", "out_dir", study, "-p", "dial", "0")
    assert done.returncode != 0 and "unknown parameter dial; allowed are dials" in done.stderr
    assert sorted(study.rglob("*")) == before


def test_stored_results_are_of_todays_defaults():
    results, s = ROOT / "data" / "results", DialSettings()
    expected = {"epochs": s.epochs, "phantom_images": s.phantom_images, "image_size": list(s.image_size), "bias_sd": BIAS_SD}
    assert json.loads((results / "dial.json").read_text()) == expected
    turns = set(pd.read_parquet(results / "dial.parquet", columns=TURN).drop_duplicates().itertuples(index=False, name=None))
    later = {("sum", n, d) for n in (3, 4) for d in s.dials}             # trained to test what the first seeds had shown
    assert turns == {(o, n, d) for o in s.objectives for n in s.seeds for d in s.dials} | later
