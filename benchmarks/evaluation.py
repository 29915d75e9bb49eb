"""Testing: from patch logits to a confusion matrix, and with a small network before it, against the released program's way – batches of one, full size, softmax, argmax on the processor, NumPy."""

import plain
import torch
from interleaved import peak, rounds, row

from mbs.evaluation import count_pairs
from mbs.inference import predict_labels
from mbs.segmenter import Segmenter, SegmenterOutput
from mbs.weights import make_encoder


class Seen:
    "A network whose output is known."

    def __init__(self, z, size):
        self.out = SegmenterOutput(None, z, None, None, None, size, size)

    def __call__(self, images):
        return self.out


def pictures(n, side, batch, device):
    "Patch logits with a few regions in each picture, as a trained network gives them, and a truth with void."
    torch.manual_seed(0)
    regions = (
        torch.randint(0, n, (batch, 3, 3), device=device)
        .repeat_interleave(-(-side // 48), 1)
        .repeat_interleave(-(-side // 48), 2)[:, : side // 16, : side // 16]
    )
    z = torch.randn(batch, n, side // 16, side // 16, device=device).scatter_add_(
        1, regions[:, None], torch.full((batch, 1, side // 16, side // 16), 4.0, device=device)
    )
    truth = (
        torch.randint(0, n, (batch, side // 8, side // 8), device=device)
        .repeat_interleave(8, 1)
        .repeat_interleave(8, 2)
    )
    truth[:, :8] = 255
    return z, truth


@torch.inference_mode()
def measure(repeats=5, side=512, classes=(21, 151), batch=4, encoder="vit_tiny_patch16_224"):
    found, device = [], "cuda" if torch.cuda.is_available() else "cpu"
    for n in classes:
        z, truth = pictures(n, side, batch, device)
        model, images = (
            Segmenter(make_encoder(encoder, image_size=side), [1, n - 1]).eval().to(device),
            torch.randn(batch, 3, side, side, device=device),
        )

        def one_by_one():
            return sum(
                plain.confusion(model(image[None]).patch_logits, labels[None]) for image, labels in zip(images, truth)
            )

        def ours(network):
            return count_pairs(truth, predict_labels(network, images), n).cpu().numpy()

        for what, ways in (
            (
                f"evaluation after the network, {n} classes",
                dict(plain=lambda: plain.confusion(z, truth), ours=lambda: ours(Seen(z, (side, side)))),
            ),
            (f"evaluation with {encoder}, {n} classes", dict(plain=one_by_one, ours=lambda: ours(model))),
        ):
            counts = {name: way() for name, way in ways.items()}
            assert (
                counts["plain"].sum() == counts["ours"].sum()
                and abs(counts["plain"] - counts["ours"]).sum() <= 1e-4 * counts["plain"].sum()
            )  # ties of rounding
            found.append(row(what, rounds(ways, repeats), "ours", memory=[peak(way) for way in ways.values()]))
    return found
