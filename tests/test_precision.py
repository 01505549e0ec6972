"""Directions, cosine and penalty in float32 and under bf16 autocast are those of float64, within stated tolerances."""
import copy
from functools import cache

import pytest
import torch
from machine import DEVICE
from torch import Tensor

from thyroid_rlar.instruments import probe
from thyroid_rlar.network import LITE0, MultitaskNet, NetworkSettings
from thyroid_rlar.objectives import RLARObjective, StepContext
from thyroid_rlar.rlar import FORMS, RLAR, WHERE, flatten_gradient, unit

# what may differ from float64: a direction (1 - its cosine with float64's), the cosine of the two tasks, the penalty and the whole gradient of
# an objective (both as shares)
TOLERANCES = {"float32": dict(direction=1e-6, cosine=1e-5, penalty=1e-4, gradient=1e-4),
              "bf16": dict(direction=0.01, cosine=0.02, penalty=0.1, gradient=0.04)}


@pytest.fixture(autouse=True)
def whole_float32():
    "On a GPU convolutions round their inputs to TF32, a tenth of float32's digits, unless told not to."
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def example(network: str, encoder: str = LITE0) -> tuple[MultitaskNet, dict[str, Tensor]]:
    "The default architecture with its norm frozen, by default with ImageNet's encoder, and images with a disc to segment."
    torch.manual_seed(0)
    settings = NetworkSettings(grades=5, evidence=3, network=network, encoder=encoder, dropout=0.0)
    net = MultitaskNet(settings, "bundled" if encoder == LITE0 else "none").to(DEVICE).eval()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 96), indexing="ij")
    mask = ((x - torch.linspace(-0.4, 0.4, 6)[:, None, None]).square() + y.square() < 0.15)[:, None].float()
    image = (0.5 - 0.3 * mask + 0.1 * torch.randn(6, 1, 64, 96)).clamp(0, 1)
    batch = dict(image=image, mask=mask, valid=torch.ones_like(mask, dtype=torch.bool), has_mask=torch.ones(6, dtype=torch.bool),
                 grade=torch.arange(6) % 5, evidence=torch.randn(6, 3), index=torch.arange(6), group=torch.arange(6))
    return net, {k: v.to(DEVICE) for k, v in batch.items()}


def in_precision(precision: str, net: MultitaskNet, batch: dict[str, Tensor]):
    "Network, batch and context of a forward pass in that precision."
    if precision != "float64":
        autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")
        return net, batch, StepContext(autocast=lambda: autocast)
    return copy.deepcopy(net).double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}, StepContext()


@cache                                                       # for both places, and float64 for all that is held against it
def gradients(precision: str, network: str) -> tuple[Tensor, Tensor]:
    "Both tasks' gradients at z, (B,C,h,w) each."
    net, batch, context = in_precision(precision, *example(network))
    with context.autocast(): p = probe(net, batch)
    return p.g_seg, p.g_risk


def readings(precision: str, network: str, where: str) -> tuple[Tensor, Tensor, Tensor]:
    "Unit directions of both tasks (B,d), and their cosines (B,)."
    (u_seg, *_), (u_risk, *_) = (unit(flatten_gradient(g, where)) for g in gradients(precision, network))
    return u_seg.double(), u_risk.double(), (u_seg * u_risk).sum(1).double()


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("network", ["shared_map", "unet"])
def test_directions_and_cosine(network, where, precision):
    limits, found, exact = TOLERANCES[precision], readings(precision, network, where), readings("float64", network, where)
    for a, b in zip(found[:2], exact[:2]): assert (1 - (a * b).sum(1)).max() < limits["direction"]
    assert (found[2] - exact[2]).abs().max() < limits["cosine"]


@cache
def step(precision: str, network: str, form: str) -> tuple[float, Tensor]:
    "Penalty and gradient of RLAR's objective."
    net, batch, context = in_precision(precision, *example(network, "test_efficientnet"))
    report = RLARObjective(RLAR(weight=1.0, form=form)).backward(net, batch, context)
    return report.alignment.penalty.item(), torch.cat([p.grad.flatten().double() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("network", ["shared_map", "unet"])
def test_penalty_and_gradient(network, form, precision):
    (penalty, gradient), (exact_penalty, exact) = step(precision, network, form), step("float64", network, form)
    assert abs(penalty - exact_penalty) < TOLERANCES[precision]["penalty"] * exact_penalty
    assert (gradient - exact).norm() < TOLERANCES[precision]["gradient"] * exact.norm()
