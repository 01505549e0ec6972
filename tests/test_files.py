"""A disk that is really full, and a limit that needs no rights to be met, under each library that writes a run's files."""
import errno
import os
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from machine import file_limit
from safetensors.torch import save_file

from thyroid_rlar.files import DataError, hold, release, write_text, write_whole

LARGE = torch.zeros(500_000)        # 2 MB, on a disk of 1 MB
WRITERS = {
    "state.pt": lambda path: torch.save({"weights": LARGE}, path),
    "arrays.npy": lambda path: np.save(path, LARGE.numpy()),
    "latents.npz": lambda path: np.savez_compressed(path, z=np.random.default_rng(0).random(500_000)),
    "model.safetensors": lambda path: save_file({"weights": LARGE}, path),
    "history.parquet": pd.DataFrame({"x": np.random.default_rng(0).random(500_000)}).to_parquet,
    "report.html": lambda path: path.write_text("x" * 2_000_000),
}


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_lock_that_could_not_be_written_is_not_kept(tmp_path):
    "IPython keeps the traceback of an error, and with it what was open; the next try must not meet its own lock."
    with file_limit(0), pytest.raises(DataError, match="writing: found File too large") as kept: hold(tmp_path / "run")
    hold(tmp_path / "run")
    release(tmp_path / "run")
    assert kept.value.__traceback__ is not None


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_and_leaves_the_old_file_whole(small_disk, name):
    path = write_text(small_disk / name, "old")
    with pytest.raises(DataError, match=f"{name}: writing: found No space left on device, expected free space on this disk"):
        write_whole(path, WRITERS[name])
    assert path.read_text() == "old" and [p.name for p in small_disk.iterdir()] == [name]
    path.unlink()


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_the_system_refuses_to_write_is_named_and_the_old_one_stays(tmp_path, name):
    path = write_text(tmp_path / name, "old")
    with file_limit(2**20), pytest.raises(DataError, match=f"{name}: writing: found File too large, expected .*files of this size"):
        write_whole(path, WRITERS[name])
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == [name]


REASONS = [(errno.EDQUOT, "within your quota: remove files"), (errno.ENOSPC, "on this disk"), (errno.EIO, "network share back")]


@pytest.mark.parametrize("name", ["state.pt", "arrays.npy"])
@pytest.mark.parametrize("number, advice", REASONS)
def test_why_a_disk_refuses_is_asked_where_the_library_does_not_say(tmp_path, monkeypatch, name, number, advice):
    "The limit makes the library raise what it raises; then another reason stands in the disk's place."
    def refuses(_: int) -> None: raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "fsync", refuses)
    def write(part: Path) -> None:
        with file_limit(2**20): WRITERS[name](part)
    with pytest.raises(DataError, match=f"writing: found {os.strerror(number)}, expected .*{advice}"): write_whole(tmp_path / name, write)
