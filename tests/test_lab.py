"""The browser test's own instruments: what changes is seen, and so is every kind of error."""
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from lab import ROOT, Lab, browser_or_skip, until
from nbformat.v4 import new_code_cell, new_notebook

from thyroid_rlar.calculator import Calculation, advice_text, calculator_html, rule, ways
from thyroid_rlar.nodule_report import ANGLES, QUANTILES, UNITS, WAYS, NoduleReport
from thyroid_rlar.phantom import make_phantom
from thyroid_rlar.radiomics import EVIDENCE
from thyroid_rlar.tirads import ACR, POINTS, Descriptors, Score, advice, score

CALCULATOR = (ROOT / "thyroid_rlar" / "calculator.js").read_text(encoding="utf-8")

IMPORTS = """
import anywidget, traitlets
import ipywidgets as widgets
import plotly.graph_objects as go
"""
SLIDER = """
figure = go.FigureWidget([go.Scatter(x=[0, 1, 2, 3], y=[0, 1, 2, 3], mode="markers", marker_size=12)], layout=dict(dragmode="lasso", height=300))
slider = widgets.FloatSlider(value=0, min=0, max=2, step=0.1, description="step")
method = widgets.Dropdown(options=["sum", "rlar"], description="method")
said = widgets.Label("nothing yet")
def move(change): figure.data[0].y = [slider.value + k for k in range(4)]
def point(trace, points, state): said.value = f"picked {points.point_inds}"
slider.observe(move, "value")
method.observe(lambda change: setattr(said, "value", change.new), "value")
figure.data[0].on_click(point)
figure.data[0].on_selection(point)
widgets.VBox([slider, method, figure, said])
"""
ANYWIDGET = """
class Count(anywidget.AnyWidget):
    _esm = '''export default { render({ model, el }) {
        const button = document.createElement("button"); button.className = "count";
        const show = () => { button.textContent = `count ${model.get("n")}` };
        button.onclick = () => { model.set("n", model.get("n") + 1); model.save_changes() };
        model.on("change:n", show); show(); el.append(button) } }'''
    n = traitlets.Int(0).tag(sync=True)
count = Count()
count.observe(lambda change: setattr(said, "value", f"counted {change.new}"), "n")
count
"""
BAD_CALLBACK = """
bad = widgets.IntSlider(description="bad")
def fail(change): raise KeyError("in a callback")
bad.observe(fail, "value")
bad
"""
BAD_CONSOLE = """
class Loud(anywidget.AnyWidget):
    _esm = 'export default { render({ el }) { console.error("a loud widget"); el.textContent = "loud" } }'
Loud()
"""


def notebook(*cells: str) -> nbformat.NotebookNode: return new_notebook(cells=[new_code_cell(cell.strip()) for cell in cells])


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab")) as lab: yield lab


def test_what_a_reader_does_is_seen(lab):
    opened = lab.open(notebook(IMPORTS, SLIDER, ANYWIDGET)).run_all()
    page, plot = opened.page, opened.plot()
    said = page.locator(".widget-label", has_text="nothing yet")
    assert opened.data(plot) == [0, 1, 2, 3] and said.count() == 1

    def shows(text: str) -> None: until(lambda: page.get_by_text(text, exact=True).count(), f"the page shows {text!r}", page)

    opened.key("step", "ArrowRight", 2)
    until(lambda: opened.data(plot) == pytest.approx([0.2, 1.2, 2.2, 3.2]), "two key presses move the points", page)
    opened.drag("step", 0.5)
    until(lambda: opened.data(plot) == pytest.approx([1, 2, 3, 4], abs=0.11), "dragging moves the points", page)
    opened.choose("method", "rlar")
    shows("rlar")
    points = list(zip(opened.data(plot, field="x"), opened.data(plot)))
    opened.click_point(plot, points[2])
    shows("picked [2]")
    opened.lasso(plot, [(1.5, 1.1), (1.3, 2.9), (-0.15, 1.4), (-0.15, 0.85), (1.3, 0.95)])
    shows("picked [0, 1]")
    page.locator("button.count").click()
    shows("counted 1")
    assert opened.screenshot(lab.screenshots / "harness.png").stat().st_size > 10_000
    assert not opened.errors and not opened.console
    opened.close()
    assert not lab.ask("sessions")


SOME_FOCI = [], ["macro"], ["rim", "punctate"], ["macro", "rim", "punctate"], ["comet-tail"]
DESCRIPTIONS = [dict(zip(POINTS, terms)) for terms in product(*list(POINTS.values())[:4], SOME_FOCI)]


SLOW = """
from thyroid_rlar.explorers import LiveFigure
figures = [LiveFigure(go.Figure(go.Scatter(x=[0, 1], y=[0, number]), layout=dict(height=150))) for number in range(3)]
display(widgets.VBox(figures))
for number, figure in enumerate(figures):
    with figure.batch_update(): figure.data[0].y, figure.layout.title.text = [1, number], "told while plotly's script was read"
"""


SLOW_SCRIPTS = """() => {
    const make = URL.createObjectURL, wait = "await new Promise((done) => setTimeout(done, 2500));";
    URL.createObjectURL = (blob) => make(blob.type === "text/javascript" ? new Blob([wait, blob], { type: blob.type }) : blob);
}"""


def test_a_slow_page_draws_what_it_was_told_meanwhile(lab):
    opened = lab.open(notebook(IMPORTS, SLOW), "slow.ipynb")
    opened.page.evaluate(SLOW_SCRIPTS)          # from 0.9.17 on anywidget gives up what is not ready within two seconds
    opened.run_all()
    plots = [opened.plot(number) for number in range(3)]
    titles = lambda: [plot.evaluate("p => p._fullLayout.title.text || ''") for plot in plots]
    until(lambda: all(title.startswith("told") for title in titles()), "all have their title", opened.page, 60)
    assert [list(opened.data(plot)) for plot in plots] == [[1, number] for number in range(3)]
    assert not opened.errors and not opened.console
    opened.close()


def test_the_calculators_script_follows_the_rule(lab):
    """On every description the script gives Python's points, level and advice, and on some the ways that Python gives."""
    page = lab.browser.new_page()
    page.set_content(calculator_html(Calculation()))
    page.evaluate("script => { window.calculator = eval(`(() => { ${script} })()`) }", CALCULATOR.replace("export default", "return"))
    scores = page.evaluate("([rule, all]) => all.map(d => calculator.score(rule, d))", [rule(), DESCRIPTIONS])
    python = [Descriptors(**d | {"foci": frozenset(d["foci"])}) for d in DESCRIPTIONS]
    assert [(s["points"], s["level"]) for s in scores] == [(score(d).points, score(d).level) for d in python]
    asked = [(DESCRIPTIONS[k], python[k], ACR.grades[k % 5]) for k in range(0, len(python), 37)]
    ways_found = page.evaluate("([rule, all]) => all.map(([d, target]) => calculator.ways(rule, d, target))", [rule(), [[d, t] for d, _, t in asked]])
    for found, (_, d, target) in zip(ways_found, asked):
        expected = {(tuple(what if name == "foci" else f"{name} {what}" for name, what in way.edits), way.points) for way in ways(d, target)}
        assert {(tuple(way["edits"]), way["points"]) for way in found} == expected, (d, target)
    sizes = [(g, mm) for g in ACR.grades for mm in (None, 4.9, 5, 10, 15, 24.9, 25)]
    said = page.evaluate("([rule, all]) => all.map(([level, mm]) => calculator.advice(rule, level, mm))", [rule(), sizes])
    points = dict(zip(ACR.grades, (0, 2, 3, 4, 7)))
    assert said == [advice_text(Score(python[0], points[g], g, mm and mm / 10, mm and advice(g, mm / 10) or "")) for g, mm in sizes]
    page.close()


NASTY = "<script>document.title = 'run'</script>"


def some_report() -> NoduleReport:
    "A report of a phantom with numbers out of the air, whose case has a hostile name."
    phantom, rng, items = make_phantom(0, size=(96, 128)), np.random.default_rng(0), len(EVIDENCE)
    columns = {name: rng.normal(size=items) for name in (*WAYS, *(f"q{q:02d}" for q in QUANTILES))}
    evidence = pd.DataFrame([(e.name, e.descriptor, e.meaning, UNITS[e.name]) for e in EVIDENCE], columns=["item", "descriptor", "meaning", "unit"])
    evidence = evidence.assign(n=99, **columns, **{f"{way}_percentile": rng.uniform(0, 100, items) for way in WAYS})
    angle = pd.DataFrame([(c, name, "", 0.1, 84.3, 60.0, 99) for c, (name, _) in ANGLES.items()],
                         columns=["column", "name", "unit", "value", "degrees", "percentile", "n"])
    predicted = np.roll(phantom.mask, 4, 1).astype(float)
    return NoduleReport(NASTY, {"case": NASTY, "part": "test"}, ACR, phantom.image, phantom.mask, predicted, phantom.level, np.full(5, 0.2), evidence,
                        {}, angle, Calculation("solid", "hypoechoic", size_mm=12), {NASTY: phantom.mask - 0.3})


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_report_is_a_page_that_needs_nothing(lab, theme, tmp_path):
    page, asked, said = lab.browser.new_page(color_scheme=theme), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(some_report().save(tmp_path / "report.html").as_uri())
    assert page.title() == f"Nodule {NASTY}" and page.locator("h1").inner_text() == f"Nodule {NASTY}"
    assert "not a medical device" in page.locator(".notice").inner_text()
    page.locator("select[name=margin]").select_option("irregular")
    page.locator("button[name=TR5]").click()
    assert page.locator(".level").inner_text() == "TR4" and "composition" not in page.locator(".ways").inner_text()
    assert "add macro" in page.locator(".ways").inner_text()                            # 6 points, 1 is missing
    dark = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(c => c < 60)"
    assert page.evaluate(dark) == (theme == "dark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")          # nothing sticks out
    assert not said and all(url.startswith(("file:", "data:")) for url in asked)
    page.screenshot(path=lab.screenshots / f"report-{theme}.png", full_page=True)
    page.close()


REPORT = """
import sys
sys.path.insert(0, TESTS)
from test_lab import some_report
""".replace("TESTS", repr(str(Path(__file__).parent)))
CALCULATE = """
calculator = Calculator(report.calculation)
said = widgets.Label("nothing yet")
calculator.on_change(lambda c: setattr(said, "value", f"Python: {c.score.level}, {c.score.advice}"))
widgets.VBox([calculator.widget, said])
"""


def test_report_and_calculator_in_jupyterlab(lab):
    opened = lab.open(notebook("import ipywidgets as widgets\nfrom thyroid_rlar.calculator import Calculation, Calculator" + REPORT,
                               "report = some_report()\nreport", CALCULATE, "calculator.calculation = Calculation('cystic', 'anechoic')")).run_all()
    page, box = opened.page, opened.page.locator(".acr")
    assert page.locator(".nodule-report h1").inner_text() == f"Nodule {NASTY}" and page.title() != "run"
    assert box.locator(".level").inner_text() == "TR1"                              # set by Python
    box.locator("select[name=composition]").select_option("solid")
    box.locator("select[name=echogenicity]").select_option("hypoechoic")
    box.locator("input[name=punctate]").check()
    box.locator("input[name=size_mm]").fill("9")
    assert box.locator(".level").inner_text() == "TR5" and "At 9 mm: follow-up" in box.locator(".advice").inner_text()
    until(lambda: page.get_by_text("Python: TR5, follow-up", exact=True).count(), "Python hears of it", page)
    box.locator("button[name=TR4]").click()
    assert "no punctate" in box.locator(".ways").inner_text()
    opened.screenshot(lab.screenshots / "calculator.png", box)
    box.locator("button[name=TR4]").press("Space")                                  # and closed again, the keyboard where it was
    assert not box.locator(".ways").count() and page.evaluate("document.activeElement.name") == "TR4"
    opened.screenshot(lab.screenshots / "report-jupyterlab.png", page.locator(".nodule-report"))
    assert not opened.errors and not opened.console
    opened.close()


def test_errors_are_seen(lab):
    opened = lab.open(notebook(IMPORTS, BAD_CONSOLE, BAD_CALLBACK, "1 / 0", "print('never')")).run_all()
    assert opened.errors == ["ZeroDivisionError: division by zero"]
    until(lambda: any("a loud widget" in text for text in opened.console), "the widget's console error is seen", opened.page)
    opened.key("bad")
    until(lambda: opened.errors[1:] == ["KeyError: 'in a callback'"], "the callback's error is seen", opened.page)
    opened.close()


INTERRUPTED = """
import sys
from pathlib import Path
from lab import Lab
from test_lab import notebook
with Lab(Path(sys.argv[1])) as lab:
    opened = lab.open(notebook("import os", "print('PID', os.getpid())")).run_all()
    said = opened.page.locator(".jp-OutputArea-output", has_text="PID").inner_text()
    print(lab.server.pid, said.split()[1], flush=True)
    raise KeyboardInterrupt
"""


def test_nothing_is_left_running(tmp_path):
    browser_or_skip()
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(tmp_path)], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr, done.stderr
    for process in map(int, done.stdout.split()):
        with pytest.raises(ProcessLookupError): os.kill(process, 0)


def test_without_a_browser(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("THYROID_RLAR_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"): browser_or_skip()
    monkeypatch.setenv("THYROID_RLAR_BROWSER", "required")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"): browser_or_skip()
