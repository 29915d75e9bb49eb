"""Evaluation, from patch logits to a confusion matrix, and with a small network before it.

The baseline evaluates as the released program does: batches of one, full size, softmax, argmax on the CPU, NumPy.
"""

import plain
import torch
from interleaved import peak, rounds, row

from mbs.evaluation import count_pairs
from mbs.inference import predict_labels
from mbs.segmenter import Segmenter, SegmenterOutput
from mbs.weights import make_encoder


class KnownOutput:
    "A network that returns the same patch logits for any images."

    def __init__(self, z, size):
        self.out = SegmenterOutput(None, z, None, None, None, size, size)

    def __call__(self, images):
        return self.out


def enlarge(values, factor):
    "Repeat the last two dimensions of a tensor `factor` times."
    return values.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def pictures(n, side, batch, device):
    "Draw patch logits with a few regions in each picture, as of a trained network, and a ground truth with void."
    torch.manual_seed(0)
    patches = side // 16
    regions = enlarge(torch.randint(0, n, (batch, 3, 3), device=device), -(-side // 48))[:, :patches, :patches]
    noise = torch.randn(batch, n, patches, patches, device=device)
    height = torch.full((batch, 1, patches, patches), 4.0, device=device)
    z = noise.scatter_add_(1, regions[:, None], height)
    truth = enlarge(torch.randint(0, n, (batch, side // 8, side // 8), device=device), 8)
    truth[:, :8] = 255
    return z, truth


def count_one_by_one(model, images, truth):
    "Count the pairs of true and predicted channels picture by picture, as the released program does."
    return sum(plain.confusion(model(image[None]).patch_logits, labels[None]) for image, labels in zip(images, truth))


def check_counts(expected, counts):
    "Raise AssertionError unless the two matrices agree, up to ties that rounding decides."
    assert expected.sum() == counts.sum()
    assert abs(expected - counts).sum() <= 1e-4 * expected.sum()


def compare(n, side, batch, encoder, device):
    "Return, for each of the two measurements with `n` classes, the functions that are compared."
    z, truth = pictures(n, side, batch, device)
    model = Segmenter(make_encoder(encoder, image_size=side), [1, n - 1]).eval().to(device)
    images = torch.randn(batch, 3, side, side, device=device)
    known = KnownOutput(z, (side, side))

    def count(network):
        return count_pairs(truth, predict_labels(network, images), n).cpu().numpy()

    return {
        f"evaluation after the network, {n} classes": dict(
            plain=lambda: plain.confusion(z, truth), ours=lambda: count(known)
        ),
        f"evaluation with {encoder}, {n} classes": dict(
            plain=lambda: count_one_by_one(model, images, truth), ours=lambda: count(model)
        ),
    }


@torch.inference_mode()
def measure(repeats=5, side=512, classes=(21, 151), batch=4, encoder="vit_tiny_patch16_224"):
    "Measure seconds and peak memory of both ways for each number of classes."
    found = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for n in classes:
        for what, ways in compare(n, side, batch, encoder, device).items():
            check_counts(*(way() for way in ways.values()))
            memory = [peak(way) for way in ways.values()]
            found.append(row(what, rounds(ways, repeats), "ours", memory=memory))
    return found
