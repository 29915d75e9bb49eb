"""Pixel losses of an incremental step, value and gradient, of a 512 × 512 picture.

In bands of rows, compared with full-size tensors.
"""

from functools import partial

import plain
import torch
from interleaved import peak, rounds, row, same

from mbs.methods import Method
from mbs.objective import step_loss
from mbs.protocol import Protocol
from mbs.segmenter import SegmenterOutput

PARTS = Method("mbs").parts.model_copy(update=dict(feature_distillation="none", orthogonality=False))


def draw_case(n, side, device):
    "Patch logits of a student of `n` channels and of a teacher of one less, and labels with a square of the new class."
    torch.manual_seed(0)
    z = (2 * torch.randn(1, n, side // 16, side // 16, device=device)).requires_grad_()
    old = 2 * torch.randn(1, n - 1, side // 16, side // 16, device=device)
    target = torch.zeros(1, side, side, dtype=torch.long, device=device)
    target[:, side // 4 : side // 2, side // 4 : side // 2] = n - 1
    return z, old, target


def compute_plain(z, old, target):
    return plain.pixel_losses(z, old, target)[0]


def compute_in_bands(z, old, target):
    size, n = tuple(target.shape[1:]), z.shape[1]
    student, teacher = (SegmenterOutput(None, x, None, None, None, size, size) for x in (z, old))
    step = Protocol(f"{n - 2}-1", n - 1)[1]
    return step_loss(student, teacher, target, PARTS, step)["loss"]


def add_gradient(loss, z, old, target):
    "Value of `loss` and its gradient with respect to `z`."
    z.grad = None
    value = loss(z, old, target)
    value.backward()
    return value.detach(), z.grad.clone()


def measure(repeats=5, side=512, classes=(21, 151)):
    "Rows of time and memory, one for each number of classes."
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for n in classes:
        case = draw_case(n, side, device)
        losses = dict(plain=compute_plain, bands=compute_in_bands)
        ways = {name: partial(add_gradient, loss, *case) for name, loss in losses.items()}
        memory = [peak(way) for way in ways.values()]
        same({name: way() for name, way in ways.items()})
        found.append(row(f"objective, {n} classes", rounds(ways, repeats), "bands", memory=memory))
    return found
