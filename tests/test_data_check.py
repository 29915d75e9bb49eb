"What photos show and masks hold is checked against each other, and nothing is silently turned or renumbered."

import json
import shutil
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from typer.testing import CliRunner

from mbs import Settings, describe_folder
from mbs.cache import cache_pictures
from mbs.cli import app
from mbs.data import SegmentationFolder, check_data, find_problems, open_data
from mbs.explore.states import read_sample
from mbs.layouts import CITYSCAPES_CLASSES, COCO_STUFF_CLASSES, find_layout
from mbs.pictures import read_photo
from mbs.protocol import VOID, Protocol

HEIGHT, WIDTH = 20, 32


def draw(seed, height=HEIGHT, width=WIDTH):
    "A photo as people see it, whose red pixels are the class of its mask."
    r = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    top, left = r.integers(0, height - 8), r.integers(0, width - 8)
    mask[top : top + 6, left : left + 7] = 1
    photo = np.where(mask[..., None] > 0, (230, 20, 20), (20, 40, 60)).astype(np.uint8)
    photo[0, 0] = seed  # every photo is another one
    return photo, mask


def store(shown, orientation, path):
    "Write a photo with an EXIF orientation so that it is shown as `shown`."
    exif = Image.Exif()
    exif[0x0112] = orientation
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    undo = Image.Exif()
    undo[0x0112] = inverse
    picture = Image.fromarray(shown)
    picture.getexif().update(undo)
    stored = ImageOps.exif_transpose(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(stored)).save(path, exif=exif, **({"quality": 98} if path.suffix == ".jpg" else {}))
    return np.asarray(stored)


def is_aligned(photo, mask):
    "Whether the class lies on the red pixels; JPEG blurs the edges."
    return ((photo[..., 0] > 120) == (mask == 1)).mean() > 0.97


def make_turned(root, orientations, ending="png", size=(HEIGHT, WIDTH), mask_as="shown"):
    "A folder of photos with EXIF orientations and masks of what is shown, or of what is stored."
    for k, orientation in enumerate(orientations):
        shown, mask = draw(k, *size)
        stored = store(shown, orientation, root / f"images/p{k}.{ending}")
        if mask_as == "stored":
            mask = (stored[..., 0] > 120).astype(np.uint8)
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / f"masks/p{k}.png")
    return root


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("mask_as", ["shown", "stored"])
def test_a_mask_that_fits_one_size_decides_how_its_photo_is_read(tmp_path, ending, mask_as):
    "Quarter turns of photos that are not square: photo, mask, index, cache and copies agree, and nobody is asked."
    make_turned(tmp_path / "a", (5, 6, 7, 8, 1), ending, mask_as=mask_as)
    describe_folder(tmp_path / "a", ["red"], test=["p4"])
    assert find_problems(tmp_path / "a") == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, test = open_data(str(tmp_path / "a"))
    assert train.turned.tolist() == [mask_as == "shown"] * 4 and test.turned.tolist() == [False]
    for data in (train, cache_pictures(train), SegmentationFolder(tmp_path / "a")):
        for k in range(4):
            photo, mask = data[k]
            assert is_aligned(photo, mask) and mask.shape == tuple(train.sizes[k])
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(".mbs*"))
    assert SegmentationFolder(tmp_path / "b").fingerprint == train.fingerprint


@pytest.mark.parametrize("orientation", [2, 3, 4, 6])
def test_photos_that_fit_both_ways_are_asked_about(tmp_path, orientation):
    "Mirrored, upside-down and square photos: a warning and a problem, until somebody has chosen."
    root = make_turned(tmp_path, [orientation] * 3, size=(24, 24) if orientation == 6 else (HEIGHT, WIDTH))
    prints = {}
    for chosen, aligned in (("auto", False), ("stored", False), ("shown", True)):
        describe_folder(root, ["red"], test=["p2"], orientation=chosen)
        problems = find_problems(root)
        assert len(problems) == (chosen == "auto")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train, _ = open_data(str(root))
        texts = [str(warning.message) for warning in said]
        assert len(texts) == 2 * (chosen == "auto") and all("orientation 'shown' or 'stored'" in t for t in texts)
        assert is_aligned(*train[0]) == aligned
        cached = cache_pictures(train)  # the cache of the other choice is not used
        assert all((a == b).all() for a, b in zip(cached[0], train[0]))
        prints[chosen] = train.fingerprint
    assert prints["auto"] == prints["stored"] != prints["shown"]


def test_a_chosen_orientation_must_fit(tmp_path):
    root = make_turned(tmp_path, [6, 6, 6])
    describe_folder(root, ["red"], test=["p2"], orientation="stored")
    assert all("fits the photo as shown, so use orientation 'auto' or 'shown'" in p for p in find_problems(root)[:3])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=4), st.sampled_from(["auto", "shown"]), st.booleans())
def test_any_mixture_of_orientations_is_aligned_or_named(tmp_path_factory, orientations, chosen, is_square):
    root = tmp_path_factory.mktemp("exif")
    make_turned(root, orientations, size=(20, 20) if is_square else (HEIGHT, WIDTH))
    describe_folder(root, ["red"], test=["p0"], orientation=chosen)
    doubtful = [o for o in orientations if 2 <= o <= 4 or (is_square and 5 <= o <= 8)]
    named = [p for p in find_problems(root) if f"{len(doubtful)} photos are shown turned" in p]
    assert bool(named) == (chosen == "auto" and bool(doubtful))
    for part in ("train", "test"):
        data = SegmentationFolder(root, part)
        for k, (i, is_turned) in enumerate(zip(data.ids, data.turned)):
            sure = chosen == "shown" or orientations[int(i[1:])] not in doubtful
            assert not sure or is_aligned(*data[k])
            assert is_turned == (orientations[int(i[1:])] in range(2, 9) and (chosen == "shown" or sure))


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_pictures_to_predict_are_read_as_people_see_them(tmp_path, ending):
    for orientation in range(1, 9):
        shown, mask = draw(orientation)
        file = tmp_path / f"{orientation}.{ending}"
        store(shown, orientation, file)
        for form in (file, str(file), Image.open(file)):
            assert read_photo(form).shape == shown.shape and is_aligned(read_photo(form), mask)
        assert read_sample((file, mask), 2).photo.shape == shown.shape


def test_an_explorer_takes_the_truth_of_a_stored_photo(tmp_path):
    stored = store(draw(1)[0], 6, tmp_path / "p.png")
    truth = (stored[..., 0] > 120).astype(np.uint8)
    sample = read_sample((tmp_path / "p.png", truth), 2)
    assert is_aligned(sample.photo, sample.truth)


def save_palette(path, ids, palette):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(ids)
    picture.putpalette(bytes(palette))
    picture.save(path)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_palettes_that_differ_in_a_used_id_are_named(tmp_path_factory, data):
    "Only the ids that masks hold are compared; the order of masks, trimmed palettes and grey masks do not matter."
    root, r = tmp_path_factory.mktemp("palettes"), np.random.default_rng(data.draw(st.integers(0, 99)))
    base = r.integers(0, 256, (256, 3)).astype(np.uint8)
    differing = data.draw(st.sets(st.integers(0, 5)))
    n, odd = 5, data.draw(st.integers(0, 4))
    for k in range(n):
        (root / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 30 * k, np.uint8)).save(root / f"images/p{k}.png")
        ids = np.resize(np.arange(4), 64).reshape(8, 8).astype(np.uint8)  # ids 4 and 5 are in the palettes alone
        palette = base.copy()
        for i in differing if k == odd else ():
            palette[i] = 255 - palette[i]
        save_palette(root / f"masks/p{k}.png", ids, palette[: data.draw(st.sampled_from([6, 256]))].ravel().tolist())
    describe_folder(root, ["a", "b", "c"], test=0.2)
    problems = find_problems(root)
    is_named = any("palettes of the masks differ" in p and f"'p{odd}'" in p for p in problems)
    assert is_named == bool(differing & {0, 1, 2, 3}) == bool(problems)


def test_grey_palettes_say_nothing(tmp_path):
    for k in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 30 * k, np.uint8)).save(tmp_path / f"images/p{k}.png")
        palette = np.arange(256).repeat(3) if k % 2 else np.arange(768) * 7 % 256
        save_palette(tmp_path / f"masks/p{k}.png", np.eye(8, dtype=np.uint8), palette.tolist())
    describe_folder(tmp_path, ["a"], test=0.25)
    check = check_data(tmp_path)
    assert check.problems == [] and check.rows[1]["colour"] == (21, 28, 35) and check.rows[-1]["colour"] is None


def test_opening_warns_of_palettes_that_differ_every_time(tmp_path):
    for k in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 30 * k, np.uint8)).save(tmp_path / f"images/p{k}.png")
        save_palette(tmp_path / f"masks/p{k}.png", np.eye(8, dtype=np.uint8), [0, 0, 0, 10 * k, 200, 0])
    describe_folder(tmp_path, ["a"], test=["p2"])
    for _ in range(2):  # read, then from the stored index
        with pytest.warns(UserWarning, match="palettes of the masks differ"):
            open_data(str(tmp_path))


@given(st.lists(st.sets(st.integers(1, 3)), min_size=3, max_size=6))
@settings(max_examples=30, deadline=None)
def test_the_table_counts_what_the_masks_hold_and_names_what_a_part_lacks(tmp_path_factory, held):
    root = tmp_path_factory.mktemp("table")
    for k, ids in enumerate(held):
        (root / "images").mkdir(exist_ok=True)
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 9 * k, np.uint8)).save(root / f"images/p{k}.png")
        mask = np.full((4, 4), VOID, np.uint8)
        for i in ids:
            mask[i] = i
        Image.fromarray(mask).save(root / f"masks/p{k}.png")
    describe_folder(root, ["a", "b", "c"], test=["p0"])
    check = check_data(root)
    assert [(row["id"], row["name"]) for row in check.rows] == [
        (0, "background"), (1, "a"), (2, "b"), (3, "c"), (VOID, "void")
    ]  # fmt: skip
    for row in check.rows[1:4]:
        in_train, in_test = sum(row["id"] in ids for ids in held[1:]), row["id"] in held[0]
        assert (row["train pictures"], row["train pixels"]) == (in_train, 4 * in_train)
        assert (row["test pictures"], row["test pixels"]) == (in_test, 4 * in_test)
        named = [p for p in check.problems if f"class {row['name']!r}" in p]
        assert len(named) == (not in_train or not in_test)
        lacking = "no mask holds" if not in_train and not in_test else "train" if not in_train else "test"
        assert all(lacking in p for p in named)
    seen = set().union(*held)
    shown = {i for part, k in check.choose_samples() for i in held[int(getattr(check.layout, part).ids[k][1:])]}
    assert shown == seen or len(held) > 3


def test_the_command_shows_table_and_figure(tmp_path):
    root = make_turned(tmp_path / "own", [1, 6, 1, 8])
    describe_folder(root, ["[bold]red"], test=0.25)
    answer = CliRunner().invoke(app, ["data", "check", str(root), "--figure", str(tmp_path / "f.png")])
    assert answer.exit_code == 0 and "[bold]red" in answer.output and answer.output.endswith("image–mask pairs\n")
    assert "126" in answer.output and Image.open(tmp_path / "f.png").width > 300


CITIES = {"train": ("ulm", "aachen"), "val": ("bonn",)}
CITY_LABELS = dict(zip(CITYSCAPES_CLASSES, (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)))


def make_cityscapes(root, endings=("labelIds", "labelTrainIds"), extra=()):
    "A tree of Cityscapes' shape: picture k of a city holds road and the k-th class, and labels that are no classes."
    held = {}
    for part, cities in CITIES.items():
        for city in cities:
            for k in range(0, 19, 1 if part == "train" else 3):
                name = f"{city}_{k:06}_000019"
                labels = np.full((4, 6), 4, np.uint8)  # "static", void
                labels[1], labels[2, :3], labels[3, 0] = 7, CITY_LABELS[CITYSCAPES_CLASSES[k]], 0
                table = np.full(256, VOID, np.uint8)
                table[list(CITY_LABELS.values())] = range(19)
                photos, masks = root / "leftImg8bit" / part / city, root / "gtFine" / part / city
                photos.mkdir(parents=True, exist_ok=True)
                masks.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((4, 6, 3), 5 * k + len(city), np.uint8)).save(
                    photos / f"{name}_leftImg8bit.png"
                )
                for ending, pixels in zip(("labelIds", "labelTrainIds"), (labels, table[labels])):
                    if ending in endings:
                        Image.fromarray(pixels).save(masks / f"{name}_gtFine_{ending}.png")
                Image.fromarray(np.zeros((4, 6, 4), np.uint8)).save(masks / f"{name}_gtFine_color.png")
                (masks / f"{name}_gtFine_polygons.json").write_text("{}")
                held[name] = {1, k + 1}
    return held


@pytest.mark.parametrize("endings", [("labelIds",), ("labelTrainIds",), ("labelIds", "labelTrainIds")])
def test_cityscapes(tmp_path, endings):
    "Classes, parts and the pictures of every step follow from a tree of the original names."
    held = make_cityscapes(tmp_path, endings)
    assert find_problems(tmp_path) == []
    layout = find_layout(tmp_path)
    assert (layout.dataset, layout.classes) == ("cityscapes", CITYSCAPES_CLASSES) and len(layout.train.ids) == 38
    train, test = SegmentationFolder(layout, "train"), SegmentationFolder(layout, "test")
    for data in (train, test):
        assert [set(np.flatnonzero(row)) for row in data.index] == [held[i] for i in data.ids]
        assert not data.index[:, 0].any() and (data.counts[:, -1] > 0).all()  # no background; the rest is void
    for split, sizes in (("14-1", [14, 1, 1, 1, 1, 1]), ("10-1", [10] + [1] * 9), ("13-6", [13, 6])):
        protocol = Protocol(split, layout.dataset)
        assert protocol.sizes == sizes and not protocol.background_tested
        for step in protocol:
            seen = [train.ids[i] for i in step.select(train.index)]
            assert seen == [i for i in train.ids if held[i] & set(step.classes)]
            assert step.channel_table("train")[VOID] == VOID
    setup = Settings(data=str(tmp_path), protocol="13-6")
    assert setup.data == str(tmp_path)


def test_cityscapes_says_what_is_wrong(tmp_path):
    make_cityscapes(tmp_path, ("labelIds",))
    masks = tmp_path / "gtFine/train/ulm"
    Image.fromarray(np.full((4, 6), 34, np.uint8)).save(masks / "ulm_000003_000019_gtFine_labelIds.png")
    (masks / "ulm_000004_000019_gtFine_labelIds.png").unlink()
    (tmp_path / "leftImg8bit/train/ulm/ulm_000005_000019_leftImg8bit.png").unlink()
    said = " ".join(find_problems(tmp_path))
    assert "holds [34], which stand for no class" in said and said.count("expected") == 3
    assert "ulm_000004_000019_gtFine_labelIds.png is missing" in said
    assert "ulm_000005_000019_gtFine_labelIds.png has no photo" in said


GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}  # COCO's ids that were never used, of 1 … 182


@pytest.mark.parametrize("folders", [("images", "annotations"), (".", "stuffthingmaps")])
@pytest.mark.parametrize("ending", ["", "_labelTrainIds"])
def test_coco_stuff(tmp_path, folders, ending):
    "Class k is the k-th id that is used, minus one in the masks; other layouts of the same folders are still known."
    used = [i for i in range(1, 183) if i not in GAPS]
    assert len(used) == 171 == len(COCO_STUFF_CLASSES)
    for part in ("train2017", "val2017"):
        for k in (0, 11, 79, 80, 170):
            photo, mask = (tmp_path / folder / part / f"{part[0]}{k:011}" for folder in folders)
            for path in (photo, mask):
                path.parent.mkdir(parents=True, exist_ok=True)
            value = k if ending else used[k] - 1
            Image.fromarray(np.full((4, 4, 3), k + len(part), np.uint8)).save(f"{photo}.jpg")
            Image.fromarray(np.array([[value, VOID]], np.uint8).repeat(4, 0).repeat(2, 1)).save(f"{mask}{ending}.png")
    layout = find_layout(tmp_path)
    assert (layout.dataset, layout.classes, layout.unused) == ("coco-stuff", COCO_STUFF_CLASSES, ())
    assert find_problems(tmp_path) == []
    data = SegmentationFolder(layout)
    assert [np.flatnonzero(row).tolist() for row in data.index] == [[k + 1] for k in (0, 11, 79, 80, 170)]
    names = ("person", "stop sign", "toothbrush", "banner", "wood")
    assert [data.classes[np.flatnonzero(row)[0] - 1] for row in data.index] == list(names)
    protocol = Protocol("100-71", layout.dataset)
    assert [data.ids[i][-3:] for i in protocol[1].select(data.index)] == ["170"]


@pytest.mark.parametrize("value", [*sorted(i - 1 for i in GAPS), 182, 200, 254])
def test_values_that_coco_stuff_never_used_are_refused(tmp_path, value):
    for part in ("train2017", "val2017"):
        for folder in ("images", "annotations"):
            (tmp_path / folder / part).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"images/{part}/a{part}.jpg")
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(tmp_path / f"annotations/{part}/a{part}.png")
    assert sum(f"holds [{value}], which stand for no class" in p for p in find_problems(tmp_path)) == 2


@pytest.mark.parametrize(
    "files,command",
    [
        (("labelmap.txt", "ImageSets/Segmentation/default.txt"), "cvat"),
        (("a.json", "a.jpg"), "labelme"),
        (("annotations/instances.json", "images/a.jpg"), "coco"),
    ],
)
def test_an_export_is_not_a_data_set_but_says_how_to_make_one(tmp_path, files, command):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({}))
    with pytest.raises(ValueError, match=f"convert it with mbs data {command}"):
        find_layout(tmp_path)
