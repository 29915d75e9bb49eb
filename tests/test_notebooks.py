"Every notebook runs, in a process of its own, and is kept as notebooks are kept here."
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(s.startswith(("_", ".")) for s in p.relative_to(ROOT).parts))
MODULES = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.name)]
TUTORIALS = sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))


def name(path): return str(path.relative_to(ROOT / "nbs"))


def cells(path, kind):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    done = subprocess.run([Path(sys.executable).parent / "nbdev-test", path, "--n-workers", "0"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_is_kept_well(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    outputs = [o for c in cells(path, "code") for o in c["outputs"]]
    assert "widgets" not in content["metadata"], "stored widget state"
    assert not [o for o in outputs if o["output_type"] == "error"], "a stored error"
    assert path.stat().st_size < 400_000, f"{path.stat().st_size} bytes: expected under 400,000; make the pictures smaller"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_is_a_tutorial(path):
    exported = ["".join(c["source"]) for c in cells(path, "code") if "#| export" in "".join(c["source"])]
    pictures = [o for c in cells(path, "code") for o in c["outputs"] if "image/png" in o.get("data", {})]
    assert max(len(source.splitlines()) for source in exported) <= 60, "an exported cell is longer than a screen"
    assert len(cells(path, "markdown")) >= len(exported) / 2, "too little prose"
    assert pictures, "no picture of what it does"


@pytest.mark.parametrize("path", TUTORIALS, ids=name)
def test_tutorial_shows_and_exports_nothing(path):
    "A tutorial uses the package: pictures, prose, no exported cell. `test_runs` executes it like every notebook."
    sources = ["".join(c["source"]) for c in cells(path, "code")]
    assert path in NOTEBOOKS and not [s for s in sources if "#| export" in s or "#| default_exp" in s]
    assert [o for c in cells(path, "code") for o in c["outputs"] if "image/png" in o.get("data", {})], "no picture"
    assert len(cells(path, "markdown")) >= len(sources) / 2, "too little prose"


def test_train_parameters_are_the_settings():
    "The parameters of the train notebook are exactly the fields of `Settings`, with the same defaults."
    from mbs.run import Settings
    variables = {}
    exec(next("".join(c["source"]) for c in cells(ROOT / "nbs/runs/train.ipynb", "code") if "parameters" in c["metadata"].get("tags", [])), variables)
    del variables["__builtins__"]
    assert variables == {name: field.default for name, field in Settings.model_fields.items()}
