"Bounds: one kind of error corrected, the other kept; the pairs of classes that are mixed up."

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbs.bounds import CORRECTIONS, ConfusedPair, bound_miou, correct_background, correct_classes, find_confused_pairs
from mbs.metrics import class_iou

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
