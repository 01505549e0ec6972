"""The repository keeps its own rules (CONTRIBUTING.md): what is made from notebooks is current and readable, the wheel works."""
import ast
import importlib.metadata
import json
import re
import shutil
import statistics
import subprocess
import sys
import warnings
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from prepare import LINK, prepare

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in path.relative_to(ROOT).parts))
MODULES = sorted(path for path in (ROOT / "thyroid_rlar").glob("*.py") if path.name != "_modidx.py")
RUN_NOTEBOOKS = [path for path in NOTEBOOKS if path.parent.name == "runs"]

# required, but never imported: the command or the library that uses it
NOT_IMPORTED = {
    "tensorboard": "accelerate's tracker",
    "pyarrow": "pandas' parquet files",
    "ipywidgets": "progress bars in a notebook",
    "jupyterlab": "make lab",
    "nbdev": "make prepare, nbdev_test",
    "pytest-xdist": "make test",
    "papermill": "make run",
    "execnb": "a bound on nbdev's own requirement",
    "ghapi": "a bound on nbdev's own requirement",
    "ruff": "test_style",
    "setuptools": "test_wheel builds without isolation",
}
WITH_THE_KERNEL = {"ipython", "matplotlib-inline", "traitlets"}  # every Jupyter kernel brings them
LAZY = ("umap", "numba", "captum", "ipywidgets", "anywidget")  # load when used, not when the package is imported
WITH_WIDGETS = ("explorers", "latent_explorer", "angle_explorer", "attribution_explorer", "nodule_report")  # to import these is to use widgets


def name(path: Path) -> str: return path.relative_to(ROOT).as_posix()


def run(*command: object, cwd: Path) -> str:
    "Run `command`, fail with all it printed, return its standard output."
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def cells(path: Path, kind: str = "code") -> list[dict]:
    "Cells of one `kind`, each with its `source` as one string and its `directives` (`#| ...` lines) apart."
    found = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]
    for cell in found:
        lines = "".join(cell["source"]).splitlines()
        cell["directives"] = [line[2:].strip() for line in lines if line.startswith("#|")]
        cell["source"] = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    return found


def is_exported(cell: dict) -> bool: return any(directive.startswith("export") for directive in cell["directives"])


def parse(source: str) -> ast.Module: return ast.parse(TransformerManager().transform_cell(source))  # magics become calls


def imported(tree: ast.Module) -> set[str]:
    "Top names of all modules that `tree` imports, within functions too."
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {dotted.split(".")[0] for dotted in names}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    "A copy of the checkout, without data and what ran in it."
    copy = tmp_path / "checkout"
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.is_file(): shutil.copy(path, copy)
    for folder in ("nbs", "tests", "thyroid_rlar"): shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
    return copy


def test_made_from_notebooks_is_current(checkout):
    for path in (checkout / "thyroid_rlar").glob("*.py"):  # so that a module whose notebook is gone shows up
        if path.name != "__init__.py": path.unlink()
    prepare(checkout)

    def content(root: Path) -> dict[str, str]:
        notebooks = [path for path in root.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in path.parts]
        paths = [root / "README.md", root / "pyproject.toml", root / "settings.ini", *root.glob("thyroid_rlar/*.py"), *notebooks]
        return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}

    stored, made = content(ROOT), content(checkout)
    changed = sorted(path for path in stored.keys() | made.keys() if stored.get(path) != made.get(path))
    assert not changed, f"not as `make prepare` leaves them: {', '.join(changed)}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_is_light(path):
    assert path.stat().st_size <= 400_000, "pictures too large, or widget state stored"
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in nb["metadata"], "widget state stored: run `make prepare`"
    assert len(nb["cells"]) <= 120
    errors = [output["ename"] for cell in cells(path) for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors, "stored with an error"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_exported_cells_are_short(path):
    for cell in filter(is_exported, cells(path)):
        lines = cell["source"].splitlines()
        assert len(lines) <= 40, f"{len(lines)} lines from: {lines[0]}"
        if len(lines) > 30: warnings.warn(f"{name(path)}: an exported cell of {len(lines)} lines from: {lines[0]}", stacklevel=1)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_imports_have_cells_of_their_own(path):
    for cell in cells(path):
        statements = parse(cell["source"]).body
        imports = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not imports or len(imports) == len(statements), f"imports beside code in:\n{cell['source']}"
        assert not any(alias.name == "*" for node in imports for alias in node.names), f"import * in:\n{cell['source']}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", RUN_NOTEBOOKS, ids=name)
def test_run_notebook_has_one_parameters_cell(path):
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells(path)) == 1


def test_requirements_are_what_is_imported():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")

    def normal(text: str) -> str: return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[;]", text)[0]).lower()

    needed = {normal(item) for item in config["DEFAULT"]["requirements"].split()}
    dev = {normal(item) for item in config["DEFAULT"]["dev_requirements"].split()}
    extras = {normal(item) for kind in ("solvers", "bench") for item in config["DEFAULT"][f"{kind}_requirements"].split()}  # imported where used
    providers = importlib.metadata.packages_distributions()

    def distributions(trees: list[ast.Module]) -> set[str]:
        names = set().union(*map(imported, trees)) - sys.stdlib_module_names - {"thyroid_rlar"}
        return {normal(distribution) for module in names for distribution in providers.get(module, [])}

    package = distributions([ast.parse(path.read_text(encoding="utf-8")) for path in MODULES]
                            + [parse(cell["source"]) for path in RUN_NOTEBOOKS for cell in cells(path)])
    beside = distributions([parse(cell["source"]) for path in NOTEBOOKS for cell in cells(path)]
                           + [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("tests/*.py")])
    missing = package - needed - extras - WITH_THE_KERNEL, beside - needed - dev - extras - WITH_THE_KERNEL
    assert not missing[0], f"imported by the package or a run notebook, but not in requirements: {missing[0]}"
    assert not missing[1], f"imported by a notebook or a test, but in neither list of requirements: {missing[1]}"
    unused = (needed | dev | extras) - package - beside - NOT_IMPORTED.keys()
    assert not unused, f"required, but never imported: {unused}"


def test_style():
    run(sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", ".", cwd=ROOT)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    links = LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    missing = [link for link in links if not (ROOT / link.split("#")[0]).exists()]
    assert links and not missing


def test_version_is_the_same_everywhere():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    version, python = config["DEFAULT"]["version"], config["DEFAULT"]["min_python"]
    assert f'\nversion: {version}\n' in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'requires-python=">={python}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pythons = re.search(r"PYTHONS = \((.*?)\)", (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    assert pythons in (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    assert pythons.startswith(f'"{python}"')


def test_wheel_works_without_the_notebooks(checkout, tmp_path):
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, checkout, cwd=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {member.split("/")[0] for member in archive.namelist()}
        [metadata] = (archive.read(member).decode() for member in archive.namelist() if member.endswith(".dist-info/METADATA"))
    assert {top for top in tops if not top.endswith(".dist-info")} == {"thyroid_rlar"}
    headers = Parser().parsestr(metadata)
    for header in ("Keywords", "Summary", "License", "Project-URL", "Classifier", "Requires-Python", "Description-Content-Type"):
        assert headers[header], f"the wheel says nothing of its {header}"

    run(*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    code = f"""
import importlib, pkgutil, sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import thyroid_rlar
names = [module.name for module in pkgutil.iter_modules(thyroid_rlar.__path__)]
for explorers, lazy in ((False, {LAZY!r}), (True, {LAZY[:3]!r})):
    for name in names:
        if explorers != (name in {WITH_WIDGETS!r}): continue
        file = importlib.import_module("thyroid_rlar." + name).__file__
        assert file.startswith({str(tmp_path / "site")!r}), file
    loaded = [name for name in lazy if name in sys.modules]
    assert not loaded, f"loaded by importing the package, not by using it: {{loaded}}"
from thyroid_rlar.readers import load_reader_confusion
assert len(load_reader_confusion()) > 100
"""
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_import_is_quick(tmp_path):
    def seconds(module: str) -> float:
        code = f"from time import perf_counter; start = perf_counter(); import {module}; print(perf_counter() - start)"
        return float(run(sys.executable, "-c", code, cwd=tmp_path))

    seconds("thyroid_rlar"), seconds("torch")  # compiled and in the disk cache from here on
    pairs = [(seconds("thyroid_rlar"), seconds("torch")) for _ in range(5)]
    ours, torchs = (statistics.median(times) for times in zip(*pairs, strict=True))
    assert ours <= 1.3 * torchs, f"import thyroid_rlar {ours:.2f} s, import torch {torchs:.2f} s"
