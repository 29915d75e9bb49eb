"Metrics against an independent count, pixel by pixel."
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mbs.metrics import Confusion, background_shift, class_iou, scores
from mbs.protocol import VOID, Protocol


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_scores_and_shift(base, new, seed):
    p = Protocol(f"{base}-{new}", base + new)
    n = p.n_channels(1)
    rng = np.random.default_rng(seed)
    truth = rng.choice([*range(n), VOID], size=200).astype(np.uint8)
    predicted = rng.integers(0, n, 200)
    confusion = Confusion(n).update(truth[:90], predicted[:90]) + Confusion(n).update(truth[90:], predicted[90:])
    valid = truth != VOID
    t, q = truth[valid].astype(int), predicted[valid]
    assert confusion.counts.sum() == valid.sum()
    iou = [((t == c) & (q == c)).sum() / union if (union := ((t == c) | (q == c)).sum()) else math.nan for c in range(n)]
    np.testing.assert_allclose(class_iou(confusion.counts), iou)
    s = scores(confusion, p, 1)
    np.testing.assert_allclose([s["old"], s["new"], s["all"], s["all_fg"]],
                               [np.nanmean(iou[:base + 1]), np.nanmean(iou[base + 1:]), np.nanmean(iou), np.nanmean(iou[1:])])
    np.testing.assert_allclose(s["pixel_accuracy"], (t == q).mean())
    old, fresh = (t > 0) & (t <= base), t > base
    shift = background_shift(confusion, p, 1)
    np.testing.assert_allclose(shift["old->background"], (q[old] == 0).mean() if old.any() else math.nan)
    np.testing.assert_allclose(shift["new->background"], (q[fresh] == 0).mean() if fresh.any() else math.nan)
    np.testing.assert_allclose(shift["background->new"], (q[t == 0] > base).mean() if (t == 0).any() else math.nan)
    np.testing.assert_allclose(shift["old->new"], (q[old] > base).mean() if old.any() else math.nan)


def test_a_forgotten_class_raises_the_released_mean_and_lowers_ours():
    p = Protocol("2-1", 3)
    kept = Confusion(4, np.diag([100, 50, 50, 50]) + np.array([[0] * 4, [40, 0, 0, 0], [0] * 4, [0] * 4]))
    counts = kept.counts.copy()
    counts[1] = [90, 0, 0, 0]
    forgotten = Confusion(4, counts)
    a, b = scores(kept, p, 1), scores(forgotten, p, 1)
    assert b["all"] < a["all"] and b["released"] > a["released"] - .05
