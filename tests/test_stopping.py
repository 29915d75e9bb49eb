"Commands are stopped or killed while papermill executes and saves the notebook: nothing is lost or left running."

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import nbformat
import psutil
import pytest
import yaml
from figures import kept
from test_interruption import PARAMETERS, assert_same

from mbs.batch import Batch
from mbs.experiment import Experiment
from mbs.folders import find_runs_folder
from mbs.lifeline import EXIT_RESUME, Interrupted
from mbs.notebooks import read_failure
from mbs.run import load_run
from mbs.settings import Settings

KILLS = int(os.environ.get("MBS_NOTEBOOK_KILLS", 2))
LONG = PARAMETERS | dict(save_minutes=1000, training=PARAMETERS["training"] | dict(iterations=400, both=False))
TRAIN = """from mbs.experiment import Experiment
from mbs.settings import settings_from_notebook
settings = settings_from_notebook(globals())
for step in Experiment(settings).steps(): print('step', step)"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def command(home, *words):
    "Start `mbs WORDS` so that it receives SIGHUP, even when these tests run under nohup."
    return subprocess.Popen(
        [sys.executable, "-m", "mbs", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),
    )


def parameters(values):
    return [f"{k}={json.dumps(v)}" for k, v in values.items()]


def records(home, name="run"):
    log = home / "outputs" / name / "log.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def until(what, process, seconds=120):
    "Wait until `what()` is true, while `process` runs."
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, (
            process.stdout.read() if process.poll() is not None else "too slow"
        )
        time.sleep(0.02)


def gone(processes):
    return not psutil.wait_procs(processes, 20)[1]


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_mbs_run_saves_and_says_resume(home, asked):
    "The kernel saves in the middle of a step; exit code 75 and one sentence; no process is left."
    if asked != signal.SIGTERM and not os.environ.get("MBS_NOTEBOOK_KILLS"):
        pytest.skip("in full with make stress")
    process = command(home, "run", *parameters(LONG))
    until(lambda: records(home) >= 4, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(asked)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_RESUME, said
    last = said.strip().splitlines()[-1]
    assert (
        last.startswith("mbs: asked to stop in step 0 after iteration")
        and last.endswith("checkpoint saved; rerun the command to resume")
        and "Traceback" not in said
    )
    assert gone(children)
    (state,) = (home / "outputs/run/resume").iterdir()
    assert int(state.stem.split("-")[-1]) >= 40 and "Interrupted" in read_failure(home / "outputs/run/train.ipynb")
    kept("signals obeyed by mbs run", 1)


def test_asked_while_nothing_trains(home):
    "No further cell begins after a signal, whether the kernel was between two cells or busy with other work."
    from mbs.notebooks import execute_notebook

    ask = (
        "import os, signal, threading, time; "
        "ask = threading.Timer({}, os.kill, (os.getppid(), signal.SIGTERM)); ask.start()"
    )
    for code in (ask.format(0.3) + "; time.sleep(30)", ask.format(0)):
        book = nbformat.v4.new_notebook(
            cells=[
                nbformat.v4.new_code_cell("x = 1"),
                *map(nbformat.v4.new_code_cell, (code, f"open({str(home / 'reached')!r}, 'w')")),
            ]
        )
        nbformat.write(book, home / "book.ipynb")
        with pytest.raises(Interrupted, match="asked to stop"):
            execute_notebook(home / "book.ipynb", home / "out.ipynb", {})
        assert not (home / "reached").exists()


def plain(home):
    "Write a notebook that trains and draws nothing, so that many kills cost little."
    train = nbformat.read(find_runs_folder() / "train.ipynb", 4)
    train.cells = [
        next(c for c in train.cells if "parameters" in c.metadata.get("tags", [])),
        *(nbformat.v4.new_code_cell(code) for code in [TRAIN, *["1"] * 20]),
    ]
    nbformat.write(train, home / "plain.ipynb")
    return home / "plain.ipynb"


def executing(home, values):
    "Start the process that executes the notebook of a run."
    words = [str(plain(home)), str(home / "outputs/run/train.ipynb"), json.dumps(values)]
    return subprocess.Popen(
        [sys.executable, "-m", "mbs.notebooks", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_kernel_that_dies(home):
    "A kernel that is killed, as for its memory, gives one sentence and exit code 1."
    process = executing(home, LONG)
    until(lambda: records(home) >= 2, process)
    kernel = next(
        p for p in psutil.Process(process.pid).children(recursive=True) if "ipykernel" in " ".join(p.cmdline())
    )
    kernel.kill()
    said = process.communicate(timeout=60)[0]
    assert (
        process.returncode == 1
        and "the kernel of the run died without an error message" in said.strip().splitlines()[-1]
        and "Traceback" not in said
    ), said


def written_since(path, began):
    return path.is_file() and path.stat().st_mtime > began


def test_killed_while_papermill_saves(home):
    "kill -9 of the process that writes the notebook, at random moments: run and notebook end complete."
    short = PARAMETERS | dict(training=PARAMETERS["training"] | dict(both=False))
    Experiment(Settings(**short), home / "whole").run()
    output, drawn, torn = home / "outputs/run/train.ipynb", random.Random(1), 0
    for k in range(KILLS):
        process = executing(home, short)
        began = time.time()
        until(
            partial(written_since, output, began), process
        )  # written before the first cell, and again with every cell
        if k % 2:
            time.sleep(drawn.uniform(0, 2))
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        assert gone(children), "a kernel outlives the process that executes the notebook"
        try:
            json.loads(output.read_text())
        except ValueError:
            torn += 1
    last = executing(home, short)
    said = last.communicate(timeout=300)[0]
    assert last.returncode == 0, said
    assert_same(load_run(home / "outputs/run"), load_run(home / "whole/run"), left={".lock", ".worker"})
    assert not read_failure(output) and len(json.loads(output.read_text())["cells"]) == 23
    kept("kills of a run under papermill survived", KILLS)
    kept("of these, with the notebook half-written", torn)


def test_a_batch_that_is_asked_to_stop(home):
    "SIGTERM to a batch: its runs save, exit code 75. SIGTERM to one run only: that run is stopped, not failed."
    grid = dict(
        notebook=str(plain(home)), parameters={k: v for k, v in LONG.items() if k != "name"}, grid=dict(seed=[0])
    )
    (home / "two.yaml").write_text(yaml.safe_dump(grid))
    process = command(home, "batch", str(home / "two.yaml"))
    until(lambda: records(home, "two/s0") >= 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert (
        process.returncode == EXIT_RESUME
        and "asked to stop: checkpoints of the running runs saved; rerun the command to resume" in said
        and gone(children)
    ), said
    assert len(list((home / "outputs/two/s0/resume").glob("*.safetensors"))) == 1
    if not os.environ.get("MBS_NOTEBOOK_KILLS"):
        return  # the rest in full with make stress
    process = command(home, "batch", str(home / "two.yaml"))
    until(lambda: records(home, "two/s0") >= 6, process)
    next(p for p in psutil.Process(process.pid).children() if "mbs.notebooks" in p.cmdline()).terminate()
    said = process.communicate(timeout=60)[0]
    assert (
        process.returncode == EXIT_RESUME
        and "1 of 1 runs were asked to stop; rerun the command to resume" in said
        and "s0: stopped" in said
        and "failed" not in said
    ), said
    assert Batch(home / "two.yaml").plan(measure=False).rows[0][1] == "broken"


def test_in_process(home):
    "`Experiment.run()` in a Python program raises Interrupted, also while nothing trains."
    experiment = Experiment(Settings(**LONG))
    experiment.train_step = lambda student, step: signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(Interrupted, match=r"asked to stop \(SIGUSR1\)"):
        experiment.run()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
