"An encoder that learns at a rate of its own, or rests."

import pytest
import torch

from mbs import training
from mbs.augment import IMAGENET
from mbs.data import open_data
from mbs.methods import Method
from mbs.protocol import Protocol
from mbs.recipe import make_recipe, make_train_view
from mbs.segmenter import Segmenter
from mbs.training import train_step
from mbs.weights import make_encoder


@pytest.fixture
def step(tmp_path, monkeypatch):
    "Train a base step and one with a teacher; records of the second, and the network before and after it."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    train, _ = open_data("scenes", dict(n_train=24, n_test=4, size=32, seed=0))

    def run(encoder="vit_tiny_patch16_224", method="mbs", options=None, **recipe):
        torch.manual_seed(0)
        protocol, method, records = Protocol("5-1", 8), Method(method), []
        recipe = make_recipe(
            "clean", crop=32, batch=4, iterations=10, new_iterations=20, optimizer="adamw", lr=1e-3, **recipe
        )
        options = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2) if options is None else options
        model = Segmenter(make_encoder(encoder, image_size=32, **options), [1, 5], dim=32, heads=2)
        model = train_step(model, None, method, make_train_view(train, protocol, 0, IMAGENET, recipe), recipe)
        before = model.frozen()
        student = train_step(
            method.grow(model, 1),
            before if method.needs_teacher else None,
            method,
            make_train_view(train, protocol, 1, IMAGENET, recipe),
            recipe,
            log=records.append,
        )
        return records, before, student

    return run


def same(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize(
    "encoder,options,method",
    [("vit_tiny_patch16_224", None, "mbs"), ("test_efficientnet", {}, "plop"), ("test_efficientnet", {}, "finetune")],
)
def test_a_resting_encoder_keeps_its_bits(step, encoder, options, method):
    "Statistics of batch normalisation included; the decoder goes on learning."
    _, before, student = step(encoder, method, options, encoder_factor=(1, 0))
    assert same(before.encoder, student.encoder) and not same(before.decoder.blocks, student.decoder.blocks)


def test_it_learns_where_it_may(step):
    _, before, student = step(encoder_factor=(0, 0.5))
    assert not same(before.encoder, student.encoder)


def test_pictures_are_encoded_once_for_both_and_nothing_else_changes(step, monkeypatch):
    "With the teacher encoding for itself every number is the same."
    calls = []
    counted = Segmenter.encode
    monkeypatch.setattr(Segmenter, "encode", lambda self, images: calls.append(len(images)) or counted(self, images))
    records, _, student = step(encoder_factor=(1, 0))
    assert len(calls) == 10 + 20
    monkeypatch.setattr(training, "_shares_encoder", lambda *_: False)
    again, _, other = step(encoder_factor=(1, 0))
    assert len(calls) == 30 + 10 + 40 and records == again and same(student, other)


def test_another_encoder_is_no_teachers(step):
    _, before, student = step(encoder_factor=(1, 0))
    assert training._shares_encoder(student, before)
    with torch.no_grad():
        next(before.encoder.parameters()).add_(1)
    assert not training._shares_encoder(student, before)


def test_the_rate_of_the_encoder(step):
    "A hundredth of the decoder's: AdamW moves every weight by about its rate."
    _, before, student = step(encoder_factor=(1, 0.01))
    moved = [
        max(
            (a - b).abs().max()
            for a, b in zip(getattr(student, part).parameters(), getattr(before, part).parameters())
            if a.shape == b.shape
        )
        for part in ("encoder", "decoder")
    ]
    assert 0 < moved[0] < 0.05 * moved[1]
