"""A disk that is really full, under each library that writes a run's files."""
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from thyroid_rlar.files import DataError, write_text, write_whole

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


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_and_leaves_the_old_file_whole(small_disk, name):
    path = write_text(small_disk / name, "old")
    with pytest.raises(DataError, match=f"{name}: writing: found No space left on device, expected free space on this disk"):
        write_whole(path, WRITERS[name])
    assert path.read_text() == "old" and [p.name for p in small_disk.iterdir()] == [name]
    path.unlink()
