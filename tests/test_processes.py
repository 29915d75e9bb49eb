"One run on several processes: the same numbers as one process, a clean end when one of them dies, and a resume."

import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from mbs import Experiment, Settings, load_run
from mbs.launch import launch

NETWORK = dict(
    encoder="vit_tiny_patch16_224",
    encoder_options=dict(patch_size=8, embed_dim=32, depth=1, num_heads=2),
    decoder=dict(depth=1, drop_path=0.0),
)
QUIET = dict(
    crop=48, batch=8, iterations=20, optimizer="adamw", lr=1e-3, scale=(1, 1), flip=False
)  # augmentation off: short sides are 48
SMALL = dict(
    scenes=dict(n_train=40, n_test=13, size=48), protocol="5-1", samples=1, share_base=False, workers=0, **NETWORK
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))


@pytest.mark.parametrize("method", ["mbs", "plop", "select", "mbs-analytic"])
def test_two_processes_of_four_are_one_of_eight(tmp_path, method, monkeypatch):
    "Losses and model are the same up to rounding; the confusion matrix of the same weights is the same exactly."
    monkeypatch.setattr("mbs.training.LOG_EVERY", 1)
    parts = dict(identity_width=32) if method == "mbs-analytic" else {}
    settings = Settings(name="one", method=method, parts=parts, training=QUIET, **SMALL)
    one = Experiment(settings, tmp_path).run()
    worker = tmp_path / "worker.py"  # logs each iteration, and also evaluates the weights of the first run
    worker.write_text(
        textwrap.dedent(f"""
        import sys
        import mbs.experiment, mbs.processes, mbs.training
        import numpy as np
        from mbs import load_run
        from mbs.identity import split_predictor
        from mbs.launch import train_in_process
        mbs.training.LOG_EVERY = 1
        inner = mbs.experiment._evaluate_state
        one = load_run({str(tmp_path / "one")!r})
        def evaluate_both(setup, student, step, state, test):
            own = inner(setup, student, step, state, test)
            model = one.model(step.number)
            state = split_predictor(model)[0].state_dict()
            counts = inner(setup, model, step, state, test)[0].counts
            rank = mbs.processes.get_processes().process_index
            np.save({str(tmp_path)!r} + f"/counts-{{step.number}}-{{rank}}.npy", counts)
            return own
        mbs.experiment._evaluate_state = evaluate_both
        if __name__ == "__main__": train_in_process(*sys.argv[1:3])
        """)
    )
    two = launch(settings.model_copy(update=dict(name="two", processes=2)), tmp_path, [str(worker)])
    assert two.finished and len(one.log()) == len(two.log()) == 80
    later = launch(
        settings.model_copy(update=dict(name="later", processes=2, share_base=True)), tmp_path, [str(worker)]
    )  # takes the base step of the first run: both begin step 1 with the same weights
    assert later.metrics(0)["base_from"] == "one"
    for a, b, c in zip(one.log(), two.log(), later.log()):
        if a["step"] == 0:
            assert b == pytest.approx(a, rel=0, abs=1e-4)
        if a["step"] == 1:
            assert c == pytest.approx(a, rel=0, abs=1e-4)
        assert b == pytest.approx(a, rel=2e-2, abs=5e-3)  # rounding grows with every update that follows
    for step in range(one.n_steps):
        for rank in range(2):
            assert (np.load(tmp_path / f"counts-{step}-{rank}.npy") == one.confusion(step).counts).all()
    if parts:  # from the same network each process sums its own pictures, and all hold the total
        mine, theirs = later.identity(0), one.identity(0)
        for name, sums in mine.sums._asdict().items():
            torch.testing.assert_close(sums, getattr(theirs.sums, name), rtol=1e-6, atol=1e-9)
        assert (mine.ridge, mine.sharpness) == (theirs.ridge, theirs.sharpness)
        assert (later.confusion(0).counts == one.confusion(0).counts).all()


DYING = """
import sys
from mbs.launch import train_in_process
from mbs.methods import Method
from mbs.processes import get_processes
class Dying(Method):
    seen = 0
    def loss(self, student, teacher, target, step):
        Dying.seen += 1
        if Dying.seen == 30 and get_processes().process_index == 1:
            raise RuntimeError("the second GPU fell off the bus")
        return super().loss(student, teacher, target, step)
if __name__ == "__main__": train_in_process(*sys.argv[1:3], Dying)
"""


def test_one_process_dies(tmp_path, capsys):
    "All end within 30 s with the traceback of the one that died; the same call resumes at the unfinished step."
    (tmp_path / "dying.py").write_text(DYING)
    settings = Settings(name="run", method="finetune", processes=2, training=QUIET, **SMALL)
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match="process 1 stopped with RuntimeError: the second GPU fell off the bus"):
        launch(settings, tmp_path, [str(tmp_path / "dying.py")])
    printed = capsys.readouterr().out
    assert "Traceback" in printed and "in loss" in printed
    run = load_run(tmp_path / "run")
    assert run.n_steps == 1 and time.monotonic() - began < 30 + 30  # start and first step included
    died = max(path.stat().st_mtime for path in tmp_path.rglob("log.jsonl"))
    assert time.time() - died < 30
    weights = (tmp_path / "run" / "step-00" / "model.safetensors").stat().st_mtime_ns
    run = launch(settings, tmp_path)
    assert run.finished and (tmp_path / "run" / "step-00" / "model.safetensors").stat().st_mtime_ns == weights
    assert [(r["step"], r["iteration"]) for r in run.log()] == [(t, i) for t in range(4) for i in (10, 20)]


def test_an_interrupt_ends_all(tmp_path):
    "Ctrl-C in the launching program leaves no process behind."
    parent = tmp_path / "parent.py"
    parent.write_text(f"""import signal
from mbs import Settings
from mbs.launch import launch
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore SIGINT in background processes
launch(Settings(name='run', processes=2, training={QUIET | dict(iterations=5000)}, **{SMALL}), {str(tmp_path)!r})""")
    program = subprocess.Popen(
        [sys.executable, str(parent)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def list_others():
        return subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split()

    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "log.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(list_others()) == 4  # the child, the launcher, two workers
    program.send_signal(signal.SIGINT)
    assert "Interrupted: asked to stop" in program.communicate(timeout=30)[0]
    assert list_others() == []


def test_unequal_shares_are_refused(tmp_path, capsys):
    with pytest.raises(ChildProcessError, match="a batch of 8 pictures cannot be shared by 3 processes"):
        launch(Settings(name="three", processes=3, training=QUIET, **SMALL), tmp_path)
    network = dict(encoder="tf_efficientnet_lite0", encoder_options={}, decoder=dict(depth=1, dim=32, heads=2))
    with pytest.raises(ChildProcessError, match="batch normalisation needs the whole batch"):
        launch(Settings(name="norm", processes=2, training=QUIET, **SMALL | network), tmp_path)
