"Phantoms: the picture carries what the descriptors say, for many seeds."
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial import ConvexHull

from thyroid_rlar import phantom as ph
from thyroid_rlar.files import DataError, project_root
from thyroid_rlar.folder import read_folder
from thyroid_rlar.tirads import ACR, POINTS, Descriptors, level, points

SEEDS = range(8)
PLAIN = Descriptors("solid", "hypoechoic", "wider-than-tall", "smooth")
TERMS = {name: [t for t in POINTS[name] if t != "undetermined"] for name in ("composition", "echogenicity", "shape", "margin")}


def extent(mask):
    return np.flatnonzero(mask.any(1)).size, np.flatnonzero(mask.any(0)).size


def to_border(p):
    "Signed distance to the mask's border in mm, negative inside."
    return (distance_transform_edt(~p.mask) - distance_transform_edt(p.mask)) * p.spacing_mm


def drawable(composition, echogenicity):
    return (composition == "cystic") == (echogenicity == "anechoic")


@st.composite
def descriptors(draw):
    chosen = {name: draw(st.sampled_from(terms)) for name, terms in TERMS.items()}
    if chosen["composition"] == "cystic": chosen["echogenicity"] = "anechoic"
    elif chosen["echogenicity"] == "anechoic": chosen["echogenicity"] = "hypoechoic"
    return Descriptors(**chosen, foci=frozenset(draw(st.sets(st.sampled_from(["comet-tail", "macro", "rim", "punctate"])))))


@settings(max_examples=60, deadline=None)
@given(descriptors(), st.integers(0, 2**32), st.sampled_from(ph.VIEWS), st.sampled_from([(96, 128), (256, 320), (200, 150), (64, 64)]))
def test_any_request(asked, seed, view, size):
    p = ph.make_phantom(seed, asked, size, view)
    assert p.image.dtype == np.uint8 and p.mask.dtype == bool and p.image.shape == p.mask.shape == size
    assert p.descriptors == asked and p.points == points(asked) and p.level == level(points(asked)) and p.view == view
    edge = np.concatenate([p.mask[0], p.mask[-1], p.mask[:, 0], p.mask[:, -1]])
    assert not edge.any()                                     # nothing of the nodule is cut off
    height, width = (n * p.spacing_mm for n in extent(p.mask))
    assert height == pytest.approx(p.nodule.height_mm, abs=2 * p.spacing_mm)
    assert width == pytest.approx(p.nodule.width_mm, abs=2 * p.spacing_mm)
    assert .005 < p.mask.mean() < .4
    assert p.image.std() > 10 and .1 < (p.image < 255).mean()


@pytest.mark.parametrize("seed", SEEDS)
def test_deterministic(seed):
    a, b, other = ph.make_phantom(seed), ph.make_phantom(np.random.default_rng(seed)), ph.make_phantom(seed + 1000)
    assert np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask) and a.descriptors == b.descriptors
    assert not np.array_equal(a.image, other.image)


@pytest.mark.parametrize("view", ph.VIEWS)
@pytest.mark.parametrize("shape", TERMS["shape"])
def test_shape(shape, view):
    for seed in SEEDS:
        case = ph.make_case(seed, replace(PLAIN, shape=shape, margin="irregular"), views=(view,))
        height, width = extent(case[0].mask)
        assert (height > width) == (shape == "taller-than-wide")


def contrast(p):
    "Mean grey of the nodule minus that of a ring of parenchyma, 0.7 to 2.2 mm away, beside the nodule (above and below is capsule)."
    distance, rows = to_border(p), np.arange(len(p.mask))
    middle = rows[p.mask.any(1)].mean()
    beside = (np.abs(rows - middle) < .3 * extent(p.mask)[0])[:, None]
    return p.image[p.mask].mean() - p.image[(distance > .7) & (distance < 2.2) & beside].mean()


def test_echogenicity_is_ordered():
    terms = ["very hypoechoic", "hypoechoic", "isoechoic", "hyperechoic"]
    found = np.array([[contrast(ph.make_phantom(s, replace(PLAIN, echogenicity=t))) for t in terms] for s in range(100, 112)])
    assert (np.diff(np.median(found, axis=0)) > 8).all()
    assert (found[:, 0] < found[:, 1]).all() and (found[:, 1] < found[:, 3]).all()   # within every pair of twins
    assert abs(np.median(found[:, 2])) < 15


def test_composition_is_dark_in_order():
    dark = {c: np.median([(p.image[p.mask] < 40).mean() for p in
                          (ph.make_phantom(s, replace(PLAIN, composition=c, echogenicity=e)) for s in SEEDS)])
            for c, e in [("solid", "isoechoic"), ("mixed", "isoechoic"), ("spongiform", "isoechoic"), ("cystic", "anechoic")]}
    assert dark["solid"] < .05 < dark["mixed"] < dark["cystic"] > .75
    assert dark["solid"] + .1 < dark["spongiform"] < dark["cystic"] - .2


def bright(p):
    "Brightest grey inside the mask, away from the border, after averaging speckle."
    return gaussian_filter(p.image.astype(float), (.1 / p.spacing_mm, .25 / p.spacing_mm))[to_border(p) < -1].max()


@pytest.mark.parametrize("foci", ["punctate", "macro", "comet-tail"])
def test_bright_foci_only_when_asked(foci):
    for seed in SEEDS:
        without = bright(ph.make_phantom(seed, PLAIN))
        assert bright(ph.make_phantom(seed, replace(PLAIN, foci=foci))) > without + 15


def test_rim_is_bright_where_nothing_shadows_it():
    changes = []
    for seed in range(16):
        p, plain = (ph.make_phantom(seed, replace(PLAIN, foci=f)) for f in ("rim", "none"))
        front = (np.abs(to_border(p) + .25) < .35) & (np.arange(len(p.mask)) < np.flatnonzero(p.mask.any(1)).mean())[:, None]
        changes.append(p.image[front].mean() - plain.image[front].mean())
    assert min(changes) > 8 and np.median(changes) > 25      # arcs may leave much of the front free


def test_shadow_behind_macro_and_enhancement_behind_cyst():
    shadows, streaks = [], []
    for seed in range(40, 40 + len(SEEDS)):
        plain = ph.make_phantom(seed, PLAIN)
        macro = ph.make_phantom(seed, replace(PLAIN, foci="macro"))
        cyst = ph.make_phantom(seed, replace(PLAIN, composition="cystic", echogenicity="anechoic"))
        rows, columns = np.flatnonzero(plain.mask.any(1)), np.flatnonzero(plain.mask.any(0))
        behind = slice(rows[-1] + 8, rows[-1] + 30)
        change = macro.image[behind].mean(0) - plain.image[behind].mean(0)
        shadows.append(change[columns[0]:columns[-1]].min())
        middle = slice(columns[len(columns) // 3], columns[2 * len(columns) // 3])
        streaks.append(cyst.image[behind, middle].mean() - plain.image[behind, middle].mean())
        assert change[:columns[0] - 12].max(initial=0) < 1      # no shadow beside it
    assert max(shadows) < -25
    assert min(streaks) > 5


def roughness(p):
    "Share of the convex hull that the mask leaves out."
    return 1 - p.mask.sum() / ConvexHull(np.argwhere(p.mask)).volume


def edge_width(p):
    "Grey step across the border, between 0.5 mm inside and outside, relative to the step between 2 mm."
    d = to_border(p)
    mean = lambda low, high: p.image[(d > low) & (d < high)].mean()
    return (mean(0, .5) - mean(-.5, 0)) / (mean(1.5, 2.5) - mean(-np.inf, -2))


def test_margin():
    made = {m: [ph.make_phantom(s, replace(PLAIN, echogenicity="very hypoechoic", margin=m)) for s in range(60, 70)] for m in TERMS["margin"]}
    rough = {m: np.median([roughness(p) for p in ps]) for m, ps in made.items()}
    assert min(rough["lobulated"], rough["irregular"]) > 2 * max(rough["smooth"], rough["ill-defined"])
    assert np.median([edge_width(p) for p in made["ill-defined"]]) < .6 * np.median([edge_width(p) for p in made["smooth"]])


def test_levels_as_asked():
    prior, rng = ph.DescriptorPrior(levels=(0, 1, 0, 3, 0)), np.random.default_rng(0)
    grades = [level(points(prior.draw(rng))) for _ in range(2000)]
    assert set(grades) == {"TR2", "TR4"} and abs(grades.count("TR4") / 2000 - .75) < .04
    for g in ACR.grades: assert level(points(ph.default_prior().draw(rng, g))) == g
    solid = dict(ph.FREQUENCIES, composition={"solid": 1.})
    with pytest.raises(ValueError, match="TR1"): ph.DescriptorPrior(frequencies=solid)
    assert ph.DescriptorPrior((0, 0, 1, 1, 1), solid).draw(rng).composition == "solid"


@pytest.mark.parametrize("composition", TERMS["composition"])
@pytest.mark.parametrize("echogenicity", TERMS["echogenicity"])
def test_contradictions_are_refused(composition, echogenicity):
    asked = replace(PLAIN, composition=composition, echogenicity=echogenicity)
    if drawable(composition, echogenicity): ph.check_drawable(asked)
    else:
        with pytest.raises(ValueError, match=composition): ph.make_phantom(0, asked)


@pytest.mark.parametrize(("arguments", "said"), [
    (dict(view="sagittal"), "transverse, longitudinal"), (dict(size=(32, 320)), "64 pixels"),
    (dict(descriptors=Descriptors("undetermined", "isoechoic")), "undetermined composition")])
def test_bad_requests(arguments, said):
    with pytest.raises(ValueError, match=said): ph.make_phantom(0, **arguments)


def test_case_shares_descriptors_not_speckle():
    for seed in SEEDS:
        across, along = ph.make_case(seed)
        assert across.descriptors == along.descriptors and (across.view, along.view) == ph.VIEWS
        assert across.nodule.height_mm == along.nodule.height_mm and across.nodule.width_mm != along.nodule.width_mm
        assert not np.array_equal(across.image, along.image)


def test_throughput():
    ph.make_phantom(0)
    start = time.process_time()
    for seed in range(20): ph.make_phantom(seed)
    assert 20 / (time.process_time() - start) * 60 > 200   # images a minute of one core


def test_set_in_a_folder(tmp_path):
    folder = ph.write_phantoms(tmp_path / "ein Set ü", 7, seed=5, size=(96, 120), readers=2, progress=False)
    table = pd.read_csv(folder / "labels.csv")
    assert len(table) == 7 * 3 and table.image.nunique() == 7 and set(table.reader) == {"truth", "reader_1", "reader_2"}
    assert [p.name for p in tmp_path.iterdir()] == ["ein Set ü"]                     # no draft left
    assert {str(p.relative_to(folder)) for p in folder.rglob("*.png")} == set(table.image) | set(table["mask"])
    assert table.groupby(["case", "reader"])[["grade", "points", "foci"]].nunique().max().max() == 1
    for row in table.itertuples():
        d = Descriptors(row.composition, row.echogenicity, row.shape, row.margin, frozenset(row.foci.split("+")))
        assert (points(d), level(points(d))) == (row.points, row.grade)
        assert Image.open(folder / row.mask).size == Image.open(folder / row.image).size == (120, 96)
    again = ph.write_phantoms(tmp_path / "again", 7, seed=5, size=(96, 120), readers=2, progress=False)
    for path in folder.rglob("*.*"): assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes()


def test_exact_readers_read_the_truth(tmp_path):
    folder = ph.write_phantoms(tmp_path / "exact", 4, size=(96, 120), readers=1, disagreement=0, contour_noise=0, progress=False)
    table = pd.read_csv(folder / "labels.csv").set_index(["reader", "image"])
    rest = [c for c in table if c != "mask"]
    pd.testing.assert_frame_equal(table.loc["truth", rest], table.loc["reader_1", rest])
    for a, b in zip(table.loc["truth", "mask"], table.loc["reader_1", "mask"]): assert (folder / a).read_bytes() == (folder / b).read_bytes()


def test_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("full", "file"):
        with pytest.raises(DataError, match="new or empty"): ph.write_phantoms(tmp_path / name, 1, progress=False)
    with pytest.raises(DataError, match="can be written"): ph.write_phantoms(tmp_path / "file" / "below", 1, progress=False)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    for n, readers in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match="at least 1 image"): ph.write_phantoms(tmp_path / "new", n, readers=readers)


def test_interrupted_set_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(ph, "log_compress", stop)
    with pytest.raises(KeyboardInterrupt): ph.write_phantoms(tmp_path / "set", 3, progress=False)
    assert not list(tmp_path.iterdir())


def test_shipped_set_is_what_its_command_makes(tmp_path):
    shipped = project_root() / "data" / "phantom"
    made = ph.write_phantoms(tmp_path / "phantom", 24, seed=0, size=(192, 240), readers=2, progress=False)
    assert {p.relative_to(shipped) for p in shipped.rglob("*.*")} == {p.relative_to(made) for p in made.rglob("*.*")}
    pd.testing.assert_frame_equal(pd.read_csv(shipped / "labels.csv"), pd.read_csv(made / "labels.csv"))
    for path in shipped.rglob("*.png"):
        a, b = (np.asarray(Image.open(folder / path.relative_to(shipped)), float) for folder in (shipped, made))
        assert np.abs(a - b).mean() < .5                 # other processors and libraries may round otherwise


def test_shipped_set_reads_as_a_folder():
    manifest = read_folder(project_root() / "data" / "phantom")
    assert manifest.summary() == {"kept": 24, "flagged": {}, "left_out": {}} and len(manifest) == 72
    for i in range(0, 72, 7):
        image, mask = manifest.load(i)
        assert image.shape == mask.shape == (192, 240) and mask.any()
