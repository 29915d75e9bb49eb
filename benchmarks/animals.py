"""The project's own evidence: six animal and person classes of PASCAL VOC 2012, all methods on one recipe.

The encoder is EfficientNet-Lite0 with its ImageNet weights. The commands, in order:

    python benchmarks/animals.py copy VOCdevkit/VOC2012  # once
    python benchmarks/animals.py tune [METHOD]...
    python benchmarks/animals.py test 3-1 [overlapped] [METHOD | ABLATION]... [--seeds 0 1 2]
    python benchmarks/animals.py collect

`copy` reduces pictures and masks to a long side of 160 pixels, in data/animals. `tune` chooses learning rate and weight
on a tenth of the training part and writes benchmarks/animals.yaml. `test` runs on the test part with the chosen values.
`collect` writes the tables, pictures and confusion matrices of all runs into docs/.

`tune` does not use the test part. Every method gets four trials: three learning rates of the incremental steps, then,
at the best of them, its distillation at four times the published weight; `finetune`, `ssul` and `dft`, which have
none, get a fourth rate.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import yaml
from PIL import Image

from mbs import ABLATIONS, METHODS, Experiment, Settings, load_run
from mbs.comparison import average_seeds, collect_outcome, collect_series
from mbs.folders import home
from mbs.report import draw_flows
from mbs.tables import Table, summarise_seeds, to_markdown
from mbs.viz import show_curves, show_iou_matrix

CLASSES = ["cat", "dog", "person", "horse", "sheep", "cow"]
RECIPE = dict(
    crop=112,
    batch=8,
    iterations=1000,
    new_iterations=240,
    scale=(0.75, 1.5),
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.01,
    schedule="cosine",
    encoder_factor=(0.1, 0),  # the encoder is fine-tuned in the base step and frozen afterwards
)
NETWORK = dict(
    encoder="tf_efficientnet_lite0",
    weights="pretrained",
    decoder=dict(dim=128, heads=2),
)
RATES = (1, 0.3, 0.1)  # lr_factor: the learning rate of the incremental steps over that of the base step
WEIGHTS = {  # the weight of each method that is also tried four times as large
    "kd": "output_weight",
    "mib": "output_weight",
    "plop": "feature_weight",
    "mbs": "output_weight",
    "incrementer": "feature_weight",
    "lgkd": "feature_weight",
    "select": "output_weight",
}
CHOSEN = Path(__file__).with_name("animals.yaml")


def reduce_picture(source, target, long_side, resampling, **options):
    "Save `source` as `target`, reduced so that its longer side has `long_side` pixels."
    with Image.open(source) as image:
        scale = long_side / max(image.size)
        size = [max(1, round(side * scale)) for side in image.size]
        image.resize(size, resampling).save(target, **options)


def copy(source, long_side=160):
    "Copy `source`, in VOC's layout, to data/animals with pictures of at most `long_side` pixels."
    source, target = Path(source), home("data") / "animals"
    for folder, suffix, resampling, options in (
        ("JPEGImages", ".jpg", Image.Resampling.BICUBIC, dict(quality=92)),
        ("SegmentationClassAug", ".png", Image.Resampling.NEAREST, {}),
    ):
        (target / folder).mkdir(parents=True, exist_ok=True)
        for path in sorted((source / folder).glob(f"*{suffix}")):
            reduce_picture(path, target / folder / path.name, long_side, resampling, **options)
    lists = Path("ImageSets", "Segmentation")
    (target / lists).mkdir(parents=True, exist_ok=True)
    for path in (source / lists).glob("*.txt"):
        (target / lists / path.name).write_text(path.read_text())


def make_settings(method, lr_factor, parts, protocol="3-1", setting="overlapped", seed=0, **more):
    "Make the settings of one run."
    return Settings(
        data=str(home("data") / "animals"),
        protocol=protocol,
        setting=setting,
        classes=CLASSES,
        method=method,
        parts=parts,
        samples=4,
        seed=seed,
        workers=0,
        recipe="clean",
        training=RECIPE | dict(lr_factor=lr_factor),
        **NETWORK,
        **more,
    )


def try_values(method, lr_factor, scale):
    "Run one trial on the held-out tenth of the training part; return its values and its mIoU in percent."
    name = WEIGHTS.get(method)
    parts = {name: METHODS[method].model_dump()[name] * scale} if scale != 1 else {}
    name = f"tune-{method}-{lr_factor}-{scale}"
    run = Experiment(make_settings(method, lr_factor, parts, tuning=0.1, name=name)).run()
    after = [run.metrics(t)["scores"] for t in range(run.n_steps)]
    trial = dict(
        lr_factor=lr_factor,
        scale=scale,
        all=[round(100 * s["all"], 1) for s in after],
        old=round(100 * after[-1]["old"], 1),
        new=round(100 * after[-1]["new"], 1),
    )
    print(method, json.dumps(trial), flush=True)
    return trial | dict(parts=parts)


def tune(methods):
    "Choose the values of each method by its all-class mIoU after the last step, and add them to animals.yaml."
    for method in methods or ("mbs", "kd", "finetune", "mib", "plop", "ssul", "incrementer", "lgkd", "dft", "select"):
        trials = [try_values(method, rate, 1) for rate in RATES]
        best_rate = max(trials, key=lambda t: t["all"][-1])["lr_factor"]
        trials.append(try_values(method, best_rate, 4) if method in WEIGHTS else try_values(method, 0.03, 1))
        best = max(trials, key=lambda t: t["all"][-1])
        chosen = yaml.safe_load(CHOSEN.read_text()) if CHOSEN.is_file() else {}
        chosen[method] = dict(
            lr_factor=best["lr_factor"],
            parts=best["parts"],
            trials=[{k: v for k, v in t.items() if k != "parts"} for t in trials],
        )
        text = yaml.safe_dump(chosen, sort_keys=False, default_flow_style=None, width=200)
        CHOSEN.write_text(text)


def plan_run(name, protocol, setting, seed):
    """Make the settings of one run on the test part.

    `name` is a method or an ablation of `mbs`, which keeps the values that tuning chose for `mbs`."""
    if name == "joint":  # as many iterations as all steps together
        iterations = RECIPE["iterations"] + 3 * RECIPE["new_iterations"]
        joint = make_settings("joint", 1, {}, protocol, setting, seed, name=f"{protocol}-joint-s{seed}")
        return Settings.checked(**joint.model_dump() | dict(training=RECIPE | dict(lr_factor=1, iterations=iterations)))
    ablation = ABLATIONS.get(name, dict(method=name, parts={}))
    chosen = yaml.safe_load(CHOSEN.read_text())[name if name in METHODS else "mbs"]
    return make_settings(
        ablation["method"],
        chosen["lr_factor"],
        chosen["parts"] | ablation["parts"],
        protocol,
        setting,
        seed,
        name=f"{protocol}-{setting}-{name}-s{seed}",
    )


def test(protocol, setting, seeds, names):
    "Run methods and ablations on the test part, and print their scores."
    for seed in seeds:
        for name in names or ("mbs", "kd", "finetune", "mib", "plop", "joint"):
            run = Experiment(plan_run(name, protocol, setting, seed)).run()
            last = run.metrics()
            print(
                f"{run.folder.name:34}",
                [round(100 * run.metrics(t)["scores"]["all"], 1) for t in range(run.n_steps)],
                {k: round(100 * last["scores"][k], 1) for k in ("old", "new", "all_fg")},
                {k: round(100 * v, 1) for k, v in last["shift"].items()},
                flush=True,
            )


COLUMNS = {
    "base": "base step",
    "old": "old",
    "new": "new",
    "all": "all",
    "all_fg": "all, no background",
    "released": "released convention",
    "old->background": "old → background",
    "new->background": "new → background",
    "old->new": "old → new",
    "background->old": "background → old",
}
ORDER = ["joint", "mbs", "mib", "kd", "plop", "finetune"]  # of methods in tables; ablations follow as in `ABLATIONS`


def find_finished():
    """Find the finished runs of `test`: (protocol, setting) → name → runs, one for each seed.

    A joint run has no setting and belongs to all protocols, whose classes are the same in the same order."""
    found = {}
    for path in sorted(home("outputs").glob("*-s[0-9]/run.json")):
        run = load_run(path.parent)
        parts = re.fullmatch(r"(\d-\d)-(?:(overlapped|disjoint)-)?(.+)-s\d", run.folder.name)
        protocol, setting, name = parts.groups()
        if run.finished and not run.settings.tuning:
            found.setdefault((protocol, setting), {}).setdefault(name, []).append(run)
    order = [*ORDER, *ABLATIONS]
    return {key: {name: lines[name] for name in order if name in lines} for key, lines in found.items()}


def print_table(lines, protocol, title):
    "Print means and standard deviations over seeds, in percent, as Markdown."
    rows = []
    for name, runs in lines.items():
        outcomes = [collect_outcome(run, protocol) for run in runs]
        rows.append([name, len(runs), *(summarise_seeds([outcome[k] for outcome in outcomes]) for k in COLUMNS)])
    print(to_markdown(Table(title, ["", "seeds", *COLUMNS.values()], rows)))


def save_figure(figure, path):
    "Save a figure as a PNG of 256 colours, which takes a third of the bytes."
    figure.savefig(path, dpi=100, facecolor="white")
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def save_figures(folder, methods, joint, protocol):
    "Save the curves of all methods, the flows of `mbs` and the IoU matrices of three methods."
    panels = {"all": "all classes so far", "old": "cat, dog, person, background", "new": "horse, sheep, cow"}
    curves = {}
    for key, title in panels.items():
        curves[title] = {
            name: np.array([collect_series(run, key, protocol) for run in runs])
            for name, runs in (joint | methods).items()
        }
    save_figure(show_curves(curves), folder / "animals-curves.png")
    save_figure(draw_flows(methods["mbs"], protocol), folder / "animals-flow-mbs.png")
    for name in ("mbs", "mib", "kd"):
        iou = average_seeds([run.iou() for run in methods[name]])
        matrix = show_iou_matrix(iou, methods[name][0].names, protocol.first_step)
        save_figure(matrix, folder / f"animals-iou-{name}.png")


def save_confusions(path, found):
    "Save the confusion matrix after every step of each run, from which every number can be computed again."
    runs = [run for lines in found.values() for line in lines.values() for run in line]
    counts = {f"{run.folder.name}/{t}": run.confusion(t).counts for run in runs for t in range(run.n_steps)}
    np.savez_compressed(path, **counts)


def collect(docs=Path(__file__).parents[1] / "docs"):
    "Print the tables, and save the figures and the confusion matrices."
    found = find_finished()
    save_confusions(docs / "results/animals.npz", found)
    joint = {}
    for (_, setting), lines in found.items():
        if setting is None:
            joint |= lines
    for (name, setting), lines in found.items():
        if setting is None:
            continue
        methods = {k: runs for k, runs in lines.items() if k in ORDER}
        protocol = next(iter(methods.values()))[0].protocol
        print_table(joint | methods, protocol, f"{name} {setting}")
        if (name, setting) == ("3-1", "overlapped"):
            ablations = {k: runs for k, runs in lines.items() if k in ABLATIONS}
            first_seed = {k: [run for run in runs if run.settings.seed == 0] for k, runs in ablations.items()}
            print_table(first_seed, protocol, f"{name} {setting}, seed 0")
            save_figures(docs / "images", methods, joint, protocol)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["copy", "tune", "test", "collect"])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_intermixed_args()
    if given.command == "copy":
        copy(*given.words)
    elif given.command == "tune":
        tune(given.words)
    elif given.command == "collect":
        collect()
    else:
        protocol, *words = given.words
        setting = next((w for w in words if w in ("overlapped", "disjoint")), "overlapped")
        test(protocol, setting, given.seeds, [w for w in words if w != setting])
