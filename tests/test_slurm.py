"""Batches on a real Slurm of two nodes: jobs that outlive their terminal, time limits, dead nodes, locks.

The first fixture starts what takes long, and the last tests look at it, so that the cluster waits for as little as
possible. Jobs of `slow.ipynb` wait between iterations; they compute what jobs without waiting compute.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from slurm_cluster import Cluster, ask, explain_absence, wait_until
from test_batch import TINY, TRAIN
from typer.testing import CliRunner

from mbs.batch import Batch
from mbs.cli import app
from mbs.executors import Stopped
from mbs.experiment import Experiment
from mbs.folders import find_runs_folder
from mbs.lifeline import Interrupted
from mbs.notebooks import RunFailed, read_worker
from mbs.run import Run, load_run
from mbs.settings import Settings
from mbs.slurm import OnSlurm, Outcome, make_parameters

needs_slurm = pytest.mark.skipif(bool(explain_absence()), reason=explain_absence() or "a Slurm can be started")
PAUSE = """import time
from mbs.training import Training
update_weights = Training.update_weights
def update_weights_slowly(self, terms):
    time.sleep(0.1)
    return update_weights(self, terms)
Training.update_weights = update_weights_slowly
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "The home folder of all batches, with one thread for every process."
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBS_HOME", str(folder))
        patch.chdir(folder)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            patch.setenv(name, "1")
        for notebook, code in (("quick", TRAIN), ("slow", PAUSE + TRAIN)):
            write_notebook(folder / f"{notebook}.ipynb", code)
        yield folder


def write_notebook(path: Path, code: str):
    "Write a notebook that trains like train.ipynb but draws nothing."
    book = nbformat.read(find_runs_folder() / "train.ipynb", 4)
    parameters = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    book.cells = [parameters, nbformat.v4.new_code_cell(code)]
    nbformat.write(book, path)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, home):
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.stop()


def make_batch(home: Path, name: str, notebook: str = "quick", iterations: int = 30, grid=None, **parameters) -> Batch:
    "Write the file of a batch, by default of one run, and read it."
    training = TINY["training"] | dict(iterations=iterations, new_iterations=30)
    batch = dict(
        notebook=str(home / f"{notebook}.ipynb"),
        parameters=TINY | dict(training=training) | parameters,
        grid=grid or dict(method=["finetune"]),
    )
    (home / f"{name}.yaml").write_text(yaml.safe_dump(batch))
    return Batch(home / f"{name}.yaml")


def count_records(folder: Path) -> int:
    log = folder / "log.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def finish(batch: Batch, **options) -> list[Run]:
    "Watch a batch to its end and return its runs."
    return batch.run(OnSlurm(every=0.3), show=lambda table: None, every=0.2, **options)


def read_log(folder: Path) -> str:
    "Return what the jobs of a run printed."
    return "".join(path.read_text() for path in sorted((folder / "slurm").glob("*.log")))


def assert_undisturbed(run: Run, home: Path):
    "Train the same run here without any disturbance, and compare every bit of its models and its log."
    settings = run.card.settings.model_dump() | dict(name="whole")
    whole = Experiment(Settings(**settings), home / "undisturbed" / run.folder.parent.name).run()
    assert run.finished and run.log() == whole.log()
    for step in range(run.n_steps):
        mine, theirs = (load_file(r.step_path(step, "model.safetensors")) for r in (run, whole))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.fixture(scope="module")
def disturbed(cluster, home) -> dict[str, Batch]:
    "Start a run that will reach its time limit, and one whose node dies; n2 comes back afterwards."
    batches = dict(
        limit=make_batch(home, "limit", "slow", iterations=1000),
        node=make_batch(home, "node", "slow", iterations=150, save_minutes=0),
    )
    (long_job,) = batches["limit"].detach(OnSlurm(time="30", signal=30, sbatch=dict(nodelist="n1")))
    (job,) = batches["node"].detach(OnSlurm())
    folder = batches["node"].jobs[0].folder
    wait_until(lambda: count_records(folder) >= 5)
    assert ask("squeue", "-h", "-j", job, "-o", "%N").strip() == "n2"
    cluster.kill_node("n2")
    wait_until(lambda: ask("squeue", "-h", "-j", job, "-o", "%T").strip() == "PENDING")
    ask("scontrol", "update", f"jobid={job}", "reqnodelist=n1")
    cluster.start_node("n2")
    wait_until(lambda: "idle" in ask("sinfo", "-h", "-n", "n2", "-o", "%T"))
    wait_until(lambda: count_records(batches["limit"].jobs[0].folder) >= 5)
    minutes = ask("squeue", "-h", "-j", long_job, "-o", "%M").split(":")[-2]
    ask("scontrol", "update", f"jobid={long_job}", f"timelimit={int(minutes) + 2}")  # Slurm may warn a minute early
    return batches


@needs_slurm
def test_four_runs_outlive_the_command_that_submitted_them(disturbed, home):
    "`--detach` submits all runs; a later batch watches the same jobs; base steps are trained once."
    make_batch(home, "four", grid=dict(method=["finetune", "kd"], seed=[0, 1]))
    words = ["batch", str(home / "four.yaml"), "--executor", "slurm", "--time", "10", "--sbatch", "nice=1"]
    said = CliRunner().invoke(app, [*words, "--detach"])
    assert said.exit_code == 0 and "\n4 jobs are in Slurm's queue: " in said.output, said.output
    jobs = said.output.splitlines()[1].rpartition(": ")[2].split(", ")
    assert "TimeLimit=00:10:00" in ask("scontrol", "show", "job", jobs[0])
    again = CliRunner().invoke(app, [*words, "--detach"])
    assert again.output.splitlines()[1] == said.output.splitlines()[1], "it submitted jobs that are in the queue"
    batch = Batch(home / "four.yaml")
    states = []
    runs = batch.run(OnSlurm(every=0.3), show=lambda table: states.append({row[1] for row in table.rows}), every=0.2)
    assert len(runs) == 4 and all(run.finished for run in runs) and {"running"} <= set().union(*states)
    assert ["base_from" in run.metrics(0) for run in runs] == [False, False, True, True]
    assert [json.loads((run.folder / "slurm/job.json").read_text())["job"] for run in runs] == jobs
    assert "step 1" in read_log(runs[0].folder)


@needs_slurm
def test_a_cancelled_run_saves_and_resumes(cluster, home, monkeypatch):
    "Ctrl-C and no: jobs save and end. Then the same batch resumes. Ctrl-C and yes: the job goes on."
    batch = make_batch(home, "cancel", "slow", iterations=60)
    folder = batch.jobs[0].folder
    monkeypatch.setattr("mbs.slurm._ask_to_go_on", lambda n_jobs: False)
    with pytest.raises(Interrupted, match="checkpoints of the running runs saved; rerun the command to resume"):
        run_until_interrupted(batch, lambda: count_records(folder) >= 2)
    assert isinstance(batch.jobs[0].future.result(), Stopped)
    (state,) = (folder / "resume").glob("*.safetensors")
    assert int(state.stem.split("-")[-1]) >= 20
    assert not ask("squeue", "-h", "-n", "cancel/finetune")
    monkeypatch.setattr("mbs.slurm._ask_to_go_on", lambda n_jobs: True)
    batch = Batch(home / "cancel.yaml")
    with pytest.raises(Interrupted, match="the jobs of the batch continue; rerun the command to watch or to stop them"):
        run_until_interrupted(batch, lambda: count_records(folder) >= 4)
    job = json.loads((folder / "slurm/job.json").read_text())["job"]
    assert ask("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING"
    batch = Batch(home / "cancel.yaml")
    states = []
    (run,) = batch.run(OnSlurm(every=0.3), show=lambda table: states.append(table.rows[0][1]), every=0.2)
    assert states[0] == "running" and json.loads((folder / "slurm/job.json").read_text())["job"] == job
    assert_undisturbed(run, home)


def run_until_interrupted(batch: Batch, what):
    "Run a batch on Slurm; send SIGINT, as Ctrl-C does, once `what()` is true."

    def show(table):
        if what():
            os.kill(os.getpid(), 2)

    batch.run(OnSlurm(every=0.3), show=show, every=0.2)


@needs_slurm
def test_a_run_on_two_nodes_equals_one_process(cluster, home):
    "`torch.distributed.run` on each node of the allocation; what remains is the order of the sums."
    batch = make_batch(home, "nodes", processes=2, decoder=dict(depth=1, drop_path=0.0))
    runs = batch.run(OnSlurm(processes=2, nodes=2, every=0.3), show=lambda table: None, every=0.2)
    settings = runs[0].card.settings.model_dump() | dict(name="one", processes=1)
    one = Experiment(Settings(**settings), home / "alone").run()
    assert runs[0].finished
    for mine, theirs in zip(runs[0].log(), one.log(), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert not (runs[0].folder / ".launch").exists()


LOCK = """import sys, time, fcntl, os, pathlib
import mbs.locks
fcntl.flock = lambda *arguments: None  # each machine has locks of its own
mbs.locks.BEAT, mbs.locks.PATIENCE = 0.1, 3
node, folder = os.environ["SLURMD_NODENAME"], pathlib.Path(sys.argv[1])
(folder / node).touch()
while len(list(folder.glob("n?"))) < 2: time.sleep(0.01)  # both begin together
turns = 0
while turns < 3:
    with mbs.locks.hold_lock(folder / ".lock", lambda holder: None):
        with open(folder / "log", "a") as log: print(node, "begin", file=log)
        time.sleep(0.05)
        has_died = (folder / "log").read_text().count("n1 begin") == 3
        if node == "n1" and has_died: os._exit(0)  # with the lock
        with open(folder / "log", "a") as log: print(node, "end", file=log)
    turns += node == "n2" and has_died
    time.sleep(0.2)
"""


@needs_slurm
def test_a_lock_holds_between_nodes_without_a_common_flock(cluster, tmp_path):
    "Two nodes take turns; when one dies with the lock, the other one takes it over."
    (tmp_path / "lock.py").write_text(LOCK)
    ask("srun", "--nodes=2", "--ntasks=2", sys.executable, str(tmp_path / "lock.py"), str(tmp_path))
    words = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    held = None
    deaths = 0
    for node, what in words:
        if what == "begin":
            deaths += held == "n1"
            assert held in (None, "n1") and (held is None or deaths == 1), words
            held = node
        else:
            assert held == node, words
            held = None
    assert deaths == 1 and words[-6:] == [["n2", "begin"], ["n2", "end"]] * 3
    assert {path.name for path in tmp_path.glob(".*")} == {".lock"}


OWN_FLOCKS = """import fcntl, os, socket
fcntl.flock = lambda *arguments: None  # each machine has locks of its own
socket.gethostname = lambda: os.environ["SLURMD_NODENAME"]
"""


@needs_slurm
def test_batches_on_two_nodes_over_one_folder_train_each_run_once(cluster, home, tmp_path):
    "Nothing but the shared folder connects the nodes; whoever waits says for whom."
    make_batch(home, "shared", grid=dict(method=["finetune", "kd"]))
    (tmp_path / "sitecustomize.py").write_text(OWN_FLOCKS)
    environment = os.environ | dict(PYTHONPATH=str(tmp_path), MBS_HOME=str(home))
    batch = [sys.executable, "-m", "mbs", "batch", str(home / "shared.yaml"), "--workers", "1"]
    command = ["srun", "--nodes=2", "--ntasks=2", "--label", *batch]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    runs = [load_run(home / "outputs/shared" / name) for name in ("finetune", "kd")]
    for run in runs:
        lines = [(record["step"], record["iteration"]) for record in run.log()]
        assert run.finished and len(set(lines)) == len(lines), f"{run.folder.name} was trained twice: {said}"
    assert sum("base_from" in run.metrics(0) for run in runs) == 1
    waiting = re.findall(r"([01]): .*waiting for process \d+ on (n[12]), which works on the run (?:finetune|kd)", said)
    assert waiting and all(node == ("n2", "n1")[int(task)] for task, node in waiting), said
    assert not [path for run in runs for path in run.folder.glob(".worker-*")]


@needs_slurm
def test_what_slurm_refuses_is_one_sentence(cluster, home):
    make_batch(home, "refused")
    words = ["batch", str(home / "refused.yaml"), "--executor", "slurm"]
    said = CliRunner().invoke(app, [*words, "--partition", "nosuch"])
    assert said.exit_code == 2 and said.stderr.splitlines() == [
        "mbs: Slurm refused the job of refused/finetune (Invalid partition name specified): "
        "expected a partition, limits and options of this cluster, see sinfo"
    ]
    assert not (home / "outputs/refused/finetune").exists()
    said = CliRunner().invoke(app, [*words, "--nodes", "2"])
    assert said.exit_code == 2 and "2 nodes cannot share 1 processes equally" in said.stderr


@needs_slurm
def test_a_job_that_dies_is_one_sentence(cluster, home):
    "The job of a run is killed without a word: the batch fails, and names the log."
    batch = make_batch(home, "dies", "slow", iterations=100)
    folder = batch.jobs[0].folder

    killed = []

    def kill(table):
        if count_records(folder) and not killed:
            killed.append(psutil.Process(read_worker(folder)["pid"]).parent())
            killed[0].kill()

    with pytest.raises(RunFailed, match=r"its job ended without an outcome \(FAILED\); its log is .*/slurm/\d+.log"):
        batch.run(OnSlurm(every=0.3), show=kill, every=0.2)


@needs_slurm
def test_a_run_whose_node_died_is_finished_on_the_other(disturbed, home):
    "Slurm requeues the job; the run waits until the dead node's locks are stale, and ends as if nothing had happened."
    (run,) = finish(Batch(home / "node.yaml"))
    said = read_log(run.folder)
    assert said.count("Starting with JobEnvironment") == 2 and "waiting for" in said, said
    assert_undisturbed(run, home)


@needs_slurm
def test_a_run_over_its_time_limit_is_requeued(disturbed, home):
    "Slurm warns the job, the run saves, and a later attempt ends with the bits of an undisturbed run."
    (run,) = finish(Batch(home / "limit.yaml"))
    said = read_log(run.folder)
    attempts = said.count("Starting with JobEnvironment")
    assert attempts > 1 and said.count("back into the queue") == attempts - 1, said
    assert len(list((run.folder / "slurm").glob("*.log"))) == 1
    assert_undisturbed(run, home)


def test_options_of_a_job():
    "GPUs, processors and memory of a run are shared by its nodes; free options have any name but those of mbs."
    options = make_parameters("gpu", gpus=8, cpus=32, memory=100, time="1-12:00:00", account="lab", nodes=2)
    assert options["gres"] == "gpu:4" and options["cpus_per_task"] == 16 and options["mem"] == "51200M"
    assert options["additional_parameters"] == dict(requeue=True)
    free = make_parameters(sbatch={"--mail-type": "END", "exclusive": True, "gres": "gpu:a100:1"})
    assert free["additional_parameters"] == dict(requeue=True, mail_type="END", exclusive=True, gres="gpu:a100:1")
    assert free["gres"] is None and free["mem"] is None and free["time"] is None
    for wrong in (dict(gpus=0.5), dict(cpus=3, nodes=2), dict(sbatch=dict(output="x")), dict(sbatch={"job-name": "x"})):
        with pytest.raises(ValueError, match=r"equally: expected|is set by mbs: expected"):
            make_parameters(**wrong)


def test_a_job_that_is_warned_before_it_saves_is_not_requeued_for_ever(tmp_path, monkeypatch):
    from mbs import slurm

    asked = []
    done = type("Done", (), dict(returncode=0))
    monkeypatch.setattr(slurm.subprocess, "run", lambda command, **options: asked.append(command) or done)
    (tmp_path / "slurm").mkdir()
    for n_idle in (1, 2, 3):
        slurm._requeue(tmp_path, "5", n_idle)
    assert asked == [["scontrol", "requeue", "5"]] * 2
    outcome = Outcome.read(tmp_path, "5")
    assert outcome.ended and "warned 3 times in a row" in outcome.reason and not outcome.is_stopped


def test_without_slurm_or_submitit(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ValueError, match="sinfo is not installed here: expected a login node of a cluster"):
        OnSlurm()
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install 'mbs\[cluster\]'"):
        OnSlurm()


def test_options_of_other_executors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(dict(parameters=TINY, grid=dict(seed=[0]))))
    for words in (["--detach"], ["--partition", "main"], ["--executor", "ray", "--time", "5"]):
        said = CliRunner().invoke(app, ["batch", str(tmp_path / "x.yaml"), *words])
        assert said.exit_code == 2 and "expected it with --executor slurm" in said.stderr


def test_without_a_terminal_jobs_go_on(monkeypatch):
    from mbs import slurm

    assert slurm._ask_to_go_on(2)
    terminal = type("Terminal", (), dict(isatty=lambda self: True, write=lambda *a: None, flush=lambda *a: None))()
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    for answer, goes_on in (("", True), ("y", True), ("No", False)):
        monkeypatch.setattr("builtins.input", lambda answer=answer: answer)
        assert slurm._ask_to_go_on(2) == goes_on


def test_a_job_that_was_lost_is_told_only_when_its_outcome_stays_away(tmp_path):
    "The first look may come before another machine sees the outcome; a stopped job that is in the queue may come back."
    from mbs import slurm

    executor = type("Executor", (), dict(lost=set()))()
    (tmp_path / "slurm").mkdir()
    late = Future()
    slurm._update_future(executor, late, "1", tmp_path, is_queued=False)
    assert not late.done()
    Outcome(True, None).write(tmp_path, "1")
    slurm._update_future(executor, late, "1", tmp_path, is_queued=False)
    assert late.result() is None
    stopped = Future()
    Outcome(True, "asked to stop", True).write(tmp_path, "2")
    slurm._update_future(executor, stopped, "2", tmp_path, is_queued=True)
    assert not stopped.done()
    slurm._update_future(executor, stopped, "2", tmp_path, is_queued=False)
    assert isinstance(stopped.result(), Stopped)
