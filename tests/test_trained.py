"The runs that come with the package: small, readable, and with the scores of their receipt."

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mbs import load_run, trained_run
from mbs.curves import collect_scalars, make_cost_table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "nbs/trained"
METHODS = "finetune", "kd", "mbs"


@pytest.fixture
def train(monkeypatch):
    "The script that made the runs."
    monkeypatch.syspath_prepend(FOLDER)
    import train

    yield train
    del sys.modules["train"]


def test_runs_are_small():
    files = [p for p in FOLDER.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 2_000_000


@pytest.mark.parametrize("method", METHODS)
def test_runs_share_steps_data_and_samples(method):
    run, first = trained_run(method), trained_run(METHODS[0])
    assert run.finished
    assert run.settings.method == method
    assert [r["step"] for r in run.log()][-1] == 3
    assert run.card.base == first.card.base
    assert run.card.data == first.card.data
    assert all(np.array_equal(a.photo, b.photo) for a, b in zip(run.samples(), first.samples()))


def test_receipt_shows_the_scores_of_the_runs(train):
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [train.make_row(trained_run(m)) for m in METHODS]
    ends = {m: trained_run(m).metrics()["scores"]["all"] for m in METHODS}
    assert ends["finetune"] + 0.1 < ends["kd"] and ends["kd"] + 0.1 < ends["mbs"]  # as the notebooks say


def test_settings_file_gives_the_settings_of_the_runs(train):
    from mbs.parameter_files import read_parameters
    from mbs.settings import Settings

    parameters = read_parameters(FOLDER / "settings.yaml")
    for method in METHODS:
        settings = Settings.checked(**parameters | dict(name=method, method=method))
        assert settings == trained_run(method).settings


def test_float16_models_predict_as_the_trained_ones():
    run = trained_run("mbs")
    for photo, _, predictions in run.samples()[:2]:
        for step, stored in enumerate(predictions):
            assert (run.predict(photo, step) == stored).mean() > 0.99
    with pytest.raises(ValueError, match="cannot be read"):
        trained_run("kd").model()


@pytest.mark.parametrize("n_counts", [0, 3])
def test_a_card_counts_the_pictures_of_every_step_or_of_none(tmp_path, n_counts):
    "Cards of early versions have no counts; some of them missing is damage."
    shutil.copytree(trained_run("mbs").folder, tmp_path / "run")
    file = tmp_path / "run/run.json"
    card = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(card | dict(images=card["images"][:n_counts])), encoding="utf-8")
    if n_counts:
        with pytest.raises(ValueError, match="contradicts itself in names, steps, images, iterations or protocol"):
            load_run(tmp_path / "run")
        return
    lap = dict(step=1, iteration=10, iterations=10, seconds=2.0, time=1e9)
    (tmp_path / "run/laps.jsonl").write_text(json.dumps(lap) + "\n", encoding="utf-8")
    run = load_run(tmp_path / "run")
    assert {point.name for point in collect_scalars(run)} >= {"loss/loss", "training/learning_rate", "mIoU/all"}
    assert make_cost_table(run).rows
