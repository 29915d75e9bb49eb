"""A process is killed at each write, iteration, evaluation and save of the notebook.

The same command then ends like an uninterrupted run.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_interruption
import torch
from figures import kept
from test_faults import TINY, same_end
from test_stopping import plain

import mbs.checkpoint
import mbs.evaluation
import mbs.experiment
import mbs.run_folder
import mbs.training
from mbs.experiment import Experiment
from mbs.files import open_own
from mbs.notebooks import read_failure
from mbs.run import load_run
from mbs.settings import Settings

forked = test_interruption.forked  # a fixture
EVERY = int(os.environ.get("MBS_EVERY_KILL", 25))  # kill at every n-th moment; 1 with make stress
SAVES = int(os.environ.get("MBS_NOTEBOOK_SAVES", 1))  # number of kills while papermill saves; more with make stress
SHORT = TINY | dict(samples=1, training=TINY["training"] | dict(iterations=12, both=True))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    return tmp_path


class Moments:
    "Counts the moments of a run; at moment `at` this process kills itself, with half of a write on the disk."

    def __init__(self, told: Path, at=None):
        self.told, self.at, self.seen = told, at, []
        for owner, name, what in (
            (mbs.experiment, "_evaluate_state", "in evaluation"),
            (mbs.training, "measure_gradient", "in an iteration"),
            (mbs.run_folder, "_write_samples", "before the first step"),
            (mbs.run_folder, "_write_step", "between steps"),
            (mbs.run_folder.RunLog, "truncate", "between steps"),
            (os, "replace", "while a file is renamed"),
            (Path, "unlink", "while states are removed"),
        ):
            setattr(owner, name, self.before(getattr(owner, name), what))
        mbs.checkpoint.save_file = self.half(mbs.checkpoint.save_file, 1, "while a checkpoint is written")
        np.savez_compressed = self.half(np.savez_compressed, 0, "while counts or pictures are written")
        Path.write_text = self.half(Path.write_text, 0, "while a text file is written")
        mbs.run_folder.open_own = self.half_line

    def due(self, what):
        self.seen.append(what)
        return len(self.seen) == self.at

    def end(self, what):
        self.told.write_bytes(what.encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def before(self, real, what):
        def call(*args, **kwargs):
            now = (
                "in evaluation of an iterate"
                if what == "in evaluation" and sys._getframe(1).f_code.co_name != "_train_and_write"
                else what
            )
            if self.due(now):
                self.end(now)
            return real(*args, **kwargs)

        return call

    def half(self, real, where, what):
        def call(*args, **kwargs):
            due = self.due(what)
            done = real(*args, **kwargs)
            if due:
                file = Path(
                    getattr(args[where], "name", args[where])
                    if not isinstance(args[where], (str, Path))
                    else args[where]
                )
                if hasattr(args[where], "flush"):
                    args[where].flush()
                os.truncate(file, file.stat().st_size // 2)
                self.end(what)
            return done

        return call

    def half_line(self, file, mode):
        opened = open_own(file, mode)
        if str(file).endswith("log.jsonl") and self.due("while a line is logged"):
            opened.write('{"step": 0, "itera')
            opened.flush()
            self.end("while a line is logged")
        return opened


def child(outputs, told, at):
    "Train in a forked process and die at moment `at`; if it is None, write the names of all moments to `told`."
    moments = Moments(told, at)
    Experiment(Settings(**SHORT), outputs).run()
    told.write_bytes(json.dumps(moments.seen).encode())


def fork(forked, *args):
    process = forked.Process(target=child, args=args)
    process.start()
    process.join(120)
    return process.exitcode


def test_killed_at_every_moment(home, forked):
    "A kill at any moment, with any file half-written, loses nothing."
    told = home / "told"
    Experiment(Settings(**SHORT), home / "count")  # makes the data, once
    assert fork(forked, home / "count", told, None) == 0
    moments, whole = json.loads(told.read_bytes()), load_run(home / "count" / "run")
    named = {
        "in an iteration",
        "in evaluation",
        "between steps",
        "while a checkpoint is written",
        "while a line is logged",
        "while a file is renamed",
        "while states are removed",
    }
    assert named <= set(moments) and len(moments) > 60
    chosen = (
        set(range(1, len(moments) + 1, EVERY))
        | {1 + moments.index(what) for what in named}
        | {1 + len(moments) - 1 - moments[::-1].index(what) for what in named}
    )
    for at in sorted(chosen):
        outputs = home / f"killed-{at}"
        assert fork(forked, outputs, told, at) == -signal.SIGKILL and told.read_bytes().decode() == moments[at - 1]
        run = Experiment(Settings(**SHORT), outputs).run()
        same_end(run, whole)
        for t in range(3):
            assert (run.confusion(t).counts == whole.confusion(t).counts).all() and run.metrics(t)[
                "scores"
            ] == whole.metrics(t)["scores"]
        assert {p.relative_to(run.folder) for p in run.folder.rglob("*")} == {
            p.relative_to(whole.folder) for p in whole.folder.rglob("*")
        }, "something is left over"
        kept(f"kills survived: {moments[at - 1]}", 1)


SAVE = """
import os, signal, sys
from papermill.iorw import LocalHandler
from mbs.notebooks import main
real, last, n = LocalHandler.write, int(sys.argv[1]), 0
def write(self, text, path):
    global n
    n += 1
    if n < last: return real(self, text, path)
    real(self, text[:len(text) // 2], path)
    os.kill(os.getpid(), signal.SIGKILL)
LocalHandler.write = write
main(*sys.argv[2:])
"""


def test_killed_while_the_notebook_is_saved(home):
    "papermill writes the notebook again with every cell: a kill leaves half of it, the same command completes it."
    book = json.loads(plain(home).read_text())
    book["cells"] = book["cells"][:4]
    (home / "plain.ipynb").write_text(json.dumps(book))
    short = SHORT | dict(training=SHORT["training"] | dict(both=False))
    whole = Experiment(Settings(**short), home / "whole").run()
    (home / "save.py").write_text(SAVE)
    output = home / "outputs/run/train.ipynb"

    def execute(*words):
        return subprocess.run(
            [sys.executable, *words, str(home / "plain.ipynb"), str(output), json.dumps(short)],
            capture_output=True,
            text=True,
            timeout=300,
        )

    for n in range(3, 3 + SAVES):
        done = execute(str(home / "save.py"), str(n))
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        with pytest.raises(ValueError):
            json.loads(output.read_text())
        assert read_failure(output) == ""  # half a notebook tells no failure
        kept("kills survived: while papermill saves", 1)
    done = execute("-m", "mbs.notebooks")
    assert done.returncode == 0, done.stdout + done.stderr
    same_end(load_run(output.parent), whole)
    assert len(json.loads(output.read_text())["cells"]) == 5
