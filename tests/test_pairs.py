"""The penalty over many tasks is RLAR's own, pair by pair, for any number of tasks, latents, weights and missing labels, drawn by hypothesis."""
from itertools import combinations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from machine import DEVICE, DTYPE, TOLERANCE

from thyroid_rlar.pairs import Latent, align_pairs
from thyroid_rlar.rlar import FORMS, RLAR, WHERE

B = 4
weights = st.sampled_from([0.0, 0.5, 1.0, 3.0])


@st.composite
def cases(draw):
    "Losses of two to five tasks over an early and a late latent, who labelled what, weights of pairs and latents, places."
    n, g = draw(st.integers(2, 5)), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    random = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, DTYPE)
    early = random(B, 3, 2, 2).requires_grad_()
    late = torch.einsum("bchw,dc->bdhw", early.tanh(), random(4, 3).requires_grad_())
    names = [f"task {i}" for i in range(n)]
    losses = {name: (late * random(4, 2, 2)).sum((1, 2, 3)).sin() for name in names}
    has = {name: torch.tensor(draw(st.lists(st.booleans(), min_size=B, max_size=B)), device=DEVICE) for name in names if draw(st.booleans())}
    pairs = {pair: draw(weights) for pair in combinations(names, 2)}
    assume(any(pairs.values()))
    places = {"early": Latent(early, draw(st.sampled_from(WHERE)), draw(weights)), "late": Latent(late, draw(st.sampled_from(WHERE)), draw(weights))}
    return losses, has, pairs, places


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from(FORMS), st.sampled_from(["exact", "one_sided"]))
def test_it_is_rlar_pair_by_pair(case, form, mode):
    losses, has, pairs, places = case
    found = align_pairs(RLAR(form=form, mode=mode), losses, places, has, pairs)
    everyone, expected = torch.ones(B, dtype=torch.bool, device=DEVICE), torch.zeros((), device=DEVICE, dtype=DTYPE)
    for name, (z, where, weight) in places.items():
        for (a, b), share in pairs.items():
            if not share: continue
            both = has.get(a, everyone) & has.get(b, everyone)
            own = RLAR(form=form, where=where, mode=mode)(losses[a], losses[b], z, both)
            assert torch.equal(found.each[name][a, b], own.penalty.detach())
            assert torch.equal(found.cosine[name][a, b].isnan(), ~both) and found.vanished[name][a, b] == own.vanished.sum()
            expected = expected + weight * share / sum(pairs.values()) * own.penalty
    assert torch.allclose(found.penalty, expected, atol=TOLERANCE)
    assert all(set(found.cosine[name]) == {pair for pair, share in pairs.items() if share} for name in places)
