"""Long use leaks nothing: memory over thousands of iterations, files, threads and workers over hundreds of steps,
widgets and arrays over a hundred explorers.

Each test runs in a separate process on one thread. MBS_LONG multiplies the iterations, resumed steps and explorers."""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest
from figures import kept

LONG = int(os.environ.get("MBS_LONG", 1))
NETWORK = dict(encoder_options=dict(patch_size=8, embed_dim=32, depth=1, num_heads=2), decoder=dict(depth=1), samples=1)


def make_environment(folder):
    "Make an environment with one thread, `folder` as home, and a front end that shows widgets."
    return os.environ | dict(MBS_HOME=str(folder), OMP_NUM_THREADS="1", JPY_SESSION_NAME="a.ipynb")


def run_alone(what, folder):
    "Call the function `what` of this file in a fresh process with `folder` as its home, and return its result."
    done = subprocess.run(
        [sys.executable, __file__, what],
        capture_output=True,
        text=True,
        cwd=folder,
        env=make_environment(folder),
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory():
    "Return the resident memory of this process, MiB."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def count_objects(kind=object):
    "Count the living objects of a kind, after a garbage collection."
    gc.collect()
    return sum(issubclass(type(o), kind) for o in gc.get_objects())


def count_handles():
    "Count open files, threads and child processes."
    import psutil

    return dict(
        files=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        python_threads=threading.active_count(),
        children=len(psutil.Process().children(recursive=True)),
    )


def run_iterations():
    """Run five steps with every feature on: checkpoints every ten iterations, two validators, both columns, a log.

    Return the memory every 20 iterations, and the living objects after each step."""
    import torch

    import mbs.evaluation
    import mbs.experiment
    from mbs.methods import Method
    from mbs.settings import Settings

    used, after, evaluations = [], [], []
    inner = mbs.evaluation.evaluate

    class Watched(Method):
        def loss(self, *words):
            Watched.seen += 1
            if Watched.seen % 20 == 0:
                used.append(measure_memory())
            return super().loss(*words)

    def counted(*words, **more):
        evaluations.append(1)
        return inner(*words, **more)

    Watched.seen = 0
    mbs.evaluation.evaluate = mbs.experiment.evaluate = counted
    training = dict(crop=32, batch=4, iterations=400 * LONG, optimizer="adamw", both=True, selection="held-out")
    settings = Settings(
        name="long",
        protocol="4-1",
        save_minutes=0,
        workers=0,
        scenes=dict(n_train=24, n_test=6, size=32),
        training=training,
        **NETWORK,
    )
    for _ in mbs.experiment.Experiment(settings, method=Watched).steps():
        after.append(dict(tensors=count_objects(torch.Tensor), objects=count_objects()))
    return dict(used=used, after=after, iterations=Watched.seen, evaluations=len(evaluations))


def test_memory_is_flat(tmp_path):
    "Memory stays flat over 2,000 iterations and 50 evaluations; objects grow by the tensors of one class a step."
    found = run_alone("run_iterations", tmp_path)
    assert found["iterations"] >= 2000 * LONG and found["evaluations"] >= 50
    # the first two steps warm up
    early, late = (statistics.median(found["used"][step * 20 * LONG :][: 20 * LONG]) for step in (2, 4))
    assert late - early < 8, f"memory grows from {early:.1f} to {late:.1f} MiB: {found['used'][::20]}"
    first, last = found["after"][1], found["after"][4]
    assert last["tensors"] - first["tensors"] <= 3 * 4 and last["objects"] - first["objects"] < 500, found["after"]
    kept("iterations in one process with flat memory", found["iterations"])
    kept("evaluations in one process with flat memory", found["evaluations"])


def run_steps():
    """Run 200 steps of one class each in one run folder, and resume with dataloader workers for the last part.

    Return the handles after each step, and in the middle of the last one."""
    import numpy as np
    from PIL import Image

    from mbs.experiment import Experiment
    from mbs.layouts import describe_folder
    from mbs.methods import Method
    from mbs.settings import Settings

    many, count, within = Path("many"), 200, []
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (many / folder).mkdir(parents=True)
    for c in range(count + 1):
        is_test = c == 0  # the test picture is a pixel wider, so that it equals no training picture
        image = rng.integers(0, 256, (8, 8 + is_test, 3), dtype=np.uint8)
        mask = np.pad(np.full((4, 4), max(c, 1), np.uint8), [(2, 2), (2, 2 + is_test)])
        Image.fromarray(image).save(many / "images" / f"{c}.png")
        Image.fromarray(mask).save(many / "masks" / f"{c}.png")
    describe_folder(many, [f"class {c}" for c in range(1, count + 1)], test=["0"])

    class Watched(Method):
        def loss(self, *words):
            within[:] = [count_handles()]
            return super().loss(*words)

    training = dict(replace=True, crop=8, batch=2, iterations=2)
    settings = partial(Settings, name="many", data=str(many), protocol="1-1", training=training, **NETWORK)
    after = []
    for workers, end in ((0, count - 20 * LONG), (2, count)):
        for step in Experiment(settings(workers=workers), method=Watched).steps():
            if step == len(after):
                after.append(count_handles())
            if step + 1 == end:
                break
    return dict(after=after, within=within[0])


def test_nothing_stays_open(tmp_path):
    "After 200 steps a run has the files, threads and processes that it had after its tenth."
    found = run_alone("run_steps", tmp_path)
    after = found["after"]
    assert len(after) == 200
    assert found["within"]["children"] == 2, "there were no dataloader workers: the test proves nothing"
    assert [step for step, now in enumerate(after[10:], 10) if now != after[9]] == [], after[9::10]
    kept("steps in one process with no file, thread or loader left", len(after))


def use_explorers():
    """Open, use and close 100 explorers of every kind in the kernel that executes this.

    Return what the kernel holds after the first of each, and at the end."""
    import asyncio
    import weakref

    import matplotlib.pyplot as plt
    from comm import get_comm_manager
    from IPython.display import display
    from ipywidgets.widgets import widget

    from mbs.explore.explorers import (
        explore_class_tokens,
        explore_confusions,
        explore_features,
        explore_pseudo_labels,
    )
    from mbs.run import trained_run

    one, two = trained_run("mbs"), trained_run("mbs")
    makers = [
        partial(explore_pseudo_labels, one, two),
        partial(explore_class_tokens, one, two),
        partial(explore_confusions, one, two),
        *[partial(explore_pseudo_labels, one), partial(explore_features, one)] * 4,
    ]

    def count_timers():
        handles = sum(type(o) is asyncio.TimerHandle and not o.cancelled() for o in gc.get_objects())
        return handles + sum(isinstance(t, threading.Timer) for t in threading.enumerate())

    def measure():
        gc.collect()
        return dict(
            comms=len(get_comm_manager().comms),
            widgets=len(widget._instances),
            timers=count_timers(),
            figures=len(plt.get_fignums()),
            objects=count_objects(),
            **count_handles(),
        )

    refs, count, shown = [], 100 * LONG, 0
    for k in range(len(makers) + count):
        explorer = makers[k % len(makers)]()
        state = explorer.state
        if k % 20 < 2:
            display(explorer)
        shown = max(shown, len(widget._instances) if explorer.view else 0)
        state.step = 1
        if hasattr(state, "moment"):
            state.move(1)
            arrays = [state.moment.photo, state.moment.step_labels, state.moment.teacher.features["encoder"]]
        else:
            arrays = [state.cosine] if hasattr(state, "cosine") else [state.counts, state.corrected]
        refs += map(weakref.ref, [explorer, *explorer.states, *arrays])
        explorer.close()
        del explorer, state, arrays
        if k == len(makers) - 1:
            early = measure()
    late = measure()
    alive = sum(r() is not None for r in refs)
    return dict(early=early, late=late, refs=len(refs), alive=alive, shown=shown, count=count)


def test_closed_explorers_leave_nothing(tmp_path):
    "Closed explorers leave nothing in a real kernel, whose comms are those that a browser would receive."
    from jupyter_client.manager import KernelManager

    printed = []

    def keep_stdout(message):
        if message["content"].get("name") == "stdout":
            printed.append(message["content"]["text"])

    with tempfile.TemporaryDirectory(prefix="mbs-") as sockets:
        manager = KernelManager(transport="ipc", ip=f"{sockets}/kernel")
        manager.start_kernel(cwd=str(tmp_path), env=make_environment(tmp_path))
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(120)
        reply = client.execute_interactive(
            f"import sys, json\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_long_runs\n"
            "print(json.dumps(test_long_runs.use_explorers()))",
            timeout=1800,
            output_hook=keep_stdout,
        )
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert reply["content"]["status"] == "ok", "\n".join(reply["content"].get("traceback", []))
    found = json.loads("".join(printed).splitlines()[-1])
    assert found["shown"] > 20 and found["refs"] > 400, "there was no view: the test proves nothing"
    assert found["alive"] == 0, f"{found['alive']} of {found['refs']} explorers, states and arrays live on"
    early, late = found["early"], found["late"]
    assert late["widgets"] == late["comms"] == late["figures"] == 0, found
    assert [late[k] - early[k] for k in ("files", "threads", "children")] == [0, 0, 0], found
    assert late["timers"] - early["timers"] < 5, found  # the kernel has its own timer
    assert late["objects"] - early["objects"] < 50 * found["count"], found  # matplotlib caches texts
    kept("explorers opened and closed, nothing left", found["count"])


def measure_life(act, count: int) -> dict:
    "Call `act` `count` times after a warm-up; return memory and handles after a third and at the end."
    for _ in range(max(2, count // 10)):
        act()
    used = []
    for k in range(count):
        act()
        if k >= count // 3:
            gc.collect()
            used.append(measure_memory())
        if k == count // 3:
            handles = count_handles()
    third = max(1, len(used) // 3)
    early, late = statistics.median(used[:third]), statistics.median(used[-third:])
    return dict(count=count, early=early, late=late, handles=handles, at_end=count_handles())


def run_predictions():
    "Predict one picture at a time, as programs do, and folders of pictures, as the command does."
    import numpy as np
    from PIL import Image

    from mbs.predict import predict_files
    from mbs.run import trained_run

    run, pictures = trained_run("mbs"), [Path(f"{k}.png") for k in range(20)]
    for k, path in enumerate(pictures):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (32 + k, 40, 3)).astype(np.uint8)).save(path)

    def act():
        for path in pictures[:10]:
            run.predict(path)
        assert list(predict_files(run, pictures[10:], Path("out"))) == []

    life = measure_life(act, 5 if LONG == 1 else 100)
    return life | dict(count=20 * life["count"])


def run_reports():
    "Write reports of three runs, with tables and pictures; of one run in small numbers."
    from mbs.report import write_report
    from mbs.run import trained_run

    runs = [trained_run(name) for name in ("finetune", "kd", "mbs")[: 1 if LONG == 1 else 3]]
    return measure_life(lambda: write_report(runs, Path("report")), 2 if LONG == 1 else 50)


def run_batches():
    "Open and run batches whose runs are finished; the first one trains them here."
    from mbs.batch import Batch
    from mbs.experiment import Experiment

    parameters = dict(
        protocol="7-1",
        share_base=False,
        scenes=dict(n_train=24, n_test=6, size=32),
        training=dict(crop=32, batch=4, iterations=2, optimizer="adamw"),
        **NETWORK,
    )
    grid = dict(name="g", parameters=parameters, grid=dict(seed=[0, 1]))
    for job in Batch(grid).jobs:
        Experiment(job.settings).run()

    def act():
        batch = Batch(grid)
        batch.plan()
        assert len(batch.run(show=lambda table: None, every=0)) == 2

    return measure_life(act, 5 if LONG == 1 else 20)


@pytest.mark.parametrize("what", ["predictions", "reports", "batches"])
def test_a_long_life_grows_nothing(tmp_path, what):
    "Memory, files, threads and processes are those of a third of the way."
    life = run_alone(f"run_{what}", tmp_path)
    assert life["at_end"] == life["handles"], life
    assert life["late"] - life["early"] < (8 if LONG > 1 else 24), life
    kept(f"{what} in one life", life["count"])


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
