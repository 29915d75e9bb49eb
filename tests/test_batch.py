"Batches: the same six runs on this machine and on a Ray cluster with processes dying; plans, names, refusals."

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from mbs.batch import Batch
from mbs.comparison import find_runs
from mbs.folders import find_runs_folder
from mbs.grid import expand_grid, read_grid
from mbs.notebooks import RunFailed, read_worker
from mbs.run import load_run

TINY = dict(
    protocol="6-2",
    scenes=dict(n_train=40, n_test=8, size=32),
    samples=1,
    workers=0,
    decoder=dict(depth=1),
    encoder_options=dict(patch_size=8, embed_dim=16, depth=1, num_heads=1),
    training=dict(crop=32, batch=4, iterations=30, optimizer="adamw"),
)
COMMAND = Path(sys.executable).with_name("mbs")
TWELVE = dict(method=["finetune", "kd", "mbs"], setting=["overlapped", "disjoint"], seed=[0, 1])
SIX = TWELVE | dict(setting=["overlapped"])
TRAIN = """
from pathlib import Path
from mbs.experiment import Experiment
from mbs.launch import launch
from mbs.settings import settings_from_notebook
settings = settings_from_notebook({k: v for k, v in globals().items() if k != "Path"})
if settings.method == "kd" and Path("trouble").exists(): raise RuntimeError("there is trouble")
if settings.processes > 1: launch(settings)
for step in Experiment(settings).steps(): print("step", step)
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # so that sums are equal on every machine
    return tmp_path


def write_batch(home, **grid) -> Path:
    "Write the file of a batch, with a notebook that trains like train.ipynb but draws nothing."
    train = nbformat.read(find_runs_folder() / "train.ipynb", 4)
    train.cells = [
        next(c for c in train.cells if "parameters" in c.metadata.get("tags", [])),
        nbformat.v4.new_code_cell(TRAIN),
    ]
    nbformat.write(train, home / "plain.ipynb")
    (home / "toy.yaml").write_text(
        yaml.safe_dump(dict(notebook=str(home / "plain.ipynb"), parameters=TINY, grid=TWELVE) | grid, sort_keys=False)
    )
    return home / "toy.yaml"


class Driver(subprocess.Popen):
    "The command in its own process, with its output in a file."

    def __init__(self, *words):
        self.file = Path(f"said-{time.monotonic_ns()}.txt").absolute()
        with open(self.file, "w") as out:
            super().__init__([COMMAND, *map(str, words)], stdout=out, stderr=subprocess.STDOUT)

    def said(self) -> str:
        return self.file.read_text()

    def until(self, what, seconds=300):
        "Wait until `what()` is true and return it; the process must not end before."
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert self.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.05)
        return found


def runs_in(folder: Path) -> list:
    return [load_run(path.parent) for path in sorted(folder.glob("*/run.json"))]


def finished(folder: Path, n: int) -> list:
    return found if len(found := [run for run in runs_in(folder) if run.finished]) >= n else []


def at_work(folder: Path):
    "Find a run that is training its first step, with the pid of its process."
    for run in runs_in(folder):
        if run.n_steps == 0 and run.log() and psutil.pid_exists(read_worker(run.folder)["pid"]):
            return run.folder, read_worker(run.folder)["pid"]


def stamps(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/step-*/*")}


def result(folder: Path) -> dict:
    return {
        run.folder.name: (
            run.log(),
            [(run.metrics(t)["scores"], run.confusion(t).counts.tolist()) for t in range(run.n_steps)],
        )
        for run in runs_in(folder)
    }


def on_this_machine(home) -> dict:
    "Kill a worker, then the driver: nothing is left running, and the next call completes the rest, repeating nothing."
    grid, folder = write_batch(home, grid=SIX), home / "outputs" / "toy"
    (home / "trouble").touch()
    driver = Driver("batch", grid, "--workers", 2)
    victim, pid = driver.until(lambda: at_work(folder))
    os.kill(pid, signal.SIGKILL)
    driver.until(lambda: f"{victim.name}: failed" in driver.said())
    driver.until(lambda: finished(folder, 2) and "there is trouble; its notebook" in driver.said())
    others = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait(60)
    assert not psutil.wait_procs(others, 30)[1], "processes outlive their driver"
    assert (
        "its process was ended by signal 9" in driver.said()
        and f"toy/{finished(folder, 1)[0].folder.name}: step 1" in driver.said()
    )
    before, plan = stamps(folder), {row[0]: row for row in Batch(grid).plan(measure=False).rows}
    states = [row[1] for row in plan.values()]
    assert {"done", "unfinished"} <= set(states) <= {"done", "unfinished", "new"}
    assert states.count("done") == len(finished(folder, 2)) >= 2
    assert any("RuntimeError: there is trouble" in row[6] for name, row in plan.items() if name.startswith("kd-"))
    (home / "trouble").unlink()
    again = Driver("batch", grid, "--workers", 2)
    assert again.wait(600) == 0 and "6 done" in again.said(), again.said()
    assert before.items() <= stamps(folder).items()
    trained = [run for run in runs_in(folder) if "base_from" not in run.metrics(0)]
    assert len(trained) == len({run.card.base for run in runs_in(folder)}) == 2, (
        "a base step was trained more than once"
    )
    return result(folder)


def patiently(start, **options):
    "Start a node of Ray, which gives up after 30 s on a crowded machine; try three times."
    for _ in range(2):
        with suppress(Exception):  # Ray raises nothing more special
            return start(**options)
    return start(**options)


def on_two_nodes(home) -> dict:
    "Kill a Ray worker, then a node: Ray starts their runs again, and they end like those of this machine."
    from ray.cluster_utils import Cluster

    grid, folder = write_batch(home, grid=SIX), home / "outputs" / "toy"
    cluster = patiently(Cluster, initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    try:
        node = patiently(cluster.add_node, num_cpus=1)
        driver = Driver("batch", grid, "--executor", "ray", "--address", cluster.address)
        _, pid = driver.until(lambda: at_work(folder))
        psutil.Process(pid).parent().kill()
        driver.until(lambda: finished(folder, 2))
        before = stamps(folder)
        cluster.remove_node(node, allow_graceful=False)
        patiently(cluster.add_node, num_cpus=1)
        assert driver.wait(600) == 0 and "6 done" in driver.said(), driver.said()
        assert "on_node" in driver.said() and "step 1" in driver.said()  # the output of the runs came back
        assert before.items() <= stamps(folder).items()
    finally:
        cluster.shutdown()
    return result(folder)


def test_six_runs_here_and_on_two_nodes(home, monkeypatch, put_namesakes):
    "Both executors end alike, although processes and machines die and the current folder holds files of bad names."
    pytest.importorskip("ray")
    put_namesakes(home)
    here = on_this_machine(home)
    assert len(here) == 6 and all(len(steps) == 2 for _, steps in here.values())
    assert len({json.dumps(log) for log, _ in here.values()}) > 3  # they are different runs
    (home / "cluster").mkdir()
    put_namesakes(home / "cluster")
    monkeypatch.setenv("MBS_HOME", str(home / "cluster"))
    monkeypatch.chdir(home / "cluster")
    assert on_two_nodes(home / "cluster") == here


def test_two_batches_over_one_folder_train_each_run_once(home):
    "Whoever waits says for whom; and a report reads whole runs while they are written."
    grid, folder = write_batch(home, grid=dict(method=["finetune", "kd"])), home / "outputs/toy"
    drivers = [Driver("batch", grid) for _ in range(2)]
    read = []
    deadline = time.monotonic() + 300
    while any(driver.poll() is None for driver in drivers):
        assert time.monotonic() < deadline, [driver.said() for driver in drivers]
        if list(folder.glob("*/run.json")):
            runs, left_out = find_runs([folder])
            assert left_out == {}
            read.append([run.n_steps for run in runs])
        time.sleep(0.05)
    assert [driver.returncode for driver in drivers] == [0, 0], [driver.said() for driver in drivers]
    assert len(read) > 3 and read[-1] == [2, 2]
    for run in runs_in(folder):
        lines = [(record["step"], record["iteration"]) for record in run.log()]
        assert len(set(lines)) == len(lines), f"{run.folder.name} was trained twice"
    assert [sum("base_from" in run.metrics(0) for run in runs_in(folder))] == [1]
    said = "".join(driver.said() for driver in drivers)
    assert re.search(r"waiting for process \d+ on \S+, which works on the run (finetune|kd)", said), said


def test_an_interrupt_ends_all(home):
    "Ctrl-C: exit code 75; no process is left, also of a run with several; a finished step is kept."
    grid = write_batch(
        home,
        grid=dict(method=["finetune"]),
        parameters=TINY | dict(processes=2, training=TINY["training"] | dict(new_iterations=100_000)),
    )
    driver = Driver("batch", grid)
    run = driver.until(
        lambda: next((r for r in runs_in(home / "outputs/toy") if r.n_steps == 1 and len(r.log()) > 5), None)
    )
    others = psutil.Process(driver.pid).children(recursive=True)
    assert len(others) >= 5  # the run, its kernel, the launcher and two that train
    driver.send_signal(signal.SIGINT)
    assert driver.wait(60) == 75 and "rerun the command to resume" in driver.said()
    assert not psutil.wait_procs(others, 15)[1] and load_run(run.folder).n_steps == 1


def test_a_plan_costs_nothing(home):
    "Names, base steps and iterations are known before anything is written; equal work is timed once."
    batch = Batch(write_batch(home))
    plan = batch.plan()
    assert [row[0] for row in plan.rows[:3]] == [
        "finetune-overlapped-s0",
        "finetune-overlapped-s1",
        "finetune-disjoint-s0",
    ]
    assert [row[3] for row in plan.rows] == ["to train"] * 4 + [
        "from finetune-overlapped-s0",
        "from finetune-overlapped-s1",
        "from finetune-disjoint-s0",
        "from finetune-disjoint-s1",
    ] * 2
    assert (
        [row[4] for row in plan.rows] == ["60"] * 4 + ["30"] * 8
        and "12 new; 4 base steps to train; 480 iterations" in plan.note
        and "timed here" in plan.note
    )
    assert not (home / "outputs").exists()
    alone = Batch(write_batch(home, parameters=TINY | dict(share_base=False)))
    assert {row[3] for row in alone.plan(measure=False).rows} == {"to train"}


def test_names():
    "Names are readable, tell what differs, and stay the same when the batch grows."

    def names(**grid):
        return [s.name.removeprefix("x/") for s in expand_grid(read_grid(dict(name="x") | grid))]

    small = names(
        runs=[
            dict(method="kd"),
            {"method": "mbs", "parts": {"threshold": 0.8}},
            dict(name="full", method="mbs", parts={}),
        ],
        grid={"training.lr": ["1e-3"]},
    )
    large = names(
        runs=[
            dict(method="kd"),
            {"method": "mbs", "parts": {"threshold": 0.8}},
            dict(name="full", method="mbs", parts={}),
            dict(method="plop"),
        ],
        grid={"training.lr": ["1e-3", 1e-2]},
    )
    assert (
        small == ["kd-lr=0.001", "mbs-threshold=0.8-lr=0.001", "full-lr=0.001"]
        and set(small) < set(large)
        and len(large) == 8
    )
    assert names(grid=dict(base=["demo", "voc-15-1-overlapped"])) == ["demo", "voc-15-1-overlapped"]
    for file in sorted((find_runs_folder() / "grids").glob("*.yaml")):
        assert len(expand_grid(read_grid(file.stem))) == len({s.name for s in expand_grid(read_grid(file.stem))}) > 9


@pytest.mark.parametrize(
    "grid,words",
    [
        (dict(grid=dict(metod=["kd"])), "parameter 'metod' is not known"),
        (dict(grid=dict(method=[])), "grid of 'method' is empty"),
        (dict(grid={}), "the batch has no runs"),
        (dict(gird=dict(seed=[0])), "parameter 'gird' is not known: expected one of"),
        (dict(grid=dict(seed=0)), "'grid.seed' cannot be 0"),
        (dict(runs=[dict(seed=1), dict(seed=1)]), "have the name 's1'"),
        (dict(runs=[dict(seed=1)], grid=dict(seed=[1])), "is in runs and in grid"),
        (dict(base="nosuch", grid=dict(seed=[1])), "parameter file nosuch does not exist"),
        (dict(grid={"protocol.x": [1]}, parameters=dict(protocol="5-1")), "'protocol' is a single value"),
        (dict(grid=dict(protocol=["5-1", "9-1"]), parameters=TINY | dict(protocol="5-1")), "protocol"),
        (dict(notebook="nosuch.ipynb", grid=dict(seed=[1])), "nosuch.ipynb does not exist"),
        (dict(name="../x", grid=dict(seed=[1])), "'name' cannot be"),
    ],
)
def test_an_invalid_batch_is_refused_before_anything_runs(home, grid, words):
    with pytest.raises(ValueError, match="(?s)" + words.replace("(", r"\(").replace("?", r"\?")):
        Batch(dict(name="x") | grid)
    assert not (home / "outputs").exists()


def test_a_changed_batch_is_refused(home):
    "A batch does not start if one of its folders holds another run."
    from mbs.experiment import Experiment

    first = Batch(dict(name="x", parameters=TINY, grid=dict(seed=[0])))
    Experiment(first.jobs[0].settings).run()
    assert Batch(dict(name="x", parameters=TINY, grid=dict(seed=[0, 1]))).plan(measure=False).rows[0][1] == "done"
    with pytest.raises(ValueError, match=r"settings\.samples: 1 there, 2 now"):
        Batch(dict(name="x", parameters=TINY | dict(samples=2), grid=dict(seed=[0])))


def test_without_ray(monkeypatch):
    from mbs.executors import OnRay

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'mbs\[cluster\]'"):
        OnRay()


def test_a_notebook_that_does_not_train(home):
    "A notebook that ends without error before its run is finished has failed, and so have the runs that wait for it."
    path = write_batch(home, grid=dict(method=["finetune", "kd"]))
    book = nbformat.read(home / "plain.ipynb", 4)
    book.cells = book.cells[:1]
    nbformat.write(book, home / "plain.ipynb")
    with pytest.raises(RunFailed, match=r"(?s)2 of 2 runs failed.*before the run was finished"):
        Batch(path).run(show=lambda table: None, every=0.2)


def test_the_table_in_a_notebook_and_in_a_terminal(monkeypatch, capsys):
    "A notebook gets a widget that changes in place, a terminal a table; the name of a run is never markup."
    import IPython.display
    from rich.console import Console

    from mbs import live
    from mbs.tables import Table

    table = Table("toy: 1 running", ("run", "state", "loss"), [("[red]<b>-s0", "running", "0.1")])
    shown = []
    monkeypatch.setattr(live, "_is_in_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    with live.show_live() as show:
        for k in range(2):
            show(table._replace(title=f"{k}"))
    assert len(shown) == 1 and "<h3>1</h3>" in shown[0].value and "&lt;b&gt;-s0" in shown[0].value
    monkeypatch.setattr(live, "_is_in_notebook", lambda: False)
    Console(force_terminal=True, width=80).print(live.render_console_table(table))
    assert "[red]<b>-s0" in capsys.readouterr().out


def test_curves(home):
    "Event files have TensorBoard's format, and are rewritten where a run has begun a step again."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mbs.curves import CurveWriter
    from mbs.experiment import Experiment

    run = Experiment(Batch(dict(name="x", parameters=TINY, grid=dict(seed=[0]))).jobs[0].settings).run()
    curves = CurveWriter([home / "outputs"], home / "events")

    def losses():
        return [(e.step, e.value) for e in EventAccumulator(str(home / "events/x/s0")).Reload().Scalars("loss/loss")]

    assert (
        losses() == [(30 * r["step"] + r["iteration"], pytest.approx(r["loss"], rel=1e-6)) for r in run.log()]
        and curves.update() == 0
    )
    (run.folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in run.log()[:2]))
    curves.update()
    assert [at for at, _ in losses()] == [10, 20]
    with pytest.raises(ValueError, match="there is no run in"):
        CurveWriter([home / "events"], home / "more")
