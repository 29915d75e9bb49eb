"From files to the input of a network: crops as the released program makes them, our own crops, batches, and the cache."

import json
import os
import pickle
import random
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import load, needs_golden
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from mbs import Experiment, Settings, load_run
from mbs.augment import (
    IMAGENET,
    Normalisation,
    ReleasedTransform,
    TestTransform,
    TrainTransform,
    normalise,
    resize_fast,
    resize_with_pillow,
)
from mbs.cache import _list_cache_paths, _open_cache, cache_pictures
from mbs.data import SegmentationFolder, split_for_tuning
from mbs.draws import Draws, iterate_batches
from mbs.protocol import VOID, Protocol
from mbs.recipe import make_recipe
from mbs.scenes import write_scenes
from mbs.setup import make_train_view
from mbs.views import StepView, move_to_device

GOLDEN = load()
NETWORK = dict(encoder_options=dict(patch_size=8, embed_dim=32, depth=1, num_heads=2))
SHORT = dict(protocol="4-4", samples=0, share_base=False, scenes=dict(n_train=24, n_test=6, size=48), **NETWORK)
FIRST_STEP = Protocol("4-4", 8)[0]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    return SegmentationFolder(write_scenes(tmp_path / "s", 24, 4, size=48))


def same(a, b):
    "Whether two data sets hold the same pictures and masks."
    return len(a) == len(b) and all(np.array_equal(x, y) for i in range(len(a)) for x, y in zip(a[i], b[i]))


@needs_golden
@pytest.mark.parametrize("part", ["val", *(f"train_seed{k}" for k in range(4))])
def test_crops_equal_those_of_the_released_program(part):
    "Labels are equal; pictures are as close as they were recorded, float32 for the test and float16 for training."
    is_test = part == "val"
    if not is_test:
        random.seed(int(part[-1]))
        assert random.uniform(0.5, 2) == GOLDEN[f"transform/{part}_scale"]
        random.seed(int(part[-1]))
    transform = TestTransform(crop=48) if is_test else ReleasedTransform(48, IMAGENET)
    image, labels = transform(GOLDEN["transform/img"], GOLDEN["transform/lbl"])
    x = normalise(torch.from_numpy(image).permute(2, 0, 1), IMAGENET)
    expected = GOLDEN[f"transform/{part}_img"].astype(np.float32)
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-6 if is_test else 1e-3)
    assert np.array_equal(labels, GOLDEN[f"transform/{part}_lbl"])


def test_recipes_choose_their_crops(folder):
    for name, kind in (("paper", ReleasedTransform), ("clean", TrainTransform)):
        view = make_train_view(folder, FIRST_STEP, IMAGENET, make_recipe(name, crop=48))
        assert type(view.transform) is kind


sides = st.integers(1, 60)


@given(size=st.tuples(sides, sides), wanted=st.tuples(sides, sides), seed=st.integers(0, 99))
def test_fast_resize_agrees_with_pillow(size, wanted, seed):
    """Pictures differ from Pillow's by at most one grey level, whatever their memory layout.

    A label is that of the pixel under the centre. It is Pillow's wherever the centre is not between two pixels.
    """
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    labels = rng.integers(0, 256, size, dtype=np.uint8)
    pillow_image, pillow_labels = map(np.asarray, resize_with_pillow(image, labels, wanted))
    fast_image, fast_labels = resize_fast(image[:, ::-1][:, ::-1], labels, wanted)
    assert fast_image.dtype == fast_labels.dtype == np.uint8
    assert np.abs(pillow_image.astype(int) - fast_image).max() <= 1
    centres = [(np.arange(m) * 2 + 1) * n / (2 * m) for n, m in zip(size, wanted)]
    rows, columns = (np.floor(x + 1e-9).astype(int) for x in centres)
    assert np.array_equal(fast_labels, labels[rows][:, columns])
    is_inside_a_pixel = np.ix_(*(np.abs(x - x.round()) > 1e-3 for x in centres))
    assert np.array_equal(fast_labels[is_inside_a_pixel], pillow_labels[is_inside_a_pixel])


@pytest.mark.parametrize("kind", [TrainTransform, ReleasedTransform])
def test_picture_and_labels_stay_aligned(kind):
    "On average over many draws, a white part begins where its labels begin."
    offsets = []
    for k in range(600):
        edge = 10 + k % 60
        image = np.zeros((60, 80, 3), np.uint8)
        labels = np.zeros((60, 80), np.uint8)
        image[:, edge:] = 255
        labels[:, edge:] = 1
        random.seed(k)
        x, y = (rows[32] for rows in kind(64, IMAGENET, flip=False)(image, labels))
        if {0, 1} <= set(y.tolist()):
            offsets.append((x[y != VOID, 0] / 255).sum() - (y == 1).sum())
    assert len(offsets) > 200
    assert abs(np.mean(offsets)) < 0.1
    assert np.abs(offsets).max() < 2


def test_cropping_before_resizing_equals_resizing_before_cropping():
    "On a smooth picture, the two orders differ at most by what half a source pixel is worth."
    ramp = (np.add.outer(np.arange(120), np.arange(160)) // 2).astype(np.uint8)[..., None].repeat(3, 2)
    labels = np.zeros((120, 160), np.uint8)
    for k in range(200):
        random.seed(k)
        x, y = TrainTransform(96, IMAGENET)(ramp, labels)
        random.seed(k)
        factor = random.uniform(0.5, 2)
        whole = int(96 * factor), int(128 * factor)
        top, left = (random.randint(0, max(0, s - 96)) for s in whole)
        full = np.asarray(resize_with_pillow(ramp, labels, whole)[0])[top : top + 96, left : left + 96]
        height, width = full.shape[:2]
        if random.random() < 0.5:
            x, y = x[:, ::-1], y[:, ::-1]
        assert np.abs(x[:height, :width].astype(int) - full).max() <= 2
        assert (y[:height, :width] == 0).all()
        assert (y == VOID).sum() == 96**2 - height * width


def test_workers_send_bytes_and_batches_do_not_depend_on_their_number(folder):
    "Workers send uint8; the normalised batch equals what the transform gives, for any number of workers."
    normalisation = Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
    view = make_train_view(folder, FIRST_STEP, normalisation, make_recipe(crop=40))
    draws = Draws(view, 4, seed=3)
    loader = DataLoader(draws, batch_sampler=[range(4), range(4, 8)], num_workers=1)
    batch = (torch.uint8, (4, 40, 40, 3), torch.uint8, (4, 40, 40))
    assert [(x.dtype, x.shape, y.dtype, y.shape) for x, y in loader] == [batch] * 2
    for workers in (0, 2):
        for i, (images, labels) in enumerate(iterate_batches(draws, range(2), workers)):
            assert images.is_contiguous()
            assert images.dtype == torch.float32 and labels.dtype == torch.int64
            for b in range(4):
                random.seed(f"3 {4 * i + b}")
                x, y = view[draws.find(4 * i + b)[1]]
                assert torch.equal(images[b], normalise(torch.from_numpy(x).permute(2, 0, 1), normalisation))
                assert torch.equal(labels[b], torch.from_numpy(y).long())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_does_not_wait_and_gives_the_same_batches(folder):
    draws = Draws(make_train_view(folder, FIRST_STEP, IMAGENET, make_recipe(crop=40)), 4)
    here = next(iterate_batches(draws, range(1)))
    stream = iterate_batches(draws, range(3), device="cuda")
    there = next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in stream:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there[1].cpu(), here[1])
    torch.testing.assert_close(there[0].cpu(), here[0], rtol=0, atol=1e-6)


def test_statistics_are_sent_once(folder, monkeypatch):
    "A tensor made from numbers at every batch would make a GPU wait."
    view = make_train_view(folder, FIRST_STEP, IMAGENET, make_recipe(crop=40))
    loader = DataLoader(Draws(view, 4), 4, sampler=range(12))
    made = []
    real_as_tensor, real_tensor = torch.as_tensor, torch.tensor

    def as_tensor(x, **options):
        if not isinstance(x, torch.Tensor | np.ndarray):
            made.append(x)
        return real_as_tensor(x, **options)

    def tensor(x, **options):
        made.append(x)
        return real_tensor(x, **options)

    stream = move_to_device(loader, view.normalisation)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    next(stream)  # `torch.tensor` makes the statistics before the first batch
    monkeypatch.setattr(torch, "tensor", tensor)
    assert len(list(stream)) == 2
    assert made == []


@pytest.mark.parametrize("recipe,workers,tuning", [("clean", 0, 0), ("paper", 2, 0.25)])
def test_a_cache_changes_no_weight_and_no_score(home, recipe, workers, tuning, capsys):
    "Weights are equal bit for bit, and a finished run without a cache is the same run with one."
    training = dict(crop=48, batch=4, iterations=12, optimizer="adamw")
    common = dict(recipe=recipe, workers=workers, tuning=tuning, training=training, **SHORT)

    def go(name, cache):
        return Experiment(Settings(name=name, cache=cache, **common)).run()

    plain, fast = go("plain", False), go("fast", True)
    assert not list(home.glob("data/*/.mbs-decoded-*")) or fast.finished
    assert "decoding 24 pictures" in capsys.readouterr().out
    assert list(home.glob("data/*/.mbs-decoded-train.npy"))
    assert plain.log() == fast.log()
    for t in range(2):
        without, with_cache = (load_file(run.step_path(t, "model.safetensors")) for run in (plain, fast))
        assert all(torch.equal(without[k], with_cache[k]) for k in without)
        assert np.array_equal(plain.confusion(t).counts, fast.confusion(t).counts)
    assert go("plain", True).finished


def test_no_cache_is_made_unasked(home):
    Experiment(Settings(name="run", training=dict(replace=True, crop=48, batch=4, iterations=2), **SHORT)).run()
    assert not list(home.rglob("*decoded*")) and not (home / "data/.cache").exists()


def test_a_subset_finds_its_pictures_in_the_cache(folder):
    for part in split_for_tuning(folder, 0.3):
        assert same(cache_pictures(part), part) and not same(cache_pictures(part), folder)
    assert len(list(folder.root.glob(".mbs-decoded-*"))) == 1


def touched(path):
    "Change the time of a file."
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def rewritten(path):
    "Put another photo into a file without a change of its size and time."
    stat = path.stat()
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path, "BMP")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def copy_foreign_cache(file, data):
    "Replace the cache by that of another data set with the same number and sizes of pictures."
    other = SegmentationFolder(write_scenes(data.root.with_name("t"), 24, 4, size=48, seed=1))
    file.write_bytes(cache_pictures(other).decoded.file.read_bytes())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file, data: os.truncate(file, file.stat().st_size - 1),
        lambda file, data: os.truncate(file, 0),
        lambda file, data: file.write_text("something else"),
        lambda file, data: np.savez(file.open("wb"), a=np.zeros(3)),
        lambda file, data: np.save(file.open("wb"), np.array([{}]), allow_pickle=True),
        lambda file, data: file.write_bytes(file.read_bytes()[:128] + bytes(file.stat().st_size - 128)),
        lambda file, data: file.unlink(),
        lambda file, data: rewritten(data.images[0]),
        copy_foreign_cache,
    ],
    ids=[
        "cut",
        "empty",
        "text",
        "npz",
        "pickle",
        "zeros",
        "gone",
        "photo of the same size and time",
        "of other data",
    ],
)
def test_a_spoilt_cache_is_made_anew(folder, spoil):
    for path in folder.images:
        Image.open(path).convert("RGB").save(path, "BMP")  # the size of a BMP does not depend on its content
    data = SegmentationFolder(folder.root)
    file = cache_pictures(data).decoded.file
    assert _open_cache(file, data) is not None
    spoil(file, data)
    assert _open_cache(file, SegmentationFolder(folder.root)) is None
    again = cache_pictures(SegmentationFolder(folder.root))
    assert again.decoded.file == file
    assert same(again, SegmentationFolder(folder.root))
    assert _open_cache(file, SegmentationFolder(folder.root)) is not None


def test_a_touched_file_keeps_its_cache(folder):
    "A picture is its content, not the time of its file."
    data = SegmentationFolder(folder.root)
    file = cache_pictures(data).decoded.file
    touched(data.images[5])
    touched(data.masks[23])
    assert _open_cache(file, SegmentationFolder(folder.root)) is not None


def test_readers_keep_their_cache_when_it_is_replaced(folder):
    "A new cache changes nothing for a process that reads the old one."
    before = cache_pictures(folder)
    kept = [tuple(x.copy() for x in pair) for pair in (before[i] for i in range(len(before)))]
    touched(folder.images[5])
    rewritten(folder.images[0])
    after = cache_pictures(SegmentationFolder(folder.root))
    assert after.decoded.file == before.decoded.file
    assert not same(after, before)
    assert same(before, kept)


def test_a_cache_is_refused_without_room(folder, monkeypatch):
    "The error comes before anything is written, in one sentence with both sizes."
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**17))
    message = (
        r"decoded pictures of s take 0\.2 MiB and .* has 0\.1 MiB left: "
        "expected enough room; free some, or leave cache out"
    )
    with pytest.raises(ValueError, match=message):
        cache_pictures(folder)
    assert not list(folder.root.glob("*decoded*"))


def test_a_disk_that_fills_up_leaves_no_cache(folder):
    "The error is one sentence, and the incomplete file is removed."
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))
    try:
        with pytest.raises(
            ValueError, match=r"decoded pictures of s cannot be written to .*: expected room and permission to write"
        ):
            cache_pictures(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert not [p for p in folder.root.iterdir() if "decoded" in p.name]


def test_the_cache_of_read_only_data_is_in_the_home_folder(folder, home, monkeypatch):
    "An existing cache beside the data is used."
    beside, at_home = _list_cache_paths(folder.layout, "train")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder.root and allowed(path, mode))
    assert cache_pictures(folder).decoded.file == at_home
    assert at_home.is_relative_to(home / "data/.cache")
    assert not beside.exists()
    monkeypatch.undo()
    at_home.rename(beside)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cache_pictures(folder).decoded.file == beside
    assert _list_cache_paths(folder.layout, "test") != _list_cache_paths(folder.layout, "train")


def test_a_home_that_cannot_be_written_either_is_refused(folder, home, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (home / "data").mkdir()
    (home / "data" / ".cache").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot be written to .*\.cache"):
        cache_pictures(folder)


BUILDER = """
import sys, time
import numpy as np
import mbs.data
from mbs.cache import cache_pictures
from mbs.data import SegmentationFolder
slowly = SegmentationFolder.__getitem__
def wait(self, i):
    if self.decoded is None: time.sleep(.02)
    return slowly(self, i)
SegmentationFolder.__getitem__ = wait
data = cache_pictures(SegmentationFolder(sys.argv[1]))
print("sum", sum(int(x.sum()) for i in range(len(data)) for x in data[i]))
"""


def test_one_of_several_processes_makes_the_cache(folder):
    "It removes the file of a killed process, and all processes read the same."
    (folder.root / "..mbs-decoded-train.npy.0123abcd").write_bytes(b"half")
    command = [sys.executable, "-c", BUILDER, str(folder.root)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * 3
    assert "".join(outputs).count("decoding 24 pictures") == 1
    total = sum(int(x.sum()) for i in range(24) for x in folder[i])
    assert {line for text in outputs for line in text.splitlines() if line.startswith("sum")} == {f"sum {total}"}
    assert [p.name for p in folder.root.iterdir() if "decoded" in p.name] == [".mbs-decoded-train.npy"]


def test_workers_get_no_copy_of_the_cache(folder):
    "A worker that is started anew gets the name of the file."
    data = cache_pictures(folder)
    assert len(pickle.dumps(data.decoded)) < 5_000
    assert same(pickle.loads(pickle.dumps(data)), folder)
    draws = Draws(StepView(data, FIRST_STEP, TrainTransform(40, IMAGENET), IMAGENET), 4)
    spawned = list(DataLoader(draws, 4, sampler=range(8), num_workers=1, multiprocessing_context="spawn"))
    here = list(DataLoader(draws, 4, sampler=range(8)))
    assert len(spawned) == len(here)
    assert all(torch.equal(a, b) for one, two in zip(spawned, here) for a, b in zip(one, two))


def test_the_card_says_whether_a_cache_was_used(home):
    "Runs whose card lacks the parameter are resumed."
    settings = Settings(name="run", training=dict(replace=True, crop=48, batch=4, iterations=2), **SHORT)
    Experiment(settings).run()
    card = json.loads((home / "outputs/run/run.json").read_text())
    assert card["settings"].pop("cache") is False
    assert card["recipe"].pop("augmentation") == "clean"
    (home / "outputs/run/run.json").write_text(json.dumps(card))
    assert Experiment(settings).run().finished and load_run(home / "outputs/run").finished
