"SSUL, Incrementer, EWF, LGKD, DFT* and SELECT: compared with literal formulas in loops, in their limits, and in runs."

import math
import os
import signal

import pytest
import torch
from golden import close
from hypothesis import given
from hypothesis import strategies as st
from steps import make_step
from test_rivals import SHORT, SIZES, draw, few, labels, pixels, seeds, softmax
from torch.nn import functional as F

from mbs.experiment import Experiment
from mbs.feature_distillation import adaptive_feature_distillation, mark_old_regions
from mbs.lifeline import Interrupted
from mbs.methods import Method, count_votes, start_from_similar
from mbs.objective import (
    binary_cross_entropy,
    cross_entropy,
    make_training_labels,
    old_new_cross_entropy,
    step_loss,
)
from mbs.orthogonality import blend_similar, choose_similar, find_least_moved, separation
from mbs.output_distillation import label_guided_distillation
from mbs.parts import METHODS, Parts
from mbs.protocol import VOID
from mbs.segmenter import Segmenter, SegmenterOutput
from mbs.settings import Settings
from mbs.weights import make_encoder


def make_network(groups):
    torch.manual_seed(0)
    encoder = make_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    return Segmenter(encoder, groups)


def make_outputs(n_old, n_new, seed, dtype=torch.float64):
    "Outputs of a teacher and a student for two pictures of 8 × 8 pixels, and labels of the step."
    teacher, student = (
        SegmenterOutput(
            None,
            draw(seed + 10 * k, 2, c, 4, 4).to(dtype),
            draw(seed + 10 * k + 1, 2, 16, 6).to(dtype),
            draw(seed + 10 * k + 2, 2, c, 6).to(dtype),
            draw(seed + 10 * k + 3, c, 6).to(dtype),
            size=(8, 8),
            canvas=(8, 8),
        )
        for k, c in enumerate((n_old, n_old + n_new))
    )
    return teacher, student, labels(seed, 2, 8, 8, channels=[0, 0, *range(n_old, n_old + n_new), VOID])


def norm(values):
    return math.sqrt(sum(v * v for v in values))


# SSUL


@few
@given(**SIZES)
def test_binary_cross_entropy_is_the_formula(n_old, n_new, seed):
    z, y = draw(seed, 2, n_old + n_new, 3, 2), labels(seed, 2, 3, 2, channels=[*range(n_old + n_new), VOID])
    costs = []
    for b, i, j in pixels(z):
        if y[b, i, j] != VOID:
            p = [1 / (1 + math.exp(-v)) for v in z[b, :, i, j].tolist()]
            costs.append(-sum(math.log(v if c == y[b, i, j] else 1 - v) for c, v in enumerate(p)))
    close(binary_cross_entropy(z, y), sum(costs) / max(1, len(costs)))


@few
@given(n_old=st.integers(2, 5), seed=seeds)
def test_pseudo_labels_of_a_sigmoid_head_are_the_loop(n_old, seed):
    "The best channel of all, if it is an old class and its own probability is at least 0.7."
    z, y = draw(seed, 2, n_old, 3, 4), labels(seed, 2, 3, 4, channels=[0, 0, n_old, VOID])
    teacher = SegmenterOutput(z, None, None, None, None, head="sigmoid")
    mine = make_training_labels(y, teacher, METHODS["ssul"])
    for b, i, j in pixels(z):
        p, want = [1 / (1 + math.exp(-v)) for v in z[b, :, i, j].tolist()], int(y[b, i, j])
        best = p.index(max(p))
        assert mine[b, i, j] == (best if want == 0 and best > 0 and p[best] >= 0.7 else want)


def test_a_whole_start_copies_token_scale_and_shift_and_shares_nothing():
    model = make_network([1, 2])
    for p in (*model.decoder.mask_norm.weight, *model.decoder.mask_norm.bias):
        p.data.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = Method("ssul").grow(model, make_step(3, 2)).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for name in ("class_tokens", "mask_norm.weight", "mask_norm.bias"):
        old, new = before[f"decoder.{name}.0"], after[f"decoder.{name}.2"]
        assert torch.equal(new, old.expand_as(new) if old.dim() == 1 else old.repeat(2, 1))


@pytest.mark.parametrize(
    "part",
    [
        dict(deconfusion=True),
        dict(new_weight=0.5),
        dict(output_distillation="label-guided"),
        dict(cross_entropy="unbiased"),
    ],
)
def test_a_sigmoid_head_refuses_what_needs_a_softmax(part):
    with pytest.raises(ValueError, match="head=sigmoid does not go with"):
        Method("ssul", **part)


# LGKD


def literal_guidance(z, t, y, old_weight, new_weight):
    "The sum over all channels of each pixel, weighted, and their mean over all pixels."
    n_old, costs = t.shape[1], []
    for b, i, j in pixels(z):
        p, label = softmax(z[b, :, i, j].tolist()), int(y[b, i, j])
        r = softmax(t[b, :, i, j].tolist()) + [0.0] * (len(p) - n_old)
        is_new = n_old <= label < VOID
        if is_new:
            r[label], r[0] = r[0], 0.0
        cost = -sum(a * math.log(q) for a, q in zip(r, p))
        costs.append((new_weight if is_new else old_weight) * cost)
    return sum(costs) / len(costs)


@few
@given(old_weight=st.floats(0, 5), new_weight=st.floats(0, 20), **SIZES)
def test_weighted_guidance_is_the_formula(n_old, n_new, seed, old_weight, new_weight):
    z, t = draw(seed, 2, n_old + n_new, 3, 2), draw(seed + 1, 2, n_old, 3, 2)
    y = labels(seed, 2, 3, 2, channels=[0, *range(n_old, n_old + n_new), VOID])
    mine = label_guided_distillation(z, t, y, old_weight, new_weight)
    close(mine * z.shape[1], literal_guidance(z, t, y, old_weight, new_weight))
    close(label_guided_distillation(z, t, y), literal_guidance(z, t, y, 1, 1) / z.shape[1])


@few
@given(**SIZES)
def test_lgkd_is_plop_and_the_sum_over_channels(n_old, n_new, seed):
    "Also for weights that are not 1; those of 1 leave the distillation of MBS, times the number of channels over λ."
    teacher, student, y = make_outputs(n_old, n_new, seed)
    step, thresholds = make_step(n_old, n_new), [0.8] * n_old
    weights = dict(old_pixel_weight=2, new_pixel_weight=0.5)
    plop = step_loss(student, teacher, y, METHODS["plop"], step, thresholds)
    for parts, literal in ((METHODS["lgkd"], (1, 1)), (Method("lgkd", **weights).parts, (2, 0.5))):
        terms = step_loss(student, teacher, y, parts, step, thresholds)
        close(terms["output"], literal_guidance(student.logits, teacher.logits, y, *literal))
        assert {k: terms[k].item() for k in terms.keys() & plop.keys() - {"loss"}} == {
            k: v.item() for k, v in plop.items() if k != "loss"
        }


@pytest.mark.parametrize("rule", ["plain", "label-guided", "unbiased"])
@pytest.mark.parametrize("is_full", [False, True])
def test_a_sum_over_channels_is_their_mean_times_their_number(rule, is_full):
    "In bands and on full-size maps."
    teacher, student, y = make_outputs(3, 2, 0)
    if is_full:
        student = student._replace(full=student.logits)
    mean, total = (
        step_loss(student, teacher, y, Parts(output_distillation=rule, output_sum=s), make_step(3, 2))["output"]
        for s in (False, True)
    )
    close(total, mean * (5 if rule == "label-guided" else 3))


# Incrementer


@few
@given(**SIZES)
def test_features_outside_the_new_classes_are_the_loop(n_old, n_new, seed):
    teacher, student, _ = make_outputs(n_old, n_new, seed)
    y = labels(seed, 2, 8, 8, channels=[*range(n_old + n_new), VOID])
    squares, n = 0.0, 0
    for b in range(2):
        for patch in range(16):
            if y[b, 2 * (patch // 4), 2 * (patch % 4)] < n_old:  # the pixel that stands for the patch
                difference = student.patches[b, patch] - teacher.patches[b, patch]
                squares += sum(v * v for v in difference.tolist())
                n += len(difference)
    mine = adaptive_feature_distillation(student.patches, teacher.patches, mark_old_regions(y, (4, 4), n_old))
    close(mine, squares / max(1, n))


@few
@given(new_weight=st.floats(0, 2), **SIZES)
def test_weighted_cross_entropy_and_deconfusion_are_the_formulas(n_old, n_new, seed, new_weight):
    z = draw(seed, 2, n_old + n_new, 3, 2)
    y = labels(seed, 2, 3, 2, channels=[*range(n_old + n_new), VOID])
    costs, binary = [], []
    for b, i, j in pixels(z):
        p, label = softmax(z[b, :, i, j].tolist()), int(y[b, i, j])
        if label != VOID:
            costs.append(-math.log(p[label]) * (new_weight if label >= n_old else 1))
            share = sum(p[n_old:])
            binary.append(-math.log(share if label >= n_old else 1 - share))
    n = max(1, len(costs))
    weight = torch.tensor([1.0] * n_old + [new_weight] * n_new, dtype=z.dtype)
    close(cross_entropy(z, y, weight=weight), sum(costs) / n)
    close(old_new_cross_entropy(z, y, n_old), sum(binary) / n)


@few
@given(**SIZES)
def test_incrementer_is_the_sum_of_its_terms(n_old, n_new, seed):
    teacher, student, y = make_outputs(n_old, n_new, seed)
    terms = step_loss(student, teacher, y, METHODS["incrementer"], make_step(n_old, n_new))
    relabelled = make_training_labels(y, teacher, Parts(pseudo_labels=True))
    weight = torch.tensor([1.0] * n_old + [0.5] * n_new, dtype=torch.float64)
    expected = dict(
        cross_entropy=cross_entropy(student.logits, relabelled, weight=weight),
        deconfusion=old_new_cross_entropy(student.logits, relabelled, n_old),
        patch_features=adaptive_feature_distillation(
            student.patches, teacher.patches, mark_old_regions(relabelled, (4, 4), n_old)
        ),
        class_features=F.mse_loss(student.class_features[:, :n_old], teacher.class_features),
    )
    assert terms.keys() == expected.keys() | {"loss"}
    for name, value in expected.items():
        close(terms[name], value)
    close(terms["loss"], sum(expected.values()))


def test_a_weight_of_1_is_the_plain_cross_entropy():
    teacher, student, y = make_outputs(3, 2, 0)
    plain, weighted = (
        step_loss(student._replace(full=student.logits), teacher, y, Parts(**parts), make_step(3, 2))["loss"]
        for parts in ({}, dict(new_weight=1 + 1e-15))
    )
    close(weighted, plain)


# SELECT


@few
@given(n=st.integers(2, 6), seed=seeds)
def test_the_least_moved_class_is_the_loop(n, seed):
    features, unmoved = draw(seed, 3, n, 5), draw(seed + 1, n, 5)
    mine = find_least_moved(features, unmoved)
    for b in range(3):
        moves = [norm((features[b, k] - unmoved[k]).tolist()) for k in range(1, n)]
        assert mine[b] == 1 + moves.index(min(moves))


@few
@given(st.lists(st.integers(0, 30), min_size=2, max_size=30))
def test_similar_classes_have_their_share_of_the_votes(votes):
    similar = choose_similar(votes)
    enough = [k for k, n in enumerate(votes) if sum(votes) and 100 * n >= 15 * sum(votes)]
    if enough or not sum(votes):
        assert similar == enough
    else:
        assert similar == [votes.index(max(votes))]


@few
@given(n=st.integers(3, 6), seed=seeds, scale=st.floats(0.1, 5))
def test_a_blended_start_is_the_formula(n, seed, scale):
    tokens, noise = draw(seed, n, 4, scale=scale), draw(seed + 1, 4, scale=1.0)
    similar = [0, n - 1]
    rows = [tokens[k].tolist() for k in similar]
    mean = [sum(column) / 2 for column in zip(*rows)]
    weights = softmax([sum(a * b for a, b in zip(row, mean)) / math.sqrt(4) for row in rows])
    theta = [sum(w * v for w, v in zip(weights, column)) for column in zip(*rows)]
    expected = [0.9 * v + 0.1 * (v + 0.05 * e) for v, e in zip(theta, noise.tolist())]
    close(blend_similar(tokens, similar, noise), torch.tensor(expected, dtype=torch.float64))


@few
@given(n_old=st.integers(2, 4), n_new=st.integers(1, 3), seed=seeds)
def test_separation_is_the_formula(n_old, n_new, seed):
    tokens = draw(seed, n_old + n_new, 3, scale=0.6).requires_grad_()
    similar = [[k for k in range(1, n_old) if (seed >> (3 * c + k)) % 2] for c in range(n_new)]
    costs = []
    for c, channels in enumerate(similar):
        distances = [norm((tokens[n_old + c] - tokens[k]).tolist()) for k in channels]
        costs.append(sum(max(0, 1 - d) for d in distances) / max(1, len(distances)))
    mine = separation(tokens, similar)
    close(mine, sum(costs) / n_new)
    mine.backward()
    assert tokens.grad.isfinite().all()


def test_separation_ends_at_the_margin_and_survives_equal_tokens():
    equal = torch.ones(3, 8, requires_grad=True)
    cost = separation(equal, [[1]])
    cost.backward()
    assert cost == 1 and equal.grad.isfinite().all()
    assert separation(torch.eye(3), [[0, 1]]) == 0  # a distance of √2


def test_votes_and_start_are_the_loop():
    "A picture at a time, with all but the class removed; the class that no picture shows keeps its token."
    old, step = make_network([1, 3]).eval(), make_step(4, 3)
    with torch.no_grad():
        for p in old.decoder.parameters():
            p += 0.3 * torch.randn_like(p)
    images, y = draw(0, 6, 3, 32, 32).float(), labels(0, 6, 32, 32, channels=[0, 4, 5, VOID])
    y[:2][y[:2] == 5] = 0
    votes = count_votes(old, images, y, step)
    assert votes.shape == (3, 4) and votes.sum(1).tolist() == [6, 4, 0] and not votes[:, 0].any()
    expected = torch.zeros(3, 4, dtype=torch.long)
    tokens = old.decoder.tokens()
    with torch.no_grad():
        alone = old.decoder.decoder_norm(tokens) @ old.decoder.proj_classes
        for image, target in zip(images, y):
            for c in {4, 5} & set(target.flatten().tolist()):
                features = old((image * (target == c))[None]).class_features[0]
                expected[c - 4, 1 + int((features - alone).norm(dim=1)[1:].argmin())] += 1
    assert torch.equal(votes, expected)

    student, others = old.frozen().grow(3), [old.frozen().grow(3) for _ in range(2)]
    before = student.decoder.class_tokens[-1].detach().clone()
    for model in (student, *others[:1]):
        start_from_similar(model, votes.tolist(), step)
    assert torch.equal(student.decoder.class_tokens[-1], others[0].decoder.class_tokens[-1])
    generator = torch.Generator().manual_seed(1)
    for c, counts in enumerate(votes.tolist()):
        noise = torch.randn(32, generator=generator)
        similar = choose_similar(counts)
        start = blend_similar(tokens.detach(), similar, noise) if similar else before[c]
        close(student.decoder.class_tokens[-1][c].detach(), start, torch.float32)
    assert torch.equal(student.decoder.class_tokens[-1][2], before[2])
    untouched = others[1].state_dict()
    changed = [k for k, v in student.state_dict().items() if not torch.equal(v, untouched[k])]
    assert changed == ["decoder.class_tokens.2"]


def test_one_pass_finds_thresholds_and_votes():
    "A method with both reads every picture once."
    method, step, teacher = (
        Method("plop", weight_transfer="similar", separation=0.8),
        make_step(3, 1),
        make_network([1, 2]),
    )
    student = method.grow(teacher.frozen(), step)
    batches = iter([(draw(0, 2, 3, 32, 32).float(), labels(0, 2, 32, 32, channels=[0, 3]))])
    method.prepare(student, teacher.frozen(), batches, step)
    assert len(method.found["thresholds"]) == 3 and sum(method.found["similar_votes"][0]) == 2
    assert next(batches, None) is None


def test_a_separation_needs_similar_classes():
    with pytest.raises(ValueError, match="separation has no similar classes"):
        Method("kd", separation=0.8)
    teacher, student, y = make_outputs(3, 2, 0)
    with pytest.raises(ValueError, match="no similar classes: expected a list"):
        step_loss(student, teacher, y, METHODS["select"], make_step(3, 2))


# All together


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "all void", "no old pixel", "background only"])
@pytest.mark.parametrize("name", ["ssul", "incrementer", "lgkd", "dft", "select"])
def test_half_precision_is_finite(name, kind, dtype):
    "In value and gradient, for logits of a network under autocast, and 0 in cross-entropy where all is void."
    teacher, student, y = make_outputs(3, 2, 0, dtype)
    teacher = SegmenterOutput(*(x.float() if isinstance(x, torch.Tensor) else x for x in teacher))
    y = dict(random=y, **{"all void": y * 0 + VOID, "no old pixel": y * 0 + 3, "background only": y * 0})[kind]
    z, patches = (100 * student.patch_logits).requires_grad_(), student.patches.requires_grad_()
    student = student._replace(patch_logits=z, patches=patches, head=METHODS[name].head)
    found = dict(thresholds=[0.5] * 3, similar=[[1], []])
    teacher = teacher._replace(head=METHODS[name].head)
    terms = step_loss(student, teacher, y, METHODS[name], make_step(3, 2), **found)
    terms["loss"].backward()
    assert all(v.isfinite() for v in terms.values()) and z.grad.isfinite().all()
    assert patches.grad is None or patches.grad.isfinite().all()
    if kind == "all void":
        assert terms["cross_entropy"] == 0


def train(name, folder, method=None, **parts):
    "A short run of `method` with `parts`, and its networks after each step."
    run = Experiment(Settings(name=name, method=method or name, parts=parts, **SHORT), folder).run()
    return run, [run.model(t).state_dict() for t in range(run.n_steps)]


@pytest.mark.parametrize("name", ["ssul", "dft"])
def test_only_new_tokens_move(name, tmp_path, monkeypatch):
    "Everything else rests to the bit; token, scale and shift of the new class learn."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    _, states = train(name, tmp_path)
    for t in (1, 2):
        before, after = states[t - 1], states[t]
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
        new = {f"decoder.{key}.{t + 1}" for key in ("class_tokens", "mask_norm.weight", "mask_norm.bias")}
        assert after.keys() - before.keys() == new
        start = before["decoder.class_tokens.0"]
        assert not torch.equal(after[f"decoder.class_tokens.{t + 1}"], start)
        if name == "ssul":  # the others of its start are the background's
            for key in ("mask_norm.weight", "mask_norm.bias"):
                assert not torch.equal(after[f"decoder.{key}.{t + 1}"], before[f"decoder.{key}.0"])


def test_resting_blocks_drop_no_paths():
    method, step = Method("dft"), make_step(3, 1)
    student = method.grow(make_network([1, 2]), step)
    assert student.train().decoder.blocks.training
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(method.rate(name, step) > 0)
    assert not student.train().decoder.blocks.training and not student.encoder.training and student.training


@pytest.mark.parametrize("method", ["finetune", "mib"])
def test_fused_weights_are_the_mean_of_both_ends(method, tmp_path, monkeypatch):
    "θ = (1 − α) θ_old + α θ_new, α = √(1 / N_t), in a run; new tokens are the trained ones."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    _, plain = train("plain", tmp_path, method)
    _, fused = train("fused", tmp_path, method, weight_fusion=True)
    assert all(torch.equal(plain[0][key], tensor) for key, tensor in fused[0].items())
    share = math.sqrt(1 / 8)  # background, six classes and the new one
    for key, new in plain[1].items():
        old = plain[0].get(key)
        expected = new if old is None else (1 - share) * old.double() + share * new.double()
        close(fused[1][key], expected, torch.float32)


def test_select_keeps_its_votes_and_resumes_in_the_middle_of_a_step(tmp_path, monkeypatch):
    "A step that is taken up again has the same votes and the same network; the start is not made twice."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    whole, states = train("whole", tmp_path, "select")
    assert "similar_votes" not in whole.metrics(0)
    assert [[len(row) for row in whole.metrics(t)["similar_votes"]] for t in (1, 2)] == [[7], [8]]
    assert all(r["separation"] >= 0 for r in whole.log() if r["step"])

    class Stopped(Method):
        calls = 0

        def loss(self, student, teacher, target, step):
            Stopped.calls += step.number > 0
            if Stopped.calls == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(student, teacher, target, step)

    settings = Settings(name="cut", method="select", share_base=False, **SHORT)
    with pytest.raises(Interrupted):
        Experiment(settings, tmp_path, Stopped).run()
    cut = Experiment(settings, tmp_path, Stopped).run()
    for t, state in enumerate(states):
        assert all(torch.equal(cut.model(t).state_dict()[key], tensor) for key, tensor in state.items())
    assert [cut.metrics(t)["similar_votes"] for t in (1, 2)] == [whole.metrics(t)["similar_votes"] for t in (1, 2)]
