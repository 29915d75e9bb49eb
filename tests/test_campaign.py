"""Changed files of every format that mbs reads, thousands in one process.

What comes out is a sentence or the right value. A worker process may take 2 GiB more memory than at its start and ten
seconds for an input, and it leaves its surroundings as they are.
"""

import faulthandler
import gc
import json
import os
import re
import resource
import shutil
import signal
import traceback
import unicodedata
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import test_interruption
import torch
import yaml
from figures import kept
from mutants import PLACES, Mutants, change_any, put
from PIL import Image
from test_archives import FILES, tar, zipped
from test_exports import brush, polygon, shape, write_cvat, write_label_studio, write_labelme
from test_hold_links import read_surroundings
from test_mutations import (
    COLOURS,
    NETWORK,
    check_layout,
    check_sentence,
    check_settings,
    coco_file,
    ids,
    masks,
    own,
    photos,
    read_with_pillow,
    small,
    voc,
)
from test_safety import Elements

import mbs.batch
import mbs.notebooks
import mbs.orders
import mbs.slurm
from mbs.archives import read_archive
from mbs.cache import cache_pictures
from mbs.checkpoint import StepCheckpoints
from mbs.data import SegmentationFolder
from mbs.explore.tour import write_tour
from mbs.files import make_printable, write_arrays
from mbs.folders import find_runs_folder
from mbs.grid import expand_grid, read_grid
from mbs.identity import Identity
from mbs.identity_learning import load_identity, save_identity
from mbs.layouts import find_layout, find_reserved_id
from mbs.memory import Memory
from mbs.parameter_files import read_yaml
from mbs.parts import Parts
from mbs.pictures import read_image, read_image_size, read_mask
from mbs.prepare import prepare_coco, prepare_cvat, prepare_label_studio, prepare_labelme
from mbs.protocol import VOC_CLASSES, VOID
from mbs.run import load_run, read_exemplars, trained_run
from mbs.weights import make_encoder

forked = test_interruption.forked  # a fixture
MANY = int(os.environ.get("MBS_CAMPAIGN", 3))  # inputs of each format; 1,160 with make stress
SECONDS = 10  # for an input, of computation and waiting together
MEMORY = 2 << 30  # bytes that a worker process may take in addition


class Format(NamedTuple):
    "Files of a format, and how they are read."

    make: Callable[[Path], Any]  # writes sound files into an empty folder
    files: tuple[str, ...]  # of them, those that are changed
    read: Callable[[Path], Any]  # of the folder; ValueError in a sentence for what cannot be used
    check: Callable[[Path, Any], None]  # AssertionError unless what was read is what the files hold
    alone: bool = False  # whether `read` and `check` take the changed file instead of the folder


# --- pictures


def make_pictures(made: dict[str, bytes]) -> Callable[[Path], None]:
    "A function that writes pictures by name; those that mbs reads by their content have any ending."

    def make(place: Path):
        for name, content in made.items():
            (place / f"{name}.png").write_bytes(content)

    return make


def check_mask(colours: dict | None, path: Path, mask: np.ndarray):
    assert mask.dtype == np.uint8
    if colours is None:
        assert (mask == read_with_pillow(path, None)).all()
        return
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    for colour, value in colours.items():
        assert ((mask == value) == (pixels == colour).all(-1)).all()


def read_photo(path: Path):
    return read_image(path), read_image_size(path)


def check_photo(path: Path, found):
    photo, size = found
    assert photo.shape == (*size, 3)
    with Image.open(path) as picture:
        assert (photo == np.asarray(picture.convert("RGB"))).all()


# --- data sets


def make_voc(place: Path):
    place.rmdir()  # scenes are made in new folders
    voc(place)
    SegmentationFolder(place)  # writes the index


def check_names_of(layout):
    "Names of classes make no elements in the table of a notebook."
    assert {tag for tag, _ in Elements(layout._repr_html_()).found} <= {
        "table",
        "caption",
        "tbody",
        "tr",
        "td",
        "th",
        "b",
    }


def read_listed(file: Path) -> list[str]:
    lines = [line.strip() for line in file.read_bytes().decode("utf-8-sig").splitlines()]
    return [line for line in lines if line]


def check_voc(place: Path, layout):
    "A list names exactly the pictures that are read, and they are read as Pillow reads them."
    check_names_of(layout)
    names_file = place / "classes.txt"
    assert list(layout.classes) == (read_listed(names_file) if os.path.lexists(names_file) else [*VOC_CLASSES])
    for part, file in (("train", "trainaug"), ("test", "val")):
        names = read_listed(place / f"ImageSets/Segmentation/{file}.txt")
        data = SegmentationFolder(layout, part)
        assert len(data) == len(names)
        for k, name in enumerate(names):
            composed = unicodedata.normalize("NFC", name.replace("\\", "/"))
            assert data.layout.root == place and Path(data.images[k]).stem in (composed, PurePosixPath(composed).stem)
            photo, mask = data[k]
            assert (photo == np.asarray(Image.open(data.images[k]).convert("RGB"))).all()
            assert (mask == read_with_pillow(place / f"SegmentationClassAug/{data.images[k].stem}.png", None)).all()


def check_own(place: Path, layout):
    check_names_of(layout)
    for part in ("train", "test"):
        data = SegmentationFolder(layout, part)
        assert all(
            (data[k][0] == np.asarray(Image.open(data.images[k]).convert("RGB"))).all() for k in range(len(data))
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = yaml.safe_load((place / "dataset.yaml").read_bytes())["classes"]
    if all(isinstance(name, str) for name in given):
        assert list(layout.classes) == [str(name) for name in given]
    for path in (place / "masks").glob("*.png") if layout.colours else ():
        drawn = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).tolist()
        assert read_mask(path, layout.colours).ravel().tolist() == [layout.colours[tuple(rgb)] for rgb in drawn]


def make_ade(place: Path):
    rows = [f"{k}\t0.1\t2\t3\tclass {k}, another name" for k in range(1, 151)]
    (place / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    for part, n in (("training", 2), ("validation", 1)):
        for folder in ("images", "annotations"):
            (place / folder / part).mkdir(parents=True)
        for k in range(n):
            photo = np.random.default_rng(k + 9 * n).integers(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(photo).save(place / f"images/{part}/p{k}.jpg")
            Image.fromarray(ids((8, 8), 150)).save(place / f"annotations/{part}/p{k}.png")


def check_ade(place: Path, layout):
    check_names_of(layout)
    rows = read_listed(place / "objectInfo150.txt")[1:]
    assert list(layout.classes) == [row.split("\t")[-1].split(",")[0].strip() for row in rows]


def make_caches(place: Path):
    place.rmdir()
    voc(place)
    cache_pictures(SegmentationFolder(place))
    write_arrays(place / "similarity.npz", similarity=np.eye(3))


def read_caches(place: Path):
    data = SegmentationFolder(place)
    return data, cache_pictures(data), mbs.orders._read_similarity(place / "similarity.npz", 3)


def check_caches(place: Path, found):
    "What is damaged or another's is made anew."
    data, cached, similarity = found
    for k in range(len(data)):
        photo, mask = data[k]
        assert (photo == cached[k][0]).all() and (mask == cached[k][1]).all()
        assert (mask == read_with_pillow(place / f"SegmentationClassAug/{data.images[k].stem}.png", None)).all()
        assert data.counts[k].sum() == mask.size and tuple(data.sizes[k]) == mask.shape
    with np.errstate(all="ignore"):
        is_same = similarity is None or (similarity == np.load(place / "similarity.npz")["similarity"]).all()
    assert is_same


# --- annotations


def check_drawn(made: Path, objects: list[tuple[str, str, Any]]):
    """Each pixel of a mask has the class of an object that covers it, and only pixels without object have none.

    `objects`: name of the picture, name of the class, polygons or run lengths of pycocotools."""
    from pycocotools import mask as library

    layout = find_layout(made)
    check_layout(made)
    check_names_of(layout)
    assert {name for _, name, _ in objects} <= {*layout.classes}
    for path in (made / "masks").iterdir():
        drawn = np.asarray(Image.open(path))
        covered = np.zeros((len(layout.classes) + 1, *drawn.shape), bool)
        for picture, name, runs in objects:
            if picture == path.stem:
                if isinstance(runs, list):
                    runs = library.merge(library.frPyObjects(runs, *drawn.shape))
                covered[1 + layout.classes.index(name)] |= library.decode(runs) > 0
        assert (covered.any(0) == (drawn > 0)).all()
        chosen = np.where(drawn == VOID, covered.argmax(0), drawn)
        assert np.take_along_axis(covered, chosen[None], 0)[0][drawn > 0].all()


def read_coco_folder(place: Path):
    shutil.rmtree(place / "made", ignore_errors=True)
    return prepare_coco(place / "a.json", place / "photos", place / "made")


def check_coco(place: Path, said: str):
    content = json.loads((place / "a.json").read_bytes())
    names = {str(category["id"]): category["name"] for category in content["categories"]}
    pictures = {str(image["id"]): image["file_name"] for image in content["images"]}
    objects = []
    for item in content["annotations"]:
        shape = item.get("segmentation")
        if isinstance(shape, dict):
            from pycocotools import mask as library

            counts = shape["counts"]
            shape = library.frPyObjects(shape, *shape["size"]) if isinstance(counts, list) else dict(shape)
        elif shape:
            shape = [[float(value) for value in polygon] for polygon in shape]
        stem = PurePosixPath(str(pictures[str(item["image_id"])]).replace("\\", "/")).stem
        objects.append((stem, str(names[str(item["category_id"])]), shape))
    check_drawn(place / "made", objects)


def make_labelme(place: Path):
    small_shape = dict(label="dog", points=[[20, 15], [30, 15], [30, 20]], kind="polygon")
    for k in range(3):
        write_labelme(place / "in", f"p{k}", [shape(), shape(**small_shape)], "inside" if k == 1 else "photo")


def read_labelme_folder(place: Path):
    shutil.rmtree(place / "made", ignore_errors=True)
    return prepare_labelme(place / "in", place / "made")


def check_labelme(place: Path, said: str):
    objects = []
    for file in sorted((place / "in").glob("*.json")):
        if not file.is_file() or not isinstance(content := json.loads(file.read_bytes()), dict):
            continue
        for item in content.get("shapes", []):
            is_polygon = (item.get("shape_type") or "polygon") == "polygon"
            if not is_polygon or find_reserved_id(str(item["label"])) is not None:
                return  # circles, rectangles and labels of the background are drawn by other rules
            objects.append((file.stem, str(item["label"]), [[float(v) for point in item["points"] for v in point]]))
    check_drawn(place / "made", objects)


def make_label_studio(place: Path):
    (place / "photos").mkdir()
    for k in range(3):
        photo = np.full((24, 40, 3), 30 * k + 9, np.uint8)
        Image.fromarray(photo).save(place / f"photos/p{k}.jpg")
    dog = polygon([[20, 15], [30, 15], [30, 20]], labels=("dog",)) | dict(id="dog")
    write_label_studio(place, [[polygon(), dog], [dog], [brush()]])


def read_label_studio_file(place: Path):
    shutil.rmtree(place / "made", ignore_errors=True)
    return prepare_label_studio(place / "export.json", place / "photos", place / "made")


def check_label_studio(place: Path, said: str):
    "Only labels of the file are classes; pictures keep their bytes."
    check_layout(place / "made")
    check_names_of(find_layout(place / "made"))
    text = json.dumps(json.loads((place / "export.json").read_bytes()), ensure_ascii=False)
    for name in find_layout(place / "made").classes:
        assert json.dumps(name, ensure_ascii=False)[1:-1] in text
    for path in (place / "made/images").iterdir():
        assert path.read_bytes() == (place / "photos" / path.name).read_bytes()


def make_cvat(place: Path):
    write_cvat(place / "in", ["a", "b", "c"], lists=dict(train=["a", "b"], val=["c"]))


def make_cvat_archive(place: Path):
    export = write_cvat(place / "made-of", ["a", "b", "c"])
    with zipfile.ZipFile(place / "in.zip", "w") as archive:
        for path in sorted(export.rglob("*")):
            archive.write(path, path.relative_to(export))
    shutil.rmtree(export)


def read_cvat_export(name: str, place: Path):
    shutil.rmtree(place / "made", ignore_errors=True)
    return prepare_cvat(place / name, place / "made")


def check_cvat(place: Path, said: str):
    "Each pixel has the name that the map gives its colour."
    check_layout(place / "made")
    layout = find_layout(place / "made")
    check_names_of(layout)
    if not (place / "in").is_dir():
        return
    rows = [line.rsplit(":", 3) for line in read_listed(place / "in/labelmap.txt") if not line.startswith("#")]
    names = {(0, 0, 0): "background"} | {tuple(map(int, row[1].split(","))): row[0].strip() for row in rows}
    for path in (place / "made/masks").iterdir():
        drawn = np.asarray(Image.open(path))
        colours = np.asarray(Image.open(place / f"in/SegmentationClass/{path.name}").convert("RGB"))
        for colour, value in {(tuple(c), v) for c, v in zip(colours.reshape(-1, 3).tolist(), drawn.ravel().tolist())}:
            reserved = find_reserved_id(names[colour])
            assert value == (1 + layout.classes.index(names[colour]) if reserved is None else reserved)


def make_archives(place: Path):
    (place / "a.tar").write_bytes(tar({"a/b.png": masks()["grey"], "a/c.txt": b"x" * 999}))
    (place / "b.tgz").write_bytes(tar({"a/b.png": masks()["grey"], "c": b"y" * 99}, "w:gz"))
    (place / "c.zip").write_bytes(zipped({"a/b.png": masks()["grey"], "a/c.txt": b"x" * 999}))
    (place / "d.zip").write_bytes(FILES["ade"] if len(FILES["ade"]) < 50_000 else zipped({"q": b"1"}))


def read_members(path: Path) -> list[tuple[PurePosixPath, bytes]]:
    return list(read_archive(path, PurePosixPath))


def check_members(path: Path, members: list):
    for member, content in members:
        assert not member.is_absolute() and ".." not in member.parts and isinstance(content, bytes)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            stored = [archive.read(name) for name in archive.infolist() if not name.is_dir()]
        assert [content for _, content in members] == stored


# --- run folders


def make_run(place: Path):
    shutil.copytree(trained_run("mbs").folder, place, dirs_exist_ok=True)
    book = json.loads((find_runs_folder() / "train.ipynb").read_bytes())
    error = dict(output_type="error", ename="ValueError", evalue="too bad", traceback=["here"])
    book["cells"][-1] |= dict(cell_type="code", outputs=[error], metadata=dict(papermill=dict(exception=True)))
    (place / "train.ipynb").write_text(json.dumps(book))
    (place / "slurm").mkdir()
    (place / "slurm/7_outcome.json").write_text(json.dumps(dict(ended=True, reason=None, is_stopped=False, n_idle=1)))
    (place / ".worker").write_text(json.dumps(dict(host="here", pid=1, since=1.5)))
    (place / "tours").mkdir()
    write_tour([place], folder=place / "tours")
    (place / "exemplars.json").write_text(json.dumps(dict(positions=[0, 3, 5], steps=[0, 0, 1])))


def read_run(place: Path):
    "Read what reports, curves and explorers read."
    run = load_run(place)
    run.iou()
    run._repr_html_()
    return run, run.log(), [run.metrics(t) for t in range(run.n_steps)], run.samples()


def check_run(place: Path, found):
    run, log, metrics, samples = found
    card = json.loads((place / "run.json").read_bytes())
    assert run.names == card["names"] and run.settings.seed == card["settings"].get("seed", 0)
    assert run.protocol.steps == card["steps"] and run.iterations == card["iterations"]
    assert not {tag for tag, _ in Elements(run._repr_html_()).found} & {"img", "script", "a", "svg"}
    lines = (place / "log.jsonl").read_bytes().decode("utf-8-sig").split("\n")[:-1] if log else []
    assert repr(log) == repr([json.loads(line) for line in lines])
    kept_arrays = np.load(place / "samples.npz")
    for k, sample in enumerate(samples):
        assert (sample.photo == kept_arrays[f"image{k}"]).all() and (sample.truth == kept_arrays[f"truth{k}"]).all()
    for t, measured in enumerate(metrics):
        step = place / f"step-{t:02d}"
        assert repr(measured) == repr(json.loads((step / "metrics.json").read_bytes()))
        assert (run.confusion(t).counts == np.load(step / "confusion.npz")["counts"]).all()
        predicted = np.load(step / "samples.npz")
        assert all((sample.predictions[t] == predicted[f"predicted{k}"]).all() for k, sample in enumerate(samples))


def read_progress(place: Path):
    "Read what the table of a batch reads while a run writes, and what is asked about a stopped one."
    status = mbs.batch._read_status(place)
    job = SimpleNamespace(name="a", state="running", iterations=[9], reason="")
    job.status, job.earlier_error = status, mbs.notebooks.read_failure(place / "train.ipynb")
    printed = mbs.notebooks._read_printed(place / "train.ipynb")
    outcome = mbs.slurm.Outcome.read(place, "7")
    return mbs.batch._make_table_row(job, job), mbs.notebooks.read_worker(place), printed, outcome


def check_progress(place: Path, found):
    row, worker, printed, outcome = found
    assert all(isinstance(cell, str | None) for cell in row) and isinstance(worker, dict) and isinstance(printed, str)
    assert type(outcome.ended) is type(outcome.is_stopped) is bool and isinstance(outcome.reason, str | None)
    assert type(outcome.n_idle) is int


def read_tour(place: Path):
    return write_tour([place], folder=place / "tours")


def check_tour(place: Path, path: Path):
    assert path == place / "tours/explore.ipynb" and json.loads(path.read_bytes())["nbformat"] >= 4


def read_memory(place: Path):
    card = trained_run("mbs").card.model_copy(update=dict(memory=Memory(size=6)))
    return read_exemplars(place / "exemplars.json", card, 1)


def check_memory(place: Path, found):
    stored = json.loads((place / "exemplars.json").read_bytes())
    assert found.positions.tolist() == stored["positions"] and found.steps.tolist() == stored["steps"]


def check_model(place: Path, model):
    data = (place / "step-01/model.safetensors").read_bytes()
    stored = safetensors.torch.load(data)
    assert {*stored} == {*model.state_dict()}
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all() and torch.equal(tensor, stored[name])


def make_state(place: Path):
    facts = dict(best=[0.5, -float("inf")], terms=["loss"], scaler=None)
    tensors = {"student.w": torch.arange(15.0).reshape(3, 5), "optimiser.0.step": torch.tensor(7.0)}
    StepCheckpoints(place, 1).save(20, tensors, facts)


def check_state(place: Path, found):
    stored = safetensors.torch.load((place / "step-01-00000020.safetensors").read_bytes())
    assert all(torch.equal(found[0][name], tensor) for name, tensor in stored.items())


IDENTITY = Parts(identity="analytic", identity_width=8)


def make_identity(place: Path):
    identity = Identity(4, 8, 1.0, 0.5, 2.0)
    identity.means, identity.counts = torch.ones(2, 8).double(), torch.tensor([3.0, 2.0]).double()
    identity.weights, identity.known = torch.ones(8, 2), torch.tensor([1, 2])
    save_identity(identity, place / "a.safetensors")


def check_identity(place: Path, identity):
    stored = safetensors.torch.load((place / "a.safetensors").read_bytes())
    assert all(torch.equal(tensor, stored[name]) for name, tensor in identity.state_dict().items())


def make_weights(place: Path):
    state = make_encoder("vit_tiny_patch16_224", image_size=16, **NETWORK).vit.state_dict()
    torch.save(state, place / "a.pth")
    safetensors.torch.save_file(state, place / "a.safetensors")


def read_weights(path: Path):
    return make_encoder("vit_tiny_patch16_224", str(path), 16, img_size=16, **NETWORK)


def check_weights(path: Path, encoder):
    assert all(value.isfinite().all() for value in encoder.vit.state_dict().values())


# --- parameters


def make_parameter_files(place: Path):
    (place / "mine.yaml").write_text(yaml.safe_dump(small(dict(name="a", training=dict(crop=16, batch=2, lr=1e-3)))))
    (place / "short.yaml").write_text("name: x\ntraining: {lr: 1e-3, crop: 32, recipe: own}\nclasses: [ball, leaf]\n")


def check_parameters(path: Path, values: dict):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert {*values} == {*yaml.safe_load(path.read_bytes())}
    try:
        settings = check_settings(values)
    except ValueError as e:
        check_said(e)
        return
    assert settings.name == (values.get("name") or settings.name)
    assert not {tag for tag, _ in Elements(settings._repr_html_()).found} & {"img", "script", "a", "svg"}


def make_batches(place: Path):
    grid = {"method": ["mbs", "kd"], "training.lr": [1e-3, 1e-4], "seed": [0, 1]}
    content = dict(parameters=small({}), grid=grid, runs=[dict(parts=dict(orthogonality=False)), dict(name="x")])
    (place / "g.yaml").write_text(yaml.safe_dump(content))


def check_batch(path: Path, settings: list):
    names = [one.name for one in settings]
    assert len({*names}) == len(names) and all(re.fullmatch(r"[^/]+/[^/]+", name) for name in names)


STEP_FILES = ("step-01/metrics.json", "step-01/confusion.npz", "step-02/samples.npz")
GROUPS = {
    "pictures": {
        "masks": Format(
            make_pictures({k: v for k, v in masks().items() if k not in ("colours", "bmp")}),
            ("palette.png", "packed.png", "grey.png", "void.png", "one.png", "deep.png"),
            read_mask,
            partial(check_mask, None),
            alone=True,
        ),
        "coloured masks": Format(
            make_pictures(dict(a=masks()["colours"])),
            ("a.png",),
            partial(read_mask, meaning=COLOURS),
            partial(check_mask, COLOURS),
            alone=True,
        ),
        "photos": Format(
            make_pictures({k: v for k, v in photos().items() if k not in ("deep", "gif", "float")}),
            tuple(f"{k}.png" for k in photos() if k not in ("deep", "gif", "float")),
            read_photo,
            check_photo,
            alone=True,
        ),
        "archives": Format(make_archives, ("a.tar", "b.tgz", "c.zip", "d.zip"), read_members, check_members, True),
    },
    "data sets": {
        "lists and classes of VOC": Format(
            make_voc,
            ("classes.txt", "ImageSets/Segmentation/trainaug.txt", "ImageSets/Segmentation/val.txt"),
            check_layout,
            check_voc,
        ),
        "pictures of VOC": Format(
            make_voc,
            ("JPEGImages/train_00002.png", "SegmentationClassAug/test_00001.png", ".mbs-index-train.npz"),
            check_layout,
            check_voc,
        ),
        "dataset.yaml": Format(own, ("dataset.yaml",), check_layout, check_own),
        "classes of ADE20K": Format(make_ade, ("objectInfo150.txt",), find_layout, check_ade),
        "caches": Format(
            make_caches,
            (".mbs-index-train.npz", ".mbs-decoded-train.npy", "similarity.npz"),
            read_caches,
            check_caches,
        ),
        "COCO": Format(coco_file, ("a.json",), read_coco_folder, check_coco),
        "labelme": Format(make_labelme, ("in/p0.json", "in/p1.json"), read_labelme_folder, check_labelme),
        "Label Studio": Format(make_label_studio, ("export.json",), read_label_studio_file, check_label_studio),
        "CVAT": Format(
            make_cvat,
            ("in/labelmap.txt", "in/ImageSets/Segmentation/val.txt", "in/SegmentationClass/b.png"),
            partial(read_cvat_export, "in"),
            check_cvat,
        ),
        "archives of CVAT": Format(make_cvat_archive, ("in.zip",), partial(read_cvat_export, "in.zip"), check_cvat),
    },
    "runs": {
        "run.json": Format(make_run, ("run.json",), read_run, check_run),
        "log.jsonl": Format(make_run, ("log.jsonl",), read_run, check_run),
        "files of steps": Format(make_run, (*STEP_FILES, "samples.npz"), read_run, check_run),
        "progress of runs": Format(
            make_run,
            ("log.jsonl", "train.ipynb", ".worker", "slurm/7_outcome.json", "step-03/metrics.json"),
            read_progress,
            check_progress,
        ),
        "tours": Format(make_run, ("tours/explore.ipynb",), read_tour, check_tour),
        "exemplars": Format(make_run, ("exemplars.json",), read_memory, check_memory),
        "models": Format(make_run, ("step-01/model.safetensors",), lambda place: load_run(place).model(1), check_model),
        "saved states": Format(
            make_state,
            ("step-01-00000020.safetensors",),
            lambda place: StepCheckpoints(place, 1).load_latest(),
            check_state,
        ),
        "identities": Format(
            make_identity,
            ("a.safetensors",),
            lambda place: load_identity(place / "a.safetensors", IDENTITY, 2),
            check_identity,
        ),
    },
    "parameters": {
        "parameter files": Format(
            make_parameter_files, ("mine.yaml", "short.yaml"), read_yaml, check_parameters, alone=True
        ),
        "batch files": Format(
            make_batches, ("g.yaml",), lambda path: expand_grid(read_grid(path)), check_batch, alone=True
        ),
        "weight files": Format(make_weights, ("a.pth", "a.safetensors"), read_weights, check_weights, True),
    },
}


# --- workers


def save_files(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def restore(path: Path, data: bytes):
    "Put a sound file back in the place of whatever is there."
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(data)


def change_file(mutants: Mutants, path: Path, data: bytes, neighbour: Path) -> str:
    "Change a file, or put something else in its place; return what was done."
    if mutants.random.random() < 0.1:
        kind = mutants.random.choice(PLACES)
        put(kind, path, neighbour)
        return kind
    path.write_bytes(change_any(mutants, data, path.name))
    return "changed"


def check_said(error: Exception):
    "Check the sentence that a command prints: one line without commands for the terminal."
    said = make_printable(error)
    check_sentence(said)
    assert not re.search(r"[\x00-\x1f\x7f\u202e]", said)


def try_input(form: Format, place: Path, file: Path) -> bool:
    "Read a folder, or a file of it, and check what comes out; return whether it was refused."
    place = file if form.alone else place
    try:
        found = form.read(place)
    except (ValueError, FileNotFoundError) as e:
        check_said(e)
        return True
    signal.setitimer(signal.ITIMER_REAL, 0)  # the check is ours
    if found is not None:
        form.check(place, found)
    return found is None


class Failures(list):
    "Inputs that were neither used correctly nor refused in a sentence."

    def add(self, name: str, k: int, file: Path, what: str, keep: Path):
        if file.is_file() and file.stat().st_size < 1 << 22:
            shutil.copy(file, keep / f"{name}-{k}-{file.name}")
        self.append(f"{name}, input {k} ({file.name}, {what}): {''.join(traceback.format_exc()[-1500:])}")


def try_format(name: str, form: Format, place: Path, told: Path, failures: Failures) -> tuple[int, int]:
    "Try `MANY` changes of a format; return how many, and how many were refused."
    place.mkdir()
    form.make(place)
    sound = save_files(place)
    for file in form.files:
        assert not try_input(form, place, place / file), f"{name}: the sound {file} is refused"
    n_refused = 0
    for k in range(MANY):
        mutants = Mutants(f"{name} {k}")
        file = place / mutants.random.choice(form.files)
        told.write_text(f"{name}, input {k}")
        what = change_file(mutants, file, sound[file], told.parent / "around/neighbour")
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # ends the process
        try:
            n_refused += try_input(form, place, file)
        except Exception:
            signal.setitimer(signal.ITIMER_REAL, 0)
            failures.add(name, k, file, what, told.parent / "kept")
        signal.setitimer(signal.ITIMER_REAL, 0)
        restore(file, sound[file])
        for path in set(sound) - {file}:
            if path.suffix in (".npz", ".npy") and (not path.is_file() or path.read_bytes() != sound[path]):
                restore(path, sound[path])  # caches follow the files that they are of
    return MANY, n_refused


def measure_memory(name: str) -> int:
    "Return a line of this process's status, such as VmHWM, in bytes."
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def list_open() -> set[str]:
    "Return what the open files of this process are."
    return {os.readlink(entry) for entry in map(str, Path("/proc/self/fd").iterdir()) if os.path.islink(entry)}


def work(group: str, folder: Path):
    "Try all formats of a group, with little memory, and write what happened to `folder`."
    around = folder / "around"
    os.environ |= dict(HOME=str(around / "home"), MBS_HOME=str(around / "home"))
    os.chdir(around / "here")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faulthandler.register(signal.SIGALRM, all_threads=False, chain=True)  # says where it hangs
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = measure_memory("VmRSS")
    limit = measure_memory("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    surroundings = read_surroundings(around)
    failures, counts = Failures(), {}
    for name, form in GROUPS[group].items():
        opened = list_open()
        counts[name] = try_format(name, form, around / "work", folder / "told", failures)
        shutil.rmtree(around / "work")
        gc.collect()
        if left := list_open() - opened:
            failures.append(f"{name}: {left} stay open")
    took = measure_memory("VmHWM") - before
    if changed := read_surroundings(around).items() ^ surroundings.items():
        failures.append(f"files outside the folder have changed: {sorted(changed)}")
    (folder / "result.json").write_text(json.dumps(dict(counts=counts, failures=failures, took=took)))


@pytest.mark.parametrize("group", GROUPS)
def test_changed_files_are_refused_or_read_right(tmp_path, forked, group):
    for name in ("home", "here", "neighbour"):
        (tmp_path / "around" / name).mkdir(parents=True)
        (tmp_path / "around" / name / "file").write_text("name: precious\n")
    (tmp_path / "kept").mkdir()  # of inputs that fail
    process = forked.Process(target=work, args=(group, tmp_path))
    process.start()
    process.join(3000)
    last = (tmp_path / "told").read_text() if (tmp_path / "told").is_file() else "the end"
    assert process.exitcode == 0, f"the process ended with {process.exitcode} at {last}"
    found = json.loads((tmp_path / "result.json").read_text())
    assert not found["failures"], f"{len(found['failures'])} failures\n" + "\n\n".join(found["failures"][:6])
    assert found["took"] < MEMORY
    for name, (n_tried, n_refused) in found["counts"].items():
        assert MANY < 50 or 0 < n_refused or name == "caches", f"{name}: nothing was refused"
        kept(f"changed files tried: {name}", n_tried)
        kept(f"changed files refused: {name}", n_refused)
    kept("processes for changed files that stayed below 2 GiB, without a hang or a file written elsewhere", 1)
