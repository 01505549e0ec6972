"""Evidence: property tests, agreement with pyradiomics' own extractor, the cache when things go wrong, and its speed."""
import errno
import json
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from radiomics.featureextractor import RadiomicsFeatureExtractor
from scipy import ndimage

from thyroid_rlar import radiomics
from thyroid_rlar.files import DataError, shared_data
from thyroid_rlar.radiomics import EVIDENCE, NAMES, EvidenceScaler, measure, measure_manifest
from thyroid_rlar.records import Manifest
from thyroid_rlar.tirads import DDTI


def speckled(mask, inside=60.0, outside=100.0, seed=0):
    "Image uint8 (H, W): two grey levels under smooth multiplicative noise."
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=mask.shape), 1)
    return (np.where(mask, inside, outside) * (1 + 0.2 * noise / noise.std())).clip(0, 255).astype(np.uint8)


def ellipse(height=60, width=80, shape=(267, 360), centre=None):
    "Bool (H, W)."
    y, x = np.indices(shape)
    cy, cx = centre or (shape[0] / 2 - 0.5, shape[1] / 2 - 0.5)
    return np.hypot((y - cy) / (height / 2), (x - cx) / (width / 2)) <= 1


def items(mask, image=None, valid=None):
    image = speckled(mask) if image is None else image
    return dict(zip(NAMES, measure(image, mask, np.ones_like(mask) if valid is None else valid)[0]))


# ---- the items ------------------------------------------------------------------------------------------------------------------

def test_items_are_named_once_and_cover_the_lexicon():
    assert 10 <= len(EVIDENCE) <= 20 and len(set(NAMES)) == len(NAMES)
    assert {item.descriptor for item in EVIDENCE} == {"composition", "echogenicity", "shape", "margin", "echogenic foci"}


@pytest.mark.parametrize("height, width", [(40, 80), (60, 60), (90, 45), (100, 120)])
def test_tallness_is_the_log_ratio_of_the_axes(height, width):
    assert items(ellipse(height, width))["tallness"] == pytest.approx(np.log(height / width), abs=0.05)   # a pixel of 45


@pytest.mark.parametrize("diameter", [24, 48, 96, 160])
def test_a_disc_is_round_smooth_and_solid_at_every_size(diameter):
    found = items(ellipse(diameter, diameter))
    assert found["sphericity"] == pytest.approx(0.95, abs=0.03)   # a mesh on pixels is about 5 % longer than the circle
    assert found["solidity"] > 0.95 and found["roughness"] < 0.02


@given(lobes=st.integers(7, 14), depth=st.floats(0.03, 0.15))
@settings(max_examples=15, deadline=None)
def test_lobes_make_an_outline_rougher_and_less_solid(lobes, depth):
    y, x = np.indices((267, 360)) - np.array([133, 180])[:, None, None]
    lobed = np.hypot(y, x) <= 50 * (1 + depth * np.cos(lobes * np.arctan2(y, x)))
    smooth, rough = items(ellipse(100, 100)), items(lobed)
    assert rough["roughness"] > smooth["roughness"] + 0.3 * depth
    assert rough["solidity"] < smooth["solidity"] and rough["sphericity"] < smooth["sphericity"]


def test_echo_ratio_grows_with_the_nodules_grey_level():
    ratios = [items(mask := ellipse(), speckled(mask, level))["echo_ratio"] for level in (5, 30, 60, 100, 140)]
    assert ratios == sorted(ratios) and ratios[3] == pytest.approx(0, abs=0.05)


def test_foci_are_counted():
    mask = ellipse(120, 160)
    image = ndimage.gaussian_filter(speckled(mask).astype(float), 1)
    for k in range(7): image[100 + 10 * k:102 + 10 * k, 150 + 10 * k:152 + 10 * k] = 255
    assert np.expm1(items(mask, image.astype(np.uint8))["foci_count"]) == pytest.approx(7)


# ---- truths about all of them ---------------------------------------------------------------------------------------------------

@st.composite
def cases(draw):
    "Image, mask, valid: blobs of any number and size under random noise, and part of the box outside the sector."
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.tuples(st.integers(40, 200), st.integers(40, 260)))
    field = ndimage.gaussian_filter(rng.normal(size=shape), draw(st.floats(1, 15)))
    mask = field > np.quantile(field, draw(st.floats(0, 1)))
    valid = np.ones(shape, bool)
    valid[:, :draw(st.integers(0, shape[1]))] = draw(st.booleans())
    return (rng.normal(draw(st.integers(0, 255)), draw(st.integers(0, 60)), shape).clip(0, 255).astype(np.uint8), mask, valid)


@given(cases())
@settings(max_examples=40, deadline=None)
def test_whatever_comes_in_the_answer_is_finite_or_explained(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, reason = measure(*case)
    assert values.shape == (len(NAMES),) and values.dtype == np.float32
    assert not np.isinf(values).any()
    assert (reason == "") == np.isfinite(values).all()
    assert all(name in reason for name, v in zip(NAMES, values) if np.isnan(v)) or np.isnan(values).all()


@given(cases())
@settings(max_examples=25, deadline=None)
def test_a_left_right_flip_changes_nothing(case):
    np.testing.assert_allclose(measure(*(a[:, ::-1] for a in case))[0], measure(*case)[0], rtol=0.02, atol=0.02)


def test_items_do_not_depend_on_the_resolution_of_the_file():
    mask, fine = ellipse(), ellipse(120, 160, (534, 720))
    image = speckled(mask)
    doubled = np.asarray(Image.fromarray(image).resize((720, 534), Image.Resampling.BICUBIC))
    coarse, found = items(mask, image), items(fine, doubled)
    for name in set(NAMES) - {"bright_grain"}:      # zones of equal grey level are finest grain: they feel any resampling
        assert found[name] == pytest.approx(coarse[name], rel=0.05, abs=0.1), name


@pytest.mark.parametrize("stored", [np.uint8(1), np.uint8(255), np.float32(1)])
def test_the_masks_number_type_and_label_do_not_matter(stored):
    mask = ellipse()
    np.testing.assert_array_equal(measure(speckled(mask), mask * stored, np.ones_like(mask))[0], list(items(mask).values()))


def test_two_regions_are_averaged_by_area_and_specks_ignored():
    left, right = ellipse(60, 80, centre=(130, 90)), ellipse(40, 50, centre=(130, 270))
    image = speckled(left | right)
    both, one, two = (items(m, image) for m in (left | right, left, right))
    weight = left.sum() / (left | right).sum()
    for name in ("sphericity", "entropy", "tallness"):
        assert both[name] == pytest.approx(weight * one[name] + (1 - weight) * two[name], abs=1e-4)
    speck = left.copy(); speck[20:25, 300:306] = True
    assert items(speck, image) == pytest.approx(one, nan_ok=True, abs=1e-6)


def test_small_and_empty_masks_are_answered_without_pyradiomics(monkeypatch):
    monkeypatch.setattr(radiomics, "_pyradiomics", lambda *_: pytest.fail("pyradiomics was called"))
    for mask, said in ((np.zeros((267, 360), bool), "empty mask"), (ellipse(4, 4), "needed"), (ellipse(3, 120), "needed")):
        values, reason = measure(speckled(mask), mask, np.ones_like(mask))
        assert np.isnan(values).all() and said in reason


def test_sizes_that_differ_are_an_error_that_names_them():
    with pytest.raises(DataError, match=r"valid: found \(5, 5\), expected \(267, 360\)"):
        measure(speckled(ellipse()), ellipse(), np.ones((5, 5), bool))


# ---- the ring and pyradiomics ---------------------------------------------------------------------------------------------------

def test_the_ring_leaves_out_shadow_border_black_and_other_nodules():
    mask, other = ellipse(60, 80, centre=(120, 150)), ellipse(40, 40, centre=(120, 215))
    image, valid = speckled(mask).astype(np.float32), np.ones_like(mask)
    valid[:95], image[100:110, 100:108] = False, 0
    ring = radiomics._region(image, mask, other, valid)
    box = radiomics._window(mask, int(np.ceil(0.6 * ring.radius)) + 2)
    for left_out in (mask, other, ~valid, image <= radiomics.BLACK, (np.indices(mask.shape)[0] > 150) & mask.any(0)):
        assert left_out[box].any() and not (ring.ring & left_out[box]).any()
    assert ring.ring.sum() > 500


def test_a_shadow_behind_the_nodule_leaves_the_echo_ratio_alone():
    mask, image = ellipse(), speckled(ellipse())
    shaded = image.copy(); shaded[164:, 140:220] //= 8
    assert items(mask, shaded)["echo_ratio"] == pytest.approx(items(mask, image)["echo_ratio"], abs=0.02)
    assert items(mask, shaded)["posterior_echo"] < items(mask, image)["posterior_echo"] - 1


@pytest.mark.parametrize("height, width, level", [(40, 60, 60), (100, 80, 20), (25, 30, 120)])
def test_pyradiomics_own_extractor_gives_the_same_values(height, width, level):
    mask = ellipse(height, width)
    image = speckled(mask, level).astype(np.float32)
    extractor = RadiomicsFeatureExtractor(force2D=True, force2Ddimension=0, binWidth=16, label=1)
    wanted = {"firstorder": ["Entropy", "Median", "10Percentile", "90Percentile", "Mean", "Variance"],
              "shape2D": ["Sphericity"], "glszm": ["SmallAreaHighGrayLevelEmphasis"]}
    extractor.disableAllFeatures()
    extractor.enableFeaturesByName(**wanted)
    theirs = extractor.execute(*(sitk.GetImageFromArray(a[None]) for a in (image, mask.astype(np.uint8))))
    classes = {"firstorder": radiomics.RadiomicsFirstOrder, "shape2D": radiomics.RadiomicsShape2D, "glszm": radiomics.RadiomicsGLSZM}
    for group, names in wanted.items():
        ours = radiomics._pyradiomics(classes[group], image, mask, *names)
        np.testing.assert_allclose(ours, [theirs[f"original_{group}_{name}"] for name in names], rtol=1e-9)


# ---- data sets and their cache --------------------------------------------------------------------------------------------------

@pytest.fixture
def manifest(tmp_path):
    "Four rows under a path with a space and an accent: contour, mask file, neither, and the first image again."
    folder = tmp_path / "écho data"
    folder.mkdir()
    for k, mask in enumerate((ellipse(), ellipse(80, 60), ellipse())):
        Image.fromarray(np.pad(speckled(mask, seed=k), 40)).save(folder / f"{k}.png")
    Image.fromarray(np.pad(ellipse(80, 60), 40).astype(np.uint8) * 255).save(folder / "mask.png")
    contour = [[(180.0, 140.0), (260.0, 140.0), (260.0, 200.0), (180.0, 200.0)]]
    rows = pd.DataFrame({"image_id": list("abcd"), "case_id": list("abca"), "group": list("abca"), "image": ["0.png", "1.png", "2.png", "0.png"],
                         "contours": [contour, None, None, contour], "mask": [None, "mask.png", None, None]})
    return Manifest(rows, folder, DDTI, "test")


def test_rows_keep_their_order_and_missing_contours_their_reason(manifest, tmp_path):
    table = measure_manifest(manifest, tmp_path / "cache", n_jobs=1, progress=False)
    assert list(table.index) == list("abcd") and list(table.columns) == [*NAMES, "reason"]
    assert table.loc["c", "reason"] == "no contour" and table.loc["c", list(NAMES)].isna().all()
    assert (table.loc["a"] == table.loc["d"]).all() and table.loc["a", "tallness"] < 0 < table.loc["b", "tallness"]
    assert (table.dtypes[list(NAMES)] == np.float32).all()
    pd.testing.assert_frame_equal(measure_manifest(manifest, tmp_path / "other", n_jobs=2, progress=False), table)


def counted(monkeypatch):
    "A list that grows by one for every row measured."
    seen, measure_row = [], radiomics._measure_row
    monkeypatch.setattr(radiomics, "_measure_row", lambda m, i: (seen.append(m.rows["image_id"].iloc[i]), measure_row(m, i))[1])
    return seen


def test_only_what_is_new_is_measured(manifest, tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    def run(m): return measure_manifest(m, tmp_path, n_jobs=1, progress=False)
    run(manifest.select([0, 3]))
    assert len(seen) == 1                                   # the same image and contour once
    before = run(manifest)
    assert len(seen) == 3
    changed = manifest.rows.copy()
    changed.at[0, "contours"] = [[(180.0, 120.0), (220.0, 120.0), (220.0, 220.0), (180.0, 220.0)]]
    after = run(Manifest(changed, manifest.root, DDTI, "test"))
    assert len(seen) == 4 and after.loc["a", "tallness"] > 0 > before.loc["a", "tallness"]
    Image.fromarray(255 - np.asarray(Image.open(manifest.root / "1.png"))).save(manifest.root / "1.png")
    run(manifest)
    assert seen[4:] == ["b"]
    monkeypatch.setattr(radiomics, "_code_version", lambda: "another")
    run(manifest)
    assert len(seen) == 8


def test_a_broken_cache_is_measured_anew_and_replaced(manifest, tmp_path):
    good = measure_manifest(manifest, tmp_path / "c", n_jobs=1, progress=False)
    path, = (tmp_path / "c").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="not readable"):
        pd.testing.assert_frame_equal(measure_manifest(manifest, tmp_path / "c", n_jobs=1, progress=False), good)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pd.testing.assert_frame_equal(measure_manifest(manifest, tmp_path / "c", n_jobs=1, progress=False), good)


def test_a_cache_that_cannot_be_written_is_a_warning(manifest, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="expected a folder; the evidence measured now is not kept"):
        table = measure_manifest(manifest, tmp_path / "file" / "cache", n_jobs=1, progress=False)
    def full(self, path): open(path, "w").write("half"); raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.warns(UserWarning, match="No space left"):
        pd.testing.assert_frame_equal(measure_manifest(manifest, tmp_path / "full", n_jobs=1, progress=False), table)
    assert not list((tmp_path / "full").iterdir())


@pytest.mark.parametrize("name", ["1.png", "mask.png"])
def test_a_file_that_is_gone_or_cut_is_named(manifest, tmp_path, name):
    content = (manifest.root / name).read_bytes()
    (manifest.root / name).write_bytes(content[:60])
    with pytest.raises(DataError, match=name): measure_manifest(manifest, tmp_path / "c", n_jobs=2, progress=False)
    (manifest.root / name).unlink()
    with pytest.raises(DataError, match=name): measure_manifest(manifest, tmp_path / "c", progress=False)


# ---- the scaler -----------------------------------------------------------------------------------------------------------------

@given(st.integers(0, 2**32), st.integers(1, 60), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_scaled_evidence_is_finite_where_measured(seed, n, missing):
    rng = np.random.default_rng(seed)
    values = (rng.standard_cauchy((n, 5)) * 10.0 ** rng.integers(-3, 4, 5)).astype(np.float32)
    values[rng.random((n, 5)) < missing] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler = EvidenceScaler().fit(values)
        scaled = scaler.transform(values)
    np.testing.assert_array_equal(np.isnan(scaled), np.isnan(values))
    assert scaled.dtype == np.float32 and not np.isinf(scaled).any()
    again = EvidenceScaler.from_dict(json.loads(json.dumps(scaler.to_dict(), allow_nan=False)))
    np.testing.assert_array_equal(again.transform(values), scaled)
    np.testing.assert_allclose(scaler.inverse(scaled), values.clip(scaler.low, scaler.high), rtol=1e-3, atol=1e-3 * scaler.scale.max())


def test_constant_and_never_measured_items_become_zero():
    values = np.full((10, 2), 3.0); values[:, 1] = np.nan
    assert (EvidenceScaler().fit(values).transform(np.array([3.0, 8.0])) == 0).all()


@pytest.mark.parametrize("bad", [np.zeros(5), np.zeros((0, 5))])
def test_the_scaler_says_what_shape_it_needs(bad):
    with pytest.raises(ValueError, match=r"expected \(N, R\)"): EvidenceScaler().fit(bad)


# ---- speed ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def ddti():
    folder = shared_data("ddti")
    if folder is None: pytest.skip("DDTI is not beside the checkout (../shared/data/ddti)")
    from thyroid_rlar.ddti import read_ddti
    return read_ddti(folder)


def test_all_of_ddti_is_measured_in_half_a_minute_on_two_cores(ddti, tmp_path):
    "In processor time of a tenth of the images, so that a busy machine does not fail it."
    some = ddti.select(range(0, len(ddti), 10))
    start = time.process_time()
    table = measure_manifest(some, tmp_path, n_jobs=1, progress=False)
    assert (time.process_time() - start) / len(some) * len(ddti) / 2 <= 30
    measured = table["reason"] == ""
    assert measured.mean() > 0.9 and table.loc[measured, list(NAMES)].notna().all(axis=None)


def test_all_of_ddti_comes_from_the_cache_in_half_a_second(ddti, tmp_path, monkeypatch):
    monkeypatch.setattr(radiomics, "_measure_row", lambda manifest, i: (np.zeros(len(NAMES), np.float32), ""))
    measure_manifest(ddti, tmp_path, n_jobs=1, progress=False)
    monkeypatch.setattr(radiomics, "_measure_row", lambda *_: pytest.fail("a cached row was measured"))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert len(measure_manifest(ddti, tmp_path, progress=False)) == len(ddti)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= 0.5
