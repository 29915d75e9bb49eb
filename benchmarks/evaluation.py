"""Evaluation, from patch logits to a confusion matrix, and with a small network before it.

The baseline evaluates as the released program does: batches of one, full size, softmax, `max(1)[1]`, NumPy.
The gain depends on the patch logits, because on a CPU we upsample only the channels that can win. Three kinds are
measured: those of a trained network, regions with a clear winner each, and noise, in which every channel can win.
"""

import numpy as np
import plain
import torch
from interleaved import peak, rounds, row

from mbs.evaluation import count_pairs
from mbs.inference import predict_labels, to_batch
from mbs.run import trained_run
from mbs.scenes import draw_scene
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


def predict_scenes(side, batch, device):
    "Compute the patch logits of the trained run that comes with `mbs` for generated scenes; return them and the truth."
    run = trained_run("mbs")
    photos, masks = zip(*(draw_scene(np.random.default_rng(k), side) for k in range(batch)))
    images = torch.cat([to_batch(photo, run.card.normalisation) for photo in photos])
    z = run.model(run.n_steps - 1)(images).patch_logits
    return z.to(device), torch.from_numpy(np.stack(masks)).long().to(device)


def draw_truth(n, side, batch, device):
    "Draw a ground truth in squares of 8 pixels, with some void."
    truth = enlarge(torch.randint(0, n, (batch, side // 8, side // 8), device=device), 8)
    truth[:, :8] = 255
    return truth


def draw_regions(n, side, batch, device):
    "Draw patch logits with nine regions in each picture, about as clear as those of a trained network, and a truth."
    z, truth = draw_noise(n, side, batch, device)
    patches = z.shape[2]
    regions = enlarge(torch.randint(0, n, (batch, 3, 3), device=device), -(-side // 48))[:, :patches, :patches]
    height = torch.full((batch, 1, patches, patches), 4.0, device=device)
    return z.scatter_add_(1, regions[:, None], height), truth


def draw_noise(n, side, batch, device):
    "Draw patch logits in which any channel may win anywhere, and a ground truth."
    torch.manual_seed(0)
    z = torch.randn(batch, n, side // 16, side // 16, device=device)
    return z, draw_truth(n, side, batch, device)


def count_one_by_one(model, images, truth):
    "Count the pairs of true and predicted channels picture by picture, as the released program does."
    return sum(plain.confusion(model(image[None]).patch_logits, labels[None]) for image, labels in zip(images, truth))


def check_counts(expected, counts):
    "Raise AssertionError unless the two matrices agree, up to ties that rounding decides."
    assert expected.sum() == counts.sum()
    assert abs(expected - counts).sum() <= 1e-4 * expected.sum()


def compare_counting(z, truth):
    "Return the functions that count the pairs of patch logits and a ground truth."
    n, network = z.shape[1], KnownOutput(z, tuple(truth.shape[1:]))
    return dict(
        plain=lambda: plain.confusion(z, truth),
        ours=lambda: count_pairs(truth, predict_labels(network, None), n).cpu().numpy(),
    )


def compare_networks(n, side, batch, encoder, device):
    "Return the functions that count the pairs of an untrained network's predictions and a ground truth."
    truth = draw_noise(n, side, batch, device)[1]
    model = Segmenter(make_encoder(encoder, image_size=side), [1, n - 1]).eval().to(device)
    images = torch.randn(batch, 3, side, side, device=device)
    return dict(
        plain=lambda: count_one_by_one(model, images, truth),
        ours=lambda: count_pairs(truth, predict_labels(model, images), n).cpu().numpy(),
    )


def list_comparisons(side, classes, batch, encoder, device):
    "Yield the name of each measurement and the functions that are compared."
    z, truth = predict_scenes(side, batch, device)
    yield f"evaluation after the network, {z.shape[1]} classes, trained network", compare_counting(z, truth)
    for n in classes:
        for kind, draw in dict(regions=draw_regions, noise=draw_noise).items():
            ways = compare_counting(*draw(n, side, batch, device))
            yield f"evaluation after the network, {n} classes, {kind}", ways
        yield f"evaluation with {encoder}, {n} classes", compare_networks(n, side, batch, encoder, device)


@torch.inference_mode()
def measure(repeats=5, side=512, classes=(21, 151), batch=4, encoder="vit_tiny_patch16_224"):
    "Measure seconds and peak memory of both ways for each kind of patch logits and each number of classes."
    found = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for what, ways in list_comparisons(side, classes, batch, encoder, device):
        check_counts(*(way() for way in ways.values()))
        memory = [peak(way) for way in ways.values()]
        found.append(row(what, rounds(ways, repeats), "ours", memory=memory))
    return found
