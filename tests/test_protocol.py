"Protocols: any split, any order, channels and image lists."

import json

import numpy as np
import pytest
from golden import FOLDER, needs_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from mbs.protocol import SETTINGS, SPLITS, VOID, Protocol


@st.composite
def protocols(draw, settings=SETTINGS):
    n = draw(st.integers(1, 30))
    base, new = draw(st.integers(1, n)), draw(st.integers(1, n))
    order = draw(st.permutations(range(1, n + 1)))[: draw(st.integers(base, n))]
    return Protocol(f"{base}-{new}", n, draw(st.sampled_from(settings)), order)


@settings(max_examples=200, deadline=None)
@given(protocols())
def test_every_class_arrives_once(p):
    arrived = [c for step in p.steps for c in step]
    assert arrived == p.order and all(p.steps) and p.first_step == sorted(p.first_step)
    assert [c for t in range(len(p.steps)) for c in p[t].new_channels] == list(range(1, p[len(p.steps) - 1].n_channels))


@settings(max_examples=200, deadline=None)
@given(protocols(), st.integers(0, 2**32 - 1))
def test_what_a_step_shows(p, seed):
    "Labels, test and truth agree with the definitions, pixel by pixel."
    rng = np.random.default_rng(seed)
    mask = rng.choice([*range(p.n_classes + 1), VOID], size=(6, 7)).astype(np.uint8)
    channel = {0: 0, VOID: VOID, **{c: k for k, c in enumerate(p.order, 1)}}
    for t in range(len(p.steps)):
        train, test, truth = (p[t].to_channels(mask, part) for part in ("train", "test", "truth"))
        new, seen = set(p.steps[t]), {c for step in p.steps[: t + 1] for c in step}
        shown = seen if p.setting == "sequential" else new
        for id_, a, b, c in zip(
            mask.ravel().tolist(), train.ravel().tolist(), test.ravel().tolist(), truth.ravel().tolist()
        ):
            assert c == channel.get(id_, 0)
            assert a == (c if id_ in shown or id_ == VOID else 0)
            assert b == (c if id_ in seen or id_ not in p.order else VOID)


@settings(max_examples=200, deadline=None)
@given(protocols(settings=("overlapped", "disjoint", "sequential")), st.integers(0, 2**32 - 1))
def test_which_images_a_step_sees(p, seed):
    index = np.random.default_rng(seed).random((20, p.n_classes + 1)) < 0.2
    for t, new in enumerate(p.steps):
        future = {c for step in p.steps[t + 1 :] for c in step}
        want = [
            i
            for i, row in enumerate(index)
            if row[new].any() and (p.setting == "overlapped" or not row[list(future)].any())
        ]
        assert p[t].select(index).tolist() == want


@settings(max_examples=200, deadline=None)
@given(protocols(settings=("partitioned",)), st.integers(0, 2**32 - 1))
def test_partitioned_gives_every_image_to_one_step(p, seed):
    index = np.random.default_rng(seed).random((20, p.n_classes + 1)) < 0.2
    steps = [p[t].select(index).tolist() for t in range(len(p.steps))]
    assert sorted(i for seen in steps for i in seen) == np.flatnonzero(index[:, p.order].any(1)).tolist()
    assert all(index[i, new].any() for seen, new in zip(steps, p.steps) for i in seen)


def test_partitioned_draws_fairly_and_knows_no_split():
    "Each class of an image is as likely as another; the same image is given to the same class in every split."
    index = np.ones((3000, 4), bool)
    counts = [len(Protocol("1-1", 3, "partitioned")[t].select(index)) for t in range(3)]
    assert sum(counts) == 3000 and min(counts) > 900
    assert counts[0] + counts[1] == len(Protocol("2-1", 3, "partitioned")[0].select(index))


TOY = np.array(
    [[[1, 0], [0, 2]], [[3, 2], [255, 0]], [[1, 1], [0, 0]], [[2, 3], [1, 0]]], np.uint8
)  # four masks of 2 × 2 pixels


@pytest.mark.parametrize(
    "setting,seen,shown",
    [
        ("overlapped", [[0, 2, 3], [0, 1, 3], [1, 3]], [[0, 0, 0, 2], [0, 2, 255, 0], [2, 0, 0, 0]]),
        ("disjoint", [[2], [0], [1, 3]], [[0, 0, 0, 2]]),
        ("sequential", [[2], [0], [1, 3]], [[1, 0, 0, 2]]),
    ],
)
def test_known_answers_on_tiny_masks(setting, seen, shown):
    "Images of every step, and the labels of step 1, worked out by hand."
    p = Protocol("1-1", 3, setting)
    index = np.array([[(mask == c).any() for c in range(4)] for mask in TOY])
    assert [p[t].select(index).tolist() for t in range(3)] == seen
    assert [p[1].to_channels(TOY[i]).ravel().tolist() for i in seen[1]] == shown


@needs_golden
def test_named_splits_are_those_of_the_released_program():
    tasks = json.loads((FOLDER / "tasks_and_lists.json").read_text())["tasks"]
    assert {k: set(v) for k, v in tasks.items()} == {k: set(v) for k, v in SPLITS.items()}
    for dataset, splits in tasks.items():
        for name, steps in splits.items():
            mine = Protocol(name, dataset).steps
            assert [[0, *mine[0]], *mine[1:]] == list(steps.values())


def test_ade_leaves_unlabelled_pixels_out_of_the_test():
    p = Protocol("100-50", "ade")
    mask = np.array([[0, 5, 120]], np.uint8)
    assert p[0].to_channels(mask, "test").tolist() == [[VOID, 5, VOID]] and p[0].to_channels(mask).tolist() == [
        [0, 5, 0]
    ]


@pytest.mark.parametrize(
    "arguments,says",
    [
        (dict(name="15-1", dataset="coco"), "expected one of voc, ade"),
        (dict(name="15-1_b", dataset=20), "expected 'A-B'"),
        (dict(name="15-1", setting="jointly"), "expected one of overlapped"),
        (dict(name="2-1", dataset=3, order=[1, 1, 2]), "expected different class ids"),
        (dict(name="2-1", dataset=3, order=[1, 2, 4]), "expected different class ids"),
        (dict(name="2-1", dataset=300), "do not fit"),
    ],
)
def test_impossible(arguments, says):
    with pytest.raises(ValueError, match=says):
        Protocol(**arguments)


@settings(max_examples=50, deadline=None)
@given(protocols(), st.integers(0, 2**32 - 1))
def test_hidden_shares_are_those_of_the_pixels(p, seed):
    "Counted from the class index, and counted pixel by pixel in the masks."
    from mbs.inspect import measure_hidden_shares

    masks = np.random.default_rng(seed).choice([*range(p.n_classes + 1), VOID], size=(5, 6, 7)).astype(np.uint8)
    counts = np.array(
        [np.append(np.bincount(m.ravel(), minlength=256)[: p.n_classes + 1], (m == VOID).sum()) for m in masks]
    )
    for t in range(len(p.steps)):
        truth, labels = (np.array([p[t].to_channels(m, part) for m in masks]) for part in ("truth", "train"))
        first, pixels = np.array(p.first_step)[np.where(truth == VOID, 0, truth)], (truth != VOID).sum()
        lost = (labels == 0) & (truth != 0)
        got = measure_hidden_shares(counts, p[t])
        assert np.isclose(got["hidden_old"] * pixels, (lost & (first < t)).sum()) and np.isclose(
            got["hidden_future"] * pixels, (lost & (first > t)).sum()
        )


def test_inspect_from_the_command_line(tmp_path, monkeypatch):
    "Any protocol before any training, with a measured time; a picture on demand; nothing else is written."
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
    result = CliRunner().invoke(
        app, ["inspect", *words, "--setting", "partitioned", "--measure", "--figure", str(tmp_path / "f.png")]
    )
    assert result.exit_code == 0, result.output
    assert (
        "images seen in 1 step: 30" in result.stdout
        and "of computation" in result.stdout
        and (tmp_path / "f.png").stat().st_size > 5000
    )
    assert not (tmp_path / "outputs").exists()
    assert CliRunner().invoke(app, ["inspect", "scenes", "5-1", "--setting", "jointly"]).exit_code == 2
