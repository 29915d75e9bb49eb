"A killed run goes on after its last complete step and ends as if it had never been killed."

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from mbs.experiment import Experiment
from mbs.run import Run, load_run
from mbs.settings import Settings

PARAMETERS = dict(
    name="run",
    protocol="2-3",
    samples=2,
    share_base=False,
    training=dict(crop=48, batch=4, iterations=30, optimizer="adamw"),
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    return tmp_path


def weights(run: Run) -> list[dict]:
    return [load_file(run.step_path(t, "model.safetensors")) for t in range(run.n_steps)]


def kill_in_step(home, step: int, outputs: str):
    "Start the run in a process of its own and kill it when the log shows that it is in the middle of `step`."
    code = f"import mbs; mbs.Experiment(mbs.Settings(**{PARAMETERS!r}), {str(home / outputs)!r}).run()"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    folder, limit = home / outputs / "run", time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if (folder / "run.json").is_file() and any(r["step"] == step for r in load_run(folder).log()):
            break
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    return load_run(folder)


def test_killed_run_ends_alike(home):
    whole = Experiment(Settings(**PARAMETERS), home / "whole").run()
    killed = kill_in_step(home, 1, "killed")
    assert killed.n_steps == 1 and not killed.finished
    resumed = Experiment(Settings(**PARAMETERS), home / "killed").run()
    assert resumed.finished and resumed.log() == whole.log()
    for mine, theirs in zip(weights(resumed), weights(whole)):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert [resumed.metrics(t)["scores"] for t in range(3)] == [whole.metrics(t)["scores"] for t in range(3)]


def test_other_parameters_are_refused_and_nothing_changes(home):
    run = Experiment(Settings(name="run", samples=0), home).run()
    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")}
    with pytest.raises(ValueError, match=r"settings\.seed: 0 there, 1 now"):
        Experiment(Settings(name="run", samples=0, seed=1), home).run()
    assert Experiment(Settings(name="run", samples=0), home).run().finished
    after = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")}
    changed = {p.name for p in before | after if p.is_file() and before.get(p) != after.get(p)}
    assert changed <= {".lock"}  # it names who wrote last


def test_base_step_is_shared_only_when_it_is_the_same(home):
    first = Experiment(Settings(name="first"), home).run()
    same = Experiment(Settings(name="same", method="kd", parts=dict(output_weight=10)), home).run()
    other = Experiment(Settings(name="other", training=PARAMETERS["training"] | dict(iterations=21)), home).run()
    assert (
        same.metrics(0)["base_from"] == "first"
        and "base_from" not in first.metrics(0)
        and "base_from" not in other.metrics(0)
    )
    a, b = weights(first)[0], weights(same)[0]
    assert all(torch.equal(a[k], b[k]) for k in a)
