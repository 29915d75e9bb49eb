"""Why later steps of few iterations learn little, and what helps: the numbers behind the recipe `own`.

    python benchmarks/own_recipe.py animals [VARIANT]...     # photographs, see animals.py; the held-out tenth
    python benchmarks/own_recipe.py pretrained [VARIANT]...  # 100 scenes of 160 pixels with EfficientNet-Lite0
    python benchmarks/own_recipe.py scratch [VARIANT]...     # 100 scenes of 64 pixels with a small ViT from scratch

Every variant is one run of `mbs`; variants of one data set share the base step. Results: docs/results/own.md.
"""

import argparse

import animals
import numpy as np
from PIL import Image

from mbs import Experiment, Settings, describe_folder
from mbs.folders import home
from mbs.scenes import draw_scene

VARIANTS = {  # fields of `Recipe`; longer: factor on later iterations; weight_by_classes: λ = 25 · classes / 21
    "0.1": dict(lr_factor=0.1),
    "0.3": dict(lr_factor=0.3),
    "1": dict(lr_factor=1),
    "0.1, tokens 10": dict(lr_factor=0.1, token_factor=10),
    "0.3, tokens 10": dict(lr_factor=0.3, token_factor=10),
    "0.3, twice as long": dict(lr_factor=0.3, longer=2),
    "1, weight by classes": dict(lr_factor=1, weight_by_classes=True),
}
CLASSES = ["ball", "leaf", "mushroom", "fish"]
COMMON = dict(optimizer="adamw", lr=1e-3, weight_decay=0.01, schedule="cosine", scale=(0.75, 1.5))
PRETRAINED = dict(encoder="tf_efficientnet_lite0", weights="pretrained", decoder=dict(dim=128, heads=2))
FOLDERS = {  # side of a scene, network, recipe
    "pretrained": (160, PRETRAINED, dict(crop=112, batch=8, iterations=400, encoder_factor=(0.1, 0))),
    "scratch": (64, {}, dict(crop=64, batch=16, iterations=600)),
}


def write_folder(side, n=100):
    "Write `n` scenes with four of their eight kinds as classes, unless they are there."
    folder = home("data") / f"own-{side}"
    if (folder / "dataset.yaml").is_file():
        return folder
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for k in range(n):
        photo, mask = draw_scene(np.random.default_rng(k), side)
        Image.fromarray(photo).save(folder / f"images/s{k:03d}.jpg", quality=95)
        Image.fromarray(np.where(mask > len(CLASSES), 0, mask).astype(np.uint8)).save(folder / f"masks/s{k:03d}.png")
    describe_folder(folder, CLASSES, test=0.2)
    return folder


def plan_run(data, variant):
    "Make the settings of one run."
    chosen = dict(VARIANTS[variant])
    longer = chosen.pop("longer", 1)
    n_classes = len(animals.CLASSES if data == "animals" else CLASSES)
    parts = dict(output_weight=25 * n_classes / 21) if chosen.pop("weight_by_classes", False) else {}
    name = f"own-{data}-{variant}".replace(", ", "-").replace(" ", "-")
    if data == "animals":
        settings = animals.make_settings("mbs", chosen["lr_factor"], parts, tuning=0.1, name=name)
        training = settings.training | chosen | dict(new_iterations=animals.RECIPE["new_iterations"] * longer)
        return Settings.checked(**settings.model_dump() | dict(training=training))
    side, network, recipe = FOLDERS[data]
    return Settings(
        name=name,
        data=str(write_folder(side)),
        protocol="2-1",
        parts=parts,
        workers=0,
        samples=0,
        recipe="clean",
        training=COMMON | recipe | dict(new_iterations=200 * longer) | chosen,
        **network,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["animals", *FOLDERS])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"some of {', '.join(VARIANTS)}")
    given = parser.parse_args()
    for variant in given.variants or VARIANTS:
        run = Experiment(plan_run(given.data, variant)).run()
        after = run.metrics()["scores"]
        print(f"{variant:24}", {k: round(100 * after[k], 1) for k in ("old", "new", "all")}, flush=True)
