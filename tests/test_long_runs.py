"""What long use leaves behind: nothing. Memory over thousands of iterations, files, threads and loader processes over hundreds of steps, widgets and arrays over a hundred explorers.

Each in a process of its own, on one thread. MBS_LONG multiplies how long they go on."""

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

from figures import kept

LONG = int(os.environ.get("MBS_LONG", 1))
NETWORK = dict(encoder_options=dict(patch_size=8, embed_dim=32, depth=1, num_heads=2), decoder=dict(depth=1), samples=1)


def environment(folder):
    "One thread, `folder` as home, and a front end that shows widgets."
    return os.environ | dict(MBS_HOME=str(folder), OMP_NUM_THREADS="1", JPY_SESSION_NAME="a.ipynb")


def alone(what, folder):
    "What the function `what` of this file finds, in a fresh process with `folder` as its home."
    done = subprocess.run(
        [sys.executable, __file__, what],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(folder),
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def memory():
    "Of this process, MiB."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def objects(kind=object):
    "How many are alive, after a collection of garbage."
    gc.collect()
    return sum(issubclass(type(o), kind) for o in gc.get_objects())


def handles():
    "Open files, threads and child processes."
    import psutil

    return dict(
        files=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        python_threads=threading.active_count(),
        children=len(psutil.Process().children(recursive=True)),
    )


def iterations():
    "A run of five steps with everything on that a run can have: states saved every ten iterations, two judges, both columns, a log. Memory every 20 iterations, what is alive after each step."
    import torch

    import mbs.evaluation
    import mbs.experiment
    from mbs.methods import Method
    from mbs.run import Settings

    used, after, evaluations = [], [], []
    inner = mbs.evaluation.evaluate

    class Watched(Method):
        def loss(self, *words):
            Watched.seen += 1
            if Watched.seen % 20 == 0:
                used.append(memory())
            return super().loss(*words)

    def counted(*words, **more):
        evaluations.append(1)
        return inner(*words, **more)

    Watched.seen, mbs.evaluation.evaluate, mbs.experiment.evaluate = 0, counted, counted
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
        after.append(dict(tensors=objects(torch.Tensor), objects=objects()))
    return dict(used=used, after=after, iterations=Watched.seen, evaluations=len(evaluations))


def test_memory_is_flat(tmp_path):
    "Over 2,000 iterations and 50 evaluations; what is alive after a step grows by the tensors of one class."
    found = alone("iterations", tmp_path)
    assert found["iterations"] >= 2000 * LONG and found["evaluations"] >= 50
    early, late = (
        statistics.median(found["used"][step * 20 * LONG : (step + 1) * 20 * LONG]) for step in (2, 4)
    )  # the first two steps warm up
    assert late - early < 8, f"memory grows from {early:.1f} to {late:.1f} MiB: {found['used'][::20]}"
    first, last = found["after"][1], found["after"][4]
    assert last["tensors"] - first["tensors"] <= 3 * 4 and last["objects"] - first["objects"] < 500, found["after"]
    kept("iterations in one process with flat memory", found["iterations"])
    kept("evaluations in one process with flat memory", found["evaluations"])


def steps():
    "200 steps of one class each: a run folder as a user has it, taken up again with loader processes for the last part. Handles after each step, and in the middle of the last."
    import numpy as np
    from PIL import Image

    from mbs.experiment import Experiment
    from mbs.layouts import describe_folder
    from mbs.methods import Method
    from mbs.run import Settings

    many, rng, count, within = Path("many"), np.random.default_rng(0), 200, []
    for folder in ("images", "masks"):
        (many / folder).mkdir(parents=True)
    for c in range(count + 1):
        Image.fromarray(rng.integers(0, 256, (8, 8 + (c == 0), 3), dtype=np.uint8)).save(many / "images" / f"{c}.png")
        Image.fromarray(np.pad(np.full((4, 4), max(c, 1), np.uint8), [(2, 2), (2, 2 + (c == 0))])).save(
            many / "masks" / f"{c}.png"
        )
    describe_folder(many, [f"class {c}" for c in range(1, count + 1)], test=["0"])

    class Watched(Method):
        def loss(self, *words):
            within[:] = [handles()]
            return super().loss(*words)

    settings = partial(
        Settings, name="many", data=str(many), protocol="1-1", training=dict(crop=8, batch=2, iterations=2), **NETWORK
    )
    after = []
    for workers, end in ((0, count - 20 * LONG), (2, count)):
        for step in Experiment(settings(workers=workers), method=Watched).steps():
            if step == len(after):
                after.append(handles())
            if step + 1 == end:
                break
    return dict(after=after, within=within[0])


def test_nothing_stays_open(tmp_path):
    "After 200 steps the files, threads and processes of a run are those of its tenth."
    found = alone("steps", tmp_path)
    assert len(found["after"]) == 200 and found["within"]["children"] == 2, (
        "there were no loader processes: the test says nothing"
    )
    assert [step for step, now in enumerate(found["after"][10:], 10) if now != found["after"][9]] == [], found["after"][
        9::10
    ]
    kept("steps in one process with no file, thread or loader left", len(found["after"]))


def explorers():
    "100 explorers of every kind, seen, used and closed, in the kernel that this is executed in. What the kernel holds after the first ten, and at the end."
    import asyncio
    import weakref

    import matplotlib.pyplot as plt
    from comm import get_comm_manager
    from IPython.display import display
    from ipywidgets.widgets import widget

    from mbs.explore import explore_class_tokens, explore_features, explore_pseudo_labels
    from mbs.run import trained_run

    one, two = trained_run("mbs"), trained_run("mbs")
    makers = [
        partial(explore_pseudo_labels, one, two),
        partial(explore_class_tokens, one, two),
        *[partial(explore_pseudo_labels, one), partial(explore_features, one)] * 4,
    ]

    def timers():
        return sum(type(o) is asyncio.TimerHandle and not o.cancelled() for o in gc.get_objects()) + sum(
            isinstance(t, threading.Timer) for t in threading.enumerate()
        )

    def left():
        gc.collect()
        return dict(
            comms=len(get_comm_manager().comms),
            widgets=len(widget._instances),
            timers=timers(),
            figures=len(plt.get_fignums()),
            objects=objects(),
            **handles(),
        )

    refs, count, shown = [], 100 * LONG, 0
    for k in range(10 + count):
        explorer = makers[k % 10]()
        state = explorer.state
        if k % 20 < 2:
            display(explorer)
        shown = max(shown, len(widget._instances) if explorer.view else 0)
        state.step = 1
        if hasattr(state, "moment"):
            state.move(1)
        refs += map(
            weakref.ref,
            [
                explorer,
                *explorer.states,
                *(
                    [state.moment.photo, state.moment.view, state.moment.teacher.features["encoder"]]
                    if hasattr(state, "moment")
                    else [state.cosine]
                ),
            ],
        )
        explorer.close()
        del explorer, state
        if k == 9:
            early = left()
    late = left()
    return dict(
        early=early, late=late, refs=len(refs), alive=sum(r() is not None for r in refs), shown=shown, count=count
    )


def test_closed_explorers_leave_nothing(tmp_path):
    "In a real kernel, whose comms are those that a browser would be told of."
    from jupyter_client.manager import KernelManager

    printed = []
    with tempfile.TemporaryDirectory(prefix="mbs-") as sockets:
        manager = KernelManager(transport="ipc", ip=f"{sockets}/kernel")
        manager.start_kernel(cwd=str(tmp_path), env=environment(tmp_path))
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(120)
        reply = client.execute_interactive(
            f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_long_runs; print(json.dumps(test_long_runs.explorers()))",
            timeout=1800,
            output_hook=lambda message: (
                printed.append(message["content"]["text"]) if message["content"].get("name") == "stdout" else None
            ),
        )
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert reply["content"]["status"] == "ok", "\n".join(reply["content"].get("traceback", []))
    found = json.loads("".join(printed).splitlines()[-1])
    assert found["shown"] > 20 and found["refs"] > 400, "there was no view: the test says nothing"
    assert found["alive"] == 0, f"{found['alive']} of {found['refs']} explorers, states and arrays live on"
    early, late = found["early"], found["late"]
    assert late["widgets"] == late["comms"] == late["figures"] == 0 and {
        k: late[k] - early[k] for k in ("files", "threads", "children")
    } == dict(files=0, threads=0, children=0), found
    assert late["timers"] - early["timers"] < 5 and late["objects"] - early["objects"] < 50 * found["count"], (
        found
    )  # the kernel has a timer of its own, matplotlib caches of texts
    kept("explorers opened and closed, nothing left", found["count"])


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
