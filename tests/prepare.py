"""Bring up to date whatever is made from the notebooks: the package, the notebooks themselves (cleaned), README.md.

`make prepare` runs it on the checkout; tests/test_repository.py runs it on a copy, to see that nothing changes.
"""
import os
import posixpath
import re
import subprocess
import sysconfig
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

# the target of a Markdown link or image that is neither an address, a place on the page, nor absolute
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])[^)\s]+")


def _nbdev(command: str, root: Path) -> None:
    "Run an nbdev `command` of this environment in the checkout at `root`."
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}  # under IN_TEST, nbdev exports nothing
    subprocess.run([Path(sysconfig.get_path("scripts"), command)], cwd=root, env=env, check=True)


def strip_widget_state(root: Path) -> None:
    "Remove the megabytes that JupyterLab saves of each widget: nbdev_clean leaves them in."
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        nb = nbformat.read(path, as_version=4)
        if nb.metadata.pop("widgets", None) is not None: nbformat.write(nb, path)


def _shown_only(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "What a code cell shows, without the code."
    [output] = cell.outputs
    return nbformat.v4.new_markdown_cell(output.data["text/markdown"])


def readme(root: Path) -> str:
    "The front page: nbs/index.ipynb in Markdown, its relative links counted from the top of the repository."
    nb = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    nb.cells = [cell for cell in nb.cells if not cell.source.lstrip().startswith("#| hide")]
    nb.cells = [_shown_only(cell) if cell.source.startswith("#| echo: false") else cell for cell in nb.cells]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(lambda link: posixpath.normpath(posixpath.join("nbs", link[0])), cell.source)
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources["outputs"]:
        raise SystemExit("nbs/index.ipynb: a cell shows a picture; store it as a file under nbs/images and link to that")
    note = "<!-- Made from nbs/index.ipynb by `make prepare`: change the notebook, not this file. -->"
    return f"{note}\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def prepare(root: Path) -> None:
    "Clean, export and write README.md in the checkout at `root`."
    strip_widget_state(root)
    _nbdev("nbdev_clean", root)         # first: it gives new cells the names that the exported files refer to
    _nbdev("nbdev_export", root)
    (root / "README.md").write_text(readme(root), encoding="utf-8")


if __name__ == "__main__":
    prepare(Path(__file__).resolve().parent.parent)
