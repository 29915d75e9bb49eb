"A run that is killed or stopped repeatedly ends with the same bits as an uninterrupted run."

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from figures import kept
from safetensors.torch import load_file

from mbs.experiment import Experiment
from mbs.lifeline import Interrupted
from mbs.locks import lock_folder
from mbs.run import load_run
from mbs.settings import Settings

KILLS = int(os.environ.get("MBS_KILLS", 10))
PARAMETERS = dict(
    name="run",
    protocol="4-2",
    samples=1,
    share_base=False,
    save_minutes=0,
    workers=0,
    scenes=dict(n_train=24, n_test=10, size=32),
    encoder_options=dict(patch_size=8, embed_dim=32, depth=2, num_heads=2),
    training=dict(crop=32, batch=4, iterations=60, optimizer="adamw", both=True),
)


def train(outputs, changes):
    Experiment(Settings(**PARAMETERS | changes), outputs).run()


@pytest.fixture(scope="module")
def forked():
    "A context that forks this process: everything is imported already, on one thread."
    torch.set_num_threads(1)
    return multiprocessing.get_context("fork")


@pytest.fixture(
    params=[
        {},
        dict(method="plop"),
        dict(training=PARAMETERS["training"] | dict(optimizer="sgd", selection="held-out")),
    ],
    ids=["mbs", "plop", "sgd and held-out"],
)
def changes(request):
    return request.param


def assert_same(run, whole, left=frozenset([".lock"])):
    "Compare weights, metrics without times, and log; of hidden files only those in `left` may exist."
    assert run.finished and run.log() == whole.log()
    assert [(r["step"], r["iteration"]) for r in run.log()] == [(t, i) for t in range(3) for i in range(10, 61, 10)]
    for t in range(3):
        mine, theirs = (load_file(r.step_path(t, "model.safetensors")) for r in (run, whole))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
        assert (run.confusion(t).counts == whole.confusion(t).counts).all()
        mine, theirs = ({k: v for k, v in r.metrics(t).items() if k not in ("seconds", "memory")} for r in (run, whole))
        assert json.dumps(mine) == json.dumps(theirs)
    assert not list((run.folder / "resume").glob("*")) and {p.name for p in run.folder.glob(".*")} == left


def test_killed_at_random_moments(tmp_path, monkeypatch, forked, changes):
    "kill -9 inside steps, while checkpoints are written, in evaluation, and between steps."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    began = time.monotonic()
    train(tmp_path / "whole", changes)
    took, drawn, caught = time.monotonic() - began, random.Random(0), set()
    longest, folder = 3 * took / KILLS + 0.3, tmp_path / "killed" / "run"
    for _ in range(KILLS):
        process = forked.Process(target=train, args=(tmp_path / "killed", changes))
        process.start()
        process.join(drawn.uniform(0.02, longest))
        process.kill()
        process.join()
        place = (load_run(folder).n_steps, len(load_run(folder).log())) if (folder / "run.json").is_file() else None
        longest *= 1.1 if place in caught else 1  # no progress on a busy machine: allow more time
        caught.add(place)
    assert len(caught) > 2  # the kills hit the run at several places
    train(tmp_path / "killed", changes)
    assert_same(load_run(tmp_path / "killed" / "run"), load_run(tmp_path / "whole" / "run"))
    kept("kills of a training process survived", KILLS)


def test_asked_to_stop(tmp_path, monkeypatch, forked):
    "Stop signals save a checkpoint first, so at most a part of an iteration is repeated."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    changes = dict(save_minutes=1000)
    train(tmp_path / "whole", changes)
    log = tmp_path / "stopped" / "run" / "log.jsonl"
    for reached, asked in ((2, signal.SIGTERM), (8, signal.SIGINT), (14, signal.SIGUSR1)):
        process = forked.Process(target=train_until_stopped, args=(tmp_path / "stopped", changes))
        process.start()
        while process.is_alive() and not (log.is_file() and len(log.read_text().splitlines()) >= reached):
            time.sleep(0.002)
        os.kill(process.pid, asked)
        process.join(30)
        assert process.exitcode == 75
        (state,) = (tmp_path / "stopped" / "run" / "resume").iterdir()
        assert state.name.startswith(f"step-{(reached - 1) // 6:02d}-")
    train(tmp_path / "stopped", changes)
    assert_same(load_run(tmp_path / "stopped" / "run"), load_run(tmp_path / "whole" / "run"))


def train_until_stopped(outputs, changes):
    try:
        train(outputs, changes)
    except Interrupted:
        os._exit(75)


def test_a_damaged_checkpoint_is_ignored(tmp_path, monkeypatch, forked):
    "A truncated checkpoint is ignored: the run resumes from the one before, or begins the step again."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    train(tmp_path / "whole", {})
    process = forked.Process(target=train, args=(tmp_path / "cut", {}))
    process.start()
    resume = tmp_path / "cut" / "run" / "resume"
    while not list(resume.glob("step-01-*")):
        time.sleep(0.002)
    process.kill()
    process.join()
    (resume / "step-01-00000059.safetensors").write_bytes(b"\x10" * 100)
    train(tmp_path / "cut", {})
    assert_same(load_run(tmp_path / "cut" / "run"), load_run(tmp_path / "whole" / "run"))


def test_one_writer(tmp_path, monkeypatch, forked):
    "A second process is refused while the first one writes, and accepted after the first was killed."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    process = forked.Process(
        target=train, args=(tmp_path, dict(training=PARAMETERS["training"] | dict(iterations=5000)))
    )
    process.start()
    while not list((tmp_path / "run").glob("log.jsonl")):
        time.sleep(0.01)
    with pytest.raises(ValueError, match=f"is being written by process {process.pid} on"):
        train(tmp_path, dict(training=PARAMETERS["training"] | dict(iterations=5000)))
    process.kill()
    process.join()
    experiment = Experiment(
        Settings(**PARAMETERS | dict(training=PARAMETERS["training"] | dict(iterations=5000))), tmp_path
    )
    monkeypatch.setattr(experiment, "train_step", lambda student, step: student)
    assert next(experiment.steps()) == 0


def test_leftovers_of_a_dead_writer_are_removed(tmp_path):
    "Half-written files with names of `mbs` or of safetensors are removed in any folder; other hidden files are kept."
    half_written = ["step-01/.model.safetensors.0123abcd", "resume/.tmpUclfoe", ".run.json.89abcdef"]
    others = [".lock", ".gitignore", "resume/step-01-00000012.safetensors"]
    for name in half_written + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with lock_folder(tmp_path):
        found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
        assert {name for name in found if not name.startswith(".lock-")} == set(others)
