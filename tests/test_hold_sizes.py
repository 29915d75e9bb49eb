"Sizes are read before values, and what is no regular file is refused at once."

import json
import os
import resource
import shutil
import socket
import tracemalloc
import zipfile
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image

import mbs.notebooks
from mbs.archives import read_archive
from mbs.cache import DecodedPictures
from mbs.checkpoint import load_model, load_tensors, save_tensors
from mbs.coco import CocoObject, draw_object, read_coco
from mbs.data import find_problems
from mbs.files import make_printable, parse_json, read_arrays, read_bytes, read_json
from mbs.folders import hash_file
from mbs.layouts import find_layout, read_lines
from mbs.lifeline import Interrupted
from mbs.notebooks import RunFailed, read_failure, read_worker
from mbs.parameter_files import is_within_limits, parse_value, parse_words, read_yaml
from mbs.pictures import read_image, read_mask
from mbs.prepare import _join_lines
from mbs.run import load_run, read_log, trained_run
from mbs.scenes import write_scenes
from mbs.slurm import Outcome

LIMIT = 64 << 20  # bytes that a refusal may take


@pytest.fixture(autouse=True)
def memory():
    "Refusals take little memory."
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LIMIT


@pytest.fixture
def run_folder(tmp_path):
    shutil.copytree(trained_run("mbs").folder, tmp_path / "run")
    return tmp_path / "run"


# --- no regular files


def make_pipe(path):
    os.mkfifo(path)
    return "a pipe"


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.chdir(here)
    return "a socket"


def make_device(path):
    path.symlink_to("/dev/zero")  # never ends
    return "a device"


def read_decoded(path):
    return DecodedPictures(path, "0" * 64, np.ones((1, 2), np.int64))


READERS = dict(
    archive=lambda path: list(read_archive(path, PurePosixPath)),
    decoded=read_decoded,
    lines=read_lines,
    json=read_json,
    arrays=read_arrays,
    bytes=lambda path: read_bytes(path, 100),
    digest=lambda path: hash_file(path, "sha256"),
    yaml=read_yaml,
    picture=read_image,
    mask=read_mask,
    coco=read_coco,
    tensors=load_tensors,
)


@pytest.mark.parametrize("make", [make_pipe, make_socket, make_device])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_refused(tmp_path, name, make):
    path = tmp_path / "file.png"
    kind = make(path)
    with pytest.raises(ValueError, match=f"is {kind}: expected a regular file"):
        READERS[name](path)


@pytest.mark.parametrize("make", [make_pipe, make_device])
def test_run_folders_with_other_than_files_are_refused(run_folder, make):
    "Every file of a run that is opened."
    run = load_run(run_folder)
    for name, read in {
        "step-03/confusion.npz": lambda: run.confusion(),
        "step-02/samples.npz": lambda: run.samples(),
        "samples.npz": lambda: run.samples(),
        "step-03/model.safetensors": lambda: run.model(),
    }.items():
        (run_folder / name).unlink()
        make(run_folder / name)
        with pytest.raises(ValueError, match="expected a regular file"):
            read()
        shutil.copy(trained_run("mbs").folder / name, run_folder / "copy")
        os.replace(run_folder / "copy", run_folder / name)
    for name in ("train.ipynb", ".worker"):
        (run_folder / name).unlink(missing_ok=True)
        make(run_folder / name)
    assert read_failure(run_folder / "train.ipynb") == "" and read_worker(run_folder) == {}


def test_a_data_set_with_a_pipe_is_checked(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.png")
        Image.new("L", (8, 8), 1).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "images" / "a.png").unlink()
    os.mkfifo(tmp_path / "images" / "a.png")
    (tmp_path / "dataset.yaml").write_text("classes: [x]\ntest: 0.5\n")
    problems = "\n".join(map(str, find_problems(tmp_path)))
    assert "images/a.png" in problems


def test_class_names_in_a_pipe_are_not_those_of_voc(tmp_path):
    "Without classes.txt, masks have VOC's classes; what cannot be read is no reason to take them."
    root = write_scenes(tmp_path / "data", 4, 2, size=16)
    (root / "classes.txt").unlink()
    make_pipe(root / "classes.txt")
    with pytest.raises(ValueError, match=r"classes\.txt cannot be read .* is a pipe"):
        find_layout(root)


def test_links_that_lead_to_each_other_are_no_pictures(tmp_path):
    root = write_scenes(tmp_path / "data", 4, 2, size=16)
    mask = next((root / "SegmentationClassAug").iterdir())
    mask.unlink()
    mask.symlink_to(mask.name)
    assert any(mask.name in str(problem) and "cannot be read" in str(problem) for problem in find_problems(root))


def test_a_folder_in_place_of_a_file_leaves_nothing_open(tmp_path):
    (tmp_path / "a.json").mkdir()
    n_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="Is a directory"):
        read_json(tmp_path / "a.json")
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_damaged_notes_of_workers_and_jobs_say_nothing(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / ".worker").write_text("[1]")
    (tmp_path / "slurm/7_outcome.json").write_text('{"ended": "x", "reason": [1], "is_stopped": true, "n_idle": 1.5}')
    assert read_worker(tmp_path) == {}
    assert Outcome.read(tmp_path, "7") == Outcome(is_stopped=True)


def test_an_archive_of_holes_is_read_at_once(tmp_path):
    "Readers of compressed archives skip zeros, for hours."
    with open(tmp_path / "a.tar", "wb") as file:
        file.truncate(1 << 40)
    assert list(read_archive(tmp_path / "a.tar", PurePosixPath)) == []


def test_coloured_masks_are_decoded_in_bands(tmp_path):
    "Codes of colours take four times the memory of a photo."
    picture = Image.new("RGB", (1200, 1200))
    picture.putpixel((1199, 1199), (1, 2, 3))
    picture.save(tmp_path / "a.png")
    colours = {(0, 0, 0): 0, (1, 2, 3): 7}
    mask = read_mask(tmp_path / "a.png", colours)
    assert mask.sum() == mask[-1, -1] == 7
    Image.new("RGB", (9, 9), (3, 2, 1)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"has the colour \(3, 2, 1\), which stands for no class"):
        read_mask(tmp_path / "b.png", colours)


def test_sentences_are_printable():
    assert make_printable("a\x1b[2J\0\n\u202e é") == r"a\x1b[2J\x00\n\u202e é"
    assert len(make_printable("\0" * 10**6)) < 4100


# --- JSON


@pytest.mark.parametrize("kind", [RunFailed, ValueError, Interrupted])
def test_the_last_sentence_of_a_run_is_printable(tmp_path, monkeypatch, capsys, kind):
    "A batch prints what the process of a run has said; the whole sentence is in its last line."

    def fail(*_):
        raise kind("class a\x1b[2J\nb")

    monkeypatch.setattr("mbs.notebooks.execute_notebook", fail)
    with pytest.raises(SystemExit) as ended:
        mbs.notebooks.main("a.ipynb", str(tmp_path / "run/train.ipynb"), "{}")
    said = capsys.readouterr().out.strip() if kind is Interrupted else ended.value.code
    assert said == "class a\\x1b[2J\\nb"


def test_what_a_preparation_says_is_printable():
    "Names of labels and files come from strangers' exports; each sentence is a line."
    assert _join_lines(["object a\x1b[2J\nb is lost", "c"]) == "object a\\x1b[2J\\nb is lost\nc"


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"a": 1, "a": 2}', "it has 'a' twice"),
        ('[{"b": {"a": 1, "c": 1, "a": 1}}]', "it has 'a' twice"),
        ("[1e999]", "1e999 is no finite number"),
        ("[-1E+400]", "no finite number"),
        (f"[{'9' * 400}]", "no finite number"),
        ("[" * 65 + "]" * 65, "more than 64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "more than 64 levels"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_json_beyond_the_limits_is_refused(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["[1e308, -1e-999, 1e0012]", '{"a": 1, "b": {"a": 1}}', "[" * 64 + "]" * 64, "[NaN]"])
def test_json_within_the_limits_is_read(tmp_path, text):
    "Scores of absent classes are NaN."
    (tmp_path / "a.json").write_text(text)
    assert repr(read_json(tmp_path / "a.json")) == repr(json.loads(text)) == repr(parse_json(text))


def test_dictionaries_and_lists_are_counted_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr("mbs.files._MAX_JSON_PARTS", 100)
    (tmp_path / "a.json").write_text("[" + "[]," * 98 + "{}]")
    assert len(read_json(tmp_path / "a.json")) == 99
    (tmp_path / "a.json").write_text("[" + "[]," * 99 + "{}]")
    monkeypatch.setattr("mbs.files.parse_json", None)
    with pytest.raises(ValueError, match="101 dictionaries and lists, more than 100"):
        read_json(tmp_path / "a.json")


def test_large_files_are_refused_unread(run_folder):
    "Files with holes are large and take no room."
    for name, read in {
        "run.json": lambda: read_json(run_folder / "run.json"),
        "log.jsonl": lambda: read_log(run_folder / "log.jsonl"),
        "samples.npz": lambda: load_run(run_folder).samples(),
        "a.yaml": lambda: read_yaml(run_folder / "a.yaml"),
        "step-00/model.safetensors": lambda: load_run(run_folder).model(0),
    }.items():
        with open(run_folder / name, "ab") as file:
            size = file.tell()
            file.truncate(1 << 40)
        with pytest.raises(ValueError, match="has 1,099,511,627,776 bytes: expected at most"):
            read()
        os.truncate(run_folder / name, size)


# --- YAML


def test_aliases_are_counted_before_they_are_written_out(tmp_path):
    "A few kilobytes stand for 10^7 and 10^30 values."
    wide = "a: &a [" + ",".join("0" * 3000) + "]\nb: [" + ",".join(["*a"] * 5000) + "]\n"
    deep = "a0: &a0 [x]\n" + "".join(f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 10)}]\n" for k in range(30))
    for text in (wide, deep):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ValueError, match="holds more than 100,000 values, or 20 levels"):
            read_yaml(tmp_path / "a.yaml")
    assert is_within_limits([[0] * 1000] * 99) and not is_within_limits([[0] * 1000] * 100)


def test_names_that_come_twice_are_refused(tmp_path):
    "YAML takes the last; a merged dictionary may be overridden."
    path = tmp_path / "a.yaml"
    for text in ("seed: 1\nname: a\nseed: 2\n", "training: {lr: 1, crop: 3, lr: 2}\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"it has '(seed|lr)' twice"):
            read_yaml(path)
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(path)["b"] == dict(x=3, y=2)


@pytest.mark.parametrize("text", ["1e999", "-1e400", "1.5E+999"])
def test_numbers_that_are_too_large_are_refused(text):
    with pytest.raises(ValueError, match="is too large for a number: expected at most 1e308"):
        parse_words([f"training.lr={text}"])
    assert parse_value("1e-999") == 0 and parse_value("1e3") == 1000


# --- arrays


def write_member(path, shape, content, dtype="|u1", copies=1):
    "Write a .npz whose head promises `shape` and that holds `content`, with other names for more copies."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for k in range(copies):
            with archive.open(f"counts{k or ''}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, dict(descr=dtype, fortran_order=False, shape=shape))
                for block in content:
                    file.write(block)


def test_arrays_are_unpacked_only_if_they_are_small(run_folder, tmp_path):
    "2 kB of zeros unpack to 2 MB; three arrays of 1 MB pass a limit that each of them keeps."
    path = run_folder / "step-03" / "confusion.npz"
    write_member(path, (2 << 20,), [bytes(2 << 20)])
    with pytest.raises(ValueError, match="it unpacks to 2,097,280 bytes, more than"):
        load_run(run_folder).confusion()
    write_member(path, (1 << 20,), [bytes(1 << 20)], copies=3)
    with pytest.raises(ValueError, match="it unpacks to 3,146,112 bytes, more than 3,000,000"):
        read_arrays(path, 3_000_000)
    assert len(read_arrays(path, 3_200_000)) == 3


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 62, 1 << 62), (3,), (0,), (5, -1)])
def test_heads_of_arrays_must_fit_their_content(tmp_path, shape):
    write_member(tmp_path / "a.npz", shape, [bytes(4)])
    with pytest.raises(ValueError, match="cannot be read"):
        read_arrays(tmp_path / "a.npz")


def test_a_long_list_of_files_is_refused(tmp_path):
    "The list is measured before zipfile makes an object of each line."
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros(1))
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\5\6")
    content[at + 12 : at + 16] = (20_000_000).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="it has more than 100,000 files"):
        read_arrays(path)
    path.write_bytes(bytes(content[:at]))
    with pytest.raises(ValueError, match="its list of files is missing"):
        read_arrays(path)


# --- tensors and polygons


def test_headers_of_tensors_are_measured(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((1 << 26).to_bytes(8, "little") + b"{" + b" " * 100)
    with pytest.raises(ValueError, match="its header has 67,108,864 bytes, more than"):
        load_tensors(path)
    model = torch.nn.Linear(2, 2)
    save_tensors(path, dict(weight=torch.zeros(5_000_000)))
    model.groups = [1]
    with pytest.raises(ValueError, match=r"has 20,000,\d+ bytes: expected at most"):
        load_model(model, path)


def test_long_polygons_are_refused():
    "pycocotools takes memory for each pixel of an outline and ends the process when there is none."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, the largest so far
    zigzag = [0.0, 0.0, 900.0, 900.0] * 5000
    with pytest.raises(ValueError, match="the outline of a polygon has more than 2,000,000 pixels"):
        draw_object(CocoObject(image_id=1, category_id=1, segmentation=[zigzag]).segmentation, 500, 500)
    assert draw_object([[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]], 10, 10).any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20
