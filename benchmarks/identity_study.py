"""The evidence for the class identity: the animals of `animals.py`, with the network of `mbs` and of its rivals.

    python benchmarks/identity_study.py run 3-1 [SETTING] [NAME]... [--seeds 0 1 2] [--order ORDER] [--encoder ENCODER]
    python benchmarks/identity_study.py scenes [--seeds 0 1 2]
    python benchmarks/identity_study.py decide [--seeds 0 1 2]
    python benchmarks/identity_study.py collect

`run` trains on the test part with the values that `animals.py tune` chose; no value is chosen for the identity, which
chooses its own on training pictures. Every run is also tested by its network alone, so that one run gives both rows.
`scenes` does the same with `mbs` on the scenes of `mbs demo`.
`decide` compares ways to decide the classes that need no training of a network, on the networks of 3-1 overlapped.
`collect` writes the confusion matrices to docs/results/identity.npz and a figure to docs/images, and prints the tables.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import animals
import numpy as np
import torch
import yaml
from torch import Tensor

from mbs import Experiment, Settings, load_run
from mbs.bands import argmax_in_bands
from mbs.evaluation import count_pairs, iterate_by_size
from mbs.folders import home
from mbs.identity import (
    RIDGES,
    SHARPNESSES,
    Identity,
    RidgeSums,
    choose_best,
    measure_coverage,
    score_choices,
    solve_ridge,
    sum_patches,
)
from mbs.identity_learning import N_SCORED
from mbs.metrics import Confusion, scores
from mbs.parameter_files import read_parameters
from mbs.protocol import SETTINGS, Protocol, Step
from mbs.run import Run
from mbs.segmenter import cover
from mbs.setup import Setup, make_test_view
from mbs.tables import Table, summarise_seeds, to_markdown
from mbs.viz import show_confusions

ORDERS = {  # of arrival; the hoofed animals are the ones that are taken for one another
    "hoofed-last": animals.CLASSES,
    "hoofed-first": ["horse", "sheep", "cow", "cat", "dog", "person"],
    "hoofed-spread": ["cat", "horse", "dog", "sheep", "person", "cow"],
}
NAMES = {name: dict(method=name, parts=dict(identity="analytic")) for name in ("kd", "mib", "plop", "finetune")} | {
    "mbs": dict(method="mbs-analytic", parts={}),
    "mbs, labels": dict(method="mbs-analytic", parts=dict(identity_teacher="labels")),
    "mbs, targets": dict(method="mbs-analytic", parts=dict(identity_teacher="targets")),
    "mbs, labels and targets": dict(method="mbs-analytic", parts=dict(identity_teacher=True)),
    "joint": dict(method="joint", parts=dict(identity="analytic")),
}
RESULTS = Path(__file__).parents[1] / "docs/results/identity.npz"


def plan_run(name, protocol, setting, seed, order, encoder=animals.NETWORK["encoder"]):
    "Make the settings of one run."
    chosen = yaml.safe_load(animals.CHOSEN.read_text())
    values = chosen[name.split(",")[0]] if name != "joint" else dict(lr_factor=1, parts={})
    recipe = {}
    if name == "joint":  # as many iterations as all steps of 3-1 together
        recipe["iterations"] = animals.RECIPE["iterations"] + 3 * animals.RECIPE["new_iterations"]
    is_other = encoder != animals.NETWORK["encoder"]
    words = [protocol, setting, order, *[encoder] * is_other, re.sub(r"\W+", "-", name), f"s{seed}"]
    planned = animals.make_settings(
        NAMES[name]["method"],
        values["lr_factor"],
        values["parts"] | NAMES[name]["parts"],
        protocol,
        setting,
        seed,
        name="-".join(words),
    )
    training = animals.RECIPE | dict(lr_factor=values["lr_factor"]) | recipe
    return Settings.checked(**planned.model_dump() | dict(classes=ORDERS[order], encoder=encoder, training=training))


def train(settings):
    "Train and test one run, and print its scores and those of its network alone."
    finished = Experiment(settings).run()
    for column in ("network", ""):
        found = scores(finished.confusion(-1, column), finished.protocol[finished.n_steps - 1])
        percent = {k: round(100 * found[k], 1) for k in ("old", "new", "all")}
        print(f"{finished.folder.name:44} {column or 'with identity':14}", percent, flush=True)


def train_on_scenes(seeds):
    "Train `mbs` with an identity on the scenes of the demo."
    for seed in seeds:
        name = f"demo-mbs-analytic-s{seed}"
        train(Settings.checked(**read_parameters("demo") | dict(name=name, method="mbs-analytic", seed=seed)))


class Ridge:
    "A ridge regression over background and classes, on the features of an `Identity`; its sums are kept by class."

    def __init__(self, identity: Identity, n_channels: int):
        width = identity.width
        self.features = identity.features
        self.grams = torch.zeros(n_channels, width, width, dtype=torch.float64)
        self.means = torch.zeros(n_channels, width, dtype=torch.float64)
        self.counts = torch.zeros(n_channels, dtype=torch.float64)
        self.ridge, self.sharpness = None, None

    def add(self, z: Tensor, coverage: Tensor):  # (P, M), (P, C)
        "Add patches, whatever their classes."
        for channel in (coverage > 0).any(0).nonzero()[:, 0].tolist():
            sums = sum_patches(z, coverage[:, [channel]], torch.ones(1))
            self.grams[channel] += sums.gram
            self.means[channel] += sums.means[0]
        self.counts += coverage.double().sum(0)

    @property
    def sums(self) -> RidgeSums:
        "The sums of all classes so far, each with the same weight."
        n = self.counts[self.counts > 0]
        gram = (self.grams[self.counts > 0] / n[:, None, None]).sum(0)
        return RidgeSums(gram, self.means[self.counts > 0] / n[:, None], n)

    def choose(self, pictures: list[tuple[Tensor, Tensor]]):
        "Choose γ and β by leaving out single pictures, as the identity does."
        known = ((z, coverage[:, self.counts > 0]) for z, coverage in pictures)
        places = choose_best(*score_choices(known, self.sums, RIDGES, SHARPNESSES))
        self.ridge, self.sharpness = RIDGES[places[0]], SHARPNESSES[places[1]]

    def solve(self):
        self.weights = solve_ridge(self.sums, self.ridge).float()

    def decide(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # (B, C, h, w)
        "Compute log-probabilities of all channels that have arrived."
        logits = self.sharpness * self.features(tokens, grid) @ self.weights
        return logits.log_softmax(2).mT.unflatten(2, grid)


class Decisions:
    "Ways to decide the classes with the frozen features of a finished run, and the pictures to learn from and to test."

    def __init__(self, finished: Run):
        self.run = finished
        self.setup = Setup(finished.settings)
        self.model = finished.model()
        self.normalisation = finished.card.normalisation

    def read(self, step: Step, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        "Yield the pictures of a step's training part, with its labels or the truth, or of the test part."
        is_test = part == "test"
        data, positions = (self.setup.test, None) if is_test else (self.setup.train, self.setup.positions[step.number])
        view = make_test_view(data, step, self.normalisation, self.setup.recipe, "whole", part, positions)
        yield from iterate_by_size(view, 16, 0, "cpu")

    def learn(self, true_labels: bool) -> Ridge:
        """Learn a ridge that includes the background, step by step.

        Its background is the step's, in which earlier classes are relabelled by the ridge so far, as its pseudo-labels;
        with `true_labels` all classes of a picture are labelled, those of later steps as background."""
        identity = self.model.identity
        ridge = Ridge(identity, self.model.n_channels)
        rng = np.random.default_rng(0)
        for step in self.run.protocol:
            pictures = []
            for images, labels in self.read(step, "truth" if true_labels else "train"):
                tokens = self.model.encode(images)
                grid, canvas = cover(images.shape[2:], self.model.encoder.stride)
                if step.number and not true_labels:
                    said = argmax_in_bands(ridge.decide(tokens, grid), tuple(labels.shape[1:]), canvas)
                    labels = torch.where((labels == 0) & (said > 0), said, labels)
                coverage = measure_coverage(labels, range(len(ridge.counts)), self.model.encoder.stride)
                z = identity.features(tokens, grid)
                ridge.add(z.flatten(0, 1), coverage.flatten(0, 1))
                if ridge.ridge is None:
                    used = (coverage > 0).any(2)
                    pictures += [(x[u], c[u]) for x, c, u in zip(z, coverage, used)]
            if ridge.ridge is None:
                ridge.choose([pictures[k] for k in rng.permutation(len(pictures))[:N_SCORED]])
            ridge.solve()
        return ridge

    def compare(self) -> dict[str, Confusion]:
        "Compute the confusion matrix of each way on the test part."
        step = self.run.protocol[self.run.n_steps - 1]
        ridges = {
            "ridge with background, pseudo-labels": self.learn(true_labels=False),
            "ridge with background, all labels": self.learn(true_labels=True),
        }
        n, counts = step.n_channels, {}
        for images, truth in self.read(step, "test"):
            for name, labels in self.decide(images, truth, ridges).items():
                counts[name] = counts.get(name, 0) + count_pairs(truth, labels, n).numpy()
        return {name: Confusion(n, total) for name, total in counts.items()}

    def decide(self, images: Tensor, truth: Tensor, ridges: dict[str, Ridge]) -> dict[str, Tensor]:
        "Predict the labels of a batch in each way."
        tokens = self.model.encode(images)
        output = self.model(images, tokens)
        grid = tuple(output.patch_logits.shape[2:])
        choices = {
            "network": output.choose(identity=False).patch_logits,
            "network and identity": output.patch_logits,
        }
        labels = {name: argmax_in_bands(z, output.size, output.canvas) for name, z in choices.items()}
        for name, z in choices.items():
            foreground = 1 + argmax_in_bands(z[:, 1:].contiguous(), output.size, output.canvas)
            labels[f"{name}, background perfect"] = torch.where(truth == 0, 0, foreground)
        for name, ridge in ridges.items():
            labels[name] = argmax_in_bands(ridge.decide(tokens, grid), output.size, output.canvas)
        return labels


def decide(seeds):
    "Compare ways to decide the classes on the networks of 3-1 overlapped, and keep their confusion matrices."
    for seed in seeds:
        finished = load_run(home("outputs") / plan_run("mbs", "3-1", "overlapped", seed, "hoofed-last").name)
        with torch.inference_mode():
            found = Decisions(finished).compare()
        np.savez_compressed(finished.folder / "decisions.npz", **{name: c.counts for name, c in found.items()})
        for name, confusion in found.items():
            after = scores(confusion, finished.protocol[finished.n_steps - 1])
            print(f"{name:44}", {k: round(100 * after[k], 1) for k in ("old", "new", "all")}, flush=True)


def read_runs() -> dict[str, np.ndarray]:
    """Read the confusion matrices after the last step of all finished runs of the study.

    The keys are protocol/setting/order/encoder/name/seed/column, the order is "scenes" for these, and the column
    "network", "identity" or a way of `decide`."""
    found = {}
    for path in sorted(home("outputs").glob("*/run.json")):
        finished = load_run(path.parent)
        given = finished.settings
        choice = dict(method=given.method, parts={k: v for k, v in given.parts.items() if k.startswith("identity")})
        names = [name for name, chosen in NAMES.items() if chosen == choice]
        if not (names and finished.finished) or given.tuning:
            continue
        orders = [name for name, classes in ORDERS.items() if classes == given.classes]
        words = [given.protocol, given.setting, *(orders or ["scenes"]), given.encoder, names[0], str(given.seed)]
        key = "/".join(words)
        found[f"{key}/network"] = finished.confusion(-1, "network").counts
        found[f"{key}/identity"] = finished.confusion().counts
        decisions = path.with_name("decisions.npz")
        if decisions.is_file():
            with np.load(decisions) as arrays:
                found |= {f"{key}/{name}": arrays[name] for name in arrays}
    return found


def tabulate(found: dict[str, np.ndarray]) -> list[Table]:
    "Make a table for each protocol, setting and order: rows are names and columns, cells means over seeds in percent."
    tables = {}
    for key, counts in found.items():
        *title, name, _, column = key.split("/")
        rows = tables.setdefault(tuple(title), {})
        rows.setdefault((name, column), []).append(counts)
    return [tabulate_rows(title, rows) for title, rows in tables.items()]


def tabulate_rows(title, rows) -> Table:
    "Make the table of one protocol, setting, order and encoder."
    protocol, setting, *_ = title
    n_classes = len(next(iter(rows.values()))[0]) - 1
    split = Protocol(protocol, n_classes, setting)
    step, cells = split[len(split) - 1], []
    for (name, column), matrices in rows.items():
        after = [scores(Confusion(step.n_channels, counts), step) for counts in matrices]
        confused = [measure_confusion(counts) for counts in matrices]
        values = [summarise_seeds([a[k] for a in after]) for k in ("old", "new", "all", "all_fg")]
        cells.append([name, column, len(matrices), *values, summarise_seeds(confused)])
    headings = ["network of", "classes from", "seeds", "old", "new", "all", "all, no background", "confused"]
    return Table(", ".join(title), headings, cells)


def measure_confusion(counts: np.ndarray) -> float:
    "Compute the share of wrong classes among the foreground pixels that are predicted as foreground."
    foreground = counts[1:, 1:]
    return 1 - np.trace(foreground) / foreground.sum()


def draw_confusion(found: dict[str, np.ndarray]):
    "Save the confusion matrices of `mbs` on 3-1 overlapped, of the network alone and with the identity, over seeds."
    start = f"3-1/overlapped/hoofed-last/{animals.NETWORK['encoder']}/mbs/"
    titles = {"network": "network of mbs alone", "identity": "network and identity"}
    counts = {
        title: sum(found[key] for key in found if key.startswith(start) and key.endswith(f"/{column}"))
        for column, title in titles.items()
    }
    figure = show_confusions(counts, ["background", *animals.CLASSES], Protocol("3-1", 6).first_step)
    animals.save_figure(figure, RESULTS.parents[1] / "images/animals-identity.png")


def collect():
    "Add the finished runs to docs/results/identity.npz, draw a figure, and print the tables of all runs in it."
    found = {}
    if RESULTS.is_file():
        with np.load(RESULTS) as arrays:
            found = dict(arrays)
    found = dict(sorted((found | read_runs()).items()))
    np.savez_compressed(RESULTS, **found)
    draw_confusion(found)
    for table in tabulate(found):
        print(to_markdown(table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "scenes", "decide", "collect"])
    parser.add_argument("protocol", nargs="?", default="3-1")
    parser.add_argument("words", nargs="*", help="setting and names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--order", choices=ORDERS, default="hoofed-last")
    parser.add_argument("--encoder", default=animals.NETWORK["encoder"])
    given = parser.parse_intermixed_args()
    if given.command == "collect":
        collect()
    elif given.command == "scenes":
        train_on_scenes(given.seeds)
    elif given.command == "decide":
        decide(given.seeds)
    else:
        names = [word for word in given.words if word not in SETTINGS]
        setting = next((word for word in given.words if word in SETTINGS), "overlapped")
        for seed in given.seeds:
            for name in names or NAMES:
                train(plan_run(name, given.protocol, setting, seed, given.order, given.encoder))
