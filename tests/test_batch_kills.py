"""A batch is killed at random moments: its driver, a worker or the kernel of a run, under each executor.

The same command, given again until it is finished, ends with the bits of an undisturbed batch. MBS_BATCH_KILLS is the
number of kills under each executor; in the ordinary suite, tests/test_batch.py kills one of each kind.
"""

import hashlib
import os
import random
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from figures import kept
from slurm_cluster import Cluster, explain_absence
from test_batch import TINY, Driver, result, write_batch

from mbs.batch import Batch
from mbs.experiment import Experiment
from mbs.notebooks import read_worker

KILLS = int(os.environ.get("MBS_BATCH_KILLS", 0))
MOST = 8  # kills of one batch, after which it may finish
VICTIMS = ("driver", "worker", "kernel")
PARAMETERS = TINY | dict(save_minutes=0, training=TINY["training"] | dict(iterations=40, new_iterations=40))
needs_kills = pytest.mark.skipif(not KILLS, reason="MBS_BATCH_KILLS is the number of kills, 40 with make stress")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # so that sums are equal in every process
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "120000")  # its agents start slowly on a busy machine


@contextmanager
def on_this_machine(folder: Path):
    yield ["--workers", "2"]


@contextmanager
def on_ray(folder: Path):
    "A Ray that outlives drivers; the workers of Ray are killed."
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as RayCluster

    for _ in range(5):
        try:
            cluster = RayCluster(initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False))
            break
        except Exception:  # Ray waits half a minute for a busy machine, and raises plain errors
            continue
    else:
        pytest.skip("Ray does not start on this machine now")
    try:
        yield ["--executor", "ray", "--address", cluster.address]
    finally:
        cluster.shutdown()


@contextmanager
def on_slurm(folder: Path):
    "Two nodes; the processes of jobs are killed, and jobs outlive drivers."
    if explain_absence():
        pytest.skip(explain_absence())
    cluster = Cluster(folder)
    try:
        yield ["--executor", "slurm"]
    finally:
        cluster.stop()


def list_workers(folder: Path) -> list[psutil.Process]:
    "Return the processes that work on the runs of a batch now, in random order."
    found = []
    for run in random.sample(runs := [path.parent for path in folder.glob("*/.worker")], len(runs)):
        try:
            process = psutil.Process(read_worker(run).get("pid", -1))
            if any(run.name in word for word in process.cmdline()):
                found.append(process)
        except (psutil.Error, ValueError):
            continue
    return found


def find_victim(what: str, driver: Driver, folder: Path) -> psutil.Process | None:
    "Return the driver, the process that started a run (of Ray or Slurm, or the run itself), or the kernel of a run."
    try:
        if what == "driver":
            return psutil.Process(driver.pid)
        for worker in list_workers(folder):
            if what == "kernel":
                if kernels := [child for child in worker.children() if "ipykernel_launcher" in child.cmdline()]:
                    return kernels[0]
            else:
                return worker if worker.ppid() in (driver.pid, 1) else worker.parent()
    except psutil.Error:  # it has ended meanwhile
        pass
    return None


def is_within_step(folder: Path) -> bool:
    "Whether a run has saved the state of a step that it is training."
    return any(folder.glob("*/resume/*.safetensors"))


class Moment:
    "A random moment: half of them some time after the last kill, half of them soon after a run has saved a state."

    def __init__(self, typical: float):  # seconds of a call
        self.needs_state = random.random() < 0.5
        self.pause = random.uniform(0, 2 if self.needs_state else typical)
        self.due = None

    def has_come(self, folder: Path) -> bool:
        if self.due is None and (not self.needs_state or is_within_step(folder)):
            self.due = time.monotonic() + self.pause
        return self.due is not None and time.monotonic() > self.due


def watch(driver: Driver, folder: Path, n_kills: int, typical: float) -> int:
    "Kill up to `n_kills` processes of one call at random moments; return how many, once the driver has ended."
    killed, moment, what = 0, Moment(typical), random.choice(VICTIMS)
    deadline = time.monotonic() + 600
    while driver.poll() is None:
        assert time.monotonic() < deadline, driver.said()
        if killed < n_kills and moment.has_come(folder) and (victim := find_victim(what, driver, folder)):
            within = is_within_step(folder)
            try:
                victim.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
            killed += 1
            kept(f"kills of a batch survived: {what}{', with a step half trained' * within}", 1)
            print(what, "within a step" * within, flush=True)
            moment, what = Moment(typical / 2), random.choice(VICTIMS)
        time.sleep(0.02)
    return killed


def hash_models(folder: Path) -> dict[str, str]:
    files = folder.glob("*/step-*/model.safetensors")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def list_files(folder: Path) -> set[str]:
    "List the files of runs, without those of their executors and the flag of a worker that was killed after its run."
    paths = {path.relative_to(folder) for path in folder.glob("*/**/*")}
    others = {"slurm", ".slurm", "train.ipynb"}
    return {str(path) for path in paths if not others & set(path.parts) and not path.name.startswith(".worker")}


def train_undisturbed(home: Path, monkeypatch) -> tuple:
    "Train the batch in this process and return its end state."
    import torch

    monkeypatch.setenv("MBS_HOME", str(home))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for job in Batch(write(home)).jobs:
        Experiment(job.settings).run()
    torch.set_num_threads(threads)
    return read_end(home / "outputs/toy")


def write(home: Path) -> Path:
    home.mkdir()
    return write_batch(home, parameters=PARAMETERS, grid=dict(method=["finetune", "mbs"], seed=[0]))


def read_end(folder: Path) -> tuple:
    return result(folder), hash_models(folder), list_files(folder)


def finish(home: Path, options: list[str], n_kills: int, typical: float) -> tuple[int, float]:
    "Give one command again and again until it succeeds, killed `n_kills` times; return kills, and seconds of a call."
    folder, killed, before = home / "outputs/toy", 0, 0
    for _ in range(3 * n_kills + 3):
        began = time.monotonic()
        driver = Driver("batch", home / "toy.yaml", *options)
        now = watch(driver, folder, n_kills - killed, typical)
        killed += now
        if driver.returncode == 0:
            return killed, typical if now else time.monotonic() - began
        assert now or before, f"nobody was killed, and the batch failed: {driver.said()}"
        assert "Traceback" not in driver.said(), driver.said()
        before = now
    raise AssertionError(f"the batch is not finished after {killed} kills: {driver.said()}")


@needs_kills
@pytest.mark.parametrize("executor", [on_this_machine, on_ray, on_slurm])
def test_a_batch_that_is_killed_ends_like_an_undisturbed_one(executor, tmp_path, monkeypatch):
    random.seed(KILLS)
    monkeypatch.chdir(tmp_path)
    whole = train_undisturbed(tmp_path / "whole", monkeypatch)
    killed, n_batches, typical = 0, 0, 15.0
    (tmp_path / "cluster").mkdir()
    with executor(tmp_path / "cluster") as options:
        while killed < KILLS:
            home = tmp_path / f"home{n_batches}"
            monkeypatch.setenv("MBS_HOME", str(home))
            write(home)
            now, typical = finish(home, options, min(MOST, KILLS - killed), typical)
            end = read_end(home / "outputs/toy")
            assert end == whole, (home, end[2] ^ whole[2])
            killed, n_batches = killed + now, n_batches + 1
            print(f"{killed} kills, {n_batches} batches, a call takes {typical:.0f} s")
    kept(f"kills of a batch survived {executor.__name__.replace('_', ' ')}", killed)
