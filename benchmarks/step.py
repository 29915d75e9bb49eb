"""A whole training iteration of an incremental step at 512 × 512 pixels, as `train_step` runs it.

Two forward passes, loss, backward pass and optimiser, compared with the plain ones of `plain.py`.
"""

from functools import partial

import plain
import torch
from interleaved import peak, rounds, row, same

from mbs.methods import Method
from mbs.protocol import Protocol
from mbs.recipe import make_recipe
from mbs.segmenter import Segmenter
from mbs.setup import make_accelerator
from mbs.training import Training
from mbs.weights import make_encoder

VITB = "vit_base_patch16_384"
WAYS = {
    "fp32": {},
    "fp32, teacher in bf16": dict(teacher_precision="bf16"),
    "bf16": dict(precision="bf16", cpu_precision="bf16"),
}


def make_step(n, n_new):
    "The step that brings the last `n_new` of `n` channels; the base step if only the background is older."
    is_base = n_new == n - 1
    return Protocol("offline", n_new)[0] if is_base else Protocol(f"{n - 1 - n_new}-{n_new}", n - 1)[1]


def networks(encoder, n, n_new, side, device, **options):
    "Make a teacher and the student grown from it to `n` channels, without drop-path, so that all ways see the same."
    torch.manual_seed(0)
    encoder = make_encoder(encoder, image_size=side, **options)
    old = Segmenter(encoder, [1, n - 1 - n_new], drop_path=0).to(device)
    return old.frozen(), old.grow(n_new).to(device).train()


def pictures(n, n_new, side, batch, device):
    "Draw random images, and labels with a square of a new class."
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.zeros(batch, side, side, dtype=torch.long, device=device)
    labels[:, side // 4 : side // 2, side // 4 : side // 2] = n - n_new
    return images, labels


class Ours(Training):
    "The training loop of a step on one batch: each call trains an iteration and returns its loss."

    def __init__(self, student, teacher, given, step, compile=False, **choices):  # teacher: None in the base step
        recipe = make_recipe(lr=1e-3, lr_factor=0.1, compile=compile, **choices)
        super().__init__(student, teacher, Method("mbs"), step, recipe, total=10**6)
        self.given, self.loss = [given], None

    def update_weights(self, terms):
        self.loss = terms["loss"].detach()
        return super().update_weights(terms)

    def __call__(self):
        self.run(self.given)
        return self.loss


def make_iterations(n, n_new, side, encoder, **options):
    "The plain iteration and those of `WAYS`, by name; each has its own networks."
    device = make_accelerator(make_recipe()).device
    given, step = pictures(n, n_new, side, 1, device), make_step(n, n_new)
    pairs = [networks(encoder, n, n_new, side, device, **options) for _ in range(1 + len(WAYS))]
    teacher, student = map(plain.use_plain_attention, pairs[0])
    optimiser = plain.make_optimiser(student)
    iterations = dict(plain=partial(plain.train_iteration, student, teacher, *given, n_new, optimiser))
    for (teacher, student), (name, choices) in zip(pairs[1:], WAYS.items()):
        iterations[name] = Ours(student, teacher, given, step, **dict(precision="fp32") | choices)
    return iterations


def measure(repeats=3, side=512, classes=(21, 151), encoder=VITB, **options):
    "Rows of time and memory, one for each number of classes and each of `WAYS`."
    found = []
    for n in classes:
        losses = {}

        def train(name, iteration, losses=losses):
            losses.setdefault(name, []).append(float(iteration()))

        iterations = make_iterations(n, 1, side, encoder, **options)
        ways = {name: partial(train, name, iteration) for name, iteration in iterations.items()}
        memory = {name: peak(way) for name, way in ways.items()}
        spent = rounds(ways, repeats)
        # A later loss depends on the gradients before it, so that equal losses mean equal gradients.
        same({name: torch.tensor(losses[name]) for name in ("plain", "fp32")}, rtol=1e-3)
        for name in WAYS:
            both = memory["plain"], memory[name]
            found.append(row(f"whole step, {n} classes, {name}", spent, name, memory=both))
    return found
