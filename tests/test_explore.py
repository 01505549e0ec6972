"""The explorers in real JupyterLab, used as a reader would, and their still pictures through papermill; on a small run trained here."""
import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from lab import SIZE, Lab, Notebook, explore_notebook, until
from playwright.sync_api import Locator
from test_runs import papermill

from thyroid_rlar.latent_figures import paint
from thyroid_rlar.opened import open_run
from thyroid_rlar.parameters import check_parameters
from thyroid_rlar.runs import load_data, make_trainer, open_source, run_folder


def trained(folder: Path, epochs: int, objective: str) -> Path:
    "A finished run on the repository's phantoms."
    s = check_parameters(dict(source="folder", data_dir="data/phantom", out_dir=str(folder), image_size="64x96", stride=8, epochs=epochs,
                              batch_size=4, device="cpu", folds=3, objective=objective))
    make_trainer(s, load_data(s, open_source(s), progress=False), run_folder(s)).fit()
    (folder / "metrics.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path: return trained(tmp_path_factory.mktemp("explored") / "run", 6, "rlar")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path: return trained(tmp_path_factory.mktemp("beside") / "other", 2, "sum")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab")) as lab: yield lab


@pytest.fixture(scope="module")
def opened(lab, run_dir, other):
    opened = lab.open(explore_notebook(run_dir, beside=[str(other)]), "explore.ipynb").run_all(300)
    opened.settle()
    yield opened
    assert not opened.errors and not opened.console, (opened.errors, opened.console)
    opened.close()


def explorer(opened: Notebook, number: int) -> Locator:
    found = opened.page.locator(".rlar-explorer").nth(number)
    found.wait_for(timeout=60_000)
    found.scroll_into_view_if_needed()
    return found


def plots(box: Locator) -> Locator:
    box.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=60_000)
    found, drawn = box.locator(".js-plotly-plot"), "all => all.every(p => p._fullData && p._fullData.length)"
    until(lambda: found.evaluate_all(drawn), "all figures are drawn", box.page)
    return found


def chosen(box: Locator) -> str:
    "The image that the explorer's list of nodules shows."
    return box.locator(".widget-inline-hbox").filter(has=box.page.locator(".widget-label:text-is('nodule')")).locator("select").evaluate(
        "s => s.options[s.selectedIndex].text")


def test_every_cell_runs_without_an_error(opened, lab):
    assert not opened.errors and not opened.console, (opened.errors, opened.console)
    for number, name in enumerate(("latent", "angle", "attribution")): opened.screenshot(lab.screenshots / f"{name}.png", explorer(opened, number))
    opened.screenshot(lab.screenshots / "report.png", opened.page.locator(".nodule-report").first)


def test_a_click_opens_a_nodule_and_arrows_move_on(opened, run_dir):
    run, box = open_run(run_dir, progress=False), explorer(opened, 0)
    box.get_by_role("button", name="PCA", exact=True).click()
    opened.settle()
    drawing, before = plots(box).first, chosen(box)
    xs, ys = (opened.data(drawing, 0, axis) for axis in "xy")
    other = next(k for k, row in enumerate(run.rows) if str(run.table.image_id[row]) != before)
    opened.click_point(drawing, (xs[other], ys[other]))
    until(lambda: chosen(box) != before, "the click opens another nodule", opened.page)
    clicked = chosen(box)
    box.locator(".widget-label:text-is('nodule')").click()
    until(lambda: box.evaluate("e => e === document.activeElement"), "the explorer has the focus", opened.page)   # the list had it for a moment
    opened.page.keyboard.press("ArrowRight")
    until(lambda: chosen(box) != clicked, "the arrow key goes on", opened.page)
    opened.page.keyboard.press("ArrowLeft")
    until(lambda: chosen(box) == clicked, "and back", opened.page)


def test_sliders_move_mask_and_grade(opened):
    box = explorer(opened, 0)
    bars = plots(box).nth(2)
    before = opened.data(bars, 1)
    opened.key("risk step", "ArrowRight", 3)
    until(lambda: opened.data(bars, 1) != before, "the grade's probabilities move with the slider", opened.page)
    model = [trace for trace in range(4) if plots(box).nth(1).evaluate("(p, k) => (p._fullData[k] || {}).name", trace) == "model"]
    before = plots(box).nth(1).evaluate("(p, k) => JSON.stringify(p._fullData[k].x)", model[0])
    opened.drag("segmentation step", 0.95)
    until(lambda: plots(box).nth(1).evaluate("(p, k) => JSON.stringify(p._fullData[k].x)", model[0]) != before, "the mask moves", opened.page)


def test_other_colours(opened, run_dir):
    "Points and bar together."
    run, drawing = open_run(run_dir, progress=False), plots(explorer(opened, 0)).first
    shown = "p => [p._fullData[1].marker.colorbar?.title.text, Array.from(p._fullData[0].marker.color)]"
    for column, name in (("dice", "Dice"), ("angle", "task angle (degrees)"), ("group", "case"), ("grade_index", "grade, reader")):
        opened.choose("colour", name)
        until(lambda column=column: drawing.evaluate(shown)[1] == paint(run, column).colors, f"points coloured by {name}", opened.page)
        assert column == "group" or drawing.evaluate(shown)[0] == name


def test_a_lasso_gives_a_cohort(opened, lab):
    "Even if the mouse runs on over other nodules while the kernel is busy."
    box = explorer(opened, 0)
    drawing = plots(box).first
    xs, ys = (opened.data(drawing, 0, axis) for axis in "xy")
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    w, h, middle = 0.04 * (right - left), 0.04 * (high - low), sum(sorted(xs)[len(xs) // 2 - 1:][:2]) / 2
    path = [(left - w, low - h), (middle, low - h), (middle, high + h), (left - w, high + h), (left - w, low - h)]
    opened.lasso(drawing, path, then=list(zip(xs, ys)))
    until(lambda: box.get_by_text("Cohort within the lasso").is_visible(), "the cohort shows", opened.page)
    count = sum(x < middle for x in xs)
    with opened.page.expect_download() as saved: box.get_by_text(f"save all {count} as CSV").click()
    table = pd.read_csv(saved.value.path())
    assert len(table) == count and saved.value.suggested_filename == "cohort.csv" and {"image_id", "dice", "angle"} <= set(table)
    opened.screenshot(lab.screenshots / "cohort.png", box)
    box.get_by_role("button", name="UMAP", exact=True).click()
    until(lambda: drawing.evaluate("p => p._fullLayout.xaxis.title.text") == "UMAP 1", "the other map", opened.page, 90)
    until(lambda: not drawing.evaluate("p => (p._fullLayout.selections || []).length"), "without the outline drawn on the first", opened.page)
    until(lambda: drawing.evaluate("p => (p._fullData[0].selectedpoints || []).length") == count, "but with the same points picked", opened.page)
    opened.screenshot(lab.screenshots / "cohort-umap.png", box)
    box.get_by_role("button", name="PCA", exact=True).click()
    opened.settle()


def test_the_plane_grows_and_the_sliders_live(opened, lab):
    box = explorer(opened, 0)
    count = plots(box).count()
    box.get_by_role("button", name="draw the plane of both steps").click()
    until(lambda: plots(box).count() > count, "the plane appears", opened.page, 60)
    opened.key("segmentation step", "ArrowLeft", 1)
    opened.settle()
    opened.screenshot(lab.screenshots / "plane.png", box)


def test_epochs_and_places_of_the_angle(opened, lab):
    box = explorer(opened, 1)
    box.get_by_role("button", name="PCA", exact=True).click()
    opened.settle()
    drawing = plots(box).first
    number = drawing.evaluate("p => p._fullData.findIndex(t => t.name === 'map: nodules')")
    before = opened.data(drawing, number, "x")
    assert drawing.evaluate("p => p._fullLayout.xaxis2.title.text").startswith("component 1")
    named = drawing.evaluate("p => p._fullData.filter(t => t.showlegend).map(t => t.name)")
    assert named[:2] == ["rlar", "sum"], named                             # the run beside it
    opened.key("map at epoch", "ArrowLeft", 1)
    until(lambda: opened.data(drawing, number, "x") != before, "the map moves to another epoch", opened.page)
    before = opened.data(drawing, number, "x")
    opened.drag("map at epoch", 1)
    until(lambda: opened.data(drawing, number, "x") != before, "and to the last again", opened.page)
    xs, ys, nodule = *(opened.data(drawing, number, axis) for axis in "xy"), chosen(box)
    names = opened.data(drawing, number, "text")
    other = max((k for k in range(len(xs)) if not names[k].startswith(f"{nodule},")), key=lambda k: abs(xs[k]))
    opened.click_point(drawing, (xs[other], ys[other]), "2")
    until(lambda: names[other].startswith(f"{chosen(box)},"), "a click on the map opens that nodule", opened.page)
    title = drawing.inner_text()
    box.get_by_role("button", name="map", exact=True).click()
    until(lambda: drawing.inner_text() != title, "another place of the angle", opened.page)
    opened.screenshot(lab.screenshots / "angle-map.png", box)
    box.get_by_role("button", name="UMAP", exact=True).click()
    until(lambda: drawing.evaluate("p => p._fullLayout.xaxis2.title.text") == "UMAP 1", "the other map", opened.page, 90)


def test_other_targets_are_attributed(opened, lab):
    box = explorer(opened, 2)
    pictures = "p => JSON.stringify(p._fullData.map(t => t.source || (t.z && Array.from(t.z[0] || [])) || null))"
    drawing = plots(box).first
    before = drawing.evaluate(pictures)
    targets = opened.page.locator(".widget-inline-hbox").filter(has=opened.page.locator(".widget-label:text-is('target')")).locator("select")
    targets.select_option(index=2)
    until(lambda: drawing.evaluate(pictures) != before, "the attribution changes with the target", opened.page, 90)
    bars = "p => JSON.stringify(Array.from(p._fullData.find(t => t.name === 'share').x))"
    shares = drawing.evaluate(bars)
    opened.choose("method", "occlusion, 24 pixels")
    until(lambda: drawing.evaluate(bars) != shares, "the shares are the other method's", opened.page, 90)
    opened.choose("method", "layer Grad-CAM at z")
    box.get_by_role("button", name="guided and free").click()
    until(lambda: "through the free half" in drawing.inner_text(), "the two halves show", opened.page, 90)
    opened.settle()
    opened.screenshot(lab.screenshots / "attribution-target.png", box)
    before, nodule = drawing.evaluate(pictures), chosen(box)
    box.locator("button[title^='the next nodule']").click()
    until(lambda: chosen(box) != nodule and drawing.evaluate(pictures) != before, "another nodule's pictures", opened.page, 90)


def test_a_page_that_is_loaded_again_shows_what_was_chosen(opened):
    "The kernel lives on, and its widgets come back as they are, not as they were built."
    shown = "p => [p._fullData[0].source, p._fullData.slice(1).map(t => Array.from(t.x || []))]"
    box = explorer(opened, 0)
    box.locator("button[title^='the next nodule']").click()
    opened.settle()
    nodule, before = chosen(box), plots(box).nth(1).evaluate(shown)
    opened.page.locator(".jp-NotebookPanel").press("Control+s")
    opened.settle()
    assert not opened.console, opened.console
    opened.page.reload(timeout=120_000)
    box = explorer(opened, 0)
    until(lambda: chosen(box) == nodule, "the list shows the same nodule", opened.page, 60)
    until(lambda: plots(box).nth(1).evaluate(shown) == before, "and the picture is that nodule's", opened.page)
    until(lambda: plots(explorer(opened, 2)).first.evaluate("p => p._fullData[0].visible"), "attributions are not blank", opened.page)
    opened.settle()
    opened.console[:] = [said for said in opened.console if "widget model not found" not in said]        # progress bars that are gone


def test_figures_fit_a_laptops_page(opened):
    "1280 pixels with the file browser open leave an explorer less than the angle's and the attribution's figures are drawn with."
    def widest(number: int) -> int:
        return max(explorer(opened, number).evaluate("box => [...box.querySelectorAll('.js-plotly-plot')].map(plot => plot._fullLayout.width)"))
    def room(number: int) -> int: return explorer(opened, number).evaluate("box => box.clientWidth")
    drawn = {number: widest(number) for number in (1, 2)}
    try:
        opened.page.set_viewport_size(SIZE | {"width": 1280})
        until(lambda: all(widest(k) <= room(k) < drawn[k] for k in drawn), "the figures fit", opened.page)
    finally: opened.page.set_viewport_size(SIZE)
    until(lambda: all(widest(k) == drawn[k] for k in drawn), "the figures are as wide as before", opened.page)


def test_in_the_dark(opened, lab):
    "JupyterLab's own theme, by its menu."
    box, paper = explorer(opened, 0), "p => p._fullLayout.paper_bgcolor"
    opened.theme("Dark")
    for number in range(3):
        figure = plots(explorer(opened, number)).first
        until(lambda figure=figure: figure.evaluate(paper) == "#111111", "figures go dark with the page", opened.page)
        opened.screenshot(lab.screenshots / f"dark-{number}.png", explorer(opened, number))
    opened.theme("Light")
    until(lambda: plots(box).first.evaluate(paper) == "white", "and light again", opened.page)


LIVE = """from thyroid_rlar.angle_explorer import LiveAngles
from thyroid_rlar.parameters import check_parameters
from thyroid_rlar.runs import load_data, make_trainer, open_source, run_folder
s = check_parameters(dict(source="folder", data_dir="data/phantom", out_dir={folder!r}, image_size="64x96", stride=8, epochs=9, batch_size=4,
                          device="cpu", folds=3))
make_trainer(s, load_data(s, open_source(s, progress=False), progress=False), run_folder(s), [LiveAngles()]).fit()"""


def test_angles_while_a_run_is_trained(lab, tmp_path):
    "The figure is there from the first epoch on, and has a point more after each."
    cell = nbformat.v4.new_code_cell(LIVE.format(folder=str(tmp_path / "run")))
    opened = lab.open(nbformat.v4.new_notebook(cells=[cell]), "live.ipynb").start()
    drawing, median = plots(explorer(opened, 0)).first, "p => p._fullData.find(t => t.showlegend).x.length"
    seen = {drawing.evaluate(median)}
    until(lambda: seen.add(drawing.evaluate(median)) or max(seen) == 9, "all epochs are drawn", opened.page, 120)
    assert len(seen) > 1, seen
    opened.settle()
    opened.screenshot(lab.screenshots / "live.png", explorer(opened, 0))
    opened.key("map at epoch", "ArrowLeft", 1)
    until(lambda: "epoch 5" in drawing.inner_text(), "once it is trained, the slider moves the map", opened.page)
    assert not opened.errors and not opened.console, (opened.errors, opened.console)
    opened.close()


def test_still_pictures_through_papermill(run_dir, tmp_path):
    done = papermill("explore.ipynb", tmp_path / "explore.ipynb", "-p", "run_dir", run_dir, "-p", "nodules", 1, "-p", "out_dir", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = sorted(tmp_path.glob("nodule-*.html"))
    assert pages and all("not a medical device" in page.read_text() for page in pages)
    outputs = [o for c in json.loads((tmp_path / "explore.ipynb").read_text())["cells"] for o in c.get("outputs", [])]
    assert sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in outputs) >= 2 + 2 * len(pages)
    wrong = papermill("explore.ipynb", tmp_path / "out.ipynb", "-p", "run_dir", run_dir, "-p", "nodule", 3)
    assert wrong.returncode != 0 and "unknown parameter nodule" in wrong.stderr
