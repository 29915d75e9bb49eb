"Metrics agree with an independent count of pixels and with scikit-learn; published rows fit the right conventions."

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from mbs.metrics import (
    FLOWS,
    Confusion,
    PseudoLabelCounts,
    background_shift,
    backward_transfer,
    check_row,
    class_accuracy,
    class_iou,
    forgetting,
    group_flow,
    iou_matrix,
    nan_mean,
    pseudo_label_quality,
    scores,
)
from mbs.protocol import VOID, Protocol

SEEDS = st.integers(0, 2**32 - 1)


def label_maps(rng, n, size=300):
    "Make a ground truth with void and a prediction that often agrees with it; each may lack some classes."
    known = rng.choice(n, rng.integers(1, n + 1), replace=False)
    truth = rng.choice([*known, VOID], size)
    agrees = (truth != VOID) & (rng.random(size) < rng.random())
    others = rng.choice(n, rng.integers(1, n + 1), replace=False)
    predicted = np.where(agrees, truth, rng.choice(others, size))
    return truth.astype(np.uint8), predicted.astype(np.uint8)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_scores_and_shift(base, new, seed):
    p = Protocol(f"{base}-{new}", base + new)
    n = p[1].n_channels
    rng = np.random.default_rng(seed)
    truth = rng.choice([*range(n), VOID], size=200).astype(np.uint8)
    predicted = rng.integers(0, n, 200)
    confusion = Confusion(n).update(truth[:90], predicted[:90]) + Confusion(n).update(truth[90:], predicted[90:])
    valid = truth != VOID
    t, q = truth[valid].astype(int), predicted[valid]
    assert confusion.counts.sum() == valid.sum()
    iou = []
    for c in range(n):
        union = ((t == c) | (q == c)).sum()
        iou.append(((t == c) & (q == c)).sum() / union if (t == c).any() else math.nan)
    np.testing.assert_allclose(class_iou(confusion.counts), iou)
    s = scores(confusion, p[1])
    np.testing.assert_allclose(
        [s["old"], s["new"], s["all"], s["all_fg"]],
        [np.nanmean(iou[: base + 1]), np.nanmean(iou[base + 1 :]), np.nanmean(iou), np.nanmean(iou[1:])],
    )
    np.testing.assert_allclose(s["pixel_accuracy"], (t == q).mean())
    old, fresh = (t > 0) & (t <= base), t > base
    shift = background_shift(confusion, p[1])
    for flow, group, hit in (
        ("old->background", old, q == 0),
        ("new->background", fresh, q == 0),
        ("background->new", t == 0, q > base),
        ("old->new", old, q > base),
    ):
        np.testing.assert_allclose(shift[flow], hit[group].mean() if group.any() else math.nan)


def test_a_forgotten_class_raises_the_released_mean_and_lowers_ours():
    p = Protocol("2-1", 3)
    kept = Confusion(4, np.diag([100, 50, 50, 50]) + np.array([[0] * 4, [40, 0, 0, 0], [0] * 4, [0] * 4]))
    counts = kept.counts.copy()
    counts[1] = [90, 0, 0, 0]
    forgotten = Confusion(4, counts)
    a, b = scores(kept, p[1]), scores(forgotten, p[1])
    assert b["all"] < a["all"] and b["released"] > a["released"] - 0.05


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), SEEDS)
def test_agrees_with_scikit_learn(base, new, seed):
    p, rng = Protocol(f"{base}-{new}", base + new), np.random.default_rng(seed)
    n = p[1].n_channels
    truth, predicted = label_maps(rng, n)
    c = Confusion(n).update(truth.reshape(10, -1), predicted.reshape(10, -1))
    t, q = truth[truth != VOID], predicted[truth != VOID]
    if not len(t):
        return
    assert np.array_equal(c.counts, sk.confusion_matrix(t, q, labels=range(n)))
    iou = np.where(np.isin(range(n), t), sk.jaccard_score(t, q, labels=range(n), average=None, zero_division=0), np.nan)
    np.testing.assert_allclose(class_iou(c.counts), iou)
    np.testing.assert_allclose(
        class_accuracy(c.counts), sk.recall_score(t, q, labels=range(n), average=None, zero_division=np.nan)
    )
    s = scores(c, p[1])
    old, fresh = iou[1 : base + 1], iou[base + 1 :]

    def m(values):
        return statistics.fmean(values[~np.isnan(values)]) if (~np.isnan(values)).any() else math.nan

    want = dict(
        old=m(iou[: base + 1]),
        new=m(fresh),
        all=m(iou),
        old_fg=m(old),
        all_fg=m(iou[1:]),
        released=m(iou[iou > 0]),
        accuracy=statistics.fmean(sk.recall_score(t, q, labels=np.unique(t), average=None)),
        pixel_accuracy=sk.accuracy_score(t, q),
        tested=len(np.unique(t)),
        harmonic=math.nan if math.isnan(m(old) + m(fresh)) else statistics.harmonic_mean([m(old), m(fresh)]),
    )
    assert s.keys() == want.keys()
    for k in want:
        assert s[k] == pytest.approx(want[k], nan_ok=True), k
    group = np.digitize(np.arange(n), [1, base + 1])
    flow = sk.confusion_matrix(group[t], group[q], labels=range(3), normalize="true")
    there = np.isin(range(3), group[t])
    np.testing.assert_allclose(group_flow(c, p[1]), np.where(there[:, None], flow, np.nan))
    place = dict(background=0, old=1, new=2)
    for kind, rate in background_shift(c, p[1]).items():
        a, b = (place[k] for k in kind.split("->"))
        assert rate == pytest.approx(flow[a, b] if there[a] else math.nan, nan_ok=True)
    assert tuple(background_shift(c, p[1])) == FLOWS


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 5), SEEDS)
def test_pseudo_labels_agree_with_scikit_learn(n_old, seed):
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(3):
        truth = rng.choice([*range(n_old + 3), VOID], (9, 11)).astype(np.uint8)
        labels = np.where(
            truth == n_old, truth, np.where((truth == VOID) & (rng.random(truth.shape) < 0.5), VOID, 0)
        ).astype(np.uint8)
        pseudo = np.where(labels == 0, rng.choice([*range(n_old), VOID], truth.shape), labels).astype(np.uint8)
        pictures.append((labels, pseudo, truth))
    counted = PseudoLabelCounts(n_old)
    for maps in pictures:
        counted += PseudoLabelCounts(n_old).update(*maps)
    labels, pseudo, truth = (np.concatenate([maps[k].ravel() for maps in pictures]) for k in range(3))
    hidden = (labels == 0) & (truth != VOID)
    p, t = pseudo[hidden], truth[hidden]
    assert counted.counts.sum() == hidden.sum()
    q, objects = pseudo_label_quality(counted), range(1, n_old)
    assert q["precision"] == pytest.approx(
        sk.precision_score(t, p, labels=objects, average="micro", zero_division=np.nan), nan_ok=True
    )
    assert q["recall"] == pytest.approx(
        sk.recall_score(t, p, labels=objects, average="micro", zero_division=np.nan), nan_ok=True
    )
    np.testing.assert_allclose(
        [q["relabelled"], q["ignored"], q["ignored_objects"], q["lost_background"], q["kept_old"], q["kept_future"]],
        [
            np.isin(p, objects).mean(),
            (p == VOID).mean(),
            (t[p == VOID] > 0).mean(),
            (p[t == 0] > 0).mean(),
            np.isin(t[p == 0], objects).mean(),
            (t[p == 0] >= n_old).mean(),
        ],
    )


def test_perfect_pseudo_labels_and_no_pseudo_labels():
    truth = np.array([[0, 1, 2, 3, VOID]], np.uint8)
    labels = np.array([[0, 0, 0, 3, 0]], np.uint8)
    perfect = pseudo_label_quality(PseudoLabelCounts(3).update(labels, truth, truth))
    assert perfect["precision"] == perfect["recall"] == 1 and perfect["kept_old"] == perfect["ignored"] == 0
    none = pseudo_label_quality(PseudoLabelCounts(3).update(labels, labels, truth))
    assert math.isnan(none["precision"]) and none["recall"] == 0 and none["kept_old"] == 2 / 3
    with pytest.raises(ValueError, match="expected those of one step"):
        PseudoLabelCounts(3) + PseudoLabelCounts(4)
    with pytest.raises(ValueError, match="expected equal ones"):
        PseudoLabelCounts(3).update(labels, labels, truth[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 2), st.integers(1, 4), SEEDS)
def test_forgetting_and_transfer_by_their_definition(base, new, steps, seed):
    p = Protocol(f"{base}-{new}", base + new * (steps - 1)) if steps > 1 else Protocol("offline", base)
    rng = np.random.default_rng(seed)
    matrix = iou_matrix([Confusion(step.n_channels, rng.integers(0, 50, (step.n_channels,) * 2)) for step in p])
    falls, transfers, last = [], [], len(p.sizes) - 1
    for c, arrived in enumerate(p.first_step):
        if c == 0 or arrived == last:
            continue
        falls.append(max(matrix[t, c] for t in range(arrived, last)) - matrix[last, c])
        transfers.append(matrix[last, c] - matrix[arrived, c])
    f, b = forgetting(matrix, p.first_step), backward_transfer(matrix, p.first_step)
    np.testing.assert_allclose(f[~np.isnan(f)], falls)
    np.testing.assert_allclose(b[~np.isnan(b)], transfers)
    assert (nan_mean(f) >= -nan_mean(b) - 1e-12) or not falls, "the best IoU is at least the first one"


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["19-1", "15-5", "15-1", "10-1", "5-3", "2-2"]),
    st.sampled_from(["foreground", "both", "all only", "non-zero"]),
    SEEDS,
)
def test_a_row_always_fits_the_convention_it_was_made_in(split, convention, seed):
    "Rows are printed from per-class IoUs as each convention defines; the background is 100 - (100 - all) / 4."
    p, rng = Protocol(split), np.random.default_rng(seed)
    n_old = p.sizes[0]
    iou = rng.uniform(40, 95, 20)
    if convention == "non-zero":
        iou[rng.choice(20, rng.integers(1, 4), replace=False)] = 0
    background = 100 - (100 - iou[iou > 0].mean()) / 4
    old, new = iou[:n_old], iou[n_old:]
    with_background = np.append(iou, background)
    row = {
        "foreground": (old.mean(), new.mean(), iou.mean()),
        "both": (np.append(old, background).mean(), new.mean(), with_background.mean()),
        "all only": (old.mean(), new.mean(), with_background.mean()),
        "non-zero": (old.mean(), new.mean(), with_background[with_background > 0].mean()),
    }[convention]
    got = check_row(*np.round(row, 1), p)
    assert convention in got.fits, (got, row)
    if convention == "all only":
        assert got.background[0] - 1e-9 <= background <= got.background[1] + 1e-9
    if convention == "non-zero":
        assert (iou == 0).sum() in got.zeros


def test_rows_of_the_literature():
    for split, row in {"19-1": (82.5, 61.0, 82.1), "15-1": (79.6, 59.6, 75.6)}.items():  # Incrementer
        got = check_row(*row, split)
        assert (
            got.fits == ("all only",)
            and "with background" in str(got)
            and sum(got.background) / 2 == pytest.approx(95.6, abs=0.05)
        )
    for split, row in {
        "19-1": (81.5, 67.0, 80.8),
        "15-5": (82.7, 74.0, 80.5),
        "15-1": (82.3, 69.0, 79.0),
    }.items():  # MBS re-run A
        got = check_row(*row, split)
        assert got.fits[0] == "foreground" and "foreground only" in str(got) and "all only" not in got.fits
    ade = {"100-50": (47.7, 35.6, 43.7), "50-50": (54.4, 37.1, 42.9), "100-10": (47.7, 31.5, 42.3)}
    for split, row in ade.items():
        got = check_row(*row, Protocol(split, "ade"))
        assert got.fits == ("foreground",) and got.background is None


@pytest.mark.parametrize(
    "row,protocol,says",
    [
        ((80, 60, 101), "15-1", "expected three percentages"),
        ((float("nan"), 60, 70), "15-1", "expected three percentages"),
        ((80, 60, 70), Protocol("offline"), "brings no new class"),
        ((80, 60, 70), "100-50", "cannot split 20 classes"),
    ],
)
def test_invalid_rows_raise(row, protocol, says):
    with pytest.raises(ValueError, match=says):
        check_row(*row, protocol)


def test_a_background_that_is_not_tested_is_not_counted():
    "A background that is predicted but never true has no IoU."
    p, rng = Protocol("100-50", "ade"), np.random.default_rng(0)
    counts = rng.integers(1, 9, (151, 151))
    counts[0] = 0
    s, iou = scores(Confusion(151, counts), p[1]), class_iou(counts)
    assert (
        np.isnan(iou[0])
        and s["all"] == s["all_fg"] == pytest.approx(iou[1:].mean())
        and s["old"] == s["old_fg"]
        and s["accuracy"] == pytest.approx(class_accuracy(counts)[1:].mean())
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.sets(st.integers(0, 4)), SEEDS)
def test_means_are_over_the_same_classes_whatever_is_predicted(base, new, shown, seed):
    "Only the truth decides which classes count, so that two methods on one test part can be compared."
    p, rng = Protocol(f"{base}-{new}", base + new), np.random.default_rng(seed)
    n = p[1].n_channels
    truth = rng.choice(sorted({c % n for c in shown} | {VOID}), 300)
    methods = [Confusion(n).update(truth, rng.integers(0, k, 300)) for k in (1, n)]
    tested = np.isin(range(n), truth)
    for confusion in methods:
        assert (~np.isnan(class_iou(confusion.counts)) == tested).all()
        assert scores(confusion, p[1])["tested"] == tested.sum()
    iou = np.where(tested, np.nan_to_num(class_iou(methods[1].counts)), 0)
    if tested.any():
        assert scores(methods[1], p[1])["all"] == pytest.approx(iou.sum() / tested.sum())
        positive = iou[iou > 0]
        released = scores(methods[1], p[1])["released"]
        assert released == pytest.approx(positive.mean()) if len(positive) else np.isnan(released)
