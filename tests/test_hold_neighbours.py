"A shared base step is checked, and damaged or foreign run folders are passed over and named."

import json
import logging
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

import mbs.batch
from mbs.batch import Batch
from mbs.checkpoint import save_tensors
from mbs.comparison import find_runs
from mbs.curves import CurveWriter
from mbs.experiment import Experiment, _choose_base
from mbs.files import read_json, write_json
from mbs.notebooks import RunFailed
from mbs.run import load_run, trained_run
from mbs.run_folder import create_run_folder
from mbs.settings import Settings

TINY = dict(
    protocol="6-2",
    samples=1,
    workers=0,
    scenes=dict(n_train=24, n_test=4, size=32),
    encoder_options=dict(patch_size=8, embed_dim=32, depth=1, num_heads=2),
    decoder=dict(dim=32, depth=1, heads=2),
    training=dict(crop=32, batch=4, iterations=1, optimizer="adamw"),
)


@pytest.fixture(scope="module")
def neighbour(tmp_path_factory):
    "A home folder with a run whose base step others can take over."
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBS_HOME", str(home))
        Experiment(Settings(**TINY, name="a", method="finetune")).run()
    return home


@pytest.fixture
def home(neighbour, tmp_path, monkeypatch):
    shutil.copytree(neighbour / "outputs", tmp_path / "outputs")
    (tmp_path / "data").symlink_to(neighbour / "data")
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    return tmp_path


def choose_base(**chosen):
    "Return what a run would take over, and whether its network is still as it was."
    experiment = Experiment(Settings(**TINY | dict(name="b", method="kd") | chosen))
    student = experiment.setup.model()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    create_run_folder(experiment.folder, experiment.setup, student)
    base = _choose_base(experiment, student)
    return base, all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def change_json(path: Path, change):
    content = read_json(path)
    change(content)
    write_json(path, content)


def exchange_model(folder: Path):
    "Replace the model by another one of the same shapes, with a digest of its own."
    state = load_run(folder).model(0).state_dict()
    save_tensors(folder / "step-00/model.safetensors", {name: tensor * 0 for name, tensor in state.items()})


DAMAGES = {
    "its model is not the one": exchange_model,
    "cannot be read": lambda a: (a / "step-00/model.safetensors").write_bytes(b"12345678" * 99),
    "expected a JSON record a line": lambda a: (a / "log.jsonl").write_text("garbage\n"),
    "expected a complete JSON file": lambda a: (a / "step-00/metrics.json").write_text('{"half'),
    "expected a complete .npz file": lambda a: (a / "step-00/confusion.npz").write_bytes(b"PK"),
    "its model is not the one that": lambda a: change_json(a / "step-00/metrics.json", lambda m: m.pop("model")),
    "contradicts its card in seed": lambda a: change_json(a / "run.json", lambda c: c["settings"].update(seed=7)),
    "contradicts its card in recipe": lambda a: change_json(a / "run.json", lambda c: c["recipe"].update(lr=0.7)),
    "contradicts its card in data": lambda a: change_json(a / "run.json", lambda c: c["data"].update(train="x")),
    "contradicts its card in network": lambda a: change_json(a / "run.json", lambda c: c["weights"].update(source="x")),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_or_foreign_base_step_is_passed_over(home, caplog, said):
    "The next whole one is taken; with none the network stays as it was, so that the base step is trained."
    DAMAGES[said](home / "outputs" / "a")
    with caplog.at_level(logging.WARNING):
        base, is_unchanged = choose_base()
    assert base is None and is_unchanged
    (line,) = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert line.startswith("passed over for the base step: a; the first: ") and said in line


def test_a_whole_base_step_is_taken_behind_a_damaged_one(home, caplog):
    shutil.copytree(home / "outputs/a", home / "outputs/c")
    (home / "outputs/a/log.jsonl").write_text("garbage\n")
    base, is_unchanged = choose_base()
    assert base.name == "c" and len(base.records) == 1 and not is_unchanged
    assert load_run(home / "outputs/c").metrics(0)["model"]
    assert choose_base(name="d", seed=1) == (None, True)


# --- neighbours


BROKEN = {
    "metrics": lambda folder: (folder / "step-01" / "metrics.json").write_text('{"half'),
    "card": lambda folder: (folder / "run.json").write_text('{"half'),
    "other version": lambda folder: change_json(folder / "run.json", lambda c: c["recipe"].update(unknown=1)),
    "confusion": lambda folder: (folder / "step-01" / "confusion.npz").write_bytes(b"PK"),
    "log": lambda folder: (folder / "log.jsonl").write_text("garbage\n"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_one_damaged_run_does_not_end_a_report_curves_or_an_estimate(tmp_path, caplog, kind):
    "The others are read, and the damaged one is named with its reason."
    outputs = tmp_path / "outputs"
    for name in ("broken", "good"):
        shutil.copytree(trained_run("mbs").folder, outputs / name)
    BROKEN[kind](outputs / "broken")
    runs, left_out = find_runs([outputs])
    assert [run.folder.name for run in runs] == ["good"] and list(left_out) == [str(outputs / "broken")]
    measured = mbs.batch._collect_seconds(outputs)
    assert measured == mbs.batch._collect_seconds(tmp_path / "outputs") and measured
    curves = CurveWriter([outputs], tmp_path / "events")
    curves.update()
    is_read = kind == "confusion"  # of which curves and estimates have no need
    assert set(curves.written) == ({"broken", "good"} if is_read else {"good"})
    lines = [r.getMessage() for r in caplog.records]
    assert len([line for line in lines if line.startswith("passed over: broken, ")]) == (not is_read)


class InProcess:
    "An executor that trains at once, and damages the folder of a run in the middle."

    def __init__(self, broken: str):
        self.broken = broken

    def __len__(self):
        return 1

    def submit(self, notebook, output, parameters, environment, folder="."):
        future = Future()
        try:
            for step in (experiment := Experiment(Settings(**parameters))).steps():
                if parameters["name"] == self.broken and step == 0:
                    (experiment.folder / "step-00" / "metrics.json").write_text('{"half')
            future.set_result(None)
        except ValueError as e:
            future.set_result(str(e))
        return future

    def attach(self, folders):
        return {}

    def stop(self):
        pass


def test_one_damaged_run_does_not_end_a_batch(home):
    "It fails with its sentence, in this batch and in the next one, and the others are trained."
    grid = dict(name="g", parameters=TINY | dict(share_base=False), grid=dict(seed=[0, 1]))
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"1 of 2 runs failed(.|\n)*g/s0: .*metrics\.json cannot be read"):
            Batch(grid).run(InProcess("g/s0"), show=lambda table: None, every=0)
        assert load_run(home / "outputs/g/s1").finished
        (home / "outputs/g/s0/step-01/metrics.json").write_text('{"half')  # found by the next batch before it starts
    assert "s0" in str(Batch(grid).plan(measure=False))
    assert json.loads((home / "outputs/g/s1/step-00/metrics.json").read_text())["model"]
