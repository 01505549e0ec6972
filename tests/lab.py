"""Real JupyterLab in the system's Chromium: open a copy of a notebook, run it, use its widgets as a reader would, see every error.

`tests/test_lab.py` shows each part at work.
"""
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.request import Request, urlopen

import nbformat
import pytest
from machine import free_port
from playwright.sync_api import Locator, Page, WebSocket, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NO_BROWSER = "no Chromium found, so JupyterLab is not tested in a browser; on Debian or Ubuntu: apt-get install chromium"
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage")
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},      # otherwise cells out of sight are not in the page
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}
SIZE = {"width": 1400, "height": 1000}      # of the window, pixels


def browser_or_skip() -> str:
    "Path of Chromium. Without one the test is skipped, or fails where THYROID_RLAR_BROWSER=required."
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found: return found
    (pytest.fail if os.environ.get("THYROID_RLAR_BROWSER") == "required" else pytest.skip)(NO_BROWSER)


def explore_notebook(run_dir: Path, **values: object) -> nbformat.NotebookNode:
    "nbs/explore.ipynb, set to a run; `values` are others of its parameters."
    nb = nbformat.read(ROOT / "nbs/explore.ipynb", as_version=4)
    parameters, = (cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in {"run_dir": str(run_dir), **values}.items())
    return nb


def until(true: Callable[[], object], what: str, page: Page, seconds: float = 30) -> object:
    "The first true answer; the page lives on while we wait. AssertionError says what did not happen."
    end = time.monotonic() + seconds
    while not (answer := true()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        page.wait_for_timeout(50)
    return answer


def messages(frame: bytes | str) -> list[dict]:
    "The kernel message in a frame of the protocol v1.kernel.websocket.jupyter.org, without its buffers; none in other frames."
    if isinstance(frame, str): return []
    count = int.from_bytes(frame[:8], "little")
    at = [int.from_bytes(frame[8 * i:8 * i + 8], "little") for i in range(1, count + 1)]
    channel, header, parent, _, content = (frame[a:b].decode() for a, b in zip(at[:5], at[1:6]))
    return [{"channel": channel, "header": json.loads(header), "parent": json.loads(parent), "content": json.loads(content)}]


class Notebook:
    "A notebook open in JupyterLab. `errors`: what the kernel raised, in cells and in widgets' callbacks; `console`: errors of the page."

    def __init__(self, lab: "Lab", name: str):
        self.lab, self.name, self.errors, self.console = lab, name, [], []
        self.busy, self.heard = False, 0.0      # the kernel's state, and when it last said something
        self.page: Page = lab.browser.new_page(viewport=SIZE, color_scheme=lab.theme)
        self.page.on("console", lambda m: self.console.append(f"{m.text} ({m.location.get('url', '')})") if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("websocket", self._listen)
        self.page.goto(f"{lab.url}/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?token={lab.token}", timeout=120_000)
        self.page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=120_000)
        until(self._ready, "a connected, idle kernel", self.page, 90)     # the status bar says idle before there is a kernel

    def _listen(self, socket: WebSocket) -> None:
        socket.on("framereceived", lambda frame: [self._heard(message) for message in messages(frame)])

    def _heard(self, message: dict) -> None:
        self.heard = time.monotonic()
        if message["header"]["msg_type"] == "status": self.busy = message["content"]["execution_state"] != "idle"
        if message["header"]["msg_type"] == "error": self.errors.append(f"{message['content']['ename']}: {message['content']['evalue']}")

    def _ready(self) -> bool:
        kernels = [session["kernel"] for session in self.lab.ask("sessions") if session["path"] == self.name]
        return any(kernel["execution_state"] == "idle" and kernel["connections"] for kernel in kernels)

    def start(self) -> Self:
        "Run all cells, without waiting."
        self.page.get_by_text("Run", exact=True).first.click()
        self.page.locator('[data-command="runmenu:run-all"]').first.click()
        return self

    def theme(self, name: str) -> None:
        "Light or Dark, by the menu."
        self.page.get_by_text("Settings", exact=True).first.click()
        self.page.locator(".lm-Menu-itemLabel", has_text="Theme").first.hover()
        self.page.locator(".lm-Menu-itemLabel", has_text=f"JupyterLab {name}").first.click()
        self.settle()

    def run_all(self, seconds: float = 240) -> Self:
        "Run all cells and wait for the last; a cell that raises ends it, as in JupyterLab."
        self.start()
        prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt")

        def done() -> bool:
            texts = prompts.all_text_contents()
            return any(text[1:2].isdigit() for text in texts) and not any("*" in text for text in texts) and self._ready()
        until(done, "all cells have run", self.page, seconds)
        return self

    def settle(self, seconds: float = 30) -> None:
        "Wait until the kernel has nothing to do. While it is busy, widgets keep only the newest event that waits for it."
        self.page.wait_for_timeout(150)
        until(lambda: not self.busy and time.monotonic() - self.heard > 0.25, "the kernel is idle", self.page, seconds)

    def widget(self, label: str) -> Locator:
        "The ipywidget with this description."
        return self.page.locator(".widget-inline-hbox").filter(has=self.page.locator(f".widget-label:text-is({json.dumps(label)})")).first

    def key(self, label: str, key: str = "ArrowRight", times: int = 1) -> None:
        "Press a key on a slider's handle."
        handle = self.widget(label).locator(".noUi-handle").first
        for _ in range(times): handle.press(key)
        self.settle()

    def drag(self, label: str, share: float) -> None:
        "Drag a slider's handle to a share (0 to 1) of its length."
        slider = self.widget(label)
        slider.scroll_into_view_if_needed()
        handle, track = slider.locator(".noUi-handle").first.bounding_box(), slider.locator(".noUi-base").bounding_box()
        y = handle["y"] + handle["height"] / 2
        self._trace([(handle["x"] + handle["width"] / 2, y), (track["x"] + share * track["width"], y)])

    def choose(self, label: str, option: str) -> None:
        "Choose an option of a dropdown by its text."
        self.widget(label).locator("select").select_option(label=option)

    def plot(self, number: int = 0) -> Locator:
        "The page's n-th plotly figure, drawn."
        figure = self.page.locator(".jp-NotebookPanel .js-plotly-plot").nth(number)
        figure.locator(".main-svg").first.wait_for(timeout=60_000)
        drawn = "plot => plot.calcdata?.length === plot._fullData?.length && !plot._fullLayout._replotting"
        until(lambda: figure.evaluate(drawn), "the figure is drawn", self.page)
        self.settle()                           # plotly's widget listens to clicks once it has drawn
        return figure

    def data(self, plot: Locator, trace: int = 0, field: str = "y") -> list:
        "What a trace of a figure shows."
        return plot.evaluate("(plot, [trace, field]) => Array.from(plot._fullData[trace][field])", [trace, field])

    def _pixels(self, plot: Locator, points: Sequence[tuple[float, float]], axes: str = "") -> list[tuple[float, float]]:
        "Where points in a subplot's data coordinates lie in the window; `axes` is '' for the first subplot, '2' for the second."
        plot.scroll_into_view_if_needed()
        place = """(plot, [points, axes]) => { const box = plot.getBoundingClientRect(), all = plot._fullLayout;
            const x = all['xaxis' + axes], y = all['yaxis' + axes];
            return points.map(p => [box.left + x._offset + x.d2p(p[0]), box.top + y._offset + y.d2p(p[1])]) }"""
        return plot.evaluate(place, [[list(point) for point in points], axes])

    def click_point(self, plot: Locator, point: tuple[float, float], axes: str = "") -> None:
        "Click where a point in data coordinates is drawn."
        [(x, y)] = self._pixels(plot, [point], axes)
        self.page.mouse.move(x - 2, y - 2)
        self.page.mouse.move(x, y, steps=3)
        self.page.wait_for_timeout(100)         # plotly looks for the nearest point while the mouse rests
        self.page.mouse.click(x, y)
        self.settle()
        self.page.wait_for_timeout(350)         # what follows sooner it takes for a double click

    def lasso(self, plot: Locator, points: Sequence[tuple[float, float]], axes: str = "", then: Sequence[tuple[float, float]] = ()) -> None:
        "Draw a lasso through points in data coordinates, on a figure whose dragmode is lasso, and move the mouse over other points at once."
        self._trace(self._pixels(plot, points, axes), self._pixels(plot, then, axes))

    def _trace(self, path: Sequence[tuple[float, float]], then: Sequence[tuple[float, float]] = ()) -> None:
        "Drag the mouse along a path in the window, and go on without a button pressed."
        self.page.mouse.move(*path[0])
        self.page.mouse.down()
        for point in path[1:]: self.page.mouse.move(*point, steps=8)
        self.page.mouse.up()
        for point in then: self.page.mouse.move(*point, steps=3)
        self.settle()

    def screenshot(self, path: Path, part: Locator | None = None) -> Path:
        "A PNG of the window, or of a part of the page, which becomes high enough for the whole of it."
        tall = part.bounding_box()["height"] + 300 if part else 0
        if tall > SIZE["height"]: self.page.set_viewport_size(SIZE | {"height": int(tall)})
        if part: part.scroll_into_view_if_needed()
        (part or self.page).screenshot(path=path)
        if tall > SIZE["height"]: self.page.set_viewport_size(SIZE)
        return path

    def close(self) -> None:
        "Close the page and end its kernel."
        self.page.close()
        for session in self.lab.ask("sessions"):
            if session["path"] == self.name: self.lab.ask(f"sessions/{session['id']}", "DELETE")


class Lab:
    """JupyterLab and a browser, with folders of their own; `with Lab(folder) as lab: lab.open(notebook)`. Nothing is left running afterwards.
    Screenshots go to the folder that THYROID_RLAR_SCREENSHOTS names, to look at them."""

    def __init__(self, folder: Path, theme: str = "light"):
        self.folder, self.theme, self.token = Path(folder), theme, secrets.token_hex(16)
        self.chromium = browser_or_skip()
        self.screenshots = Path(os.environ.get("THYROID_RLAR_SCREENSHOTS") or self.folder / "screenshots")
        self.screenshots.mkdir(parents=True, exist_ok=True)
        self.server = self.browser = self._playwright = None

    def __enter__(self) -> Self:
        try:
            self._serve()
            self._playwright = sync_playwright().start()
            self.browser = self._playwright.chromium.launch(executable_path=self.chromium, args=QUIET)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.browser: self.browser.close()
        if self._playwright: self._playwright.stop()
        if self.server: self._end()

    def _environment(self) -> dict[str, str]:
        "The user's, but for Jupyter's folders: no setting, no kernel, no workspace of theirs is seen or changed."
        own = {f"JUPYTER_{name}_DIR": name.lower() for name in ("CONFIG", "DATA", "RUNTIME")}
        own |= {f"JUPYTERLAB_{name}_DIR": name.lower() for name in ("SETTINGS", "WORKSPACES")} | {"IPYTHONDIR": "ipython"}
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return os.environ | {name: str(self.folder / "jupyter" / sub) for name, sub in own.items()} | {
            "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def _serve(self) -> None:
        "Start the server and wait until it answers."
        for name, values in SETTINGS.items():
            path = self.folder / "jupyter" / "settings" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        theme = {"theme": f"JupyterLab {self.theme.title()}"}
        path = self.folder / "jupyter/settings/@jupyterlab/apputils-extension/themes.jupyterlab-settings"
        path.write_text(json.dumps(theme))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={self.folder}", "--ip=127.0.0.1",
                   f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}", "--LabApp.news_url=None",
                   "--LabApp.extension_manager=readonly"]
        self.log = (self.folder / "server.log").open("w+")
        self.server = subprocess.Popen(command, env=self._environment(), cwd=self.folder, stdout=self.log, stderr=subprocess.STDOUT,
                                       start_new_session=True)
        end = time.monotonic() + 90
        while not self._answers():
            if self.server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"JupyterLab does not answer:\n{Path(self.log.name).read_text()}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try: return self.ask("status") is not None
        except OSError: return False

    def ask(self, what: str, method: str = "GET") -> object:
        "The server's answer to a call of its API, None when it is empty."
        with urlopen(Request(f"{self.url}/api/{what}", headers={"Authorization": f"token {self.token}"}, method=method), timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def _end(self) -> None:
        "End the server, which ends its kernels; a kernel whose server was killed sees that and ends itself."
        for how, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            if self.server.poll() is None: os.killpg(self.server.pid, how)
            try: self.server.wait(seconds)
            except subprocess.TimeoutExpired: continue
        self.log.close()

    def open(self, notebook: Path | nbformat.NotebookNode, name: str = "notebook.ipynb") -> Notebook:
        "Open a copy of a notebook, without its outputs, in a page of its own."
        nb = nbformat.from_dict(notebook) if isinstance(notebook, dict) else nbformat.read(notebook, as_version=4)
        for cell in nb.cells:
            if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None
        nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(nb, self.folder / name)
        return Notebook(self, name)
