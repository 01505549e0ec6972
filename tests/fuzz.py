"""Damaged files and odd values by the million, for whatever reads what came from elsewhere.

`make fuzz` goes on where the last time ended: data/results/fuzz.json holds the counts of each reader, and inputs never repeat. An input that ends in
anything but a record, a flag or one of our own errors, takes a second of CPU time or more, or 500 MB, is put into tests/fuzz_cases and reported.

    python tests/fuzz.py --inputs 50000 --readers xml labels      # so many more of each
    python tests/fuzz.py --minutes 10                             # all readers in turn, in proportion to their shares
    python tests/fuzz.py --atheris --readers xml --inputs 100000  # guided by coverage, into fuzz_guided.json: pip install atheris
"""
import argparse
import gc
import hashlib
import importlib
import io
import json
import math
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file

from thyroid_rlar import (
    benchmark,
    compare,
    dial,
    folder,
    interference,
    latent,
    loader,
    network,
    opened,
    parameters,
    predictions,
    radiomics,
    readers,
    runs,
)
from thyroid_rlar.calculator import calculation_html, calculation_of
from thyroid_rlar.ddti import FLAGS, clean_regions, read_case, read_ddti, read_regions
from thyroid_rlar.evaluation import SEGMENTATION
from thyroid_rlar.files import WORDS, DataError, read_json, read_parquet, read_whole, write_text
from thyroid_rlar.images import examine, fill_contours, read_gray, read_mask
from thyroid_rlar.latent_figures import as_csv
from thyroid_rlar.parameters import ParameterError, RunSettings
from thyroid_rlar.radiomics import NAMES
from thyroid_rlar.records import COLUMNS, Manifest
from thyroid_rlar.tirads import DDTI, Scale
from thyroid_rlar.training import TrainingStopped

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "fuzz_cases"
OWN = (DataError, ParameterError, TrainingStopped)
SECONDS, MEGABYTES = 1.0, 500


class Reader(NamedTuple):
    seeds: Callable[[], list[bytes]]           # good inputs, to be damaged
    read: Callable[[bytes], None]              # what is tried
    share: int                                 # of a million inputs, in thousands
    structured: bool = False                   # seeds are JSON, whose values are replaced; otherwise bytes are


class Slow(BaseException): "An input took a second of CPU time."


# ---- damage -----------------------------------------------------------------------------------------------------------

TOKENS = [b"", b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x80\0\0\0", b"-1", b"0", b"1e999", b"nan", b"9" * 30, b"9" * 5000, b"\xed\xb2\x80",
          b"\xc2\xb2", b"\n", b'"', b"'", b",", b";", b"<", b">", b"&amp;", b"<![CDATA[", b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"[", b"]", b"{", b"}",
          b"../", b"/etc/passwd", b"~x/", b"%s", b"=1+1", b"null", b"true", b"[[[[", b"\xef\xbb\xbf", b"\x1b", "é".encode(), b"TR4", b"4a",
          b"points", b"x", b"scale"]


def damage(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    "One to a few random changes of bytes."
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        n, kind = len(out), rng.randrange(9)
        a = rng.randrange(n + 1)
        b = min(n, a + rng.choice((1, 2, 4, 8, 40, 300)))
        if kind == 0 and a < n: out[a] ^= 1 << rng.randrange(8)
        elif kind == 1 and a < n: out[a] = rng.randrange(256)
        elif kind == 2: del out[a:b]
        elif kind == 3: out[a:a] = out[a:b] * rng.choice((1, 2, 20))
        elif kind == 4: out[a:a] = rng.choice(TOKENS)
        elif kind == 5: out[a:b] = rng.choice(TOKENS)
        elif kind == 6: del out[a:]
        elif kind == 7: out[a:b] = rng.randbytes(b - a)
        else:
            other = rng.choice(others)
            c = rng.randrange(len(other) + 1)
            out[a:b] = other[c:c + rng.choice((1, 8, 60, 400))]
    return bytes(out[:200_000])


ODD = [None, True, False, 0, -1, 1, 2, 3, 31, 33, 64, 10**9, 10**18, 2**64, -0.5, 0.5, 1e-300, 1e300, math.inf, -math.inf, math.nan, "", " ", "0",
       "x", "all", "nan", "1e999", "9" * 400, "a" * 300, "a\0b", "\ud880", "~nobody/x", "../..", "/dev/null", "/proc/self", "<script>", "=1+1",
       "160x224", "32X32x32", "é", "\n", ",", "1,2,3", "true", [], {}, [[]], [1, 2], {"a": 1}]


def odd_value(rng: random.Random, value: object) -> object:
    "Another value in the place of this one."
    if rng.random() < .7: return rng.choice(ODD)
    if isinstance(value, str): return damage(value.encode("utf-8", "replace"), [b"x"], rng).decode("utf-8", "replace")
    if isinstance(value, (int, float)): return rng.choice((value + 1, value * 2, -value, float(value), str(value), value * 1e9))
    return rng.choice(ODD)


def replace_some(value: object, rng: random.Random, rate: float) -> object:
    "JSON with some of its values, keys and items replaced, left out or doubled."
    if rng.random() < rate: return odd_value(rng, value)
    if isinstance(value, dict):
        kept = {k: replace_some(v, rng, rate) for k, v in value.items() if rng.random() >= rate}
        return kept | ({rng.choice(("x", "_", "", "image_id", "é")): rng.choice(ODD)} if rng.random() < rate / 2 else {})
    if isinstance(value, list):
        kept = [replace_some(v, rng, rate) for v in value if rng.random() >= rate / 3]
        return kept * 2 if kept and rng.random() < rate / 3 else kept
    return value


def inputs(reader: Reader, start: str) -> Iterator[bytes]:
    "Damaged inputs without end, told by `start`."
    rng, seeds = random.Random(start), reader.seeds()
    while True:
        seed = rng.choice(seeds)
        if not reader.structured: yield damage(seed, seeds, rng)
        else: yield json.dumps(replace_some(json.loads(seed), rng, rng.choice((.02, .05, .2)))).encode()


# ---- readers ----------------------------------------------------------------------------------------------------------

BASE = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())    # in memory where that is possible
WORK = Path(tempfile.mkdtemp(prefix="fuzz-", dir=BASE))


PATHS: dict[str, Path] = {}


def put(name: str, data: bytes) -> Path:
    "Write a file in the folder of this process; done a million times, so without detours."
    if name not in PATHS:
        PATHS[name] = WORK / name
        PATHS[name].parent.mkdir(parents=True, exist_ok=True)
    file = os.open(PATHS[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(file, data)
    os.close(file)
    return PATHS[name]


def as_bytes(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


SQUARE = [{"x": x, "y": y} for x, y in ((5, 5), (30, 5), (30, 20), (5, 20))]
SVG = [json.dumps([{"points": SQUARE, "annotation": {}, "regionType": "freehand"}] * 2),
       json.dumps([{"points": [{"x": 4 * k % 50, "y": 7 * k % 44 - 2.5} for k in range(40)], "regionType": "freehand"}, {"points": SQUARE[:2]}])]
XML = [f"<?xml version='1.0' encoding='UTF-8'?>\n<case><number>7</number><age>40</age><sex>F</sex><composition>solid</composition>"
       f"<margins>ill- defined</margins><tirads>{grade}</tirads><mark><image>1</image><svg>{svg}</svg></mark>"
       f"<mark><image>2</image><svg>{SVG[0]}</svg></mark></case>"
       for grade, svg in (("4a", SVG[0]), ("", SVG[1]), ("5", ""))]
SHAPE = (45, 60)


def check_contours(regions: list) -> tuple[list | None, set[str]]:
    contours, flags = clean_regions(regions, SHAPE)
    assert flags <= set(FLAGS) and COLUMNS["contours"][0](contours)
    return contours, flags


def read_svg(data: bytes) -> None:
    contours, _ = check_contours(read_regions(data.decode("utf-8", "replace"))[0])
    if contours and not data[-1] % 8: assert fill_contours(contours, SHAPE).shape == SHAPE


def read_xml(data: bytes) -> None:
    case = read_case(put("xml/7.xml", data))
    assert case.flags <= set(FLAGS)
    for svgs in case.svgs.values(): check_contours([region for svg in svgs for region in read_regions(svg)[0]])


def ddti_folders() -> list[bytes]:
    "Name of a file -> its bytes, as Latin-1."
    noise = np.random.default_rng(0).integers(0, 255, SHAPE, dtype=np.uint8)
    files = {f"7_{k}.jpg": as_bytes(lambda f, k=k: Image.fromarray(noise[::-1 if k > 1 else 1]).save(f, "JPEG", quality=20)) for k in (1, 2)}
    files |= {"7.xml": XML[0].encode(), "8.xml": XML[1].replace("<number>7", "<number>8").encode(), "8_1.jpg": files["7_1.jpg"]}
    return [json.dumps({name: data.decode("latin-1") for name, data in files.items()}).encode()]


def read_ddti_folder(data: bytes) -> None:
    "Files with odd names or contents beside each other, as a whole data set."
    files, path = json.loads(data), WORK / "ddti"
    path.mkdir(exist_ok=True)
    for old in path.iterdir(): old.unlink()
    for name, content in files.items() if isinstance(files, dict) else ():
        if name.strip(".") and "/" not in name and "\0" not in name and len(name.encode("utf-8", "replace")) < 200:
            (path / name.encode("utf-8", "replace").decode()).write_bytes(str(content).encode("latin-1", "replace"))
    manifest = read_ddti(path, verbose=False)
    manifest._repr_markdown_(), manifest.to_parquet(WORK / "ddti.parquet")
    assert len(Manifest.from_parquet(WORK / "ddti.parquet", root=path)) == len(manifest) <= len(files)
    for i in range(len(manifest)): assert manifest.load(i)[0].dtype == np.uint8


TABLES = [b"image,case,grade\na.png,1,TR4\nb.png,2,TR2\n",
          b"\xef\xbb\xbfimage,case,grade,mask,scale,view,spacing_mm,reader,group,size_cm\r\na.png,1,4a,a.png,ddti,transverse,0.1,r,g,1.5\r\n"
          b'b.png,"2",5,"b.png",ddti,"x, y",,"=1+1",,3\r\n', b"case,grade,image\n1,,images/a.png\n2,TR1,./images/b.png\n1,TR5,../a.png\n"]


def folder_of_two() -> Path:
    if not (WORK / "folder/images/a.png").exists():
        for name in ("images/a.png", "images/b.png", "masks/a.png"):
            put(f"folder/{name}", as_bytes(lambda f: Image.effect_noise((24, 16), 40).save(f, "PNG")))
    return WORK / "folder"


def read_labels(data: bytes) -> None:
    path = folder_of_two() / "labels.csv"
    path.write_bytes(data)
    table = folder.read_table(path)
    folder._check_table(path, table, folder._find_scale(path, table, None))
    for row in table[:20]:
        with suppress(DataError): folder._lookup(path.parent, [f"images/{row['image']}", row["image"]])
        calculation_html(calculation_of(row, None))
    if zlib.crc32(data) % 128 and data not in TABLES: return         # the rest takes a hundred times as long
    manifest = folder.read_folder(path.parent, verbose=False)
    manifest._repr_markdown_(), as_csv(manifest.rows), manifest.to_parquet(WORK / "folder/m.parquet")
    assert len(Manifest.from_parquet(WORK / "folder/m.parquet")) == len(manifest)


def good_manifest(extra: bool = True) -> Manifest:
    rows = {"image_id": ["1_1", "1_2"], "case_id": ["1", "1"], "group": ["1", "1"], "image": ["1_1.jpg", "1_2.jpg"], "grade": ["4a", None],
            "contours": [[[(5., 5.), (30., 5.), (30., 20.)]], None], "flags": [("arrow",), ()], "spacing_mm": [.1, math.nan]}
    return Manifest(pd.DataFrame(rows | ({"age": [4.5, 2]} if extra else {})), WORK, DDTI, "ddti")


def good_images() -> loader.Prepared:
    "Its images as the network sees them, of chance."
    arrays = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 96), np.uint8)
    return loader.Prepared(good_manifest(), arrays, np.array([True, False]), [])


def manifests() -> list[bytes]:
    found = []
    for extra in (True, False):
        good_manifest(extra).to_parquet(WORK / "good.parquet")
        found.append((WORK / "good.parquet").read_bytes())
    return found


def read_manifest(data: bytes) -> None:
    m = Manifest.from_parquet(put("m.parquet", data))
    m.describe(), m._repr_markdown_(), m.summary()
    for i in range(min(3, len(m))):
        with suppress(DataError): m.load(i)


def manifest_parts() -> list[bytes]:
    m = good_manifest()
    about = {"root": str(WORK), "source": "ddti", "scale": [DDTI.name, DDTI.grades, DDTI.high], "left_out": [["x.png", "cut"]]}
    return [json.dumps({"rows": json.loads(m.rows.to_json(orient="columns")), "about": about}).encode()]


def read_rows(data: bytes) -> None:
    "Rows and what stands beside them, odd but in a whole file."
    parts = json.loads(data)
    if not isinstance(parts, dict) or not isinstance(rows := parts.get("rows"), dict): return
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        table = pa.table({str(k): list(v.values()) for k, v in rows.items()})
        pq.write_table(table.replace_schema_metadata({b"manifest": json.dumps(parts.get("about")).encode()}), WORK / "rows.parquet")
    except (AttributeError, OverflowError, TypeError, ValueError, pa.ArrowException): return         # no such file can be
    read_manifest((WORK / "rows.parquet").read_bytes())
    frame = pd.DataFrame({k: pd.Series(list(v.values()), dtype=object) for k, v in rows.items()})
    Manifest(frame, WORK, Scale("ddti", DDTI.grades, DDTI.high), "x").describe()


PARAMETERS = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(RunSettings()).items()}


def read_parameters(data: bytes) -> None: parameters.check_parameters(json.loads(data))


def run_dir() -> Path:
    "A folder that has the files of a finished run."
    if not (WORK / "run/split.parquet").exists():
        for name in ("model.json", "model.safetensors", "params.json", "split.parquet", "metrics.json"): put(f"run/{name}", b"{}")
    return WORK / "run"


OTHERS = {
    "evaluate": (predictions.check_evaluation,
                 lambda: dict(run_dir=str(run_dir()), source="folder", data_dir="x", out_dir="x", reader="r", part="auto")),
    "explore": (opened.check_exploring, lambda: dict(run_dir=str(run_dir()), source=None, data_dir=None, images="unseen", nodules=2, out_dir=None)),
    "probe": (interference.check_probe, lambda: dict(run_dirs=f"{run_dir()},{run_dir()}", out_dir=None, images=20, shares="0.1,0.01")),
    "benchmark": (benchmark.check_benchmark, lambda: dict(networks="default,unet", methods="all", rounds=6, threads="2,1", image_size="160x224",
                                                          batch_size=8, out_dir="x")),
    "dial": (dial.check_dial, lambda: dict(dials="-1,0,1", seeds="0,1", objectives="sum,rlar", epochs=6, phantom_images=480, image_size="64x96",
                                           out_dir="x")),
    "compare": (lambda v: parameters.typed_parameters(v, {"runs_dir": "", "baseline": None, "out_dir": None, "fresh_heads": False, "keep": None}),
                lambda: dict(runs_dir="a,b", baseline="sum", out_dir=None, fresh_heads=False, keep=None)),
    "size": (lambda v: parameters.read_size(v["size"]) if isinstance(v, dict) and "size" in v else None, lambda: dict(size=[160, "224"])),
}


def read_others(data: bytes) -> None:
    found = json.loads(data)
    if not (isinstance(found, list) and len(found) == 2 and isinstance(found[0], str) and found[0] in OTHERS): return
    values = found[1]
    if isinstance(values, dict) and not str(values.get("run_dirs", WORK)).startswith(str(WORK)): return       # it would look through the disk
    OTHERS[found[0]][0](values)


def read_params(data: bytes) -> None:
    put("params/params.json", data)
    runs.recorded_settings(WORK / "params")


def model_json() -> list[bytes]:
    settings = asdict(network.NetworkSettings(grades=6, evidence=len(NAMES)))
    scaler = {k: [float(n) for n in range(len(NAMES))] for k in radiomics.EvidenceScaler.FIELDS}
    return [json.dumps({"network": settings, "scale": "ddti", "image_size": [160, 224], "evidence": list(NAMES), "scaler": scaler,
                        "objective": "rlar", "tasks": ["seg", "risk", "evidence"]}).encode()]


def read_model_json(data: bytes) -> None:
    path = put("model/model.json", data)
    info = read_json(path, "network")
    try: settings = network.recorded_network(info["network"])
    except (AttributeError, KeyError, TypeError, ValueError) as e: raise DataError(path) from e        # as `load_model` has it
    assert settings.grades <= 100 and settings.embedding <= 1024
    predictions.check_info(path, info)


SMALL = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))


def weights() -> list[bytes]:
    save_file(SMALL.state_dict(), WORK / "good.safetensors")
    return [(WORK / "good.safetensors").read_bytes()]


def read_weights(data: bytes) -> None:
    read_whole(put("w.safetensors", data), lambda p: SMALL.load_state_dict(network.load_file(p)))


def checkpoints() -> list[bytes]:
    state = dict(net=SMALL.state_dict(), epoch=3, best=.5, torch_rng=torch.get_rng_state()[:64], objective={"weight": torch.ones(2)},
                 optimizer=torch.optim.Adam(SMALL.parameters()).state_dict())
    return [as_bytes(lambda f: torch.save(state, f))]


def read_checkpoint(data: bytes) -> None:
    read_whole(put("state.pt", data), lambda p: torch.load(p, map_location="cpu", weights_only=True))


def pictures() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 255, (*SHAPE, 4), dtype=np.uint8)
    grey, colour, alpha = Image.fromarray(noise[..., 0]), Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    wide, real = Image.fromarray(noise[..., 0].astype(np.uint16) * 99), Image.fromarray(noise[..., 0].astype(np.float32))
    made = [(grey, "JPEG", {}), (colour, "JPEG", {"progressive": True}), (grey, "PNG", {}), (alpha, "PNG", {}), (colour.quantize(16), "PNG", {}),
            (wide, "PNG", {}), (grey, "BMP", {}), (colour, "BMP", {}), (grey, "TIFF", {}), (real, "TIFF", {}),
            (colour, "TIFF", {"compression": "tiff_deflate"}),
            (grey, "TIFF", {"compression": "tiff_lzw"}), (grey, "TIFF", {"compression": "packbits"})]
    return [as_bytes(lambda f, i=i, k=k, o=o: i.save(f, k, **o)) for i, k, o in made]


def read_picture(data: bytes, name: str = "picture.png") -> None:
    path = put(name, data)
    facts, values = examine(path), read_gray(path)
    assert values.dtype == np.uint8 and values.shape == facts.shape and read_mask(path, facts.shape).dtype == bool


def dicoms() -> list[bytes]:
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless, UltrasoundImageStorage
    noise, found = np.random.default_rng(0).integers(0, 255, (*SHAPE, 3), dtype=np.uint8), []
    for syntax, kind, bits in ((ExplicitVRLittleEndian, "MONOCHROME2", 8), (ImplicitVRLittleEndian, "MONOCHROME1", 16),
                               (ExplicitVRLittleEndian, "RGB", 8), (JPEGBaseline8Bit, "MONOCHROME2", 8), (RLELossless, "MONOCHROME2", 8)):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = UltrasoundImageStorage, "1.2.3", syntax
        ds = FileDataset("a.dcm", {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality, ds.PhotometricInterpretation = UltrasoundImageStorage, "1.2.3", "US", kind
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PixelSpacing, ds.PixelRepresentation = *SHAPE, 3 if kind == "RGB" else 1, [.1, .1], 0
        ds.BitsAllocated = ds.BitsStored = bits
        ds.HighBit, ds.NumberOfFrames = bits - 1, 1
        if kind == "RGB": ds.PlanarConfiguration = 0
        ds.SequenceOfUltrasoundRegions = [Dataset()]
        ds.SequenceOfUltrasoundRegions[0].RegionSpatialFormat = 1
        pixels = noise if kind == "RGB" else noise[..., 0].astype(np.uint16 if bits == 16 else np.uint8)
        if syntax == JPEGBaseline8Bit: ds.PixelData = encapsulate([as_bytes(lambda f, p=pixels: Image.fromarray(p).save(f, "JPEG"))])
        else: ds.PixelData = pixels.tobytes()
        if syntax == RLELossless:
            ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            ds.compress(RLELossless)
        found.append(as_bytes(lambda f, ds=ds: ds.save_as(f, enforce_file_format=True)))
    return found


def read_dicom(data: bytes) -> None:
    read_picture(data, "picture.dcm")
    spacing, flags = folder.dicom_facts(WORK / "picture.dcm")
    assert flags <= set(folder.FLAGS) and (math.isnan(spacing) or 0 < spacing < math.inf)


def arrays() -> list[bytes]:
    ids, z = np.array(["1_1", "2_1", "3_1"]), np.random.default_rng(0).random((3, 4), dtype=np.float32)
    kept = dict(image_id=ids, row=np.arange(3), split=np.array(["val"] * 3), z=z)
    drawn = dict(key="k", method="pca", axes=("a", "b"), note="", now_image_id=ids, now_x=z[:, 0], now_y=z[:, 1], before_epoch=np.arange(3))
    return [as_bytes(lambda f, a=a, save=save: save(f, **a)) for a in (kept, drawn) for save in (np.savez, np.savez_compressed)]


def read_latents(data: bytes) -> None:
    put("latents/latents/003.npz", data)
    latent._read_map(WORK / "latents/latents/003.npz", "k")
    latent.saved_latents(WORK / "latents")


def tables() -> list[bytes]:
    history = pd.DataFrame({"kind": ["epoch"], "split": ["val"], "epoch": [0], "loss": [.5]})
    cache = pd.DataFrame({name: np.float32([1, 2]) for name in NAMES} | {"reason": ["", "x"]}, index=["a", "b"])
    return [as_bytes(t.to_parquet) for t in (history, cache)]


def read_tables(data: bytes) -> None:
    path = put("t.parquet", data)
    assert list(radiomics._read_cache(path).columns) == [*NAMES, "reason"]
    assert {"kind", "split"} <= set(read_parquet(path, "kind", "split").columns)


def put_columns(name: str, columns: object) -> None:
    "A table from its columns; nothing where there can be no such file."
    with suppress(Exception): put(name, as_bytes(pd.DataFrame({k: pd.Series(v) for k, v in columns.items()}).to_parquet))


def put_tables(folder: str, data: bytes) -> None:
    "A run's tables with odd values in whole files; the good ones where there can be no such file."
    for name, columns in RUN_TABLES.items(): put(f"{folder}/{name}.parquet", as_bytes(pd.DataFrame(columns).to_parquet))
    for name, columns in found.items() if isinstance(found := json.loads(data), dict) else ():
        if name in RUN_TABLES: put_columns(f"{folder}/{name}.parquet", columns)


PARTS = ["train", "val", "test"]
RUN_TABLES = {
    "split": {"image_id": ["1_1", "1_2", "2_1"], "case_id": ["1", "1", "2"], "group": ["1", "1", "2"], "split": PARTS, "digest": ["a", "b", "c"],
              "labels": ["d", "e", "f"], "look": ["00" * 36, "ff" * 36, "5a" * 36]},
    "history": {"kind": ["step", "epoch", "epoch"], "split": ["train", "train", "val"], "epoch": [0, 0, 0], "loss_seg": [1.0, 0.9, 1.1],
                "excess": [math.nan, 0.1, 0.2], "excess_shuffled": [math.nan, 0.0, 0.1], "strength": [math.nan, math.nan, 0.1],
                "rlar_weight": [1.0, math.nan, 1.0], "cos_pooled_std": [math.nan, 0.1, 0.2], "dice": [math.nan, 0.5, 0.6]},
    "predictions": {"image_id": ["1_1", "1_2", "2_1"], "case_id": ["1", "1", "2"], "group": ["1", "1", "2"], "split": ["test"] * 3,
                    "grade": ["2", None, "5"], "grade_index": [0.0, math.nan, 5.0], **{f"p_{g}": [1 / 6] * 3 for g in DDTI.grades},
                    "predicted_index": [2, 2, 3], **{k: [0.5, 0.6, math.nan] for k in SEGMENTATION}, "excess": [0.1, 0.2, 0.3],
                    "excess_shuffled": [0.1] * 3, **{f"{kind}_{item}": [0.5, math.nan, 1.0] for kind in ("measured", "predicted") for item in NAMES}},
    "fresh_head": {"image_id": ["1_1", "1_2", "2_1"], "group": ["1", "1", "2"], "excess": [0.1, 0.2, 0.3]},
}


def run_tables(*names: str) -> list[bytes]: return [json.dumps({name: RUN_TABLES[name] for name in names}).encode()]


def trained_folder() -> Path:
    "A run's folder whose model is never built: that is another reader's."
    if not (WORK / "trained/model.json").exists():
        put("trained/model.json", json.dumps({"scale": "ddti"}).encode())
        put("trained/params.json", json.dumps({"parameters": PARAMETERS}).encode())
        predictions.load_model = lambda _: (None, json.loads(model_json()[0]))
        for name in ("1_1.jpg", "1_2.jpg"): put(name, as_bytes(lambda f: Image.effect_noise((60, 45), 40).save(f, "JPEG")))
    return WORK / "trained"


def read_split(data: bytes | None) -> None:
    "split.parquet as an evaluation, an explorer, and a run that goes on read it."
    run, prepared = trained_folder(), good_images()
    if data is not None: put("trained/split.parquet", data)
    trained = predictions.load_run(run)
    assert predictions.unseen(prepared, trained.split).dtype == bool
    assert set(opened._split_of(prepared, trained.split)[0]) <= {*PARTS, "", "new"}
    runs.check_split(pd.DataFrame(RUN_TABLES["split"]), run)


def read_split_values(data: bytes) -> None:
    trained_folder(), put_tables("trained", data), read_split(None)


INFO = {"tasks": ["seg", "risk", "evidence"], "evidence": list(NAMES)}
KEPT = {name: ["x", "y"] if name in WORDS else [0.5, 1.0] for name in (*opened._columns(INFO, DDTI), "z0", "z1", "z2")} | {"predicted": ["2", "4a"]}


def read_kept(data: bytes | None) -> None:
    "The table that explorers keep: what cannot be one is made anew, so that it always ends in a table."
    images = good_manifest().rows
    made = pd.DataFrame({k: v for k, v in KEPT.items() if not k.startswith("z")}).assign(**images[opened._IDS])
    if data is not None: put("kept/images.parquet", data)
    table, z = opened._kept(WORK / "kept/images.parquet", lambda: (made, np.zeros((2, 3), np.float32)), images, opened._columns(INFO, DDTI), DDTI)
    assert {name for name in KEPT if not name.startswith("z")} <= {*table} and z.shape == (2, 3) and np.isfinite(z).all()
    assert opened.most_telling(table).row.isin([0, 1]).all() and table.image_id.tolist() == images.image_id.tolist()


def read_kept_values(data: bytes) -> None: put_columns("kept/images.parquet", json.loads(data)), read_kept(None)


def read_compared(data: bytes) -> None:
    "A run's tables as compare.ipynb reads them; its own ValueErrors and the lack of a run are sentences, too."
    run = trained_folder()
    put_tables("trained", data)
    try:
        table = compare.with_fresh_heads(compare.read_runs(run))
        if len(table) and not zlib.crc32(data) % 8: compare.guidance(table, table.method[0])         # takes as long as all others
        compare.pooled(table, DDTI)
        compare.course(run), compare.keep_run(run, WORK / "copy")
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, OWN) or not re.match(r"predictions: |.*expected one|.*no finished runs", str(error)): raise
        raise DataError(run, "tables", error, "those of a run") from error


def indices() -> list[bytes]:
    return [json.dumps([{"has_mask": True, "flags": ["two_panes"], "shape": [40, 60], "box": [0, 0, 40, 60], "inner": [1, 2, 30, 40]}] * 2).encode()]


def read_index(data: bytes) -> None: read_whole(put("index.json", data), loader._read_index)


def confusion_table() -> list[bytes]: return [(ROOT / "data" / "reader_confusion.csv").read_bytes()[:1500].rsplit(b"\n", 1)[0] + b"\n"]


def read_confusion(data: bytes) -> None:
    path = put("confusion.csv", data)
    with suppress(DataError): readers._in_terms(readers._read_codes(path), path)
    readers.load_reader_confusion(path)


CODES = (b"Case ID,Nodule Number,Size (cm),a Composition,a Echogenicity,a Shape,a Margins,a No echogenic foci,a Large comet tail,"
         b"a Macrocalcifications,a Peripheral calcifications,a Punctate foci,TIRADS points,Reader TIRADS grade,Reader TIRADS rec\n"
         b"1,1,1.5,2,1,0,0,1,0,0,0,0,3,3,0\n2,1,0.7,2,2,3,2,0,0,1,0,1,9,5,1\n")

READERS = {
    "svg": Reader(lambda: [s.encode() for s in SVG], read_svg, 171),
    "regions": Reader(lambda: [s.encode() for s in SVG], read_svg, 50, True),
    "xml": Reader(lambda: [x.encode() for x in XML], read_xml, 90),
    "ddti": Reader(ddti_folders, read_ddti_folder, 20, True),
    "labels": Reader(lambda: TABLES, read_labels, 60),
    "picture": Reader(pictures, read_picture, 35),
    "parameters": Reader(lambda: [json.dumps(PARAMETERS).encode()], read_parameters, 60, True),
    "other_parameters": Reader(lambda: [json.dumps([name, make()]).encode() for name, (_, make) in OTHERS.items()], read_others, 60, True),
    "params_json": Reader(lambda: [json.dumps({"parameters": PARAMETERS}).encode()], read_params, 70),
    "params_values": Reader(lambda: [json.dumps({"parameters": PARAMETERS}).encode()], read_params, 50, True),
    "model_json": Reader(model_json, read_model_json, 70),
    "model_values": Reader(model_json, read_model_json, 40, True),
    "dicom": Reader(dicoms, read_dicom, 4),
    "weights": Reader(weights, read_weights, 90),
    "checkpoint": Reader(checkpoints, read_checkpoint, 6),
    "latents": Reader(arrays, read_latents, 6),
    "index": Reader(indices, read_index, 60),
    "index_values": Reader(indices, read_index, 40, True),
    "confusion": Reader(lambda: [*confusion_table(), CODES], read_confusion, 2),
    "tables": Reader(tables, read_tables, 2),
    "split": Reader(lambda: [as_bytes(pd.DataFrame(RUN_TABLES["split"]).to_parquet)], read_split, 2),
    "split_values": Reader(lambda: run_tables("split"), read_split_values, 2, True),
    "kept": Reader(lambda: [as_bytes(pd.DataFrame(KEPT).to_parquet)], read_kept, 2),
    "kept_values": Reader(lambda: [json.dumps(KEPT).encode()], read_kept_values, 2, True),
    "compared": Reader(lambda: run_tables("predictions", "history", "fresh_head"), read_compared, 1, True),
    "manifest": Reader(manifests, read_manifest, 3),
    "rows": Reader(manifest_parts, read_rows, 2, True),
}


# ---- trying -----------------------------------------------------------------------------------------------------------

@contextmanager
def bounded(megabytes: int = 2 * MEGABYTES) -> Iterator[None]:
    "Within: no memory beyond what is used now and so much more; a second of CPU time raises `Slow` where the timer is set."
    def too_slow(*_): raise Slow
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, old = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, before[1]))
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, old)


def megabytes() -> float:
    "Memory of this process now."
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * resource.getpagesize() / 2**20


@contextmanager
def peak() -> Iterator[Callable[[], float]]:
    """By how many MB the memory was at most larger than at the beginning. The system's own high-water mark is set back to do that: that of
    getrusage is as old as the process, or as its parent, so that whatever stays below an earlier peak would not be seen."""
    Path("/proc/self/clear_refs").write_text("5")
    before = megabytes()
    yield lambda: int(re.search(rb"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_bytes())[1]) / 1024 - before


STARVED = re.compile("allocate|bad_alloc|out of memory|malloc of size|while allocating", re.IGNORECASE)
REFUSED = ("a head that tells of more values than there are",)         # by latent._arrays: NumPy asks for them before it reads


def starved(error: BaseException | None) -> BaseException | None:
    "The lack of memory behind one of our own errors, which is a finding, too; None where there is none, or the reader has met it on purpose."
    chain = []
    while error is not None and error not in chain:
        if any(words in str(error) for words in REFUSED): return None
        chain.append(error)
        error = error.__cause__ or error.__context__
    return next((e for e in chain if isinstance(e, MemoryError) or isinstance(e, RuntimeError) and STARVED.search(str(e))), None)


def attempt(read: Callable[[bytes], None], data: bytes) -> tuple[str, float, float, BaseException | None]:
    """How it ended (record, own or crash), seconds of CPU time, MB of memory, and what was raised that should not be. What is too slow is
    tried once more and counts if it is slow again: a virtual machine may take a second for the first use of memory that its host has to find."""
    found = _attempt(read, data)
    return _attempt(read, data) if isinstance(found[3], Slow) else found


def _attempt(read: Callable[[bytes], None], data: bytes) -> tuple[str, float, float, BaseException | None]:
    start, left, error, how = time.process_time(), SECONDS, None, "record"
    with peak() as grown:
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try: read(data)
            finally: left, _ = signal.setitimer(signal.ITIMER_PROF, 0)      # where the timer may strike yet
        except OWN as e: how, error = "own", starved(e)
        except (Exception, Slow) as e: how, error = "crash", e
        seconds, memory = time.process_time() - start, grown()
    if error is None and not left: error = Slow()                           # a handler of the reader's swallowed it
    if error is None and memory > MEGABYTES: error = MemoryError(f"{memory:.0f} MB")
    return how if error is None else "crash", seconds, memory, error


def where(error: BaseException) -> str:
    "Type and place of an error, by which two crashes are the same."
    trace, at = error.__traceback__, ""
    while trace:
        if "thyroid_rlar" in (name := trace.tb_frame.f_code.co_filename): at = f"{Path(name).name}:{trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return f"{type(error).__name__} in {at}"


def keep(name: str, data: bytes, error: BaseException, seen: set[str]) -> None:
    "Put the first input of each kind of crash aside, as a case that the tests try from now on."
    if (kind := f"{name}: {where(error)}") in seen: return
    seen.add(kind)
    path = CASES / name / hashlib.sha256(data).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    print(f"CRASH {kind}: {str(error)[:300]!r}, kept as {path.relative_to(ROOT)}", flush=True)


def try_some(name: str, data: Iterator[bytes], n: int, seen: set[str]) -> dict[str, float]:
    "Counts and costs of the next n inputs."
    got, before, start = dict(inputs=0, record=0, own=0, crash=0, slowest_s=0.0, memory_mb=0.0), megabytes(), time.perf_counter()
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(n):
            put("last", one := next(data))                  # should it end the process
            how, seconds, memory, error = attempt(READERS[name].read, one)
            got["inputs"] += 1
            got[how] += 1
            got |= {"slowest_s": max(got["slowest_s"], seconds), "memory_mb": max(got["memory_mb"], memory)}
            if error is not None: keep(name, one, error, seen)
    kept = megabytes() - before                             # by all together
    if kept > MEGABYTES: keep(name, one, MemoryError(f"{kept:.0f} MB are not given back"), seen)
    return got | {"memory_mb": max(got["memory_mb"], kept), "seconds": time.perf_counter() - start}


def merged(old: dict, new: dict) -> dict:
    "Counts of two batches together."
    both = {k: max(old.get(k, 0), v) if k in ("slowest_s", "memory_mb") else old.get(k, 0) + v for k, v in new.items()}
    return {k: round(v, 4) for k, v in both.items()} | {"batches": old.get("batches", 0) + 1}


def store(results: Path, name: str, got: dict) -> dict:
    found = json.loads(results.read_text()) if results.exists() else {}
    found[name] = merged(found.get(name, {}), got)
    write_text(results, json.dumps(found, indent=1) + "\n")
    return found


def warm_up(names: list[str]) -> None:
    "Read all good inputs once, so that loading libraries is not counted as reading."
    for name in names:
        for seed in READERS[name].seeds():
            with suppress(*OWN): READERS[name].read(seed)
    gc.freeze()         # what the libraries made: never looked through again, nor copied into the processes


def batch(results: Path, name: str, n: int) -> None:
    "The next batch of a reader, in a process of its own: its memory is then its own, and a crash of the interpreter is seen."
    found = json.loads(results.read_text()) if results.exists() else {}
    data = inputs(READERS[name], f"{name} {found.get(name, {}).get('batches', 0)}")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store(results, name, try_some(name, data, n, set()))
            code = 0
        finally: os._exit(code)
    if (status := os.waitpid(child, 0)[1]):
        keep(name, (WORK / "last").read_bytes(), RuntimeError(f"the process ended with status {status}"), set())
        store(results, name, dict(inputs=1, record=0, own=0, crash=1, slowest_s=0.0, memory_mb=0.0, seconds=0.0))


def guided(results: Path, name: str, n: int) -> None:
    "So many inputs that atheris makes, guided by the branches that were reached; it ends the process."
    if READERS[name].structured: raise SystemExit(f"{name}: takes values, not bytes; expected another reader with --atheris")
    atheris = importlib.import_module("atheris")
    seen, got = set(), dict(inputs=0, record=0, own=0, crash=0, slowest_s=0.0, memory_mb=0.0, seconds=0.0)
    corpus, start = WORK / "corpus", time.perf_counter()
    corpus.mkdir()
    for k, seed in enumerate(READERS[name].seeds()): (corpus / str(k)).write_bytes(seed)
    warnings.simplefilter("ignore")

    def one(data: bytes) -> None:
        how, seconds, memory, error = attempt(READERS[name].read, data)
        got["inputs"] += 1
        got[how] += 1
        got.update(slowest_s=max(got["slowest_s"], seconds), memory_mb=max(got["memory_mb"], memory))
        if error is not None: keep(name, data, error, seen)
        if got["inputs"] == n: store(results, name, got | {"seconds": time.perf_counter() - start})

    for module in (folder, runs, sys.modules["thyroid_rlar.ddti"], sys.modules["thyroid_rlar.images"]):
        for value in list(vars(module).values()):
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and hasattr(value, "__code__"): atheris.instrument_func(value)
    signal.signal(signal.SIGPROF, lambda *_: (_ for _ in ()).throw(Slow()))
    atheris.Setup([sys.argv[0], f"-runs={n}", "-max_len=20000", "-rss_limit_mb=0", "-print_final_stats=0", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    asked.add_argument("--inputs", type=int, default=0, help="so many more of each reader")
    asked.add_argument("--minutes", type=float, default=0, help="and no longer than this")
    asked.add_argument("--total", type=int, default=0, help="until so many inputs have been tried in all")
    asked.add_argument("--atheris", action="store_true", help="guided by coverage")
    asked.add_argument("--results", type=Path, help="default: data/results/fuzz.json, with --atheris fuzz_guided.json")
    a = asked.parse_args()
    a.results = a.results or ROOT / "data" / "results" / ("fuzz_guided.json" if a.atheris else "fuzz.json")
    torch.set_num_threads(1)
    warm_up(a.readers)
    if a.atheris: return guided(a.results, a.readers[0], a.inputs or 10_000)
    counts = lambda: {name: n["inputs"] for name, n in (json.loads(a.results.read_text()) if a.results.exists() else {}).items()}
    start, end = counts(), time.monotonic() + 60 * a.minutes
    shares = sum(READERS[name].share for name in a.readers)
    goal = dict.fromkeys(a.readers, math.inf)
    if a.inputs: goal = {name: start.get(name, 0) + a.inputs for name in a.readers}
    if a.total: goal = {name: a.total * READERS[name].share / shares for name in a.readers}
    while True:
        got = counts()
        left = {name: goal[name] - got.get(name, 0) for name in a.readers if got.get(name, 0) < goal[name]}
        if not left or a.minutes and time.monotonic() > end: break
        name = min(left, key=lambda name: got.get(name, 0) / READERS[name].share)       # in proportion
        batch(a.results, name, math.ceil(min(left[name], 100 * READERS[name].share)))
        print(f"{sum(counts().values()):>10,} inputs, last {name}", end="\r", flush=True)
    print(f"{sum(counts().values()):,} inputs in all")


if __name__ == "__main__":
    try: main()
    finally:
        import shutil
        shutil.rmtree(WORK, ignore_errors=True)
