"The folder source under every kind of bad table, image, mask and path; DICOM in all its photometric ways."
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels import convert_color_space
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage

from thyroid_rlar import folder as module
from thyroid_rlar.files import DataError, inside
from thyroid_rlar.folder import FLAGS, check_mask, dicom_facts, read_folder, read_table
from thyroid_rlar.images import read_gray
from thyroid_rlar.phantom import write_phantoms
from thyroid_rlar.tirads import ACR, DDTI

SHAPE = (40, 60)
MASK = np.zeros(SHAPE, np.uint8)
MASK[10:20, 15:40] = 255
HEAD = "image,case,grade\n"


@pytest.fixture
def folder(tmp_path):
    "Two good images of two cases with masks."
    root = tmp_path / "mes données é"
    for part in ("images", "masks"): (root / part).mkdir(parents=True)
    for k, name in enumerate("ab"):
        save(np.random.default_rng(k).integers(0, 255, SHAPE, dtype=np.uint8), root / f"images/{name}.png")
        save(MASK, root / f"masks/{name}.png")
    table(root, HEAD + "a.png,1,TR4\nb.png,2,TR2\n")
    return root


def save(values, path): Image.fromarray(values).save(path)


def table(root, text): (root / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())


def read(root): return read_folder(root, verbose=False)


def test_a_good_folder(folder):
    m = read(folder)
    assert m.summary() == {"kept": 2, "flagged": {}, "left_out": {}} and m.scale == ACR
    assert m.rows["mask"].tolist() == ["masks/a.png", "masks/b.png"] and m.rows["image"].tolist() == ["images/a.png", "images/b.png"]
    image, mask = m.load(0)
    assert image.shape == SHAPE and (mask == (MASK > 0)).all()


# ---- the table ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    b"\xef\xbb\xbfimage,case,grade\r\na.png,1,TR4\r\nb.png,2,TR2\r\n", b"image,case,grade\ra.png,1,TR4\rb.png,2,TR2",
    b" image , case,grade\n a.png ,1 , tr4\n\n\nb.png,2,TR2\n,,\n",
    b'image,case,grade\n"a.png","1","TR4"\n"b.png","2",TR2\n', b"grade,case,image\nTR4,1,images/a.png\nTR2,2,./images/b.png\n"],
    ids=["BOM and CRLF", "CR", "blanks", "quotes", "other order and paths"])
def test_tables_as_they_come(folder, text):
    table(folder, text)
    rows = read(folder).rows
    assert rows[["image", "grade_index", "case_id"]].values.tolist() == [["images/a.png", 3, "1"], ["images/b.png", 1, "2"]]


@pytest.mark.parametrize("text, said", [
    ("", r"columns: found none, expected image, case, grade \(image is missing\)"), ("image,case\na.png,1\n", r"grade is missing"),
    ("image;case;grade\na.png;1;TR4\n", "found image;case;grade"), (b"\xef\xbb\xbfimage,grade\r\na.png,TR4\r\n", "case is missing"),
    (HEAD, "rows: found none"), (HEAD + "a.png,1\n", "line 2: cells: found 2, expected 3"), (HEAD + "a.png,1,TR4,x\n", "line 2: cells: found 4"),
    ("image,case,grade,grade\na.png,1,TR4,TR4\n", "'grade' 2 times"), ("image,case,grade,flags\na.png,1,TR4,\n", "another name"),
    (HEAD + "a.png,1,TR4\n,2,TR2\n", "line 3: image: found a blank"), (HEAD + "a.png,,TR4\n", "line 2: case: found a blank"),
    (HEAD + "a.png,1,TR4\na.png,1,TR4\n", r"line 3: image: found 'a.png' again \(line 2\)"), (HEAD + "a.png,1,TR4\nimages//a.png,1,TR4\n", "again"),
    (HEAD + 'a.png,1,"TR4\n', "comma-separated table"), (HEAD.encode() + b"\xff\xfe,1,TR4\n", "UTF-8"),
    ((HEAD + "a.png,1,TR4\n").encode("utf-16"), "UTF-8"),
    ("image,case,grade,scale\na.png,1,TR6,acr\n", "line 2: grade: found 'TR6', expected blank or one of TR1, TR2, TR3, TR4, TR5"),
    ("image,case,grade,scale\na.png,1,4a,acr\n", "scale acr"), ("image,case,grade,scale\na.png,1,4a,tirads\n", "one of ddti, acr"),
    ("image,case,grade,scale\na.png,1,TR4,acr\nb.png,1,4a,ddti\n", "never mixed"),
    (HEAD + "a.png,1,TR4\nb.png,1,4a\n", "scale"), (HEAD + "a.png,1,\n", "all blank"),
    *((f"image,case,grade,spacing_mm\na.png,1,TR4,{bad}\n", "line 2: spacing_mm") for bad in ("0", "-1", "x", "inf", "nan mm"))])
def test_a_bad_table_is_an_error_that_says_where(folder, text, said):
    table(folder, text)
    with pytest.raises(DataError, match=f"labels.csv.*{said}"): read(folder)


@pytest.mark.parametrize("grades, scale", [(["TR1", "TR5"], "acr"), (["4a", "2"], "ddti"), (["4c", "5"], "ddti"), (["", "tr2"], "acr")])
def test_the_grades_tell_the_scale(folder, grades, scale):
    table(folder, HEAD + f"a.png,1,{grades[0]}\nb.png,2,{grades[1]}\n")
    assert read(folder).scale.name == scale


def test_a_bare_number_tells_no_scale(folder):
    table(folder, HEAD + "a.png,1,3\nb.png,2,5\n")
    with pytest.raises(DataError, match="scale: found no such column, and grades 3, 5"): read_folder(folder, verbose=False)


def test_one_grade_off_the_others_scale_is_named_with_its_line(folder):
    table(folder, HEAD + "a.png,1,TR4\nb.png,2,TR9\na.png,3,TR5\n")
    with pytest.raises(DataError, match=r"line 3: grade: found 'TR9', expected blank or one of TR1"): read_folder(folder, verbose=False)


def test_a_scale_can_be_asked_for(folder):
    table(folder, HEAD + "a.png,1,\nb.png,2,\n")
    m = read_folder(folder, scale=DDTI, verbose=False)
    assert m.scale == DDTI and m.rows["grade_index"].isna().all() and m.summary()["flagged"] == {"no_grade": 2}
    table(folder, "image,case,grade,scale\na.png,1,TR4,acr\n")
    with pytest.raises(DataError, match="scale: found acr, expected ddti"): read_folder(folder, scale=DDTI)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.text(alphabet='image,case,grade\n\r" \0é', max_size=80).map(lambda text: (HEAD + text).encode())))
def test_no_table_crashes(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "labels.csv"
    path.write_bytes(content)
    try: assert all(set(row) == {"line", "image", "case", "grade"} for row in read_table(path))
    except DataError as e: assert "labels.csv" in str(e)


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(DataError, match=r"labels.csv: found no such file"): read(tmp_path)
    with pytest.raises(DataError, match="folder"): read(tmp_path / "none")


def test_extra_columns_readers_and_groups(folder):
    table(folder, "image,case,grade,reader,group,points,note\na.png,1,TR4,A,s1,4,x\na.png,1,TR5,B,s1,7,\nb.png,2,TR2,A,s1,,\n")
    m = read(folder)
    assert len(m) == 3 and m.summary()["kept"] == 2 and m.rows["group"].tolist() == ["1"] * 3
    assert m.rows["reader_id"].tolist() == ["A", "B", "A"] and m.rows["points"].tolist()[:2] == [4, 7] and m.rows["note"][0] == "x"


# ---- images ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage, reason", [
    (lambda p: p.write_bytes(b""), "an empty file"), (lambda p: p.write_bytes(p.read_bytes()[:500]), "truncated"),
    (lambda p: p.write_bytes(b"text"), "cannot identify"), (lambda p: p.unlink(), "no such file")],
                         ids=["zero bytes", "truncated", "no image", "missing"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_bad_image_is_left_out_with_the_reason(folder, capsys, suffix, damage, reason):
    path = folder / f"images/c.{suffix}"
    save(np.random.default_rng(3).integers(0, 255, SHAPE, dtype=np.uint8), path)
    damage(path)
    table(folder, HEAD + f"a.png,1,TR4\nb.png,2,TR2\nc.{suffix},3,TR1\n")
    m = read_folder(folder)
    assert m.summary()["kept"] == 2 and m.left_out["name"].tolist() == [f"c.{suffix}"] and reason in m.left_out["reason"][0]
    assert "left out 1" in capsys.readouterr().out


@pytest.mark.parametrize("values, flags", [
    (np.dstack([np.full((*SHAPE, 3), 90), np.full(SHAPE, 255)]).astype(np.uint8), {"alpha"}), (np.full(SHAPE, 3000, np.uint16), {"bit_depth"}),
    (np.full((*SHAPE, 3), (90, 20, 90), np.uint8), {"colour"}), (np.full((*SHAPE, 3), 90, np.uint8), set()), (np.full(SHAPE, 90, np.uint8), set())])
def test_odd_images_are_flagged_and_read(folder, values, flags):
    save(values, folder / "images/a.png")
    m = read(folder)
    assert set(m.rows["flags"][0]) == flags
    image, mask = m.load(0)
    assert image.shape == SHAPE and image.dtype == np.uint8 and mask.sum() == 250


def test_strays_and_copies(folder):
    shutil.copy(folder / "images/a.png", folder / "images/c.png")
    shutil.copy(folder / "images/a.png", folder / "images/unnamed.png")
    save(MASK, folder / "masks/d.png")
    table(folder, HEAD + "a.png,1,TR4\nb.png,2,TR2\nc.png,3,TR4\n")
    m = read(folder)
    assert m.rows["group"].tolist() == ["1", "2", "1"] and [("same_bytes" in f) for f in m.rows["flags"]] == [True, False, True]
    assert m.left_out.values.tolist() == [["images/unnamed.png", "image that labels.csv does not name"], ["masks/d.png", "mask of no image in use"]]


def test_names_that_differ_only_in_suffix_stay_apart(folder):
    save(np.full(SHAPE, 7, np.uint8), folder / "images/a.jpg")
    table(folder, HEAD + "a.png,1,TR4\na.jpg,1,TR4\nb.png,2,TR2\n")
    assert read(folder).rows["image_id"].tolist() == ["a.png", "a.jpg", "b"]


def test_when_no_image_is_left_it_is_an_error(folder):
    table(folder, HEAD + "x.png,1,TR4\n")
    with pytest.raises(DataError, match="x.png: image: no such file"): read(folder)


@pytest.mark.parametrize("name", ["../../secret.png", "/{}/secret.png", "link.png", "a\0.png"])
def test_images_outside_are_not_read(folder, name):
    secret = folder.parent / "secret.png"
    shutil.copy(folder / "images/a.png", secret)
    (folder / "images/link.png").symlink_to(secret)
    name = name.format(folder.parent)
    table(folder, HEAD + f"{name},1,TR4\nb.png,2,TR2\n")
    try: m = read(folder)
    except DataError as e: assert "\0" in name and "labels.csv" in str(e)       # Python 3.10's csv refuses zero bytes
    else: assert m.rows["image_id"].tolist() == ["b"] and name in m.left_out["name"].tolist()


def test_each_file_is_decoded_once_however_it_is_named(folder, monkeypatch):
    seen = []

    def counted(name, read): monkeypatch.setattr(module, name, lambda path: seen.append(path.relative_to(folder).as_posix()) or read(path))
    for name in ("examine", "read_raw"): counted(name, getattr(module, name))
    (folder / "images/bad.png").write_bytes((folder / "images/b.png").read_bytes()[:200])
    (folder / "images/link.png").symlink_to("a.png")
    (folder / "masks/link.png").symlink_to("a.png")
    save(MASK, folder / "images/small.png"), save(MASK[1:], folder / "images/smaller.png")
    rows = [f"{name},1,TR4,{k},{mask}" for k, (name, mask) in enumerate([
        ("a.png", "a.png"), ("./a.png", "./a.png"), ("images/a.png", "masks/a.png"), ("link.png", "link.png"), ("a.png", "a.png"),
        ("small.png", "a.png"), ("smaller.png", "a.png"), ("bad.png", ""), ("./bad.png", ""), ("images/bad.png", "")])]
    table(folder, "\n".join(["image,case,grade,reader,mask", *rows]))
    m = read(folder)
    assert sorted(seen) == ["images/a.png", "images/bad.png", "images/small.png", "images/smaller.png", "masks/a.png"]
    assert ["mask_size" in flags for flags in m.rows["flags"]] == [False] * 6 + [True] and m.rows["mask"].notna().sum() == 6
    assert [name for name, reason in m.left_out.values if "truncated" in reason] == ["bad.png", "./bad.png", "images/bad.png"]


@pytest.mark.parametrize("mask", ["a.png", "gone.png", "../../out.png"])
def test_rows_of_the_same_image_do_not_ask_the_disk_again(folder, monkeypatch, mask):
    asked = []
    monkeypatch.setattr(module, "inside", lambda root, path: asked.append(path) or inside(root, path))
    table(folder, "\n".join(["image,case,grade,reader,mask", *(f"a.png,1,TR4,{k},{mask}" for k in range(300))]))
    assert len(read(folder).rows) == 300 and len(asked) < 20


# ---- masks ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values, flag, area", [
    (MASK, None, 250), (MASK // 255, None, 250), (MASK > 0, None, 250), (np.dstack([MASK] * 3), None, 250), (np.dstack([MASK] * 4), None, 250),
    (np.where(MASK, 65535, 0).astype(np.uint16), None, 250),
    (np.maximum(MASK, 90), "mask_levels", 250), (MASK // 255 * np.arange(60, dtype=np.uint8), "mask_levels", 250),
    (MASK * 0, "mask_empty", None), (MASK * 0 + 255, "mask_full", None), (MASK * 0 + 1, "mask_full", None),
    (MASK[:-1], "mask_size", None), (MASK.T, "mask_size", None)])
def test_masks(folder, values, flag, area):
    save(values, folder / "masks/a.png")
    m = read(folder)
    assert m.rows["flags"][0] == ((flag,) if flag else ())
    mask = m.load(0)[1]
    assert (mask is None) == (area is None) and (mask is None or mask.sum() == area)
    assert len(m) == 2 and m.left_out.empty


@pytest.mark.parametrize("cell, flag", [
    ("", "no_mask"), ("none.png", "mask_missing"), ("../../x.png", "mask_outside"), ("/etc/hostname", "mask_outside"), ("link.png", "mask_outside"),
    ("bad.png", "mask_bad"), ("masks/b.png", None), ("b.png", None)])
def test_the_mask_column(folder, cell, flag):
    (folder / "masks/link.png").symlink_to("/etc/hostname")
    (folder / "masks/bad.png").write_bytes((folder / "masks/b.png").read_bytes()[:50])
    table(folder, f"image,case,grade,mask\na.png,1,TR4,{cell}\n")
    m = read(folder)
    assert m.rows["flags"][0] == ((flag,) if flag else ()) and m.rows["mask"][0] == (None if flag else "masks/b.png")


def test_without_the_column_a_mask_may_be_missing_and_the_image_is_never_its_own(folder):
    (folder / "masks/a.png").unlink()
    shutil.move(folder / "images/a.png", folder / "a.png")
    m = read(folder)
    assert m.rows["image"][0] == "a.png" and m.rows["mask"][0] is None and m.rows["flags"][0] == ("no_mask",)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_masks_give_a_flag(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "m.png"
    save(MASK, path)
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=5)): content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[:data.draw(st.integers(0, len(content)))])
    assert check_mask(path, SHAPE) in {"", *FLAGS}


# ---- DICOM ----------------------------------------------------------------------------------------------------------

def write_dicom(path, pixels, kind, region=None, **elements):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = UltrasoundImageStorage, "1.2.3", ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = UltrasoundImageStorage, "1.2.3", "US"
    colour = kind.startswith(("RGB", "YBR", "PALETTE"))
    if elements.get("NumberOfFrames"): ds.Rows, ds.Columns = pixels.shape[1:3]
    else: ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 3 if colour and "PALETTE" not in kind else 1, kind
    if ds.SamplesPerPixel == 3: ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = pixels.itemsize * 8
    ds.HighBit, ds.PixelRepresentation, ds.PixelData = ds.BitsStored - 1, int(pixels.dtype.kind == "i"), pixels.tobytes()
    if region is not None:
        ds.SequenceOfUltrasoundRegions = [Dataset(), Dataset()]
        for name, value in region.items(): setattr(ds.SequenceOfUltrasoundRegions[1], name, value)
    for name, value in elements.items(): setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)


RAMP = np.tile(np.arange(60, dtype=np.uint8) * 4, (40, 1))
CM = dict(RegionSpatialFormat=1, PhysicalUnitsXDirection=3, PhysicalUnitsYDirection=3, PhysicalDeltaX=.008, PhysicalDeltaY=-.008)


@pytest.mark.parametrize("kind, pixels, rising", [
    ("MONOCHROME2", RAMP, True), ("MONOCHROME1", RAMP, False), ("MONOCHROME2", RAMP.astype(np.uint16) * 100, True),
    ("MONOCHROME1", RAMP.astype(np.uint16) * 100, False), ("MONOCHROME2", RAMP.astype(np.int16) - 100, True), ("RGB", np.dstack([RAMP] * 3), True),
    ("YBR_FULL", convert_color_space(np.dstack([RAMP] * 3), "RGB", "YBR_FULL"), True)])
def test_dicom_pixels(folder, kind, pixels, rising):
    write_dicom(folder / "images/a.dcm", pixels, kind)
    table(folder, HEAD + "a.dcm,1,TR4\nb.png,2,TR2\n")
    m = read(folder)
    image, mask = m.load(0)
    assert image.shape == SHAPE and image.dtype == np.uint8 and mask.sum() == 250
    steps = np.diff(image[0].astype(int))
    assert (steps >= 0).all() if rising else (steps <= 0).all()
    assert image.max() > 200 and image.min() < 20
    assert ("bit_depth" in m.rows["flags"][0]) == (pixels.itemsize > 1) and "colour" not in m.rows["flags"][0]


@pytest.mark.parametrize("region, elements, spacing", [
    (None, {}, None), (None, {"PixelSpacing": [.1, .1]}, .1), (CM, {}, .08), (CM, {"PixelSpacing": [.2, .2]}, .2),
    (CM | {"PhysicalUnitsXDirection": 4}, {}, None), (CM | {"RegionSpatialFormat": 2}, {}, None),
    (CM | {"PhysicalDeltaX": 0.}, {}, None), (None, {"PixelSpacing": [0, 0]}, None), ({}, {}, None)])
def test_dicom_spacing(folder, region, elements, spacing):
    write_dicom(folder / "images/a.dcm", RAMP, "MONOCHROME2", region, **elements)
    table(folder, HEAD + "a.dcm,1,TR4\n")
    found = read(folder).rows["spacing_mm"][0]
    assert np.isnan(found) if spacing is None else found == pytest.approx(spacing)


def test_the_table_overrules_the_dicom_spacing(folder):
    write_dicom(folder / "images/a.dcm", RAMP, "MONOCHROME2", CM)
    table(folder, "image,case,grade,spacing_mm\na.dcm,1,TR4,0.5\n")
    assert read(folder).rows["spacing_mm"][0] == .5


def test_pixels_that_are_not_square_and_several_frames(tmp_path):
    write_dicom(tmp_path / "a.dcm", np.stack([RAMP, RAMP // 2]), "MONOCHROME2", PixelSpacing=[.1, .2], NumberOfFrames=2)
    spacing, flags = dicom_facts(tmp_path / "a.dcm")
    assert np.isnan(spacing) and flags == {"spacing_uneven", "frames"}
    assert (read_gray(tmp_path / "a.dcm") == RAMP).all()


@pytest.mark.parametrize("damage", [
    lambda p: p.write_bytes(p.read_bytes()[:300]), lambda p: p.write_bytes(p.read_bytes()[:-500]), lambda p: p.write_bytes(b""),
    lambda p: write_dicom(p, RAMP, "PALETTE COLOR"), lambda p: write_dicom(p, RAMP, "MONOCHROME2", Rows=60000, Columns=60000),
    lambda p: write_dicom(p, np.dstack([RAMP.astype(np.uint16)] * 3), "RGB")],
                         ids=["head cut", "pixels cut", "empty", "palette", "bomb", "16-bit RGB"])
def test_dicom_files_that_cannot_be_used_are_left_out(folder, damage):
    write_dicom(folder / "images/c.dcm", RAMP, "MONOCHROME2")
    damage(folder / "images/c.dcm")
    table(folder, HEAD + "a.png,1,TR4\nb.png,2,TR2\nc.dcm,3,TR4\n")
    assert read(folder).left_out["name"].tolist() == ["c.dcm"]


# ---- the phantom writes this format ---------------------------------------------------------------------------------

def test_phantoms_are_read_back(tmp_path):
    m = read(write_phantoms(tmp_path / "p", 3, seed=5, readers=1, progress=False))
    assert m.summary() == {"kept": 3, "flagged": {}, "left_out": {}} and len(m) == 6 and m.scale == ACR
    assert m.rows["grade"].notna().all() and (m.rows["spacing_mm"] > 0).all() and all(m.load(i)[1].any() for i in range(6))
