"From files to what a network gets: the released program's crops to the byte, ours with picture and labels in register, bytes until the device, and a cache that changes nothing."

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
from mbs.augment import IMAGENET, ReleasedTransform, TestTransform, TrainTransform, resize_fast, resize_with_pillow
from mbs.cache import _list_cache_paths, _open_cache, cache_pictures
from mbs.data import SegmentationFolder, split_for_tuning
from mbs.draws import Draws, iterate_batches
from mbs.protocol import VOID, Protocol
from mbs.recipe import make_recipe, make_train_view
from mbs.scenes import write_scenes
from mbs.views import StepView, move_to_device

GOLDEN = load()
NETWORK = dict(encoder_options=dict(patch_size=8, embed_dim=32, depth=1, num_heads=2))
SHORT = dict(protocol="4-4", samples=0, share_base=False, scenes=dict(n_train=24, n_test=6, size=48), **NETWORK)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    return SegmentationFolder(write_scenes(tmp_path / "s", 24, 4, size=48))


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for i in range(len(a)) for x, y in zip(a[i], b[i]))


@needs_golden
@pytest.mark.parametrize("part", ["val", *(f"train_seed{k}" for k in range(4))])
def test_crops_of_the_released_program(part):
    "Recorded crops: pictures as near as they were recorded, float32 for the test and float16 for training; labels exactly."
    image, labels = (
        torch.from_numpy(GOLDEN["transform/img"]).permute(2, 0, 1),
        torch.from_numpy(GOLDEN["transform/lbl"]),
    )
    if part != "val":
        random.seed(int(part[-1]))
        assert random.uniform(0.5, 2) == GOLDEN[f"transform/{part}_scale"]
        random.seed(int(part[-1]))
    x, y = (TestTransform(*IMAGENET, crop=48) if part == "val" else ReleasedTransform(48, *IMAGENET))(image, labels)
    np.testing.assert_allclose(
        x, GOLDEN[f"transform/{part}_img"].astype(np.float32), rtol=0, atol=1e-6 if part == "val" else 1e-3
    )
    assert np.array_equal(y, GOLDEN[f"transform/{part}_lbl"])


def test_recipes_choose_their_crops(folder):
    for name, kind in (("paper", ReleasedTransform), ("clean", TrainTransform)):
        view = make_train_view(folder, Protocol("4-4", 8), 0, IMAGENET, make_recipe(name, crop=48))
        assert type(view.transform) is kind


sides = st.integers(1, 60)


@given(size=st.tuples(sides, sides), wanted=st.tuples(sides, sides), seed=st.integers(0, 99))
def test_fast_resize(size, wanted, seed):
    "Pictures up to one grey level as Pillow's, whatever the layout; labels are the pixel under the centre, as Pillow's wherever there is only one."
    rng = np.random.default_rng(seed)
    image, labels = rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.integers(0, 256, size, dtype=np.uint8)
    (a, b), (c, d) = (
        map(np.asarray, resize_with_pillow(image, labels, wanted)),
        resize_fast(image[:, ::-1][:, ::-1], labels, wanted),
    )
    assert c.dtype == d.dtype == np.uint8 and np.abs(a.astype(int) - c).max() <= 1
    centres = [(np.arange(m) * 2 + 1) * n / (2 * m) for n, m in zip(size, wanted)]
    assert np.array_equal(
        d, labels[np.floor(centres[0] + 1e-9).astype(int)][:, np.floor(centres[1] + 1e-9).astype(int)]
    )
    only = np.ix_(*(np.abs(x - x.round()) > 1e-3 for x in centres))
    assert np.array_equal(d[only], b[only])


@pytest.mark.parametrize("kind", [TrainTransform, ReleasedTransform])
def test_picture_and_labels_are_in_register(kind):
    "A white part begins, on average over many draws, where the labels say."
    offsets = []
    for k in range(600):
        image, labels, edge = np.zeros((60, 80, 3), np.uint8), np.zeros((60, 80), np.uint8), 10 + k % 60
        image[:, edge:], labels[:, edge:] = 255, 1
        random.seed(k)
        x, y = (row[32] for row in kind(64, *IMAGENET, flip=False).cut(image, labels))
        if {0, 1} <= set(y.tolist()):
            offsets.append((x[y != VOID, 0] / 255).sum() - (y == 1).sum())
    assert len(offsets) > 200 and abs(np.mean(offsets)) < 0.1 and np.abs(offsets).max() < 2


def test_a_window_first_shows_what_the_whole_would():
    "On a smooth picture, cutting before resizing differs by what half a source pixel is worth."
    ramp = (np.add.outer(np.arange(120), np.arange(160)) // 2).astype(np.uint8)[..., None].repeat(3, 2)
    labels = np.zeros((120, 160), np.uint8)
    for k in range(200):
        random.seed(k)
        x, y = TrainTransform(96, *IMAGENET).cut(ramp, labels)
        random.seed(k)
        factor = random.uniform(0.5, 2)
        whole = int(96 * factor), int(128 * factor)
        top, left = (random.randint(0, max(0, s - 96)) for s in whole)
        full = np.asarray(resize_with_pillow(ramp, labels, whole)[0])[top : top + 96, left : left + 96]
        height, width = full.shape[:2]
        if random.random() < 0.5:
            x, y = x[:, ::-1], y[:, ::-1]
        assert np.abs(x[:height, :width].astype(int) - full).max() <= 2
        assert (y[:height, :width] == 0).all() and (y == VOID).sum() == 96**2 - height * width


def test_bytes_travel_and_the_device_does_the_rest(folder):
    "Loader processes hand on uint8; what arrives is what the transform alone gives, for any number of them."
    view = make_train_view(folder, Protocol("4-4", 8), 0, ((0.4, 0.5, 0.6), (0.2, 0.3, 0.1)), make_recipe(crop=40))
    draws = Draws(view, 4, seed=3)
    loader = DataLoader(draws, batch_sampler=[range(4), range(4, 8)], num_workers=1)
    assert [(x.dtype, x.shape, y.dtype, y.shape) for x, y in loader] == [
        (torch.uint8, (4, 40, 40, 3), torch.uint8, (4, 40, 40))
    ] * 2
    plain = StepView(folder, view.protocol, 0, view.transform, positions=view.positions)
    for workers in (0, 2):
        for i, (images, labels) in enumerate(iterate_batches(draws, range(2), workers)):
            assert images.is_contiguous() and images.dtype == torch.float32 and labels.dtype == torch.int64
            for b in range(4):
                random.seed(f"3 {4 * i + b}")
                x, y = plain[draws.picture(4 * i + b)]
                assert torch.equal(images[b], x) and torch.equal(labels[b], y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_does_not_wait_and_rounds_alike(folder):
    draws = Draws(make_train_view(folder, Protocol("4-4", 8), 0, IMAGENET, make_recipe(crop=40)), 4)
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
    "A tensor made on a GPU from numbers would make it wait at every batch."
    view = make_train_view(folder, Protocol("4-4", 8), 0, IMAGENET, make_recipe(crop=40))
    stream, made, original = (
        move_to_device(DataLoader(Draws(view, 4), 4, sampler=range(12)), view.transform),
        [],
        torch.as_tensor,
    )
    monkeypatch.setattr(
        torch,
        "as_tensor",
        lambda x, **how: (made.append(x) if not isinstance(x, torch.Tensor | np.ndarray) else None, original(x, **how))[
            1
        ],
    )
    assert len(list(stream)) == 3 and made == []


@pytest.mark.parametrize("recipe,workers,tuning", [("clean", 0, 0), ("paper", 2, 0.25)])
def test_the_same_weights_with_and_without(home, recipe, workers, tuning, capsys):
    "Bit by bit, and the same scores; a finished run is not another one for having been made with a cache."
    training = dict(crop=48, batch=4, iterations=12, optimizer="adamw")

    def go(name, cache):
        return Experiment(
            Settings(name=name, recipe=recipe, workers=workers, tuning=tuning, cache=cache, training=training, **SHORT)
        ).run()

    plain, fast = go("plain", False), go("fast", True)
    assert not list(home.glob("data/*/.mbs-decoded-*")) or fast.finished
    assert ("decoding 24 pictures" in capsys.readouterr().out) and list(home.glob("data/*/.mbs-decoded-train.npy"))
    assert plain.log() == fast.log()
    for t in range(2):
        mine, theirs = (load_file(r.step_path(t, "model.safetensors")) for r in (plain, fast))
        assert all(torch.equal(mine[k], theirs[k]) for k in mine) and np.array_equal(
            plain.confusion(t).counts, fast.confusion(t).counts
        )
    assert go("plain", True).finished


def test_none_is_made_unasked(home):
    Experiment(Settings(name="run", training=dict(crop=48, batch=4, iterations=2), **SHORT)).run()
    assert not list(home.rglob("*decoded*")) and not (home / "data/.cache").exists()


def test_a_subset_finds_its_pictures(folder):
    for part in split_for_tuning(folder, 0.3):
        assert same(cache_pictures(part), part) and not same(cache_pictures(part), folder)
    assert len(list(folder.root.glob(".mbs-decoded-*"))) == 1


def touched(path):
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def rewritten(path):
    "Another photo in the file, of the same size and time."
    stat = path.stat()
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path, "BMP")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


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
        lambda file, data: touched(data.images[5]),
        lambda file, data: touched(data.masks[23]),
        lambda file, data: rewritten(data.images[0]),
        lambda file, data: [
            path.write_bytes(other.read_bytes())
            for path, other in [
                (
                    file,
                    cache_pictures(
                        SegmentationFolder(write_scenes(data.root.with_name("t"), 24, 4, size=48, seed=1))
                    ).decoded.file,
                )
            ]
        ],
    ],
    ids=[
        "cut",
        "empty",
        "text",
        "npz",
        "pickle",
        "zeros",
        "gone",
        "photo touched",
        "mask touched",
        "photo of the same size and time",
        "of other data",
    ],
)
def test_a_cache_that_does_not_fit_is_made_anew(folder, spoil):
    for path in folder.images:
        Image.open(path).convert("RGB").save(path, "BMP")  # the size of such a file does not depend on what is in it
    data = SegmentationFolder(folder.root)
    file = cache_pictures(data).decoded.file
    assert _open_cache(file, data) is not None
    spoil(file, data)
    assert _open_cache(file, SegmentationFolder(folder.root)) is None
    again = cache_pictures(SegmentationFolder(folder.root))
    assert (
        again.decoded.file == file
        and same(again, SegmentationFolder(folder.root))
        and _open_cache(file, SegmentationFolder(folder.root)) is not None
    )


def test_readers_keep_what_they_have_mapped(folder):
    "A file that takes the place of another changes nothing for a process that is reading."
    before = cache_pictures(folder)
    kept = [tuple(x.copy() for x in pair) for pair in (before[i] for i in range(len(before)))]
    touched(folder.images[5])
    rewritten(folder.images[0])
    after = cache_pictures(SegmentationFolder(folder.root))
    assert after.decoded.file == before.decoded.file and not same(after, before) and same(before, kept)


def test_no_room(folder, monkeypatch):
    "Refused before anything is written, in one sentence with both sizes."
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**17))
    with pytest.raises(
        ValueError,
        match=r"decoded pictures of s take 0\.2 MiB and .* has 0\.1 MiB left: expected enough room; free some, or leave cache out",
    ):
        cache_pictures(folder)
    assert not list(folder.root.glob("*decoded*"))


def test_the_disk_fills_up(folder):
    "One sentence, and nothing stays."
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


def test_read_only_data(folder, home, monkeypatch):
    "Then it lies at home; one that lies beside the data already is used."
    beside, at_home = _list_cache_paths(folder.layout, "train")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder.root and allowed(path, mode))
    assert (
        cache_pictures(folder).decoded.file == at_home
        and at_home.is_relative_to(home / "data/.cache")
        and not beside.exists()
    )
    monkeypatch.undo()
    at_home.rename(beside)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cache_pictures(folder).decoded.file == beside
    assert _list_cache_paths(folder.layout, "test") != _list_cache_paths(folder.layout, "train")


def test_home_cannot_be_written_either(folder, home, monkeypatch):
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


def test_several_at_once(folder):
    "One makes it, after removing what a killed one has left; all read the same."
    (folder.root / "..mbs-decoded-train.npy.999999").write_bytes(b"half")
    together = [
        subprocess.Popen([sys.executable, "-c", BUILDER, str(folder.root)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [p.communicate(timeout=120)[0] for p in together]
    assert [p.returncode for p in together] == [0] * 3 and "".join(said).count("decoding 24 pictures") == 1
    assert {line for text in said for line in text.splitlines() if line.startswith("sum")} == {
        f"sum {sum(int(x.sum()) for i in range(24) for x in folder[i])}"
    }
    assert [p.name for p in folder.root.iterdir() if "decoded" in p.name] == [".mbs-decoded-train.npy"]


def test_loader_processes_take_no_copy_along(folder):
    "What is handed to a process that is started anew names the file."
    data = cache_pictures(folder)
    assert len(pickle.dumps(data.decoded)) < 5_000 and same(pickle.loads(pickle.dumps(data)), folder)
    view = StepView(data, Protocol("4-4", 8), 0, TrainTransform(40, *IMAGENET), as_bytes=True)
    given = list(DataLoader(Draws(view, 4), 4, sampler=range(8), num_workers=1, multiprocessing_context="spawn"))
    assert all(
        torch.equal(a, b)
        for one, two in zip(given, DataLoader(Draws(view, 4), 4, sampler=range(8)))
        for a, b in zip(one, two)
    )


def test_the_card_says_whether(home):
    "Runs from before there was a choice go on."
    settings = Settings(name="run", training=dict(crop=48, batch=4, iterations=2), **SHORT)
    Experiment(settings).run()
    card = json.loads((home / "outputs/run/run.json").read_text())
    assert card["settings"].pop("cache") is False and card["recipe"].pop("augmentation") == "clean"
    (home / "outputs/run/run.json").write_text(json.dumps(card))
    assert Experiment(settings).run().finished and load_run(home / "outputs/run").finished
