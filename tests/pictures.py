"""README's pictures of the explorers: real JupyterLab on the phantom run, each explorer as it opens,
but for the latent one's sliders, which are pushed. Run by `make pictures`."""
import sys
import tempfile
from pathlib import Path

from lab import ROOT, Lab, explore_notebook, until
from PIL import Image

PICTURES = {"latent": ".rlar-explorer >> nth=0", "angles": ".rlar-explorer >> nth=1", "attribution": ".rlar-explorer >> nth=2",
            "report": ".nodule-report"}
TALLEST = 1250       # pixels: of the report, which is longer, the upper part


def main(run_dir: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, Lab(Path(folder)) as lab:
        opened = lab.open(explore_notebook(run_dir), "explore.ipynb").run_all(900)
        opened.settle(300)
        for label in ("segmentation step", "risk step"): opened.drag(label, 0.7)
        for name, where in PICTURES.items():
            part = opened.page.locator(where)
            part.wait_for(timeout=120_000)
            until(lambda part=part: "…" not in part.text_content(), f"{name} has all its maps", opened.page, 600)
            shot = Image.open(opened.screenshot(Path(folder) / f"{name}.png", part)).convert("RGB")
            shot = shot.crop((0, 0, shot.width, min(shot.height, TALLEST)))
            shot.save(ROOT / f"nbs/images/explorer-{name}.jpg", quality=85, subsampling=0, optimize=True)
            print(f"nbs/images/explorer-{name}.jpg, {shot.width} x {shot.height}")
        assert not opened.errors and not opened.console, (opened.errors, opened.console)


if __name__ == "__main__": main(Path(sys.argv[1]).resolve())
