"""Does anything grow? 200 epochs on phantoms, and an hour of scripted clicking in the explorers.

    python tests/longlived.py training runs/longlived --epochs 200
    python tests/longlived.py exploring runs/phantom --minutes 60

Memory is this process's resident set, open files are its descriptors. Each prints a line as it goes, and writes its readings, numbers only,
to data/results/longlived-<what>.parquet, which 59_longlived reads.
"""
import argparse
import asyncio
import ctypes
import gc
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from thyroid_rlar.files import project_root, write_whole


def reading() -> dict[str, float]:
    "Resident memory (MB) and open files of this process, after a collection; what is free goes back to the system first, where it can."
    gc.collect()
    if sys.platform == "linux": ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"memory_mb": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "open_files": len(os.listdir("/proc/self/fd"))}


def training(folder: Path, epochs: int, readings: list[dict]) -> None:
    "A run on small phantoms, read after each epoch."
    from thyroid_rlar.parameters import check_parameters
    from thyroid_rlar.runs import load_data, make_trainer, open_source, run_folder
    s = check_parameters(dict(source="phantom", phantom_images=48, image_size="64x96", epochs=epochs, out_dir=str(folder), folds=3, device="cpu"))
    start = time.perf_counter()
    def read(trainer) -> None:
        readings.append({"at": trainer.epoch, "seconds": time.perf_counter() - start} | reading())
        if trainer.epoch % 10 == 0: print(readings[-1], flush=True)
    make_trainer(s, load_data(s, open_source(s, progress=False), progress=False), run_folder(s), [read]).fit()


@dataclass
class Restless:
    "A user who does one thing after the other, drawn by chance."
    rng: np.random.Generator
    latent: object
    angle: object
    attribution: object

    def pick(self, values): return values[int(self.rng.integers(len(values)))]
    def click(self): self.latent.choose(row=self.pick(self.latent.run.rows))
    def click_angle(self): self.angle.choose(row=self.pick(self.angle.run.rows))
    def slide(self): self.latent.choose(seg=float(self.rng.uniform(-.5, .5)), risk=float(self.rng.uniform(-.5, .5)))
    def lasso(self): self.latent.choose(picked=tuple(int(r) for r in self.rng.permutation(self.latent.run.rows)[:20]))
    def arrow(self): self.pick((self.latent, self.angle)).step(1)
    def epoch(self): self.angle.choose(epoch=self.pick(self.angle.run.epochs()))
    def attribute(self): self.attribution.choose(row=self.pick(self.attribution.run.rows), target=self.pick(list(self.attribution.targets)))


def events(run, seed: int):
    "What the user does, without end, as calls; None when all explorers are closed."
    from thyroid_rlar.angle_explorer import AngleExplorer
    from thyroid_rlar.attribution_explorer import AttributionExplorer
    from thyroid_rlar.latent_explorer import LatentExplorer
    rng = np.random.default_rng(seed)
    while True:                                            # the cell is run again: new explorers take the place of the old
        latent, angle, attribution = LatentExplorer(run), AngleExplorer(run), AttributionExplorer(run)
        views = [explorer.view for explorer in (latent, angle, attribution)]
        user = Restless(rng, latent, angle, attribution)
        for _ in range(300):
            yield from (user.click, user.click_angle, user.slide, user.lasso, user.arrow, user.epoch)
            if rng.random() < 0.05: yield latent.draw_plane
            if rng.random() < 0.05: yield user.attribute
        for explorer in (latent, angle, attribution): explorer.close()
        del latent, angle, attribution, explorer, user, views
        yield None


async def exploring(folder: Path, minutes: float, readings: list[dict]) -> None:
    "Clicks in the explorers of a run, with the kernel's loop running, read once a minute, and whenever all explorers are closed."
    from thyroid_rlar.opened import open_run
    run, start, done = open_run(folder, progress=False), time.perf_counter(), 0
    for act in events(run, 0):
        if act: act()
        done += act is not None
        await asyncio.sleep(0.01)
        while act is None and any("ThreadPoolExecutor" in thread.name for thread in threading.enumerate()): await asyncio.sleep(0.1)   # ends its step
        minute = int((time.perf_counter() - start) / 60)
        if act is None or not readings or minute > readings[-1]["at"]:
            readings.append({"at": minute, "events": done, "closed": act is None, "seconds": time.perf_counter() - start} | reading())
            print(readings[-1], flush=True)
        if minute >= minutes: return


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("what", choices=("training", "exploring"))
    asked.add_argument("folder", type=Path)
    asked.add_argument("--epochs", type=int, default=200)
    asked.add_argument("--minutes", type=float, default=60)
    o = asked.parse_args()
    torch.set_num_threads(1)
    readings: list[dict] = []
    if o.what == "training": training(o.folder, o.epochs, readings)
    else: asyncio.run(exploring(o.folder, o.minutes, readings))
    path = project_root() / "data" / "results" / f"longlived-{o.what}.parquet"
    write_whole(path, pd.DataFrame(readings).to_parquet)
    print(path)
