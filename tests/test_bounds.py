"Bounds: one kind of error corrected, the other kept; the pairs of classes that are mixed up."

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbs.bounds import (
    CORRECTIONS,
    ConfusedPair,
    bound_miou,
    correct_background,
    correct_classes,
    correct_errors,
    find_confused_pairs,
    find_pair_examples,
    measure_miou,
)
from mbs.metrics import class_iou
from mbs.viz import label_colours, overlay, show_confusions, show_pair_examples, spotlight, spread_steps

MATRICES = Path(__file__).parents[1] / "docs/results/animals.npz"


def draw_counts(n, seed):
    "Draw a confusion matrix with a few empty cells."
    rng = np.random.default_rng(seed)
    return rng.integers(0, 50, (n, n)) * (rng.random((n, n)) > 0.3)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_corrections_keep_every_true_class(n, seed, share):
    counts = draw_counts(n, seed)
    before = counts.copy()
    for corrected in (correct_classes(counts, share), correct_background(counts)):
        np.testing.assert_allclose(corrected.sum(1), counts.sum(1))
        assert (corrected >= 0).all()
    assert (counts == before).all()
    some, all_of_them = correct_classes(counts, share), correct_classes(counts)
    assert (some[:, 0] == counts[:, 0]).all() and (some[0] == counts[0]).all()
    np.testing.assert_allclose(some, (1 - share) * counts + share * all_of_them, atol=1e-9)
    assert all_of_them[1:, 1:].sum() == np.trace(all_of_them[1:, 1:])


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_perfect_background_leaves_the_classes_as_mixed_up(n, seed):
    counts = draw_counts(n, seed)
    corrected = correct_background(counts)
    seen = counts[1:, 1:].sum(1) > 0
    assert (corrected[0, 1:] == 0).all() and (corrected[1:, 0][seen] == 0).all()
    rows, new_rows = counts[1:, 1:][seen], corrected[1:, 1:][seen]
    np.testing.assert_allclose(new_rows / new_rows.sum(1, keepdims=True), rows / rows.sum(1, keepdims=True))
    assert (corrected[1:][~seen] == counts[1:][~seen]).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_correcting_classes_never_lowers_the_score(n, seed):
    counts = draw_counts(n, seed) + np.eye(n, dtype=int)  # every class is tested
    found = bound_miou(counts)
    assert found["as it is"] == pytest.approx(class_iou(counts).mean())
    assert found["as it is"] <= found["classes half corrected"] + 1e-12 <= found["classes corrected"] + 2e-12


@pytest.mark.parametrize(
    "protocol, step, expected",
    [("3-1", 3, (39.2, 52.9, 69.6, 50.1)), ("2-2", 2, (34.2, 50.8, 70.2, 45.6)), ("5-1", 1, (50.0, 60.0, 71.8, 64.8))],
)
def test_stored_runs_are_limited_by_their_classes(protocol, step, expected):
    "Means over three seeds of `mbs` on photographs, computed by hand when the question came up."
    with np.load(MATRICES) as arrays:
        bounds = [bound_miou(arrays[f"{protocol}-overlapped-mbs-s{seed}/{step}"]) for seed in range(3)]
    means = [100 * np.mean([b[name] for b in bounds]) for name in CORRECTIONS]
    assert [round(mean, 1) for mean in means] == list(expected)


def test_pairs_are_sorted_by_their_share_of_the_true_class():
    counts = np.array([[9, 9, 9, 9], [1, 5, 4, 0], [8, 30, 60, 2], [0, 0, 0, 0]])
    assert find_confused_pairs(counts) == [
        ConfusedPair(1, 2, 4, 0.4),
        ConfusedPair(2, 1, 30, 0.3),
        ConfusedPair(2, 3, 2, 0.02),
    ]
    assert find_confused_pairs(counts, 1) == [ConfusedPair(1, 2, 4, 0.4)]
    assert find_confused_pairs(np.diag([3, 4, 5])) == []


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_both_corrections_may_be_made_in_either_order(n, seed, share):
    counts = draw_counts(n, seed)
    both = correct_errors(counts, share, perfect_background=True)
    np.testing.assert_allclose(both, correct_background(correct_classes(counts, share)), atol=1e-9)
    assert (correct_errors(counts) == counts).all()


def test_named_corrections_are_points_of_the_slider():
    found = bound_miou(counts := draw_counts(6, 0) + np.eye(6, dtype=int))
    expected = {
        "as it is": measure_miou(counts),
        "classes half corrected": measure_miou(correct_classes(counts, 0.5)),
        "classes corrected": measure_miou(correct_classes(counts)),
        "background corrected": measure_miou(correct_background(counts)),
    }
    assert found == pytest.approx(expected) and list(found) == list(expected) and len(set(found.values())) == 4


# --- pictures that show a pair


def make_picture(truth, predicted):
    "Return photo, truth and prediction of a picture of two rows."
    truth, predicted = np.array([truth] * 2, np.uint8), np.array([predicted] * 2, np.uint8)
    return np.full((*truth.shape, 3), 128, np.uint8), truth, predicted


def test_examples_hold_most_pixels_of_their_pair():
    "The picture with most pixels; a tie goes to the first; void does not count; a pair without a picture is left out."
    pictures = [
        make_picture([1, 1, 1, 0], [1, 1, 2, 0]),
        make_picture([1, 1, 2, 255], [2, 2, 3, 2]),
        make_picture([2, 1, 1, 0], [3, 2, 2, 0]),
    ]
    pairs = [ConfusedPair(1, 2, 99, 0.5), ConfusedPair(3, 1, 50, 0.4), ConfusedPair(2, 3, 9, 0.1)]
    first, second = find_pair_examples(pairs, pictures)
    assert (first.pair, second.pair) == (pairs[0], pairs[2])
    assert first.photo is pictures[1][0] and second.photo is pictures[1][0]
    assert first.area.tolist() == [[True, True, False, False]] * 2
    assert find_pair_examples(pairs, []) == find_pair_examples([], pictures) == []
    assert find_pair_examples(pairs[:1], pictures[:1], least=0.25) and not find_pair_examples(
        pairs[:1], pictures[:1], least=0.26
    )


def test_pair_examples_are_drawn_with_their_pixels_lit():
    pair = ConfusedPair(1, 2, 99, 0.312)
    examples = find_pair_examples([pair], [make_picture([1] * 6 + [0] * 6, [2] * 3 + [1] * 3 + [0] * 6)])
    names = ["background", "cow", "horse"]
    (part,) = show_pair_examples(examples, names).subfigs
    assert part.get_suptitle() == "cow → horse: 31.2 % of all cow pixels; here 6"
    assert [ax.get_xlabel() for ax in part.axes] == ["photo", "truth: cow", "predicted: horse"]
    for ax, channel in zip(part.axes[1:], (1, 2)):
        drawn = np.asarray(ax.images[0].get_array())
        assert (drawn[:, :3] == label_colours(3)[channel]).all() and (drawn[:, 3] == 255).all()
        assert (drawn[:, 4:] < 128).all()
    assert len(show_pair_examples(examples * 3, names).subfigs) == 4
    assert show_pair_examples([], names) is None


def test_spotlight_changes_nothing_but_brightness_outside():
    image, labels = make_picture([0, 1, 1, 2, 2, 0, 0], [0] * 7)[:2]
    area = labels == 1
    lit = spotlight(image, labels, area)
    outside = [5, 6]
    assert (lit[:, outside] == (0.5 * overlay(image, labels)[:, outside]).astype(np.uint8)).all()


# --- matrices of several steps


@pytest.mark.parametrize("first, last, most, expected", [(0, 5, 3, [0, 2, 5]), (1, 1, 5, [1]), (0, 3, 4, [0, 1, 2, 3])])
def test_steps_are_spread_from_first_to_last(first, last, most, expected):
    assert spread_steps(first, last, most) == expected


@pytest.mark.parametrize("sizes", [(4, 5, 7), (17, 21), (101, 126, 151)])
def test_matrices_of_several_steps_share_their_axes(sizes):
    "Each shows its own shares; rows and columns of classes that have not arrived stay empty."
    n = sizes[-1]
    counts = {f"after step {t}": draw_counts(k, t) for t, k in enumerate(sizes)}
    first_step = [next(t for t, k in enumerate(sizes) if c < k) for c in range(n)]
    names = [f"class {c}" for c in range(n)]
    fig = show_confusions(counts, names, first_step)
    assert [ax.get_title() for ax in fig.axes] == list(counts)
    for ax, pixels in zip(fig.axes, counts.values()):
        drawn = np.ma.filled(ax.images[0].get_array(), np.nan)
        assert drawn.shape == (n, n)
        k = len(pixels)
        assert np.isnan(drawn[k:]).all() and np.isnan(drawn[:, k:]).all()
        total = pixels.sum(1, keepdims=True)
        np.testing.assert_allclose((drawn[:k, :k] * total)[total[:, 0] > 0], pixels[total[:, 0] > 0])
        labels = [label.get_text() for label in ax.get_xticklabels()]
        assert labels == (names if n <= 40 else ["step 0", "step 1", "step 2"])
