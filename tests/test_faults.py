"Full disks, vanished data, dead processes, NaN gradients: each gives one sentence, and the resumed run ends the same."

import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from figures import kept
from safetensors.torch import load_file
from test_interruption import PARAMETERS
from test_stopping import command, parameters

import mbs.checkpoint
import mbs.run_folder
from mbs.augment import TrainTransform
from mbs.comparison import group_runs
from mbs.experiment import Experiment
from mbs.files import read_json
from mbs.methods import Method
from mbs.recipe import make_recipe
from mbs.report_tables import make_score_table
from mbs.run import load_run
from mbs.settings import Settings
from mbs.setup import Setup
from mbs.training import train_step

FAULTS = int(os.environ.get("MBS_FAULTS", 6))
TINY = PARAMETERS | dict(training=PARAMETERS["training"] | dict(iterations=12, both=False))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    torch.set_num_threads(1)
    return tmp_path


def go(outputs, **changes):
    "Run a tiny experiment, resuming it if it exists."
    return Experiment(Settings(**TINY | changes), outputs).run()


def sentence(error):
    "Check that an error is one sentence, and return it."
    text = str(error.value if hasattr(error, "value") else error)
    assert "\n" not in text and "Traceback" not in text and len(text) > 20, text
    return text


def same_end(run, whole):
    "Check that two runs ended with the same log and bit for bit the same models."
    assert run.finished and run.log() == whole.log()
    for t in range(whole.n_steps):
        mine, theirs = (load_file(r.step_path(t, "model.safetensors")) for r in (run, whole))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


class Faults:
    "Count the calls that write to the run folder; call number `at` writes half of its data and raises OSError."

    def __init__(self, monkeypatch, folder, at=None, code=errno.ENOSPC):
        self.n, self.at, self.code, self.folder = 0, at, code, str(folder)
        for owner, name, where in (
            (os, "fsync", None),
            (os, "replace", 1),
            (os, "mkdir", 0),
            (Path, "write_text", 0),
            (np, "savez_compressed", 0),
            (mbs.checkpoint, "save_file", 1),
        ):
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name), where))
        opened = io.open

        def log_open(file, mode="r", *args, **kwargs):
            handle = opened(file, mode, *args, **kwargs)
            return Broken(self, handle) if str(file).endswith("log.jsonl") else handle

        monkeypatch.setattr(mbs.run_folder, "open", log_open, raising=False)

    def due(self):
        self.n += 1
        return self.n == self.at

    def find_target(self, args, where):
        "Return the path among the arguments of a call; `where` is its position, None if the call has none."
        if where is None:
            return ""
        target = args[where]
        return str(target if isinstance(target, (str, Path)) else getattr(target, "name", target))

    def wrapped(self, real, where):
        def call(*args, **kwargs):
            target = self.find_target(args, where)
            if where is not None and self.folder not in target:
                return real(*args, **kwargs)
            if real.__name__ == "mkdir" and Path(target).is_dir():
                return real(*args, **kwargs)  # nothing is written
            if self.due():
                if real.__name__ in ("write_text", "save_file"):
                    Path(target).write_bytes(b"half")
                raise OSError(self.code, os.strerror(self.code), target or None)
            return real(*args, **kwargs)

        call.__name__ = real.__name__
        return call


class Broken:
    "The log, which writes half a line when the fault is due."

    def __init__(self, faults, file):
        self.faults, self.file = faults, file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        if not self.faults.due():
            return self.file.write(text)
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        raise OSError(self.faults.code, os.strerror(self.faults.code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_writing_fails_somewhere(home, code):
    "Any single write of a run fails: the error is one sentence, and the resumed run ends like an undisturbed one."
    whole = go(home / "whole")
    with pytest.MonkeyPatch.context() as patch:
        counted = Faults(patch, home / "count")
        go(home / "count")
    assert counted.n > 60
    drawn = random.Random(code)
    for at in drawn.sample(range(1, counted.n + 1), min(counted.n, max(1, FAULTS // 3))):
        outputs = home / f"fault-{code}-{at}"
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, outputs, at, code)
            with pytest.raises(ValueError, match="cannot be written") as error:
                go(outputs)
        assert os.strerror(code) in sentence(error)
        assert not list(outputs.rglob(".step-*"))  # half a step would keep the disk full
        same_end(go(outputs), whole)
        shutil.rmtree(outputs)
        kept("write faults injected and survived", 1)


def mounted(folder, options):
    "Mount a file system in memory on `folder`, or skip the test."
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting is not permitted here")


def test_a_disk_that_is_really_full_and_then_read_only(home):
    "A run stops with a sentence on a full file system, resumes when there is room, and is refused on a read-only one."
    disk = home / "disk"
    mounted(disk, "size=500k")
    try:
        with pytest.raises(ValueError, match="cannot be written") as error:
            go(disk)
        assert "space" in sentence(error).lower()
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        same_end(go(disk), go(home / "whole"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(ValueError, match=r"cannot be written \(Read-only") as error:
            go(disk, name="other")
        sentence(error)
        assert load_run(disk / "run").finished
        kept("write faults injected and survived", 2)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def said_by(home, *words):
    "Run the command `mbs`; return its exit code and last line."
    process = command(home, *words)
    text = process.communicate(timeout=300)[0]
    assert "Traceback" not in text, text
    return process.returncode, text.strip().splitlines()[-1]


def test_the_command_on_a_full_and_on_a_read_only_disk(home, monkeypatch):
    """A user sees one sentence, with exit code 2 before a run and 1 during it.

    The same command resumes when there is room, even if there was none for the notebook.
    """
    disk = home / "outputs"
    mounted(disk, "size=24k")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = parameters(TINY | dict(samples=0))
    try:
        for size in ("24k", "300k"):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
            code, line = said_by(home, "run", *words)
            assert code and line.startswith("mbs: "), line
            assert "No space left on device" in line and "rerun the command to resume" in line, line
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        assert said_by(home, "run", *words)[0] == 0
        same_end(load_run(disk / "run"), go(home / "whole", samples=0))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code, line = said_by(home, "run", *words, "name=other")
        assert code == 2 and line.startswith("mbs: ") and "cannot be written (Read-only file system)" in line, line
        kept("write faults injected and survived", 3)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_files_may_not_grow(home):
    "The system enforces a limit on the size of files that is too small for the model."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(ValueError, match="cannot be written") as error:
            go(home / "quota")
        sentence(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    same_end(go(home / "quota"), go(home / "whole"))
    kept("write faults injected and survived", 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_vanish_while_training(home, workers):
    "The data disk disappears during a step: the error names the picture, and the run resumes when the disk is back."
    whole = go(home / "whole")
    data = next((home / "data").iterdir())
    experiment = Experiment(Settings(**TINY | dict(workers=workers)), home / "cut")
    seen = []

    def log(record):
        experiment.writer.__class__.log_real(record)
        seen.append(record)
        if len(seen) == 3:
            data.rename(home / "elsewhere")

    experiment.writer.__class__.log_real = staticmethod(experiment.writer.log)
    experiment.writer.log = log
    log.truncate = experiment.writer.__class__.log_real.truncate
    with pytest.raises(ValueError, match=r"(image|mask) \S+ is missing: expected") as error:
        experiment.run()
    sentence(error)
    (home / "elsewhere").rename(data)
    same_end(go(home / "cut"), whole)
    kept("data faults injected and survived", 1)


def children():
    "Return the ids of this process's children."
    return [int(p) for p in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def test_a_loader_process_dies(home):
    "A dataloader worker is killed, as for its memory: the error is a sentence, and the run resumes."
    whole = go(home / "whole")
    experiment = Experiment(Settings(**TINY | dict(workers=2)), home / "killed")
    real = experiment.writer.log

    def log(record):
        real(record)
        if record["step"] == 1:
            os.kill(children()[-1], signal.SIGKILL)
            time.sleep(0.5)

    log.truncate, experiment.writer.log = real.truncate, log
    with pytest.raises(ValueError, match="a dataloader worker died") as error:
        experiment.run()
    sentence(error)
    same_end(go(home / "killed"), whole)
    kept("data faults injected and survived", 1)


def test_loader_processes_do_not_hear_signals(home, monkeypatch):
    "Ctrl-C in a terminal and Slurm signal every process of a job: the workers must live until the run has saved."
    from mbs.lifeline import Interrupted

    experiment = Experiment(Settings(**TINY | dict(workers=2)), home / "asked")
    real = experiment.writer.log

    def log(record):
        real(record)
        if record["step"] == 1:
            for pid in [*children(), os.getpid()]:
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGUSR1)
            time.sleep(0.3)

    log.truncate, experiment.writer.log = real.truncate, log
    with pytest.raises(Interrupted, match="checkpoint saved; rerun the command to resume"):
        experiment.run()
    same_end(go(home / "asked"), go(home / "whole"))


# --- noticing


def step_view(setup, step):
    from mbs.setup import make_train_view

    normalisation = setup.normalisation(setup.model())
    return make_train_view(setup.train, setup.protocol[step], normalisation, setup.recipe, setup.positions[step])


class Spoiled(Method):
    "A method whose gradient, not its loss, is not finite in some iterations."

    bad, n = (), 0

    def loss(self, *args):
        terms = super().loss(*args)
        type(self).n += 1
        if self.n in self.bad:
            terms["loss"] = terms["loss"].clone()
            terms["loss"].register_hook(lambda g: g * float("nan"))
        return terms


def spoiled(home, bad, name="spoiled", **recipe):
    kind = type("Spoiled", (Spoiled,), dict(bad=bad, n=0))
    return Experiment(Settings(**TINY | dict(name=name, training=TINY["training"] | recipe)), home, method=kind)


def test_a_gradient_that_is_not_finite(home):
    "By default the run ends before anything is saved, naming iteration and pictures; 'skip' omits and counts it."
    experiment = spoiled(home, {5})
    with pytest.raises(
        ValueError,
        match=r"the gradient of step 0 is nan in iteration 5 \(pictures train_\d+, .*training.non_finite=skip",
    ) as error:
        experiment.run()
    sentence(error)
    assert not list((experiment.folder / "resume").glob("*")) and not load_run(experiment.folder).log()
    run = spoiled(home, {5, 15}, "skipped", non_finite="skip").run()
    assert [r.get("left_out", 0) for r in run.log()] == [1, 0, 1, 0, 0, 0]
    assert all(np.isfinite(r["loss"]) for r in run.log())
    assert all(torch.isfinite(v).all() for v in load_file(run.step_path(0, "model.safetensors")).values())
    with pytest.raises(ValueError, match="skipped all of its last 10 iterations because the gradient was not finite"):
        spoiled(home, set(range(1, 30)), "never", non_finite="skip").run()


def test_skipping_survives_an_interruption(home):
    "Checkpoints remember skipped iterations, so the resumed log is the same."
    whole = spoiled(home, {3}, "whole", non_finite="skip").run()
    stopped = spoiled(home, {3}, "stopped", non_finite="skip")
    kind, real = type(stopped.setup.method), type(stopped.setup.method).loss

    def loss(self, *args):
        if self.n == 6:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args)

    kind.loss = loss
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = spoiled(home, set(), "stopped", non_finite="skip").run()
    assert resumed.log() == whole.log() and whole.log()[0]["left_out"] == 1
    same_end(resumed, whole)


def test_teacher_and_student_must_fit_the_step(home):
    setup = Experiment(Settings(**TINY)).setup
    student, teacher = setup.model(1), setup.model(1).frozen()
    with pytest.raises(ValueError, match=r"the teacher of step 1 of 4-2 has 7 channels: expected 5"):
        train_step(student, teacher, setup.method, step_view(setup, 1), setup.recipe)
    with pytest.raises(ValueError, match=r"the student of step 1 of 4-2 has 5 channels: expected 7"):
        train_step(setup.model(0), None, setup.method, step_view(setup, 1), setup.recipe)
    with pytest.raises(ValueError, match=r"the teacher of step 0 of 4-2 has 5 channels: expected no teacher"):
        train_step(setup.model(0), setup.model(0), setup.method, step_view(setup, 0), setup.recipe)


def test_a_class_that_no_picture_of_its_step_holds(home):
    "The warning names the step, the class and the number of images."
    with pytest.warns(UserWarning, match=r"step \d sees no pixel of \S+.* in its \d+ training images"):
        Experiment(Settings(**TINY | dict(scenes=dict(n_train=3, n_test=4, size=32), protocol="4-4")))


def test_a_class_that_no_test_picture_shows(home):
    "The warning names the classes, in the step that teaches them, and the report leaves them out of its means."
    with pytest.warns(UserWarning) as caught:
        run = Experiment(Settings(**TINY | dict(scenes=dict(n_train=40, n_test=1, size=32)))).run()
    setup = Setup(run.settings)
    shown = setup.test.index.any(0)
    missing = [name for c, name in enumerate(run.names) if not shown[run.protocol.order[c - 1] if c else 0]]
    assert missing
    for step in run.protocol:
        of_step = [setup.names[c] for c in step.new_channels if setup.names[c] in missing]
        said = [str(w.message) for w in caught if f"which step {step.number} teaches" in str(w.message)]
        assert all(said_once.startswith(f"no test image shows {', '.join(of_step)},") for said_once in said)
        assert bool(said) == bool(of_step)
    assert f"Left out of every mean, because the test part has no pixel of them: {', '.join(missing)}." in (
        make_score_table(group_runs([run])[0]).note
    )


def test_changed_data_under_an_index(home):
    """Content that changes without its size and time is noticed.

    A new fingerprint shows it when the data set is opened; at the latest, reading the picture is an error.
    """
    from PIL import Image

    from mbs.data import SegmentationFolder
    from mbs.scenes import write_scenes

    root = write_scenes(home / "s", 20, 4, size=32)
    before = SegmentationFolder(root)
    mask, ids = before.masks[0], before[0][1]
    Image.fromarray(ids).save(mask, "BMP")  # the size of a BMP does not depend on its content
    before, times = SegmentationFolder(root), mask.stat()
    Image.fromarray(np.where(ids == ids.max(), 0, ids)).save(mask, "BMP")
    os.utime(mask, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert mask.stat().st_size == times.st_size and SegmentationFolder(root).fingerprint != before.fingerprint
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(before.masks[3])
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(before.images[3])
    with pytest.raises(ValueError, match="has changed since the data set was opened: expected 32×32"):
        before[3]


def test_what_is_not_measured_alike_is_said(home):
    "A report of runs that were tested in different ways, or on different data, warns with the values."
    from mbs.report import write_report

    a, b = (
        go(home / "o", name="a", samples=0),
        go(home / "o", name="b", seed=1, samples=0, training=TINY["training"] | dict(test="window")),
    )
    with pytest.warns(
        UserWarning, match=r"not all runs of this table are measured in the same way.*test is whole in a, window in b"
    ):
        write_report([a, b], home / "report")
    assert "CAUTION: not all runs" in (home / "report/report.html").read_text()
    c = go(home / "o", name="c", samples=0, scenes=TINY["scenes"] | dict(n_test=12))
    settings = a.card.settings.model_dump(mode="json") | dict(name="c")
    (home / "o/c/run.json").write_text(json.dumps(read_json(home / "o/c/run.json") | dict(settings=settings)))
    with pytest.warns(UserWarning, match=r"use different data \(.*n_test 10 and 12"):
        write_report([a, load_run(c.folder)], home / "report")


def test_same_seed_same_weights(home):
    "On one machine, earlier computation in the process does not matter."
    one = go(home / "one")
    torch.rand(7)
    np.random.rand(3)  # noqa: NPY002 - the global state is meant
    random.random()
    two = go(home / "two")
    same_end(two, one)
    other = go(home / "three", seed=1)
    weights = [load_file(run.step_path(0, "model.safetensors"))["decoder.proj_patch"] for run in (one, other)]
    assert not torch.equal(*weights)


def test_deterministic_is_a_choice():
    "The flags are set and reset; their effect on a GPU is tested on machines with one."
    from mbs.setup import make_accelerator

    make_accelerator(make_recipe("clean", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    make_accelerator(make_recipe("clean"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_runs_from_before_a_choice_existed_go_on(home):
    "A parameter that an older run card lacks counts as its default when the run is resumed."
    run = go(home / "o")
    card = read_json(run.folder / "run.json")
    del card["recipe"]["non_finite"], card["recipe"]["deterministic"]
    (run.folder / "run.json").write_text(json.dumps(card))
    assert go(home / "o").finished
    with pytest.raises(ValueError, match=r"recipe\.non_finite: 'stop' there, 'skip' now"):
        go(home / "o", training=TINY["training"] | dict(non_finite="skip"))
    assert TrainTransform
