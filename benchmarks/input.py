"""The input pipeline: CPU milliseconds from the files of a 500 × 375 picture to a 512 crop, on one core.

The baseline are the steps of the released program, written out eagerly.

    OMP_NUM_THREADS=1 python benchmarks/input.py [REPEATS] [FOLDER]

Pictures are drawn (JPEG of quality 90, palette PNG) unless FOLDER, a data set in a layout that `mbs` knows, is given.
"""

import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision.transforms import functional as V

from mbs.augment import IMAGENET
from mbs.cache import cache_pictures
from mbs.data import SegmentationFolder
from mbs.draws import Draws
from mbs.protocol import Protocol
from mbs.recipe import make_recipe
from mbs.setup import make_train_view

CORES = 16  # of the machine that figures are given for: those of one core, multiplied


def write_photos(root: Path, n: int, size=(375, 500)):
    "Textured photos and masks in VOC's layout, a quarter of them upright."
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)

    def bumps(rng, h, w, cells, *channels):
        return Image.fromarray((rng.random((cells * h // w + 1, cells + 1, *channels)) * 255).astype(np.uint8)).resize(
            (w, h), Image.Resampling.BICUBIC
        )

    ids = [f"{k:05}" for k in range(n)]
    for k, name in enumerate(ids):
        rng, (h, w) = np.random.default_rng(k), size if k % 4 else size[::-1]
        texture = sum(
            np.asarray(bumps(rng, h, w, cells, 3), np.float32) / cells**0.55 for cells in (4, 12, 40, 120)
        ) + rng.normal(0, 5, (h, w, 3))
        photo = np.interp(texture, np.percentile(texture, (1, 99)), (0, 255)).astype(np.uint8)
        Image.fromarray(photo).save(root / "JPEGImages" / f"{name}.jpg", quality=90)
        mask = Image.fromarray((np.asarray(bumps(rng, h, w, 5)) // 60).astype(np.uint8)).filter(
            ImageFilter.ModeFilter(5)
        )
        mask.putpalette(list(range(256)) * 3)
        mask.save(root / "SegmentationClassAug" / f"{name}.png")
    for part, names in (("trainaug", ids[:-1]), ("val", ids[-1:])):
        (root / "ImageSets/Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
    return root


def literal(image: Path, mask: Path, crop: int = 512):
    "As the recipe reads, with Pillow: decode, short side, scale, pad, crop, flip, tensor, normalise."
    photo, ids = Image.open(image).convert("RGB"), Image.open(mask)

    def resize(width, height):
        return photo.resize((width, height), Image.Resampling.BILINEAR), ids.resize(
            (width, height), Image.Resampling.NEAREST
        )

    photo, ids = resize(*(int(s * crop / min(photo.size) + 1e-6) for s in photo.size))
    factor = random.uniform(0.5, 2)
    photo, ids = resize(*(int(s * factor) for s in photo.size))
    for side in (0, 1):
        if photo.size[side] < crop:
            photo, ids = (V.pad(x, (1 + crop - photo.size[side]) // 2) for x in (photo, ids))
    top, left = random.randint(0, photo.height - crop), random.randint(0, photo.width - crop)
    photo, ids = (V.crop(x, top, left, crop, crop) for x in (photo, ids))
    if random.random() < 0.5:
        photo, ids = V.hflip(photo), V.hflip(ids)
    return V.normalize(V.to_tensor(photo), *IMAGENET), torch.from_numpy(np.array(ids, np.uint8)).long()


class Literal:
    "The literal way as a data set, for loader processes."

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return literal(self.data.images[i], self.data.masks[i])


def cpu_ms(way, n):
    "CPU milliseconds of one of `n` pictures that `way` goes through."
    random.seed(0)
    began = time.process_time()
    for _ in way:
        pass
    return (time.process_time() - began) / n * 1e3


def received(dataset, n, batch=16):
    "CPU milliseconds of the training process for a batch from a loader process, with one copy of it, as pinning makes."
    began, batches = time.process_time(), 4
    for images, labels in DataLoader(dataset, batch, sampler=[k % n for k in range(batches * batch)], num_workers=1):
        images.clone(), labels.clone()
    return (time.process_time() - began) / batches * 1e3


def row(what, baseline, ours, unit):
    "Medians, and the spread of the ratio."
    ratios = sorted(a / b for a, b in zip(baseline, ours))
    return dict(
        what=what,
        baseline=statistics.median(baseline),
        ours=statistics.median(ours),
        ratio=statistics.median(ratios),
        low=ratios[0],
        high=ratios[-1],
        unit=unit,
    )


def measure(repeats: int = 5, folder: Path | None = None, n: int = 48) -> list[dict]:
    "Rows of what, baseline, ours, their ratio (median, lowest, highest) and unit; all ways in turn, `repeats` times."
    with tempfile.TemporaryDirectory() as temporary, redirect_stdout(sys.stderr):
        before, os.environ["MBS_HOME"] = os.environ.get("MBS_HOME"), temporary
        data = SegmentationFolder(folder or write_photos(Path(temporary, "photos"), n + 1))
        fast = cache_pictures(data)
        protocol = Protocol("15-5", "voc") if len(data.classes) == 20 else Protocol("offline", len(data.classes))
        seen = np.arange(len(data))[:n]

        def draws(data, recipe):
            return Draws(make_train_view(data, protocol[0], IMAGENET, make_recipe(recipe, batch=1), seen), 1)

        streams = {
            ("released", False): draws(data, "paper"),
            ("clean", False): draws(data, "clean"),
            ("released", True): draws(fast, "paper"),
            ("clean", True): draws(fast, "clean"),
        }
        ways = {key: (lambda s: lambda: (s[k] for k in range(n)))(stream) for key, stream in streams.items()} | dict(
            literal=lambda: (literal(data.images[i], data.masks[i]) for i in seen)
        )
        times = {key: [] for key in ways}
        for _ in range(repeats):
            for key, way in ways.items():
                times[key].append(cpu_ms(way(), n))
        hands = [(received(Literal(data), n), received(streams["clean", True], n)) for _ in range(repeats)]
        if before is None:
            del os.environ["MBS_HOME"]
        else:
            os.environ["MBS_HOME"] = before
        names = {
            ("released", False): "crops of the released program",
            ("released", True): "the same, cached",
            ("clean", False): "crops in one resample",
            ("clean", True): "the same, cached",
        }
        return [row(f"input: {names[key]}", times["literal"], times[key], "ms CPU a picture") for key in names] + [
            row("input: receiving a batch of 16, float32 and int64 → bytes", *zip(*hands), "ms CPU a batch")
        ]


def main(repeats: int = 5, folder: Path | None = None):
    print(f"torch {torch.__version__}, medians of {repeats} interleaved runs, one core")
    print(f"pictures/s on {CORES} cores are those of one core × {CORES}")
    for r in measure(repeats, folder):
        per_core = (
            f"{1e3 / r['ours']:6.0f} pictures/s a core, × {CORES} = {CORES * 1e3 / r['ours']:7,.0f}"
            if "picture" in r["unit"]
            else ""
        )
        times = f"{r['baseline']:6.2f} → {r['ours']:6.2f} {r['unit']:17}"
        ratio = f"× {r['ratio']:5.2f} ({r['low']:.2f} … {r['high']:.2f})"
        print(f"{r['what']:60} {times} {ratio}  {per_core}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:2]), *map(Path, sys.argv[2:3]))
