"""The bootstrap over groups: resamples, intervals, paired differences, and what they refuse."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from thyroid_rlar import intervals as iv

NAN = math.nan
mean_x = partial(iv.weighted_mean, column="x")


def table(x, group=None):
    return pd.DataFrame({"x": x, "group": range(len(x)) if group is None else group, "image_id": [f"i{k}" for k in range(len(x))]})


@pytest.mark.parametrize("x, weights, expected", [
    ([1, 2, 3], None, 2), ([1, NAN, 3], None, 2), ([NAN, NAN], None, NAN), ([], None, NAN),
    ([1, 2, 3], [[1, 1, 1], [0, 0, 2], [3, 1, 0]], [2, 3, 1.25]), ([1, NAN, 3], [[0, 5, 0], [1, 5, 1]], [NAN, 2]),
])
def test_weighted_mean(x, weights, expected):
    np.testing.assert_allclose(mean_x(table(x), weights=weights), expected)


def test_weighted_mean_of_nullable_column():
    assert mean_x(table(pd.array([1, None, 3], "Int64"))) == 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 99))
def test_groups_stay_whole(groups, seed):
    weights = np.concatenate(list(iv.resample_groups(groups, 20, seed)))
    codes, names = pd.factorize(np.array(groups))
    assert weights.shape == (20, len(groups))
    first = [np.flatnonzero(codes == k)[0] for k in range(len(names))]
    assert (weights == weights[:, np.array(first)[codes]]).all()
    assert (weights[:, first].sum(1) == len(names)).all()


def test_blocks_do_not_change_the_draw(monkeypatch):
    whole = np.concatenate(list(iv.resample_groups(range(30), 50, 4)))
    monkeypatch.setattr(iv, "_BLOCK", 200)
    blocks = list(iv.resample_groups(range(30), 50, 4))
    assert len(blocks) > 1
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_agrees_with_scipy():
    x = np.random.default_rng(0).gamma(2, size=200)
    ours = iv.bootstrap(table(x), mean_x, n_boot=5000)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_copies_of_a_case_add_nothing():
    x = np.random.default_rng(0).normal(size=60)
    once, thrice = table(x), table(np.repeat(x, 3), np.repeat(np.arange(60), 3))
    a, b = iv.bootstrap(once, mean_x), iv.bootstrap(thrice, mean_x)
    assert (a["low"], a["high"]) == pytest.approx((b["low"], b["high"])) and (a["n"], b["n"]) == (60, 180)


@pytest.mark.parametrize("x, group, value, n", [([], [], NAN, 0), ([1.0], [0], 1, 1), ([1.0, 3.0], ["g", "g"], 2, 2)])
def test_no_interval(x, group, value, n):
    found = iv.bootstrap(table(x, group), mean_x)
    assert found == pytest.approx({"value": value, "low": NAN, "high": NAN, "n": n}, nan_ok=True)


@pytest.mark.parametrize("undefined, has_interval", [(0, True), (50, True), (51, False), (100, False)])
def test_undefined_resamples(undefined, has_interval):
    values = np.r_[np.full(undefined, NAN), np.linspace(0, 1, 100 - undefined)]
    low, high = iv.percentile_interval(values, n_groups=10)
    assert math.isfinite(low) == math.isfinite(high) == has_interval


def test_repeat_rows_is_the_weighted_statistic():
    rows = table(np.random.default_rng(0).normal(size=40), np.arange(40) // 3)
    plain = iv.repeat_rows(lambda t: t["x"].mean())
    assert iv.bootstrap(rows, plain, n_boot=50) == pytest.approx(iv.bootstrap(rows, mean_x, n_boot=50))


def test_paired_is_matched_by_image_not_by_order():
    rng = np.random.default_rng(0)
    b = table(rng.normal(size=50), np.arange(50) // 2)
    a = b.assign(x=b.x + 0.1)
    found = iv.paired_bootstrap(a, b.sample(frac=1, random_state=0), mean_x)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.1, 0.1, 0.1)) and found["n"] == 50
    assert found["a"] - found["b"] == pytest.approx(found["value"])
    back = iv.paired_bootstrap(b, a, mean_x)
    assert back["value"] == pytest.approx(-found["value"])


def test_paired_groups_and_keys():
    b = table(np.random.default_rng(0).normal(size=40), np.arange(40) // 2)
    b = b.assign(epoch=np.arange(40) % 2, image_id=[f"i{k // 2}" for k in range(40)])
    a = b.assign(x=b.x * 2)
    by_column = iv.paired_bootstrap(a, b, mean_x, "group", on=["image_id", "epoch"])
    assert by_column == iv.paired_bootstrap(a, b.drop(columns="group"), mean_x, list(a.group), on=["image_id", "epoch"])


GOOD = table([1.0, 2.0, 3.0])
BAD = [
    (lambda: iv.paired_bootstrap(GOOD, GOOD.iloc[:2], mean_x), "only one table has: 1"),
    (lambda: iv.paired_bootstrap(GOOD, GOOD.assign(image_id="i0"), mean_x), "second table: image_id 'i0' occurs twice"),
    (lambda: iv.paired_bootstrap(GOOD.iloc[:0], GOOD.iloc[:0], mean_x), "empty"),
    (lambda: iv.bootstrap(GOOD.assign(group=[0, None, 1]), mean_x), "group missing in 1 of 3"),
    (lambda: iv.bootstrap(GOOD.assign(group=pd.array([0, None, 1], "Int64")), mean_x), "group missing in 1 of 3"),
    (lambda: iv.bootstrap(GOOD, mean_x, level=95), "level 95"),
    (lambda: iv.bootstrap(GOOD, mean_x, n_boot=0), "n_boot 0"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
