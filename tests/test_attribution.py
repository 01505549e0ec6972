"""attribution.py where the right answer is known: phantoms of which only the rim, or only the bright foci, tell the grade."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from machine import DEVICE
from scipy import ndimage as ndi

from thyroid_rlar.attribution import Method, Target, attribute, look, nodule_regions, planted_phantom, randomised, region_shares
from thyroid_rlar.network import MultitaskNet, NetworkSettings

KINDS = [(rim, foci) for rim in (False, True) for foci in (False, True)]


def planted(start: int, n: int) -> list: return [planted_phantom(start + i, *KINDS[i % 4]) for i in range(n)]


def tensor(arrays) -> torch.Tensor: return torch.from_numpy(np.stack(list(arrays))).float()[:, None].to(DEVICE)


def answers(phantoms: list, rule: str) -> torch.Tensor: return torch.tensor([int(getattr(p, rule).any()) for p in phantoms], device=DEVICE)


@pytest.fixture(scope="module", params=["rim", "foci"])
def learnt(request):
    "The rule, and a small network that has learnt it: the grade is 1 if there is a rim, or foci, whatever else there is."
    torch.manual_seed(0)
    rule, phantoms = request.param, planted(0, 256)
    net = MultitaskNet(NetworkSettings(grades=2, evidence=0, encoder="test_efficientnet", width=32, dropout=0.0), "none").to(DEVICE)
    image, mask, grade = tensor(p.image for p in phantoms) / 255, tensor(p.mask for p in phantoms), answers(phantoms, rule)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=8 * 16)
    for rows in (part for _ in range(8) for part in torch.randperm(256).split(16)):
        output = net(image[rows])
        loss = F.nll_loss(output.grade_logits, grade[rows]) + F.binary_cross_entropy_with_logits(output.mask_logits, mask[rows])
        optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
    return rule, net.eval()


def test_the_rule_has_been_learnt(learnt):
    rule, net = learnt
    phantoms = planted(5000, 64)
    with torch.no_grad(): output = net(tensor(p.image for p in phantoms) / 255)
    assert (output.grade_logits.argmax(1) == answers(phantoms, rule)).float().mean() >= 0.97
    found, mask = output.mask_logits > 0, tensor(p.mask for p in phantoms) > 0
    assert 2 * (found & mask).sum() / (found.sum() + mask.sum()) > 0.8


@pytest.mark.parametrize("target", [Target("mask"), Target("grade", 0), Target("grade", 1), Target("next")], ids=lambda t: f"{t.kind} {t.index}")
def test_integrated_gradients_add_up_to_the_difference_they_explain(learnt, target):
    _, net = learnt
    for seed in range(9000, 9004):
        image = tensor([planted_phantom(seed, True, True).image]) / 255
        a = attribute(net, look(net, image, torch.ones_like(image, dtype=torch.bool)), target)
        assert abs(a.map.sum(dtype=np.float64) - a.difference) <= 0.02 * abs(a.difference) + 1e-4, (seed, a.delta, a.difference)


@pytest.mark.parametrize("method", [Method(), Method("occlusion", window=8, stride=4, batch=32),
                                    Method("noise_tunnel", over="integrated_gradients", samples=4, steps=12)], ids=lambda m: m.name)
def test_the_planted_signal_gets_the_attribution(learnt, method):
    """Of nodules that have both, rim and foci: at least three times the rest's attribution per pixel, and three times the share with random weights.

    Occlusion sees no finer than its window, 8 pixels, and the rim is 4 wide: there it gets about 2.3 times the random share, so 2 are asked."""
    rule, net = learnt
    valid, shares, randoms, densities = torch.ones(1, 1, 64, 96, dtype=torch.bool, device=DEVICE), [], [], []
    for seed in range(9000, 9004):
        p = planted_phantom(seed, True, True)
        image, signal = tensor([p.image]) / 255, getattr(p, rule)
        subject = look(net, image, valid)
        drawn = [again for name, again in randomised(net, seed) if name == "all weights"]
        trained, random = (attribute(n, subject, Target("next"), method).map for n in (net, *drawn))
        parts = {"signal": signal, "rest": ~signal}
        table, null = (region_shares(m, parts).set_index("region") for m in (trained, random))
        shares.append(table.share.signal); randoms.append(null.share.signal)
        densities.append(table.density.signal / table.density.rest)
    print(f"{rule} {method.name}: {np.mean(densities):.1f} times the rest per pixel; share {np.mean(shares):.3f}, random {np.mean(randoms):.3f}")
    assert np.mean(densities) >= 3 and min(densities) > 1
    assert np.mean(shares) >= (2 if (rule, method.name) == ("rim", "occlusion") else 3) * np.mean(randoms)


def test_the_region_table_finds_a_rim_at_the_border(learnt):
    rule, net = learnt
    valid, found = np.ones((64, 96), bool), []
    for seed in range(9000, 9004):
        p = planted_phantom(seed, True, True)
        subject = look(net, tensor([p.image]) / 255, torch.ones(1, 1, 64, 96, dtype=torch.bool, device=DEVICE))
        regions = nodule_regions(ndi.binary_dilation(p.mask, iterations=1), valid, border=3, ring=8)     # the rim lies on either side of the border
        found.append(region_shares(attribute(net, subject, Target("next")).map, regions).set_index("region").density)
    mean = sum(found) / len(found)
    assert mean.idxmax() == {"rim": "border", "foci": "inside"}[rule] and mean.outside < 0.5
