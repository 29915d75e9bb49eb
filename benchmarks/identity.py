"""The cost of the class identity: of learning a step's classes, and of predicting with it.

The baselines are what the identity is added to: the training of the step, for as many epochs as published, and a
prediction by the network alone. The encoder is the published one, ViT-B/16.
"""

import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from input import write_photos
from interleaved import peak, rounds, row
from PIL import Image
from step import VITB, Ours, make_step, networks, pictures

from mbs.augment import IMAGENET
from mbs.data import SegmentationFolder
from mbs.identity import IdentifiedSegmenter, Identity
from mbs.identity_learning import learn_identity
from mbs.inference import predict_labels
from mbs.recipe import make_recipe
from mbs.setup import make_test_view

N_PICTURES = 500  # of a later step of VOC 15-1
N_TIMED = 4  # pictures in a timed call


def draw_pictures(root):
    "Write textured photos whose masks hold the classes 5, 10, 15 and 20."
    for path in (write_photos(root, N_TIMED + 1) / "SegmentationClassAug").iterdir():
        with Image.open(path) as mask:
            ids = 5 * np.asarray(mask)
        Image.fromarray(ids).save(path)
    return SegmentationFolder(root)


class Costs:
    "The parts of a later step's cost, each as a function to time: training, passes over its pictures, and solution."

    def __init__(self, data, n_old, n_new, encoder, side, device, **options):
        teacher, student = networks(encoder, n_old + n_new, n_new, side, device, **options)
        self.step = make_step(n_old + n_new, n_new)
        self.recipe = make_recipe()
        self.train = Ours(student, teacher, pictures(n_old + n_new, n_new, side, 1, device), self.step)
        self.model = student.eval()
        self.view = make_test_view(data, self.step, IMAGENET, self.recipe, "whole", "train", np.arange(N_TIMED))
        self.identity = Identity(student.encoder.dim).to(device)
        self.identity.features.std.fill_(1)  # standardised by the base step

    def learn(self):
        "Learn the new classes from all pictures of the view; γ and β are known since the base step."
        identity = Identity(self.model.encoder.dim, ridge=0.1, sharpness=4.0).to(self.identity.gram.device)
        identity.features.load_state_dict(self.identity.features.state_dict())
        learn_identity(identity, self.model, self.view, batch=N_TIMED)

    def solve(self):
        self.identity.solve()


def compare_step(costs, repeats):
    "Make the row of a later step's training and of learning its classes."
    ways = dict(train=costs.train, learn=costs.learn, solve=costs.solve)
    for way in ways.values():
        way()
    spent = rounds(ways, repeats)
    total = dict(training=[], identity=[])
    for train, learn, solve in zip(*spent.values()):
        total["training"].append(train * N_PICTURES * costs.recipe.epochs)
        total["identity"].append((learn - solve) / len(costs.view) * N_PICTURES + solve)
    what = f"identity: training a step of {N_PICTURES} pictures, and learning its classes"
    return row(what, total, "identity", baseline="training")


def compare_prediction(n, encoder, side, device, repeats, **options):
    "Make the row of a prediction by the network alone, and with the identity of `n` − 1 classes."
    network = networks(encoder, n, 1, side, device, **options)[1].eval()
    identity = Identity(network.encoder.dim).to(device)
    identity.features.std.fill_(1)
    identity.known = torch.arange(1, n, device=device)
    identity.weights = torch.randn(identity.width, n - 1, device=device)
    together = IdentifiedSegmenter(network, identity)
    images = torch.randn(1, 3, side, side, device=device)
    ways = {name: partial(predict_labels, model, images) for name, model in (("network", network), ("both", together))}
    memory = [peak(way) for way in ways.values()]
    what = f"identity: prediction without and with it, {n} classes"
    return row(what, rounds(ways, repeats), "both", baseline="network", memory=memory)


def measure(repeats=3, side=512, encoder=VITB, **options):
    "Measure the cost of a step with one new class of 20, and of predictions with 21 and 151 classes."
    found, device = [], "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        data = draw_pictures(Path(folder, "photos"))
        found.append(compare_step(Costs(data, 20, 1, encoder, side, device, **options), repeats))
    with torch.inference_mode():
        for n in (21, 151):
            found.append(compare_prediction(n, encoder, side, device, repeats, **options))
    return found
