"""What comes from elsewhere cannot run, leave its folder, fill the memory, or pass for a page. nbs/06_trust.ipynb names a test for each attack."""
import ast
import io
import json
import pickle
import re
import resource
import struct
import time
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
    UltrasoundImageStorage,
)

from thyroid_rlar import files, latent, opened, predictions, survival
from thyroid_rlar.ddti import MAX_XML, clean_regions, read_case, read_ddti, self_intersects
from thyroid_rlar.files import MAX_CELLS, MAX_PACKED, DataError, read_json, read_parquet, read_whole
from thyroid_rlar.folder import MAX_ROWS, MAX_TABLE, dicom_facts, read_folder, read_table
from thyroid_rlar.images import MAX_PIXELS, examine, read_gray
from thyroid_rlar.latent import saved_latents
from thyroid_rlar.latent_figures import as_csv, thumbnail
from thyroid_rlar.loader import prepare
from thyroid_rlar.network import MultitaskNet, NetworkSettings, load_model, save_model
from thyroid_rlar.parameters import ParameterError, RunSettings, check_parameters, read_size
from thyroid_rlar.records import MAX_POINTS, Manifest, left_out_table
from thyroid_rlar.report import write_report
from thyroid_rlar.runs import recorded_settings
from thyroid_rlar.tirads import DDTI

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted(path for path in (ROOT / "thyroid_rlar").glob("*.py") if path.name != "_modidx.py")
HEAD = "image,case,grade,mask\n"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture
def folder(tmp_path):
    "A good image with its mask, and beside the folder a secret one."
    root = tmp_path / "data"
    for part in ("images", "masks"): (root / part).mkdir(parents=True)
    for path in (root / "images/a.png", tmp_path / "secret.png"): Image.effect_noise((60, 40), 40).save(path)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 15:40] = 255
    Image.fromarray(mask).save(root / "masks/a.png")
    return root


def read(root, table):
    (root / "labels.csv").write_text(HEAD + table)
    return read_folder(root, verbose=False)


class Cost:
    "CPU seconds and the growth of the largest memory used, in MB."
    def __enter__(self):
        self.start, self.before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return self

    def __exit__(self, *_):
        self.seconds = time.process_time() - self.start
        self.memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before) / 1024
        assert self.seconds < 1 and self.memory < 500, (self.seconds, self.memory)


# ---- too large --------------------------------------------------------------------------------------------------------

def test_an_entity_bomb_is_a_flag(tmp_path):
    levels = "".join(f'<!ENTITY e{k} "{f"&e{k - 1};" * 10}">' for k in range(1, 12))
    (tmp_path / "1.xml").write_text(f'<!DOCTYPE case [<!ENTITY e0 "ha">{levels}]><case><number>1</number><tirads>&e11;</tirads></case>')
    with Cost(): assert read_case(tmp_path / "1.xml").flags == {"xml_bad"}
    (tmp_path / "1.xml").write_text("<case>" + "<a/>" * (MAX_XML // 4) + "</case>")
    with Cost(): assert read_case(tmp_path / "1.xml").flags == {"xml_bad"}


def png(width, height):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
                     chunk(b"IDAT", zlib.compress(bytes(10**6))), chunk(b"IEND", b"")])


def tiff(shape, tile, n=1):
    "A picture of zeros in n tiles that share their bytes."
    data = zlib.compress(bytes(min(tile[0] * tile[1], 10**6)), 9)
    at = 150 + 8 * n
    tags = [(256, 4, 1, shape[1]), (257, 4, 1, shape[0]), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1),
            (322, 4, 1, tile[1]), (323, 4, 1, tile[0]), (324, 4, n, 150 if n > 1 else at), (325, 4, n, 150 + 4 * n if n > 1 else len(data))]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return head.ljust(150, b"\0") + struct.pack(f"<{n}I", *[at] * n) + struct.pack(f"<{n}I", *[len(data)] * n) + data


def tagged(order, values, shared, kind=1, size=1):
    "A TIFF of 16 x 16 pixels with so many values more, which share so many bytes; `size` of each number."
    tags = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 16),
            (279, 4, 1, 256), *((40_000 + k, kind, shared // size, 8) for k in range(values))]
    entry = lambda tag, kind, n, value: struct.pack(f"{order}HHI", tag, kind, n) + (
        struct.pack(f"{order}HH", value, 0) if kind == 3 and n == 1 else struct.pack(f"{order}I", value))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + max(shared, 256))
    return head + bytes(max(shared, 256)) + struct.pack(f"{order}H", len(tags)) + b"".join(entry(*tag) for tag in tags) + bytes(4)


@pytest.mark.parametrize("order", "<>")
def test_tiff_values_that_share_their_bytes_are_refused(tmp_path, order):
    "Pillow before 13 keeps a copy of each: two megabytes would take gigabytes."
    path = tmp_path / "a.tif"
    path.write_bytes(tagged(order, 3, 1000))
    assert read_gray(path).shape == examine(path).shape == (16, 16)
    for values, shared, kind, size in ((1000, 2_000_000, 1, 1), (1000, 2_000_000, 12, 8), (1, 10_000_000, 2, 1)):
        path.write_bytes(tagged(order, values, shared, kind, size))
        for look in (examine, read_gray):
            with Cost(), pytest.raises(DataError, match="tags: found .* bytes, expected at most 4,000,000"): look(path)
    path.write_bytes(b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + bytes(100))
    with pytest.raises(DataError, match="BigTIFF"): read_gray(path)


def test_tiff_fractions_and_further_lists_are_counted(tmp_path):
    "Each fraction becomes an object, also in the list of EXIF, which Pillow reads without being asked."
    path, kinds = tmp_path / "a.tif", {5: 8, 10: 8}
    for kind, size in kinds.items():
        path.write_bytes(tagged("<", 1, 900_000, kind, size))
        for look in (examine, read_gray):
            with Cost(), pytest.raises(DataError, match="tags: found .* bytes"): look(path)
    plain = io.BytesIO()
    Image.effect_noise((20, 20), 50).save(plain, "TIFF", tiffinfo={34665: 8})      # where the first list begins: replaced below
    data = bytearray(plain.getvalue())
    entry = data.index(struct.pack("<HHI", 34665, 4, 1))
    further = struct.pack("<H", 1) + struct.pack("<HHII", 40000, 5, 900_000, 8) + bytes(4)
    data[entry + 8:entry + 12] = struct.pack("<I", len(data))
    path.write_bytes(data + further)
    with Cost(), pytest.raises(DataError, match="tags: found"): read_gray(path)
    data[entry + 8:entry + 12] = data[4:8]                                          # a ring
    path.write_bytes(data)
    with Cost(): assert read_gray(path).shape == (20, 20)


def test_a_png_part_longer_than_its_file_asks_for_no_memory(tmp_path):
    "Found by the fuzz: Pillow reads what is left of a part at once, and asks the memory for as much as it says."
    file = io.BytesIO()
    Image.effect_noise((400, 300), 40).save(file, "PNG")
    data = bytearray(file.getvalue())
    at = data.index(b"IDAT")
    data[at - 4:at] = struct.pack(">I", 2**31 - 1)
    (tmp_path / "a.png").write_bytes(data)
    for look in (examine, read_gray):
        with Cost(), pytest.raises(DataError, match="a part of 2,147,483,647 bytes"): look(tmp_path / "a.png")


@pytest.mark.parametrize("marker", [b"\xff\xe1", b"\xff\xed"])
def test_a_jpeg_of_long_segments_is_refused_at_once(tmp_path, marker):
    "Pillow puts EXIF together segment by segment, and copies what it has each time: a thousand took half a minute."
    file = io.BytesIO()
    Image.effect_noise((40, 30), 40).save(file, "JPEG")
    segment = marker + struct.pack(">H", 65_000) + b"Exif\0\0" + bytes(64_992)
    long = file.getvalue()[:2] + 1000 * segment + file.getvalue()[2:]
    (tmp_path / "a.jpg").write_bytes(long)
    (tmp_path / "a.dcm").write_bytes(dicom(JPEGBaseline8Bit, encapsulate([long]), (30, 40)))
    for name in ("a.jpg", "a.dcm"):
        with Cost(), pytest.raises(DataError, match="segments: found"): read_gray(tmp_path / name)
    (tmp_path / "a.jpg").write_bytes(file.getvalue()[:2] + 3 * segment + file.getvalue()[2:])
    assert read_gray(tmp_path / "a.jpg").shape == (30, 40)


def test_a_long_loop_of_jpeg_frames_is_read(tmp_path):
    "Each frame has a scan; only those of the first, which is decoded, count."
    file = io.BytesIO()
    Image.effect_noise((60, 40), 40).save(file, "JPEG")
    ds = dcmread(io.BytesIO(dicom(JPEGBaseline8Bit, encapsulate(300 * [file.getvalue()]))))
    ds.NumberOfFrames = 300
    ds.save_as(tmp_path / "a.dcm")
    assert read_gray(tmp_path / "a.dcm").shape == (40, 60) and "frames" in dicom_facts(tmp_path / "a.dcm")[1]
    (tmp_path / "IM0001").write_bytes((tmp_path / "a.dcm").read_bytes())            # as scanners write them
    assert np.array_equal(read_gray(tmp_path / "IM0001"), read_gray(tmp_path / "a.dcm")) and examine(tmp_path / "IM0001").mode == "DICOM"
    many = file.getvalue().replace(b"\xff\xda", b"\xff\xda\0\2" * 200 + b"\xff\xda")
    ds.PixelData = encapsulate([many, file.getvalue()])
    ds.NumberOfFrames = 2
    ds.save_as(tmp_path / "a.dcm")
    with Cost(), pytest.raises(DataError, match="scans: found 201"): read_gray(tmp_path / "a.dcm")


def test_dark_is_bright_is_turned_round_for_signed_pixels(tmp_path):
    values = np.array([[-32768, 32767], [0, 100]], np.int16)
    ds = dcmread(io.BytesIO(dicom(ExplicitVRLittleEndian, values.tobytes(), (2, 2))))
    ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = "MONOCHROME1", 16, 16, 15, 1
    ds["PixelData"].VR = "OW"
    ds.save_as(tmp_path / "a.dcm")
    assert np.array_equal(read_gray(tmp_path / "a.dcm"), [[255, 0], [127, 127]])


def dicom(syntax, pixels, shape=(40, 60)):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = UltrasoundImageStorage, "1.2.3", syntax
    ds = FileDataset("a.dcm", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PhotometricInterpretation, ds.SamplesPerPixel = UltrasoundImageStorage, "1.2.3", "MONOCHROME2", 1
    (ds.Rows, ds.Columns), ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.PixelData = shape, 8, 8, 7, 0, pixels
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def jpeg_of(width, height):
    "A small JPEG whose header claims another size."
    file = io.BytesIO()
    Image.new("L", (16, 16)).save(file, "JPEG")
    data, at = bytearray(file.getvalue()), file.getvalue().index(b"\xff\xc0")
    data[at + 5:at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = {"a.png": png(60_000, 60_000), "b.png": png(9_000, 9_000), "c.png": png(5_000, 4_000), "a.tif": tiff((16, 16), (30_000, 30_000)),
         "b.tif": tiff((1, 1600), (10**6, 16), 100), "c.tif": tiff((1600, 1), (16, 10**6), 100),
         "a.jpg": jpeg_of(60_000, 60_000), "a.dcm": dicom(ExplicitVRLittleEndian, bytes(2400), (60_000, 60_000)),
         "b.dcm": dicom(JPEGBaseline8Bit, encapsulate([jpeg_of(12_000, 12_000)])),
         "c.dcm": dicom(DeflatedExplicitVRLittleEndian, bytes(10**8), (10_000, 10_000))}


def test_run_lengths_that_grow_64_fold_are_refused(tmp_path):
    rle = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 4_000_000        # each two bytes are 128 zeros
    (tmp_path / "a.dcm").write_bytes(dicom(RLELossless, encapsulate([rle])))
    for look in (examine, read_gray):
        with Cost(), pytest.raises(DataError, match="size"): look(tmp_path / "a.dcm")


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BOMBS)
def test_a_pixel_bomb_is_refused_before_it_is_decoded(tmp_path, name):
    (tmp_path / name).write_bytes(BOMBS[name])
    assert len(BOMBS[name]) < 200_000
    for look in (examine, read_gray):
        with Cost(), pytest.raises(DataError, match="size|pixels|TransferSyntax|ecompression"): look(tmp_path / name)


def test_the_largest_image_allowed_costs_less_than_500_mb(tmp_path):
    side = int(MAX_PIXELS**.5)
    Image.new("RGBA", (side, side)).save(tmp_path / "a.png", compress_level=1)
    Image.fromarray(np.zeros((side, side), np.uint16)).save(tmp_path / "b.png", compress_level=1)
    for name in ("a.png", "b.png"):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert read_gray(tmp_path / name).shape == (side, side)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


def test_a_table_of_any_size_ends_in_a_sentence(tmp_path):
    for text, said in (("x" * (MAX_TABLE + 1), "size"), (HEAD + "a,1,,\n" * (MAX_ROWS + 1), "rows"), ("image,case,grade," + "x," * 10**6, "columns")):
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(DataError, match=said): read_table(tmp_path / "labels.csv")
    column = pd.Series(["x"] * 1000).astype("category").cat.codes
    pd.DataFrame({f"c{k}": column for k in range(MAX_CELLS // 1000 // 100)}).to_parquet(tmp_path / "a.parquet")
    assert len(read_parquet(tmp_path / "a.parquet")) == 1000
    pd.DataFrame({"x": np.zeros(MAX_CELLS + 1, bool)}).to_parquet(tmp_path / "b.parquet")
    assert (tmp_path / "b.parquet").stat().st_size < 200_000
    with Cost(), pytest.raises(DataError, match="values, at most"): read_parquet(tmp_path / "b.parquet")
    letters = pa.DictionaryArray.from_arrays(pa.array(np.zeros(60_000, np.int32)), ["x" * 20_000])
    pq.write_table(pa.table({"image_id": letters}), tmp_path / "d.parquet", store_schema=False)
    assert (tmp_path / "d.parquet").stat().st_size < 2000
    with Cost(), pytest.raises(DataError, match="1,200,000,000 bytes of text"): read_parquet(tmp_path / "d.parquet")


@pytest.mark.parametrize("n, said", [(files.MAX_WIDTH + 1, "5,001 columns, at most 5,000"), (40_000, "a head of .* bytes, at most 4,000,000")])
def test_a_table_of_very_many_columns_is_refused(tmp_path, n, said):
    pq.write_table(pa.table({f"p{k}": pa.array([0.]) for k in range(n)}), tmp_path / "t.parquet")
    with Cost(), pytest.raises(DataError, match=said): read_parquet(tmp_path / "t.parquet")


def test_a_table_of_millions_of_packed_texts_is_not_walked(tmp_path):
    packed = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000_000, np.int32)), ["x"])
    pq.write_table(pa.table(dict.fromkeys(("image_id", "case_id"), packed)), tmp_path / "t.parquet", store_schema=False)
    assert (tmp_path / "t.parquet").stat().st_size < 100_000
    with Cost(): assert len(files.read_run_table(tmp_path / "t.parquet")) == 2_000_000
    for bad in (pa.array([b"x", b"\xff"]).view(pa.utf8()), pa.array(["x", None]), pa.array([1, 2]), pa.array([["x"], ["y"]])):
        pq.write_table(pa.table({"image_id": bad}), tmp_path / "t.parquet")
        with pytest.raises(DataError, match="column 'image_id'"): files.read_run_table(tmp_path / "t.parquet")


def test_a_giant_text_in_a_small_table_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LETTERS", 1_000_000)
    def write(values): pq.write_table(pa.table({"image_id": values}), tmp_path / "t.parquet", compression="zstd")
    write(["x" * 999_000])
    assert len(read_parquet(tmp_path / "t.parquet").image_id[0]) == 999_000
    monkeypatch.setattr(files, "_letters", lambda path: pytest.fail("it was read"))
    for values in (["x" * 3_000_000], [["x" * 3_000_000]]):         # in a list, too
        write(values)
        assert (tmp_path / "t.parquet").stat().st_size < 10_000
        with pytest.raises(DataError, match="3,000,.* bytes, at most 2,000,0"): read_parquet(tmp_path / "t.parquet")


def with_scans(data, n):
    "A progressive JPEG, the last scan of its (first) picture n times."
    end = data.index(b"\xff\xd9")
    last = data.rindex(b"\xff\xda", 0, end)
    return data[:last] + data[last:end] * n + data[end:]


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_picture_of_many_scans_is_refused(tmp_path, kind):
    noise = Image.effect_noise((512, 512), 50)
    noise.save(tmp_path / "a.jpg", kind, progressive=True, **{"save_all": True, "append_images": [noise]} if kind == "MPO" else {})
    with Image.open(tmp_path / "a.jpg") as im: assert im.format == kind
    assert read_gray(tmp_path / "a.jpg").shape == (512, 512)
    (tmp_path / "a.jpg").write_bytes(with_scans((tmp_path / "a.jpg").read_bytes(), 200))
    with Cost(), pytest.raises(DataError, match="scans: found 2"): read_gray(tmp_path / "a.jpg")


@pytest.mark.parametrize("compression", [6, 7])                     # an old JPEG in a TIFF, which Pillow cannot write, and a new one
def test_a_jpeg_of_many_scans_within_a_tiff_is_refused(tmp_path, compression):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.tif", compression="jpeg")
    data, tag = (tmp_path / "a.tif").read_bytes(), struct.pack("<HHI", 259, 3, 1)
    at = data.index(tag) + len(tag)
    (tmp_path / "a.tif").write_bytes(data[:at] + struct.pack("<H", compression) + data[at + 2:] + b"\xff\xda" * 200)
    for look in (examine, read_gray):
        with pytest.raises(DataError, match="scans: found 2"): look(tmp_path / "a.tif")


def test_a_contour_of_many_points_costs_little():
    region = lambda n: {"points": [{"x": k * 17 % 60, "y": k * 13 % 40} for k in range(n)]}
    with Cost(): contours, flags = clean_regions([region(MAX_POINTS - 4), region(3), region(100_000)], (40, 60))
    assert len(contours) == 2 and "contour_long" in flags
    with Cost(): assert clean_regions([region(20_000)] * 9, (40, 60)) == (None, {"contour_long", "no_contour"})
    rng = np.random.default_rng(0)
    for n in (4, 5, 300, 600):                                      # more and fewer edges than are compared at a time
        angle = np.sort(rng.uniform(0, 6.28, n))
        ring = np.c_[np.cos(angle), np.sin(angle)]
        assert not self_intersects(ring) and self_intersects(ring[[*range(n - 3), n - 1, n - 2, n - 3]] if n > 4 else ring[[0, 2, 1, 3]])


def test_latents_that_unpack_to_gigabytes_are_refused(tmp_path):
    (tmp_path / "latents").mkdir()
    with zipfile.ZipFile(tmp_path / "latents/000.npz", "w", zipfile.ZIP_DEFLATED) as packed: packed.writestr("z.npy", bytes(10**8))
    with Cost(), pytest.raises(DataError, match="once unpacked"): saved_latents(tmp_path)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(tmp_path / "latents/000.npz", "w") as packed: packed.writestr("z.npy", head.getvalue() + bytes(100))
    with Cost(), pytest.raises(DataError, match="more values than there are"): saved_latents(tmp_path)


@pytest.mark.parametrize("change", [{"grades": 10**9}, {"embedding": 10**9}, {"width": 2**40}, {"dropout": 2}, {"grades": "6"},
                                    {"encoder": "hf-hub:x/y"}, {"x": 1}])
def test_a_model_of_any_size_is_not_built(tmp_path, change):
    save_model(MultitaskNet(NetworkSettings(grades=2, evidence=0), "none"), tmp_path)
    info = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(info | {"network": info["network"] | change}))
    with pytest.raises(DataError, match="model.json"): load_model(tmp_path)


# ---- out of the folder ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["../secret.png", "images/../../secret.png", "{}/secret.png", "..\\secret.png", "a\0.png", "file:///etc/passwd"])
def test_no_path_leads_out_of_the_folder(folder, path):
    path = path.format(folder.parent)
    m = read(folder, f"a.png,1,TR4,{path}\n{path},2,TR2,\n")
    assert m.rows["image"].tolist() == ["images/a.png"] and m.rows["mask"].isna().all() and len(m.left_out) >= 1
    good = m.rows.drop(columns="grade_index")
    if path.startswith(("..\\", "file")): return                    # names like others, of files that are not there
    for column in ("image", "mask"):
        with pytest.raises(DataError, match="this folder"): Manifest(good.assign(**{column: path}), folder, m.scale, "x")


def test_a_link_out_of_the_folder_is_not_followed(folder):
    secret = folder.parent / "secret.png"
    for name in ("images/b.png", "masks/b.png", "masks/c.png"): (folder / name).symlink_to(secret)
    Image.effect_noise((60, 40), 90).save(folder / "images/c.png")
    m = read(folder, "a.png,1,TR4,\nb.png,2,TR2,\nc.png,3,TR2,c.png\n")
    assert m.rows["image"].tolist() == ["images/a.png", "images/c.png"] and m.left_out["name"].tolist()[0] == "b.png"
    assert m.rows["mask"].isna().all() and "mask_outside" in m.rows["flags"][1]
    (folder / "labels.csv").rename(folder.parent / "labels.csv")
    (folder / "labels.csv").symlink_to(folder.parent / "labels.csv")
    with pytest.raises(DataError, match="stays in this folder"): read_folder(folder, verbose=False)


@pytest.mark.parametrize("part, image", [("masks", "a.png"), ("images", "../a.png")])
def test_a_folder_that_is_a_link_is_not_searched(folder, part, image):
    (folder.parent / "elsewhere/private").mkdir(parents=True)
    (folder.parent / "elsewhere/private/name.png").write_text("x")
    Image.effect_noise((60, 40), 40).save(folder / "a.png")
    (folder / part).rename(folder.parent / "before")
    (folder / part).symlink_to(folder.parent / "elsewhere")
    left_out = read(folder, f"{image},1,TR4,\n").left_out
    assert "name.png" not in left_out.to_string() and (part, "a link in the folder's place; not searched") in list(left_out.itertuples(index=False))


def test_an_xml_that_is_a_link_out_of_the_folder_is_not_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "1.xml").write_text("<case><number>1</number><tirads>5</tirads></case>")
    (tmp_path / "in/1.xml").symlink_to(tmp_path / "1.xml")
    Image.effect_noise((60, 40), 40).save(tmp_path / "in/1_1.jpg")
    row = read_ddti(tmp_path / "in", verbose=False).rows.iloc[0]
    assert row["grade"] is None and "xml_bad" in row["flags"]


# ---- code in the place of data ----------------------------------------------------------------------------------------

class Shell:
    "Its pickle makes a file when it is opened."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def test_a_pickle_in_the_place_of_a_checkpoint_is_not_run(tmp_path):
    made, attack = tmp_path / "made", pickle.dumps(Shell(tmp_path / "made"))
    pickle.loads(attack)
    assert made.exists()
    made.unlink()
    save_model(MultitaskNet(NetworkSettings(grades=2, evidence=0), "none"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(attack)
    with pytest.raises(DataError, match="model.safetensors"): load_model(tmp_path)
    torch.save(Shell(made), tmp_path / "state.pt")
    for content in (attack, (tmp_path / "state.pt").read_bytes()):
        (tmp_path / "state.pt").write_bytes(content)
        with pytest.raises(DataError, match="state.pt"):            # as training.load_checkpoint reads it, see the rules below
            read_whole(tmp_path / "state.pt", lambda p: torch.load(p, map_location="cpu", weights_only=True))
    (tmp_path / "latents").mkdir()
    np.savez(tmp_path / "latents/000.npz", z=np.array([Shell(made)], object), image_id=np.array(["a"]))
    with pytest.raises(DataError, match="000.npz"): saved_latents(tmp_path)
    assert not made.exists()


def archive(path, n, name="x"):
    "A zip archive of n empty files, of which only the list at its end is there."
    with zipfile.ZipFile(path, "w") as file:
        for k in range(n): file.writestr(zipfile.ZipInfo(f"{name}{k}.npy"), b"")


def test_weights_and_archives_of_very_many_parts_are_refused_at_once(tmp_path):
    save_model(MultitaskNet(NetworkSettings(grades=2, evidence=0), "none"), tmp_path)
    names = json.dumps({f"t{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(100_000)}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(names)) + names)
    with Cost(), pytest.raises(DataError, match="a list of tensors of"): load_model(tmp_path)
    (tmp_path / "latents").mkdir()
    archive(tmp_path / "latents/000.npz", MAX_PACKED + 1)
    with Cost(), pytest.raises(DataError, match="archive of more than 20,000 files"): saved_latents(tmp_path)
    with pytest.raises(DataError, match="archive of more than 20,000 files"): read_whole(tmp_path / "latents/000.npz", survival._read_state)


def test_a_checkpoint_calls_nothing_but_what_makes_tensors(tmp_path):
    "PyTorch's reader lets a pickle make a bytearray of any size, and lists within lists whose text would be endless."
    class Large:
        def __reduce__(self): return bytearray, (3 * 10**9,)
    nested = [1]
    for _ in range(60): nested = [nested, nested]
    torch.save({"best": Large()}, tmp_path / "state.pt")
    with Cost(), pytest.raises(DataError, match="a call of __builtin__ bytearray"): read_whole(tmp_path / "state.pt", survival._read_state)
    torch.save({"best": nested, "epoch": 1, "best_epoch": 0, "count": 1, "processes": 1}, tmp_path / "state.pt")
    with Cost(), pytest.raises(ValueError, match="best .*no number"): survival._check_numbers(survival._read_state(tmp_path / "state.pt"), 5)
    torch.save({"best": list(range(1_000_000))}, tmp_path / "state.pt")
    with Cost(), pytest.raises(DataError, match="beside its tensors"): read_whole(tmp_path / "state.pt", survival._read_state)


def test_a_table_of_very_many_cells_is_refused(folder):
    columns = [f"c{k}" for k in range(190)]
    row = "images/a.png,1,TR4," + "," * 189 + "\n"
    (folder / "labels.csv").write_text("image,case,grade," + ",".join(columns) + "\n" + 20_000 * row)
    with Cost(), pytest.raises(DataError, match="cells: found 3,860,000, expected at most 3,000,000"): read_table(folder / "labels.csv")


def test_the_list_of_prepared_images_is_bounded(folder):
    manifest = read(folder, "images/a.png,1,TR4,masks/a.png\n")
    prepare(manifest, (32, 32), progress=False)
    index, = (folder.parent / f"{folder.name}.cache").glob("*/index.json")
    index.write_text("[" + 5_000_000 * " " + "]")
    with Cost(), pytest.raises(DataError, match="index.json: size"): prepare(manifest, (32, 32), progress=False)


def test_a_notebook_as_data_is_not_executed(folder):
    made = folder.parent / "made"
    cell = {"cell_type": "code", "source": f"open({str(made)!r}, 'w')", "metadata": {}, "outputs": [], "execution_count": None}
    notebook = json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    for name in ("images/x.ipynb", "images/y.png", "masks/a.png", "params.json", "model.json"):
        (folder / name).write_text(notebook)
    m = read(folder, "a.png,1,TR4,a.png\nx.ipynb,2,TR2,\ny.png,3,TR2,\n")
    assert m.rows["image"].tolist() == ["images/a.png"] and "mask_bad" in m.rows["flags"][0]
    with pytest.raises(DataError): recorded_settings(folder)
    with pytest.raises(DataError): read_json(folder / "model.json", "network")
    (folder / "labels.csv").write_text(notebook)
    with pytest.raises(DataError): read_folder(folder, verbose=False)
    assert not made.exists()


def calls(tree):
    "Dotted names of what is called, with the call."
    for node in ast.walk(tree):
        if isinstance(node, ast.Call): yield ast.unparse(node.func), node


RUNNING = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "joblib.load", "pd.read_pickle", "torch.hub.load", "pickle.load",
           "pickle.loads", "dill.load", "yaml.load", "marshal.loads", "runpy.run_path")
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "xml", "lxml", "runpy", "subprocess", "code", "nbformat",
           "nbclient", "papermill", "execnb", "nbconvert"}


def loaders(tree: ast.AST) -> set[str]:
    "What is imported that could run or unfold what it reads."
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in imported} & LOADERS


def unsafe(tree: ast.AST) -> set[str]:
    "Calls that run what they read, or would if the file asked for it."
    found = set()
    for name, call in calls(tree):
        options = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name in RUNNING or name == "torch.load" and options.get("weights_only") != "True": found.add(name)
        if name == "np.load" and options.get("allow_pickle", "False") != "False": found.add(name)
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.name)
def test_the_package_runs_nothing_that_it_reads(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not loaders(tree) and not unsafe(tree)
    for name, _ in calls(tree):
        assert name != "pd.read_parquet" or path.name == "files.py", "its read_parquet bounds what is read"
        assert not name.endswith(("read_html", "read_xml")), name


NOTEBOOKS = [*sorted((ROOT / "nbs").glob("*.ipynb")), *sorted((ROOT / "nbs/runs").glob("*.ipynb"))]
SHOWN = {"03_files": {"pickle.loads"}}                  # of an error that it has just pickled itself


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_no_cell_of_a_notebook_runs_what_it_reads(path):
    "Those of nbs/runs read other people's folders, so they import nothing that could; the others show attacks and start processes."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    tree = ast.parse("\n".join("" if line[:1] in "%!" else line for source in sources for line in source.splitlines()))
    assert unsafe(tree) == SHOWN.get(path.stem, set())
    assert path.parent.name != "runs" or not loaders(tree)


@pytest.mark.parametrize("line", ["torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "pickle.load(f)", "eval(t)"])
def test_the_rule_sees_what_it_forbids(line): assert unsafe(ast.parse(f"if x: a = [{line} for p in q]"))


def test_only_a_benchmark_of_speed_trains_without_the_guard_against_leaks():
    "Whatever reports a result gets its trainer from `make_trainer`, which asks for leaks first."
    makers = {path.stem for path in PACKAGE for name, _ in calls(ast.parse(path.read_text(encoding="utf-8"))) if name == "Trainer"}
    notebooks = {path.stem for path in (ROOT / "nbs/runs").glob("*.ipynb") if "Trainer(" in path.read_text(encoding="utf-8")}
    assert makers == {"runs", "speed"} and not notebooks


# ---- text that is more than text --------------------------------------------------------------------------------------

def test_html_in_a_case_id_is_shown_as_text(folder, tmp_path):
    m = read(folder, f'a.png,"{EVIL}",TR4,\n"{EVIL}.png",2,TR2,\n')
    assert m.rows["case_id"].tolist() == [EVIL]
    shown = Manifest(m.rows.assign(flags=[(EVIL,)]), folder, m.scale, "folder", m.left_out)._repr_markdown_()
    assert "\\<script\\>" in shown and not re.search(r"(?<!\\)<", shown)
    table = m.rows[["case_id", "image_id"]].assign(text=f"[x](javascript:alert(1)) {EVIL}")
    page = write_report(tmp_path / "report.html", EVIL, [(EVIL, EVIL, table)], {EVIL: EVIL}).read_text("utf-8")
    own = page[page.rindex("</script></head>"):]
    assert "&lt;script&gt;" in own and "<script>alert" not in own and "<img" not in own
    small = thumbnail(np.zeros((9, 9), np.uint8), EVIL)
    assert "&lt;script" in small and "<script" not in small


def test_markdown_in_a_files_name_is_shown_as_text(folder):
    odd = b"\xff.png".decode("utf-8", "surrogateescape")
    left_out = left_out_table([("![](http://x.invalid/pixel.png).png", "a | b"), ("`x`\n# head", "*b*"), (odd, "x")])
    m = read(folder, "a.png,1,TR4,\n")
    text = Manifest(m.rows, folder, m.scale, "x", left_out)._repr_markdown_()
    assert "!\\[\\](http" in text and "\\`x\\` # head" in text and "a \\| b" in text and text.encode()


def test_a_cell_cannot_begin_another_line():
    assert as_csv(pd.DataFrame({"case_id": ["x\r=1+1", "y\n=1+1"]})).splitlines() == ['"case_id"', '"x =1+1"', '"y =1+1"']


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "=HYPERLINK(\"http://x.invalid\")", "=cmd|' /C calc'!A0", " =1"])
def test_a_formula_in_a_csv_export_is_text(cell, tmp_path):
    exported = as_csv(pd.DataFrame({"case_id": [cell], cell: [cell], "dice": [-.5]}))
    back = pd.read_csv(io.StringIO(exported), dtype=str)
    text = "'" + re.sub("[\r\n]", " ", cell)
    assert back["case_id"][0] == text and back.columns[1] == text and back["dice"][0] == "-0.5"


# ---- values -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values", [{"out_dir": "a\0b"}, {"reader": "\ud800"}, {"image_size": [float("inf"), 32]}, {"image_size": 10**9 * 32},
                                    {"epochs": "1e999"},
                                    {"encoder": "x" * 10**6}, {"encoder": "hf-hub:a/b"}, {"encoder": "local-dir:/tmp"}, {"__class__": 1}, [1], None])
def test_a_parameter_of_any_kind_ends_in_a_sentence(values):
    with Cost(), pytest.raises(ParameterError): check_parameters(values)


def test_sizes_have_an_end():
    assert read_size("4096x32") == (4096, 32)
    with pytest.raises(ParameterError, match="up to 4096"): read_size(4128)


@pytest.mark.parametrize("number", ["9" * 5000, "²", "٣", "-1", ""])
def test_image_numbers_of_any_kind(tmp_path, number):
    (tmp_path / "1.xml").write_text(f"<case><number>1</number><age>{number}</age><mark><image>{number}</image><svg/></mark></case>", encoding="utf-8")
    Image.effect_noise((60, 40), 40).save(tmp_path / "1_1.jpg")
    m = read_ddti(tmp_path, verbose=False)
    assert len(m) == 1 and m.scale == DDTI


# ---- the notebook -----------------------------------------------------------------------------------------------------

ATTACKS = ("entity bomb", "pixel bomb", "path traversal", "symbolic link out of the folder", "pickle in a checkpoint's place", "HTML in a case id",
           "formula in a CSV export", "a notebook as data", "a lock left by a crash")


def test_every_attack_has_a_row_and_every_row_a_test():
    source = "\n".join("".join(cell["source"]) for cell in json.loads((ROOT / "nbs/06_trust.ipynb").read_text(encoding="utf-8"))["cells"])
    rows = re.findall(r'^    \("([^"]+)", "([^"]+)",\s+"(test_\w+\.py)::(test_\w+)"\)', source, re.MULTILINE)
    assert set(ATTACKS) <= {attack for attack, *_ in rows}
    for attack, happens, file, test in rows:
        assert happens and (ROOT / "tests" / file).exists(), f"{attack}: no file tests/{file}"
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE), f"{attack}: no {test} in {file}"


def test_links_in_a_strangers_run_lead_nowhere(tmp_path):
    run, ours = tmp_path / "run", tmp_path / "ours"
    run.mkdir(), ours.mkdir()
    for name in ("model.json", "model.safetensors", "params.json", "split.parquet"): (run / name).write_text("{}")
    for name, check in (("evaluation", predictions.check_evaluation), ("explore", opened.check_exploring)):
        assert check({"run_dir": str(run)}).out_dir == run / name
        (run / name).symlink_to(ours)
        with pytest.raises(DataError, match="which leads to"): check({"run_dir": str(run)})
        (run / name).unlink()
    (run / "explore").symlink_to(ours)
    with pytest.raises(DataError, match="which leads to"): latent.latent_map(pd.DataFrame(np.eye(4)), run, "pca")
    assert not list(ours.iterdir())


def test_a_strangers_run_does_not_say_where_phantoms_are_drawn(tmp_path, monkeypatch):
    asked = []

    def open_source(settings, progress):
        asked.append(settings.data_dir)
        raise ParameterError("enough")
    monkeypatch.setattr(predictions, "open_source", open_source)
    trained = predictions.TrainedRun(None, {}, RunSettings(source="phantom", data_dir=str(tmp_path / "theirs")), None)
    ours = predictions.EvaluationSettings(tmp_path, None, None, tmp_path / "out", None, "auto")
    for settings in (ours, replace(ours, source="phantom", data_dir=str(tmp_path / "mine"))):
        with pytest.raises(ParameterError, match="enough"): predictions.open_evaluation(settings, trained)
    assert asked == [None, str(tmp_path / "mine")]


def test_a_strangers_run_cannot_ask_for_a_million_phantoms(tmp_path):
    for number, ok in ((10_000, True), (10_001, False), (1_000_000, False)):
        (tmp_path / "params.json").write_text(json.dumps({"parameters": {"phantom_images": number}}))
        if ok: assert recorded_settings(tmp_path).phantom_images == number
        else:
            with pytest.raises(ParameterError, match=f"params.json.*phantom_images: found {number}, expected 20 to 1"): recorded_settings(tmp_path)


def test_a_table_of_other_columns_than_ours_is_refused(tmp_path):
    struct = pa.struct([("a", pa.string())])
    for kind, values in ((pa.large_binary(), [b"x"]), (pa.binary(1), [b"x"]), (struct, [{"a": "x"}]), (pa.list_(struct), [[{"a": "x"}]])):
        pq.write_table(pa.table({"odd": pa.array(values * 3, kind)}), tmp_path / "t.parquet")
        with pytest.raises(DataError, match="column 'odd' of "): read_parquet(tmp_path / "t.parquet")
    pd.DataFrame({"a": [1], "b": ["x"], "c": [[1.0]], "d": [True], "e": [None]}).to_parquet(tmp_path / "t.parquet")
    assert len(read_parquet(tmp_path / "t.parquet")) == 1


def test_a_file_of_very_many_parts_is_refused_at_once(tmp_path):
    "Each part takes the libraries some microseconds; a count of them takes less."
    def png_chunk(kind: bytes, data: bytes) -> bytes: return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    Image.effect_noise((40, 30), 40).save(tmp_path / "a.png"); Image.effect_noise((40, 30), 40).save(tmp_path / "a.jpg")
    png, jpeg = (tmp_path / "a.png").read_bytes(), (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.png").write_bytes(png[:33] + 300_000 * png_chunk(b"tEXt", b"a\0") + png[33:])
    (tmp_path / "a.jpg").write_bytes(jpeg[:2] + 1_000_000 * b"\xff\xe5\0\2" + jpeg[2:])
    rows = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 1078, 40, 64, 64, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024)
    (tmp_path / "a.bmp").write_bytes(rows + 1_000_000 * b"\0\2\0\0")
    for name, match in (("a.png", "parts"), ("a.jpg", "parts"), ("a.bmp", "run lengths")):
        start = time.process_time()
        with pytest.raises(DataError, match=match): read_gray(tmp_path / name)
        assert time.process_time() - start < 1
    ds = FileDataset(str(tmp_path / "a.dcm"), {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = UltrasoundImageStorage, "1.2.3"
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SequenceOfUltrasoundRegions = [Dataset() for _ in range(20_000)]
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    start = time.process_time()
    with pytest.raises(DataError, match="20,000 items"): dicom_facts(tmp_path / "a.dcm")
    assert time.process_time() - start < 1


def dicom_of_parts():
    "Small DICOM files of very many parts of each kind, by what is said of them."
    raw, jpeg = dicom(ExplicitVRLittleEndian, bytes(2400)), dicom(JPEGBaseline8Bit, encapsulate([jpeg_of(16, 16)]))
    implicit = dicom(ImplicitVRLittleEndian, bytes(2400))
    add = lambda data, mark, more: data[:data.rindex(mark)] + more + data[data.rindex(mark):]
    pixels, item = b"\xe0\x7f\x10\0", b"\xfe\xff\0\xe0"
    within = struct.pack("<I", 2_400_000) + 300_000 * struct.pack("<HHI", 0x19, 0x1001, 0)          # the elements of one item
    return [(add(raw, pixels, 300_000 * struct.pack("<HH2sH", 0x29, 0x1001, b"LO", 0)), "elements: found more than 40,000"),
            (add(raw, pixels, b"".join(struct.pack("<HH2sH", 0x29, 0x1000 + k, b"LO", 0) for k in range(50_000))), "elements: found more than"),
            (add(jpeg, b"\xfe\xff\xdd\xe0", 300_000 * (item + bytes(4))), "300,00. items"),
            (add(raw, pixels, pixels + b"OB\0\0" + bytes(4) + 20_000 * (item + bytes(4))), "20,000 items"),        # behind what looks like the pixels
            (add(implicit, pixels, struct.pack("<HHI", 0x18, 0x6011, 2_400_008) + item + within), "elements: found one of 2,400,008 bytes"),
            (add(implicit, pixels, struct.pack("<HHI", 0x28, 0x101, 2_000_000) + 1_000_000 * b"\1\0"), "elements: found one of 2,000,000 bytes"),
            (add(implicit, pixels, struct.pack("<HHI", 8, 5, 2_000_000) + 200_000 * b"ISO_IR 99\\"), "elements: found one of 2,000,000 bytes")]


@pytest.mark.parametrize("k", range(7))
def test_a_small_dicom_of_very_many_parts_is_refused_at_once(tmp_path, k):
    data, said = dicom_of_parts()[k]
    (tmp_path / "a.dcm").write_bytes(data)
    for look in (dicom_facts, *((examine, read_gray) if k != 4 else ())):      # only one of them asks for the regions
        start = time.process_time()
        with pytest.raises(DataError, match=said): look(tmp_path / "a.dcm")
        assert time.process_time() - start < 1
