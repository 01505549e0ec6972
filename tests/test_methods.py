"""Every method of the registry goes on from a checkpoint bit for bit, and several processes give the gradients of one or are refused."""
import copy
import io
import json
import os
from pathlib import Path

import pytest
import torch
from machine import DEVICE, DTYPE, EXACT, TOLERANCE
from test_processes import launch_two
from torch import Tensor

from thyroid_rlar.loader import MISSING_GRADE
from thyroid_rlar.methods import METHODS, Options, make_objective
from thyroid_rlar.network import MultitaskNet, NetworkSettings
from thyroid_rlar.objectives import Objective, StepContext, check_processes
from thyroid_rlar.rlar import RLAR


def example(n: int = 8, network: str = "shared_map", encoder: str = "test_efficientnet") -> tuple[MultitaskNet, dict[str, Tensor]]:
    "A small network with its encoder's norm frozen, and a batch with every kind of gap, unevenly spread over its halves."
    torch.manual_seed(0)
    settings = NetworkSettings(grades=6, evidence=5, network=network, encoder=encoder, width=16, embedding=16, dropout=0.0, rotate=True,
                               freeze_norm=True)
    net = MultitaskNet(settings, pretrained="none").to(DEVICE, DTYPE).train()
    image, evidence, grade = torch.rand(n, 1, 32, 64).to(DTYPE), torch.randn(n, 5).to(DTYPE), torch.randint(0, 6, (n,))
    has_mask = torch.ones(n, dtype=torch.bool)
    has_mask[1], grade[[0, 2, 3]], evidence[3] = False, MISSING_GRADE, torch.nan
    batch = dict(image=image, valid=torch.ones(n, 1, 32, 64, dtype=torch.bool), mask=(image > 0.6).to(DTYPE), has_mask=has_mask, grade=grade,
                 evidence=evidence, index=torch.arange(n), group=torch.arange(n))
    return net, {k: v.to(DEVICE) for k, v in batch.items()}


def options(**changes) -> Options: return Options(**dict(rlar=RLAR(weight=5.0), strength=0.1, warmup=0.5) | changes)


# RLAR's further forms, beside the methods as they are
RLAR_FORMS = {
    "rlar at map": dict(rlar=RLAR(weight=5.0, where="map")), "rlar one_sided": dict(rlar=RLAR(weight=5.0, mode="one_sided")),
    "rlar upstream": dict(strength_at="upstream"), "rlar with constant lambda": dict(strength=0.0),
    "rlar on all pairs": dict(pairs={("seg", "risk"): 1.0, ("seg", "evidence"): 0.5, ("risk", "evidence"): 0.5}),
}


def make(name: str) -> Objective:
    "A method of the registry, or one of RLAR_FORMS."
    return make_objective(name.split()[0], options(**RLAR_FORMS.get(name, {})))


def train(net: MultitaskNet, objective: Objective, batch: dict[str, Tensor], steps: range, optimizer) -> None:
    "Steps on rolled batches, an epoch of two steps each."
    for step in steps:
        shifted = {k: v.roll(step, 0) for k, v in batch.items()}
        objective.progress = step / 8
        optimizer.zero_grad()
        objective.backward(net, shifted)
        optimizer.step()
        objective.after_step(net, shifted, StepContext())
        if step % 2: objective.end_epoch()


def stored(value: object) -> object:
    "What a checkpoint gives back: readable without trusting the file."
    memory = io.BytesIO()
    torch.save(value, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


def same(a: Tensor, b: Tensor) -> bool: return torch.equal(a, b) if EXACT else torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_goes_on_from_a_checkpoint_bit_for_bit(name):
    net, batch = example()
    objective, optimizer = make_objective(name, options()), torch.optim.SGD(net.parameters(), lr=0.01)
    train(net, objective, batch, range(6), optimizer)
    state, weights = stored(objective.state_dict()), copy.deepcopy(net.state_dict())
    train(net, objective, batch, range(6, 9), optimizer)

    again, _ = example()
    again.load_state_dict(weights)
    resumed = make_objective(name, options(seed=1))
    resumed.load_state_dict(state)
    train(again, resumed, batch, range(6, 9), torch.optim.SGD(again.parameters(), lr=0.01))
    assert all(same(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_state_that_was_never_used_can_be_stored(name):
    net, batch = example()
    objective, resumed = make_objective(name, options()), make_objective(name, options())
    resumed.load_state_dict(stored(objective.state_dict()))
    found = []
    for one in (objective, resumed):
        net, batch = example()
        train(net, one, batch, range(2), torch.optim.SGD(net.parameters(), lr=0.01))
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert same(*found)


@pytest.mark.parametrize("name", METHODS)
def test_a_fused_optimiser_finds_gradients_where_it_looks(name):
    "PyTorch's fused optimisers read a gradient in its parameter's memory layout, and on a CPU do not notice where it has another."
    ends = []
    for fused in (True, False):
        net, batch = example(encoder="test_resnet")
        net.to(memory_format=torch.channels_last)
        train(net, make_objective(name, options()), batch, range(2), torch.optim.AdamW(net.parameters(), lr=0.01, fused=fused))
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert (ends[0] - ends[1]).abs().mean() < (1e-5 if EXACT else 1e-3)    # where a gradient is but rounding, Adam may step either way


SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from test_methods import RLAR_FORMS, example, make
from thyroid_rlar.methods import METHODS
from thyroid_rlar.objectives import StepContext

torch.set_num_threads(1)
dist.init_process_group("gloo")         # two processes on one device, too
rank = dist.get_rank()

def mean(t):
    t = t.clone()
    dist.all_reduce(t)
    return t / dist.get_world_size()

def gradients(objective, batch, reduce):
    "Of two steps, the second after one of descent: whatever a method has learnt from the first counts too."
    net, _ = example(network=network)
    found, context = [], StepContext(reduce=reduce)
    for _ in range(2):
        net.zero_grad(set_to_none=True)
        objective.backward(net, batch, context)
        grads = [torch.zeros_like(p) if p.grad is None else reduce(p.grad) for p in net.parameters()]
        found.append(torch.cat([g.flatten() for g in grads]))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads): p -= 0.01 * g
        objective.after_step(net, batch, context)
        objective.end_epoch()
    return torch.cat(found)

_, joined = example()
half = {k: v[4 * rank:4 * rank + 4] for k, v in joined.items()}
errors = {network: {} for network in sys.argv[2:]}
for network, name in ((network, name) for network in errors for name in [*METHODS, *RLAR_FORMS]):
    together, alone = make(name), make(name)
    for objective in (together, alone): objective.progress = 0.3
    if not together.processes: continue
    one = gradients(alone, joined, lambda t: t)
    errors[network][name] = ((gradients(together, half, mean) - one).norm() / one.norm()).item()
if rank == 0: open(sys.argv[1], "w").write(json.dumps(errors))
dist.barrier()
dist.destroy_process_group()
"""

# what draws or averages within a batch, so that the joined batch's gradient is another one
ALONE = {"rlar_shuffled", "random_direction", "matched_decay"}


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> dict[str, dict[str, float]]:
    "By network and method: how far two processes' gradients are from one's, as a share."
    here, folder = str(Path(__file__).parent), tmp_path_factory.mktemp("two")
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    launch_two(folder, SCRIPT, folder / "errors.json", "shared_map", "unet", PYTHONPATH=path)
    return json.loads((folder / "errors.json").read_text())


@pytest.mark.parametrize("network", ["shared_map", "unet"])
def test_two_processes_give_the_gradients_of_one_with_the_joined_batch(apart, network):
    errors = apart[network]
    assert set(errors) == set(METHODS) - ALONE | set(RLAR_FORMS)
    limits = dict.fromkeys(errors, TOLERANCE) | {"gradnorm": max(1e-7, TOLERANCE)}    # Adam's epsilon sees norms that are larger by a common factor
    limits |= {name: max(1e-6, TOLERANCE) for name in errors if name in METHODS and METHODS[name].needs}     # solvers stop within a tolerance
    assert not {name: error for name, error in errors.items() if error >= limits[name]}


@pytest.mark.parametrize("objective", [*(make_objective(name, options()) for name in sorted(ALONE)),
                                       make_objective("rlar", Options(RLAR(mode="half"))), make_objective("rlar", Options(RLAR(magnitude=True)))],
                         ids=lambda o: o.name)
def test_what_several_processes_cannot_do_is_refused(objective):
    with pytest.raises(ValueError, match=f"objective {objective.name}: found 2 processes"): check_processes(objective, example()[0], 2)
