"The closed-form identity: exact in any order, exact without a picture, finite on degenerate input, safe on disk."

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mbs.augment import Normalisation, TestTransform
from mbs.comparison import group_runs
from mbs.data import open_data
from mbs.experiment import Experiment
from mbs.feature_distillation import reliability
from mbs.identity import (
    IdentifiedSegmenter,
    Identity,
    choose_best,
    leave_picture_out,
    make_empty_sums,
    measure_coverage,
    replace_identity,
    score_choices,
    solve_ridge,
    sum_patches,
)
from mbs.identity_learning import learn_identity
from mbs.inference import segment
from mbs.methods import Method
from mbs.objective import cross_entropy, step_loss
from mbs.output_distillation import label_guided_distillation
from mbs.parts import Parts
from mbs.protocol import VOID, Protocol
from mbs.pseudo_labels import selective_pseudo_labels
from mbs.report_tables import make_identity_table
from mbs.run import load_run
from mbs.segmenter import Segmenter, SegmenterOutput
from mbs.settings import Settings
from mbs.views import StepView
from mbs.weights import make_encoder

ANALYTIC = dict(method="mbs-analytic", parts=dict(identity_width=32))
HALF = Normalisation((0.5,) * 3, (0.5,) * 3)


def draw_patches(seed, n_classes=6, n=240, width=20):
    "Draw features (n, width) and soft coverage (n, n_classes) of patches; some lie on two classes."
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, width, generator=generator, dtype=torch.float64).relu()
    coverage = torch.rand(n, n_classes, generator=generator, dtype=torch.float64)
    return z, coverage * (coverage > 0.7)


@given(st.permutations(range(6)), st.sets(st.integers(1, 5)), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_order_and_grouping_gives_the_joint_solution(order, cuts, seed):
    z, coverage = draw_patches(seed)
    counts = coverage.sum(0)
    joint = solve_ridge(sum_patches(z, coverage, counts), 0.05)
    arrived, edges = make_empty_sums(z.shape[1]), [0, *sorted(cuts), 6]
    for first, end in pairwise(edges):
        classes = list(order[first:end])
        shown = (coverage[:, classes] > 0).any(1)  # a step sees no other patch
        arrived = arrived.join(sum_patches(z[shown], coverage[shown][:, classes], counts[classes]))
    assert (solve_ridge(arrived, 0.05) - joint[:, list(order)]).abs().max() < 1e-9 * joint.abs().max()


def test_solution_is_the_weighted_regression_written_out():
    z, coverage = draw_patches(3)
    counts = coverage.sum(0)
    gram, right = np.zeros((20, 20)), np.zeros((20, 6))
    for p in range(len(z)):
        for c in range(6):
            weight = float(coverage[p, c] / counts[c])
            gram += weight * np.outer(z[p], z[p])
            right[:, c] += weight * z[p].numpy()
    expected = np.linalg.solve(gram + 0.3 * np.trace(gram) / 20 * np.eye(20), right)
    assert np.abs(solve_ridge(sum_patches(z, coverage, counts), 0.3).numpy() - expected).max() < 1e-10


@given(st.integers(0, 99), st.floats(1e-4, 10))
@settings(max_examples=20, deadline=None)
def test_leaving_a_picture_out_is_solving_without_it(seed, ridge):
    z, coverage = draw_patches(seed)
    used = (coverage > 0).any(1)
    z, coverage = z[used], coverage[used]
    counts = coverage.sum(0)
    sums = sum_patches(z, coverage, counts)
    eigenvalues, basis = torch.linalg.eigh(sums.gram)
    rotated = sums._replace(means=sums.means @ basis)
    scores = leave_picture_out(z[:9] @ basis, coverage[:9], rotated, eigenvalues, ridge)
    without = sum_patches(z[9:], coverage[9:], counts)
    solution = solve_ridge(without, ridge * float(sums.gram.trace() / without.gram.trace()))
    assert (scores - z[:9] @ solution).abs().max() < 1e-9


def test_choice_ignores_labels_that_features_cannot_explain():
    "With noise as features the strongest ridge and the flattest probabilities win; with the labels themselves, not."
    generator = torch.Generator().manual_seed(0)
    coverage = F.one_hot(torch.arange(400) % 4, 4).double()
    for noise, z in ((True, torch.randn(400, 30, generator=generator).double()), (False, coverage)):
        sums = sum_patches(z, coverage, coverage.sum(0))
        pictures = [(z[k : k + 8], coverage[k : k + 8]) for k in range(0, 400, 8)]
        losses, counts = score_choices(pictures, sums, (1e-3, 1e-1, 10), (1, 4, 16))
        ridge, sharpness = choose_best(losses, counts)
        assert counts.tolist() == [100] * 4
        assert (ridge, sharpness) == (2, 0) if noise else (ridge == 0 and sharpness == 2)


def test_coverage_counts_pixels_of_padded_patches():
    labels = torch.full((1, 5, 7), 255)
    labels[0, 4, 6] = 3
    coverage = measure_coverage(labels, [2, 3], 4)
    assert coverage.shape == (1, 4, 2) and coverage[0, 3].tolist() == [0, 1 / 16] and coverage.sum() == 1 / 16


@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_background_keeps_its_probability(share):
    generator = torch.Generator().manual_seed(1)
    log_p = torch.randn(2, 5, 3, 4, generator=generator).log_softmax(1)
    log_identity = torch.randn(2, 3, 3, 4, generator=generator).log_softmax(1)
    known = torch.tensor([1, 3, 4])
    p, mixed = log_p.exp(), replace_identity(log_p, log_identity, known, share).exp()
    assert torch.allclose(mixed.sum(1), torch.ones(2, 3, 4), atol=1e-6)
    assert torch.allclose(mixed[:, [0, 2]], p[:, [0, 2]])
    expected = p[:, known] ** (1 - share) * log_identity.exp() ** share
    expected = expected / expected.sum(1, keepdim=True) * p[:, known].sum(1, keepdim=True)
    assert torch.allclose(mixed[:, known], expected, atol=1e-6)


class Pictures:
    "A data set of drawn pictures, each with one class in a square."

    def __init__(self, classes, side=48, square=20, n_classes=3):
        self.classes = [f"class {k}" for k in range(n_classes)]
        self.part = "train"
        self.ids = [str(k) for k in range(len(classes))]
        self.sizes = np.full((len(classes), 2), side)
        self.items = []
        rng = np.random.default_rng(0)
        for class_id in classes:
            photo = rng.integers(0, 255, (side, side, 3)).astype(np.uint8)
            mask = np.zeros((side, side), np.uint8)
            mask[:square, :square] = class_id
            photo[:square, :square, class_id % 3] = 255
            self.items.append((photo, mask))
        self.index = np.array([[k == c for k in range(n_classes + 1)] for c in classes])

    def __len__(self):
        return len(self.items)

    def __getitem__(self, position):
        return self.items[position]


def make_network(n_classes, encoder="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    return Segmenter(make_encoder(encoder, image_size=48, **options), [1, n_classes], dim=32, heads=2).eval()


TINY = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2)


def learn(data, protocol, network, width=16):
    identity = Identity(network.encoder.dim, width)
    for step in protocol:
        learn_identity(identity, network, StepView(data, step, TestTransform(), HALF, "train", step.select(data.index)))
    return identity


@pytest.mark.parametrize("split", ["2-1", "1-1"])
def test_class_with_one_picture_and_class_without_any(split):
    "A class of one picture is learnt; a class without a patch keeps what the network says; all stays finite."
    data, network = Pictures([1] * 5 + [2]), make_network(3, **TINY)
    identity = learn(data, Protocol(split, 3), network)
    assert identity.known.tolist() == [1, 2] and identity.weights.isfinite().all()
    both, image = IdentifiedSegmenter(network, identity), torch.randn(1, 3, 50, 41)
    own, mixed = network(image).patch_logits.softmax(1), both(image).patch_logits.exp()
    assert torch.allclose(own[:, [0, 3]], mixed[:, [0, 3]], atol=1e-5) and mixed.isfinite().all()


def test_objects_smaller_than_a_patch_count():
    data, network = Pictures([1, 2, 3] * 3, square=3), make_network(3, **TINY)
    identity = learn(data, Protocol("2-1", 3), network)
    assert identity.known.tolist() == [1, 2, 3] and torch.allclose(identity.counts, torch.tensor(3 * 9 / 64).double())


def test_constant_features_decide_nothing():
    "An encoder whose tokens are all equal leaves every class the same score."
    data, network = Pictures([1, 2, 3] * 2), make_network(3, **TINY)
    for parameter in network.encoder.parameters():
        parameter.data.zero_()
    identity = learn(data, Protocol("2-1", 3), network)
    log_p = identity(network.encode(torch.randn(1, 3, 48, 48)), (6, 6))
    assert log_p.isfinite().all() and (log_p - log_p.mean()).abs().max() < 1e-3


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"])
def test_every_kind_of_encoder(encoder):
    data = Pictures([1, 2, 3] * 2, side=64)
    network = make_network(3, encoder, **(TINY if encoder.startswith("vit") else {}))
    identity = learn(data, Protocol("2-1", 3), network)
    labels = segment(IdentifiedSegmenter(network, identity), data[0][0], HALF)
    assert labels.shape == (64, 64) and labels.max() <= 3


def test_150_classes():
    z, coverage = draw_patches(0, n_classes=150, n=900, width=24)
    weights = solve_ridge(sum_patches(z, coverage, coverage.sum(0)), 0.1)
    assert weights.shape == (24, 150) and weights.isfinite().all()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    return tmp_path


def test_network_is_that_of_the_method_without_identity(home):
    "The regression changes predictions and nothing else; with share 0 it does not even change them."
    plain = Experiment(Settings(name="plain"), home).run()
    analytic = Experiment(Settings(name="analytic", **ANALYTIC), home).run()
    silent = Experiment(Settings(name="silent", method="mbs", parts=dict(identity="analytic", identity_share=0)), home)
    silent = silent.run()
    for run in (analytic, silent):
        assert run.metrics(0)["base_from"] == "analytic" or run.metrics(0)["base_from"] == "plain"
        assert run.log() == plain.log()
        pairs = zip(plain.model().state_dict().values(), run.model(identity=False).state_dict().values())
        assert all(torch.equal(a, b) for a, b in pairs)
    assert (silent.confusion().counts == plain.confusion().counts).all()
    assert (analytic.confusion().counts != plain.confusion().counts).any()


def test_prediction_reads_the_identity_from_disk(home):
    run = Experiment(Settings(name="run", **ANALYTIC), home).run()
    sample = run.samples()[0]
    assert all((run.predict(sample.photo, t) == labels).all() for t, labels in enumerate(sample.predictions))
    assert run.model(identity=False).state_dict().keys() == load_file(run.step_path(3, "model.safetensors")).keys()
    with pytest.raises(ValueError, match=r"has no identity: expected a run with parts\.identity=analytic"):
        Experiment(Settings(name="plain"), home).run().identity()


def make_output(logits, **more):
    "An output of patches of one pixel."
    size = tuple(logits.shape[2:])
    patches = torch.zeros(len(logits), logits[0, 0].numel(), 4)
    features, tokens = torch.zeros(len(logits), logits.shape[1], 4), torch.zeros(logits.shape[1], 4)
    return SegmenterOutput(None, logits, patches, features, tokens, size, size, **more)


@pytest.mark.parametrize("teaches", [False, True, "labels", "targets"])
def test_identity_teaches_what_the_switch_says(teaches):
    "Each use of the teacher reads the network's own logits or the corrected ones, and reliability reads no difference."
    generator = torch.Generator().manual_seed(4)
    own = (3 * torch.randn(2, 4, 6, 8, generator=generator)).log_softmax(1)
    changed = own.clone()
    changed[:, [1, 2, 3]] = own[:, [3, 1, 2]]  # other classes, the same background
    student = make_output(torch.randn(2, 5, 6, 8, generator=generator))
    target = torch.tensor([0, 0, 4, VOID])[torch.randint(4, (2, 6, 8), generator=generator)]
    parts = Method("mbs-analytic", identity_teacher=teaches, orthogonality=False, threshold=0.5).parts
    step = Protocol("3-1", 4)[1]
    terms = step_loss(student, make_output(changed, own_logits=own), target, parts, step)
    label_logits, target_logits = (changed if teaches in (True, use) else own for use in ("labels", "targets"))
    labels = selective_pseudo_labels(target, label_logits, 0.5)
    torch.testing.assert_close(terms["cross_entropy"], cross_entropy(student.patch_logits, labels))
    distilled = label_guided_distillation(student.patch_logits, target_logits, target)
    torch.testing.assert_close(terms["output"], parts.output_weight * distilled)
    torch.testing.assert_close(reliability(labels, own, 4), reliability(labels, changed, 4))  # reads the background


@pytest.mark.parametrize("teaches", [False, True])
def test_stopped_run_ends_alike(home, teaches):
    parameters = dict(method="mbs-analytic", parts=dict(identity_width=32, identity_teacher=teaches), share_base=False)
    whole = Experiment(Settings(name="run", **parameters), home / "whole").run()
    shutil.copytree(home / "whole", home / "stopped")
    for step in (2, 3):
        shutil.rmtree(home / "stopped/run" / f"step-{step:02d}")
    again = Experiment(Settings(name="run", **parameters), home / "stopped").run()
    mine, theirs = (load_file(run.step_path(3, "identity.safetensors")) for run in (again, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (again.confusion().counts == whole.confusion().counts).all() and again.log() == whole.log()


def test_base_step_of_a_run_with_identity_is_tested_again(home):
    "A run without an identity takes the network over, not the confusion matrix of network and identity."
    analytic = Experiment(Settings(name="analytic", **ANALYTIC), home).run()
    plain = Experiment(Settings(name="plain"), home).run()
    alone = Experiment(Settings(name="alone", share_base=False), home).run()
    assert plain.metrics(0)["base_from"] == "analytic"
    assert (plain.confusion(0).counts == alone.confusion(0).counts).all()
    assert (analytic.confusion(0).counts != plain.confusion(0).counts).any()


DAMAGE = {
    "a bit": lambda tensors, facts: (tensors | dict(gram=tensors["gram"] + 1), facts, True),
    "a class less": lambda tensors, facts: (tensors | dict(means=tensors["means"][1:]), facts, False),
    "a tensor less": lambda tensors, facts: ({k: v for k, v in tensors.items() if k != "gram"}, facts, False),
    "not finite": lambda tensors, facts: (tensors | dict(weights=tensors["weights"] * float("nan")), facts, False),
    "no facts": lambda tensors, facts: (tensors, {}, False),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_identity_is_refused_in_one_sentence(home, damage):
    run = Experiment(Settings(name="run", samples=0, **ANALYTIC), home).run()
    path = run.step_path(3, "identity.safetensors")
    facts = dict(share=1.0, ridge=0.1, sharpness=8.0)
    tensors, facts, keeps_digest = damage(load_file(path), facts)
    header = {"facts": json.dumps(facts)} | ({"digest": "0" * 64} if keeps_digest else {})
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=r"identity .* cannot be read .*: expected what the run wrote"):
        load_run(run.folder).model()


def test_unknown_values_are_refused():
    for wrong in (
        dict(identity="other"),
        dict(identity_width=0),
        dict(identity_teacher="all"),
        dict(identity_share=1.5),
        dict(identity_ridge=0),
    ):
        with pytest.raises(ValueError, match="identity"):
            Parts.checked(**wrong)


def test_own_data_opens(home):
    "The scenes that `Experiment` trains on have the classes that the identity learns."
    train, _ = open_data("scenes", dict(n_train=20, n_test=4, size=48), 0)
    network = make_network(8, **TINY)
    identity = learn(train, Protocol("5-1", 8), network)
    assert identity.known.tolist() == list(range(1, 9)) and identity.ridge and identity.sharpness


def test_a_teacher_without_identity_is_refused():
    with pytest.raises(ValueError, match=r"identity_teacher has no identity: expected parts\.identity=analytic"):
        Method("mbs", identity_teacher=True)


def test_both_ways_of_testing_are_measured_in_the_base_step(home):
    "A base step that was tested without the identity is not taken over when another iterate must be tested, too."
    both = dict(training=dict(crop=48, batch=8, iterations=20, optimizer="adamw", selection="held-out", both=True))
    Experiment(Settings(name="plain", **both), home).run()
    run = Experiment(Settings(name="analytic", **ANALYTIC, **both), home).run()
    assert "base_from" not in run.metrics(0)
    assert run.metrics(0)["columns"].keys() == {"published", "clean", "network"}


@pytest.mark.parametrize("test", ["whole", "window"])
def test_the_network_alone_is_tested_in_the_same_pass(home, test):
    "Its confusion matrix is that of the run without identity, in every step, and the report shows the difference."
    training = dict(training=dict(replace=True, crop=24, test=test), samples=0)
    plain = Experiment(Settings(name="plain", **training), home).run()
    run = Experiment(Settings(name="analytic", **ANALYTIC, **training), home).run()
    assert run.metrics(0)["base_from"] == "plain"
    for step in range(run.n_steps):
        assert (run.confusion(step, "network").counts == plain.confusion(step).counts).all()
    assert (run.confusion().counts != plain.confusion().counts).any()
    (row,) = make_identity_table(group_runs([plain, run])[0]).rows
    means = [r.metrics()["scores"]["all"] for r in (run, plain)]
    assert [row[k].mean for k in (4, 7, 10)] == pytest.approx([*means, means[0] - means[1]])
    assert make_identity_table(group_runs([plain])[0]) is None
