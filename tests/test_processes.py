"""Two processes on the CPU (gloo) train one network between them."""
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from machine import free_port
from nbclient import NotebookClient
from safetensors.torch import load_file

from thyroid_rlar.files import held, project_root
from thyroid_rlar.training import FitSettings, make_accelerator

ROOT = project_root()

SCRIPT = """
import json, os, sys
import numpy as np
import torch
from pathlib import Path
from thyroid_rlar.files import resolve
from thyroid_rlar.folder import read_folder
from thyroid_rlar.loader import NoduleData, make_split, prepare
from thyroid_rlar.methods import Options, make_objective
from thyroid_rlar.network import MultitaskNet, NetworkSettings
from thyroid_rlar.training import FitSettings, Trainer, TrainingStopped

folder, world = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
torch.set_num_threads(1)
phantoms = read_folder(resolve("data/phantom"), verbose=False)
prepared = prepare(phantoms, (64, 96), folder / "cache", n_jobs=1, progress=False)

def make(name, evidence, **settings):
    torch.manual_seed(0)
    net = MultitaskNet(NetworkSettings(grades=5, evidence=evidence, stride=8, width=32, embedding=16, **settings))
    values = np.random.default_rng(0).normal(size=(len(phantoms), evidence))
    fit = FitSettings(epochs=2, batch_size=8 // world, device="cpu")
    return Trainer(net, make_objective("rlar", Options(strength=0.2)), NoduleData(prepared, values), make_split(phantoms), fit, folder / name)

trainer = make(f"run{world}", 3, freeze_norm=True, dropout=0.0)
rank, seen, step = trainer.accelerator.process_index, [], trainer.objective.backward
assert trainer.accelerator.num_processes == world
def listen(net, batch, context):
    seen.append(batch["index"].tolist())
    return step(net, batch, context)
trainer.objective.backward = listen
def keep(name): torch.save({n: t.clone() for n, t in trainer.net.state_dict().items()}, folder / f"{name}{world}-{rank}.pt")
for group in trainer.optimizer.param_groups: group["eps"] = 1e-3       # else Adam makes whole steps of what is only rounding
keep("start")
trainer.fit()
keep("weights")
(folder / f"seen{world}-{rank}.json").write_text(json.dumps(seen))
if world == 1: sys.exit()

torch.distributed.init_process_group("gloo")             # which the first run's end has closed
trainer = make("spoiled", 0)
backward = trainer.objective.backward
def spoiled(net, batch, context):
    report = backward(net, batch, context)
    report.means["seg"] = report.means["seg"] * torch.nan
    return report
if rank == 1: trainer.objective.backward = spoiled       # one process alone sees it: the gradients stay finite
said = ""
try: trainer.fit()
except TrainingStopped as stop: said = str(stop)

running = make("running", 0)                           # running statistics, which each process gathers from its own images
running.fit()
torch.save(dict(running.net.named_buffers()), folder / f"buffers-{rank}.pt")
torch.distributed.init_process_group("gloo")

trainer, average = make("not_finite", 0), ""
if rank == 1: trainer.average.update = lambda net: trainer.average.net.state_dict()["mask.body.1.bias"].fill_(torch.nan)     # its losses stay finite
try: trainer.fit()
except TrainingStopped as stop: average = str(stop)
(folder / f"{rank}.json").write_text(json.dumps(dict(said=said, average=average)))
"""


def launch_two(folder: Path, script: str, *arguments: object, **environment: str) -> None:
    "Run a script in two processes that know of each other, and wait; fail with what one of them said."
    (folder / "script.py").write_text(script)

    together = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"} | environment
    command = [str(part) for part in (sys.executable, folder / "script.py", *arguments)]
    running = [subprocess.Popen(command, env=together | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True) for rank in "01"]
    errors = [process.communicate(timeout=300)[1][-3000:] for process in running]
    assert not any(process.returncode for process in running), "\n".join(errors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "What the script leaves: two processes' files, and those of one, which is this."
    launch_two(folder := tmp_path_factory.mktemp("two"), SCRIPT, folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["script.py", str(folder)])
        runpy.run_path(str(folder / "script.py"))
    return folder


def test_two_processes_train_as_one_with_the_joined_batch(folder):
    "Same images in each step, same weights, same measurements; what differs is the order in which numbers are added."
    seen = [json.loads((folder / f"seen{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")]
    assert len(seen[0]) > 4 and seen[0] == [first + second for first, second in zip(*seen[1:])]
    alone, two, other = (torch.load(folder / f"weights{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert all(torch.equal(two[name], other[name]) for name in two) and (folder / "run2/model.safetensors").is_file()
    moved, apart = (sum((there[n] - w).square().sum() for n, w in alone.items() if w.is_floating_point()).sqrt()
                    for there in (torch.load(folder / "start1-0.pt", weights_only=True), two))
    assert apart < 5e-3 * moved, (apart, moved)
    history = [pd.read_parquet(folder / f"run{n}/history.parquet").query("kind == 'epoch'").reset_index(drop=True) for n in (1, 2)]
    for column in ("loss_seg", "loss_risk", "loss_evidence", "dice", "cos_pooled_mean", "excess", "rlar_weight", "strength"):
        np.testing.assert_allclose(history[1][column], history[0][column], rtol=1e-3, atol=1e-4, err_msg=column)


def test_running_statistics_are_those_of_all_images(folder):
    "Each process gathers them from images of its own; at an epoch's end they are averaged, so that all measure the same network."
    one, other = (torch.load(folder / f"buffers-{rank}.pt", weights_only=True) for rank in range(2))
    means = [name for name in one if name.endswith("running_mean")]
    assert len(means) > 10 and all(torch.equal(one[name], other[name]) for name in means)


def test_where_one_must_stop_both_do(folder):
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert "another process" in first["said"] and "step 0: loss_seg nan on images" in second["said"]
    assert "another process" in first["average"] and "the weights are no longer finite" in second["average"]


def values(out: Path) -> dict[str, object]:
    "Parameters of a run on a copy of the phantoms beside it, whose images are not prepared yet."
    data = out.parent / f"{out.name}-data"
    if not data.exists(): shutil.copytree(ROOT / "data/phantom", data)
    return dict(source="folder", data_dir=str(data), device="cpu", image_size="32x64", epochs=3, batch_size=4, folds=3, freeze_norm=True,
                out_dir=str(out))


def launched(out: Path, *more: object) -> subprocess.Popen:
    "A run in two processes on the CPU, as a user starts it from a shell."
    asked = [str(part) for name, value in values(out).items() for part in ("-p", name, value)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port()),
               "-m", "thyroid_rlar.launch", *asked, *map(str, more)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(launcher: subprocess.Popen) -> list[int]:
    "The processes that a launcher has started."
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    "The folder of a run that a notebook launched, and that was left alone."
    folder = tmp_path_factory.mktemp("launched") / "whole"
    call = f"notebook_launcher(train_run, ({values(folder)!r},), num_processes=2, use_port='{free_port()}')"
    cell = f"from accelerate import notebook_launcher\nfrom thyroid_rlar.launch import train_run\n{call}"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(nb, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found through pgrep")
def test_a_launched_run_whose_process_dies_ends_and_goes_on_to_the_same_end_as_a_notebooks(tmp_path, whole):
    killed = launched(tmp_path / "killed")
    while not (tmp_path / "killed/checkpoint/state.pt").is_file() and killed.poll() is None: time.sleep(0.02)
    both = workers(killed)
    assert len(both) == 2
    os.kill(both[1], signal.SIGKILL)
    killed.communicate(timeout=120)
    assert killed.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in both)

    again = launched(tmp_path / "killed", "-p", "resume", True)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and "Trained: " in said, said[-3000:]
    ends = [load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "killed")]
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
    epochs = [pd.read_parquet(folder / "history.parquet").query("kind == 'epoch' and split == 'val'") for folder in (whole, tmp_path / "killed")]
    assert epochs[1].epoch.tolist() == [0, 1, 2] and epochs[0].loss_seg.tolist() == epochs[1].loss_seg.tolist()


NOTEBOOK = """
from accelerate import notebook_launcher
from thyroid_rlar.launch import train_run
try: notebook_launcher(train_run, ({values!r},), num_processes=2, use_port='{port}')
except Exception as error: print("ended:", type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found through pgrep")
def test_a_run_that_a_notebook_launched_ends_when_a_process_dies(tmp_path, whole):
    "The cell raises, the fellow is gone, the checkpoint is whole and the folder free; that such a run goes on is seen above."
    out = tmp_path / "run"
    asked = values(whole) | {"epochs": 99, "out_dir": str(out)}                   # on images that are prepared by now
    code = NOTEBOOK.format(values=asked, port=free_port())
    notebook = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
    while not (out / "checkpoint/state.pt").is_file() and notebook.poll() is None: time.sleep(0.02)
    line = Path(f"/proc/{notebook.pid}/cmdline").read_bytes()
    both = [pid for pid in workers(notebook) if Path(f"/proc/{pid}/cmdline").read_bytes() == line]       # forks, and no tracker of joblib's
    assert len(both) == 2
    os.kill(both[1], signal.SIGKILL)
    said, _ = notebook.communicate(timeout=60)
    assert notebook.returncode == 0 and "ended: " in said and "SIGKILL" in said, said[-3000:]
    assert not any(Path(f"/proc/{pid}").exists() for pid in both)
    assert torch.load(out / "checkpoint/state.pt", weights_only=True)["epoch"] >= 1
    with held(out): pass


def test_gradient_accumulation_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ValueError, match="gradient accumulation: found 2 batches a step, expected 1"):
        make_accelerator(FitSettings(device="cpu"), tmp_path)
