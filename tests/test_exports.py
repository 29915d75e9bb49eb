"Exports of annotation programs become data sets: every object is drawn or named, on the pixels that people saw."

import base64
import io
import json
import shutil
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import Mutants
from PIL import Image
from typer.testing import CliRunner

from mbs.cli import app
from mbs.data import SegmentationFolder, find_problems
from mbs.label_studio import decode_brush
from mbs.layouts import find_layout
from mbs.prepare import prepare_coco, prepare_cvat, prepare_label_studio, prepare_labelme

HEIGHT, WIDTH = 24, 40
BOX = (4, 3, 16, 13)  # x, y of two corners; 12 × 10 pixels
CORNERS = [[4, 3], [16, 3], [16, 13], [4, 13]]


def save_photo(path, k=0, orientation=1, size=(HEIGHT, WIDTH)):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    height, width = size[::-1] if orientation > 4 else size  # as stored, so that it is shown in `size`
    Image.fromarray(np.full((height, width, 3), 30 + 20 * k, np.uint8)).save(path, exif=exif)


def read_made(made, name):
    return np.asarray(Image.open(made / "masks" / f"{name}.png"))


def encode_png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_labelme(folder, name, shapes, photo="photo", size=(HEIGHT, WIDTH), **others):
    "A file of labelme; `photo`: a file beside it, the picture inside it, or none."
    folder.mkdir(parents=True, exist_ok=True)
    k = sum(name.encode()) % 9
    content = dict(version="5.4.1", flags={}, shapes=shapes, imagePath=f"{name}.jpg", imageData=None)
    content |= dict(imageHeight=size[0], imageWidth=size[1]) if size else {}
    if photo == "photo":
        save_photo(folder / f"{name}.jpg", k)
    elif photo == "inside":
        content["imageData"] = encode_png(np.full((HEIGHT, WIDTH, 3), 30 + 20 * k, np.uint8))
    (folder / f"{name}.json").write_text(json.dumps(content | others))


def shape(label="cat", points=CORNERS, kind="polygon", **others):
    return dict(label=label, points=points, shape_type=kind, group_id=None, flags={}) | others


MASK = encode_png(np.ones((10, 12), bool))
GOOD = {
    "polygon": shape(),
    "rectangle": shape(points=[[16, 13], [4, 3]], kind="rectangle"),
    "old": {k: v for k, v in shape().items() if k != "shape_type"},
    "mask": shape(points=[[4, 3], [15, 12]], kind="mask", mask=MASK),
}
BAD = {
    "line": shape(points=[[1, 1], [9, 9]], kind="line"),
    "point": shape(points=[[1, 1]], kind="point"),
    "linestrip": shape(points=[[1, 1], [9, 9], [4, 1]], kind="linestrip"),
    "two corners": shape(points=[[1, 1], [9, 9]]),
    "unknown": shape(kind="spline"),
    "no label": shape(label=""),
    "damaged mask": shape(points=[[4, 3], [15, 12]], kind="mask", mask="AAAA"),
    "outside": shape(points=[[30, 3], [41, 12]], kind="mask", mask=MASK),
    "text": shape(points=[["a", "b"]]),
    "infinite": shape(points=[[0, 0], [1e30, 0], [0, 1e30]]),
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("photo", ["photo", "inside"])
def test_shapes_of_labelme_cover_their_pixels(tmp_path, kind, photo):
    for k in range(3):
        write_labelme(tmp_path / "in", f"p{k}", [GOOD[kind]], photo, size=(HEIGHT, WIDTH) if k else None)
    said = prepare_labelme(tmp_path / "in", tmp_path / "made")
    assert "objects: 3 given, 3 to draw, 0 lost" in said
    for k in range(3):
        mask = read_made(tmp_path / "made", f"p{k}")
        assert mask.shape == (HEIGHT, WIDTH) and (mask[3:13, 4:16] == 1).all() and mask.sum() == 120
    assert find_problems(tmp_path / "made") == []


def test_a_circle_of_labelme(tmp_path):
    for k in range(2):
        write_labelme(tmp_path / "in", f"p{k}", [shape(points=[[20, 12], [20, 4]], kind="circle")])
    prepare_labelme(tmp_path / "in", tmp_path / "made")
    assert abs(read_made(tmp_path / "made", "p0").sum() - np.pi * 64) < 8


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([*GOOD, *BAD]), min_size=1, max_size=6), st.sampled_from(["photo", "inside", "none"]))
def test_every_labelme_object_is_drawn_or_named(tmp_path_factory, kinds, photo):
    root = tmp_path_factory.mktemp("labelme")
    write_labelme(root / "in", "a", [(GOOD | BAD)[kind] for kind in kinds], photo)
    for name in ("b", "c"):
        write_labelme(root / "in", name, [GOOD["polygon"]])
    lost = [k for k, kind in enumerate(kinds, 1) if kind in BAD or photo == "none"]
    if lost:
        with pytest.raises(ValueError, match=f"{len(lost)} of {len(kinds) + 2} objects of .* would be lost"):
            prepare_labelme(root / "in", root / "made")
        assert not (root / "made").exists()
    said = prepare_labelme(root / "in", root / "made", skip=True)
    assert f"objects: {len(kinds) + 2} given, {len(kinds) + 2 - len(lost)} to draw, {len(lost)} lost" in said
    for k in range(1, len(kinds) + 1):
        assert (f"object {k} of a" in said.replace("picture ", "")) == (k in lost)
    if photo != "none":
        assert read_made(root / "made", "a").sum() == 120 * (len(lost) < len(kinds))


def test_labels_of_background_and_void_are_no_classes(tmp_path):
    small = [[6, 5], [8, 5], [8, 7], [6, 7]]
    for k, label in enumerate(("_background_", "__ignore__", "dog")):
        write_labelme(tmp_path / "in", f"p{k}", [shape(), shape(label, small)])
    said = prepare_labelme(tmp_path / "in", tmp_path / "made")
    assert find_layout(tmp_path / "made").classes == ("cat", "dog")
    assert [read_made(tmp_path / "made", f"p{k}")[6, 7] for k in range(3)] == [0, 255, 2]
    assert "labelled as background" in said and "labelled as void" in said
    said = prepare_labelme(tmp_path / "in", tmp_path / "dogs", classes=["dog"])
    assert "3 objects are of categories that were not chosen" in said
    assert find_layout(tmp_path / "dogs").classes == ("dog",)


def test_what_labelme_leaves_out_is_said(tmp_path):
    for k in range(3):
        write_labelme(tmp_path / "in", f"p{k}", [shape()])
    save_photo(tmp_path / "in/other.jpg", 7)
    (tmp_path / "in/classes.json").write_text("[]")
    said = prepare_labelme(tmp_path / "in", tmp_path / "made")
    assert "1 photos in" in said and "classes.json is not labelme's" in said
    with pytest.raises(ValueError, match="with a photo: expected JSON files"):
        prepare_labelme(tmp_path / "made/images", tmp_path / "again")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("program", ["labelme", "label-studio", "cvat"])
def test_masks_of_programs_that_turn_photos_lie_on_what_they_showed(tmp_path, program, orientation):
    "The photo keeps its bytes; it is read as shown, where the mask was drawn."
    names = [f"p{k}" for k in range(3)]
    for k, name in enumerate(names):
        save_photo(tmp_path / f"photos/{name}.jpg", k, orientation)
    if program == "labelme":
        for name in names:
            write_labelme(tmp_path / "in", name, [shape()], "none")
        prepare_labelme(tmp_path / "in", tmp_path / "made", tmp_path / "photos")
    elif program == "label-studio":
        file = write_label_studio(tmp_path, [[polygon()]] * 3)
        prepare_label_studio(file, tmp_path / "photos", tmp_path / "made")
    else:
        write_cvat(tmp_path / "in", names, with_photos=False)
        prepare_cvat(tmp_path / "in", tmp_path / "made", tmp_path / "photos")
    assert find_problems(tmp_path / "made") == []
    data = SegmentationFolder(tmp_path / "made")
    photo, mask = data[0]
    assert photo.shape[:2] == mask.shape == (HEIGHT, WIDTH) and (mask[3:13, 4:16] == 1).all()
    assert data.turned.all() == (orientation > 1)
    assert data.images[0].read_bytes() == (tmp_path / "photos" / data.images[0].name).read_bytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("drawn_on", ["shown", "stored"])
def test_coco_sizes_tell_what_objects_were_drawn_on(tmp_path, orientation, drawn_on):
    for k in range(3):
        save_photo(tmp_path / f"photos/p{k}.jpg", k, orientation)
    size = (HEIGHT, WIDTH) if drawn_on == "shown" or orientation < 5 else (WIDTH, HEIGHT)
    content = dict(
        images=[dict(id=k, file_name=f"p{k}.jpg", height=size[0], width=size[1]) for k in range(3)],
        categories=[dict(id=1, name="cat")],
        annotations=[
            dict(id=k, image_id=k, category_id=1, segmentation=[np.ravel(CORNERS).tolist()]) for k in range(3)
        ],
    )
    (tmp_path / "a.json").write_text(json.dumps(content))
    arguments = tmp_path / "a.json", tmp_path / "photos", tmp_path / "made"
    said = prepare_coco(*arguments)
    is_unknown = 2 <= orientation <= 4
    assert ("sizes do not tell" in said) == is_unknown == bool(find_problems(tmp_path / "made"))
    photo, mask = SegmentationFolder(tmp_path / "made")[0]
    assert photo.shape[:2] == mask.shape == size
    shutil.rmtree(tmp_path / "made")
    assert "sizes do not tell" not in prepare_coco(*arguments, orientation=drawn_on)
    data = SegmentationFolder(tmp_path / "made")
    assert find_problems(tmp_path / "made") == []
    assert data.turned.all() == (orientation > 1 and drawn_on == "shown")
    if orientation > 4:
        shutil.rmtree(tmp_path / "made")
        with pytest.raises(ValueError, match="has another size"):
            prepare_coco(*arguments, orientation=dict(shown="stored", stored="shown")[drawn_on])


def pack_bits(fields):
    "Pack (value, number of bits) pairs into a list of bytes."
    text = "".join(f"{value:0{n}b}" for value, n in fields)
    return [int(text[k : k + 8].ljust(8, "0"), 2) for k in range(0, len(text), 8)]


def encode_brush(mask, r):
    "Encode a mask as Label Studio does, in runs and in lists of values, whose lengths have several widths."
    values, widths = np.repeat(mask.ravel() * 255, 4).tolist(), (3, 4, 8, 16)
    fields, k = [(len(values), 32), (7, 5), *((width - 1, 4) for width in widths)], 0
    while k < len(values):
        run = next((n for n in range(k, len(values)) if values[n] != values[k]), len(values)) - k
        is_run = run > 1 and r.random() < 0.8
        n = run if is_run else int(r.integers(1, min(20, len(values) - k) + 1))
        choice = r.choice([c for c, width in enumerate(widths) if n <= 1 << width])
        fields += [(int(is_run), 1), (int(choice), 2), (n - 1, widths[choice])]
        fields += [(value, 8) for value in values[k : k + (1 if is_run else n)]]
        k += n
    return pack_bits(fields)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 999), st.floats(0, 1))
def test_brush_strokes_are_decoded(height, width, seed, share):
    r = np.random.default_rng(seed)
    mask = (r.random((height, width)) < share).astype(np.uint8)
    code = encode_brush(mask, r)
    assert (decode_brush(code, height, width) == mask).all()
    for wrong in (code[:-2], code[: len(code) // 2], [], [300], ["a"], None):
        with pytest.raises(ValueError, match="brush strokes"):
            decode_brush(wrong, height, width)
    with pytest.raises(ValueError, match="expected four of 8 bits for each pixel"):
        decode_brush(code, height + 1, width)


def result(kind, labels=("cat",), size=(HEIGHT, WIDTH), **value):
    return dict(
        id=f"r{len(str(value))}",
        type=f"{kind}labels",
        value=value | {f"{kind}labels": list(labels)},
        original_height=size[0],
        original_width=size[1],
        image_rotation=0,
        from_name="label",
        to_name="image",
    )


def percent(points):
    return [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in points]


def polygon(points=CORNERS, **others):
    return result("polygon", points=percent(points), closed=True, **others)


def rectangle(**others):
    (x, y), (right, bottom) = percent([BOX[:2], BOX[2:]])
    return result("rectangle", x=x, y=y, width=right - x, height=bottom - y, rotation=0, **others)


def turned_rectangle():
    "The same pixels, as a rectangle that is turned by a quarter about its upper left corner."
    (x, y) = percent([(16, 3)])[0]
    return result("rectangle", x=x, y=y, width=100 * 10 / WIDTH, height=100 * 12 / HEIGHT, rotation=90)


def brush():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[3:13, 4:16] = 1
    return result("brush", format="rle", rle=encode_brush(mask, np.random.default_rng(0)))


def write_label_studio(root, tasks, address="/data/upload/4/0f3a5c7e-p{}.jpg", **others):
    "An export with the results of one annotation for each task."
    content = [
        dict(
            id=100 + k,
            data=dict(image=address.format(k), note="p.jpg of a text"),
            annotations=[dict(id=k, created_at="2024-05-01T10:00:00Z", was_cancelled=False, result=results)],
            predictions=[],
        )
        | others
        for k, results in enumerate(tasks)
    ]
    (root / "export.json").write_text(json.dumps(content))
    return root / "export.json"


STUDIO = {
    "polygon": polygon(),
    "rectangle": rectangle(),
    "turned": turned_rectangle(),
    "brush": brush(),
    "one label for all": polygon() | dict(type="labels", value=dict(points=percent(CORNERS), labels=["cat"])),
}
STUDIO_BAD = {
    "point": result("keypoint", x=5, y=5, width=0.3),
    "no label": polygon(labels=()),
    "two labels": polygon(labels=("cat", "dog")),
    "two corners": polygon(points=CORNERS[:2]),
    "turned picture": polygon() | dict(image_rotation=90),
    "cut brush": result("brush", format="rle", rle=[0, 0, 1]),
    "wrong": result("polygon", points="abc"),
}


@pytest.mark.parametrize("kind", STUDIO)
@pytest.mark.parametrize(
    "address",
    ["/data/upload/4/0f3a5c7e-p{}.jpg", "s3://bucket/some%20where/p{}.jpg", "/data/local-files/?d=here/p{}.jpg"],
)
def test_shapes_of_label_studio_cover_their_pixels(tmp_path, kind, address):
    for k in range(3):
        save_photo(tmp_path / f"photos/p{k}.jpg", k)
    file = write_label_studio(tmp_path, [[STUDIO[kind]]] * 3, address)
    said = prepare_label_studio(file, tmp_path / "photos", tmp_path / "made")
    assert "objects: 3 given, 3 to draw, 0 lost" in said and find_problems(tmp_path / "made") == []
    mask = read_made(tmp_path / "made", "p1")
    assert mask.shape == (HEIGHT, WIDTH) and mask.sum() == 120 and (mask[3:13, 4:16] == 1).all()


def test_an_ellipse_of_label_studio(tmp_path):
    for k in range(2):
        save_photo(tmp_path / f"photos/p{k}.jpg", k)
    ellipse = result("ellipse", x=50, y=50, radiusX=100 * 8 / WIDTH, radiusY=100 * 4 / HEIGHT, rotation=90)
    prepare_label_studio(write_label_studio(tmp_path, [[ellipse]] * 2), tmp_path / "photos", tmp_path / "made")
    rows, columns = np.nonzero(read_made(tmp_path / "made", "p0"))
    assert abs(len(rows) - np.pi * 32) < 8 and np.ptp(rows) > 1.8 * np.ptp(columns)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([*STUDIO, *STUDIO_BAD]), min_size=1, max_size=6), st.booleans())
def test_every_label_studio_object_is_drawn_or_named(tmp_path_factory, kinds, has_photo):
    root = tmp_path_factory.mktemp("studio")
    for k in range(0 if has_photo else 1, 3):
        save_photo(root / f"photos/p{k}.jpg", k)
    answer = dict(type="choices", value=dict(choices=["blurred"]), from_name="quality", to_name="image")
    given_results = [(STUDIO | STUDIO_BAD)[kind] | dict(id=f"r{k}") for k, kind in enumerate(kinds)]
    file = write_label_studio(root, [[*given_results, answer], [polygon()], [polygon()]])
    lost = [k for k, kind in enumerate(kinds, 1) if kind in STUDIO_BAD or not has_photo]
    arguments = file, root / "photos", root / "made"
    if lost:
        with pytest.raises(ValueError, match=f"{len(lost)} of {len(kinds) + 2} objects of .* would be lost"):
            prepare_label_studio(*arguments)
    said = prepare_label_studio(*arguments, skip=True)
    assert f"objects: {len(kinds) + 2} given, {len(kinds) + 2 - len(lost)} to draw, {len(lost)} lost" in said
    for k in range(1, len(kinds) + 1):
        assert (f"object {k} of" in said and f"object {k} of task 100" in said.replace("picture ", "")) == (k in lost)


def test_tasks_of_one_id_are_not_mixed(tmp_path):
    "The photo of one would be stored with the mask of the other."
    for k in range(3):
        save_photo(tmp_path / f"photos/p{k}.jpg", k)
    file = write_label_studio(tmp_path, [[polygon()]] * 3)
    file.write_text(file.read_text().replace('"id": 101', '"id": 100'))
    with pytest.raises(ValueError, match=r"^task 100 comes twice: expected a different name or id for each picture$"):
        prepare_label_studio(file, tmp_path / "photos", tmp_path / "made", skip=True)
    assert not (tmp_path / "made").exists()


def test_annotations_of_several_people_are_not_mixed(tmp_path):
    for k in range(4):
        save_photo(tmp_path / f"photos/p{k}.jpg", k)
    save_photo(tmp_path / "photos/more.jpg", 8)
    file = write_label_studio(tmp_path, [[polygon()]] * 4)
    content = json.loads(file.read_text())
    late = dict(content[0]["annotations"][0], created_at="2025-01-01", result=[])
    content[0]["annotations"].insert(0, late)
    content[1]["annotations"].append(dict(late, was_cancelled=True))
    content[2]["annotations"] = []
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1 of 3 objects of .* would be lost .*is of an earlier annotation"):
        prepare_label_studio(file, tmp_path / "photos", tmp_path / "made")
    said = prepare_label_studio(file, tmp_path / "photos", tmp_path / "made", skip=True)
    assert read_made(tmp_path / "made", "p0").sum() == 0 and read_made(tmp_path / "made", "p1").sum() == 120
    assert "1 tasks have no annotation" in said and "1 photos in" in said and "1 pictures have no object" in said


@pytest.mark.parametrize(
    "content", [{}, [], [3], [dict(id=1, image="/a.jpg", label=[])], [dict(id=1, data=3, annotations=[])], "x"]
)
def test_what_is_not_label_studios_export_is_refused(tmp_path, content):
    (tmp_path / "export.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected"):
        prepare_label_studio(tmp_path / "export.json", tmp_path, tmp_path / "made")
    assert not (tmp_path / "made").exists()


COLOURS = dict(background=(0, 0, 0), cat=(250, 50, 83), dog=(51, 221, 255), ignore=(9, 9, 9))


def write_cvat(root, names, with_photos=True, lists=None, as_palette=False, colours=COLOURS):
    "CVAT's export: in every mask a cat of 120 pixels, a dog and something to ignore."
    for folder in ("SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    lines = [f"{name}:{','.join(map(str, rgb))}::" for name, rgb in colours.items()]
    (root / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]))
    for k, name in enumerate(names):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        pixels[3:13, 4:16], pixels[15:20, 20:30], pixels[0, 0] = COLOURS["cat"], COLOURS["dog"], COLOURS["ignore"]
        mask = Image.fromarray(pixels)
        file = root / f"SegmentationClass/{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        (mask.quantize(8, dither=0) if as_palette else mask).save(file)
        if with_photos:
            save_photo(root / f"JPEGImages/{name}.jpg", k)
    for subset, listed in (lists or {"default": names}).items():
        (root / f"ImageSets/Segmentation/{subset}.txt").write_text("".join(f"{name}\n" for name in listed))
    return root


@pytest.mark.parametrize("as_palette", [False, True])
@pytest.mark.parametrize("as_zip", [False, True])
def test_cvat(tmp_path, as_palette, as_zip):
    export = write_cvat(tmp_path / "in", ["a", "b", "sub/c"], as_palette=as_palette)
    if as_zip:
        with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
            for path in export.rglob("*"):
                archive.write(path, path.relative_to(export))
        export = tmp_path / "in.zip"
    said = prepare_cvat(export, tmp_path / "made")
    assert "pictures: 3 given, 3 converted, 0 lost" in said and find_problems(tmp_path / "made") == []
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["dataset.yaml", "images", "masks"]
    mask = read_made(tmp_path / "made", "c")
    assert find_layout(tmp_path / "made").classes == ("cat", "dog")
    assert [(mask == i).sum() for i in (1, 2, 255)] == [120, 50, 1]


def test_subsets_of_cvat_become_parts(tmp_path):
    names = [f"p{k}" for k in range(6)]
    write_cvat(tmp_path / "in", names, lists=dict(Train=names[:4], Validation=names[4:]))
    prepare_cvat(tmp_path / "in", tmp_path / "made")
    assert find_layout(tmp_path / "made").test.ids == names[4:]
    prepare_cvat(tmp_path / "in", tmp_path / "other", test=["p0"])
    assert find_layout(tmp_path / "other").test.ids == ["p0"]


@settings(max_examples=15, deadline=None)
@given(st.sets(st.integers(0, 4), max_size=3), st.sets(st.integers(0, 4), max_size=3), st.sets(st.integers(5, 8)))
def test_every_mask_of_cvat_is_converted_or_named(tmp_path_factory, without_photo, without_mask, unlabelled):
    "Masks without a photo and listed pictures without a mask are lost; photos without a mask are counted."
    root = tmp_path_factory.mktemp("cvat")
    names = [f"p{k}" for k in range(5)]
    write_cvat(root / "in", names)
    for k in without_photo:
        (root / f"in/JPEGImages/p{k}.jpg").unlink()
    for k in without_mask:
        (root / f"in/SegmentationClass/p{k}.png").unlink()
    for k in unlabelled:
        save_photo(root / f"in/JPEGImages/p{k}.jpg", k)
    lost, kept = without_photo | without_mask, {*range(5)} - without_photo - without_mask
    if len(kept) < 2:
        return
    if lost:
        with pytest.raises(ValueError, match=f"{len(lost)} of 5 pictures of .* would be lost"):
            prepare_cvat(root / "in", root / "made")
    said = prepare_cvat(root / "in", root / "made", skip=True)
    assert f"pictures: 5 given, {len(kept)} converted, {len(lost)} lost" in said
    n_unlabelled = len(unlabelled) + len(without_mask - without_photo)
    assert (f"{n_unlabelled} photos in" in said) == (n_unlabelled > 0)
    assert sorted(path.stem for path in (root / "made/masks").iterdir()) == [f"p{k}" for k in sorted(kept)]


@pytest.mark.parametrize(
    "colours,says",
    [
        ({k: v for k, v in COLOURS.items() if k != "dog"}, r"has the colour \(51, 221, 255\).*and 1 more"),
        (COLOURS | dict(cow=(250, 50, 83)), "gives 'cow' the colour .250, 50, 83.: expected different colours"),
        (COLOURS | dict(cow=(1, 2)), "has the line 'cow:1,2::'"),
        (dict(background=(0, 0, 0)), "names 0 classes"),
    ],
)
def test_label_maps_that_do_not_fit_are_refused(tmp_path, colours, says):
    write_cvat(tmp_path / "in", ["a", "b"], colours=colours)
    with pytest.raises(ValueError, match=says):
        prepare_cvat(tmp_path / "in", tmp_path / "made")
    assert not (tmp_path / "made").exists() and len(list(tmp_path.iterdir())) == 1


def test_labels_of_cvat_without_a_pixel_are_said(tmp_path):
    write_cvat(tmp_path / "in", ["a", "b"], colours=COLOURS | dict(cow=(1, 2, 3)))
    assert "labels without a pixel: cow" in prepare_cvat(tmp_path / "in", tmp_path / "made")


@pytest.mark.parametrize("program", ["labelme", "label-studio"])
def test_changed_files_are_refused_in_a_sentence_or_counted(tmp_path, program):
    "Whatever a file holds, there is no other error than a sentence, and nothing is left behind by one."
    mutants = Mutants(3)
    for k in range(2):
        write_labelme(tmp_path / "in", f"p{k}", [*GOOD.values()])
    studio = write_label_studio(tmp_path, [[*STUDIO.values()]] * 2)
    file = studio if program == "label-studio" else tmp_path / "in/p0.json"
    content = json.loads(file.read_text())
    n_made = 0
    for k in range(120):
        file.write_text(json.dumps(mutants.change_tree(content)))
        try:
            if program == "labelme":
                prepare_labelme(tmp_path / "in", tmp_path / "made", skip=k % 2)
            else:
                prepare_label_studio(studio, tmp_path / "in", tmp_path / "made", skip=k % 2)
        except ValueError as error:
            assert "expected" in str(error) or " should " in str(error), error
            assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "in"]
        else:
            n_made += 1
            assert find_layout(tmp_path / "made").classes
            shutil.rmtree(tmp_path / "made")
    assert 10 < n_made < 110


def test_the_commands(tmp_path):
    write_labelme(tmp_path / "lm", "a", [shape(), shape("dog")])
    write_labelme(tmp_path / "lm", "b", [shape()])
    for k in range(3):
        save_photo(tmp_path / f"photos/p{k}.jpg", k)
    write_label_studio(tmp_path, [[polygon()]] * 3)
    write_cvat(tmp_path / "cvat", ["a", "b"])
    commands = [
        ["labelme", tmp_path / "lm", tmp_path / "1", "--classes", "cat,dog", "--test", "0.5"],
        ["label-studio", tmp_path / "export.json", tmp_path / "photos", tmp_path / "2", "--seed", "3"],
        ["cvat", tmp_path / "cvat", tmp_path / "3"],
    ]
    for words in commands:
        answer = CliRunner().invoke(app, ["data", *map(str, words)])
        assert answer.exit_code == 0 and "test pictures of" in answer.output, answer.output
    answer = CliRunner().invoke(
        app, ["data", "labelme", str(tmp_path / "lm"), str(tmp_path / "4"), "--orientation", "x"]
    )
    assert answer.exit_code == 2 and "orientation 'x' is not known" in answer.output


@pytest.mark.parametrize("written", ["images/p{}.jpg", "images\\p{}.jpg", "images\\1/p{}.jpg", "1/p{}.jpg", "p{}.jpg"])
@pytest.mark.parametrize("given_folder", ["export", "export/images"])
def test_coco_finds_photos_whatever_folder_their_names_begin_with(tmp_path, written, given_folder):
    "Label Studio writes the folders of its server before the names."
    for k in range(2):
        save_photo(tmp_path / f"export/images/p{k}.jpg", k)
    content = dict(
        images=[dict(id=k, file_name=written.format(k), height=HEIGHT, width=WIDTH) for k in range(2)],
        categories=[dict(id=0, name="cat")],
        annotations=[dict(id=0, image_id=1, category_id=0, segmentation=[np.ravel(CORNERS).tolist()], iscrowd=0)],
    )
    (tmp_path / "result.json").write_text(json.dumps(content))
    said = prepare_coco(tmp_path / "result.json", tmp_path / given_folder, tmp_path / "made")
    assert "not listed" not in said and read_made(tmp_path / "made", "p1").sum() == 120
