"""The numbers in README.md are those of data/results, and those come from runs at the settings that the commands beside them have today."""
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from thyroid_rlar.compare import pooled, read_runs, results_table
from thyroid_rlar.parameters import RunSettings
from thyroid_rlar.tirads import DDTI

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
COMPARED = [RESULTS / f"{objective}-{network}" for network in ("shared_map", "unet") for objective in ("sum", "rlar")]
RUNS = sorted(RESULTS.glob("*/f*"))


def test_readme_has_the_table_of_the_stored_runs():
    table = results_table(pooled(read_runs(*COMPARED), DDTI))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(table) == len(COMPARED)
    for method, row in zip(table.index, table.to_numpy(), strict=True):
        assert f"| {method} | {' | '.join(row)} |" in readme, f"README.md: no line for {method} with {list(row)}; run index.ipynb, then make prepare"


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_stored_run_is_of_todays_defaults(folder):
    found = json.loads((folder / "params.json").read_text(encoding="utf-8"))["parameters"]
    objective, network, *control = folder.parent.name.split("-")
    yardstick = {"ordinal": False, "evidence_weight": 0.0} if network == "smp_unet" else {}
    expected = RunSettings(source="ddti", data_dir="../shared/data/ddti", objective=objective, network=network, fold=int(folder.name[1:]),
                           out_dir=f"runs/ddti/{folder.parent.name}/{folder.name}", evidence_shuffled=control == ["shuffled_evidence"], **yardstick)
    expected = json.loads(json.dumps(asdict(expected)))
    del expected["resume"]              # a run that was cut off and went on is the same
    changed = {name: (found.get(name), value) for name, value in expected.items() if found.get(name, value) != value}
    assert not changed, f"(stored, by the command in data/README.md): {changed}; run it again, or name the values in the command"
