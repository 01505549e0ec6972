"""Kill runs of nbs/runs/train.ipynb and let them go on, over and over; each must end as one that was left alone, bit for bit.

    python tests/kill.py FOLDER writes           # in the first write of each of a run's files, before and after it takes its place
    python tests/kill.py FOLDER moments=20       # at 20 random moments, in processes that are forked from one that has imported everything
    python tests/kill.py FOLDER kernels=100 --out data/results/kills.json      # at 100 random moments, papermill's kernels: half an hour

FOLDER gets the runs; `whole` in it is the one that is left alone, and writes no checkpoint within an epoch. The last line printed
is the result as JSON.
"""
import argparse
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import torch

from thyroid_rlar import parameters, runs
from thyroid_rlar.survival import CHECKPOINT

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs/runs/train.ipynb"
PARAMETERS = {"source": "folder", "data_dir": "data/phantom", "image_size": "64x96", "folds": 3, "stride": 8, "epochs": 2, "batch_size": 4,
              "encoder": "mobilenetv3_small_050", "pretrained": "none", "device": "cpu", "checkpoint_seconds": 0, "resume": True}
TIMES = ["seconds", "loader_share", "peak_memory_mb"]      # columns of the history that no two runs share


# ---- two runs, bit for bit ----------------------------------------------------------------------------------------------

def same(a: object, b: object) -> bool:
    "Whether two values of a checkpoint are the same, down to the last bit of their tensors."
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(run: Path, whole: Path) -> list[str]:
    "What a run that was killed has not in common with the one that was left alone."
    found = [str(path.relative_to(run)) for path in run.rglob(".part-*")]
    for name in ("history", "nodules", "predictions", "split"):
        a, b = (pd.read_parquet(folder / f"{name}.parquet").drop(columns=TIMES, errors="ignore") for folder in (run, whole))
        if not a.equals(b): found.append(name)
    found += [name for name in ("model.safetensors", "model.json") if (run / name).read_bytes() != (whole / name).read_bytes()]
    for path in (whole / "latents").glob("*.npz"):
        with np.load(run / "latents" / path.name) as a, np.load(path) as b:
            if not all(np.array_equal(a[key], b[key]) for key in b): found.append(path.name)
    if not same(*(torch.load(folder / CHECKPOINT, weights_only=True) for folder in (run, whole))): found.append(CHECKPOINT.name)
    return found


# ---- a life of a run ----------------------------------------------------------------------------------------------------

def cells() -> list[str]:
    "The code of the run notebook up to its metrics, without its figures."
    sources = [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    last, = (i for i, source in enumerate(sources) if '"metrics.json"' in source)
    return [source for source in sources[:last + 1] if "_figure" not in source or source.startswith("from ")]


def train(folder: Path, changes: dict) -> None:
    "What the run notebook does, in this process."
    names = {"__name__": "__main__"}
    for source in cells():
        exec(source, names)
        if source.startswith("source ="): names |= PARAMETERS | {"out_dir": str(folder)} | changes


def fork(work: Callable[[], None], log: Path) -> int:
    "The number of a new process that does some work."
    log.parent.mkdir(parents=True, exist_ok=True)
    if pid := os.fork(): return pid
    try:
        with open(log, "a") as file:
            for stream in (1, 2): os.dup2(file.fileno(), stream)
        work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def forked(folder: Path, first: Callable[[], None] = lambda: None, **changes: object) -> int:
    "The number of a new process that trains in a folder, having called `first`."
    def work() -> None:
        first()
        train(folder, changes)
    return fork(work, folder.with_suffix(".log"))


def used(pid: int) -> float:
    "CPU seconds of a process; 0 when it is gone."
    with suppress(OSError):
        numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def ended(pid: int, moment: float = np.inf, busy: int | None = None) -> bool:
    "Wait for a process to end, or until it (or `busy` in its place) has used so many CPU seconds: whether it ended. One that failed is an error."
    until = time.monotonic() + 1800
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) > 0: raise SystemExit(f"process {pid} failed")
            return True
        if used(busy or pid) >= moment: return False
        time.sleep(0.005)
    raise SystemExit(f"process {pid} did not end in half an hour")


def prepare() -> None:
    "Import everything and read the data once, for all processes to come."
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1"}     # of the kernels
    exec("\n".join(cells()[:2]), {})
    settings = parameters.check_parameters(PARAMETERS)
    data = runs.load_data(settings, runs.open_source(settings, progress=False), progress=False)
    runs.load_data = lambda *_: data


# ---- kills --------------------------------------------------------------------------------------------------------------

STAGES = ("half", "before", "after")        # half of the file is written; all of it, under another name; it has taken its place


def kill_in_writes(root: Path) -> dict:
    "One run, killed in each stage of the first write of each file; a life for each."
    folder, done = root / "writes", []

    def killer(pipe: int) -> Callable[[], None]:
        real, seen = os.replace, set()

        def replace(part: str, path: str) -> None:
            name = os.path.relpath(path, folder)
            if name == str(CHECKPOINT) and "history.parquet" not in seen: name += " within an epoch"
            seen.add(name)
            for stage in [stage for stage in STAGES if (name, stage) not in done and not name.startswith("..")][:1]:
                os.write(pipe, json.dumps([name, stage]).encode())
                if stage == "half": os.truncate(part, os.path.getsize(part) // 2)
                if stage == "after": real(part, path)
                os.kill(os.getpid(), signal.SIGKILL)
            real(part, path)

        def patch() -> None: os.replace = replace
        return patch

    while True:
        ours, theirs = os.pipe()
        pid = forked(folder, killer(theirs))
        os.close(theirs)
        ended(pid)
        said = os.read(ours, 1000)
        os.close(ours)
        if not said: break
        done.append(tuple(json.loads(said)))
    return {"kills": len(done), "files": sorted({name for name, _ in done}), "runs": 1, "differences": differences(folder, root / "whole")}


def state_of(folder: Path) -> dict:
    "What a killed run left: epoch and steps of its checkpoint, and whether a file was being written."
    state = torch.load(folder / CHECKPOINT, weights_only=True) if (folder / CHECKPOINT).is_file() else None
    place = {"epoch": None, "step": None} if state is None else {"epoch": state["epoch"], "step": len(state["steps"]["rates"])}
    return place | {"writing": len(list(folder.rglob(".part-*"))) > 0}


def kill_at_moments(root: Path, kills: int, start: Callable[[Path], int], survives: Callable[[int, float], bool], most: float, seed: int,
                    keep: Callable[[dict], None]) -> None:
    "Runs that are killed in each life when it has used a random number of CPU seconds up to `most`, eight times at most each; all end at last."
    rng, moments, found, begin = np.random.default_rng(seed), [], {}, time.monotonic()
    enough = False
    while not enough:
        folder, enough = root / f"run-{len(found)}", len(moments) >= kills
        tired = sum(past["run"] == len(found) for past in moments) >= 8       # or most kills would meet runs that have little left to do
        moment = np.inf if enough or tired else rng.uniform(0, most)
        if survives(start(folder), moment): found[len(found)] = differences(folder, root.parent / "whole")
        else: moments.append({"run": len(found), "cpu_seconds": round(moment, 2)} | state_of(folder))
        different = {run: names for run, names in found.items() if names}
        keep({"kills": len(moments), "runs": len(found), "differences": different, "elapsed": round(time.monotonic() - begin), "moments": moments})


def fork_survives(pid: int, moment: float, busy: int | None = None) -> bool:
    if ended(pid, moment, busy): return True
    for process in filter(None, (busy, pid)): os.kill(process, signal.SIGKILL)      # papermill would wait some seconds before it notices
    os.waitpid(pid, 0)
    return False


# ---- papermill ----------------------------------------------------------------------------------------------------------

def by_papermill(folder: Path) -> int:
    "The number of a new process in which papermill runs the notebook."
    values = PARAMETERS | {"out_dir": str(folder)}
    return fork(lambda: papermill.execute_notebook(NOTEBOOK, folder.with_suffix(".ipynb"), values, progress_bar=False), folder.with_suffix(".log"))


def kernel_survives(pid: int, moment: float) -> bool:
    "Papermill's kernel lives in a session of its own: ending papermill alone would leave it at work."
    while True:
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
        for child in children:
            if b"ipykernel_launcher" in Path(f"/proc/{child}/cmdline").read_bytes(): return fork_survives(pid, moment, int(child))
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("how", nargs="+", help="writes, moments=N, kernels=N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    asked = parser.parse_args()
    root, result = asked.folder.resolve(), {}
    prepare()
    ended(forked(root / "whole", checkpoint_seconds=600, resume=False))
    alone = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    most = {"moments": alone, "kernels": alone + time.process_time()}      # a kernel has all to import first

    def keep(how: str, found: dict) -> None:
        result[how] = found
        if asked.out: asked.out.write_text(json.dumps(result, indent=1) + "\n")

    for how, _, kills in (item.partition("=") for item in asked.how):
        start, survives = (by_papermill, kernel_survives) if how == "kernels" else (forked, fork_survives)
        if how == "writes": keep(how, kill_in_writes(root))
        else: kill_at_moments(root / how, int(kills), start, survives, most[how], asked.seed, partial(keep, how))
    print(json.dumps(result))


if __name__ == "__main__": main()
