"""All methods on the animals of `animals.py`, without and with a memory of 60 of the 3,131 training pictures.

    python benchmarks/animals.py tune                                   # the values of every method, without a memory
    python benchmarks/families.py run [NAME]... [--memory 60] [--seeds 0 1 2]
    python benchmarks/families.py collect

`run` trains on the test part of 3-1 overlapped, with the values that `animals.py tune` chose; a memory changes none of
them. `collect` writes the confusion matrices to docs/results/families.npz and a figure to docs/images, and prints the
table.
"""

import argparse
import re
from pathlib import Path

import animals
import matplotlib.pyplot as plt
import numpy as np
import yaml

from mbs import METHODS, Experiment, Settings, load_run
from mbs.folders import home
from mbs.metrics import Confusion, scores
from mbs.protocol import Protocol
from mbs.tables import Table, summarise_seeds, to_markdown

NAMES = {name: dict(method=name, parts={}) for name in METHODS} | {
    "mbs, fused": dict(method="mbs", parts=dict(weight_fusion=True)),
    "mib, fused": dict(method="mib", parts=dict(weight_fusion=True)),
}
RESULTS = Path(__file__).parents[1] / "docs/results/families.npz"
SCORES = {"old": "old", "new": "new", "all": "all", "all_fg": "all, no background"}


def plan_run(name: str, memory: int, seed: int) -> Settings:
    "Make the settings of one run; `mbs-analytic` has the values of `mbs`, and `joint` the iterations of all steps."
    method, parts = NAMES[name]["method"], NAMES[name]["parts"]
    chosen = yaml.safe_load(animals.CHOSEN.read_text()) | dict(joint=dict(lr_factor=1, parts={}))
    values = chosen[method.removesuffix("-analytic")]
    words = ["families", re.sub(r"\W+", "-", name), f"m{memory}", f"s{seed}"]
    more = dict(memory=dict(size=memory)) if memory else {}
    planned = animals.make_settings(
        method, values["lr_factor"], values["parts"] | parts, seed=seed, name="-".join(words), **more
    )
    if name != "joint":
        return planned
    iterations = animals.RECIPE["iterations"] + 3 * animals.RECIPE["new_iterations"]
    return Settings.checked(**planned.model_dump() | dict(training=planned.training | dict(iterations=iterations)))


def run(names: list[str], memory: int, seeds: list[int]):
    "Train and test runs, and print their scores."
    for seed in seeds:
        for name in names or NAMES:
            finished = Experiment(plan_run(name, memory, seed)).run()
            after = finished.metrics()["scores"]
            print(f"{finished.folder.name:34}", {k: round(100 * after[k], 1) for k in SCORES}, flush=True)


def read_runs() -> dict[str, np.ndarray]:
    "Read the confusion matrices after the last step of all finished runs; the keys are name/memory/seed."
    found = {}
    for path in sorted(home("outputs").glob("families-*/run.json")):
        finished = load_run(path.parent)
        memory, seed = re.search(r"-m(\d+)-s(\d)$", finished.folder.name).groups()
        name = next(n for n in NAMES if plan_run(n, int(memory), int(seed)).name == finished.folder.name)
        if finished.finished:
            found[f"{name}/{memory}/{seed}"] = finished.confusion().counts
    return found


def read_earlier() -> dict[str, np.ndarray]:
    "Read the matrices without a memory that other studies keep: of five methods, `joint` and the identity."
    found = {}
    with np.load(RESULTS.with_name("animals.npz")) as arrays:
        for key in arrays:
            parts = re.fullmatch(r"3-1-(?:overlapped-(\w+)-s(\d)/3|(joint)-s(\d)/0)", key)
            if parts and (parts[1] or parts[3]) in METHODS:
                found[f"{parts[1] or parts[3]}/0/{parts[2] or parts[4]}"] = arrays[key]
    with np.load(RESULTS.with_name("identity.npz")) as arrays:
        for key in arrays:
            parts = re.fullmatch(r"3-1/overlapped/hoofed-last/tf_efficientnet_lite0/mbs/(\d)/identity", key)
            if parts:
                found[f"mbs-analytic/0/{parts[1]}"] = arrays[key]
    return found


def score_lines(found: dict[str, np.ndarray]) -> dict[tuple[str, int], list[dict[str, float]]]:
    "Compute the scores of each (name, memory), one for each seed; the best on all classes comes first."
    step = Protocol("3-1", len(animals.CLASSES))[3]
    lines = {}
    for key, counts in found.items():
        name, memory, _ = key.split("/")
        lines.setdefault((name, int(memory)), []).append(scores(Confusion(step.n_channels, counts), step))
    means = {line: np.mean([after["all"] for after in runs]) for line, runs in lines.items()}
    return {line: lines[line] for line in sorted(lines, key=means.get, reverse=True)}


def tabulate(lines) -> Table:
    "Make the table of all lines: means and standard deviations over seeds, in percent."
    rows = []
    for (name, memory), runs in lines.items():
        values = [summarise_seeds([after[k] for after in runs]) for k in SCORES]
        rows.append([name, memory, len(runs), *values])
    return Table("3-1 overlapped", ["", "exemplars", "seeds", *SCORES.values()], rows)


def draw_lines(lines):
    "Save a picture of all methods: old, new and all classes, without and with a memory."
    names = list(dict.fromkeys(name for name, _ in lines))[::-1]
    figure, axes = plt.subplots(1, 3, figsize=(11, 0.34 * len(names) + 1), sharey=True, layout="constrained")
    for axis, key in zip(axes, ("old", "new", "all")):
        for y, name in enumerate(names):
            means = {m: 100 * np.mean([s[key] for s in runs]) for (n, m), runs in lines.items() if n == name}
            axis.plot(list(means.values()), [y] * len(means), color="0.7", zorder=1)
            for memory, x in means.items():
                label = f"{memory} exemplars" if name == names[0] else None
                axis.scatter(x, y, s=36, color="C1" if memory else "C0", label=label, zorder=2)
        axis.set(title=f"{SCORES[key]} classes", xlabel="mean IoU, %", xlim=(-2, 70))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    animals.save_figure(figure, RESULTS.parents[1] / "images/animals-families.png")


def collect():
    "Add the finished runs to docs/results/families.npz, draw a figure, and print the table."
    found = {}
    if RESULTS.is_file():
        with np.load(RESULTS) as arrays:
            found = dict(arrays)
    found = dict(sorted((found | read_runs()).items()))
    np.savez_compressed(RESULTS, **found)
    lines = score_lines(read_earlier() | found)
    draw_lines(lines)
    print(to_markdown(tabulate(lines)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "collect"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_intermixed_args()
    if given.command == "collect":
        collect()
    else:
        run(given.names, given.memory, given.seeds)
