"An encoder with its own learning rate, or frozen."

import pytest
import torch

from mbs import training
from mbs.augment import IMAGENET
from mbs.data import open_data
from mbs.methods import Method
from mbs.protocol import Protocol
from mbs.recipe import make_recipe
from mbs.segmenter import Segmenter
from mbs.setup import make_train_view
from mbs.training import train_step
from mbs.weights import make_encoder


@pytest.fixture
def step(tmp_path, monkeypatch):
    "Train a base step and one with a teacher; records of the second, and the network before and after it."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    train, _ = open_data("scenes", dict(n_train=24, n_test=4, size=32, seed=0))

    def run(encoder="vit_tiny_patch16_224", method="mbs", options=None, **recipe):
        torch.manual_seed(0)
        protocol = Protocol("5-1", 8)
        base, second = protocol[0], protocol[1]
        method = Method(method)
        records = []
        recipe = make_recipe(
            "clean", crop=32, batch=4, iterations=10, new_iterations=20, optimizer="adamw", lr=1e-3, **recipe
        )
        options = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2) if options is None else options
        model = Segmenter(make_encoder(encoder, image_size=32, **options), [1, 5], dim=32, heads=2)
        model = train_step(model, None, method, make_train_view(train, base, IMAGENET, recipe), recipe)
        before = model.frozen()
        student = train_step(
            method.grow(model, second),
            before if method.needs_teacher else None,
            method,
            make_train_view(train, second, IMAGENET, recipe),
            recipe,
            log=records.append,
        )
        return records, before, student

    return run


def has_same_tensors(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize(
    "encoder,options,method",
    [("vit_tiny_patch16_224", None, "mbs"), ("test_efficientnet", {}, "plop"), ("test_efficientnet", {}, "finetune")],
)
def test_a_frozen_encoder_keeps_its_bits(step, encoder, options, method):
    "Statistics of batch normalisation included; the decoder still learns."
    _, before, student = step(encoder, method, options, encoder_factor=(1, 0))
    assert has_same_tensors(before.encoder, student.encoder)
    assert not has_same_tensors(before.decoder.blocks, student.decoder.blocks)


def test_an_encoder_with_a_rate_above_zero_learns(step):
    _, before, student = step(encoder_factor=(0, 0.5))
    assert not has_same_tensors(before.encoder, student.encoder)


def test_a_shared_encoder_runs_once_and_nothing_else_changes(step, monkeypatch):
    "Every number is the same as when the teacher encodes the pictures a second time."
    calls = []
    encode = Segmenter.encode

    def count_and_encode(self, images):
        calls.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Segmenter, "encode", count_and_encode)
    records, _, student = step(encoder_factor=(1, 0))
    assert len(calls) == 10 + 20
    monkeypatch.setattr(training, "has_equal_encoder", lambda *_: False)
    again, _, other = step(encoder_factor=(1, 0))
    assert len(calls) == 30 + 10 + 40
    assert records == again and has_same_tensors(student, other)


def test_a_changed_encoder_is_not_shared(step):
    _, before, student = step(encoder_factor=(1, 0))
    assert training.has_equal_encoder(student, before)
    with torch.no_grad():
        next(before.encoder.parameters()).add_(1)
    assert not training.has_equal_encoder(student, before)


def test_the_rate_of_the_encoder(step):
    "The encoder moves far less than the decoder at a hundredth of the rate: AdamW moves weights by about the rate."
    _, before, student = step(encoder_factor=(1, 0.01))

    def largest_move(after, before):
        pairs = zip(after.parameters(), before.parameters())
        return max((a - b).abs().max() for a, b in pairs if a.shape == b.shape)

    encoder, decoder = (largest_move(getattr(student, p), getattr(before, p)) for p in ("encoder", "decoder"))
    assert 0 < encoder < 0.05 * decoder
