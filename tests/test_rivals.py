"MiB, PLOP, ablations and new methods: compared with literal formulas in loops, in their limits, and in whole runs."

import json
import math
import shutil
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from golden import close
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import make_step
from torch.nn import functional as F

from mbs.experiment import Experiment
from mbs.feature_distillation import local_pod, pool_strips
from mbs.label_quality import make_pseudo_label_examples
from mbs.methods import ABLATIONS, Method
from mbs.objective import binary_cross_entropy, cross_entropy, make_training_labels, step_loss
from mbs.output_distillation import output_distillation, unbiased_distillation
from mbs.parts import METHODS, Parts
from mbs.protocol import VOID
from mbs.pseudo_labels import confident_share, entropy_pseudo_labels, entropy_thresholds, teacher_uncertainty
from mbs.segmenter import Segmenter, SegmenterOutput
from mbs.settings import Settings
from mbs.views import StepView
from mbs.weights import make_encoder

seeds = st.integers(0, 2**31)
SIZES = dict(n_old=st.integers(2, 5), n_new=st.integers(1, 3), seed=seeds)
few = settings(max_examples=25, deadline=None)


def draw(seed, *shape, scale=2.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(seed, *shape, channels):
    "Random labels among `channels`."
    pick = torch.randint(len(channels), shape, generator=torch.Generator().manual_seed(seed + 1))
    return torch.tensor(channels)[pick]


def softmax(z):
    "Of a list of numbers."
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def pixels(*maps):
    "All (b, y, x)."
    b, *_, h, w = maps[0].shape
    return product(range(b), range(h), range(w))


# MiB


@few
@given(**SIZES)
def test_unbiased_cross_entropy_is_the_formula(n_old, n_new, seed):
    z, y = draw(seed, 2, n_old + n_new, 3, 2), labels(seed, 2, 3, 2, channels=[0, *range(n_old, n_old + n_new), VOID])
    costs = []
    for b, i, j in pixels(z):
        p, label = softmax(z[b, :, i, j].tolist()), int(y[b, i, j])
        if label != VOID:
            costs.append(-math.log(sum(p[:n_old]) if label == 0 else p[label]))
    close(cross_entropy(z, y, n_old), sum(costs) / max(1, len(costs)))


@few
@given(**SIZES)
def test_unbiased_distillation_is_the_formula(n_old, n_new, seed):
    z, t = draw(seed, 2, n_old + n_new, 3, 2), draw(seed + 1, 2, n_old, 3, 2)
    costs = []
    for b, i, j in pixels(z):
        p, q = softmax(z[b, :, i, j].tolist()), softmax(t[b, :, i, j].tolist())
        costs.append(
            -(q[0] * math.log(p[0] + sum(p[n_old:])) + sum(q[c] * math.log(p[c]) for c in range(1, n_old))) / n_old
        )
    close(unbiased_distillation(z, t), sum(costs) / len(costs))


@few
@given(n=st.integers(2, 6), seed=seeds)
def test_unbiased_losses_in_their_limits(n, seed):
    "Without old classes: plain cross-entropy. Without new classes: plain distillation. Both in value and gradient."
    t, y = draw(seed + 1, 2, n, 3, 2), labels(seed, 2, 3, 2, channels=list(range(n)))
    for mine, plain in (
        (lambda z: cross_entropy(z, y, 1), lambda z: F.cross_entropy(z, y)),
        (lambda z: unbiased_distillation(z, t), lambda z: output_distillation(z, t)),
    ):
        grads = []
        for loss in (mine, plain):
            z = draw(seed, 2, n, 3, 2).requires_grad_()
            value = loss(z)
            value.backward()
            grads.append((value.detach(), z.grad))
        close(grads[0][0], grads[1][0])
        close(grads[0][1], grads[1][1])


def test_unbiased_losses_do_not_see_how_the_background_is_shared():
    "A label 'background' does not care which old class has it, the teacher's background not which new one."
    z, y, t = draw(0, 2, 6, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long), draw(1, 2, 4, 4, 4)
    close(cross_entropy(z, y, 4), cross_entropy(z[:, [2, 3, 0, 1, 4, 5]], y, 4))
    close(unbiased_distillation(z, t), unbiased_distillation(z[:, [5, 1, 2, 3, 0, 4]], t))


def test_balanced_start_shares_the_background():
    """Scale and bias of background and new classes are equal; other classes keep theirs.

    The biases together are worth as much as the background's was.
    """
    torch.manual_seed(0)
    model = Segmenter(
        make_encoder("vit_tiny_patch16_224", image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1), [1, 2]
    )
    for p in (*model.decoder.mask_norm.weight, *model.decoder.mask_norm.bias):
        p.data.normal_()
    before, teacher = model.decoder.mask_norm.bias[0].item(), model.frozen()
    for name in ("mib", "plop"):
        norm = Method(name).grow(teacher.frozen(), make_step(3, 3)).decoder.mask_norm
        shared = torch.cat([norm.bias[0], norm.bias[-1]])
        close(shared.exp().sum().log(), before, torch.float32)
        assert shared.unique().numel() == 1
        assert (norm.weight[-1] == teacher.decoder.mask_norm.weight[0]).all() and norm.bias[1].equal(
            teacher.decoder.mask_norm.bias[1]
        )
    assert teacher.decoder.mask_norm.bias[0].item() == before, "the teacher was changed"
    assert Method("mbs").grow(teacher.frozen(), make_step(3, 3)).decoder.mask_norm.bias[0].item() == before


# PLOP


def literal_pod(a, b, scales=(1, 2, 4)):
    "Every region, row and column in turn; sides must be divisible by the scales."
    distances = []
    for one, other in zip(a.square().numpy(), b.square().numpy()):
        h, w = one.shape[1:]
        squares = 0.0
        for s in scales:
            for i, j in product(range(s), range(s)):
                part = (slice(None), slice(i * h // s, (i + 1) * h // s), slice(j * w // s, (j + 1) * w // s))
                difference = one[part] - other[part]
                squares += (difference.mean(2) ** 2).sum() + (difference.mean(1) ** 2).sum()
        distances.append(math.sqrt(squares))
    return sum(distances) / len(distances)


@few
@given(h=st.sampled_from([4, 8]), w=st.sampled_from([4, 8, 12]), d=st.integers(1, 3), seed=seeds)
def test_local_pod_is_the_loop(h, w, d, seed):
    a, b = draw(seed, 2, d, h, w), draw(seed + 1, 2, d, h, w)
    close(local_pod(a, b), literal_pod(a, b))
    assert pool_strips(a).shape == (2, 7 * d * (h + w))


@pytest.mark.parametrize("h,w", [(1, 1), (2, 3), (5, 7)])
def test_local_pod_on_any_grid(h, w):
    "Grids smaller than the number of regions, or not divisible by it; equal maps are at distance 0 with gradient 0."
    a = draw(0, 1, 2, h, w).requires_grad_()
    for other in (draw(1, 1, 2, h, w), a.detach()):
        loss = local_pod(a, other)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(a.grad).all()
    assert loss == 0


def literal_uncertainty(q):
    return -sum(v * math.log(v) for v in q if v > 0) / math.log(len(q))


@few
@given(n_old=st.integers(2, 5), seed=seeds)
def test_entropy_rule_is_the_loop(n_old, seed):
    "Pseudo-labels and ν, pixel by pixel."
    t, y = draw(seed, 2, n_old, 3, 4), labels(seed, 2, 3, 4, channels=[0, 0, n_old, VOID])
    thresholds = np.random.default_rng(seed).uniform(0, 1, n_old).tolist()
    mine = entropy_pseudo_labels(y, t, thresholds)
    candidates, sure = [0, 0], [0, 0]
    for b, i, j in pixels(t):
        q, want = softmax(t[b, :, i, j].tolist()), int(y[b, i, j])
        if want == 0:
            k = int(np.argmax(q))
            want = k if literal_uncertainty(q) < thresholds[k] else VOID
            candidates[b] += 1
            sure[b] += want != VOID
        assert mine[b, i, j] == want
    close(
        confident_share(y, mine), torch.tensor([s / c if c else 1.0 for s, c in zip(sure, candidates)]), torch.float32
    )
    assert mine.dtype == y.dtype and entropy_pseudo_labels(y.to(torch.uint8), t, thresholds).dtype == torch.uint8


@few
@given(n_old=st.integers(2, 4), batches=st.integers(1, 3), scale=st.floats(0.1, 8), seed=seeds)
def test_thresholds_are_medians(n_old, batches, scale, seed):
    """Each is within a bin of the two middle entropies of its class, however the pictures are batched.

    A class that is never predicted gets the floor.
    """
    pairs = [
        (labels(seed + k, 2, 9, 9, channels=[0, 0, 0, n_old]), draw(seed + k, 2, n_old, 9, 9, scale=scale))
        for k in range(batches)
    ]
    mine = entropy_thresholds(pairs, n_old).numpy()
    target, u, best = (
        torch.cat(parts).numpy() for parts in zip(*((y, teacher_uncertainty(t), t.argmax(1)) for y, t in pairs))
    )
    for c in range(n_old):
        values = np.sort(u[(target == 0) & (best == c)])
        if not len(values):
            assert mine[c] == np.float32(1e-3)
            continue
        low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
        assert max(1e-3, low - 0.001) - 1e-6 <= mine[c] <= max(1e-3, high + 0.001) + 1e-6
    joined = entropy_thresholds([tuple(torch.cat(parts) for parts in zip(*pairs))], n_old)
    assert torch.equal(joined, torch.from_numpy(mine))


def test_threshold_of_many_pixels_is_numpys_median():
    t, y = draw(3, 4, 3, 100, 100), torch.zeros(4, 100, 100)
    u, best = teacher_uncertainty(t).numpy(), t.argmax(1).numpy()
    close(entropy_thresholds([(y, t)], 3), torch.tensor([np.median(u[best == c]) for c in range(3)]), rtol=1e-3)


def test_a_class_of_certain_pixels_is_rescued():
    "A median of 0 would let none of them pass."
    t = torch.full((1, 2, 4, 4), -60.0)
    t[:, 1] = 60
    y = torch.zeros(1, 4, 4, dtype=torch.long)
    assert (entropy_pseudo_labels(y, t, entropy_thresholds([(y, t)], 2)) == 1).all() and (
        entropy_pseudo_labels(y, t, [0.0, 0.0]) == VOID
    ).all()


@few
@given(n_old=st.integers(2, 4), seed=seeds)
def test_adaptive_cross_entropy_is_the_loop(n_old, seed):
    "ν of each picture times the cross-entropies of its pixels, divided by all pixels, ignored ones too."
    z, y = draw(seed, 2, n_old + 1, 3, 4), labels(seed, 2, 3, 4, channels=[0, 0, n_old, VOID])
    mine = y.clone()
    mine[:, :, :2][y[:, :, :2] == 0] = VOID
    total = 0.0
    for b in range(2):
        candidates = (y[b] == 0).sum().item()
        nu = ((y[b] == 0) & (mine[b] != VOID)).sum().item() / candidates if candidates else 1.0
        total += nu * sum(
            -math.log(softmax(z[b, :, i, j].tolist())[int(mine[b, i, j])])
            for i, j in product(range(3), range(4))
            if mine[b, i, j] != VOID
        )
    close(cross_entropy(z, mine, factor=confident_share(y, mine).double()), total / y.numel(), rtol=1e-6)


def test_plop_terms():
    "The pooled term has PLOP's weight and schedule, and the cross-entropy is that of the pseudo-labels and ν."
    torch.manual_seed(0)
    method = Method("plop")
    teacher, student = (
        SegmenterOutput(
            F.interpolate(z, scale_factor=2), z, torch.randn(2, 16, 6), torch.randn(2, c, 6), torch.randn(c, 6)
        )
        for c, z in ((3, torch.randn(2, 3, 4, 4)), (5, torch.randn(2, 5, 4, 4)))
    )
    y = labels(0, 2, 8, 8, channels=[0, 3, 4])
    method.found = dict(thresholds=[0.8, 0.9, 0.7])
    terms = method.loss(student, teacher, y, make_step(3, 2))
    relabelled = entropy_pseudo_labels(y, teacher.logits, [0.8, 0.9, 0.7])
    assert set(terms) == {"loss", "cross_entropy", "patch_features"} and torch.equal(
        make_training_labels(y, teacher, method.parts, [0.8, 0.9, 0.7]), relabelled
    )
    maps = (out.patches.mT.reshape(2, 6, 4, 4).double() for out in (student, teacher))
    close(terms["patch_features"], 0.01 * math.sqrt(5 / 2) * literal_pod(*maps), torch.float32)
    close(
        terms["cross_entropy"],
        cross_entropy(student.logits, relabelled, factor=confident_share(y, relabelled)),
        torch.float32,
    )
    with pytest.raises(ValueError, match="thresholds"):
        Method("plop").loss(student, teacher, y, make_step(3, 2))


# Precision, and inputs with nothing in them


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "all void", "no old pixel", "background only"])
@pytest.mark.parametrize("scale", [1, 200])
def test_half_precision_is_finite_and_close(dtype, kind, scale):
    """Losses of half-precision inputs are computed in float32.

    They are finite in value and gradient, and equal to the losses of the same numbers in float32.
    """
    y = {
        "random": labels(0, 2, 8, 8, channels=[0, 3, VOID]),
        "all void": torch.full((2, 8, 8), VOID),
        "no old pixel": torch.full((2, 8, 8), 3),
        "background only": torch.zeros(2, 8, 8, dtype=torch.long),
    }[kind]
    parts = Parts(
        cross_entropy="unbiased",
        pseudo_labels="entropy",
        adaptive_factor=True,
        feature_distillation="local-pod",
        output_distillation="unbiased",
    )
    z, patches = (scale * draw(k, 2, *shape, scale=1.0).to(dtype) for k, shape in enumerate(((4, 8, 8), (16, 6))))
    old = SegmenterOutput(
        (scale * draw(5, 2, 3, 8, 8, scale=1.0)).to(dtype),
        torch.zeros(2, 3, 4, 4, dtype=dtype),
        (scale * draw(6, 2, 16, 6, scale=1.0)).to(dtype),
        None,
        None,
    )
    values = []
    for as_ in (torch.Tensor.clone, torch.Tensor.float):
        leaves = [as_(z).requires_grad_(), as_(patches).requires_grad_()]
        teacher = SegmenterOutput(*(as_(x) if isinstance(x, torch.Tensor) else x for x in old))
        student = SegmenterOutput(leaves[0], None, leaves[1], None, None)
        thresholds = entropy_thresholds([(y, teacher.logits)], 3).tolist()
        terms = step_loss(student, teacher, y, parts, make_step(3, 1), thresholds)
        terms["loss"].backward()
        assert all(torch.isfinite(v) for v in terms.values()) and all(
            torch.isfinite(leaf.grad).all() for leaf in leaves
        )
        assert all(v.dtype == torch.float32 for v in terms.values())
        values.append(torch.stack([v.detach() for v in terms.values()]))
    close(values[0], values[1], torch.float32)


def test_training_under_autocast():
    "A whole forward and backward pass of each rival in bfloat16 autocast."
    torch.manual_seed(0)
    images, y = torch.randn(2, 3, 32, 32), labels(0, 2, 32, 32, channels=[0, 3, VOID])
    for name in ("mib", "plop"):
        base = Segmenter(
            make_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2),
            [1, 2],
        )
        method, teacher = Method(name), base.frozen()
        student = method.grow(base, make_step(3, 1)).train()
        method.prepare(student, teacher, [(images, y)], make_step(3, 1))
        with torch.autocast("cpu", torch.bfloat16):
            terms = method.loss(student(images), teacher(images), y, make_step(3, 1))
        terms["loss"].backward()
        assert all(torch.isfinite(v) for v in terms.values()) and all(
            torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None
        )


def test_base_step_is_the_same_for_every_method():
    "Without a teacher there is only the plain cross-entropy of the head."
    z, y = draw(0, 2, 4, 8, 8), labels(0, 2, 8, 8, channels=[0, 1, 2, 3, VOID])
    student = SegmenterOutput(z, None, None, None, None)
    for name in METHODS:
        terms = Method(name).loss(student, None, y, make_step(1, 3))
        assert list(terms) == ["loss", "cross_entropy"]
        has_softmax = METHODS[name].head == "softmax"
        expected = F.cross_entropy(z, y, ignore_index=VOID) if has_softmax else binary_cross_entropy(z, y)
        close(terms["loss"], expected)


def test_unbiased_cross_entropy_needs_no_teacher():
    "It is in force in a later step without a teacher."
    z, y = draw(0, 2, 4, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
    method = Method("finetune", cross_entropy="unbiased")
    assert not method.needs_teacher
    terms = method.loss(SegmenterOutput(z, None, None, None, None), None, y, make_step(3, 1))
    close(terms["loss"], cross_entropy(z, y, 3))


# Ablations


def test_ablations_differ_in_what_their_names_say():
    rows = {name: Method(row["method"], **row["parts"]).parts.model_dump() for name, row in ABLATIONS.items()}
    assert (
        rows["mbs"] == METHODS["mbs"].model_dump()
        and rows["kd"] == METHODS["kd"].model_dump()
        and rows["ce"] == Parts().model_dump()
    )

    def changed(a, b):
        return {k for k in rows[a] if rows[a][k] != rows[b][k]}

    ladder = ["ce", "ce+output", "ce+both", "ce+both+transfer", "ce+both+transfer+pseudo", "mbs"]
    steps = [
        {"output_distillation"},
        {"feature_distillation"},
        {"weight_transfer"},
        {"pseudo_labels", "ignore_uncertain"},
        {"orthogonality"},
    ]
    assert [changed(a, b) for a, b in pairwise(ladder)] == steps and changed("ce", "ce+features") == {
        "feature_distillation"
    }
    one_out = {
        "mbs-relabel": {"pseudo_labels"},
        "mbs-ignore": {"ignore_uncertain"},
        "mbs-pseudo": {"pseudo_labels", "ignore_uncertain"},
        "mbs-features": {"feature_distillation"},
        "mbs-adaptive": {"feature_distillation"},
        "mbs-output": {"output_distillation"},
        "mbs-guided": {"output_distillation"},
        "mbs-transfer": {"weight_transfer"},
    }
    assert {name: changed("mbs", name) for name in one_out} == one_out
    assert set(ladder) | set(one_out) | {"ce+features", "kd"} == set(ABLATIONS)
    for name, row in ABLATIONS.items():
        Settings.checked(name=name, **row)  # a row is a run, and its name is one for a folder


# Whole runs

SHORT = dict(
    protocol="6-1",
    scenes=dict(n_train=40, n_test=8, size=32),
    samples=1,
    training=dict(crop=32, batch=8, iterations=4, new_iterations=3, optimizer="adamw"),
)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("finetune", "joint", "kd", "mbs")])
def test_run(name, tmp_path, monkeypatch):
    "Every rival goes through a protocol, resumes after a cut with the same result, and keeps what it found."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    run = Experiment(Settings(name=name, method=name, **SHORT), tmp_path).run()
    assert run.finished and all(math.isfinite(r["loss"]) for r in run.log())
    counts = run.confusion().counts
    shutil.rmtree(run.step_path(2))
    experiment = Experiment(Settings(name=name, method=name, **SHORT), tmp_path)
    assert (experiment.run().confusion().counts == counts).all()
    if name == "plop":
        assert "thresholds" not in run.metrics(0) and [len(run.metrics(t)["thresholds"]) for t in (1, 2)] == [7, 8]
        experiment.setup.method.found = {}
        for step in list(run.protocol)[1:]:
            assert len(make_pseudo_label_examples(experiment.setup, run, step, 2)[3]) == 2


def test_prepare_loads_the_step_only_if_it_reads_it(tmp_path, monkeypatch):
    "`prepare` gets every picture of the step once; a method that does not read its batches has none loaded."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    seen, loaded = [], []
    original = StepView.__getitem__

    def load(self, i):
        loaded.append((self.data.part, self.step.number))
        return original(self, i)

    monkeypatch.setattr(StepView, "__getitem__", load)

    class Curious(Method):
        def prepare(self, student, teacher, batches, step):
            if step.number == 0:
                return
            assert (
                student.n_channels == step.n_channels
                and not teacher.training
                and not any(p.requires_grad for p in teacher.parameters())
            )
            seen.append(sum(len(images) for images, _ in batches))

    plain = Experiment(Settings(name="plain", method="kd", **SHORT), tmp_path).run()
    assert loaded.count(("train", 1)) == 3 * min(8, plain.card.images[1])  # three iterations, nothing else
    Experiment(Settings(name="curious", method="kd", **SHORT), tmp_path, Curious).run()
    assert seen == plain.card.images[1:]


def test_a_new_method_trains(tmp_path, monkeypatch):
    "A subclass with a name in METHODS trains, and its parts can be switched; a name without parts is refused."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    monkeypatch.setitem(METHODS, "tired", Parts(output_distillation="plain"))

    class Tired(Method):
        def prepare(self, student, teacher, batches, step):
            self.found = dict(pictures=[sum(len(y) for _, y in batches)])

        def loss(self, student, teacher, target, step):
            terms = super().loss(student, teacher, target, step)
            extra = 1e-3 * student.logits.square().mean()
            return terms | dict(loss=terms["loss"] + extra, rest=extra)

    run = Experiment(
        Settings(name="tired", method="tired", parts=dict(output_weight=3), **SHORT), tmp_path, Tired
    ).run()
    assert run.finished and {"rest", "output"} <= set(run.log()[-1]) and run.card.parts.output_weight == 3
    assert run.metrics(1)["pictures"] == [run.card.images[1]]
    assert json.loads(run.step_path(1, "metrics.json").read_text())["pictures"]
    with pytest.raises(ValueError, match="'nobody' is not known"):
        Experiment(Settings(name="n", method="nobody", **SHORT), tmp_path, Tired)
