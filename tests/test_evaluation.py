"""Tables of contour and grade metrics: arguments and expected numbers, worked out by hand or by an outside library."""

import json
import math
import os
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import DiceMetric, MeanIoU, compute_hausdorff_distance

from thyroid_rlar import evaluation as ev
from thyroid_rlar.files import DataError
from thyroid_rlar.tirads import ACR, DDTI, Scale

NAN = math.nan
THREE = Scale("three", ("a", "b", "c"), high=("c",))


def box(top, left, height, width, shape=(12, 16)):
    mask = np.zeros(shape, bool)
    mask[top : top + height, left : left + width] = True
    return mask


EMPTY, FULL = np.zeros((12, 16), bool), np.ones((12, 16), bool)
SQUARE = box(2, 2, 4, 4)
DIAGONAL = math.hypot(12, 16)

# prediction, truth, tolerance, dice, iou, hd95, boundary_f1
CONTOURS = [
    pytest.param(SQUARE, SQUARE, 2, 1.0, 1.0, 0.0, 1.0, id="equal"),
    pytest.param(EMPTY, EMPTY, 2, 1.0, 1.0, 0.0, 1.0, id="both empty"),
    pytest.param(EMPTY, SQUARE, 2, 0.0, 0.0, DIAGONAL, 0.0, id="missed"),
    pytest.param(SQUARE, EMPTY, 2, 0.0, 0.0, DIAGONAL, 0.0, id="invented"),
    pytest.param(FULL, FULL, 0, 1.0, 1.0, 0.0, 1.0, id="whole image"),
    # 4 x 4 against the same one column to the right: overlap 12; of 12 boundary pixels 6 coincide, all lie within 1
    pytest.param(box(2, 3, 4, 4), SQUARE, 0, 0.75, 0.6, 1.0, 0.5, id="one px off, tolerance 0"),
    pytest.param(box(2, 3, 4, 4), SQUARE, 1, 0.75, 0.6, 1.0, 1.0, id="one px off, tolerance 1"),
    # the upper half, 4 x 2: overlap 8 of 16; its 8 boundary pixels are all within 1, of the square's 12 all but the lowest row are
    pytest.param(box(2, 2, 2, 4), SQUARE, 1, 2 / 3, 0.5, 2.0, 2 * 1 * (8 / 12) / (1 + 8 / 12), id="half"),
    pytest.param(box(2, 10, 4, 4), SQUARE, 2, 0.0, 0.0, 8.0, 0.0, id="apart"),
    # two single pixels 3-4-5 apart
    pytest.param(box(6, 6, 1, 1), box(2, 3, 1, 1), 4.9, 0.0, 0.0, 5.0, 0.0, id="pixels, below tolerance"),
    pytest.param(box(6, 6, 1, 1), box(2, 3, 1, 1), 5, 0.0, 0.0, 5.0, 1.0, id="pixels, at tolerance"),
    # a second, false nodule of one pixel 8 columns off: 1 of 13 boundary pixels, above the 95th percentile's neighbours
    pytest.param(SQUARE | box(2, 13, 1, 1), SQUARE, 0, 32 / 33, 16 / 17, 8 * 0.4, 2 * (12 / 13) / (1 + 12 / 13), id="speck"),
]


@pytest.mark.parametrize("pred, truth, tolerance, dice, iou, hd95, boundary_f1", CONTOURS)
def test_contours(pred, truth, tolerance, dice, iou, hd95, boundary_f1):
    found = ev.per_image_segmentation(pred.astype(float), truth, tolerance=tolerance)
    assert found == pytest.approx({"dice": dice, "iou": iou, "hd95": hd95, "boundary_f1": boundary_f1}, abs=1e-5)


@pytest.mark.parametrize("pred, truth, tolerance", [p.values[:3] for p in CONTOURS])
def test_contours_are_symmetric(pred, truth, tolerance):
    forth = ev.per_image_segmentation(pred.astype(float), truth, tolerance=tolerance)
    assert ev.per_image_segmentation(truth.astype(float), pred, tolerance=tolerance) == pytest.approx(forth)


masks = st.lists(st.booleans(), min_size=8 * 9, max_size=8 * 9).map(lambda bits: np.reshape(bits, (8, 9)))


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@settings(max_examples=100, deadline=None)
@given(masks.filter(np.any), masks.filter(np.any))
def test_contours_against_monai(pred, truth):
    a, b = (torch.tensor(m)[None, None] for m in (pred, truth))
    assert ev.dice(pred, truth) == pytest.approx(DiceMetric()(a, b).item(), abs=1e-5)
    assert ev.iou(pred, truth) == pytest.approx(MeanIoU()(a, b).item(), abs=1e-5)
    theirs = compute_hausdorff_distance(a, b, include_background=True, percentile=95).item()
    assert ev.hd95(pred, truth) == pytest.approx(theirs, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(masks.filter(np.any), masks.filter(np.any), st.sampled_from([0, 1, 1.5, 3]))
def test_boundary_f1_by_brute_force(pred, truth, tolerance):
    def boundary(mask):  # a mask pixel with a 4-neighbour outside, and outside the image is outside
        m = np.pad(mask, 1)
        inside = m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:]
        return np.argwhere(mask & ~inside)

    distance = np.linalg.norm(boundary(pred)[:, None] - boundary(truth)[None], axis=2)
    precision, recall = ((distance.min(axis) <= tolerance).mean() for axis in (1, 0))
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert ev.boundary_f1(pred, truth, tolerance) == pytest.approx(expected)


def test_no_reader_mask_is_not_a_zero():
    assert all(math.isnan(v) for v in ev.per_image_segmentation(SQUARE.astype(float), None).values())


def test_threshold_includes_its_value():
    prob = np.where(SQUARE, 0.3, 0.29)
    assert ev.per_image_segmentation(prob, SQUARE, threshold=0.3)["dice"] == 1
    assert ev.per_image_segmentation(prob, SQUARE)["dice"] == 0


BAD_CONTOURS = [
    (np.zeros((12, 15)), SQUARE, {}, "differ in shape"),
    (np.zeros((1, 12, 16)), SQUARE, {}, "expected one mask"),
    (np.zeros((12, 16)), SQUARE[None], {}, "expected one mask"),
    (np.zeros((12, 16)), SQUARE.astype(np.uint8) * 255, {}, "0 and 1"),
    (np.full((12, 16), NAN), SQUARE, {}, "NaN"),
    (np.full((12, 16), 1.2), SQUARE, {}, "outside"),
    (np.full((12, 16), NAN), None, {}, "NaN"),
    (np.zeros((12, 16)), SQUARE, {"threshold": 0.0}, "threshold"),
    (np.zeros((12, 16)), SQUARE, {"threshold": 1.5}, "threshold"),
    (np.zeros((12, 16)), SQUARE, {"tolerance": -1}, "tolerance"),
    (np.zeros((12, 16)), SQUARE, {"tolerance": NAN}, "tolerance"),
]


@pytest.mark.parametrize("prob, mask, options, message", BAD_CONTOURS)
def test_bad_contours(prob, mask, options, message):
    with pytest.raises(ValueError, match=message):
        ev.per_image_segmentation(prob, mask, **options)


def table(grades, probabilities, scale=THREE, **more):
    n = len(grades)
    rows = pd.DataFrame(np.asarray(probabilities, float).reshape(n, len(scale)), columns=ev.probability_columns(scale))
    ids = [str(i) for i in range(n)]
    return rows.assign(image_id=ids, case_id=ids, group=ids, grade_index=pd.array(grades, "Int64"), **more)


SURE = np.eye(3)
TILTED = np.array([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]])

# grades, probabilities, auroc_macro, auroc_high, balanced_accuracy, f1_macro, qwk, ece
GRADES = [
    pytest.param([0, 1, 2], SURE, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, id="perfect"),
    # a: 0 against 1 and 0, half of one pair of two; c likewise; b is right
    pytest.param([2, 1, 0], SURE, (0.25 + 1 + 0.25) / 3, 0.25, 1 / 3, 1 / 3, -1.0, 2 / 3, id="reversed"),
    pytest.param([0, 1, 2], np.full((3, 3), 1 / 3), 0.5, 0.5, 1 / 3, 1 / 6, 0.0, 0.0, id="knows nothing"),
    # a: 0.6, 0.3 against 0.5, 0.1 -> 3/4; b: 0.1 against 0.3, 0.2, 0.3 -> 0; c: 0.7 against 0.1, 0.4, 0.4 -> 1. Decisions a, a, c, c for a, b, c, a.
    # qwk: disagreement 0 + 1 + 0 + 4 = 5; by chance (given 2 1 1, decided 2 0 2): (2*2*4 + 1*2*1 + 1*2*1 + 1*2*4) / 4 = 7; 1 - 5/7
    # ece: 0.4 right 0 of 1, 0.5 0 of 1, 0.6 1 of 1, 0.7 1 of 1: (0.4 + 0.5 + 0.4 + 0.3) / 4
    pytest.param([0, 1, 2, 0], TILTED, (3 / 4 + 0 + 1) / 3, 1.0, 0.5, (0.5 + 0 + 2 / 3) / 3, 1 - 5 / 7, 0.4, id="worked out"),
    # nobody has b: macro over a and c. a: 3 of 4 pairs; c: 0.4, 0.7 against 0.1, 0.4 -> (1 + 0.5 + 1 + 1) / 4
    pytest.param([0, 2, 2, 0], TILTED, (3 / 4 + 3.5 / 4) / 2, 3.5 / 4, 0.5, 0.5, 0.0, 0.4, id="a grade nobody has"),
    pytest.param([1, 1, 1, 1], TILTED, NAN, NAN, 0.0, 0.0, 0.0, 0.55, id="one grade"),
    # left are b called a and c called c. qwk: 1; by chance (1*1*1 + 1*1*1 + 1*1*4) / 2 = 3
    pytest.param([None, 1, 2, None], TILTED, 0.5, 1.0, 0.5, 1 / 3, 1 - 1 / 3, 0.4, id="some without a grade"),
    pytest.param([2, 2], SURE[[2, 2]], NAN, NAN, 1.0, 1.0, NAN, 0.0, id="no chance to disagree"),
]
NAMES = ["auroc_macro", "auroc_high", "balanced_accuracy", "f1_macro", "qwk", "ece"]


@pytest.mark.parametrize("grades, probabilities, auroc_macro, auroc_high, balanced_accuracy, f1_macro, qwk, ece", GRADES)
def test_grades(grades, probabilities, auroc_macro, auroc_high, balanced_accuracy, f1_macro, qwk, ece):
    expected = dict(zip(NAMES, (auroc_macro, auroc_high, balanced_accuracy, f1_macro, qwk, ece)))
    rows = table(grades, probabilities)
    found = {name: ev.RISK[name](rows, THREE) for name in NAMES}
    assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(8, 60), st.sampled_from([DDTI, ACR]))
def test_grades_against_sklearn(seed, n, scale):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(len(scale), 0.7), n).round(2)  # rounded: ties
    p[:, 0] += 1 - p.sum(1)
    p = np.abs(p) / np.abs(p).sum(1, keepdims=True)
    y = rng.integers(0, len(scale), n)
    rows, d, high = table(y, p, scale), p.argmax(1), np.asarray(scale.is_high)
    assert ev.f1_macro(rows, scale) == pytest.approx(sk.f1_score(y, d, average="macro"))
    recalls = sk.recall_score(y, d, labels=np.unique(y), average="macro")
    assert ev.balanced_accuracy(rows, scale) == pytest.approx(recalls)
    assert ev.qwk(rows, scale) == pytest.approx(sk.cohen_kappa_score(y, d, weights="quadratic", labels=range(len(scale))))
    if 0 < high[y].sum() < n:
        assert ev.auroc_high(rows, scale) == pytest.approx(sk.roc_auc_score(high[y], p[:, high].sum(1)))
    np.testing.assert_array_equal(ev.confusion(rows, scale), sk.confusion_matrix(y, d, labels=range(len(scale))))


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_a_repeated_row(name):
    rng = np.random.default_rng(3)
    rows = table(rng.integers(0, 3, 30), rng.dirichlet(np.ones(3), 30))
    rows.loc[4, "grade_index"] = pd.NA  # its weight must be dropped with it
    weights = rng.integers(0, 4, (20, 30))
    expected = [ev.RISK[name](rows.iloc[np.repeat(np.arange(30), w)], THREE) for w in weights]
    np.testing.assert_allclose(ev.RISK[name](rows, THREE, weights=weights), expected, atol=1e-12)


def test_no_weight_is_undefined_not_an_error():
    rows = table([0, 1, 2], SURE)
    for name in NAMES:
        assert np.isnan(ev.RISK[name](rows, THREE, weights=np.zeros((1, 3)))).all()


def test_a_decision_taken_elsewhere():
    rows = table([0, 1, 2], SURE[[0, 0, 0]], predicted_index=[0, 1, 2])
    assert ev.qwk(rows, THREE) == 1 and ev.auroc_high(rows, THREE) == 0.5


BAD_TABLES = [
    (lambda t: t.drop(columns="p_b"), "no column p_b"),
    (lambda t: t.assign(p_b=0.9), "sum to 1"),
    (lambda t: t.assign(p_a=-0.5, p_b=1.5, p_c=0.0), "not probabilities"),
    (lambda t: t.assign(grade_index=pd.array([0, 1, 3], "Int64")), "outside 0 to 2"),
    (lambda t: t.assign(grade_index=-1), "outside 0 to 2"),
    (lambda t: t.drop(columns="case_id"), "no column case_id"),
    (lambda t: t.assign(image_id="1"), "'1' occurs twice"),
    (lambda t: t.assign(group=["a", None, "b"]), "group missing in 1 of 3"),
]


@pytest.mark.parametrize("spoil, message", BAD_TABLES)
def test_bad_tables(spoil, message):
    with pytest.raises(ValueError, match=message):
        ev.evaluate(spoil(table([0, 1, 2], SURE, dice=0.5)), THREE, n_boot=10)


@pytest.mark.parametrize("options, message", [({"of": "best"}, "'top' or 'high'"), ({"n_bins": 0}, "n_bins")])
def test_bad_reliability_options(options, message):
    with pytest.raises(ValueError, match=message):
        ev.reliability_curve(table([0, 1, 2], SURE), THREE, **options)


@pytest.fixture(scope="module")
def study():
    rng = np.random.default_rng(0)
    n = 120
    rows = table(rng.integers(0, 3, n), rng.dirichlet(np.ones(3), n), **{m: rng.uniform(0, 1, n) for m in ev.SEGMENTATION})
    rows["case_id"] = [f"case {i // 2}" for i in range(n)]
    rows["group"] = [f"g{i // 4}" for i in range(n)]
    rows.loc[:9, list(ev.SEGMENTATION)] = np.nan
    rows["grade_index"] = rows["grade_index"].mask(np.arange(n) % 10 == 0)
    return rows


def test_evaluate_shape(study):
    metrics = ev.evaluate(study, THREE, n_boot=100)
    assert list(metrics) == ["segmentation", "risk", "images", "cases", "per_case"]
    assert (metrics["images"], metrics["cases"]) == (120, 60)
    for block in (metrics, metrics["per_case"]):
        assert tuple(block["segmentation"]) == ev.SEGMENTATION and list(block["risk"]) == NAMES
        for metric in (block["segmentation"] | block["risk"]).values():
            assert {"value", "low", "high", "n", "cases"} <= set(metric)
            assert metric["low"] < metric["high"]
    assert metrics["segmentation"]["dice"]["n"] == 110 and metrics["segmentation"]["dice"]["cases"] == 55
    assert metrics["risk"]["qwk"]["n"] == 108 and metrics["risk"]["qwk"]["cases"] == 60
    assert metrics["per_case"]["risk"]["qwk"]["n"] == 60 and metrics["per_case"]["segmentation"]["hd95"]["n"] == 55
    assert metrics["risk"]["auroc_macro"]["grades"] == ["a", "b", "c"]


def test_evaluate_is_seeded_and_blind_to_order(study):
    one = ev.evaluate(study, THREE, n_boot=50)
    assert one == ev.evaluate(study, THREE, n_boot=50)
    shuffled = ev.evaluate(study.sample(frac=1, random_state=1), THREE, n_boot=50)
    assert shuffled["risk"]["qwk"]["value"] == pytest.approx(one["risk"]["qwk"]["value"])
    assert shuffled["segmentation"]["dice"]["value"] == pytest.approx(one["segmentation"]["dice"]["value"])


@pytest.mark.parametrize("drop, block", [(ev.probability_columns(THREE), "risk"), (list(ev.SEGMENTATION), "segmentation")])
def test_evaluate_without_one_task(study, drop, block):
    for rows in (study.drop(columns=drop), study.assign(**dict.fromkeys(drop, np.nan))):
        for metrics in (found := ev.evaluate(rows, THREE, n_boot=20), found["per_case"]):
            assert all(m["n"] == 0 and math.isnan(m["value"]) for m in metrics[block].values())
            other = "risk" if block == "segmentation" else "segmentation"
            assert all(m["n"] > 0 for m in metrics[other].values())


def test_one_case_has_no_interval(study):
    metric = ev.evaluate(study[study.case_id == "case 10"], THREE, n_boot=20)["segmentation"]["dice"]
    assert math.isfinite(metric["value"]) and math.isnan(metric["low"]) and metric["cases"] == 1


def test_per_case_means():
    rows = table([0, None, 2, None], TILTED, dice=[0.4, 0.6, NAN, NAN]).assign(case_id=["x", "x", "y", "z"], group=["g", "g", "g", "h"])
    cases = ev.per_case(rows, THREE).set_index("case_id")
    assert cases.loc["x", ["p_a", "p_b", "p_c", "dice"]].tolist() == pytest.approx([0.55, 0.2, 0.25, 0.5])
    assert cases["images"].tolist() == [2, 1, 1] and cases["group"].tolist() == ["g", "g", "h"]
    assert cases["grade_index"].tolist()[:2] == [0, 2] and pd.isna(cases.loc["z", "grade_index"])
    assert math.isnan(cases.loc["y", "dice"])


def test_per_case_grade_is_the_highest():
    rows = table([0, 2, 1], SURE).assign(case_id="x")
    assert ev.per_case(rows, THREE)["grade_index"].tolist() == [2]


def test_reliability_curve_counts():
    curve = ev.reliability_curve(table([0, 1, 2, 0], TILTED), THREE, n_boot=50)
    assert curve["predicted"].tolist() == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert curve["observed"].tolist() == [0, 0, 1, 1] and curve["n"].tolist() == [1, 1, 1, 1]
    high = ev.reliability_curve(table([0, 1, 2, 0], TILTED), THREE, of="high", n_bins=2, n_boot=50)
    assert high["predicted"].tolist() == pytest.approx([0.3, 0.7]) and high["observed"].tolist() == [0, 1]
    sure = ev.reliability_curve(table([0, 1, 2], SURE), THREE, n_boot=50)
    assert sure["n"].tolist() == [3] and sure["bin_high"].tolist() == [1]  # probability 1 is in the last bin


JSON = [
    (NAN, None), (np.float32("inf"), None), (pd.NA, None), (np.int64(3), 3), (np.bool_(True), True), (np.array([1.0, NAN]), [1.0, None]),
    ({"a": (1, {"b"})}, {"a": [1, ["b"]]}), ({4: np.float64(0.5)}, {"4": 0.5}), (pd.Series([1, 2]), [1, 2]), ("Zürich </script>", "Zürich </script>"),
]


@pytest.mark.parametrize("obj, expected", JSON)
def test_write_json(tmp_path, obj, expected):
    path = ev.write_json(tmp_path / "ä b" / "x.json", obj)
    assert json.loads(path.read_text("utf-8")) == expected
    assert os.listdir(path.parent) == ["x.json"]


def test_write_json_leaves_the_old_file(tmp_path, monkeypatch):
    path = ev.write_json(tmp_path / "x.json", {"run": 1})

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DataError, match="No space left.*expected free space"):
        ev.write_json(path, {"run": 2})
    assert json.loads(path.read_text()) == {"run": 1} and os.listdir(tmp_path) == ["x.json"]


@pytest.mark.skipif(os.name == "nt", reason="no permission bits on Windows")
def test_written_files_follow_the_umask(tmp_path):
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try: paths = ev.write_json(tmp_path / f"{umask}.json", {}), ev.write_text(tmp_path / f"{umask}.html", "")
        finally: os.umask(before)
        assert [path.stat().st_mode & 0o777 for path in paths] == [0o666 & ~umask] * 2


def test_four_hundred_images_take_seconds(study):
    ids = ["image_id", "case_id", "group"]
    rows = pd.concat([study.assign(**{c: f"{k} " + study[c] for c in ids}) for k in range(4)])
    start = time.perf_counter()
    ev.evaluate(rows, THREE, n_boot=1000)
    assert time.perf_counter() - start < 10  # about 1 s on an idle core


def test_ece_bins():
    for n_bins, expected in ((1, 0.05), (10, 0.4)):  # one bin: accuracy 0.5 against a mean confidence of 0.55
        assert partial(ev.ece, n_bins=n_bins)(table([0, 1, 2, 0], TILTED), THREE) == pytest.approx(expected)
