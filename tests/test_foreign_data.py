"Data as other people keep them: file names, class names, photos and masks that do not fit, and content under any name."

import json
import os
import re
import shutil
import unicodedata
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mbs.augment import IMAGENET, ReleasedTransform, TestTransform, TrainTransform
from mbs.data import SegmentationFolder, find_problems, open_data
from mbs.folders import home as home_folder
from mbs.inference import segment
from mbs.layouts import check_class_names, describe_folder, find_layout
from mbs.parameter_files import read_yaml
from mbs.pictures import read_photo, read_photo_facts
from mbs.prepare import prepare_coco
from mbs.run import trained_run

PHOTO_ENDINGS = ("jpg", "jpeg", "jpe", "jfif", "png", "bmp", "tif", "tiff", "webp")
FORMATS = dict(jpg="JPEG", jpeg="JPEG", jpe="JPEG", jfif="JPEG", png="PNG", bmp="BMP", tif="TIFF", tiff="TIFF")


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, FORMATS.get(path.suffix[1:].lower(), "WEBP"), **options)


def make_folder(root, photos=("a.jpg", "b.jpg", "c.jpg"), masks=None, ids=(0, 1), **options):
    "An own folder whose masks hold `ids` in stripes; photos differ."
    for k, name in enumerate(photos):
        save(root / "images" / name, np.full((16, 16, 3), 20 * k, np.uint8))
    for name in masks or [f"{name.rsplit('.', 1)[0]}.png" for name in photos]:
        save(root / "masks" / name, np.repeat(np.resize(ids, 16), 16).reshape(16, 16).astype(np.uint8))
    return root


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_endings_and_forms_of_letters_do_not_matter(tmp_path_factory, data):
    "Every pair is found whatever case its endings have and however the accents of its names are stored."
    names = data.draw(
        st.lists(st.sampled_from(["a", "é", "Ångström", "x.y", "ü 1"]), min_size=2, max_size=4, unique=True)
    )
    form = st.sampled_from(["NFC", "NFD"])
    case = st.sampled_from([str.upper, str.lower, str.capitalize])

    def spell(name, endings):
        ending = data.draw(case)(data.draw(st.sampled_from(endings)))
        return f"{unicodedata.normalize(data.draw(form), name)}.{ending}"

    root = tmp_path_factory.mktemp("own")
    make_folder(root, [spell(n, PHOTO_ENDINGS) for n in names], [spell(n, ("png", "bmp")) for n in names])
    layout = describe_folder(root, ["x"], test=[unicodedata.normalize(data.draw(form), names[0])])
    assert layout.test.ids == [names[0]] and sorted(layout.train.ids) == sorted(names[1:])
    assert find_problems(root) == [] and len(SegmentationFolder(root)) == len(names) - 1


@pytest.mark.parametrize("ending", ["JPG", "jpeg", "png", "PNG", "tif"])
@pytest.mark.parametrize("line", ["{}", "JPEGImages/{}.jpg", "..\\photos\\{}.jpg", "\ufeff{}"])
def test_lists_of_other_programs(tmp_path, ending, line):
    "A list in VOC's shape may begin with a byte order mark, and name paths with endings."
    for k in range(4):
        save(tmp_path / "JPEGImages" / f"i{k}.{ending}", np.full((16, 16, 3), 20 * k, np.uint8))
        save(tmp_path / "SegmentationClassAug" / f"i{k}.PNG", np.ones((16, 16), np.uint8))
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    for name, ids in (("trainaug", "012"), ("val", "3")):
        text = "\r\n".join(line.format(f"i{k}") if k == ids[0] else line.strip("\ufeff").format(f"i{k}") for k in ids)
        (tmp_path / f"ImageSets/Segmentation/{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "classes.txt").write_text("\ufeffx\n", encoding="utf-8")
    layout = find_layout(tmp_path)
    assert layout.train.ids == ["i0", "i1", "i2"] and layout.test.ids == ["i3"] and layout.classes == ("x",)
    assert find_problems(tmp_path) == []


def test_whatever_is_left_out_is_said(tmp_path):
    photos = ("a.jpg", "b.jpg", "c.jpg", "e.heic", "more/g.jpg", "notes.txt")
    make_folder(tmp_path, photos, [f"{i}.png" for i in "abceg"] + ["a.bmp"])
    for name in (".DS_Store", "._a.jpg", "Thumbs.db", "desktop.ini"):
        (tmp_path / "images" / name).write_bytes(b"\0")
    (tmp_path / "masks/._a.png").write_bytes(b"\0")
    with pytest.warns(UserWarning, match="6 files of .* are not used, e.g. file .*e.heic is not read"):
        layout = describe_folder(tmp_path, ["x"], test=0.34)
    assert sorted(layout.train.ids + layout.test.ids) == ["a", "b", "c"]
    said = " ".join(find_problems(tmp_path))
    for part in ("e.heic is not read", "more is not read", "notes.txt is not read", "a.bmp is not read, but a.png"):
        assert part in said
    assert "e.png has no photo" in said and "g.png has no photo" in said and said.count("expected") == 6
    with pytest.warns(UserWarning, match="6 files of"):
        open_data(str(tmp_path))


def test_two_photos_of_one_name_are_refused(tmp_path):
    make_folder(tmp_path, ("a.jpg", "a.PNG", "b.jpg"), ("a.png", "b.png"))
    with pytest.raises(ValueError, match=r"a\.jpg and a\.PNG have the same name"):
        describe_folder(tmp_path, ["x"])


@pytest.mark.parametrize("extra", ["annotations", "ImageSets"])
def test_a_described_folder_is_read_as_described(tmp_path, extra):
    "Annotation tools leave folders that other layouts have, too."
    make_folder(tmp_path)
    (tmp_path / extra).mkdir()
    described = describe_folder(tmp_path, ["x"], test=0.34)
    assert find_layout(tmp_path) == described
    assert find_problems(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["_background_", "__ignore__", "BG", "unlabeled", "Unlabelled", "ignored", "void", " - "]
)
def test_names_of_no_class_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="expected names of ids 1, 2"):
        check_class_names(["cat", name], tmp_path)


def test_names_that_only_contain_them_are_classes(tmp_path):
    names = ("background vegetation", "ignorance", "avoid", "bgr")
    assert check_class_names(names, tmp_path) == names


@pytest.mark.parametrize(
    "classes", ["person", {"cat", "dog"}, dict(background=0, cat=1), dict(cat=1, dog=3), dict(cat=1, dog=1), 3, None]
)
def test_classes_that_have_no_order_are_refused(tmp_path, classes):
    make_folder(tmp_path)
    with pytest.raises(ValueError, match=r"classes .*: expected"):
        describe_folder(tmp_path, classes)
    assert not (tmp_path / "dataset.yaml").exists()


@given(st.permutations([f"c{k}" for k in range(12)]))
def test_names_with_ids_are_ordered_by_them(tmp_path_factory, names):
    root = make_folder(tmp_path_factory.mktemp("own"))
    given_ids = {name: i for i, name in enumerate(names, 1)}
    assert describe_folder(root, dict(sorted(given_ids.items()))).classes == tuple(names)


def test_a_class_without_a_pixel_is_a_problem(tmp_path):
    for tag, ids, classes, says in (
        ("binary", (0, 255), ["crack"], "class 'crack' .id 1.: .*255, which is void here: write the class as 1"),
        (
            "shifted",
            (0, 1, 2),
            ["road", "car", "sky"],
            "class 'sky' .id 3.: .*if the ids begin with 0, add a background",
        ),
        ("middle", (0, 2, 3), ["a", "b", "c"], "no mask holds class 'a' .id 1.: expected at least one$"),
    ):
        describe_folder(make_folder(tmp_path / tag, ids=ids), classes, test=0.34)
        (problem,) = find_problems(tmp_path / tag)
        assert re.search(says, problem), problem


@pytest.mark.parametrize("orientation", range(10))
def test_photos_that_exif_turns_are_named(tmp_path, orientation):
    make_folder(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "images/b.jpg", np.zeros((16, 16, 3), np.uint8), exif=exif)
    describe_folder(tmp_path, ["x"], test=0.34)
    problems = find_problems(tmp_path)
    facts = read_photo_facts(tmp_path / "images/b.jpg")
    assert facts.orientation == (orientation if 1 <= orientation <= 8 else 1)
    assert len(problems) == (2 <= orientation <= 8) and all("1 photos are shown turned" in p for p in problems)
    for chosen in ("stored", "shown"):
        describe_folder(tmp_path, ["x"], test=0.34, orientation=chosen)
        assert find_problems(tmp_path) == []


def test_photos_are_known_by_their_content(tmp_path, monkeypatch):
    "Equal file sizes make no copy, and a photo corrected in place is another photo."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    root, r = tmp_path / "own", np.random.default_rng(0)
    for k in range(8):
        save(root / "images" / f"p{k}.bmp", r.integers(0, 255, (16, 16, 3)).astype(np.uint8))
        save(root / "masks" / f"p{k}.png", np.full((16, 16), k == 0, np.uint8))
    describe_folder(root, ["x"], test=["p6", "p7"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, _ = open_data(str(root))
    for path in (root / "images").iterdir():
        save(path, np.ascontiguousarray(np.asarray(Image.open(path))[..., ::-1]))
    assert open_data(str(root))[0].fingerprint != train.fingerprint
    shutil.copy(root / "images/p1.bmp", root / "images/p7.bmp")
    with pytest.warns(UserWarning, match=r"1 test photos of .* are training photos, too, e\.g\. 'p7' is 'p1'"):
        open_data(str(root))


CHANGES = dict(  # of a folder → whether the data are others
    photo=lambda root: save(root / "images/b.png", np.full((16, 16, 3), 99, np.uint8)) or True,
    mask=lambda root: save(root / "masks/b.png", np.full((16, 16), 1, np.uint8)) or True,
    time=lambda root: os.utime(root / "images/a.png", (1, 1)),
    packing=lambda root: save(root / "masks/a.png", np.asarray(Image.open(root / "masks/a.png")), compress_level=0),
    stranger=lambda root: (root / "masks/.DS_Store").touch(),
    index=lambda root: [path.unlink() for path in root.glob(".mbs*")] and None,
)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.sampled_from(sorted(CHANGES)), min_size=1))
def test_data_are_others_where_their_content_is(tmp_path_factory, chosen):
    "Whatever else happens to the files of a folder that was opened before."
    root = make_folder(tmp_path_factory.mktemp("own"), ("a.png", "b.png", "c.png"))
    describe_folder(root, ["x"], test=["c"])
    before = SegmentationFolder(root).fingerprint
    is_changed = any([CHANGES[name](root) for name in chosen])
    assert (SegmentationFolder(root).fingerprint != before) == is_changed


def test_a_copied_folder_is_the_same_data(tmp_path):
    "Names of folders and times of files are not part of the data."
    describe_folder(make_folder(tmp_path / "a"), ["x"], test=0.34)
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(".mbs*"))
    assert SegmentationFolder(tmp_path / "a").fingerprint == SegmentationFolder(tmp_path / "b").fingerprint


def test_the_home_folder_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MBS_HOME", "~/mbs")
    assert home_folder("data", "voc") == tmp_path / "mbs/data/voc"


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "p.yaml").write_text("\ufeffmethod: kd\n", encoding="utf-8")
    assert read_yaml(tmp_path / "p.yaml") == dict(method="kd")


def make_coco(folder, objects, n_pictures=4, categories=((1, "cat"), (2, "dog"))):
    "Photos and a file in COCO's format with the given objects."
    for k in range(n_pictures):
        save(folder / "photos" / f"p{k}.jpg", np.full((32, 32, 3), 40 * k, np.uint8))
    content = dict(
        images=[dict(id=k, file_name=f"p{k}.jpg", width=32, height=32) for k in range(n_pictures)],
        categories=[dict(id=i, name=name) for i, name in categories],
        annotations=[dict(id=k, image_id=0, category_id=1, segmentation=SQUARE) | o for k, o in enumerate(objects)],
    )
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json", folder / "photos", folder / "made"


SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]
LARGE = [[0, 0, 32, 0, 32, 32, 0, 32]]


def count_pixels(made, picture, i):
    return int((np.asarray(Image.open(made / "masks" / f"p{picture}.png")) == i).sum())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            dict(
                image_id=st.sampled_from([0, "1", 2.0, " 3 ", 9, "x"]),
                category_id=st.sampled_from([1, "1", 2.0, 3]),
                segmentation=st.sampled_from([SQUARE, LARGE, [], None, [[1, 2]], [[0, 0, 1e9, 0, 1e9, 1e9]]]),
            )
        ),
        min_size=1,
        max_size=8,
    )
)
def test_every_coco_object_is_drawn_or_named(tmp_path_factory, objects):
    "A file that would lose an object is refused; with skip, the answer names each one, and the others are drawn."
    arguments = make_coco(tmp_path_factory.mktemp("coco"), objects)
    is_lost = [
        o["image_id"] in (9, "x") or o["category_id"] == 3 or o["segmentation"] not in (SQUARE, LARGE) for o in objects
    ]
    if any(is_lost):
        with pytest.raises(ValueError, match=f"{sum(is_lost)} of {len(objects)} objects of .* would be lost"):
            prepare_coco(*arguments)
    said = prepare_coco(*arguments, skip=True)
    for k, lost in enumerate(is_lost):
        assert (f"object {k} of" in said) == lost
    for picture in range(4):
        shown = [o for o, lost in zip(objects, is_lost) if not lost and float(o["image_id"]) == picture]
        drawn = count_pixels(arguments[2], picture, 1) + count_pixels(arguments[2], picture, 2)
        assert drawn == (1024 if LARGE in [o["segmentation"] for o in shown] else 100 if shown else 0)


@pytest.mark.parametrize("area", [dict(), dict(area=0), dict(area=-1), dict(area=1e9), dict(area="?")])
def test_the_size_of_an_object_is_that_of_its_shape(tmp_path, area):
    arguments = make_coco(tmp_path, [dict(segmentation=SQUARE) | area, dict(segmentation=LARGE, category_id=2) | area])
    prepare_coco(*arguments)
    assert count_pixels(arguments[2], 0, 1) == 100 and count_pixels(arguments[2], 0, 2) == 924


def test_crowds_everywhere_are_objects(tmp_path):
    "An exporter that marks everything as a crowd means objects; one crowd among objects is void."
    for tag, crowds, pixels in (("all", (1, 1), 100), ("one", (0, 1), 0)):
        objects = [dict(iscrowd=crowd, image_id=k) for k, crowd in enumerate(crowds)]
        arguments = make_coco(tmp_path / tag, objects)
        said = prepare_coco(*arguments)
        assert count_pixels(arguments[2], 1, 1) == pixels and count_pixels(arguments[2], 1, 255) == 100 - pixels
        assert ("drawn as objects" in said) == (tag == "all") and ("become void" in said) == (tag == "one")


def test_coco_says_what_is_not_used(tmp_path):
    arguments = make_coco(tmp_path, [dict(), dict(category_id=2)], categories=((1, "cat"), (2, "dog"), (3, "cow")))
    save(tmp_path / "photos/other.jpg", np.zeros((8, 8, 3), np.uint8))
    said = prepare_coco(*arguments, classes=["cat", "cow"])
    for line in (
        "objects: 2 given, 1 to draw, 0 lost",
        "1 objects are of categories that were not chosen",
        "categories without an object: cow",
        "3 pictures have no object",
        "1 photos in",
    ):
        assert line in said


def test_categories_are_ordered_by_the_value_of_their_ids(tmp_path):
    arguments = make_coco(tmp_path, [dict(category_id=10)], categories=(("10", "late"), (9, "early"), ("2", "first")))
    prepare_coco(*arguments)
    assert find_layout(arguments[2]).classes == ("first", "early", "late")


PHOTO = np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    "wrong",
    [
        (PHOTO / 255).astype(np.float32),
        PHOTO.astype(np.float64),
        PHOTO.astype(np.uint16) * 257,
        PHOTO > 99,
        PHOTO[..., 0],
        np.dstack([PHOTO, PHOTO[..., :1]]),
        PHOTO.transpose(2, 0, 1),
        PHOTO[None],
        PHOTO[:0],
        PHOTO.tolist(),
        Image.fromarray(PHOTO[..., 0].astype(np.uint16) * 257),
        Image.fromarray((PHOTO[..., 0] / 255).astype(np.float32)),
        torch.from_numpy(PHOTO),
        None,
    ],
    ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')} {getattr(x, 'shape', '')}",
)
def test_what_is_no_picture_is_refused(wrong):
    run = trained_run("mbs")
    calls = [run.predict, read_photo, lambda x: segment(run.model(), x, run.card.normalisation)]
    for call in calls:
        with pytest.raises(ValueError, match="is not a picture: expected a file, a PIL picture"):
            call(wrong)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([np.uint8, np.int8, np.bool_, np.uint16, np.int64, np.float16, np.float32, np.complex64, object]),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 16]), max_size=4),
)
def test_an_array_is_a_picture_or_refused(dtype, shape):
    "Nothing is stretched, cut or turned in silence."
    array = np.ones(shape, dtype)
    if dtype == np.uint8 and len(shape) == 3 and shape[2] == 3 and array.size:
        assert read_photo(array) is array
    else:
        with pytest.raises(ValueError, match="is not a picture: expected a file, a PIL picture"):
            read_photo(array)


LABELS = PHOTO[..., 0] % 3


@pytest.mark.parametrize("transform", [TrainTransform(32, IMAGENET), ReleasedTransform(32, IMAGENET), TestTransform()])
@pytest.mark.parametrize(
    "image, labels",
    [
        ((PHOTO / 255).astype(np.float32), LABELS),
        (PHOTO.astype(np.uint16), LABELS),
        (PHOTO[..., 0], LABELS),
        (PHOTO.transpose(2, 0, 1), LABELS),
        (np.dstack([PHOTO, LABELS]), LABELS),
        (PHOTO, LABELS.astype(np.int64)),
        (PHOTO, LABELS[:30]),
        (PHOTO[:0], LABELS[:0]),
        (PHOTO, PHOTO),
        (PHOTO.tolist(), LABELS),
        (Image.fromarray(PHOTO), LABELS),
        (torch.from_numpy(PHOTO), LABELS),
    ],
    ids=range(12),
)
def test_transforms_refuse_what_is_no_pair(transform, image, labels):
    transform(PHOTO, LABELS)
    with pytest.raises(ValueError, match=r"no picture and labels: expected arrays of uint8, \(H, W, 3\) and \(H, W\)"):
        transform(image, labels)


def test_all_forms_of_a_picture_give_one_prediction(tmp_path):
    run, file = trained_run("mbs"), tmp_path / "photo.png"
    Image.fromarray(PHOTO).save(file)
    expected = run.predict(PHOTO)
    for form in (
        file,
        str(file),
        Image.fromarray(PHOTO),
        Image.fromarray(PHOTO).convert("RGBA"),
        PHOTO[:, ::-1][:, ::-1],
    ):
        assert (run.predict(form) == expected).all()
