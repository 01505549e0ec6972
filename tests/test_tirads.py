"Every combination of ACR descriptors against a table written independently of the module, and both sides of each size threshold."
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thyroid_rlar.tirads import ACR, DDTI, POINTS, SCALES, Descriptors, Scale, advice, breakdown, level, points, score

# Tessler et al. 2017, figure 1, as printed: one row a term (None: the term ends the count at 0)
CHART = """
composition   cystic            stop
composition   spongiform        stop
composition   mixed             1
composition   solid             2
composition   undetermined      2
echogenicity  anechoic          0
echogenicity  hyperechoic       1
echogenicity  isoechoic         1
echogenicity  hypoechoic        2
echogenicity  very_hypoechoic   3
echogenicity  undetermined      1
shape         wider-than-tall   0
shape         taller-than-wide  3
margin        smooth            0
margin        ill-defined       0
margin        lobulated         2
margin        irregular         2
margin        extrathyroidal    3
margin        undetermined      0
"""
FOCI = [("comet-tail", 0), ("macro", 1), ("rim", 2), ("punctate", 3)]
LEVELS = {0: "TR1", 1: "TR2", 2: "TR2", 3: "TR3", 4: "TR4", 5: "TR4", 6: "TR4"} | dict.fromkeys(range(7, 18), "TR5")


def _chart(name):
    rows = [line.split() for line in CHART.split("\n") if line]
    return [(term.replace("_", " "), None if p == "stop" else int(p)) for n, term, p in rows if n == name]


def _foci_sets():
    return [({f for f, _ in s} or {"none"}, sum(p for _, p in s)) for k in range(5) for s in combinations(FOCI, k)]


def every_combination():
    "(terms, expected points) for each way to fill in the chart."
    columns = [_chart(n) for n in ("composition", "echogenicity", "shape", "margin")] + [_foci_sets()]
    for choice in product(*columns):
        stops = any(p is None for _, p in choice)
        yield [t for t, _ in choice], 0 if stops else sum(p for _, p in choice)


def test_every_combination():
    seen = 0
    for terms, expected in every_combination():
        d = Descriptors(*terms)
        result = score(d)
        assert points(d) == expected == result.points == sum(breakdown(d).values()), terms
        assert level(expected) == LEVELS[expected] == result.level, terms
        seen += 1
    assert seen == 5 * 6 * 2 * 6 * 16


def test_one_point_only_from_mixed_anechoic():
    "The chart's gap: exactly one way of filling it in, up to the terms worth nothing."
    ways = {tuple(t[:3]) for t, p in every_combination() if p == 1}
    assert ways == {("mixed", "anechoic", "wider-than-tall")}


def test_chart_is_the_lexicon():
    for name in ("composition", "echogenicity", "shape", "margin"):
        assert [t for t, _ in _chart(name)] == list(POINTS[name])
    assert POINTS["foci"] == {"none": 0} | dict(FOCI)


@pytest.mark.parametrize("lev,fna,follow", [("TR1", None, None), ("TR2", None, None), ("TR3", 2.5, 1.5), ("TR4", 1.5, 1.0), ("TR5", 1.0, 0.5)])
def test_size_thresholds_both_sides(lev, fna, follow):
    for cm in np.round(np.arange(0.1, 6.01, 0.1), 1):
        for size in (np.nextafter(cm, 0), cm, np.nextafter(cm, 9)):
            expected = "FNA" if fna and size >= fna else "follow-up" if follow and size >= follow else "none"
            assert advice(lev, size) == expected, (lev, size)


@pytest.mark.parametrize("mm,expected", [(25, "FNA"), (24, "follow-up"), (15, "follow-up"), (14, "none")])
def test_sizes_from_millimetres(mm, expected):
    assert advice("TR3", mm / 10) == expected


@pytest.mark.parametrize("size", [0, -0.1, float("nan"), float("inf"), None, "2.0", True, pd.NA])
def test_bad_size(size):
    with pytest.raises(ValueError, match="numbers above 0"): advice("TR4", size)


def test_bad_size_reaches_score():
    with pytest.raises(ValueError, match="numbers above 0"): score(Descriptors("solid", "isoechoic"), -1.0)


@pytest.mark.parametrize("bad", [-1, 0.5, float("nan"), None, "3", True])
def test_bad_points(bad):
    with pytest.raises(ValueError, match="whole numbers"): level(bad)


@pytest.mark.parametrize("name", ["composition", "echogenicity", "shape", "margin", "foci"])
@pytest.mark.parametrize("term", ["", "Solid ", "tall", 3, None])
def test_unknown_terms_name_the_allowed(name, term):
    good = {"composition": "solid", "echogenicity": "isoechoic"}
    with pytest.raises(ValueError, match=name) as e: Descriptors(**good | {name: {term} if name == "foci" else term})
    assert ", ".join(POINTS[name]) in str(e.value)


@pytest.mark.parametrize("other", ["macro", "rim", "punctate"])
def test_none_contradicts_calcification(other):
    with pytest.raises(ValueError, match="contradicts"): Descriptors("solid", "isoechoic", foci={"none", other})


@pytest.mark.parametrize("nothing", [None, "", (), frozenset(), "none"])
def test_nothing_ticked_is_no_foci(nothing):
    assert Descriptors("solid", "isoechoic", foci=nothing).foci == {"none"}


def test_descriptors_hash_and_compare_by_meaning():
    a = Descriptors("solid", "isoechoic", foci=["macro", "rim"])
    assert a == Descriptors("solid", "isoechoic", foci=("rim", "macro", "rim")) and len({a, a}) == 1


@pytest.mark.parametrize("scale", SCALES.values(), ids=str)
def test_scale_round_trip(scale):
    assert [scale.index(scale.grade(i)) for i in range(len(scale))] == list(range(len(scale)))
    assert scale.is_high.tolist() == [g in scale.high for g in scale.grades]


@pytest.mark.parametrize("missing", [None, "", " \t", float("nan"), np.nan, pd.NA, pd.NaT])
def test_missing_label_is_missing(missing):
    assert DDTI.index(missing) is None and ACR.grade(missing) is None


def test_number_typed_labels():
    "The label path that public loaders broke: grade 5 read as a number is still grade 5."
    assert [DDTI.index(g) for g in pd.Series([2, None, 5])] == [0, None, 5]
    assert DDTI.index(np.int64(3)) == 1
    for bad in (4, 2.5, -1, True, float("inf"), "4d", "TR5"):
        with pytest.raises(ValueError, match="allowed are 2, 3, 4a, 4b, 4c, 5"): DDTI.index(bad)


@given(st.integers(-50, 50))
def test_no_index_wraps_around(i):
    if 0 <= i < len(ACR): assert ACR.grade(i) == f"TR{i + 1}"
    else:
        with pytest.raises(ValueError, match="allowed are 0 to 4"): ACR.grade(i)


def test_scale_checks_itself():
    with pytest.raises(ValueError, match="twice"): Scale("x", ("1", "1"), ())
    with pytest.raises(ValueError, match="allowed are 1, 2"): Scale("x", ("1", "2"), ("3",))


def test_report_shows_every_term_and_the_advice():
    text = score(Descriptors("solid", "hypoechoic", "taller-than-wide", "irregular", {"rim", "punctate"}), 0.7)._repr_markdown_()
    for part in ("solid", "hypoechoic", "taller-than-wide", "irregular", "punctate, rim", "TR5", "0.7 cm", "after 1, 2, 3, 4, 5 years", "**14**"):
        assert part in text
