"""The project's own evidence: six animal and person classes of PASCAL VOC 2012, EfficientNet-Lite0 with its ImageNet weights, all methods on one recipe.

    python benchmarks/animals.py copy VOCdevkit/VOC2012        # once: pictures and masks with a long side of 160 pixels, in data/animals
    python benchmarks/animals.py tune [METHOD]...              # rate and weight on a tenth of the training part; writes benchmarks/animals.yaml
    python benchmarks/animals.py test 3-1 [overlapped] [--seeds 0 1 2] [METHOD | ABLATION]...   # on the test part, with what tuning chose
    python benchmarks/animals.py collect                       # tables, pictures and confusion matrices of all of it, in docs/

The test part is not looked at by `tune`. Every method gets four trials: three learning rates of the incremental steps, then, at the best
of them, its distillation at four times the published weight; `finetune`, which has none, a fourth rate.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import yaml
from mbs.folders import home
from PIL import Image

from mbs import ABLATIONS, METHODS, Experiment, Settings, load_run
from mbs.comparison import average_seeds, collect_outcome, collect_series
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
    encoder_factor=(0.1, 0),
)  # the encoder is fine-tuned in the base step and rests afterwards
RATES = (1, 0.3, 0.1)  # lr_factor: the incremental steps' rate over the base step's
WEIGHTS = dict(
    kd="output_weight", mib="output_weight", plop="feature_weight", mbs="output_weight"
)  # what is tried four times as large, too
CHOSEN = Path(__file__).with_name("animals.yaml")


def copy(source, long_side=160):
    "Pictures and masks of `source`, in VOC's layout, no larger than `long_side` pixels, below data/animals."
    target = home("data") / "animals"
    for folder, suffix, way in (
        ("JPEGImages", ".jpg", Image.Resampling.BICUBIC),
        ("SegmentationClassAug", ".png", Image.Resampling.NEAREST),
    ):
        (target / folder).mkdir(parents=True, exist_ok=True)
        for path in sorted((Path(source) / folder).glob(f"*{suffix}")):
            with Image.open(path) as image:
                scale = long_side / max(image.size)
                image.resize([max(1, round(s * scale)) for s in image.size], way).save(
                    target / folder / path.name, **(dict(quality=92) if suffix == ".jpg" else {})
                )
    (target / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    for path in (Path(source) / "ImageSets" / "Segmentation").glob("*.txt"):
        (target / "ImageSets" / "Segmentation" / path.name).write_text(path.read_text())


def settings(method, lr_factor, parts, protocol="3-1", setting="overlapped", seed=0, **more):
    return Settings(
        data=str(home("data") / "animals"),
        protocol=protocol,
        setting=setting,
        classes=CLASSES,
        method=method,
        parts=parts,
        encoder="tf_efficientnet_lite0",
        encoder_options={},
        weights="pretrained",
        decoder=dict(dim=128, heads=2),
        samples=4,
        seed=seed,
        workers=0,
        training=RECIPE | dict(lr_factor=lr_factor),
        **more,
    )


def tried(method, lr_factor, scale):
    "All-class mIoU after the last step on the held-out tenth of the training part."
    name = WEIGHTS.get(method)
    parts = {name: METHODS[method].model_dump()[name] * scale} if scale != 1 else {}
    run = Experiment(settings(method, lr_factor, parts, tuning=0.1, name=f"tune-{method}-{lr_factor}-{scale}")).run()
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
    for method in methods or ("mbs", "kd", "finetune", "mib", "plop"):
        trials = [tried(method, rate, 1) for rate in RATES]
        best = max(trials, key=lambda t: t["all"][-1])["lr_factor"]
        trials.append(tried(method, best, 4) if method in WEIGHTS else tried(method, 0.03, 1))
        best = max(trials, key=lambda t: t["all"][-1])
        chosen = yaml.safe_load(CHOSEN.read_text()) if CHOSEN.is_file() else {}
        chosen[method] = dict(
            lr_factor=best["lr_factor"],
            parts=best["parts"],
            trials=[{k: v for k, v in t.items() if k != "parts"} for t in trials],
        )
        CHOSEN.write_text(yaml.safe_dump(chosen, sort_keys=False, default_flow_style=None, width=200))


def planned(name, protocol, setting, seed):
    "Settings of one run on the test part; `name` is a method or an ablation of `mbs`, which keeps what tuning chose for `mbs`."
    chosen = yaml.safe_load(CHOSEN.read_text())
    if name == "joint":  # as many iterations as all steps together
        s, training = (
            settings("joint", 1, {}, protocol, setting, seed, name=f"{protocol}-joint-s{seed}"),
            RECIPE | dict(lr_factor=1, iterations=RECIPE["iterations"] + 3 * RECIPE["new_iterations"]),
        )
        return Settings.checked(**s.model_dump() | dict(training=training))
    method, parts = (name, {}) if name in METHODS else (ABLATIONS[name]["method"], ABLATIONS[name]["parts"])
    own = chosen[name if name in METHODS else "mbs"]
    return settings(
        method,
        own["lr_factor"],
        own["parts"] | parts,
        protocol,
        setting,
        seed,
        name=f"{protocol}-{setting}-{name}-s{seed}",
    )


def test(protocol, setting, seeds, names):
    for seed in seeds:
        for name in names or ("mbs", "kd", "finetune", "mib", "plop", "joint"):
            run = Experiment(planned(name, protocol, setting, seed)).run()
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
ORDER = [
    "joint",
    "mbs",
    "mib",
    "kd",
    "plop",
    "finetune",
]  # of methods in tables; ablations follow as they stand in `ABLATIONS`


def collected():
    "Finished runs of `test` by protocol and setting, then by name, a run a seed; a joint run has no setting, and belongs to all protocols, whose classes are the same in the same order."
    found = {}
    for path in sorted(home("outputs").glob("*-s[0-9]/run.json")):
        run = load_run(path.parent)
        protocol, setting, name = re.fullmatch(r"(\d-\d)-(?:(overlapped|disjoint)-)?(.+)-s\d", run.folder.name).groups()
        if run.finished and not run.settings.tuning:
            found.setdefault((protocol, setting), {}).setdefault(name, []).append(run)
    return {key: {name: lines[name] for name in [*ORDER, *ABLATIONS] if name in lines} for key, lines in found.items()}


def table(lines, protocol, title):
    "Means and standard deviations over seeds, in percent."
    facts = {name: [collect_outcome(run, protocol) for run in runs] for name, runs in lines.items()}
    return to_markdown(
        Table(
            title,
            ["", "seeds", *COLUMNS.values()],
            [[name, len(f), *(summarise_seeds([one[k] for one in f]) for k in COLUMNS)] for name, f in facts.items()],
        )
    )


def save(figure, path):
    figure.savefig(path, dpi=100, facecolor="white")
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the bytes


def collect(docs=Path(__file__).parents[1] / "docs"):
    "Print the tables, draw the pictures, and keep the confusion matrix after every step of each run, from which all of it can be counted again."
    found = collected()
    joint = {name: runs for (_, setting), lines in found.items() if setting is None for name, runs in lines.items()}
    every = [run for lines in found.values() for runs in lines.values() for run in runs]
    np.savez_compressed(
        docs / "results/animals.npz",
        **{f"{run.folder.name}/{t}": run.confusion(t).counts for run in every for t in range(run.n_steps)},
    )
    for (name, setting), lines in found.items():
        if setting is None:
            continue
        methods = {k: runs for k, runs in lines.items() if k in ORDER}
        protocol = next(iter(methods.values()))[0].protocol
        print(table(joint | methods, protocol, f"{name} {setting}"))
        if name != "3-1" or setting != "overlapped":
            continue
        print(
            table(
                {k: [run for run in runs if run.settings.seed == 0] for k, runs in lines.items() if k in ABLATIONS},
                protocol,
                f"{name} {setting}, seed 0",
            )
        )
        place = docs / "images" / "animals"
        panels = {"all": "all classes so far", "old": "cat, dog, person, background", "new": "horse, sheep, cow"}
        save(
            show_curves(
                {
                    title: {
                        k: np.array([collect_series(run, key, protocol) for run in runs])
                        for k, runs in (joint | methods).items()
                    }
                    for key, title in panels.items()
                }
            ),
            f"{place}-curves.png",
        )
        save(draw_flows(methods["mbs"], protocol), f"{place}-flow-mbs.png")
        for k in ("mbs", "mib", "kd"):
            save(
                show_iou_matrix(
                    average_seeds([run.iou() for run in methods[k]]), methods[k][0].names, protocol.first_step
                ),
                f"{place}-iou-{k}.png",
            )


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("what", choices=["copy", "tune", "test", "collect"])
    words.add_argument("words", nargs="*")
    words.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = words.parse_intermixed_args()
    if given.what == "copy":
        copy(*given.words)
    elif given.what == "tune":
        tune(given.words)
    elif given.what == "collect":
        collect()
    else:
        setting = next((w for w in given.words[1:] if w in ("overlapped", "disjoint")), "overlapped")
        test(given.words[0], setting, given.seeds, [w for w in given.words[1:] if w != setting])
