"""A whole training iteration of an incremental step at 512 × 512 pixels: two forward passes, loss, backward pass and optimiser, as `train_step` does them, against METHOD.md's plain ones."""

from functools import partial

import plain
import torch
from interleaved import peak, rounds, row, same

from mbs.methods import Method
from mbs.segmenter import Segmenter
from mbs.training import compile_networks, make_accelerator, make_optimizer, make_recipe, train_iterations
from mbs.weights import make_encoder

VITB = "vit_base_patch16_384"
WAYS = {
    "fp32": {},
    "fp32, teacher in bf16": dict(teacher_precision="bf16"),
    "bf16": dict(precision="bf16", cpu_precision="bf16"),
}


def networks(encoder, n, n_new, side, device, **options):
    "A teacher and the student that grew from it to `n` channels; paths are not dropped, so that all ways see the same."
    torch.manual_seed(0)
    old = Segmenter(make_encoder(encoder, image_size=side, **options), [1, n - 1 - n_new], drop_path=0).to(device)
    return old.frozen(), old.grow(n_new).to(device).train()


def pictures(n, n_new, side, batch, device):
    images, labels = (
        torch.randn(batch, 3, side, side, device=device),
        torch.zeros(batch, side, side, dtype=torch.long, device=device),
    )
    labels[:, side // 4 : side // 2, side // 4 : side // 2] = n - n_new
    return images, labels


class Ours:
    "The loop of a step, an iteration a call, without a teacher for the base step; gives the loss."

    def __init__(self, student, teacher, given, n_new, **choices):
        recipe = make_recipe(lr=1e-3, lr_factor=0.1, **choices)
        accelerator = make_accelerator(recipe)
        student, optimiser = accelerator.prepare(student, make_optimizer(student, recipe, step=1))
        self.networks = compile_networks(recipe.compile, student, teacher)

        def again():
            while True:
                yield given

        self.loop = train_iterations(
            *self.networks.__enter__(), Method("mbs"), again(), optimiser, accelerator, n_new, recipe
        )

    def __call__(self):
        return next(self.loop)["loss"]


def measure(repeats=3, side=512, classes=(21, 151), encoder=VITB, **options):
    found, n_new = [], 1
    for n in classes:
        device = make_accelerator(make_recipe()).device
        given = pictures(n, n_new, side, 1, device)
        pairs = [networks(encoder, n, n_new, side, device, **options) for _ in range(1 + len(WAYS))]
        other_teacher, other = map(plain.network, pairs[0])
        optimiser, values = plain.optimiser(other), {}
        iterations = dict(plain=lambda: plain.step(other, other_teacher, *given, n_new, optimiser))
        for (teacher, student), (name, choices) in zip(pairs[1:], WAYS.items()):
            iterations[name] = Ours(student, teacher, given, n_new, **dict(precision="fp32") | choices)

        def kept(name):
            values.setdefault(name, []).append(float(iterations[name]()))

        ways = {name: partial(kept, name) for name in iterations}
        memory = {name: peak(way) for name, way in ways.items()}
        spent = rounds(ways, repeats)
        same(
            {name: torch.tensor(values[name]) for name in ("plain", "fp32")}, rtol=1e-3
        )  # a later loss depends on the gradients before
        found += [
            row(f"whole step, {n} classes, {name}", spent, name, memory=(memory["plain"], memory[name]))
            for name in WAYS
        ]
    return found
