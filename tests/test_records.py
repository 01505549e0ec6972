"Manifest, decoding and filling under bad input and over random cases."
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thyroid_rlar import files, records
from thyroid_rlar.files import DataError, inside
from thyroid_rlar.images import examine, fill_contours, read_gray, read_mask
from thyroid_rlar.records import Manifest, group_images
from thyroid_rlar.tirads import ACR, DDTI

SQUARE = [(5., 5.), (30., 5.), (30., 20.), (5., 20.)]


@pytest.fixture
def manifest(tmp_path):
    for name in "ab": Image.new("L", (48, 32), 90).save(tmp_path / f"{name}.png")
    rows = pd.DataFrame({"image_id": ["a", "b"], "case_id": ["1", "2"], "group": ["1", "2"], "image": ["a.png", "b.png"],
                         "grade": ["4a", None], "contours": [[SQUARE], None]})
    return Manifest(rows, tmp_path, DDTI, "test")


# ---- decoding -------------------------------------------------------------------------------------------------------

def picture(mode):
    values = np.arange(48 * 32, dtype=np.uint16).reshape(32, 48)
    if mode == "I;16": return Image.fromarray(values * 40)
    return Image.fromarray((values // 8).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("LA", "png"), ("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("I;16", "png"),
                                          ("L", "jpg"), ("RGB", "jpg"), ("CMYK", "jpg"), ("RGB", "bmp"), ("I;16", "tif")])
def test_every_kind_of_picture_is_read_as_grey(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    picture(mode).save(path)
    image = read_gray(path)
    assert image.shape == (32, 48) and image.dtype == np.uint8
    assert int(image[31, 40]) > int(image[0, 8]) + 100
    assert examine(path).shape == (32, 48)


@pytest.mark.parametrize("low, high", [(0, 65535), (100, 500), (7, 8)])
def test_sixteen_bits_are_scaled_by_their_range(tmp_path, low, high):
    Image.fromarray(np.array([[low, high]], np.uint16)).save(tmp_path / "a.png")
    assert read_gray(tmp_path / "a.png").tolist() == [[0, 255]]


def test_a_flat_sixteen_bit_image_is_black(tmp_path):
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(tmp_path / "a.png")
    assert read_gray(tmp_path / "a.png").max() == 0


def png_header(width, height):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_001, 12_000, 60_000])
def test_a_pixel_bomb_is_refused_by_its_header(tmp_path, side):
    (tmp_path / "a.png").write_bytes(png_header(side, side))
    for read in (read_gray, examine):
        with pytest.raises(DataError, match="a.png"): read(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n", png_header(0, 0)])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.dcm"])
def test_what_is_no_image_is_a_data_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for read in (read_gray, examine, read_mask):
        with pytest.raises(DataError, match=name): read(tmp_path / name)


@pytest.mark.parametrize("read", [read_gray, examine, read_mask])
def test_no_file_and_a_folder_are_data_errors(tmp_path, read):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(DataError): read(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_never_raise_anything_else(tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("fuzz") / f"a.{suffix}"
    picture("RGB").save(path)
    good = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=8)): good[at] = data.draw(st.integers(0, 255))
    path.write_bytes(good[:data.draw(st.integers(0, len(good)))])
    for read in (read_gray, examine):
        try: read(path)
        except DataError as e: assert "a." in str(e)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_file_is_found_by_both_readers(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-600])
    for read in (read_gray, examine):
        with pytest.raises(DataError): read(path)


@pytest.mark.parametrize("colour, is_colour", [
    ((90, 90, 90), False), ((92, 90, 88), False), ((88, 92, 88), False), ((90, 30, 90), True), ((200, 180, 20), True)])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_colour_is_noticed(tmp_path, suffix, colour, is_colour):
    im = Image.new("RGB", (200, 100), colour if not is_colour else (90, 90, 90))
    im.paste(colour, (40, 40, 56, 56))
    im.save(tmp_path / f"a.{suffix}")
    assert examine(tmp_path / f"a.{suffix}").colour == is_colour


# ---- paths ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "link/passwd", "file", "a\0b", "loop/x"])
def test_paths_stay_inside(tmp_path, path):
    root = tmp_path / "données é"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    (root / "file").symlink_to("../outside.png")
    (root / "loop").symlink_to("loop")
    if path == "loop/x":    # Python 3.13 resolves a loop as far as it goes, earlier versions refuse it
        try: assert inside(root, path).is_relative_to(root.resolve())
        except DataError: pass
        return
    with pytest.raises(DataError, match="path"): inside(root, path)


def test_a_root_that_is_itself_a_link_is_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to("real")
    assert inside(tmp_path / "root", "a.png") == (tmp_path / "real" / "a.png").resolve()


def test_shared_data_follows_the_variable(tmp_path, monkeypatch):
    (tmp_path / "ddti").mkdir()
    monkeypatch.setenv("THYROID_RLAR_DATA", str(tmp_path))
    assert files.shared_data("ddti") == (tmp_path / "ddti").resolve()
    assert files.shared_data("readers") is None


def test_paths_do_not_depend_on_where_we_are(tmp_path, monkeypatch):
    before = files.resolve("data")
    monkeypatch.chdir(files.project_root() / "nbs")
    assert files.resolve("data") == before
    assert files.resolve(tmp_path) == tmp_path.resolve()


def test_the_checkout_is_this_project_s_and_not_another_s(tmp_path, monkeypatch):
    ours = files.project_root()
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    for lib_name, root in (("another", ours), ("thyroid_rlar_more", ours), ("thyroid_rlar", tmp_path.resolve())):
        (tmp_path / "settings.ini").write_text(f"[DEFAULT]\nrepo = x\nlib_name = {lib_name}\nversion = 1\n")
        assert files.project_root() == root


# ---- contours and masks ---------------------------------------------------------------------------------------------

def winding(polygon, x, y):
    "Winding number by angles: the definition, slow."
    p = np.asarray(polygon, float) - (x, y)
    q = np.roll(p, -1, axis=0)
    return np.arctan2(p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0], (p * q).sum(1)).sum() / (2 * np.pi)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-8, 28), st.integers(-8, 24)), min_size=3, max_size=9), st.integers(0, 9))
def test_filling_agrees_with_the_winding_number(points, seed):
    polygon = points + np.random.default_rng(seed).uniform(.1, .9, (len(points), 2))    # no edge through a pixel's centre
    wanted = [[round(winding(polygon, x, y)) != 0 for x in range(20)] for y in range(16)]
    assert (fill_contours([polygon], (16, 20)) == wanted).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(st.floats(-50, 90), st.floats(-50, 90)), min_size=3, max_size=8), min_size=1, max_size=4))
def test_filling_is_a_union_whatever_the_order_direction_or_repeats(contours):
    filled = fill_contours(contours, (40, 40))
    assert (filled == fill_contours([c[::-1] for c in contours[::-1]], (40, 40))).mean() > .97     # edges through pixel centres may fall either way
    assert (filled == fill_contours(contours * 2, (40, 40))).all()
    assert (filled == np.logical_or.reduce([fill_contours([c], (40, 40)) for c in contours])).all()


def test_area_of_a_circle():
    a = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    area = fill_contours([np.c_[60 + 40.3 * np.cos(a), 60 + 40.3 * np.sin(a)]], (120, 120)).sum()
    assert area == pytest.approx(np.pi * 40.3 ** 2, rel=.01)


@pytest.mark.parametrize("stored, nodule", [
    ([0, 1, 1], [0, 1, 1]), ([0, 255, 0], [0, 1, 0]), ([0, 2, 5], [0, 1, 1]), ([10, 120, 250], [0, 0, 1]), ([0, 0, 0], [0, 0, 0]),
    ([255, 255, 255], [1, 1, 1]), ([0, 128, 255], [0, 1, 1])])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_mask_values(tmp_path, stored, nodule, mode):
    Image.fromarray(np.array([stored], np.uint8)).convert(mode).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", (1, 3)).tolist() == [list(map(bool, nodule))]


def test_mask_of_another_size_is_named(tmp_path, manifest):
    Image.new("L", (48, 31), 255).save(tmp_path / "m.png")
    rows = manifest.rows.assign(contours=None, mask="m.png")
    with pytest.raises(DataError, match=r"m.png: size \(H, W\): found \(31, 48\), expected \(32, 48\)"):
        Manifest(rows, tmp_path, DDTI, "test").load(0)


# ---- groups ---------------------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.one_of(st.none(), st.integers(0, 8))), min_size=1, max_size=20))
def test_groups_are_the_connected_components(pairs):
    cases, keys = [f"c{a}" for a, _ in pairs], [b for _, b in pairs]
    groups = group_images(cases, keys)
    n = len(pairs)
    reach = np.array([[cases[i] == cases[j] or (keys[i] is not None and keys[i] == keys[j]) for j in range(n)] for i in range(n)])
    for _ in range(n): reach = reach @ reach
    assert (np.equal.outer(groups, groups) == reach).all()
    assert all(g in cases for g in groups)


# ---- manifest -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("column, value, said", [
    ("image_id", None, "image_id"), ("image_id", 3, "image_id"), ("image_id", "b", "one row per image and reader"), ("case_id", " ", "case_id"),
    ("group", None, "group"), ("image", "../a.png", "stays in this folder"), ("mask", "/etc/passwd", "stays in this folder"),
    ("grade", "6", "one of 2, 3, 4a, 4b, 4c, 5"), ("grade", "TR4", "one of 2, 3"),
    ("contours", [], "polygons"), ("contours", [[(0., 0.), (1., 1.)]], "polygons"), ("contours", "x", "polygons"),
    *(("contours", [[(0., 0.), (1., bad), (2., 2.)]], "polygons") for bad in (float("nan"), float("inf"), "1", None)),
    ("spacing_mm", 0., "positive"), ("spacing_mm", -1., "positive"), ("spacing_mm", "1 mm", "spacing_mm"),
    ("flags", ["a"], "tuple"), ("flags", ("b", "a"), "sorted"), ("reader_id", None, "reader_id"), ("view", 7, "view")])
def test_a_bad_cell_is_named(manifest, column, value, said):
    rows = manifest.rows.drop(columns="grade_index").astype({"spacing_mm": object})
    rows.at[0, column] = value
    with pytest.raises(DataError, match=said) as e: Manifest(rows, manifest.root, DDTI, "test")
    assert len(str(e.value)) < 600


@pytest.mark.parametrize("column", ["image_id", "case_id", "group", "image"])
def test_a_missing_column_is_named(manifest, column):
    with pytest.raises(DataError, match=column): Manifest(manifest.rows.drop(columns=column), manifest.root, DDTI, "test")


@pytest.mark.parametrize("index", [[3, None], [None, None], [2, 0], [-1, None], [1.5, None]])
def test_index_and_grade_must_agree(manifest, index):
    rows = manifest.rows.assign(grade_index=pd.Series(index, dtype=object))
    with pytest.raises(DataError, match="grade_index"): Manifest(rows, manifest.root, DDTI, "test")


@pytest.mark.parametrize("scale", [DDTI, ACR])
def test_every_grade_gets_its_index(tmp_path, scale):
    names = [str(k) for k in range(len(scale))]
    rows = pd.DataFrame({"image_id": names, "case_id": names, "group": names, "image": "a.png", "grade": scale.grades})
    assert Manifest(rows, tmp_path, scale, "test").rows["grade_index"].tolist() == list(range(len(scale)))


def test_readers_share_image_case_and_group(manifest):
    both = pd.concat([manifest.rows, manifest.rows.assign(reader_id="B", grade=["5", "2"])]).drop(columns="grade_index")
    m = Manifest(both, manifest.root, DDTI, "test")
    assert (len(m), m.summary()["kept"]) == (4, 2)
    for column in ("image", "case_id", "group"):
        wrong = both.assign(**{column: ["1", "2", "2", "2"]})
        with pytest.raises(DataError): Manifest(wrong, manifest.root, DDTI, "test")


def test_select_load_and_the_callers_table(manifest):
    rows = manifest.rows.copy()
    picked = manifest.select([1])
    assert picked.rows["image_id"].tolist() == ["b"] and list(picked.rows.index) == [0]
    assert len(manifest.select([])) == 0 and manifest.select([]).summary()["kept"] == 0
    image, mask = manifest.load(0)
    assert image.dtype == np.uint8 and mask.dtype == bool and mask.sum() == 25 * 15
    assert manifest.load(1)[1] is None
    pd.testing.assert_frame_equal(manifest.rows, rows)


def test_a_mask_outside_the_image_is_no_mask(manifest):
    rows = manifest.rows.copy()
    rows.at[0, "contours"] = [[(x + 500, y) for x, y in SQUARE]]
    assert Manifest(rows, manifest.root, DDTI, "test").load(0)[1] is None


def test_parquet_round_trip(manifest, tmp_path):
    rows = manifest.rows.assign(extra=[1.5, 2.5], flags=pd.Series([("a", "b"), ()]))
    m = Manifest(rows, manifest.root, DDTI, "test", records.left_out_table([("x.png", "why | not")]))
    m.to_parquet(tmp_path / "é.parquet")
    again = Manifest.from_parquet(tmp_path / "é.parquet")
    pd.testing.assert_frame_equal(again.rows, m.rows)
    pd.testing.assert_frame_equal(again.left_out, m.left_out)
    assert (again.scale, again.root, again.source) == (m.scale, m.root, m.source)
    assert Manifest.from_parquet(tmp_path / "é.parquet", root=tmp_path / "b").root == (tmp_path / "b").resolve()
    assert "why \\| not" in m._repr_markdown_()


def test_parquet_trouble_is_a_data_error(manifest, tmp_path):
    with pytest.raises(DataError): Manifest.from_parquet(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError): Manifest.from_parquet(tmp_path / "bad.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError): Manifest.from_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError): manifest.to_parquet(tmp_path / "other.parquet" / "m.parquet")


def test_data_error_survives_worker_processes():
    error = DataError(Path("a.csv"), "grade", "'6'", "one of 2, 3")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a.csv: grade: found '6', expected one of 2, 3"
    assert str(DataError(str(error))) == str(error)
