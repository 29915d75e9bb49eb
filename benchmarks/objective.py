"""Pixel losses of an incremental step, value and gradient, of a 512 × 512 picture: in bands of rows, against full-size tensors."""

import plain
import torch
from interleaved import peak, rounds, row, same

from mbs.methods import Method
from mbs.objective import step_loss
from mbs.segmenter import SegmenterOutput

PARTS = Method("mbs").parts.model_copy(update=dict(feature_distillation="none", orthogonality=False))


def measure(repeats=5, side=512, classes=(21, 151)):
    found = []
    for n in classes:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        z, old = (
            (2 * torch.randn(1, n, side // 16, side // 16, device=device)).requires_grad_(),
            2 * torch.randn(1, n - 1, side // 16, side // 16, device=device),
        )
        target = torch.zeros(1, side, side, dtype=torch.long, device=device)
        target[:, side // 4 : side // 2, side // 4 : side // 2] = n - 1
        size, values = (side, side), {}

        def bands():
            return step_loss(
                SegmenterOutput(None, z, None, None, None, size, size),
                SegmenterOutput(None, old, None, None, None, size, size),
                target,
                PARTS,
                1,
            )["loss"]

        def taken(name, way):
            z.grad = None
            value = way()
            value.backward()
            values[name] = value.detach(), z.grad.clone()

        ways = dict(
            plain=lambda: taken("plain", lambda: plain.pixel_losses(z, old, target)[0]),
            bands=lambda: taken("bands", bands),
        )
        memory = [peak(way) for way in ways.values()]
        same(values)
        found.append(row(f"objective, {n} classes", rounds(ways, repeats), "bands", memory=memory))
    return found
