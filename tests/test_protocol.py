"Protocols: any split, any order; channels, labels and images of every step."

import json

import numpy as np
import pytest
from golden import FOLDER, needs_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from mbs.protocol import SETTINGS, SPLITS, VOID, Protocol, name_split, parse_split

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=9)  # classes of each step


@st.composite
def protocols(draw, settings=SETTINGS):
    "Draw a protocol of even or uneven steps of up to 30 classes or so, which may leave classes out."
    if draw(st.booleans()):
        split = draw(SIZES)
        n = sum(split) + draw(st.integers(0, 5))
        order = draw(st.permutations(range(1, n + 1)))[: sum(split)]
    else:
        n = draw(st.integers(1, 30))
        base = draw(st.integers(1, n))
        split = f"{base}-{draw(st.integers(1, n))}"
        order = draw(st.permutations(range(1, n + 1)))[: draw(st.integers(base, n))]
    return Protocol(split, n, draw(st.sampled_from(settings)), order)


@settings(max_examples=200, deadline=None)
@given(protocols())
def test_every_class_arrives_once(p):
    arrived = [c for step in p.steps for c in step]
    assert arrived == p.order
    assert all(p.steps)
    assert p.first_step == sorted(p.first_step)
    last = p[len(p.steps) - 1]
    new_channels = [c for t in range(len(p.steps)) for c in p[t].new_channels]
    assert new_channels == list(range(1, last.n_channels))


@settings(max_examples=200, deadline=None)
@given(SIZES, st.data())
def test_uneven_steps_have_exactly_the_sizes_of_the_list(sizes, data):
    "A list, its name, and the name of three steps or more as text are the same protocol, and no other sum fits."
    n = sum(sizes)
    order = data.draw(st.permutations(range(1, n + 1)))
    name = name_split(sizes)
    forms = [sizes, tuple(sizes), name, "+".join(map(str, sizes))] + ["-".join(map(str, sizes))] * (len(sizes) > 2)
    for form in forms:
        p = Protocol(form, n, "overlapped", order)
        assert [len(step) for step in p.steps] == sizes
        assert [c for step in p.steps for c in step] == order
        for other in (n - 1, n + 1):
            with pytest.raises(ValueError, match=f"brings {n} classes in .*{other} in all"):
                Protocol(form, other)
    assert Protocol(sizes, n).name == name
    joint = Protocol(sizes, n, "joint")
    assert joint.sizes == [n] and joint.n_base == 1 + sizes[0]


@given(st.integers(1, 30), st.integers(1, 30))
def test_a_list_of_two_is_never_taken_for_a_split_of_equal_steps(a, b):
    "Its name differs from 'A-B', which keeps its meaning, also where both bring the same classes."
    assert name_split([a, b]) != f"{a}-{b}"
    assert parse_split(name_split([a, b]), a + b) == [a, b] == parse_split(f"{a}-{b}", a + b)
    more = a + 2 * b
    assert parse_split(f"{a}-{b}", more) == [a, b, b]
    with pytest.raises(ValueError, match="in all"):
        Protocol([a, b], more)


@settings(max_examples=200, deadline=None)
@given(protocols(), st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_shots_limit_the_pictures_of_each_new_class(p, seed, shots):
    """Few-shot steps draw pictures that the step sees, at most `shots` of each new class, and as many as fit.

    One shot more adds pictures and takes none away; the base step sees everything."""
    index = np.random.default_rng(seed).random((40, p.n_classes + 1)) < 0.2
    for step in p:
        seen, drawn = step.select(index), step.select(index, shots, seed)
        if step.number == 0:
            assert drawn.tolist() == seen.tolist()
            continue
        assert np.array_equal(drawn, np.unique(drawn)) and set(drawn) <= set(seen)
        shown = index[:, list(step.classes)]
        counts = shown[drawn].sum(0)
        assert (counts <= shots).all()
        for i in set(seen) - set(drawn):
            assert (counts[shown[i]] == shots).any(), "a picture that fits was left out"
        assert set(drawn) <= set(step.select(index, shots + 1, seed))
        assert step.select(index, 10**9, seed).tolist() == seen.tolist()


def test_a_rare_class_gets_its_only_picture():
    "A common class does not use up its shots on other pictures first."
    index = np.zeros((50, 4), bool)
    index[:, 2] = True  # class 2 is in every picture, class 3 in a single one
    index[17, 3] = True
    for seed in range(20):
        assert Protocol("1-2", 3)[1].select(index, 1, seed).tolist() == [17]


def test_shots_follow_the_seed_alone():
    "The same seed draws the same pictures, another seed others, and every picture has a chance."
    index = np.ones((30, 3), bool)
    step = Protocol("1-1", 2)[1]
    first = step.select(index, 5, 1).tolist()
    assert step.select(index, 5, 1).tolist() == first != step.select(index, 5, 2).tolist()
    assert {int(i) for seed in range(200) for i in step.select(index, 1, seed)} == set(range(30))


@settings(max_examples=200, deadline=None)
@given(protocols(), st.integers(0, 2**32 - 1))
def test_labels_of_a_step_follow_the_definitions(p, seed):
    "Training labels, test labels and full truth agree with the definitions, pixel by pixel."
    rng = np.random.default_rng(seed)
    mask = rng.choice([*range(p.n_classes + 1), VOID], size=(6, 7)).astype(np.uint8)
    channel = {0: 0, VOID: VOID, **{c: k for k, c in enumerate(p.order, 1)}}
    for t in range(len(p.steps)):
        train, test, truth = (p[t].to_channels(mask, part) for part in ("train", "test", "truth"))
        new = set(p.steps[t])
        seen = {c for step in p.steps[: t + 1] for c in step}
        labelled = seen if p.setting == "sequential" else new
        pixels = zip(*(labels.ravel().tolist() for labels in (mask, train, test, truth)))
        for class_id, in_train, in_test, in_truth in pixels:
            assert in_truth == channel.get(class_id, 0)
            assert in_train == (in_truth if class_id in labelled or class_id == VOID else 0)
            assert in_test == (in_truth if class_id in seen or class_id not in p.order else VOID)


@settings(max_examples=200, deadline=None)
@given(protocols(settings=("overlapped", "disjoint", "sequential")), st.integers(0, 2**32 - 1))
def test_images_of_a_step_follow_the_definitions(p, seed):
    index = np.random.default_rng(seed).random((20, p.n_classes + 1)) < 0.2
    for t, new in enumerate(p.steps):
        future = [c for step in p.steps[t + 1 :] for c in step]
        expected = []
        for i, row in enumerate(index):
            is_allowed = p.setting == "overlapped" or not row[future].any()
            if row[new].any() and is_allowed:
                expected.append(i)
        assert p[t].select(index).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(protocols(settings=("partitioned",)), st.integers(0, 2**32 - 1))
def test_partitioned_gives_every_image_to_one_step(p, seed):
    index = np.random.default_rng(seed).random((20, p.n_classes + 1)) < 0.2
    images = [p[t].select(index).tolist() for t in range(len(p.steps))]
    with_a_class = np.flatnonzero(index[:, p.order].any(1)).tolist()
    assert sorted(i for positions in images for i in positions) == with_a_class
    assert all(index[i, new].any() for positions, new in zip(images, p.steps) for i in positions)


def test_partitioned_draws_fairly_and_alike_in_every_split():
    "All classes of an image are equally likely, and an image belongs to the same class in every split."
    index = np.ones((3000, 4), bool)
    counts = [len(Protocol("1-1", 3, "partitioned")[t].select(index)) for t in range(3)]
    assert sum(counts) == 3000 and min(counts) > 900
    assert counts[0] + counts[1] == len(Protocol("2-1", 3, "partitioned")[0].select(index))


FOUR_MASKS = np.array([[[1, 0], [0, 2]], [[3, 2], [255, 0]], [[1, 1], [0, 0]], [[2, 3], [1, 0]]], np.uint8)  # 2 × 2


@pytest.mark.parametrize(
    "setting,images,labels",
    [
        ("overlapped", [[0, 2, 3], [0, 1, 3], [1, 3]], [[0, 0, 0, 2], [0, 2, 255, 0], [2, 0, 0, 0]]),
        ("disjoint", [[2], [0], [1, 3]], [[0, 0, 0, 2]]),
        ("sequential", [[2], [0], [1, 3]], [[1, 0, 0, 2]]),
    ],
)
def test_known_answers_on_tiny_masks(setting, images, labels):
    "The images of every step and the labels of step 1 are those worked out by hand."
    p = Protocol("1-1", 3, setting)
    index = np.array([[(mask == c).any() for c in range(4)] for mask in FOUR_MASKS])
    assert [p[t].select(index).tolist() for t in range(3)] == images
    assert [p[1].to_channels(FOUR_MASKS[i]).ravel().tolist() for i in images[1]] == labels


@needs_golden
def test_named_splits_are_those_of_the_released_program():
    tasks = json.loads((FOLDER / "tasks_and_lists.json").read_text())["tasks"]
    assert {k: set(v) for k, v in tasks.items()} == {k: set(v) for k, v in SPLITS.items()}
    for dataset, splits in tasks.items():
        for name, steps in splits.items():
            base, *later = Protocol(name, dataset).steps
            assert [[0, *base], *later] == list(steps.values())


def test_ade_ignores_unlabelled_pixels_in_the_test():
    p = Protocol("100-50", "ade")
    mask = np.array([[0, 5, 120]], np.uint8)
    assert p[0].to_channels(mask, "test").tolist() == [[VOID, 5, VOID]]
    assert p[0].to_channels(mask).tolist() == [[0, 5, 0]]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(name="15-1", dataset="coco"), "expected one of voc, ade"),
        (dict(name="15-1_b", dataset=20), "expected 'A-B'"),
        (dict(name="15-1", setting="jointly"), "expected one of overlapped"),
        (dict(name="2-1", dataset=3, order=[1, 1, 2]), "expected different class ids"),
        (dict(name="2-1", dataset=3, order=[1, 2, 4]), "expected different class ids"),
        (dict(name="2-1", dataset=300), "do not fit"),
        (dict(name="10-5-4"), "brings 19 classes in 3 steps: expected at least 1 a step and 20 in all"),
        (dict(name=[15, 1]), "brings 16 classes in 2 steps"),
        (dict(name="10-0-10"), "at least 1 a step"),
        (dict(name="10-5-"), "expected 'A-B'"),
        (dict(name=[10, 0, 10]), "a list of the number of classes"),
        (dict(name=[10, True, 9]), "a list of the number of classes"),
        (dict(name=[]), "a list of the number of classes"),
        (dict(name=15), "expected text such as"),
    ],
)
def test_impossible_protocols_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**arguments)


@settings(max_examples=50, deadline=None)
@given(protocols(), st.integers(0, 2**32 - 1))
def test_hidden_shares_are_those_of_the_pixels(p, seed):
    "Shares computed from the class index equal those counted pixel by pixel in the masks."
    from mbs.inspect import measure_hidden_shares

    masks = np.random.default_rng(seed).choice([*range(p.n_classes + 1), VOID], size=(5, 6, 7)).astype(np.uint8)
    pixels_per_id = np.array([np.bincount(mask.ravel(), minlength=256) for mask in masks])
    counts = np.column_stack([pixels_per_id[:, : p.n_classes + 1], pixels_per_id[:, VOID]])
    for t in range(len(p.steps)):
        truth, labels = (np.array([p[t].to_channels(m, part) for m in masks]) for part in ("truth", "train"))
        first_step = np.array(p.first_step)[np.where(truth == VOID, 0, truth)]
        n_pixels = (truth != VOID).sum()
        is_hidden = (labels == 0) & (truth != 0)
        shares = measure_hidden_shares(counts, p[t])
        assert np.isclose(shares["hidden_old"] * n_pixels, (is_hidden & (first_step < t)).sum())
        assert np.isclose(shares["hidden_future"] * n_pixels, (is_hidden & (first_step > t)).sum())


def test_inspect_command_measures_and_writes_only_the_figure(tmp_path, monkeypatch):
    "`mbs inspect` shows a protocol with a measured time, and saves a figure on demand."
    from typer.testing import CliRunner

    from mbs.cli import app

    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    words = [
        "scenes",
        "5-1",
        "encoder=vit_tiny_patch16_224",
        "encoder_options={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 1}",
        "training.crop=32",
        "training.batch=2",
        "scenes={n_train: 30, n_test: 4, size: 32}",
    ]
    figure = tmp_path / "f.png"
    options = ["--setting", "partitioned", "--measure", "--figure", str(figure)]
    result = CliRunner().invoke(app, ["inspect", *words, *options])
    assert result.exit_code == 0, result.output
    assert "Images seen in 1 step: 30" in result.stdout
    assert "of computation" in result.stdout
    assert figure.stat().st_size > 5000
    assert not (tmp_path / "outputs").exists()
    assert CliRunner().invoke(app, ["inspect", "scenes", "5-1", "--setting", "jointly"]).exit_code == 2


def test_inspect_command_shows_few_pictures_of_uneven_steps(tmp_path, monkeypatch):
    "It shows for each step its classes, its pictures and the pictures of each new class; a wrong list is refused."
    from typer.testing import CliRunner

    from mbs.cli import app

    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")
    words = ["scenes={n_train: 60, n_test: 12, size: 32}", "training.crop=32", "shots=1"]
    for protocol in ("[4,3,1]", "4-3-1"):
        result = CliRunner().invoke(app, ["inspect", "scenes", protocol, *words])
        assert result.exit_code == 0, result.output
        assert "at most 1 in later steps" in result.stdout
        base, three, one = (line.split() for line in result.stdout.splitlines() if line.strip()[:1] in ("0", "1", "2"))
        assert base[1:5] == ["ball,", "leaf,", "mushroom,", "fish"] and int(base[5]) > 40  # pictures
        assert three[1:4] == ["flower,", "star,", "cactus"] and 1 <= int(three[4]) <= 3 and three[-1] == "1"
        assert one[1:3] == ["butterfly", "1"] and one[-1] == "1"
    for protocol, expected in (("[4,3]", "8 in all"), ("8", "a list of the number of classes")):
        result = CliRunner().invoke(app, ["inspect", "scenes", protocol])
        assert result.exit_code == 2 and expected in result.output
