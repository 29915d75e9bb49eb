"Losses in bands of rows are the plain composition, in value and gradient, on every choice that they know."

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbs.methods import ABLATIONS, METHODS, Method
from mbs.objective import can_use_bands, step_loss
from mbs.protocol import VOID
from mbs.segmenter import Segmenter
from mbs.weights import make_encoder

CHOICES = {**{name: dict(method=name, parts={}) for name in METHODS}, **ABLATIONS}


def networks(method, groups, n_new):
    torch.manual_seed(0)
    encoder = make_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    old = Segmenter(encoder, groups, dim=16, heads=2).double()
    with torch.no_grad():
        for p in old.decoder.parameters():
            p += 0.5 * torch.randn_like(p)  # sure of something
    teacher, student = old.frozen(), method.grow(old.frozen().requires_grad_(True), n_new)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.1 * torch.randn_like(p)
    return teacher, student.double()


def by_full_maps(out):
    return out._replace(full=out.logits)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CHOICES)),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(9, 50),
    st.integers(9, 50),
    st.integers(0, 2**32 - 1),
)
def test_value_and_gradient(name, n_old, n_new, height, width, seed):
    "Any class counts, sizes that need padding, void, permuted labels."
    method = Method(CHOICES[name]["method"], **CHOICES[name]["parts"])
    teacher, student = networks(method, [1, n_old], n_new)
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.normal(size=(2, 3, height, width)))
    blocks = rng.choice([0, 0, *range(n_old + 1, n_old + 1 + n_new), VOID], size=(2, height // 4 + 1, width // 4 + 1))
    target = torch.from_numpy(np.kron(blocks, np.ones((1, 4, 4), int))[:, :height, :width])
    with torch.no_grad():
        old = teacher(images)
    method.found = dict(thresholds=rng.uniform(0, 2, n_old + 1).tolist())
    sides = []
    for way in (lambda out: out, by_full_maps):
        student.zero_grad()
        terms = step_loss(way(student(images)), way(old), target, method.parts, n_new, method.found["thresholds"])
        terms["loss"].backward()
        sides.append((terms, [p.grad for p in student.parameters()]))
    assert sides[0][0].keys() == sides[1][0].keys()
    for k, v in sides[1][0].items():
        torch.testing.assert_close(sides[0][0][k], v, rtol=1e-9, atol=1e-9)
    for a, b in zip(sides[0][1], sides[1][1]):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_which_methods_go_in_bands():
    out = networks(Method("mbs"), [1, 2], 1)[1](torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    assert {name for name in METHODS if can_use_bands(out, Method(name).parts)} == {
        "finetune",
        "joint",
        "kd",
        "mbs",
    } and not can_use_bands(by_full_maps(out), Method("mbs").parts)


def test_nothing_of_full_size_is_kept():
    "Extra memory of value and gradient at 151 classes: below a tenth of the plain composition's."
    from torch.nn import functional as F
    from torch.profiler import ProfilerActivity, profile

    method, target = Method("mbs"), torch.zeros(1, 512, 512, dtype=torch.long)
    from mbs.segmenter import SegmenterOutput

    z, old = torch.randn(1, 151, 32, 32, requires_grad=True), torch.randn(1, 150, 32, 32)
    parts = method.parts.model_copy(update=dict(feature_distillation="none", orthogonality=False))

    def peak(full):
        student, teacher = (
            SegmenterOutput(
                F.interpolate(x, size=(512, 512), mode="bilinear") if full else None,
                x,
                None,
                None,
                None,
                (512, 512),
                (512, 512),
            )
            for x in (z, old)
        )
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
            step_loss(student, teacher, target, parts, 1)["loss"].backward()
        now = most = 0
        for event in p.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    assert peak(False) < peak(True) / 10


def test_likeliest_is_argmax():
    "Of any logits, stretched in bands, equal values included."
    import torch.nn.functional as F

    from mbs.bands import argmax_in_bands

    for seed in range(20):
        rng = np.random.default_rng(seed)
        (h, w), n = rng.integers(1, 6, 2), int(rng.integers(1, 30))
        z = torch.from_numpy(rng.normal(size=(2, n, h, w)))
        if seed % 2:
            z = z.round()  # equal channels
        size = int(8 * h - rng.integers(0, 8)), int(8 * w - rng.integers(0, 8))
        stretched = F.interpolate(z, size=(8 * int(h), 8 * int(w)), mode="bilinear", align_corners=False)[
            ..., : size[0], : size[1]
        ]
        found = argmax_in_bands(z, size, (8 * int(h), 8 * int(w)), int(rng.integers(1, 9)))
        torch.testing.assert_close(stretched.gather(1, found[:, None])[:, 0], stretched.amax(1), rtol=0, atol=1e-12)
