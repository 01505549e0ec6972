"""latent.py on trained networks of both kinds: the directions, the bits at step 0, the speed, and the maps with UMAP."""
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from machine import DEVICE

from thyroid_rlar.files import DataError
from thyroid_rlar.latent import SKIPS_FIXED, Traversal, latent_map, neighbours, plane, standardise
from thyroid_rlar.network import MultitaskNet, NetworkSettings
from thyroid_rlar.parameters import check_parameters
from thyroid_rlar.runs import load_data, make_trainer, open_source, run_folder


@pytest.fixture(scope="module", params=["shared_map", "unet"])
def trained(request, tmp_path_factory):
    "A network trained on the repository's phantoms, its data and its folder."
    folder = tmp_path_factory.mktemp(request.param)
    s = check_parameters(dict(source="folder", data_dir="data/phantom", out_dir=str(folder), image_size="64x96", epochs=16, batch_size=4,
                              device=DEVICE.type, fold="all", objective="sum", network=request.param))
    run = load_data(s, open_source(s, progress=False), progress=False)
    trainer = make_trainer(s, run, run_folder(s))
    history = trainer.fit()
    losses = history[history.kind == "epoch"][["loss_seg", "loss_risk"]]
    assert (losses.iloc[-1] < losses.iloc[0]).all(), "the network has learnt nothing"
    return trainer.net.eval(), run.data, folder


def batch_of(data, row: int) -> dict: return {k: v[None].to(DEVICE) for k, v in data[row].items()}


def latents(net, data) -> pd.DataFrame:
    with torch.no_grad(): z = [net.encode(data[row]["image"][None].to(DEVICE))[0].mean((2, 3))[0].cpu().numpy() for row in range(len(data))]
    return pd.DataFrame(z, index=data.prepared.manifest.rows.image_id)


@pytest.mark.parametrize("where", ["map", "pooled"])
def test_each_loss_rises_along_its_own_direction(trained, where):
    net, data, _ = trained
    rises = []
    for row in range(len(data)):
        losses = Traversal(net, batch_of(data, row), where).step([0, 0.002, 0], [0, 0, 0.002]).losses
        rises.append([(losses.seg[1] > losses.seg[0]).item(), (losses.risk[2] > losses.risk[0]).item()])
    share = np.mean(rises, 0)
    print(f"{net.settings.network}, {where}: rises for {share[0]:.0%} (segmentation) and {share[1]:.0%} (grade) of {len(rises)} nodules")
    assert (share >= 0.95).all()


def test_at_step_0_everything_is_the_networks_own_bit_for_bit(trained):
    net, data, _ = trained
    for row in range(6):
        batch = batch_of(data, row)
        found = Traversal(net, batch).step()
        with torch.no_grad(): own = net(batch["image"], batch["valid"])
        assert torch.equal(found.mask_logits, own.mask_logits) and torch.equal(found.evidence, own.evidence)
        assert torch.equal(found.probabilities, own.grade_logits.softmax(1))
        assert found.dice.item() == 1


def test_where_skips_go_around_z_the_result_says_so(trained):
    net, data, _ = trained
    assert Traversal(net, batch_of(data, 0)).notes == ([SKIPS_FIXED] if net.settings.network == "unet" else [])


def test_the_network_is_left_as_it_was(trained):
    net, data, _ = trained
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for p in net.parameters(): p.grad = None
    list(plane(Traversal(net, batch_of(data, 0)), 0.3, 3))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.training and not any(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("network", ["shared_map", "unet"])
def test_speed_at_the_default_size(network):
    "A step in 60 ms and a plane in 6 s, in seconds of one processor, since other work may share the machine."
    torch.manual_seed(0)
    net = MultitaskNet(NetworkSettings(grades=6, evidence=18, network=network)).eval().to(memory_format=torch.channels_last)
    h, w = 160, 224
    batch = dict(image=torch.rand(1, 1, h, w), mask=(torch.rand(1, 1, h, w) > 0.8).float(), valid=torch.ones(1, 1, h, w, dtype=torch.bool),
                 has_mask=torch.tensor([True]), grade=torch.tensor([2]), evidence=torch.zeros(1, 18), index=torch.tensor([0]),
                 group=torch.tensor([0]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def best(run, times: int) -> float:
        found = []
        for _ in range(times):
            start = time.process_time()
            run()
            found.append(time.process_time() - start)
        return min(found)

    try:
        t = Traversal(net, batch)
        opened, step, row = best(lambda: Traversal(net, batch).directions, 5), best(lambda: t.step(0.1, 0.1), 20), best(lambda: next(plane(t)), 8)
    finally: torch.set_num_threads(threads)
    print(f"{network}: opening {1000 * opened:.0f} ms, a step {1000 * step:.0f} ms, a plane of 21 x 21 {63 * row:.1f} s")
    assert step < 0.06 and 63 * row < 6


def test_a_run_is_laid_out_by_umap_once(trained):
    net, data, folder = trained
    z = latents(net, data)
    made = latent_map(z, folder)
    path, = (folder / "explore").glob("map-umap-*.npz")
    written, start = path.stat().st_mtime_ns, time.perf_counter()
    again = latent_map(z, folder)
    seconds = time.perf_counter() - start
    pd.testing.assert_frame_equal(made.now, again.now)
    pd.testing.assert_frame_equal(made.before, again.before)
    assert made.method == "umap" and made.axes == ("UMAP 1", "UMAP 2") and not made.note and len(made.now) == len(data)
    assert path.stat().st_mtime_ns == written and seconds < 2, seconds
    assert set(made.before.epoch) == {0, 5, 10, 15} and np.isfinite(made.before[["x", "y"]]).all(axis=None)
    path.unlink()
    pd.testing.assert_frame_equal(latent_map(z, folder).before, made.before)     # the seed alone decides


def test_a_folder_that_cannot_be_written_has_maps_all_the_same(trained, monkeypatch):
    net, data, folder = trained

    def refuse(path: Path, write) -> None: raise DataError(path, "writing", "no permission", "a folder that can be written")

    monkeypatch.setattr("thyroid_rlar.latent.write_whole", refuse)
    assert latent_map(latents(net, data), folder, "pca").method == "pca" and not [*(folder / "explore").glob("map-pca-*")]


def test_neighbours_of_5000_are_found_in_milliseconds(trained):
    net, data, _ = trained
    z = standardise(latents(net, data).to_numpy())
    many = np.random.default_rng(0).normal(size=(5000, z.shape[1])).astype(np.float32)
    many[:len(z)] = z
    times = []
    for row in range(20):
        start = time.perf_counter()
        found = neighbours(many, row)
        times.append(time.perf_counter() - start)
        distance = np.sqrt(((many - many[row]) ** 2).mean(1))
        assert row not in set(found.row) and np.allclose(found.distance, np.sort(distance[np.arange(5000) != row])[:8])
    print(f"neighbours among 5,000 of {z.shape[1]} channels: {1000 * np.median(times):.1f} ms")
    assert min(times) < 0.05
