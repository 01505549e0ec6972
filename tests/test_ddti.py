"DDTI's quirks one by one on made-up cases, and the counts of the real development part."
import json
import re
import shutil
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thyroid_rlar.ddti import FLAGS, clean_regions, clip_polygon, normal_term, read_case, read_ddti, read_regions, self_intersects
from thyroid_rlar.files import DataError, digest, shared_data
from thyroid_rlar.images import fill_contours
from thyroid_rlar.tirads import DDTI

SHAPE = (50, 64)
SQUARE = [(5, 5), (30, 5), (30, 20), (5, 20)]


def region(points, kind="freehand"):
    return {"points": [{"x": x, "y": y} for x, y in points], "annotation": {}, "regionType": kind}


def write_case(folder, number, marks, grade="4a", text=None):
    body = "".join(f"<mark><image>{k}</image><svg>{svg if isinstance(svg, str) else json.dumps(svg)}</svg></mark>" for k, svg in marks)
    xml = f"<case><number>{number}</number><tirads>{grade}</tirads>{body}</case>"
    (folder / f"{number}.xml").write_text(xml if text is None else text(xml))


def write_image(folder, name, level=90, colour=None):
    Image.new("RGB", SHAPE[::-1], colour or (level, level, level)).save(folder / name, quality=95)


def read_one(folder, **case):
    "The row of a case of one image."
    write_image(folder, "1_1.jpg")
    write_case(folder, 1, **case)
    return read_ddti(folder, verbose=False).rows.iloc[0]


# ---- contours -------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 49)), min_size=3, max_size=6), min_size=1, max_size=4), st.data())
def test_a_cut_anywhere_keeps_exactly_the_whole_regions(shapes, data):
    regions = [region(points) for points in shapes]
    text = json.dumps(regions)
    ends = [text.index(json.dumps(r), sum(len(json.dumps(q)) + 2 for q in regions[:i]) + 1) + len(json.dumps(r)) for i, r in enumerate(regions)]
    points_end = [end - len(json.dumps(r)) + json.dumps(r).index("]") + 1 for end, r in zip(ends, regions)]
    at = data.draw(st.integers(1, len(text)))
    found, cut = read_regions(text[:at])
    assert cut == (at < len(text))
    assert [r["points"] for r in found] == [r["points"] for r, end in zip(regions, points_end) if end <= at]


@pytest.mark.parametrize("text, cut", [("", False), ("[]", False), (" [ ] ", False), ("[", True), ("x", True), ("{}", True), ("null", True),
                                       ('[{"points": [', True), ("[" * 100_000, True)])
def test_odd_texts(text, cut):
    assert read_regions(text) == ([], cut)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='[]{}",:0123456789.points xy-eINa', max_size=60))
def test_no_text_crashes(text):
    regions, _ = read_regions("[" + text)
    contours, flags = clean_regions(regions, SHAPE)
    assert flags <= set(FLAGS) and (contours is None) == ("no_contour" in flags)


@pytest.mark.parametrize("bad", [None, 3, "x", [], {}, {"points": None}, {"points": [1, 2, 3]}, {"points": [{"x": 1}] * 3},
                                 *({"points": [{"x": x, "y": 1}] * 3} for x in ("a", float("nan"), 10 ** 400))],
                         ids=lambda bad: repr(bad)[:40])
def test_bad_regions_are_flagged_and_the_good_ones_kept(bad):
    contours, flags = clean_regions([bad, region(SQUARE)], SHAPE)
    assert contours == [SQUARE] and flags == {"contour_bad"}


@pytest.mark.parametrize("regions, n, flags", [
    ([], None, {"no_contour"}),
    ([region(SQUARE)], 1, set()),
    ([region(SQUARE)] * 4, 1, {"contour_repeated"}),
    ([region([(1, 1), (9, 9)], "arrow")], None, {"arrow", "no_contour"}),
    ([region([(1, 1), (9, 9), (1, 1)]), region(SQUARE)], 1, {"arrow"}),
    ([region([(0, 0), (20, 20), (20, 0), (0, 20)])], 1, {"self_intersecting"}),
    ([region([(40, 30), (63, 30), (63, 49), (40, 49)])], 1, set()),             # the last row and column are inside
    ([region([(40, 30), (64, 30), (60, 45)])], 1, {"outside"}),
    ([region([(40, 30), (50, 30), (50, 60)])], 1, {"outside"}),
    ([region([(-1, 30), (50, 30), (50, 40)])], 1, {"outside"}),
    ([region([(400, 300), (500, 300), (500, 400)])], None, {"outside", "no_contour"})])
def test_cleaning(regions, n, flags):
    contours, found = clean_regions(regions, SHAPE)
    assert (contours and len(contours)) == n and found == flags


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-40, 100), st.integers(-40, 90)), min_size=3, max_size=10), st.integers(0, 9))
def test_clipping_changes_no_pixel_and_leaves_no_point_outside(points, seed):
    points = (points + np.random.default_rng(seed).uniform(.1, .9, (len(points), 2))).tolist()  # no edge through a pixel's centre
    clipped = clip_polygon(points, SHAPE)
    assert all(0 <= x < SHAPE[1] and 0 <= y < SHAPE[0] for x, y in clipped)
    whole = fill_contours([points], SHAPE)
    cut = fill_contours([clipped], SHAPE) if len(clipped) >= 3 else np.zeros(SHAPE, bool)
    assert (whole == cut).all()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=4, max_size=7))
def test_self_intersection_against_the_definition(points):
    def turn(a, b, c): return np.sign((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))
    edges = list(zip(points, points[1:] + points[:1]))
    crossing = any(turn(*e, f[0]) * turn(*e, f[1]) < 0 and turn(*f, e[0]) * turn(*f, e[1]) < 0 for e in edges for f in edges)
    assert self_intersects(points) == crossing


def test_even_odd_would_erase_what_we_keep():
    contours, _ = clean_regions([region(SQUARE)] * 2 + [region([(x + 5, y + 5) for x, y in SQUARE])], SHAPE)
    assert fill_contours(contours, SHAPE).sum() == 2 * 25 * 15 - 20 * 10


# ---- cases ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("printed, index", [("2", 0), ("3", 1), ("4a", 2), ("4b", 3), ("4c", 4), ("5", 5),
                                            ("4A", 2), (" 5 ", 5), ("", None), ("  ", None)])
def test_the_label_path(tmp_path, printed, index):
    row = read_one(tmp_path, marks=[(1, [region(SQUARE)])], grade=printed)
    assert (None if pd.isna(row["grade_index"]) else row["grade_index"]) == index
    assert ("no_grade" in row["flags"]) == (index is None) == (row["grade"] is None)


@pytest.mark.parametrize("printed", ["6", "1", "4", "4d", "TR4", "-1", "5.5"])
def test_a_grade_off_the_scale_stops_the_reading(tmp_path, printed):
    with pytest.raises(DataError, match=rf"1.xml: tirads: found '{re.escape(printed)}', expected blank or one of 2, 3, 4a, 4b, 4c, 5"):
        read_one(tmp_path, marks=[], grade=printed)


BOMB = '<!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'

@pytest.mark.parametrize("damage", [lambda t: t[:40], lambda t: t[:-9], lambda t: "", lambda t: "no xml", lambda t: BOMB + t,
                                    lambda t: OUTSIDE + t, lambda t: t.replace("4a", "&b;"),
                                    lambda t: '<?xml version="1.0" encoding="klingon"?>' + t],
                         ids=["cut mid-tag", "no end", "empty", "text", "bomb", "outside entity", "unknown entity", "encoding"])
def test_xml_that_cannot_be_read_keeps_the_image(tmp_path, damage):
    row = read_one(tmp_path, marks=[(1, [region(SQUARE)])], text=damage)
    assert set(row["flags"]) == {"xml_bad", "no_contour", "no_grade"} and row["contours"] is None and row["grade"] is None


def test_xml_of_other_content(tmp_path):
    row = read_one(tmp_path, marks=[], text=lambda t: "<html><body/></html>")
    assert set(row["flags"]) == {"number_differs", "no_mark", "no_contour", "no_grade"}


def test_marks_are_matched_by_number(tmp_path):
    other = [(x + 10, y + 10) for x, y in SQUARE]
    for k in (2, 3): write_image(tmp_path, f"8_{k}.jpg", 40 * k)
    write_case(tmp_path, 8, [(3, [region(other)]), (2, [region(SQUARE)])])
    rows = read_ddti(tmp_path, verbose=False).rows.set_index("image_id")
    assert rows["contours"]["8_2"] == [SQUARE] and rows["contours"]["8_3"] == [other]
    assert all(set(f) == {"index_gap", "marks_unordered"} for f in rows["flags"])


def test_marks_twice_and_marks_missing(tmp_path):
    other = [(x + 10, y + 10) for x, y in SQUARE]
    for k in (1, 2): write_image(tmp_path, f"8_{k}.jpg", 40 * k)
    write_case(tmp_path, 8, [(1, [region(SQUARE)]), (1, [region(other)]), ("x", ""), ("", "")])
    manifest = read_ddti(tmp_path, verbose=False)
    rows = manifest.rows.set_index("image_id")
    assert rows["n_contours"].tolist() == [2, 0]
    assert "mark_repeated" in rows["flags"]["8_1"] and {"no_mark", "no_contour"} <= set(rows["flags"]["8_2"])
    assert manifest.left_out.values.tolist() == [["8_x", "mark without image file"], ["8_?", "mark without image file"]]


def test_nothing_is_dropped_in_silence(tmp_path, capsys):
    for name in ("1_1.jpg", "2_1.JPG", "notes_1.jpg"): write_image(tmp_path, name, 10 * len(name))
    write_case(tmp_path, 1, [(1, ""), (2, "")])
    write_case(tmp_path, 3, [])
    (tmp_path / "4_1.jpg").write_bytes(b"")
    (tmp_path / "readme.xml").write_text("<a/>")
    manifest = read_ddti(tmp_path)
    said = capsys.readouterr().out
    assert set(manifest.left_out["name"]) == {"1_2", "3.xml", "4_1.jpg", "notes_1.jpg", "readme.xml"}
    assert "kept 2 images of 2 cases" in said and "left out 5" in said and "content: an empty file 1" in said
    assert {"no_xml", "no_grade"} <= set(manifest.rows.set_index("image_id")["flags"]["2_1"])


def test_identical_files_share_a_group(tmp_path):
    for name in ("1_1.jpg", "2_1.jpg", "2_2.jpg", "3_1.jpg"): write_image(tmp_path, name, 10 * int(name[0]) + 60 * int(name[2]))
    shutil.copy(tmp_path / "1_1.jpg", tmp_path / "2_1.jpg")
    shutil.copy(tmp_path / "2_2.jpg", tmp_path / "3_1.jpg")
    write_image(tmp_path, "4_1.jpg", 250)
    rows = read_ddti(tmp_path, verbose=False).rows.set_index("image_id")
    assert rows["group"].to_dict() == {"1_1": "1", "2_1": "1", "2_2": "1", "3_1": "1", "4_1": "4"}
    assert [("same_bytes" in f) for f in rows["flags"]] == [True] * 4 + [False]


@pytest.mark.parametrize("name", ["with blank", "ñandú é 日本"])
def test_any_folder_name(tmp_path, name):
    (tmp_path / name).mkdir()
    assert read_one(tmp_path / name, marks=[(1, [region(SQUARE)])])["n_contours"] == 1


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "in").mkdir()
    write_image(tmp_path, "secret.jpg")
    (tmp_path / "in" / "9_1.jpg").symlink_to(tmp_path / "secret.jpg")
    write_image(tmp_path / "in", "1_1.jpg")
    assert read_ddti(tmp_path / "in", verbose=False).left_out["name"].tolist() == ["9_1.jpg"]


@pytest.mark.parametrize("make", [lambda f: None, lambda f: (f / "1.xml").write_text("<case/>"), lambda f: (f / "1_1.jpg").write_bytes(b"")])
def test_hopeless_folders(tmp_path, make):
    make(tmp_path)
    with pytest.raises(DataError, match="expected files N_k.jpg"): read_ddti(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="folder"): read_ddti(tmp_path / "none")


@pytest.mark.parametrize("text, term", [
    ("ill defined", "ill defined"), ("ill- defined", "ill defined"), ("Ill-defined ", "ill defined"), ("non", "none"), ("", None), (None, None),
    ("microcalcification", "microcalcifications"), ("macrocalcifications", "macrocalcifications"), ("dense", "dense"),
    ("marked hypoechogenicity", "marked hypoechogenicity"), ("something new", "something new")])
def test_spelling(text, term):
    assert normal_term(text) == term


# ---- the real set ---------------------------------------------------------------------------------------------------

FOLDER = shared_data("ddti")
real = pytest.mark.skipif(FOLDER is None or len(list(FOLDER.glob("*.xml"))) != 317,
                          reason="the 317 development cases of DDTI are not in ../shared/data/ddti")


@pytest.fixture(scope="module")
def ddti():
    start = time.process_time()
    manifest = read_ddti(FOLDER, verbose=False)
    manifest.seconds = time.process_time() - start
    return manifest


def ids(manifest, flag): return set(manifest.rows["image_id"][manifest.rows["flags"].map(lambda f: flag in f)])


@real
def test_real_counts(ddti):
    rows = ddti.rows
    assert ddti.summary() == {"kept": 405, "left_out": {}, "flagged": dict(
        arrow=4, colour=22, contour_cut=8, contour_repeated=5, index_gap=1, marks_unordered=99, no_contour=5, no_grade=131, outside=1,
        same_bytes=15, self_intersecting=59)}
    assert (rows["case_id"].nunique(), rows["group"].nunique(), int(rows["contours"].notna().sum())) == (317, 312, 400)
    assert ddti.seconds < 6        # below 2 s alone on a machine


@real
def test_real_labels_agree_with_the_text_of_the_files(ddti):
    for row in ddti.rows.itertuples():
        printed = re.search(r"<tirads>(.*?)</tirads>", (FOLDER / f"{row.case_id}.xml").read_text()).group(1)
        assert (printed or None) == row.grade == (None if pd.isna(row.grade_index) else DDTI.grades[row.grade_index])
    cases = ddti.rows.drop_duplicates("case_id")["grade"]
    assert cases.value_counts().to_dict() == {"2": 31, "3": 11, "4a": 63, "4b": 54, "4c": 43, "5": 23} and cases.isna().sum() == 92


@real
def test_real_cut_files_keep_their_whole_regions(ddti):
    kept = ddti.rows.set_index("image_id")["n_contours"]
    assert {i: int(kept[i]) for i in ids(ddti, "contour_cut")} == {
        "54_1": 1, "127_1": 2, "165_1": 1, "166_1": 1, "176_1": 1, "197_1": 2, "203_1": 1, "205_1": 2}


@real
def test_real_identical_files(ddti):
    rows = ddti.rows
    digests = pd.Series([digest(FOLDER / f) for f in rows["image"]])
    sets = {frozenset(g) for _, g in rows["image_id"].groupby(digests) if len(g) > 1}
    assert {" ".join(sorted(s)) for s in sets} == {
        "150_1 233_2 323_1 326_1 349_1", "353_2 396_1", "1_1 1_2", "92_3 92_4", "213_1 213_2", "230_1 230_2"}
    assert set().union(*sets) == ids(ddti, "same_bytes")
    assert (rows.groupby(digests)["group"].nunique() == 1).all() and (rows.groupby("case_id")["group"].nunique() == 1).all()


@real
def test_real_contours(ddti):
    contours = ddti.rows["contours"].dropna()
    assert sum(map(len, contours)) == 552 and sum(self_intersects(p) for c in contours for p in c) == 63
    assert all(0 <= x < 560 and 0 <= y < 360 for c in contours for p in c for x, y in p)
    assert ids(ddti, "outside") == {"338_2"} and ids(ddti, "index_gap") == {"114_2"}
    assert ids(ddti, "arrow") == {"337_3", "358_1", "378_1", "384_1"}
    assert all(len(set(map(tuple, c))) == len(c) for c in contours)


@real
def test_real_images_load(ddti):
    for i in range(0, len(ddti), 40):
        image, mask = ddti.load(i)
        assert image.shape == (360, 560) and (mask is None) == (ddti.rows["contours"][i] is None)


@real
def test_real_xml_is_read_whole(ddti):
    cases = [read_case(path) for path in FOLDER.glob("*.xml")]
    assert not any(case.flags - {"marks_unordered"} for case in cases) and sum(len(case.svgs) for case in cases) == 405
