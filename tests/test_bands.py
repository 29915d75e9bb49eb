"Losses in bands of rows equal the reference on full-size maps, in value and gradient, for every choice of parts."

import ast
import math
import re
import shutil
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import make_step
from torch.nn import functional as F

from mbs import bands
from mbs.bands import argmax_in_bands, compile_bands, compute_band_loss
from mbs.methods import ABLATIONS, Method
from mbs.objective import can_use_bands, step_loss
from mbs.output_distillation import guide_targets, label_guided_targets
from mbs.parts import METHODS
from mbs.protocol import VOID
from mbs.pseudo_labels import ignore_doubtful, relabel_confident, select_labels, selective_pseudo_labels
from mbs.segmenter import Segmenter, SegmenterOutput
from mbs.weights import make_encoder

SOFTMAX = [name for name, parts in METHODS.items() if parts.head == "softmax"]  # an identity needs it
CHOICES = {**{name: dict(method=name, parts={}) for name in SOFTMAX}, **ABLATIONS}


def networks(method, groups, step):
    "A teacher with `groups` of channels and a student grown by `step`, in float64, both sure of something."
    torch.manual_seed(0)
    encoder = make_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    old = Segmenter(encoder, groups, dim=16, heads=2).double()
    with torch.no_grad():
        for p in old.decoder.parameters():
            p += 0.5 * torch.randn_like(p)
    teacher, student = old.frozen(), method.grow(old.frozen().requires_grad_(True), step)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.1 * torch.randn_like(p)
    return teacher, student.double()


def give_full_maps(out):
    "The same output with full-size logits, which bands cannot use."
    return out._replace(full=out.logits)


def keep(out):
    return out


@contextmanager
def by_full_maps():
    yield give_full_maps


@contextmanager
def by_bands():
    yield keep


@contextmanager
def by_fused_bands():
    "In bands, by the function that a compiler gets."
    token = bands._BAND_FUNCTION.set(partial(bands._run_fused, bands._compute_band_fused))
    try:
        yield keep
    finally:
        bands._BAND_FUNCTION.reset(token)


def draw_target(rng, step, height, width):
    "(2, H, W) labels in blocks of 4 pixels: background, new classes and void."
    channels = [0, 0, *step.new_channels, VOID]
    blocks = rng.choice(channels, size=(2, height // 4 + 1, width // 4 + 1))
    return torch.from_numpy(np.kron(blocks, np.ones((1, 4, 4), int))[:, :height, :width])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CHOICES)),
    st.sampled_from([False, True, "labels", "targets"]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(9, 50),
    st.integers(9, 50),
    st.integers(0, 2**32 - 1),
)
def test_value_and_gradient(name, teaches, n_old_classes, n_new, height, width, seed):
    "For any class counts, sizes that need padding, void, permuted labels, and teachers with an identity."
    choice = dict(identity="analytic", identity_teacher=teaches)
    method = Method(CHOICES[name]["method"], **CHOICES[name]["parts"] | choice)
    step, rng = make_step(1 + n_old_classes, n_new), np.random.default_rng(seed)
    teacher, student = networks(method, [1, n_old_classes], step)
    images = torch.from_numpy(rng.normal(size=(2, 3, height, width)))
    target = draw_target(rng, step, height, width)
    with torch.no_grad():
        old = teacher(images)
    own = torch.from_numpy(rng.normal(size=old.patch_logits.shape))
    old = old._replace(own_logits=own)
    thresholds, similar = rng.uniform(0, 2, step.n_old).tolist(), [[1]] * n_new
    full, *others = [
        measure(way, student, images, old, target, method.parts, step, thresholds, similar)
        for way in (by_full_maps, by_bands, by_fused_bands)
    ]
    for found in others:
        assert found.keys() == full.keys()
        for k, value in full.items():
            torch.testing.assert_close(found[k], value, rtol=1e-9, atol=1e-9)


def measure(way, student, images, old, target, parts, step, *found):
    "Losses, and the gradients of the student's parameters by number."
    student.zero_grad()
    with way() as change:
        terms = step_loss(change(student(images)), change(old), target, parts, step, *found)
    terms["loss"].backward()
    gradients = enumerate(p.grad for p in student.parameters())
    return terms | {k: gradient for k, gradient in gradients if gradient is not None}


def test_which_methods_go_in_bands():
    _, student = networks(Method("mbs"), [1, 2], make_step(3, 1))
    out = student(torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    in_bands = {name for name in METHODS if can_use_bands(out, Method(name).parts)}
    assert in_bands == {"finetune", "joint", "kd", "dft", "select", "mbs", "mbs-analytic"}
    assert not can_use_bands(give_full_maps(out), Method("mbs").parts)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(1, 3),
    st.sampled_from([None, 0.0, 0.4, 0.7, 1.0]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_rules_do_not_depend_on_where_the_channels_are(n_old, n_new, threshold, ignore_uncertain, seed):
    "Pseudo-labels and guidance of (B, C, H, W) and of (rows, B, C, W) maps are the same bits."
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, n_old, 5, 7, generator=generator)
    choices = torch.tensor([0, 0, 0, *range(n_old, n_old + n_new), VOID])
    target = choices[torch.randint(len(choices), (2, 5, 7), generator=generator)]
    by_rows, target_by_rows = logits.softmax(1).permute(2, 0, 1, 3), target.permute(1, 0, 2)
    labels = selective_pseudo_labels(target, logits, threshold, ignore_uncertain)
    labels_by_rows = select_labels(target_by_rows, by_rows, threshold, ignore_uncertain, dim=2)
    assert torch.equal(labels_by_rows.permute(1, 0, 2), labels)
    guided = label_guided_targets(logits, target, n_old + n_new)
    assert torch.equal(guide_targets(by_rows, target_by_rows, n_old + n_new, dim=2).permute(1, 2, 0, 3), guided)
    torch.testing.assert_close(guided.sum(1), torch.ones(2, 5, 7))
    is_new = (target >= n_old) & (target != VOID)
    assert (guided[:, 0][is_new] == 0).all() and torch.equal(guided[:, 1:n_old], logits.softmax(1)[:, 1:])


def test_rules_keep_every_label_of_the_step():
    "Only background pixels are relabelled or ignored, and the dtype stays."
    target = torch.tensor([0, 0, 0, 4, VOID], dtype=torch.uint8)
    sure, best = torch.tensor([0.9, 0.2, 0.9, 0.9, 0.9]), torch.tensor([1, 1, 0, 1, 1])
    labels = relabel_confident(target, sure, best, 0.7)
    assert labels.dtype == torch.uint8 and labels.tolist() == [1, 0, 0, 4, VOID]
    assert ignore_doubtful(labels, torch.ones(5, dtype=torch.bool)).tolist() == [1, VOID, VOID, 4, VOID]


def test_nothing_of_full_size_is_kept(monkeypatch):
    "At 151 classes value and gradient need less than a tenth of the memory of the reference."
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from interleaved import peak_on_cpu

    parts = Method("mbs").parts.model_copy(update=dict(feature_distillation="none", orthogonality=False))
    size, target = (512, 512), torch.zeros(1, 512, 512, dtype=torch.long)
    z, old = torch.randn(1, 151, 32, 32, requires_grad=True), torch.randn(1, 150, 32, 32)

    def compute(is_full):
        def make_output(x):
            full = F.interpolate(x, size=size, mode="bilinear") if is_full else None
            return SegmenterOutput(full, x, None, None, None, size, size)

        step_loss(make_output(z), make_output(old), target, parts, make_step(150, 1))["loss"].backward()

    assert peak_on_cpu(lambda: compute(False)) < peak_on_cpu(lambda: compute(True)) / 10


def test_argmax_in_bands_is_argmax():
    "Of any logits, equal values included."
    for seed in range(20):
        rng = np.random.default_rng(seed)
        (h, w), n = rng.integers(1, 6, 2).tolist(), int(rng.integers(1, 30))
        z = torch.from_numpy(rng.normal(size=(2, n, h, w)))
        if seed % 2:
            z = z.round()  # equal channels
        height, width = int(8 * h - rng.integers(0, 8)), int(8 * w - rng.integers(0, 8))
        stretched = F.interpolate(z, size=(8 * h, 8 * w), mode="bilinear", align_corners=False)[..., :height, :width]
        found = argmax_in_bands(z, (height, width), (8 * h, 8 * w), int(rng.integers(1, 9)))
        torch.testing.assert_close(stretched.gather(1, found[:, None])[:, 0], stretched.amax(1), rtol=0, atol=1e-12)


def test_argmax_in_bands_takes_the_first_of_equal_channels():
    z = torch.randn(2, 5, 3, 4)
    found = argmax_in_bands(torch.cat([z, z], 1), (20, 30), (24, 32))
    assert torch.equal(found, argmax_in_bands(z, (20, 30), (24, 32)))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_patch_logits_that_are_not_finite_have_no_argmax(number):
    z = torch.randn(1, 3, 4, 4)
    z[0, 1, 2, 2] = number
    with pytest.raises(ValueError, match="not finite: expected finite logits"):
        argmax_in_bands(z, (32, 32), (32, 32))


@given(st.integers(1, 700), st.integers(0, 800))
def test_bands_are_equal_where_a_height_is_near(rows, most):
    "No band is higher than wanted; a picture has bands of two heights only if no divisor lies near."
    height = bands._choose_height(rows, most)
    assert 1 <= height <= max(1, most) and height <= rows
    divisors = [h for h in range(1, rows + 1) if rows % h == 0 and most / 2 < h <= max(1, most)]
    assert rows % height == 0 or not [h for h in divisors if -(-rows // h) < 2 * -(-rows // max(1, most))]


@pytest.mark.parametrize("n_old,n_new", [(16, 5), (20, 1), (101, 50), (150, 1)])
def test_no_band_of_a_published_step_on_a_gpu_is_uneven(n_old, n_new, monkeypatch):
    "A second height would be compiled a second time. Followed on tensors without values."
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # has no such device
    monkeypatch.setitem(bands._BAND_CELLS, "meta", bands._BAND_CELLS["cuda"])
    heights = []

    def record(maps, band, target, parts):
        heights.append(band.stop - band.start)
        return bands._run_eagerly(maps, band, target, parts)

    token = bands._BAND_FUNCTION.set(record)
    for batch in (8, 16, 24):
        z, teacher_z = (torch.zeros(batch, n, 32, 32, device="meta") for n in (n_old + n_new, n_old))
        target = torch.zeros(batch, 512, 512, dtype=torch.long, device="meta")
        compute_band_loss(z.requires_grad_(), teacher_z, target, (512, 512), METHODS["mbs"])
        assert len(set(heights)) == 1 and sum(heights) == 512
        heights.clear()
    bands._BAND_FUNCTION.reset(token)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_band_moves_a_third_of_the_memory(monkeypatch):
    "At 151 classes, of which 101 are old: bytes that the operations of value and gradient read and write."
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from full_size import Traffic
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    z, teacher_z = torch.randn(1, 151, 2, 4, requires_grad=True), torch.randn(1, 101, 2, 4)
    given = teacher_z, torch.randint(101, 151, (1, 32, 64)), (32, 64), Method("mbs").parts
    with Traffic() as eager:
        sum(compute_band_loss(z, *given, height=32)[:2]).backward()
    with compile_bands(), config.patch(force_disable_caches=True):
        (*_, labels), (code,) = run_and_get_code(compute_band_loss, z, *given, height=32)
    stored = [math.prod(ast.literal_eval(shape)) for shape in re.findall(r"= empty_strided_cpu\((\(.*?\)), ", code)]
    n_pixels = labels.numel()
    assert sorted(stored)[-2:] == [151 * n_pixels] * 2 and max(sorted(stored)[:-2]) == n_pixels
    terms = torch.zeros(()), torch.zeros(()), *torch.empty(2, 32, 1, 151, 64), labels.transpose(0, 1)
    monkeypatch.setattr(bands, "_BAND_FUNCTION", ContextVar("computed", default=lambda *_: terms))
    with Traffic() as around:  # what is not compiled
        sum(compute_band_loss(z, *given, height=32)[:2]).backward()
    patches_read = 3 * (151 + 101) * 2 * 64  # for the largest logit, the sum of exponentials and the gradient
    moved = 4 * (2 * 151 * n_pixels + 2 * sum(sorted(stored)[:-2]) + patches_read)
    assert around.moved + moved < eager.moved / 3
