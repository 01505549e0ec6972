"""Two processes on the CPU (gloo) train one network between them."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

SCRIPT = """
import json, sys
import numpy as np
import torch
from pathlib import Path
from thyroid_rlar.files import resolve
from thyroid_rlar.folder import read_folder
from thyroid_rlar.loader import NoduleData, make_split, prepare
from thyroid_rlar.network import MultitaskNet, NetworkSettings
from thyroid_rlar.methods import Options, make_objective
from thyroid_rlar.training import FitSettings, Trainer, TrainingStopped

folder, broken = Path(sys.argv[1]), sys.argv[2] == "broken"
torch.set_num_threads(1)
phantoms = read_folder(resolve("data/phantom"), verbose=False)
data = NoduleData(prepare(phantoms, (64, 96), folder / "cache", n_jobs=1, progress=False), np.full((len(phantoms), 0), np.nan))
torch.manual_seed(0)
net = MultitaskNet(NetworkSettings(grades=5, evidence=0, stride=8, width=32, embedding=16))
settings = FitSettings(epochs=2, batch_size=4, device="cpu")
trainer = Trainer(net, make_objective("rlar", Options(strength=0.2)), data, make_split(phantoms), settings, folder / "run")
rank = trainer.accelerator.process_index
assert trainer.accelerator.num_processes == 2
backward = trainer.objective.backward
def spoiled(net, batch, context):
    report = backward(net, batch, context)
    report.means["seg"] = report.means["seg"] * torch.nan
    return report
if broken and rank == 1: trainer.objective.backward = spoiled       # one process alone sees it: the gradients stay finite
said = ""
try: trainer.fit()
except TrainingStopped as stop: said = str(stop)
state = {name: value.double().sum().item() for name, value in trainer.net.state_dict().items()}
found = dict(said=said, best=trainer.best, steps=len(trainer.loader), state=state)
(folder / f"{rank}.json").write_text(json.dumps(found))
"""

JOINED = """
import json, os, sys
import numpy as np
import torch
from pathlib import Path
from thyroid_rlar.files import resolve
from thyroid_rlar.folder import read_folder
from thyroid_rlar.loader import NoduleData, make_split, prepare
from thyroid_rlar.methods import Options, make_objective
from thyroid_rlar.network import MultitaskNet, NetworkSettings
from thyroid_rlar.training import FitSettings, Trainer

folder, world = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
torch.set_num_threads(1)
phantoms = read_folder(resolve("data/phantom"), verbose=False)
evidence = np.random.default_rng(0).normal(size=(len(phantoms), 3))
data = NoduleData(prepare(phantoms, (64, 96), folder / "cache", n_jobs=1, progress=False), evidence)
torch.manual_seed(0)
net = MultitaskNet(NetworkSettings(grades=5, evidence=3, stride=8, width=32, embedding=16, freeze_norm=True, dropout=0.0))
settings = FitSettings(epochs=2, batch_size=8 // world, device="cpu")
trainer = Trainer(net, make_objective("rlar", Options(strength=0.2)), data, make_split(phantoms), settings, folder / f"run{world}")
seen = []
step = trainer.objective.backward
def listen(net, batch, context):
    seen.append(batch["index"].tolist())
    return step(net, batch, context)
trainer.objective.backward = listen
history = trainer.fit()
if trainer.accelerator.is_main_process: torch.save({n: t.clone() for n, t in trainer.net.state_dict().items()}, folder / f"weights{world}.pt")
(folder / f"seen{world}-{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))
"""


def launch_two(folder: Path, script: str, *arguments: object, **environment: str) -> None:
    "Run a script in two processes that know of each other, and wait; fail with what one of them said."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    (folder / "script.py").write_text(script)

    together = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"} | environment
    command = [str(part) for part in (sys.executable, folder / "script.py", *arguments)]
    running = [subprocess.Popen(command, env=together | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True) for rank in "01"]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]


def two_processes(folder: Path, how: str) -> list[dict]:
    launch_two(folder, SCRIPT, folder, how)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_both_end_with_the_same_network_and_one_run_folder(tmp_path):
    first, second = two_processes(tmp_path, "whole")
    assert first["said"] == second["said"] == "" and first["steps"] == second["steps"] > 0
    assert first["best"] == second["best"] and first["state"] == second["state"]
    assert (tmp_path / "run/model.safetensors").is_file()


def test_two_processes_train_as_one_with_the_joined_batch(tmp_path):
    "Same images in each step, same weights, same measurements; what differs is the order in which numbers are added."
    launch_two(tmp_path, JOINED, tmp_path)
    subprocess.run([sys.executable, tmp_path / "script.py", tmp_path], check=True, timeout=300, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    seen = [json.loads((tmp_path / f"seen{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")]
    assert len(seen[0]) > 4 and seen[0] == [first + second for first, second in zip(*seen[1:])]
    alone, two = (torch.load(tmp_path / f"weights{n}.pt", weights_only=True) for n in (1, 2))
    for name, weight in alone.items():
        if weight.is_floating_point(): assert (two[name] - weight).norm() <= 1e-4 * weight.norm() + 1e-6, name
    history = [pd.read_parquet(tmp_path / f"run{n}/history.parquet").query("kind == 'epoch'").reset_index(drop=True) for n in (1, 2)]
    for column in ("loss_seg", "loss_risk", "loss_evidence", "dice", "cos_pooled_mean", "excess", "rlar_weight", "strength"):
        np.testing.assert_allclose(history[1][column], history[0][column], rtol=1e-3, atol=1e-4, err_msg=column)


def test_where_one_must_stop_both_do(tmp_path):
    first, second = (found["said"] for found in two_processes(tmp_path, "broken"))
    assert "another process" in first and "step 0: loss_seg nan on images" in second


