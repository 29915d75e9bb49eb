"Nothing is written or deleted through a symbolic link, and only names that mbs gives are deleted."

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mbs.archives import Archive, obtain_archive
from mbs.checkpoint import StepCheckpoints, save_tensors
from mbs.curves import CurveWriter
from mbs.experiment import Experiment
from mbs.files import open_own, refuse_links, remove_link, replace_folder_atomically, write_json
from mbs.locks import lock_folder
from mbs.notebooks import lock_worker
from mbs.predict import predict_files
from mbs.run import load_run, trained_run
from mbs.run_folder import RunLog
from mbs.settings import Settings

TINY = dict(
    name="run",
    protocol="6-2",
    samples=1,
    scenes=dict(n_train=24, n_test=4, size=32),
    encoder_options=dict(patch_size=8, embed_dim=32, depth=1, num_heads=2),
    training=dict(crop=32, batch=4, iterations=1, optimizer="adamw"),
)


def read_surroundings(folder: Path) -> dict[str, bytes]:
    "Return every file below `folder` with its content."
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def victim(tmp_path):
    "A folder of somebody's files, which must stay as it is."
    folder = tmp_path / "victim"
    folder.mkdir()
    for name in ("notes", "step-00-00000009.safetensors", "model.safetensors", ".notes.12", ".tmpabcdef"):
        (folder / name).write_text(f"precious {name}")
    before = read_surroundings(folder)
    yield folder
    assert read_surroundings(folder) == before


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "outputs" / "run"
    shutil.copytree(trained_run("mbs").folder, folder)
    return folder


LINKS = [".lock", ".worker", "run.json", "log.jsonl", "train.ipynb", "samples.npz", "resume", "step-01", ".step-07"]


@pytest.mark.parametrize("name", [*LINKS, "step-00/model.safetensors", "step-07"])
@pytest.mark.parametrize("target", ["notes", "", "new"])
def test_a_run_folder_with_links_is_not_written(victim, run_folder, name, target):
    "A link to a file, to a folder, and to nothing; whoever writes a run refuses it."
    path = run_folder / name
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    path.symlink_to(victim / target)
    for attempt in (
        lambda: lock_folder(run_folder).__enter__(),
        lambda: lock_worker(run_folder).__enter__(),
        lambda: refuse_links(run_folder),
    ):
        with pytest.raises(ValueError, match=f"{name} is a symbolic link: expected a file or folder of the run"):
            attempt()
    assert path.is_symlink()


@pytest.mark.parametrize("linked", ["run", "batch"])
def test_a_run_or_a_batch_that_is_a_link_is_not_written(victim, tmp_path, monkeypatch, linked):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / linked).symlink_to(victim)
    name = "run" if linked == "run" else "batch/run"
    with pytest.raises(ValueError, match=f"outputs/{linked} is a symbolic link"):
        Experiment(Settings(**TINY | dict(name=name)))


def test_outputs_may_be_a_link_to_a_larger_disk(tmp_path, monkeypatch):
    "Links above the folders of runs and data sets are the user's."
    home = tmp_path / "home"
    home.mkdir()
    for name in ("outputs", "data"):
        (tmp_path / "disk" / name).mkdir(parents=True)
        (home / name).symlink_to(tmp_path / "disk" / name)
    monkeypatch.setenv("MBS_HOME", str(home))
    assert Experiment(Settings(**TINY)).run().finished
    assert load_run(tmp_path / "disk" / "outputs" / "run").finished


def test_saved_states_leave_foreign_files_alone(victim, tmp_path):
    "Saving replaces the states of mbs, nothing else; a folder of states that is a link is not used."
    states = StepCheckpoints(tmp_path / "run" / "resume", 0)
    states.folder.mkdir(parents=True)
    foreign = ("mine.safetensors", "step-00-best.safetensors", "step-00-00000001.safetensors.old", "notes")
    for name in foreign:
        (states.folder / name).write_text(name)
    linked = states.folder / "step-00-00000003.safetensors"
    linked.symlink_to(victim / "model.safetensors")
    with pytest.raises(ValueError, match="symbolic link"):
        states.save(4, dict(a=torch.ones(1)), {})
    states.clear()
    assert linked.is_symlink() and states.load_latest() is None
    linked.unlink()
    for iteration in (4, 5):
        states.save(iteration, dict(a=torch.ones(1)), {})
    assert {p.name for p in states.folder.iterdir()} == {*foreign, "step-00-00000005.safetensors"}
    states.clear()
    assert {p.name for p in states.folder.iterdir()} == set(foreign)
    shutil.rmtree(states.folder)
    states.folder.symlink_to(victim)
    states.clear()
    assert states.load_latest() is None
    with pytest.raises(ValueError, match="symbolic link"):
        states.save(6, dict(a=torch.ones(1)), {})


def test_only_half_written_files_of_mbs_are_removed(tmp_path):
    "A lock clears the folder of a run, but neither notes of a user nor the runs of a batch of the same name."
    inner = tmp_path / "s0"
    for folder in (tmp_path / "step-00", tmp_path / "resume", inner / "step-00", tmp_path / "notes"):
        folder.mkdir(parents=True)
    of_notes = [".hidden.txt", ".notes", ".tmp", ".a.2026", "notes/.a.0123abcd"]
    of_another_run = ["s0/.run.json.0123abcd", "s0/step-00/.model.safetensors.0123abcd"]
    kept = of_notes + of_another_run
    removed = [".run.json.0123abcd", "step-00/.samples.npz.0123abcd", "resume/.tmpA1b2C3", "resume/.a.4.0123abcd"]
    for name in kept + removed:
        (tmp_path / name).write_text("")
    with lock_folder(tmp_path):
        assert [name for name in kept + removed if (tmp_path / name).exists()] == kept


def test_a_temporary_name_that_is_a_link_is_not_followed(victim, tmp_path):
    "Names of temporary files can be foreseen."
    (tmp_path / f".run.json.{os.getpid()}").symlink_to(victim / "notes")
    (tmp_path / f".m.safetensors.{os.getpid()}").symlink_to(victim / "model.safetensors")
    (tmp_path / ".step-01").symlink_to(victim)
    (tmp_path / "run.json").symlink_to(victim / "notes")
    write_json(tmp_path / "run.json", {})
    save_tensors(tmp_path / "m.safetensors", dict(a=torch.ones(1)))
    with replace_folder_atomically(tmp_path / "step-01") as temporary:
        (temporary / "a").write_text("")
    assert not any((tmp_path / name).is_symlink() for name in ("run.json", "m.safetensors", "step-01"))


def test_appending_does_not_follow_links(victim, tmp_path):
    (tmp_path / "log.jsonl").symlink_to(victim / "notes")
    (tmp_path / "new").symlink_to(victim / "new")
    os.mkfifo(tmp_path / "pipe")
    for attempt in (
        lambda: RunLog(tmp_path)(dict(step=0)),
        lambda: open_own(tmp_path / "new", "w"),
        lambda: open_own(tmp_path / "pipe", "a"),
        lambda: open_own(tmp_path / "pipe", "a+"),
    ):
        with pytest.raises(ValueError, match="is a link or no regular file: expected a file that mbs has written"):
            attempt()


def test_results_replace_links_in_their_folder(victim, tmp_path):
    "Predictions are written beside what a link of the same name leads to; `remove_link` leaves files alone."
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a-labels.png", "a-overlay.png", "legend.png"):
        (out / name).symlink_to(victim / "notes")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    assert list(predict_files(trained_run("mbs"), [tmp_path / "a.png"], out)) == []
    assert not any(path.is_symlink() for path in out.iterdir())
    assert remove_link(out / "legend.png").is_file()


def test_curves_remove_event_files_only(victim, tmp_path, run_folder):
    "Event files may be written beside the runs themselves, as `mbs curves outputs --write-only outputs` does."
    before = read_surroundings(run_folder)
    events = run_folder / "events.out.tfevents.1.host"
    events.write_text("old")
    CurveWriter([run_folder.parent], run_folder.parent)
    after = read_surroundings(run_folder)
    assert before.items() <= after.items() and not events.exists() and len(after) == len(before) + 1
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "run").symlink_to(victim)
    with pytest.raises(ValueError, match="events/run is a symbolic link: expected a folder of event files"):
        CurveWriter([run_folder.parent], tmp_path / "events")


def test_a_download_does_not_follow_links(victim, tmp_path):
    "A link in place of an unfinished download is replaced."
    source = tmp_path / "source"
    source.write_bytes(b"data")
    archive = Archive("a.tar", (source.as_uri(),), 4, "md5", "8d777f385d3dfec8815d20f7496026dc")
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "a.tar.part").symlink_to(victim / "notes")
    assert obtain_archive(archive, tmp_path / "archives").read_bytes() == b"data"
