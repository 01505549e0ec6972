"""A run that is killed, starved or cut off goes on where it was, or says what to do; its last checkpoint stays whole."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from machine import DEVICE, file_limit

from thyroid_rlar.files import DataError, hold, release, resolve, write_text
from thyroid_rlar.folder import read_folder
from thyroid_rlar.loader import NoduleData, make_split, prepare
from thyroid_rlar.methods import Options, make_objective
from thyroid_rlar.network import MultitaskNet, NetworkSettings
from thyroid_rlar.parameters import ParameterError, RunSettings
from thyroid_rlar.runs import run_folder
from thyroid_rlar.survival import CHECKPOINT, TrainingStopped
from thyroid_rlar.training import PRECISIONS, FitSettings, Trainer

ROOT = Path(__file__).resolve().parent.parent
TIMES = ["seconds", "loader_share", "peak_memory_mb"]


# ---- killed ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict:
    command = [sys.executable, ROOT / "tests/kill.py", tmp_path_factory.mktemp("kills"), "writes", "moments=20", "kernels=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_killed_in_each_of_its_writes_ends_as_one_that_was_not(killed):
    files = {"params.json", "split.parquet", "history.parquet", "nodules.parquet", "latents/000.npz", "model.safetensors", "model.json",
             str(CHECKPOINT), f"{CHECKPOINT} within an epoch", "predictions.parquet"}
    assert files <= set(killed["writes"]["files"]) and killed["writes"]["kills"] == 3 * len(killed["writes"]["files"])
    assert killed["writes"]["differences"] == []


@pytest.mark.parametrize("how, kills", [("moments", 20), ("kernels", 2)])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(killed, how, kills):
    assert killed[how]["kills"] == kills and killed[how]["differences"] == {}


# ---- one folder, one run --------------------------------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from thyroid_rlar.files import hold
hold(sys.argv[1])
if not os.fork(): time.sleep(60)         # as a loader's worker, which outlives its parent for some seconds
print("held", flush=True); time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_in_one_folder_is_refused_and_told_who_has_it(tmp_path):
    first = holder(tmp_path)
    with pytest.raises(DataError, match=f"lock: found it held by process {first.pid} on .*, since 2.*expected no other run in this folder"):
        run_folder(RunSettings(out_dir=str(tmp_path)))
    os.killpg(first.pid, signal.SIGKILL)


def test_a_lock_left_by_a_crash_is_taken_over(tmp_path):
    first = holder(tmp_path)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert f"process {first.pid} on" in (tmp_path / ".lock").read_text()      # still there, and a child of the killed process still lives
    try:
        assert run_folder(RunSettings(out_dir=str(tmp_path))) == tmp_path
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    finally: os.killpg(first.pid, signal.SIGKILL)


def test_a_link_in_a_run_folder_is_neither_written_nor_emptied(tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    (tmp_path / "others").mkdir()
    (tmp_path / "others/000.npz").write_text("kept")
    for name, target in ((".lock", "notes.txt"), ("latents", "others"), ("checkpoint", "others")):
        run = tmp_path / f"run{name}"
        run.mkdir()
        (run / name).symlink_to(tmp_path / target)
        with pytest.raises((DataError, ParameterError), match="symbolic links|is a link"): run_folder(RunSettings(out_dir=str(run)))
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "others/000.npz").read_text() == "kept"


def test_a_run_whose_lock_was_removed_stops_before_it_writes_again(tmp_path):
    hold(tmp_path)
    write_text(tmp_path / "a", "1")
    (tmp_path / ".lock").unlink()
    with pytest.raises(DataError, match="it removed, or another one in its place"): write_text(tmp_path / "a", "2")
    release(tmp_path)


# ---- what can be mended ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory) -> NoduleData:
    phantoms = read_folder(resolve("data/phantom"), verbose=False)
    prepared = prepare(phantoms, (64, 96), tmp_path_factory.mktemp("cache"), n_jobs=1, progress=False)
    return NoduleData(prepared, np.full((len(phantoms), 0), np.nan))


def trainer(folder: Path, data: NoduleData, epochs: int = 2, **settings: object) -> Trainer:
    torch.manual_seed(0)
    net = MultitaskNet(NetworkSettings(grades=5, evidence=0, stride=8, width=32, embedding=16, encoder="mobilenetv3_small_050"), "none")
    split = make_split(data.prepared.manifest, folds=2)
    fit = FitSettings(**{"epochs": epochs, "batch_size": 4, "device": DEVICE.type, "deterministic": DEVICE.type == "cuda"} | settings)
    return Trainer(net, make_objective("rlar", Options(strength=0.2)), data, split, fit, folder)


def at_epoch(number: int, act) -> list:
    return [lambda t: act(t) if t.epoch == number else None]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> pd.DataFrame:
    return trainer(tmp_path_factory.mktemp("whole"), data).fit()


def goes_on(run: Trainer, whole: pd.DataFrame) -> bool: return run.fit(resume=True).drop(columns=TIMES).equals(whole.drop(columns=TIMES))


class Cut(Exception): pass


def cut_after(run: Trainer, steps: int) -> None:
    "Let a run train so many steps, and no more."
    left, real = iter([True] * steps), run.objective.backward

    def backward(*step: object) -> object:
        if not next(left, False): raise Cut
        return real(*step)
    run.objective.backward = backward
    with pytest.raises(Cut): run.fit()


@pytest.mark.parametrize("precision", PRECISIONS if DEVICE.type == "cuda" else ["fp32"])
def test_a_run_cut_off_within_an_epoch_goes_on_the_same_on_each_device(tmp_path, data, precision):
    alone = trainer(tmp_path / "alone", data, precision=precision)
    history = alone.fit()
    cut = trainer(tmp_path / "cut", data, precision=precision, checkpoint_seconds=0)
    cut_after(cut, len(cut.loader) + 2)
    again = trainer(tmp_path / "cut", data, precision=precision)
    torch.manual_seed(1)                # the checkpoint brings its own state
    pd.testing.assert_frame_equal(again.fit(resume=True).drop(columns=TIMES), history.drop(columns=TIMES), check_exact=True)
    assert all(map(torch.equal, alone.net.state_dict().values(), again.net.state_dict().values()))
    if precision == "fp16": assert alone.accelerator.scaler.state_dict() == again.accelerator.scaler.state_dict()


def same_weights(a: Trainer, b: Trainer) -> bool: return all(map(torch.equal, a.net.state_dict().values(), b.net.state_dict().values()))


def test_a_run_with_patience_that_was_cut_off_stops_where_it_would_have_stopped(tmp_path, data):
    "Its best epoch and loss are in the checkpoint: it keeps the same weights, and ends after as many epochs without a better one."
    settings = {"epochs": 30, "patience": 2, "learning_rate": 0.02, "ema": 0.0, "checkpoint_seconds": 0}
    alone = trainer(tmp_path / "alone", data, **settings)
    history = alone.fit()
    assert 3 < alone.epoch < 30 and alone.best_epoch < alone.epoch - 1
    for steps in ((alone.best_epoch + 2) * len(alone.loader), (alone.epoch - 1) * len(alone.loader) + 1):       # past the best, and in the last epoch
        cut = trainer(tmp_path / f"cut{steps}", data, **settings)
        cut_after(cut, steps)
        again = trainer(cut.folder, data, **settings)
        assert goes_on(again, history) and (again.epoch, again.best_epoch, again.best) == (alone.epoch, alone.best_epoch, alone.best)
        assert same_weights(alone, again)


def checkpointed(folder: Path, data: NoduleData, **settings: object) -> Trainer:
    (run := trainer(folder, data, **settings)).net.encoder.set_grad_checkpointing()
    return run


def test_gradient_checkpointing_goes_on_the_same_too(tmp_path, data):
    "Its second pass through the encoder must not draw other numbers after a resumption than it would have drawn before."
    alone = checkpointed(tmp_path / "alone", data)
    history = alone.fit()
    cut_after(cut := checkpointed(tmp_path / "cut", data, checkpoint_seconds=0), len(alone.loader) + 2)
    again = checkpointed(cut.folder, data)
    torch.manual_seed(1)
    pd.testing.assert_frame_equal(again.fit(resume=True).drop(columns=TIMES), history.drop(columns=TIMES), check_exact=True)
    assert same_weights(alone, again)


@pytest.fixture
def disk(tmp_path):
    "A small disk of its own, mounted at two places: what is lost at one can still be looked at in the other."
    places = [tmp_path / "disk", tmp_path / "elsewhere"]
    for place in places: place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", places[0]], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    subprocess.run(["mount", "--bind", *places], check=True)
    yield places
    for place in places: subprocess.run(["umount", "-l", place], capture_output=True)


def test_a_full_disk_stops_the_run_and_with_more_room_it_goes_on(disk, data, whole):
    place, _ = disk
    with pytest.raises(TrainingStopped, match="No space left on device, expected free space on this disk. The checkpoint of epoch 0 is kept. Once"):
        trainer(place / "run", data).fit()
    assert not list(place.rglob(".part-*"))
    subprocess.run(["mount", "-o", "remount,size=60m", place], check=True)
    assert goes_on(trainer(place / "run", data), whole)


def test_a_lost_share_stops_the_run_and_nothing_is_written_beneath_it(disk, data, whole):
    place, elsewhere = disk
    subprocess.run(["mount", "-o", "remount,size=60m", place], check=True)
    run = trainer(place, data)
    run.callbacks = at_epoch(1, lambda t: subprocess.run(["umount", "-l", place], check=True))
    with pytest.raises(TrainingStopped, match="expected its disk or network share back in place. The checkpoint of epoch 0 is kept"): run.fit()
    assert not list(place.iterdir())
    assert goes_on(trainer(elsewhere, data), whole)


def test_a_file_that_may_not_be_written_stops_the_run_and_it_goes_on(tmp_path, data, whole):
    "As on a full disk, but needs no rights: torch says as little of why."
    run, limit = trainer(tmp_path, data), ExitStack()
    run.callbacks = at_epoch(1, lambda t: limit.enter_context(file_limit(2**19)))
    with limit, pytest.raises(TrainingStopped, match="found File too large, expected .*ulimit.* The checkpoint of epoch 0 is kept. Once"): run.fit()
    assert not list(tmp_path.rglob(".part-*"))
    assert goes_on(trainer(tmp_path, data), whole)


def test_a_step_that_runs_out_of_memory_says_what_to_lower(tmp_path, data, whole):
    run = trainer(tmp_path, data)

    def starve(t: Trainer) -> None: t.objective.backward = lambda *_: torch.empty(10**15)
    run.callbacks = at_epoch(1, starve)
    expected = (f"epoch 1, step 0: memory ran out on {DEVICE.type} .* with batch_size 4 and image_size 64x96. Lower batch_size first.* "
                "checkpoint of epoch 0")
    with pytest.raises(TrainingStopped, match=expected): run.fit()
    assert goes_on(trainer(tmp_path, data), whole)


class Deadly(NoduleData):
    def __getitem__(self, key): return os.kill(os.getpid(), signal.SIGKILL) if isinstance(key, tuple) and key[0] == 1 else super().__getitem__(key)


def test_a_loader_process_that_dies_is_named(tmp_path, data, whole):
    deadly = Deadly(data.prepared, data.evidence)
    with pytest.raises(TrainingStopped, match=r"loader process died \(DataLoader worker \(pid.* found num_workers 1, expected fewer; 0 needs none"):
        trainer(tmp_path, deadly, num_workers=1).fit()
    assert goes_on(trainer(tmp_path, data), whole)


def test_a_checkpoint_of_another_version_or_a_damaged_one_is_named(tmp_path, data):
    path = tmp_path / CHECKPOINT
    path.parent.mkdir()
    for content, match in (({"epoch": 1}, "found no average, .*expected a checkpoint of this version"), (None, "expected a whole file")):
        torch.save(content, path) if content else path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(DataError, match=match): trainer(tmp_path, data).fit(resume=True)


STEPS = {"values": {"loss_seg": torch.ones(2)}, "rows": torch.zeros(2, 4, dtype=torch.long), "rates": [0.1, 0.1], "seconds": 0.0, "waited": 0.0}
MANY = torch.ones(1).expand(10**9)                         # a billion rows of four bytes
CHANGES = {"net": None, "optimizer": {}, "schedule": [], "epoch": -5, "best": {}, "steps": {}, "random": "x", "objective": 3, "count": "x",
           "epoch ": 0.5, "best_epoch": float("nan"), "processes": "x", "processes ": 1.5, "steps  ": STEPS | {"rates": [0.1]},
           "steps ": STEPS | {"values": {"loss_seg": MANY}, "rows": MANY.view(-1, 1)}, "steps   ": STEPS | {"rates": ["x", "x"]},
           "steps    ": STEPS | {"values": {"x": torch.ones(2)}}}


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory) -> Path:
    "The folder of a finished run of one epoch."
    trainer(folder := tmp_path_factory.mktemp("saved"), data, epochs=1).fit()
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_of_any_values_ends_in_a_sentence(tmp_path, data, saved, name):
    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT
    torch.save(torch.load(path, weights_only=True) | {name.strip(): CHANGES[name]}, path)
    with pytest.raises(DataError, match="state.pt: content"): trainer(tmp_path / "run", data, epochs=2).fit(resume=True)


FORGED = {
    "a rate of words": lambda state: state["optimizer"]["param_groups"][0].update(lr="0.001"),
    "a decay that is no number": lambda state: state["optimizer"]["param_groups"][1].update(weight_decay=float("nan")),
    "a switch": lambda state: state["optimizer"]["param_groups"][0].update(amsgrad=True),
    "moments of another shape": lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(3)),
    "moments of words": lambda state: state["optimizer"]["state"].update({0: "x"}),
    "no moments but words": lambda state: state["optimizer"].update(state="x"),
    "an end of words": lambda state: state["schedule"].update(total_steps="x"),
    "an end that is near": lambda state: state["schedule"].update(total_steps=1),
    "phases of words": lambda state: state["schedule"]["_schedule_phases"][0].update(end_step="x"),
    "another way": lambda state: state["schedule"].update(_anneal_func_type="x"),
    "steps that were not taken": lambda state: state["schedule"].update(last_epoch=10**9),
    "a best epoch to come": lambda state: state.update(best_epoch=10**9),
    "weights that are no numbers": lambda state: next(iter(state["average"].values())).fill_(float("nan")),
    "moments that are no numbers": lambda state: state["optimizer"]["state"][0]["exp_avg"].fill_(float("inf")),
}


@pytest.mark.parametrize("name", FORGED)
def test_an_optimizer_or_a_schedule_of_any_values_ends_in_a_sentence(tmp_path, data, cut_short, name):
    "They take whatever they are given, and would stumble over it at the next step."
    shutil.copytree(cut_short, tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT
    state = torch.load(path, weights_only=True)
    FORGED[name](state)
    torch.save(state, path)
    with pytest.raises(DataError, match="state.pt: content: .*expected a checkpoint of this"): trainer(tmp_path / "run", data).fit(resume=True)


SPOILT = {
    "history of an epoch less": ("history", lambda table: table[table.epoch < 0]),
    "no nodules": ("nodules", lambda table: table[:0]),
    "history of epochs alone": ("history", lambda table: table[["epoch"]]),
    "nodules without rows": ("nodules", lambda table: table.drop(columns="row")),
}


@pytest.mark.parametrize("name", SPOILT)
def test_tables_that_do_not_go_with_the_checkpoint_are_named(tmp_path, data, cut_short, name):
    "As in a folder that was copied by half, or taken from another day's backup."
    shutil.copytree(cut_short, tmp_path / "run")
    table, spoil = SPOILT[name]
    path = tmp_path / "run" / f"{table}.parquet"
    spoil(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(DataError, match=f"{table}.parquet: (epoch|content: .*no column)"): trainer(tmp_path / "run", data).fit(resume=True)


@pytest.fixture(scope="module")
def cut_short(data, tmp_path_factory) -> Path:
    "The folder of a run that was cut off in its second epoch."
    run = trainer(tmp_path_factory.mktemp("cut_short"), data)
    cut_after(run, len(run.loader) + 1)
    return run.folder


def test_a_checkpoint_that_is_no_dictionary_or_packed_is_refused(tmp_path, data, saved):
    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT
    with zipfile.ZipFile(saved / CHECKPOINT) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist(): new.writestr(part, old.read(part))
    with pytest.raises(DataError, match="packed"): trainer(tmp_path / "run", data, epochs=2).fit(resume=True)
    torch.save([1, 2], path)
    with pytest.raises(DataError, match="a list"): trainer(tmp_path / "run", data, epochs=2).fit(resume=True)


@pytest.mark.parametrize("place", ["torch.load", "load_state_dict"])
def test_a_good_checkpoint_is_not_called_damaged_where_memory_runs_out(tmp_path, data, saved, monkeypatch, place):
    shutil.copytree(saved, tmp_path / "run")
    run = trainer(tmp_path / "run", data, epochs=1)
    if place == "torch.load": monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(10**15))
    else: run.average.net.load_state_dict = lambda _: torch.empty(10**15)
    with pytest.raises(TrainingStopped, match="memory ran out .*[Cc]an.?t allocate memory.* The checkpoint is kept as it is"): run.fit(resume=True)


def test_a_good_checkpoint_on_a_disk_that_fails_is_not_called_damaged(tmp_path, data, saved, monkeypatch):
    def fails(*_: object) -> None: raise OSError(errno.EIO, os.strerror(errno.EIO))
    shutil.copytree(saved, tmp_path / "run")
    run = trainer(tmp_path / "run", data, epochs=2)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", fails)
    with pytest.raises(TrainingStopped, match="reading: found Input/output error, expected its disk .* back in place. The checkpoint is kept"):
        run.fit(resume=True)


def test_one_wrong_bit_in_a_checkpoint_is_noticed(tmp_path, data):
    trainer(tmp_path, data, epochs=1).fit()
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged.*expected a whole file"): trainer(tmp_path, data, epochs=2).fit(resume=True)


def test_another_number_of_processes_does_not_go_on(tmp_path, data, whole):
    trainer(tmp_path, data).fit()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    torch.save(state | {"epoch": 1, "best_epoch": 0, "processes": 2}, tmp_path / CHECKPOINT)
    with pytest.raises(DataError, match="processes: found 1, expected 2, as it began: accelerate launch --num_processes 2"):
        trainer(tmp_path, data).fit(resume=True)
    torch.save(state | {"processes": 2}, tmp_path / CHECKPOINT)           # trained to its end: only read
    assert goes_on(trainer(tmp_path, data), whole)


def test_a_run_that_validation_ended_is_read_by_any_number_of_processes(tmp_path, data):
    settings = {"epochs": 9, "patience": 1, "learning_rate": 1e-8, "ema": 0.0}
    run = trainer(tmp_path, data, **settings)
    history = run.fit()
    assert run.epoch < 9
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True) | {"processes": 2}
    torch.save(state, tmp_path / CHECKPOINT)
    assert goes_on(trainer(tmp_path, data, **settings), history)
    with pytest.raises(DataError, match="processes: found 1, expected 2"): trainer(tmp_path, data, **settings | {"patience": 9}).fit(resume=True)


def test_a_trainer_that_stopped_before_its_first_checkpoint_is_not_begun_twice(tmp_path, data):
    run = trainer(tmp_path, data)
    cut_after(run, 1)
    with pytest.raises(TrainingStopped, match="but steps in this trainer; expected a new one"): run.fit(resume=True)


# ---- stops by itself ------------------------------------------------------------------------------------------------------

def test_a_loss_that_explodes_stops_the_run_before_it_is_kept(tmp_path, data):
    run = trainer(tmp_path, data, epochs=4, learning_rate=10.0)
    with pytest.raises(TrainingStopped, match=r"epoch (\d), step \d: loss_\w+ .* on images \['.*'\] is \d+ times what it was in the first steps"):
        run.fit()
    kept = torch.load(tmp_path / CHECKPOINT, weights_only=True)["epoch"] if (tmp_path / CHECKPOINT).exists() else 0
    assert kept == run.epoch                # the epoch in which it exploded left no checkpoint


def test_a_curve_that_is_flat_from_the_start_is_warned_of(tmp_path, data):
    run = trainer(tmp_path, data, epochs=3, batch_size=1, learning_rate=1e-8)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=r"nothing was learned of .*(seg|risk) \(loss .* too low \(found 1e-08\)"):
        warnings.filterwarnings("error", message="after 2 of 3 epochs")        # the rest need not be trained
        run.fit()


def test_it_is_warned_of_too_where_validation_ends_the_run(tmp_path, data):
    run = trainer(tmp_path, data, epochs=40, patience=2, batch_size=1, learning_rate=1e-8)
    run.objective.weights["risk"] = 0.0
    with pytest.warns(UserWarning, match=r"after \d of 40 epochs nothing was learned of .*seg"): run.fit()


@pytest.mark.parametrize("value, epoch", [(np.inf, 0), (np.nan, 1)])
def test_a_watched_loss_that_is_no_number_stops_the_run_before_it_is_kept(tmp_path, data, value, epoch):
    run = trainer(tmp_path, data)
    watch = run.watch

    def spoil(net, number):
        summary, nodules, z = watch(net, number)
        return summary, nodules.assign(loss_seg=nodules.loss_seg if number < epoch else value), z
    for name in ("parts", "data", "rlar", "strength"): setattr(spoil, name, getattr(watch, name))
    run.watch = spoil
    with pytest.raises(TrainingStopped, match=rf"epoch {epoch}: loss_seg is no finite number on \d+ watched images, as \['"): run.fit()
    assert (tmp_path / CHECKPOINT).exists() == (epoch > 0) == (tmp_path / "model.safetensors").exists()
