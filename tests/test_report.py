"""Figures from incomplete tables, and the report as a browser without a network sees it."""

import math
import os
import re
import shutil

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from thyroid_rlar import figures as fg
from thyroid_rlar import report as rp
from thyroid_rlar.evaluation import SEGMENTATION, evaluate, probability_columns, reliability_curve
from thyroid_rlar.files import DataError
from thyroid_rlar.tirads import ACR, DDTI

EVIL = '<script>alert("{}")</script><img src=x onerror=alert(1)>'
QUANTILES = [f"q{q:02d}" for q in fg.QUANTILES]


def history(epochs=5, **columns):
    parts = [pd.DataFrame({"kind": "epoch", "split": s, "epoch": range(epochs)} | dict.fromkeys(columns, np.nan)) for s in ("train", "val")]
    table = pd.concat([p.assign(**columns) for p in parts], ignore_index=True)
    steps = pd.DataFrame({"kind": "step", "split": "train", "epoch": 0, "step": range(50), "loss_seg": 1.0})
    return pd.concat([table, steps], ignore_index=True)


def predictions(n=60, scale=DDTI, seed=0):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(rng.dirichlet(np.ones(len(scale)), n), columns=probability_columns(scale))
    ids = [f"{i}_1" for i in range(n)]
    grade = pd.array(rng.integers(0, len(scale), n), "Int64")
    return table.assign(image_id=ids, case_id=ids, group=ids, grade_index=grade, **{m: rng.uniform(0, 1, n) for m in SEGMENTATION})


def y_titles(fig):
    return [axis.title.text for axis in fig.select_yaxes()]


# columns of the history, panels drawn
HISTORIES = [
    ({}, []),
    ({"loss_seg": 1.0}, ["segmentation loss"]),
    ({"loss_seg": 1.0, "dice": 0.5, "auroc_high": np.nan}, ["segmentation loss", "Dice"]),
    ({"loss_risk": 1.0, "loss_evidence": 0.3, "unknown": 1.0}, ["grade loss", "evidence loss"]),
    (dict.fromkeys(fg.CURVES, 0.5), list(fg.CURVES.values())),
]


@pytest.mark.parametrize("columns, panels", HISTORIES)
def test_curves_draw_what_there_is(columns, panels):
    fig = fg.curves(history(**columns))
    assert (y_titles(fig) if panels else fig.data) == (panels or ())
    assert len(fig.data) == 2 * len(panels)  # training and validation
    assert all(len(trace.x) == 5 for trace in fig.data)  # steps are not epochs
    assert sum(trace.showlegend for trace in fig.data) == min(2, len(fig.data))


def test_curves_without_kind_and_split():
    fig = fg.curves(pd.DataFrame({"epoch": [0, 1], "dice": [0.1, 0.2]}))
    assert [trace.name for trace in fig.data] == ["training"]


@pytest.mark.parametrize("prefix, where", [("cos_pooled_", "pooled"), ("cos_map_", "map"), ("cos_", "pooled")])
def test_cosine_quantiles_by_name(prefix, where):
    table = fg.cosine_quantiles(history(**{prefix + q: 0.1 * i for i, q in enumerate(QUANTILES)}), where=where)
    assert list(table.columns) == QUANTILES and table.index.tolist() == list(range(5))
    assert table.loc[3].tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_cosine_quantiles_from_nodules_leave_out_other_splits_and_nan():
    nodules = pd.DataFrame({"epoch": 2, "split": ["val"] * 3 + ["train"], "image_id": list("abcd"), "cos_map": [0.0, 0.2, np.nan, 9.0]})
    table = fg.cosine_quantiles(history(), nodules, where="map")
    assert table.index.tolist() == [2] and table.loc[2, "q50"] == pytest.approx(0.1)
    assert fg.cosine_quantiles(history(), nodules, where="map", split="train").loc[2, "q50"] == 9
    assert not len(fg.cosine_quantiles(history(), nodules, where="pooled"))


@pytest.mark.parametrize("columns, names", [
    ({}, []),
    ({"excess": 0.1}, ["E, own case"]),
    ({"excess": 0.1, "excess_shuffled": 0.1, "strength": 0.2}, ["E, own case", "E0, a stranger's", "strength"]),
    ({f"cos_pooled_{q}": 0.0 for q in QUANTILES}, ["5 to 95 %", "25 to 75 %", "median"]),
])
def test_angle_dynamics_draw_what_there_is(columns, names):
    assert [trace.name for trace in fg.angle_dynamics(history(**columns)).data] == names


def test_angle_dynamics_of_a_run_without_validation():
    everything = history(excess=0.1).query("split == 'train'")
    assert [trace.name for trace in fg.angle_dynamics(everything).data] == ["E, own case"]


@pytest.mark.parametrize("n, ranks", [
    (0, []), (1, ["best"]), (2, ["best", "best"]), (4, ["best", "best", "best", "worst"]),
    (7, ["best"] * 3 + ["median"] + ["worst"] * 3), (20, ["best"] * 3 + ["median"] * 3 + ["worst"] * 3),
])
def test_best_median_worst(n, ranks):
    table = pd.DataFrame({"image_id": range(n + 5), "dice": [*np.linspace(0, 1, n), *[np.nan] * 5]})
    chosen = fg.best_median_worst(table.sample(frac=1, random_state=0))
    assert chosen["rank"].tolist() == ranks
    assert chosen["dice"].is_monotonic_decreasing and chosen["dice"].notna().all() and chosen["image_id"].is_unique


def test_gallery_contours_lie_on_the_pixels():
    mask = np.zeros((20, 40), bool)
    mask[5:10, 12:30] = True
    mask[:, 39] = True  # touches the border: its line must close beyond it
    item = dict(image=np.zeros((20, 40), np.uint8), mask=mask, pred=np.zeros((20, 40)), title="a")
    image, reader, prediction = fg.nodule_gallery([item]).data
    x, y = (np.array([v for v in values if v is not None]) for values in (reader.x, reader.y))
    assert {11.5, 29.5, 38.5, 39.5} <= set(x) and {4.5, 9.5, -0.5, 19.5} <= set(y)
    assert len(prediction.x) == 0 and image.source.startswith("data:image/png;base64,")


def test_gallery_of_images_without_a_reader():
    item = dict(image=np.zeros((9, 9), np.uint8), mask=None, pred=np.eye(9), title="a")
    assert [trace.name for trace in fg.nodule_gallery([item] * 5).data] == [None, "prediction"] * 5
    assert not fg.nodule_gallery([]).data


def test_confusion_matrix_marks_high_risk():
    fig = fg.confusion_matrix(predictions(), DDTI)
    assert np.nansum(fig.data[0].customdata) == 60 and np.allclose(fig.data[0].z.sum(1), 1)
    lines = [s for s in fig.layout.shapes if s.type == "line"]
    assert {lines[0].x0, lines[1].y0} == {3.5}  # between 4b and 4c
    ungraded = predictions().assign(grade_index=pd.array([None] * 60, "Int64"))
    assert not fg.confusion_matrix(ungraded, DDTI).data


@pytest.mark.parametrize("shape, names, r2", [((5, 3), 2, None), ((5, 2), 2, [0.1]), ((5,), 1, None)])
def test_evidence_refuses_other_shapes(shape, names, r2):
    with pytest.raises(ValueError, match="expected"):
        fg.evidence_scatter(np.zeros(shape), np.zeros(shape), ["a"] * names, r2)


def test_evidence_leaves_out_what_was_not_measurable():
    measured = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan]])
    fig = fg.evidence_scatter(measured, np.zeros((3, 2)), ["a", "b"], [0.5, np.nan])
    assert [len(trace.x) for trace in fig.data] == [2, 2, 2, 0]
    assert fig.layout.annotations[1].text == "b<br>R² undefined"
    assert not fg.evidence_scatter(np.zeros((0, 2)), np.zeros((0, 2)), ["a", "b"]).data


def test_every_figure_names_its_axes_and_is_white():
    table = predictions()
    drawn = [
        fg.curves(history(dice=0.5)),
        fg.angle_dynamics(history(excess=0.1)),
        fg.confusion_matrix(table, DDTI),
        fg.reliability({"top": reliability_curve(table, DDTI, n_boot=20), "high": reliability_curve(table, DDTI, "high", n_boot=20)}),
    ]
    for fig in drawn:
        assert all(y_titles(fig)) and any(axis.title.text for axis in fig.select_xaxes())
        assert fig.layout.template.layout.paper_bgcolor == "white" and fig.layout.height


def test_figures_escape_names():
    fig = fg.nodule_gallery([dict(image=np.zeros((9, 9), np.uint8), mask=None, pred=np.eye(9), title=EVIL)])
    texts = [a.text for a in fig.layout.annotations]
    texts += [a.text for a in fg.evidence_scatter(np.ones((2, 1)), np.ones((2, 1)), [EVIL], unit=EVIL).layout.annotations]
    assert all('"' in t for t in texts[:2])  # plotly would show &quot; as it stands
    texts += [axis.title.text for axis in fg.reliability(reliability_curve(predictions(), DDTI, n_boot=20), EVIL).select_xaxes()]
    assert not any("<script" in t or "<img" in t for t in texts if t) and sum("&lt;script" in t for t in texts if t) == 5


NUMBERS = [(0.12345, "0.123"), (12.345, "12.35"), (-0.5, "-0.500"), (math.nan, "–"), (None, "–"), (math.inf, "–"), (0, "0.000")]


@pytest.mark.parametrize("value, text", NUMBERS)
def test_number(value, text):
    assert rp._number(value) == text


def test_metrics_table_reads_what_evaluate_writes():
    metrics = evaluate(predictions().drop(columns="hd95"), DDTI, n_boot=20)
    table = rp.metrics_table(metrics)
    assert list(table.index) == list(rp.METRICS.values())
    assert table.loc["HD95 (px)"].tolist() == ["–", 0, "–", 0]
    value, low, high = (float(v) for v in re.findall(r"[\d.]+", table.loc["Dice", "per image (95 % interval)"]))
    assert low < value < high and value == round(metrics["segmentation"]["dice"]["value"], 3)
    nothing = {block: {k: m | dict.fromkeys(("value", "low", "high")) for k, m in metrics[block].items()} for block in ("segmentation", "risk")}
    assert rp.metrics_table(nothing).loc["Dice", "per image (95 % interval)"] == "– (– to –)"  # null in JSON


def evil_report(path):
    table = predictions(scale=ACR)
    gallery = fg.nodule_gallery([dict(image=np.zeros((30, 40), np.uint8), mask=np.eye(30, 40) > 0, pred=np.eye(30, 40), title=EVIL.format(1))])
    rows = pd.DataFrame({EVIL.format(2): [EVIL.format(3)], "n": [0.123456]})
    sections = [
        (EVIL.format(4), EVIL.format(5) + "\n\n[link](javascript:alert(6))", [gallery, rows]),
        ("Grades", "**bold**\n\n| a | b |\n|---|---|\n| 1 | 2 |", fg.confusion_matrix(table, ACR)),
        ("Only text", "Ünïcödé", None),
    ]
    return rp.write_report(path, EVIL.format(7), sections, {EVIL.format(8): EVIL.format(9), "list": [1, None], "path": path})


def test_report_is_one_escaped_file(tmp_path):
    path = evil_report(tmp_path / "a ä" / "report.html")
    assert os.listdir(path.parent) == ["report.html"]
    page = path.read_text("utf-8")
    assert page.count(get_plotlyjs()) == 1 and path.stat().st_size < 6e6
    own = page.replace(get_plotlyjs(), "")
    assert "<script>alert" not in own and "<img" not in own and "javascript:" not in own and "harmful" in own
    assert own.count("Plotly.newPlot(") == 2 and not re.search(r"https?://", own)
    assert "not a medical device" in own and "<strong>bold</strong>" in own and "<td>2</td>" in own and "Ünïcödé" in own
    assert "[1, null]" in own and rp.versions()["plotly"] in own and rp.versions(["no-such-package"])["no-such-package"] == "not installed"


@pytest.mark.parametrize("item", ["text", 3, np.zeros(3)])
def test_report_refuses_what_it_cannot_show(tmp_path, item):
    with pytest.raises(TypeError, match="section 'Odd'"):
        rp.write_report(tmp_path / "report.html", "t", [("Odd", "", [go.Figure(), item])], {})
    assert not os.listdir(tmp_path)


def test_report_on_a_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DataError, match="expected free space on this disk"):
        rp.write_report(path, "t", [], {})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]


def test_report_in_a_browser(tmp_path):
    """Every figure is drawn, nothing is asked of a network, and no script of a case id runs."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    path, asked, said = evil_report(tmp_path / "report.html"), [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append("alert " + dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg .subplot').length >= 2")
        shown = page.locator(".gtitle, .annotation-text, h1").all_text_contents()
        browser.close()
    assert said == [] and [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert any('<script>alert("1")' in text for text in shown)  # as letters
