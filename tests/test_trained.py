"The runs that come with the package: small, readable, as good as their receipt says, and part of the wheel."

import sys
from pathlib import Path

import numpy as np
import pytest

from mbs import trained_run

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "nbs/trained"
METHODS = "finetune", "kd", "mbs"


@pytest.fixture
def train(monkeypatch):
    "The script that made them."
    monkeypatch.syspath_prepend(FOLDER)
    import train

    yield train
    del sys.modules["train"]


def test_are_small():
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file() and "__pycache__" not in p.parts) <= 2_000_000


@pytest.mark.parametrize("method", METHODS)
def test_are_runs_of_the_same_steps(method):
    run, first = trained_run(method), trained_run(METHODS[0])
    assert run.finished and run.settings.method == method and [r["step"] for r in run.log()][-1] == 3
    assert run.card.base == first.card.base and run.card.data == first.card.data
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(run.samples(), first.samples()))


def test_receipt_is_theirs(train):
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("| `")] == [
        train.row(trained_run(m)) for m in METHODS
    ]
    ends = {m: trained_run(m).metrics()["scores"]["all"] for m in METHODS}
    assert ends["finetune"] + 0.1 < ends["kd"] and ends["kd"] + 0.1 < ends["mbs"]  # what the notebooks say of them


def test_settings_are_theirs(train):
    from mbs.parameter_files import read_parameters
    from mbs.run import Settings

    for method in METHODS:
        assert (
            Settings.checked(**read_parameters(FOLDER / "settings.yaml") | dict(name=method, method=method))
            == trained_run(method).settings
        )


def test_float16_predicts_the_same():
    run = trained_run("mbs")
    for image, _, predictions in run.samples()[:2]:
        for step, kept in enumerate(predictions):
            assert (run.predict(image, step) == kept).mean() > 0.99
    with pytest.raises(ValueError, match="cannot be read"):
        trained_run("kd").model()
