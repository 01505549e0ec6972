"Readings in hostile files, kappas against scikit-learn, and properties of the simulated readers."
import shutil
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import cohen_kappa_score

from thyroid_rlar import readers
from thyroid_rlar.files import DataError, resolve, shared_data
from thyroid_rlar.readers import (
    CODES,
    ITEMS,
    agreement,
    check_readings,
    cohen_kappa,
    confusion_counts,
    confusion_rates,
    disagree,
    expected_dice,
    fleiss_kappa,
    load_reader_confusion,
    noisy_grades,
    noisy_mask,
    ordinal_confusion,
    perturb_contour,
    perturb_grades,
    read_readings,
    reader_confusion,
    write_reader_confusion,
)
from thyroid_rlar.tirads import ACR, DDTI, POINTS, Descriptors

FOLDER = shared_data("readers")
needs_readings = pytest.mark.skipif(FOLDER is None, reason="the eight readers' csvs are not here (THYROID_RLAR_DATA or ../shared/data)")


# --- the files -------------------------------------------------------------------------------------------------------------------

HEADER = ("Case ID,Nodule number,Size (cm),Reader COMPOSITION,Reader ECHOGENICITY,Reader SHAPE,Reader Margins,Reader No echogenic foci,"
          "Reader Large comet tail foci,Reader Macrocalcification,Reader peripheral calcifications,Foci: punctate echogenic foci,"
          "TIRADS points,Reader TIRADS grade,Reader TIRADS rec,TIRADS computed points")
GOLD = ("Case ID,Nodule number,Size (cm),GS COMPOSITION,GS ECHOGENICITY,GS SHAPE,GS MARGINS,GS NoECHOGENIC FOC,GS LARGE COMET-TAIL ARTIFACTS ,"
        "GS MACROCALCIFICATION,GS PERIPHERAL CALCIFICATIONS,GS PUNCTATE Echogenic Foci ,TIRADS points,Reader TIRADS grade,Reader TIRADS rec")
ROWS = ["1,a,1.2,2,2,0,2,0,0,0,0,1,9,5,1", "2,b_1,2.4,1,1,0,0,1,0,0,0,0,2,2,0", "3,b_2,2.6,0,2,3,0,0,0,1,0,0,0,1,0"]


def write_folder(folder, gold=GOLD, header=HEADER, rows=ROWS, bom=b"", newline="\n"):
    "Two readers and the consensus, made up."
    for name, head, extra in (("consensus", gold, ""), ("reader_1", header, ",0"), ("reader_2", header, ",0")):
        (folder / f"{name}.csv").write_bytes(bom + newline.join([head, *(r + extra for r in rows)]).encode() + newline.encode())
    return folder


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_byte_order_marks_line_ends_and_spaces(tmp_path, bom, newline):
    folder = tmp_path / "Leserinnen und Ärzte"
    folder.mkdir()
    r = read_readings(write_folder(folder, header=HEADER.replace(",", " ,  "), bom=bom, newline=newline))
    assert r["reader"].tolist() == ["consensus"] * 3 + ["reader_1"] * 3 + ["reader_2"] * 3
    assert r.loc[0, ["composition", "margin", "foci", "points", "level"]].tolist() == [
        "solid", "lobulated or irregular", frozenset({"punctate"}), 9, "TR5"]
    assert r["nodule"].tolist()[:3] == ["a", "b_1", "b_2"] and check_readings(r).empty


def test_check_finds_wrong_points_level_and_advice(tmp_path):
    rows = ["1,a,1.2,2,2,0,2,0,0,0,0,1,8,5,1", "2,b,2.4,1,1,0,0,1,0,0,0,0,2,3,0", "3,c,2.6,2,1,0,0,1,0,0,0,0,3,3,0",
            "4,d,2.4,2,1,0,0,1,0,0,0,0,3,3,0"]  # wrong points, level, advice; the last is right
    differ = check_readings(read_readings(write_folder(tmp_path, rows=rows)))
    assert differ.loc[differ["reader"] == "reader_1", "case"].tolist() == [1, 2, 3]


def test_odd_foci_are_flagged_and_kept(tmp_path):
    rows = ["1,a,1,2,2,0,2,1,0,0,0,1,9,5,1", "2,b,1,2,2,0,2,0,0,0,0,0,6,4,0", "3,c,1,2,2,0,2,1,1,0,0,0,6,4,0"]
    r = read_readings(write_folder(tmp_path, rows=rows)).iloc[:3]
    assert r["flags"].tolist() == [("none beside foci",), ("foci left blank",), ()]
    assert r["foci"].tolist() == [{"punctate"}, {"none"}, {"comet-tail"}] and check_readings(r).empty


@pytest.mark.parametrize("change,field", [
    (dict(header=HEADER.replace("Reader SHAPE", "Reader form")), "shape"),
    (dict(header=HEADER.replace("TIRADS computed points", "GS SHAPE")), "shape"),
    (dict(header=HEADER.replace(",TIRADS computed points", "")), "columns"),
    (dict(rows=[ROWS[0].replace(",2,2,0", ",2,7,0"), *ROWS[1:]]), "echogenicity, row 2"),
    (dict(rows=[*ROWS[:2], ROWS[2].replace("2.6", "big")]), "size_cm, row 4"),
    (dict(rows=[*ROWS[:2], ROWS[2].replace("2.6", "")]), "size_cm, row 4"),
    (dict(rows=[*ROWS[:2], "3,b_2,2.6,0,2,3,0,0,0,1,0,0,0,6,0"]), "level, row 4"),
])
def test_errors_name_file_field_found_expected(tmp_path, change, field):
    with pytest.raises(DataError) as e: read_readings(write_folder(tmp_path, **change))
    assert ".csv" in str(e.value.file) and e.value.field == field and e.value.expected


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00garbage\x80", b'a,b\n"1,2\n'], ids=["empty", "not text", "cut"])
def test_broken_file(tmp_path, content):
    (write_folder(tmp_path) / "reader_2.csv").write_bytes(content)
    with pytest.raises(DataError, match="reader_2.csv"): read_readings(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="found 0 files, expected two or more"): read_readings(tmp_path)
    (write_folder(tmp_path) / "consensus.csv").unlink()
    with pytest.raises(DataError, match="consensus.csv"): read_readings(tmp_path)


def test_readers_of_different_nodules(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "reader_1.csv"
    path.write_text(path.read_text().replace("b_1", "zz"))
    with pytest.raises(DataError, match=r"reader_1\.csv: nodule, size_cm"): read_readings(tmp_path)


# --- the real readings -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def readings():
    return read_readings(FOLDER)


@needs_readings
def test_all_891_readings_agree_with_the_calculator(readings):
    assert len(readings) == 9 * 99
    differ = check_readings(readings)
    assert set(zip(differ["reader"], differ["case"])) == set()


@needs_readings
def test_kappas_against_scikit_learn(readings):
    table = agreement(readings)
    for item in ITEMS:
        columns = readers.ratings(readings, item).drop(columns="consensus").to_numpy().T
        for weights, name in ((None, "kappa"), ("quadratic", "quadratic")):
            expected = np.mean([cohen_kappa_score(a, b, weights=weights, labels=range(len(ITEMS[item]))) for a, b in combinations(columns, 2)])
            assert table.loc[item, name] == pytest.approx(expected, abs=1e-12)


@needs_readings
def test_shipped_table_is_current(readings, tmp_path):
    written = write_reader_confusion(out=tmp_path / "again.csv")
    assert written.read_bytes() == resolve("data/reader_confusion.csv").read_bytes()


@needs_readings
def test_copy_of_the_folder_reads_the_same(readings, tmp_path):
    copy = shutil.copytree(FOLDER, tmp_path / "copy")
    assert read_readings(copy).equals(readings)


# --- the shipped table ------------------------------------------------------------------------------------------------------------

def test_shipped_table_holds_counts_only():
    table = load_reader_confusion()
    assert list(table.columns) == ["reader", "item", "consensus", "given", "count"]
    assert table["reader"].nunique() == 8 and (table.groupby(["reader", "item"])["count"].sum() == 99).all()
    assert not table.duplicated(["reader", "item", "consensus", "given"]).any()
    for item in ITEMS:
        assert (sum(confusion_counts(table, item, r) for r in table["reader"].unique()) == confusion_counts(table, item)).all()
    with pytest.raises(ValueError, match="allowed are composition"): confusion_counts(table, "colour")
    with pytest.raises(ValueError, match="allowed are reader_1"): confusion_counts(table, "level", "reader_9")


@pytest.mark.parametrize("row,match", [("r,colour,TR1,TR1,1", "item, row 2"), ("r,level,TR1,TR9,1", "level, row 2"),
                                       ("r,level,TR1,TR1,0", "count, row 2"),
                                       ("r,level,TR1,TR1,1.5", "count, row 2"), ("r,level,TR1,TR1,", "count, row 2")])
def test_load_names_the_wrong_cell(tmp_path, row, match):
    path = tmp_path / "c.csv"
    path.write_text(f"reader,item,consensus,given,count\n{row}\n")
    with pytest.raises(DataError, match=match): load_reader_confusion(path)


def test_load_missing_file_or_column(tmp_path):
    with pytest.raises(DataError, match="nothing.csv"): load_reader_confusion(tmp_path / "nothing.csv")
    (tmp_path / "c.csv").write_text("reader,item\n")
    with pytest.raises(DataError, match="columns"): load_reader_confusion(tmp_path / "c.csv")


def test_confusion_of_made_up_readings(tmp_path):
    r = read_readings(write_folder(tmp_path))
    r.loc[(r["reader"] == "reader_2") & (r["case"] == 1), "level"] = "TR3"
    counts = confusion_counts(reader_confusion(r), "level", "reader_2")
    assert counts[4, 2] == 1 and counts.sum() == 3 and confusion_counts(reader_confusion(r), "level", "reader_1").trace() == 3


# --- agreement --------------------------------------------------------------------------------------------------------------------

@given(st.integers(2, 6), st.integers(0, 2 ** 32 - 1), st.booleans())
@settings(deadline=None, max_examples=40)
def test_cohen_kappa_properties(k, seed, quadratic):
    joint = np.random.default_rng(seed).integers(0, 20, (k, k)) + np.eye(k, dtype=int)
    value = cohen_kappa(joint, quadratic)
    a, b = np.repeat(np.indices((k, k)).reshape(2, -1), joint.ravel(), axis=1)
    assert value == pytest.approx(cohen_kappa_score(a, b, weights="quadratic" if quadratic else None, labels=range(k)), abs=1e-9)
    assert cohen_kappa(joint.T, quadratic) == pytest.approx(value) and cohen_kappa(joint * 7, quadratic) == pytest.approx(value)


def test_fleiss_published_example():
    "Fleiss 1971 as worked out on Wikipedia: 10 subjects, 14 raters, 5 categories, kappa 0.210."
    counts = np.array([[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0], [3, 2, 6, 3, 0],
                       [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]])
    ratings = np.array([np.repeat(range(5), row) for row in counts])
    assert fleiss_kappa(ratings) == pytest.approx(0.210, abs=5e-4)


# --- simulated grades -------------------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(0, 50), min_size=2, max_size=7).filter(lambda p: sum(x > 0 for x in p) > 1), st.floats(0, 1))
@settings(deadline=None, max_examples=120)
def test_ordinal_confusion_reaches_kappa_and_keeps_the_shares(prior, kappa):
    p = np.array(prior) / sum(prior)
    c = ordinal_confusion(prior, kappa)
    assert c.shape == (len(p),) * 2 and (c >= 0).all()
    np.testing.assert_allclose(c.sum(1), 1, atol=1e-9)
    np.testing.assert_allclose(p @ c, p, atol=1e-6)
    assert cohen_kappa(p[:, None] * c, quadratic=True) == pytest.approx(kappa, abs=1e-5)
    unused = p == 0
    assert (c[~unused][:, unused] == 0).all() and (c[unused] == np.eye(len(p))[unused]).all()


@given(st.floats(.05, .95))
@settings(deadline=None, max_examples=20)
def test_far_grades_are_confused_less(kappa):
    "Odds of confusing i and j, against both read right, depend on the distance alone and fall with it."
    c = ordinal_confusion([.1, .3, .05, .25, .2, .1], kappa)
    odds = c * c.T / np.outer(np.diag(c), np.diag(c))
    by_distance = [np.diag(odds, k) for k in range(6)]
    for same in by_distance: np.testing.assert_allclose(same, same[0], rtol=1e-6)
    assert (np.diff([same[0] for same in by_distance]) < 0).all()


@pytest.mark.parametrize("prior,kappa", [([1, 1], -.1), ([1, 1], 1.1), ([1, 1], float("nan")), ([5, 0, 0], .5), ([1, -1, 2], .5),
                                         ([float("nan"), 1], .5), ([[1, 1]], .5), ([], .5)])
def test_ordinal_confusion_bad_input(prior, kappa):
    with pytest.raises(ValueError, match="prior|kappa"): ordinal_confusion(prior, kappa)


@pytest.mark.parametrize("dtype", ["Int64", float])
def test_missing_grades_stay_missing(dtype):
    index = pd.Series([None, 0, 5, None, 2], dtype=dtype, index=list("abcde"))
    new = perturb_grades(index, np.random.default_rng(0), np.roll(np.eye(6), 1, axis=1))
    assert new.dtype == "Int64" and new.index.equals(index.index)
    assert new.isna().tolist() == [True, False, False, True, False] and new.dropna().tolist() == [1, 0, 3]


def test_noisy_grades_does_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(3)
    cases = pd.Series([f"c{i // 3}" for i in range(300)])
    grades = pd.Series(np.repeat(rng.integers(0, 5, 100), 3), dtype="Int64")
    grades[7:9] = pd.NA
    noisy, order = noisy_grades(grades, ACR, .5, 9, cases), rng.permutation(300)
    assert noisy_grades(grades[order], ACR, .5, 9, cases[order]).sort_index().equals(noisy)
    assert noisy.groupby(cases.to_numpy()).nunique().max() == 1 and (noisy != grades).fillna(False).mean() > .2


def test_more_noise_is_less_agreement():
    grades = pd.Series(np.random.default_rng(0).choice(6, 3000, p=[.12, .05, .25, .2, .13, .25]), dtype="Int64")
    kappas = [cohen_kappa_score(grades, noisy_grades(grades, DDTI, n, 0), weights="quadratic") for n in (0, .2, .5, .8, 1)]
    np.testing.assert_allclose(kappas, [1, .8, .5, .2, 0], atol=.04)


def test_noisy_grades_bad_input():
    for noise in (-.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="grade_noise"): noisy_grades(pd.Series([0, 1], dtype="Int64"), ACR, noise, 0)
    with pytest.raises(ValueError, match="at least two"): noisy_grades(pd.Series([2, 2], dtype="Int64"), ACR, .5, 0)
    empty = pd.Series([pd.NA, pd.NA], dtype="Int64")
    assert noisy_grades(empty, ACR, .5, 0).isna().all()


# --- simulated contours -----------------------------------------------------------------------------------------------------------

def ellipse(shape, centre, a, b):
    y, x = np.indices(shape) - np.array(centre)[:, None, None]
    return np.hypot(x / a, y / b) < 1


SHAPES = {"round": ellipse((120, 140), (60, 70), 30, 30), "thin": ellipse((120, 140), (60, 70), 55, 7),
          "at the border": ellipse((120, 140), (115, 5), 40, 30),
          "two panes": ellipse((120, 300), (60, 70), 40, 25) | ellipse((120, 300), (60, 220), 30, 35), "one pixel": ellipse((9, 9), (4, 4), .5, .5),
          "everything": np.ones((60, 50), bool)}


@pytest.mark.parametrize("mask", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("amount", [.05, .2, .5, 1.])
def test_contour_stays_a_nodule(mask, amount):
    regions = ndimage.label(mask)[1]
    for seed in range(5):
        new = perturb_contour(mask, amount, np.random.default_rng(seed))
        assert new.shape == mask.shape and new.dtype == bool and new.any()
        labels, n = ndimage.label(new)
        assert n <= regions  # no splinters (two regions may meet)
        assert (new & mask).any()
        if regions == 1:  # the place furthest from the border is kept, and there is no hole
            depth = ndimage.distance_transform_edt(np.pad(mask, 2, mode="edge"))[2:-2, 2:-2]
            assert new[depth == depth.max()].any() and (ndimage.binary_fill_holes(new) == new).all()


def test_nothing_changes_without_noise_and_input_is_left_alone():
    for mask in (*SHAPES.values(), np.zeros((5, 6), bool)):
        before = mask.copy()
        assert (perturb_contour(mask, 0, np.random.default_rng(0)) == mask).all()
        perturb_contour(mask, .3, np.random.default_rng(0))
        assert (mask == before).all()
    assert not perturb_contour(np.zeros((5, 6), bool), .3, np.random.default_rng(0)).any()


def test_image_edge_is_not_a_border():
    assert perturb_contour(np.ones((60, 50), bool), .3, np.random.default_rng(0)).all()


@given(st.floats(.02, .2), st.integers(15, 45), st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_dice_is_what_the_amount_says(amount, radius, seed):
    mask = ellipse((160, 160), (80, 80), radius, radius)
    news = [perturb_contour(mask, amount, np.random.default_rng([seed, i])) for i in range(25)]
    dice = np.mean([2 * (mask & n).sum() / (mask.sum() + n.sum()) for n in news])
    assert dice == pytest.approx(expected_dice(amount), abs=.01 + .15 * amount)


def test_noise_does_not_depend_on_image_resolution():
    "The amount is relative to the nodule: the same Dice on the same nodule drawn twice as large."
    dices = []
    for scale in (1, 2):
        mask = ellipse((100 * scale, 120 * scale), (50 * scale, 60 * scale), 40 * scale, 25 * scale)
        news = [perturb_contour(mask, .15, np.random.default_rng(i)) for i in range(40)]
        dices.append(np.mean([2 * (mask & n).sum() / (mask.sum() + n.sum()) for n in news]))
    assert dices[0] == pytest.approx(dices[1], abs=.015)


@pytest.mark.parametrize("amount", [-.1, 1.1, float("nan")])
def test_contour_bad_amount(amount):
    with pytest.raises(ValueError, match="allowed are 0"): noisy_mask(SHAPES["round"], "a", amount, 0)


# --- simulated descriptors --------------------------------------------------------------------------------------------------------

def every_descriptor(rng, n):
    terms = {k: [t for t in v if t != "undetermined"] for k, v in POINTS.items()}
    for _ in range(n):
        foci = [f for f in ("comet-tail", "macro", "rim", "punctate") if rng.random() < .3]
        yield Descriptors(*(rng.choice(terms[k]).item() for k in ("composition", "echogenicity", "shape", "margin")), foci=foci)


def test_disagree_follows_the_counts():
    "Frequencies of what is drawn against the rows of the table, item by item."
    rng, rates, truth = np.random.default_rng(0), confusion_rates(), Descriptors("solid", "hypoechoic", margin="ill-defined", foci={"macro"})
    drawn = [disagree(truth, rng, rates) for _ in range(4000)]
    for name, codes in CODES.items():
        if name == "echogenicity": continue  # anechoic depends on the composition, too: tested below
        freq = [np.mean([POINTS[name][getattr(d, name)] == code for d in drawn]) for code in codes]
        np.testing.assert_allclose(freq, rates[name][list(codes).index(POINTS[name][getattr(truth, name)])], atol=.03)
    for kind in ("comet-tail", "macro", "rim", "punctate"):
        assert np.mean([kind in d.foci for d in drawn]) == pytest.approx(rates[kind][int(kind in truth.foci), 1], abs=.03)


def test_disagree_is_always_a_valid_reading():
    rng, rates = np.random.default_rng(1), confusion_rates()
    for d in every_descriptor(rng, 400):
        other = disagree(d, rng, rates)
        assert other.echogenicity != "anechoic" or other.composition in ("cystic", "spongiform")
    for d in every_descriptor(rng, 50):
        if d.echogenicity != "anechoic": assert disagree(d, rng, rates, amount=0) == d


def test_disagree_amount_scales_the_change():
    truth, rates, shares = Descriptors("solid", "hypoechoic", margin="lobulated"), confusion_rates(), []
    for amount in (0, .3, .6, 1):
        rng = np.random.default_rng(0)
        shares.append(np.mean([disagree(truth, rng, rates, amount).margin != "lobulated" for _ in range(2000)]))
    assert shares[0] == 0
    np.testing.assert_allclose(np.array(shares[1:]) / shares[-1], [.3, .6, 1], atol=.06)
    with pytest.raises(ValueError, match="amount"): disagree(truth, np.random.default_rng(0), rates, 1.5)


def test_rates_of_one_reader_and_unused_labels():
    all_rates = confusion_rates()
    assert all(np.allclose(r.sum(1), 1) for r in all_rates.values())
    assert all_rates["echogenicity"][0].tolist() == [1, 0, 0, 0]  # the consensus never says anechoic
    one = confusion_rates(load_reader_confusion(), "reader_3")
    assert not np.allclose(one["level"], all_rates["level"])
