"""Properties that the task angle and its penalty must have for any gradients, drawn by hypothesis."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import DEVICE, DTYPE, TOLERANCE

from thyroid_rlar.rlar import FORMS, MODES, RLAR, WHERE, excess, flatten_gradient, unit


@st.composite
def gradient_pairs(draw):
    "Two gradients (B,C,h,w) that share a direction to a drawn degree, and which images have both labels."
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a, b = (torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, DTYPE) for _ in range(2))
    both = torch.tensor(draw(st.lists(st.booleans(), min_size=shape[0], max_size=shape[0])), device=DEVICE)
    return a, b + draw(st.floats(-2, 2)) * a, both


regularisers = st.sampled_from(FORMS).flatmap(lambda form: st.builds(
    RLAR, margin=st.sampled_from([0.0] if form == "squared" else [0.0, 0.2]), form=st.just(form), where=st.sampled_from(WHERE),
    mode=st.sampled_from(MODES)))


def same(one, other) -> bool:
    "Whether two alignments have the same penalty and cosines."
    return torch.allclose(one.penalty, other.penalty, atol=TOLERANCE) and torch.allclose(one.cosine, other.cosine, atol=TOLERANCE, equal_nan=True)


@settings(deadline=None)
@given(gradient_pairs(), regularisers, st.integers(0, 2**31))
def test_the_size_of_a_gradient_does_not_count(pair, rlar, seed):
    a, b, both = pair
    scale = 10 ** (4 * torch.rand(len(a), 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 2).to(a)
    assert same(rlar.compare(a * scale, b / scale, both), rlar.compare(a, b, both))


@settings(deadline=None)
@given(gradient_pairs(), regularisers, st.integers(0, 2**31))
def test_the_order_of_images_does_not_count(pair, rlar, seed):
    a, b, both = pair
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    there = rlar.compare(a[order], b[order], both[order])
    back = there._replace(cosine=torch.empty_like(there.cosine).index_copy_(0, order, there.cosine))
    assert same(back, rlar.compare(a, b, both))


@settings(deadline=None)
@given(gradient_pairs(), regularisers, st.integers(0, 2**31))
def test_the_names_of_channels_do_not_count(pair, rlar, seed):
    a, b, both = pair
    channels = torch.randperm(a.shape[1], generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    assert same(rlar.compare(a[:, channels], b[:, channels], both), rlar.compare(a, b, both))


@settings(deadline=None)
@given(gradient_pairs(), regularisers)
def test_turning_one_direction_round_turns_the_cosine_and_nothing_leaves_its_range(pair, rlar):
    a, b, both = pair
    here, turned = rlar.compare(a, b, both), rlar.compare(a, -b, both)
    assert torch.allclose(here.cosine, -turned.cosine, atol=TOLERANCE, equal_nan=True)
    assert here.cosine.isnan().equal(~both) and not (here.cosine.abs() > 1 + TOLERANCE).any()
    assert 0 <= here.penalty <= 1 + TOLERANCE


@settings(deadline=None)
@given(gradient_pairs(), st.sampled_from(WHERE))
def test_an_image_is_its_own_best_partner_when_the_tasks_agree(pair, where):
    a, _, _ = pair
    u, _, vanished = unit(flatten_gradient(a, where))
    own, _ = excess(u, u, torch.arange(len(u), device=DEVICE))
    assert torch.allclose(own, (~vanished).to(own.dtype), atol=TOLERANCE)


@pytest.mark.parametrize("where", WHERE)
def test_strangers_are_other_case_groups(where):
    g = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    u, _, _ = unit(flatten_gradient(g, where))
    own, null = excess(u, u, torch.tensor([0, 0, 1, 2], device=DEVICE))
    expected = [(u[[2, 3]] @ u[0]).relu().square().mean(), (u[[0, 1, 3]] @ u[2]).relu().square().mean()]
    assert torch.allclose(null[[0, 2]], torch.stack(expected)) and torch.allclose(own, torch.ones_like(own))
    assert excess(u, u, torch.zeros(4, device=DEVICE))[1].isnan().all()
