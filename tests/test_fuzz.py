"""About a minute of tests/fuzz.py: every input that ever crashed a reader, new damage, and values that hypothesis makes up and shrinks."""
import json
import time
import warnings
from collections.abc import Iterator

import fuzz
import numpy as np
import pytest
from fuzz import CASES, OWN, READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = fuzz.ROOT
KEPT = sorted(path for path in CASES.glob("*/*") if path.is_file())
pytestmark = pytest.mark.filterwarnings("ignore")       # decoders warn of what they then refuse
SECONDS = 1.5                                           # of new damage for each reader


@pytest.fixture(scope="module", autouse=True)
def ready() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz.warm_up(list(READERS))
    yield


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_crashed_is_mended(path):
    with fuzz.bounded(): how, seconds, _, error = fuzz.attempt(READERS[path.parent.name].read, path.read_bytes())
    assert error is None and how in ("record", "own"), (seconds, error)


@pytest.mark.parametrize("name", READERS)
def test_new_damage_ends_in_a_record_a_flag_or_our_error(name):
    data, end, n, before = fuzz.inputs(READERS[name], f"test {name}"), time.monotonic() + SECONDS, 0, fuzz.megabytes()
    with fuzz.bounded():
        while n < 20 or time.monotonic() < end:
            one = next(data)
            how, _, _, error = fuzz.attempt(READERS[name].read, one)
            n += 1
            assert how != "crash", f"{fuzz.where(error)}: {error!r} on {one[:2000]!r}"
    assert fuzz.megabytes() - before < fuzz.MEGABYTES


def test_memory_that_ran_out_behind_our_own_error_is_found():
    def hungry(data: bytes) -> None:
        try: raise MemoryError
        except MemoryError as error:
            if data == b"from": raise fuzz.DataError("x", "content", error, "another") from error
            if data == b"refused": raise fuzz.DataError("x", "content", fuzz.REFUSED[0], "another") from error
        raise fuzz.DataError("x", "content", "y", "another")
    with fuzz.bounded(): ended = [fuzz.attempt(hungry, data)[0] for data in (b"from", b"refused", b"")]
    assert ended == ["crash", "own", "own"]


def test_memory_is_found_that_is_given_back_and_less_than_an_earlier_peak(monkeypatch):
    monkeypatch.setattr(fuzz, "MEGABYTES", 100)
    def takes(data: bytes) -> None: np.zeros(int(data) << 20, np.uint8)[::4096] = 1             # each page
    for mb, expected in ((250, "crash"), (150, "crash"), (50, "record")):
        found = []
        while not (found and found[-1][0] == expected and abs(found[-1][1] - mb) < 40):
            assert len(found) < 4, (mb, expected, found)       # the system may take other pages of this process back meanwhile
            with fuzz.bounded(): how, _, memory, _ = fuzz.attempt(takes, str(mb).encode())
            found.append((how, memory))


def test_a_reader_that_hangs_is_found_and_one_that_was_slow_once_is_tried_again():
    slow, tried = {b"once": 1, b"always": 9, b"swallowed": 9}, []
    def works(data: bytes) -> None:
        tried.append(data)
        end = time.process_time() + 3
        try:
            while tried.count(data) <= slow[data] and time.process_time() < end: pass
        except fuzz.Slow:
            if data != b"swallowed": raise
    with fuzz.bounded(): ended = [fuzz.attempt(works, data) for data in slow]
    assert [(how, type(error)) for how, _, _, error in ended] == [("record", type(None)), ("crash", fuzz.Slow), ("crash", fuzz.Slow)]
    assert [tried.count(data) for data in slow] == [2, 2, 2]


def ends_well(name: str, data: bytes) -> None:
    "The input is read, or refused with one of our errors; hypothesis shows what is raised beside."
    try: READERS[name].read(data)
    except OWN: pass


made_up = settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
TEXT = st.one_of(st.sampled_from([v for v in fuzz.ODD if isinstance(v, str) and v.isascii()]), st.text(max_size=20))
NUMBERS = st.one_of(st.integers(-3, 70), st.integers(), st.floats())
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, TEXT), max_leaves=6,
                      extend=lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
POINTS = st.fixed_dictionaries({"x": NUMBERS | TEXT, "y": NUMBERS})
REGIONS = st.lists(st.fixed_dictionaries({"points": st.lists(POINTS, max_size=7) | VALUES}) | VALUES, max_size=4)


@made_up
@given(REGIONS, st.integers(0, 400))
def test_contours_of_any_points(regions, cut): ends_well("svg", json.dumps(regions)[:cut or None].encode("utf-8", "replace") or b"[")


def escaped(text: str) -> str: return "".join(c if c.isalnum() or c in " .-+" else f"&#{ord(c)};" for c in text)


@made_up
@given(TEXT, TEXT, st.lists(st.tuples(TEXT, REGIONS), max_size=3))
def test_cases_of_any_text(grade, number, marks):
    body = "".join(f"<mark><image>{escaped(image)}</image><svg>{escaped(json.dumps(regions))}</svg></mark>" for image, regions in marks)
    xml = f"<case><number>{escaped(number)}</number><tirads>{escaped(grade)}</tirads>{body}</case>"
    ends_well("xml", xml.encode("utf-8", "replace"))


NAMES = st.sampled_from(["image", "case", "grade", "mask", "scale", "view", "spacing_mm", "reader", "group", "size_cm", "flags", "x", "=1"])
CELLS = st.one_of(st.sampled_from(["a.png", "b.png", "images/a.png", "../a.png", "TR1", "TR4", "4a", "5", "acr", "ddti", "0.1", "", "nan"]), TEXT)


@made_up
@given(st.lists(NAMES, max_size=4, unique=True), st.lists(st.lists(CELLS, min_size=7, max_size=7), max_size=5))
def test_tables_of_any_cells(more, rows):
    head = list(dict.fromkeys(["image", "case", "grade", *more]))
    quote = lambda cell: '"' + cell.replace('"', '""') + '"'
    ends_well("labels", "\n".join(",".join(map(quote, row[:len(head)])) for row in [head, *rows]).encode("utf-8", "replace"))


def with_values(good: dict, changes: dict) -> bytes: return json.dumps(good | changes).encode()


@made_up
@given(st.dictionaries(st.sampled_from(list(fuzz.PARAMETERS)), VALUES, max_size=3))
def test_runs_with_any_parameters(changes):
    ends_well("parameters", with_values(fuzz.PARAMETERS, changes))
    ends_well("params_json", json.dumps({"parameters": fuzz.PARAMETERS | changes}).encode())


@pytest.mark.parametrize("name", fuzz.OTHERS)
def test_other_notebooks_with_any_parameters(name):
    good = fuzz.OTHERS[name][1]()

    @made_up
    @given(st.dictionaries(st.sampled_from([k for k in good if k != "run_dirs"]), VALUES, max_size=3))
    def check(changes): ends_well("other_parameters", json.dumps([name, good | changes]).encode())

    check()


@made_up
@given(st.data())
def test_models_of_any_settings(data):
    good = json.loads(fuzz.model_json()[0])
    changes = data.draw(st.dictionaries(st.sampled_from(list(good)), VALUES, max_size=2))
    network = data.draw(st.dictionaries(st.sampled_from(list(good["network"])), VALUES, max_size=2))
    ends_well("model_values", json.dumps(good | {"network": good["network"] | network} | changes).encode())


@settings(made_up, max_examples=40)
@given(st.data())
def test_manifests_of_any_rows(data):
    good = json.loads(fuzz.manifest_parts()[0])
    rows = {name: {k: data.draw(VALUES) for k in column} if data.draw(st.integers(0, 7)) == 0 else column for name, column in good["rows"].items()}
    about = good["about"] | data.draw(st.dictionaries(st.sampled_from(list(good["about"])), VALUES, max_size=1))
    ends_well("rows", json.dumps({"rows": rows, "about": about}).encode())


def test_a_million_inputs_were_tried():
    found = json.loads((ROOT / "data" / "results" / "fuzz.json").read_text(encoding="utf-8"))
    assert sum(n["inputs"] for n in found.values()) >= 1_000_000 and READERS.keys() <= found.keys()
    assert all(n["inputs"] == n["record"] + n["own"] + n["crash"] for n in found.values())
    assert all(n["slowest_s"] < fuzz.SECONDS and n["memory_mb"] < fuzz.MEGABYTES for n in found.values())
