"""Bad input in bulk: files and parameters with random changes.

Each input must be used correctly or refused in one sentence. It must never end in a traceback, a hang, a half-written
folder or a wrong label."""

import ast
import faulthandler
import io
import json
import os
import shutil
import signal
import string
import subprocess
import sys
import warnings
import zlib
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
import yaml
from figures import kept
from hypothesis import HealthCheck, given
from hypothesis import settings as plan
from hypothesis import strategies as some
from mutants import CODE, VALUES, Mutants, change_png, change_safetensors, join_png, split_png
from PIL import Image
from test_archives import FILES, tar, zipped
from test_faults import TINY
from typer.testing import CliRunner

import mbs.batch
from mbs.archives import read_archive
from mbs.checkpoint import StepCheckpoints, save_tensors
from mbs.cli import app
from mbs.comparison import find_runs, group_runs, summarise_runs
from mbs.curves import collect_scalars
from mbs.data import SegmentationFolder, find_problems
from mbs.experiment import Experiment
from mbs.explore.tour import write_tour
from mbs.files import write_arrays
from mbs.folders import find_runs_folder
from mbs.grid import expand_grid, read_grid
from mbs.layouts import describe_folder, find_layout
from mbs.methods import Method
from mbs.notebooks import execute_notebook, read_failure, read_worker
from mbs.parameter_files import merge_parameters, parse_words, read_yaml
from mbs.pictures import count_classes, read_image, read_image_size, read_mask
from mbs.prepare import prepare_coco
from mbs.protocol import VOID, Protocol
from mbs.recipe import make_recipe
from mbs.report_tables import make_card_table, make_steps_table
from mbs.run import load_run
from mbs.scenes import write_scenes
from mbs.settings import Settings
from mbs.weights import make_encoder

MANY = int(os.environ.get("MBS_MUTATIONS", 60))  # inputs of each kind; 250 with make stress
SECONDS = 20  # of computation that one input may take; if it waits, thirty times as many
COLOURS = {(0, 0, 0): 0, (200, 0, 0): 1, (0, 200, 0): 2, (0, 0, 200): 3}
NETWORK = dict(patch_size=8, embed_dim=16, depth=1, num_heads=1)


class TooSlow(BaseException):
    "The program takes too long for an input. `except Exception` does not catch it."


@contextmanager
def limited():
    "Limit the block to `SECONDS` of computation, and hide warnings."

    def late(*_):
        raise TooSlow

    before = [signal.signal(s, late) for s in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(30 * SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for s, handler in zip((signal.SIGPROF, signal.SIGALRM), before):
            signal.signal(s, handler)


def check_sentence(text):
    "Check that an error is one sentence."
    assert 15 < len(text) < 8000 and "\n" not in text.strip() and "Traceback" not in text, text


def outcome(read):
    "Return what `read` returns, or None if it refuses the input in one sentence."
    try:
        with limited():
            return read()
    except (ValueError, FileNotFoundError) as e:
        check_sentence(str(e))


def command(*words, codes=(0, 2)):
    "Run `mbs WORDS` in this process; return its exit code, 0 or 2 with one sentence."
    with limited():
        result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code in codes, (words, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    if result.exit_code and result.stderr:
        check_sentence(result.stderr)
        assert result.stderr.startswith("mbs: ")
    return result.exit_code


class Tally:
    "Count the inputs of a kind and how many were refused; end the process if C code hangs."

    def __init__(self, kind):
        self.kind = kind
        self.tried = 0
        self.refused = 0

    def __enter__(self):
        faulthandler.dump_traceback_later(600 + MANY, exit=True)
        return self

    def __exit__(self, error, *_):
        faulthandler.cancel_dump_traceback_later()
        if error is None:
            kept(f"inputs tried: {self.kind}", self.tried)
            kept(f"refused in one sentence: {self.kind}", self.refused)

    def __call__(self, found):
        self.tried += 1
        self.refused += found is None
        return found


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # CODE would leave a file here
    torch.set_num_threads(1)
    yield tmp_path
    assert not list(tmp_path.rglob("owned"))


def saved(picture, kind="PNG", **options):
    "Return the bytes of a picture file."
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def ids(size=(17, 23), n=4):
    "Draw class ids below `n`, uint8."
    return np.random.default_rng(3).integers(0, n, size).astype(np.uint8)


# --- pictures


def masks():
    "Make masks of all kinds, by name."
    palette = Image.fromarray(ids(), "P")
    grey = Image.fromarray(ids())
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    void = ids().copy()
    void[:2] = VOID
    return dict(
        palette=saved(palette),
        packed=saved(palette, bits=2),
        grey=saved(grey),
        void=saved(Image.fromarray(void)),
        one=saved(Image.fromarray(ids(n=2) > 0)),
        deep=saved(Image.fromarray(ids().astype(np.uint16))),
        colours=saved(palette.convert("RGB")),
        bmp=saved(grey, "BMP"),
    )


def read_with_pillow(path, colours):
    "Read the class ids of a mask, (H, W), with Pillow alone."
    picture = Image.open(path)
    if not colours:
        return np.array(picture).astype(int)
    rows = np.array(picture.convert("RGB")).tolist()
    return np.array([[COLOURS[tuple(pixel)] for pixel in row] for row in rows])


@pytest.mark.parametrize("name", masks())
def test_masks(home, name):
    "A changed mask is refused, or read as class ids that Pillow reads, too."
    mutants = Mutants(1)
    data = masks()[name]
    colours = COLOURS if name == "colours" else None
    path = home / "mask.png"

    def read():
        found = read_mask(path, colours)
        count_classes(found, 3, path)
        return found

    path.write_bytes(data)
    assert (read() == read_with_pillow(path, colours)).all()
    with Tally("masks") as tally:
        for k in range(MANY // 2):
            path.write_bytes(change_png(mutants, data) if k % 2 and name != "bmp" else mutants.change(data))
            if (found := tally(outcome(read))) is None:
                continue
            assert found.dtype == np.uint8 and found.ndim == 2
            assert (found == read_with_pillow(path, colours)).all()
            assert set(np.unique(found)) <= {0, 1, 2, 3, VOID}


def test_pictures_that_are_no_masks_are_refused(home):
    "Lossy pictures, grey levels of fewer than 8 bits and ids beyond a byte are refused, whatever the file is called."
    path = home / "mask.png"

    def png(bits, kind):
        header = bytes([0, 0, 0, 2, 0, 0, 0, 2, bits, kind, 0, 0, 0])
        pixels = b"\0\x12\0\x30" if bits == 4 else b"\0\x10\0\x20"
        return join_png([[b"IHDR", header], [b"IDAT", zlib.compress(pixels)], [b"IEND", b""]])

    for data, message in (
        (saved(Image.fromarray(ids((32, 32))), "JPEG"), "cannot identify"),
        (png(4, 0), "fewer than 8 bits"),
        (png(2, 0), "fewer than 8 bits"),
        (saved(Image.fromarray(ids((32, 32))), "TIFF"), "cannot identify"),
        (saved(Image.fromarray(ids().astype(np.uint16) * 200)), "holds ids from 0 to 600"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_mask(path)


def photos():
    "Make photos of all kinds, by name; 'deep', 'gif' and 'float' cannot be used."
    r = np.random.default_rng(5)
    rgb = Image.fromarray(r.integers(0, 256, (21, 33, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    return dict(
        jpeg=saved(rgb, "JPEG"),
        progressive=saved(rgb, "JPEG", progressive=True),
        cmyk=saved(rgb.convert("CMYK"), "JPEG"),
        grey=saved(rgb.convert("L"), "JPEG"),
        turned=saved(rgb, "JPEG", exif=exif),
        png=saved(rgb),
        alpha=saved(rgb.convert("RGBA")),
        palette=saved(rgb.quantize(16)),
        interlaced=INTERLACED,
        webp=saved(rgb, "WEBP"),
        lossless=saved(rgb, "WEBP", lossless=True),
        tiff=saved(rgb, "TIFF"),
        lzw=saved(rgb, "TIFF", compression="tiff_lzw"),
        bmp=saved(rgb, "BMP"),
        deep=saved(Image.fromarray(r.integers(0, 65536, (21, 33)).astype(np.uint16))),
        gif=saved(rgb, "GIF"),
        float=saved(Image.fromarray(r.random((21, 33)).astype(np.float32)), "TIFF"),
    )


INTERLACED = join_png(
    [[b"IHDR", bytes([0, 0, 0, 1, 0, 0, 0, 1, 8, 2, 0, 0, 1])], [b"IDAT", zlib.compress(b"\0abc")], [b"IEND", b""]]
)


@pytest.mark.parametrize("name", photos())
def test_photos(home, name):
    "A changed photo is refused or decoded completely, and both readers agree."
    mutants = Mutants(2)
    data = photos()[name]
    path = home / "photo"
    path.write_bytes(data)
    first = outcome(partial(read_image, path))
    assert (first is None) == (name in ("deep", "gif", "float"))
    with Tally("photos") as tally:
        for k in range(MANY // 4):
            path.write_bytes(change_png(mutants, data) if k % 2 and data[:4] == b"\x89PNG" else mutants.change(data))
            found, size = tally(outcome(partial(read_image, path))), outcome(partial(read_image_size, path))
            assert (found is None) == (size is None), "the check of a data set and training disagree"
            if found is not None:
                assert found.dtype == np.uint8 and found.shape == (*size, 3)


def test_pictures_with_huge_headers_are_refused(home):
    "A header of a few bytes can demand any amount of memory."
    path = home / "bomb"
    for data in (
        join_png(
            [[b"IHDR", bytes([0, 1, 0, 0, 0, 1, 0, 0, 8, 0, 0, 0, 0])], *split_png(saved(Image.fromarray(ids())))[1:]]
        ),
        saved(Image.new("L", (9, 9)), "BMP").replace(b"\x09\0\0\0\x09\0\0\0", b"\xff\xff\0\0\xff\xff\0\0"),
    ):
        path.write_bytes(data)
        for read in (read_image, read_image_size, read_mask):
            with pytest.raises(ValueError, match="pixels"):
                read(path)


# --- data sets


def voc(root):
    "Write scenes in the layout of PASCAL VOC."
    return write_scenes(root, 6, 3, size=16)


def own(root):
    "Write a folder of photos and coloured masks with a description."
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for k in range(5):
        photo = np.random.default_rng(k).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(photo).save(root / "images" / f"p{k}.png")
        palette = Image.fromarray(ids((16, 16)), "P")
        palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
        palette.convert("RGB").save(root / "masks" / f"p{k}.png")
    describe_folder(
        root,
        ["cat", "dog", "cow"],
        colours=dict(background=(0, 0, 0), cat=(200, 0, 0), dog=(0, 200, 0), cow=(0, 0, 200)),
        test=["p1"],
        seed=3,
    )
    return root


def check_layout(root):
    "Check that a data set that was not refused can be used: its classes, and every photo and mask."
    layout = find_layout(root)
    n = len(layout.classes)
    assert 0 < n < VOID and len(set(layout.classes)) == n
    assert layout.train.ids and layout.test.ids
    if layout.colours:
        assert all(0 <= c <= 255 for rgb in layout.colours for c in rgb)
        assert set(layout.colours.values()) - {VOID} == set(range(n + 1))
    find_problems(root)
    for part in ("train", "test"):
        data = SegmentationFolder(layout, part)
        for i in range(len(data)):
            image, mask = data[i]
            assert image.shape == (*mask.shape, 3) and ((mask <= n) | (mask == VOID)).all()
            assert (data.counts[i] == count_classes(mask, n, root)).all()
    return layout


CASES = {
    "list": (voc, "ImageSets/Segmentation/trainaug.txt"),
    "class names": (voc, "classes.txt"),
    "photo": (voc, "JPEGImages/train_00002.png"),
    "mask": (voc, "SegmentationClassAug/test_00001.png"),
    "dataset.yaml": (own, "dataset.yaml"),
    "coloured mask": (own, "masks/p1.png"),
}


@pytest.mark.parametrize("name", CASES)
def test_data_sets(home, name):
    mutants, (make, file) = Mutants(3), CASES[name]
    root = make(home / "data")
    check_layout(root)
    data = (root / file).read_bytes()

    def change(data):
        return mutants.change(data) if file.endswith("png") else mutants.change_text(data.decode())

    with Tally("files of data sets") as tally:
        for k in range(MANY):
            (root / file).write_bytes(change(data))
            if k % 10 == 9:
                assert command("data", "check", root) == 2 or find_layout(root)
            if tally(outcome(partial(check_layout, root))) is not None and name == "class names":
                assert len(find_layout(root).classes) >= 8 or make is own


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(classes=["background", "cat", "dog", "cow"]), "has a class 'background'"),
        (dict(classes=["cat", "cat", "dog"]), "contain a name twice"),
        (dict(classes=[]), "names 0 classes"),
        (dict(classes=[f"c{k}" for k in range(255)]), "names 255 classes"),
        (dict(classes=["cat", " ", "dog"]), "has a class ' '"),
        (dict(colours=dict(cat=(0, 1, 256))), "cannot be 256"),
        (dict(colours=dict(cat=(-1, 0, 0))), "cannot be -1"),
        (dict(test=float("nan")), "test share is nan"),
        (dict(seed=-1), "'seed' cannot be -1"),
        (dict(test=["p0", "p0"]), "twice"),
        (dict(test=["../p0"]), "is not in"),
    ],
)
def test_descriptions_that_would_give_wrong_labels_are_refused(home, change, says):
    root = own(home / "data")
    before = (root / "dataset.yaml").read_bytes()
    with pytest.raises(ValueError, match=says) as error:
        describe_folder(root, **dict(classes=["cat", "dog", "cow"]) | change)
    check_sentence(str(error.value))
    assert (root / "dataset.yaml").read_bytes() == before


def test_a_photo_turned_by_its_exif_is_read_as_its_mask_fits(home):
    "A mask of the size that the photo is shown in turns the photo; another size is refused."
    root = voc(home / "data")
    photo, mask = root / "JPEGImages/train_00000.png", root / "SegmentationClassAug/train_00000.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(photo, exif=exif)
    Image.fromarray(np.zeros((24, 16), np.uint8)).save(mask)
    assert SegmentationFolder(root)[0][0].shape == (24, 16, 3)
    Image.fromarray(np.zeros((24, 17), np.uint8)).save(mask)
    with pytest.raises(ValueError, match=r"differ in size, 24×16 and 17×24 pixels: expected the same$"):
        SegmentationFolder(root)


def test_cached_indices(home):
    "A changed or foreign index is made anew and never used."
    mutants, root = Mutants(4), voc(home / "data")
    truth = SegmentationFolder(root)
    file = root / ".mbs-index-train.npz"
    data = file.read_bytes()
    arrays = dict(np.load(file))
    wrong = (
        np.zeros(3),
        np.zeros((6, 10)),
        np.array("x"),
        np.zeros((6, 9), int),
        np.full((6, 10), -1),
        np.array(["a"] * 6),
        np.zeros((0,)),
        np.ones((6, 10), bool),
    )
    with Tally("cached indices") as tally:
        for k in range(MANY):
            if k % 2:
                file.write_bytes(mutants.change(data))
            else:
                name = mutants.random.choice(list(arrays))
                value = mutants.random.choice((*wrong, *arrays.values()))
                write_arrays(file, **arrays | {name: value})
            found = tally(outcome(partial(SegmentationFolder, root)))
            assert found is not None
            assert (found.counts == truth.counts).all()
            assert (found.sizes == truth.sizes).all()
            assert found.fingerprint == truth.fingerprint


def coco_file(folder):
    "Write photos and COCO annotations: polygons, run lengths as numbers and as text, a crowd."
    from pycocotools import mask

    (folder / "photos").mkdir(parents=True)
    blob = np.zeros((20, 30), np.uint8, order="F")
    blob[5:9, 3:20] = 1
    text = mask.encode(blob)
    runs = dict(size=[20, 30], counts=[65, 4, *[16, 4] * 16, 600 - 65 - 4 - 320])
    content = dict(
        info={},
        images=[dict(id=k, file_name=f"p{k}.png", width=30, height=20) for k in range(3)],
        categories=[dict(id=7, name="cat"), dict(id=9, name="dog")],
        annotations=[
            dict(id=1, image_id=0, category_id=7, area=50, iscrowd=0, segmentation=[[2, 2, 12, 2, 12, 9, 2, 9]]),
            dict(id=2, image_id=1, category_id=9, area=10.5, iscrowd=1, segmentation=runs),
            dict(
                id=3,
                image_id=2,
                category_id=9,
                area=3,
                iscrowd=0,
                segmentation=dict(size=[20, 30], counts=text["counts"].decode()),
            ),
        ],
    )
    for k in range(3):
        Image.fromarray(np.full((20, 30, 3), 40 * k, np.uint8)).save(folder / "photos" / f"p{k}.png")
    (folder / "a.json").write_text(json.dumps(content))
    return content, blob


def test_coco(home):
    content, blob = coco_file(home)
    mutants, text = Mutants(5), json.dumps(content)
    prepare_coco(home / "a.json", home / "photos", home / "first")
    for name, value in (("p1", VOID), ("p2", 2)):
        assert (read_mask(home / "first/masks" / f"{name}.png") == np.where(blob, value, 0)).all()
    before = set(home.iterdir())
    with Tally("COCO files") as tally:
        for k in range(2 * MANY):
            changed = mutants.change(text.encode()) if k % 2 else json.dumps(mutants.change_tree(content)).encode()
            (home / "a.json").write_bytes(changed)
            arguments = home / "a.json", home / "photos", home / "made"
            if k % 10:
                made = outcome(partial(prepare_coco, *arguments))
            else:
                made = command("data", "coco", *arguments) == 0 or None
            if tally(made) is not None:
                check_layout(home / "made")
                shutil.rmtree(home / "made")
            assert set(home.iterdir()) == before


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(segmentation=[[1, 2, 3, 4]]), "fewer than three corners"),
        (dict(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "x without y"),
        (dict(segmentation=[[0, 0, 1e9, 0, 1e9, 1e9]]), "far outside"),
        (dict(segmentation=dict(size=[20, 30], counts=[0, 10**9])), "do not fill"),
        (dict(segmentation=dict(size=[20, 30], counts=[700, -100])), "do not fill"),
        (dict(segmentation=dict(size=[200, 300], counts=[60000])), "do not fill"),
        (dict(segmentation=dict(size=[20, 30], counts="oooooooooooooooooo")), "not in COCO's text format"),
        (dict(category_id=3), "unknown category '3': expected the ids"),
        (dict(image_id=5), "picture that is not listed"),
        (dict(segmentation=[]), "has no shape"),
    ],
)
def test_invalid_coco_shapes_are_refused(home, change, says):
    "For some of these, the library that draws shapes writes beyond its memory."
    content, _ = coco_file(home)
    content["annotations"][0] |= change
    (home / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says) as error:
        prepare_coco(home / "a.json", home / "photos", home / "made")
    check_sentence(str(error.value))
    assert not (home / "made").exists() and not list(home.glob(".made*"))


def test_coco_run_lengths_are_decoded_as_by_the_library():
    from pycocotools import mask

    from mbs.coco import RunLengths, draw_object

    for seed in range(30):
        r = np.random.default_rng(seed)
        truth = np.asfortranarray((r.random((r.integers(1, 90), r.integers(1, 90))) < r.random()).astype(np.uint8))
        packed = mask.encode(truth)
        runs = RunLengths(size=packed["size"], counts=packed["counts"].decode())
        assert (draw_object(runs, *truth.shape) == truth).all()


@pytest.mark.parametrize(
    "change,says",
    [
        (lambda c: c["images"][1].update(file_name="p0.png"), "'p0' twice"),
        (lambda c: c["images"][1].update(file_name="../photos/p1.png"), "would leave its folder"),
        (lambda c: c["images"][1].update(id=0), "picture id '0' twice"),
        (lambda c: c["categories"][1].update(name="background"), "has a class 'background'"),
        (lambda c: c["categories"][1].update(name="cat"), "'cat' twice"),
    ],
)
def test_coco_files_that_would_lose_a_picture_or_class_are_refused(home, change, says):
    content, _ = coco_file(home)
    change(content)
    (home / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says):
        prepare_coco(home / "a.json", home / "photos", home / "made")
    assert not (home / "made").exists()


@pytest.mark.parametrize("name", ["voc", "sbd", "ade"])
def test_archives(home, name):
    "A changed archive is refused, or gives files below its own folder."
    mutants, path = Mutants(6), home / "archive"
    data = FILES[name] if len(FILES[name]) < 100_000 else tar({"a/b.png": masks()["grey"], "a/c.txt": b"x" * 999})
    if name == "ade":
        data = zipped({"a/b.png": masks()["grey"], "a/c.txt": b"x" * 999})
    with Tally("archives") as tally:
        for _ in range(MANY):
            path.write_bytes(mutants.change(data, 30))
            found = tally(outcome(lambda: list(read_archive(path, PurePosixPath))))
            for member, content in found or ():
                assert not member.is_absolute() and ".." not in member.parts
                assert isinstance(content, bytes)


# --- parameters


def check_settings(values):
    "Check that parameters that are not refused give a recipe, a method and a protocol; return the settings."
    settings = Settings.checked(**values)
    recipe = make_recipe(settings.recipe, 8, **settings.training)
    method = Method(settings.method, 8, **settings.parts)
    protocol = Protocol(settings.protocol, 8, settings.protocol_setting)
    assert settings.name and ".." not in settings.name.split("/")
    assert not Path(settings.name).is_absolute()
    assert recipe.crop >= 8
    assert method.parts
    assert sum(protocol.sizes) == 8
    return settings


@pytest.fixture
def no_training(monkeypatch):
    "Let commands make every check, and stop before they train."

    def stop(*_):
        raise mbs.batch.RunFailed("the run would start now")

    monkeypatch.setattr(mbs.batch, "run_notebook", stop)


def small(values):
    "Return parameters of a tiny run, with `values` on top."
    scenes = dict(n_train=4, n_test=2, size=16)
    return dict(data="scenes", scenes=scenes, encoder_options=NETWORK, protocol="7-1") | values


def test_parameter_files(home, no_training):
    mutants, path = Mutants(7), home / "p.yaml"
    texts = [p.read_text() for p in sorted((find_runs_folder() / "protocols").glob("*.yaml"))]
    texts += [
        yaml.safe_dump(small(dict(name="a", training=dict(replace=True, crop=16, batch=2, iterations=1)))),
        "a: &a [1, 2]\nname: x\ntraining: {lr: 1e-3, crop: 32}\nclasses: [ball, leaf]\n",
    ]
    with Tally("parameter files") as tally:
        for k in range(3 * MANY):
            path.write_bytes(mutants.change_text(mutants.random.choice(texts)))
            tally(outcome(lambda: check_settings(read_yaml(path))))
            if k % 20 == 0:
                command("run", path, "data=nowhere")
                command("run", path, "scenes={n_train: 0}")


def test_parameter_values(home):
    "Any parameter may get any value, one or several at a time."
    mutants = Mutants(8)
    training = [f"training.{name}" for name in ("crop", "lr", "scale", "name", "dataset", "test")]
    parts = ["parts.threshold", "parts.name", "parts.self"]
    names = [*Settings.model_fields, *training, *parts, "cls", "self", "", ".", "a.b.c"]
    with Tally("parameter values") as tally:
        for _ in range(3 * MANY):
            changes = {
                mutants.random.choice(names): mutants.random.choice(VALUES)
                for _ in range(mutants.random.choice((1, 1, 2, 5)))
            }
            tally(outcome(lambda changes=changes: check_settings(merge_parameters({}, changes))))


WORDS = some.text(some.characters(codec="utf-8"), max_size=40)


NAMES = [
    *Settings.model_fields,
    "training.lr",
    "training.scale",
    "parts.threshold",
    "scenes.size",
    "scenes.root",
    "encoder_options.depth",
    "encoder_options.checkpoint_path",
    "cls",
    "a.b",
]


def test_words_of_a_command_line(home, no_training):
    name = some.sampled_from(NAMES) | WORDS
    values = [json.dumps(v) for v in VALUES if isinstance(v, (str, int, float, list, dict))]
    yaml_like = some.from_regex(r"[\[{&*!-][a-z0-9 ,:\[\]{}&*!'\"-]{0,30}", fullmatch=True)
    text = WORDS | some.sampled_from(values) | yaml_like
    runner, n = CliRunner(), count()
    with Tally("words of a command line") as tally:

        @plan(
            max_examples=MANY, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        @given(some.lists(some.tuples(name, text), min_size=1, max_size=3))
        def go(pairs):
            words = [f"{k}={v}" for k, v in pairs]
            tally(outcome(lambda: check_settings(parse_words(words))))
            if next(n) % 4:
                return
            with limited():
                result = runner.invoke(app, ["inspect", "--", "nowhere", "7-1", *words])
            assert result.exit_code == 2, result.exception
            assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
            check_sentence(result.stderr)

        go()


def test_grids(home):
    mutants, path = Mutants(9), home / "g.yaml"
    texts = [p.read_text() for p in sorted((find_runs_folder() / "grids").glob("*.yaml"))]
    texts += [
        yaml.safe_dump(
            dict(
                parameters=small({}),
                grid={"method": ["mbs", "kd"], "training.lr": [1e-3, 1e-4], "seed": [0, 1]},
                runs=[dict(parts=dict(orthogonality=False)), dict(name="x")],
            )
        )
    ]
    with Tally("grids") as tally:
        for k in range(2 * MANY):
            path.write_bytes(mutants.change_text(mutants.random.choice(texts)))
            for settings in tally(outcome(lambda: expand_grid(read_grid(path)))) or ():
                assert settings.name.startswith("g/") or settings.name.count("/") == 1
            if k % 20 == 0:
                needs_data = b"voc" in path.read_bytes() or b"ade" in path.read_bytes()
                if not needs_data:
                    command("batch", path, "--dry-run", "--no-measure")


def test_a_grid_of_too_many_runs_is_refused(home):
    grid = {f"training.{name}": list(range(100)) for name in ("lr", "batch", "crop", "epochs")}
    with pytest.raises(ValueError, match="100,000,000 runs"):
        read_grid(dict(name="g", grid=grid)).points()


def plain_values(strings):
    return some.recursive(
        strings | some.integers() | some.floats() | some.booleans() | some.none(),
        lambda inner: some.lists(inner, max_size=3) | some.dictionaries(strings, inner, max_size=3),
        max_leaves=6,
    )


HARD = some.text(max_size=30) | some.sampled_from(
    [
        CODE,
        f'"\n{CODE}\n"',
        "'''",
        '"""',
        "\\",
        '\\"',
        "\\\n",
        f"'; {CODE}; '",
        "${x}",
        "{x}",
        "%time",
        "!ls",
        "\r\n",
        "\u2028",
        "\ud800",
        "\0",
    ]
)


def test_notebook_parameters_are_values(home):
    "The cell that papermill writes assigns each value unchanged, whatever a string contains."
    from papermill.translators import PythonTranslator

    with Tally("notebook parameters") as tally:

        @plan(max_examples=2 * MANY, deadline=None, database=None, derandomize=True)
        @given(plain_values(HARD))
        def go(value):
            tally(value if value is not None else 0)
            line = ast.parse(PythonTranslator.codify(dict(value=value))).body
            assert len(line) == 1
            expression = compile(ast.Expression(line[0].value), "", "eval")
            assigned = eval(expression, {"float": float, "__builtins__": {}})
            assert repr(assigned) == repr(value)

        go()


def test_notebook_parameters_through_a_kernel(home):
    "Values pass through a kernel unchanged, also in folders whose names papermill could take for a pattern."
    import nbformat

    values = [
        CODE,
        f'"\n{CODE}\n"',
        "'''\"\"\"",
        "\\",
        "${x} {x} %time",
        "\u2028\r\n\0",
        {"a'": [CODE, {'b"\n': None}]},
        [1e308, -0.0, True],
    ]
    parameters = nbformat.v4.new_code_cell("v0 = None", metadata=dict(tags=["parameters"]))
    show = nbformat.v4.new_code_cell("import json; print(json.dumps([globals()[f'v{k}'] for k in range(8)]))")
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, show]), home / "book.ipynb")
    folder = home / "{v0} {"
    folder.mkdir()
    execute_notebook(home / "book.ipynb", folder / "out.ipynb", {f"v{k}": v for k, v in enumerate(values)})
    printed = nbformat.read(folder / "out.ipynb", 4).cells[-1].outputs[0].text
    assert json.loads(printed) == values


# --- run folders


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A finished run of three steps, two columns and two sample pictures."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBS_HOME", str(tmp_path_factory.mktemp("home")))
        changes = dict(name="made", samples=2, training=TINY["training"] | dict(both=True))
        experiment = Experiment(Settings(**TINY | changes), tmp_path_factory.mktemp("outputs"))
        return experiment.run().folder


def read_all(folder, models=False):
    "Read a run as all parts of the package do, and check what is read."
    run = load_run(folder)
    n = len(run.names)
    records, steps = run.log(), range(run.n_steps)
    assert all(0 <= r["step"] < len(run.iterations) for r in records)
    collect_scalars(run)
    for t in steps:
        counts = run.confusion(t).counts
        assert counts.shape == (run.protocol[t].n_channels,) * 2
        assert (counts >= 0).all() and counts.sum() < 2**60
        for name in run.metrics(t).get("columns", {}):
            assert run.confusion(t, name).counts.shape == counts.shape
    if steps:
        assert ((run.iou() >= 0) & (run.iou() <= 1) | np.isnan(run.iou())).all()
    for photo, truth, predictions in run.samples():
        assert photo.shape == (*truth.shape, 3)
        assert ((truth < n) | (truth == VOID)).all()
        assert len(predictions) == len(steps)
        assert all((p < run.protocol[t].n_channels).all() for t, p in zip(steps, predictions))
    if run.finished:
        summarise_runs([run])
        make_card_table([run])
        [make_steps_table(group) for group in group_runs([run])]
    mbs.batch._read_status(folder)
    read_failure(folder / "train.ipynb")
    read_worker(folder)
    for t in steps if models else ():
        assert all(v.isfinite().all() for v in run.model(t).state_dict().values())
    return run


def test_tours(home, made):
    """A changed or incomplete notebook of `mbs explore` is opened, or refused.

    It is overwritten only if its cells are those that were written: others may hold a user's notes.
    """
    mutants, folder = Mutants(16), home / "run"
    shutil.copytree(made, folder)
    path = write_tour([folder])
    data = path.read_bytes()
    assert write_tour([folder]) == path and path.read_bytes() == data

    def sources(content: bytes) -> list:
        return [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(content)["cells"]]

    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"explore\.ipynb cannot be read: expected a notebook; remove the file"):
        write_tour([folder])
    with Tally("notebooks of run folders") as tally:
        for k in range(MANY):
            changed = json.dumps(mutants.change_tree(json.loads(data))).encode() if k % 2 else mutants.change(data)
            path.write_bytes(changed)
            tally(outcome(partial(write_tour, [folder])))
            assert path.read_bytes() == changed or sources(changed) == sources(data)


TREES = ["run.json", "step-01/metrics.json", "log.jsonl"]
FLAT = [*TREES, "step-00/confusion.npz", "step-02/confusion-clean.npz", "samples.npz", "step-01/samples.npz"]


@pytest.mark.parametrize("file", FLAT)
def test_run_folders(home, made, file):
    mutants, folder = Mutants(10), home / "run"
    shutil.copytree(made, folder)
    data = (folder / file).read_bytes()
    read_all(folder, models=True)

    def change(k):
        if file in TREES and k % 2:
            lines = [data] if file != "log.jsonl" else data.splitlines()
            at = mutants.random.randrange(len(lines))
            changed = json.dumps(mutants.change_tree(json.loads(lines[at]))).encode()
            return b"\n".join([*lines[:at], changed, *lines[at + 1 :]]) + b"\n"
        return mutants.change(data)

    with Tally("files of run folders") as tally:
        for k in range(2 * MANY if file in TREES else MANY):
            (folder / file).write_bytes(change(k))
            tally(outcome(partial(read_all, folder)))
            if k % 20 == 0:
                command("curves", home, "--write-only", home / "curves")
            if k % 20 == 10:
                outcome(partial(find_runs, [home]))


@pytest.mark.parametrize("file", FLAT[3:])
def test_foreign_arrays_are_refused(home, made, file):
    "Valid files may hold arrays of other types, shapes and values than a run's."
    mutants, folder = Mutants(11), home / "run"
    shutil.copytree(made, folder)
    arrays = dict(np.load(folder / file))
    wrong = (
        np.zeros(3),
        np.zeros((0, 0)),
        np.array("x"),
        np.array(3),
        np.array([b"a"]),
        np.full((5, 5), 2**63, np.uint64),
        np.full((5, 5), -1),
        np.eye(5),
        np.full((32, 32), 77, np.uint8),
        np.ones((32, 32, 3), np.uint8) * 255,
        np.zeros((32, 32), bool),
        np.array([1 + 2j]),
        np.zeros((32, 32, 1), np.uint8),
        np.zeros(1, [("a", int)]),
        np.array(["2020"], "datetime64[Y]"),
    )
    with Tally("files of run folders") as tally:
        for k in range(MANY):
            name = mutants.random.choice(list(arrays))
            if k % 3:
                changed = arrays | {name: mutants.random.choice(wrong)}
            else:
                changed = {("x" if key == name else key): v for key, v in arrays.items()}
            write_arrays(folder / file, **changed)
            tally(outcome(partial(read_all, folder)))
    np.savez(folder / file, **{next(iter(arrays)): np.array([Pickled(home)], dtype=object)}, allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        read_all(folder)


class Pickled:
    "An object that writes a file when it is unpickled."

    def __init__(self, home):
        self.home = home

    def __reduce__(self):
        return open, (str(self.home / "owned"), "w")


def test_files_that_are_missing_or_in_the_way(home, made):
    "Any file of a run folder may be gone, empty, a folder, another file, or a link to nothing."
    names = sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file())
    with Tally("run folders with a file missing or foreign") as tally:
        for name in names:
            for kind in ("gone", "empty", "folder", "link", "other"):
                folder = home / "run"
                shutil.copytree(made, folder)
                (folder / name).unlink()
                if kind == "empty":
                    (folder / name).touch()
                elif kind == "folder":
                    (folder / name).mkdir()
                elif kind == "link":
                    (folder / name).symlink_to("nowhere")
                elif kind == "other":
                    shutil.copy(made / names[(names.index(name) + 7) % len(names)], folder / name)
                tally(outcome(partial(read_all, folder, models=True)))
                shutil.rmtree(folder)


def test_models(home, made):
    "A changed model is refused, so a model that is read is the one that was written."
    mutants = Mutants(12)
    truth = load_run(made).model(1).state_dict()
    folder = home / "run"
    shutil.copytree(made, folder)
    file = folder / "step-01" / "model.safetensors"
    data = file.read_bytes()
    with Tally("models") as tally:
        for k in range(3 * MANY):
            changed = change_safetensors(mutants, data) if k % 2 else mutants.change(data, 3)
            file.write_bytes(changed)
            if (found := tally(outcome(partial(load_run(folder).model, 1)))) is None:
                continue
            is_equal = all(torch.equal(v, truth[name]) for name, v in found.state_dict().items())
            assert is_equal or b'"digest"' not in changed
            assert all(v.isfinite().all() for v in found.state_dict().values())


def test_states_of_a_running_step(home):
    "A changed checkpoint is ignored; only what was saved is restored."
    mutants = Mutants(13)
    progress = StepCheckpoints(home / "resume", 1)
    tensors = {
        "student.w": torch.randn(3, 5),
        "optimiser.0.step": torch.tensor(7.0),
        "window": torch.randn(2, 2),
        "half": torch.randn(4).half(),
    }
    progress.save(20, tensors, dict(best=[0.5, -float("inf")], terms=["loss"], scaler=None))
    (file,) = progress.list_files()
    data, (truth, facts) = file.read_bytes(), progress.load_latest()
    assert facts["iteration"] == 20 and tensors.keys() < truth.keys()
    with Tally("states of running steps") as tally:
        for k in range(3 * MANY):
            changed = change_safetensors(mutants, data) if k % 2 else mutants.change(data, 3)
            file.write_bytes(changed)
            with limited():
                found = progress.load_latest()
            tally(found)
            if found is not None and b'"digest"' in changed:
                assert json.dumps(found[1]) == json.dumps(facts)
                assert all(torch.equal(found[0][k], v) for k, v in truth.items())
    file.write_bytes(data)
    file.rename(file.with_stem("step-01-00000030"))
    assert progress.load_latest() is None, "a state under another iteration's name"


def test_states_of_another_run(home):
    "A valid checkpoint with foreign facts or tensors is refused in one sentence, or the run ends."
    mutants = Mutants(14)
    outputs = home / "outputs"
    training = TINY["training"] | dict(iterations=20)
    short = Settings(**TINY | dict(save_minutes=0, samples=0, protocol="7-1", training=training))

    class Stop(Exception):
        pass

    experiment = Experiment(short, outputs)
    real = experiment.writer.log

    def log(*records):
        real(*records)
        if records[0]["iteration"] == 20:
            raise Stop

    log.truncate, experiment.writer.log = real.truncate, log
    with pytest.raises(Stop):
        experiment.run()
    tensors, facts = experiment.writer.checkpoints(experiment.setup.protocol[0]).load_latest()
    assert facts["iteration"] == 10
    resume, before = outputs / "run" / "resume", (outputs / "run" / "log.jsonl").read_bytes()
    with Tally("states of another run") as tally:
        for _ in range(max(5, MANY // 20)):
            wrong = mutants.change_tree(facts)
            for file in resume.iterdir():
                file.unlink()
            shutil.rmtree(outputs / "run" / "step-00", ignore_errors=True)
            shutil.rmtree(outputs / "run" / "step-01", ignore_errors=True)
            (outputs / "run" / "log.jsonl").write_bytes(before)
            name = mutants.random.choice(list(tensors))
            other = mutants.random.choice(
                (torch.zeros(0), torch.zeros(3, dtype=torch.bool), tensors[name].double(), torch.zeros(2, 2))
            )
            iteration = wrong.get("iteration") if isinstance(wrong, dict) else None
            if not isinstance(iteration, int) or not 0 <= iteration < 10**8:
                iteration = 10
            if mutants.random.random() < 0.5:
                changed = tensors | {name: other}
            else:
                changed = {k: v for k, v in tensors.items() if k != name}
            save_tensors(resume / f"step-00-{iteration:08d}.safetensors", changed, wrong)
            tally(outcome(Experiment(short, outputs).run))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weight_files(home, ending):
    from safetensors.torch import save_file

    mutants, file = Mutants(15), home / f"w.{ending}"
    state = make_encoder("vit_tiny_patch16_224", image_size=16, **NETWORK).vit.state_dict()
    torch.save(state, file) if ending == "pth" else save_file(state, file)
    data = file.read_bytes()
    with Tally("weight files") as tally:
        for k in range(MANY):
            is_header = k % 2 and ending == "safetensors"
            file.write_bytes(change_safetensors(mutants, data) if is_header else mutants.change(data, 3))
            read = partial(make_encoder, "vit_tiny_patch16_224", str(file), 16, img_size=16, **NETWORK)
            encoder = tally(outcome(read))
            if encoder is None:
                continue
            for name, value in encoder.vit.state_dict().items():
                assert value.isfinite().all() and value.shape == state[name].shape


def test_a_run_card_cannot_load_code(home, made):
    "timm would unpickle or download a file that an option of the network names."
    folder = home / "run"
    shutil.copytree(made, folder)
    card = json.loads((folder / "run.json").read_text())
    torch.save(Pickled(home), home / "evil.pth")
    for options in (
        dict(checkpoint_path=str(home / "evil.pth")),
        dict(pretrained=True),
        dict(pretrained_cfg=dict(file=str(home / "evil.pth"))),
        dict(pretrained_cfg_overlay=dict(file=str(home / "evil.pth")), pretrained=True),
    ):
        settings = card["settings"] | dict(encoder_options=NETWORK | options)
        (folder / "run.json").write_text(json.dumps(card | dict(settings=settings)))
        with pytest.raises(ValueError, match="is not one of the network"):
            load_run(folder).model()


# --- commands, as processes


def test_commands(home, made):
    "Real processes end with exit code 2 and one sentence, or with a prediction."
    (home / "bad.yaml").write_bytes(b"\xff\xfe: [")
    (home / "photo.png").write_bytes(photos()["png"][:-40])
    (home / "good.png").write_bytes(photos()["png"])
    trials = [
        (["run", b"\xff\xfe"], 2),
        (["run", b"name=\xff\n\"'; touch owned"], 2),
        (["run", "cls=1"], 2),
        (["run", "training.name=x"], 2),
        (["run", "scenes.root=/"], 2),
        (["run", str(home / "bad.yaml")], 2),
        (["run", "data=a\nb"], 2),
        (["run", f"encoder_options.checkpoint_path={CODE}"], 2),
        (["predict", str(made), str(home / "photo.png"), "--out", str(home / "out")], 2),
        (["predict", str(made), str(home / "good.png"), "--out", str(home / "out")], 0),
        (["predict", str(home), str(home / "good.png"), "--out", str(home / "out")], 2),
        (["explore", str(home), "--no-browser"], 2),
        (["data", "check", str(home)], 2),
        (["report", str(home)], 2),
    ]
    with Tally("commands as processes") as tally:
        for words, code in trials[:: 1 if MANY > 100 else 6]:
            done = subprocess.run([sys.executable, "-m", "mbs", *words], capture_output=True, cwd=home, timeout=120)
            errors = done.stderr.decode()
            assert done.returncode == code and "Traceback" not in errors, (words, errors)
            if code:
                assert len([line for line in errors.splitlines() if line.startswith("mbs: ")]) == 1
            tally(None if code else done)
    if (home / "out" / "good-labels.png").exists():
        assert set(np.unique(read_mask(home / "out" / "good-labels.png"))) <= set(range(7))


def test_names_of_runs_stay_below_the_output_folder(home):
    "A name that is accepted leads to a folder below the outputs, and has no character that needs quoting."
    with Tally("names of runs") as tally:
        for name in [
            *map(str, VALUES),
            *(f"a{c}b" for c in string.printable),
            *(f"{c}a" for c in string.printable),
            "a/b/c",
            "a//b",
            "a/../b",
            "x" * 300,
            "..",
            ".",
            "a/..",
            "é",
            "con",
            "a/.b",
        ]:
            settings = tally(outcome(partial(Settings.checked, name=name)))
            if settings is not None:
                folder = (home / "outputs" / settings.name).resolve()
                assert folder.is_relative_to(home / "outputs")
                assert settings.name.count("/") < 2
                assert not set(settings.name) & set("\n\0 {}'\"<>&\\")
