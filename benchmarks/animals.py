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
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import yaml
from PIL import Image

from mbs import ABLATIONS, METHODS, Experiment, Settings, find_runs
from mbs.layouts import home
from mbs.report import average, curves, flows, groups, label_table, score_table, shift_table
from mbs.tables import markdown
from mbs.viz import show_iou_matrix

CLASSES = ["cat", "dog", "person", "horse", "sheep", "cow"]
RECIPE = dict(crop=112, batch=8, iterations=1000, new_iterations=240, scale=(.75, 1.5), optimizer="adamw", lr=1e-3, weight_decay=.01, schedule="cosine",
              encoder_factor=(.1, 0))  # the encoder is fine-tuned in the base step and rests afterwards
RATES = (1, .3, .1)  # lr_factor: the incremental steps' rate over the base step's
WEIGHTS = dict(kd="output_weight", mib="output_weight", plop="feature_weight", mbs="output_weight")  # what is tried four times as large, too
CHOSEN = Path(__file__).with_name("animals.yaml")


def copy(source, long_side=160):
    "Pictures and masks of `source`, in VOC's layout, no larger than `long_side` pixels, below data/animals."
    target = home("data") / "animals"
    for folder, suffix, way in (("JPEGImages", ".jpg", Image.Resampling.BICUBIC), ("SegmentationClassAug", ".png", Image.Resampling.NEAREST)):
        (target / folder).mkdir(parents=True, exist_ok=True)
        for path in sorted((Path(source) / folder).glob(f"*{suffix}")):
            with Image.open(path) as image:
                scale = long_side / max(image.size)
                image.resize([max(1, round(s * scale)) for s in image.size], way).save(target / folder / path.name, **(dict(quality=92) if suffix == ".jpg" else {}))
    (target / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    for path in (Path(source) / "ImageSets" / "Segmentation").glob("*.txt"): (target / "ImageSets" / "Segmentation" / path.name).write_text(path.read_text())


def settings(method, lr_factor, parts, protocol="3-1", setting="overlapped", seed=0, **more):
    return Settings(data=str(home("data") / "animals"), protocol=protocol, setting=setting, classes=CLASSES, method=method, parts=parts, encoder="tf_efficientnet_lite0",
                    encoder_options={}, weights="pretrained", decoder=dict(dim=128, heads=2), samples=4, seed=seed, workers=0, training=RECIPE | dict(lr_factor=lr_factor), **more)


def tried(method, lr_factor, scale):
    "All-class mIoU after the last step on the held-out tenth of the training part."
    name = WEIGHTS.get(method)
    parts = {name: METHODS[method].model_dump()[name] * scale} if scale != 1 else {}
    run = Experiment(settings(method, lr_factor, parts, tuning=.1, name=f"tune-{method}-{lr_factor}-{scale}")).run()
    scores = [run.metrics(t)["scores"] for t in range(run.n_steps)]
    trial = dict(lr_factor=lr_factor, scale=scale, all=[round(100 * s["all"], 1) for s in scores], old=round(100 * scores[-1]["old"], 1), new=round(100 * scores[-1]["new"], 1))
    print(method, json.dumps(trial), flush=True)
    return trial | dict(parts=parts)


def tune(methods):
    for method in methods or ("mbs", "kd", "finetune", "mib", "plop"):
        trials = [tried(method, rate, 1) for rate in RATES]
        best = max(trials, key=lambda t: t["all"][-1])["lr_factor"]
        trials.append(tried(method, best, 4) if method in WEIGHTS else tried(method, .03, 1))
        best = max(trials, key=lambda t: t["all"][-1])
        chosen = yaml.safe_load(CHOSEN.read_text()) if CHOSEN.is_file() else {}
        chosen[method] = dict(lr_factor=best["lr_factor"], parts=best["parts"], trials=[{k: v for k, v in t.items() if k != "parts"} for t in trials])
        CHOSEN.write_text(yaml.safe_dump(chosen, sort_keys=False, default_flow_style=None, width=200))


def planned(name, protocol, setting, seed):
    "Settings of one run on the test part; `name` is a method or an ablation of `mbs`, which keeps what tuning chose for `mbs`."
    chosen = yaml.safe_load(CHOSEN.read_text())
    if name == "joint":  # as many iterations as all steps together
        s, training = settings("joint", 1, {}, protocol, setting, seed, name=f"{protocol}-joint-s{seed}"), RECIPE | dict(lr_factor=1, iterations=RECIPE["iterations"] + 3 * RECIPE["new_iterations"])
        return Settings.checked(**s.model_dump() | dict(training=training))
    method, parts = (name, {}) if name in METHODS else (ABLATIONS[name]["method"], ABLATIONS[name]["parts"])
    own = chosen[name if name in METHODS else "mbs"]
    return settings(method, own["lr_factor"], own["parts"] | parts, protocol, setting, seed, name=f"{protocol}-{setting}-{name}-s{seed}")


def test(protocol, setting, seeds, names):
    for seed in seeds:
        for name in names or ("mbs", "kd", "finetune", "mib", "plop", "joint"):
            run = Experiment(planned(name, protocol, setting, seed)).run()
            last = run.metrics()
            print(f"{run.folder.name:34}", [round(100 * run.metrics(t)["scores"]["all"], 1) for t in range(run.n_steps)], {k: round(100 * last["scores"][k], 1) for k in ("old", "new", "all_fg")},
                  {k: round(100 * v, 1) for k, v in last["shift"].items()}, flush=True)


def save(figure, path):
    figure.savefig(path, dpi=100, facecolor="white")
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the bytes


def collect(docs=Path(__file__).parents[1] / "docs"):
    "Tables and pictures of all finished runs of `test`, and the confusion matrix after every step of each, from which all of it can be counted again."
    runs = [run for run in find_runs([home("outputs")])[0] if run.finished and not run.settings.tuning]
    np.savez_compressed(docs / "results/animals.npz", **{f"{run.folder.name}/{t}": run.confusion(t).counts for run in runs for t in range(run.n_steps)})
    own = {planned(name, "3-1", "overlapped", seed).name for name in ABLATIONS if name not in METHODS for seed in range(9)}
    ablated = [run for run in runs if run.folder.name in own or (run.settings.method in ("mbs", "kd") and run.settings.protocol_setting == "overlapped" and run.settings.protocol == "3-1")]
    methods = groups([run for run in runs if run.folder.name not in own])
    parts = [markdown(table) for group in methods for table in (score_table(group), shift_table(group), label_table(group)) if table]
    parts += [markdown(table) for group in groups(ablated) for table in (score_table(group), shift_table(group), label_table(group)) if table]
    (docs / "results/animals-tables.txt").write_text("\n".join(parts))
    for group in methods:
        place = docs / "images" / f"animals-{group.protocol.name}-{group.first.settings.setting}"
        save(curves(group), f"{place}-curves.png")
        if group.protocol.name == "3-1" and group.first.settings.setting == "overlapped":
            for line in group.lines.values():
                save(flows(line, group.protocol), f"{place}-{line[0].settings.method}-flow.png")
                save(show_iou_matrix(average([run.iou() for run in line]), group.names, group.protocol.first_step), f"{place}-{line[0].settings.method}-iou.png")


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("what", choices=["copy", "tune", "test", "collect"])
    words.add_argument("words", nargs="*")
    words.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = words.parse_intermixed_args()
    if given.what == "copy": copy(*given.words)
    elif given.what == "tune": tune(given.words)
    elif given.what == "collect": collect()
    else:
        setting = next((w for w in given.words[1:] if w in ("overlapped", "disjoint")), "overlapped")
        test(given.words[0], setting, given.seeds, [w for w in given.words[1:] if w != setting])
