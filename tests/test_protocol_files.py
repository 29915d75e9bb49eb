"Every published protocol file runs, one iteration a step, on generated data in the layouts of VOC and ADE20K."

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mbs.batch import prepare_experiment, run_notebook
from mbs.experiment import Experiment
from mbs.folders import find_runs_folder
from mbs.parameter_files import read_parameters
from mbs.protocol import SETTINGS, SPLITS
from mbs.run import load_run
from mbs.settings import Settings

FILES = sorted({p.stem for p in (find_runs_folder() / "protocols").glob("*.yaml")} - {"demo", "voc-animals"})
SMALL = dict(
    encoder="vit_tiny_patch16_224",
    encoder_options=dict(patch_size=8, embed_dim=16, depth=1, num_heads=1),
    weights="none",
    decoder=dict(depth=1),
    samples=0,
    workers=0,
)
ONE = dict(replace=True, crop=16, batch=2, iterations=1, test_batch=64)


def write_pairs(root, images, masks, part, n_classes):
    "Write for each class a picture of it alone and one with the class before it, 16 × 20 pixels; return the ids."
    ids = []
    for folder in (images, masks):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for c in range(1, n_classes + 1):
        for k, other in enumerate((0, c - 1)):
            rng, mask = np.random.default_rng([c, k]), np.zeros((16, 20), np.uint8)
            mask[2:9, 3:11], mask[9:14, 8:18] = c, other
            pixels = np.clip(mask[..., None] * [7, 3, 11] % 256 + rng.normal(0, 9, (16, 20, 3)), 0, 255).astype(
                np.uint8
            )
            ids.append(f"{part}_{c:03d}_{k}")
            Image.fromarray(pixels).save(root / images / f"{ids[-1]}.jpg")
            Image.fromarray(mask).save(root / masks / f"{ids[-1]}.png")
    return ids


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Write generated data where `mbs data` puts the real data."
    root = tmp_path_factory.mktemp("home")
    voc, ade = root / "data" / "voc", root / "data" / "ade"
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    for part, name in (("train", "trainaug"), ("val", "val")):
        ids = write_pairs(voc, "JPEGImages", "SegmentationClassAug", part, 20)
        (voc / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(ids))
    for part in ("training", "validation"):
        write_pairs(ade, f"images/{part}", f"annotations/{part}", part, 150)
    (ade / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(f"{c}\t.1\t1\t1\t0\tthing {c}, item\n" for c in range(1, 151))
    )
    return root


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(home))


def test_every_published_split_has_a_file():
    want = {
        f"{data}-{split}" + (f"-{setting}" if split != "offline" else "")
        for data, splits in SPLITS.items()
        for split in splits
        if "_" not in split
        for setting in SETTINGS[:2]
    }
    assert set(FILES) == want and len(FILES) == 30


@pytest.mark.parametrize("name", FILES)
def test_protocol_file(name, home):
    "Parameters are as published; every step sees pictures, grows, learns one iteration and is tested."
    values = read_parameters(name)
    assert (values["encoder"], values["weights"], values["recipe"], values["training"]) == (
        "vit_base_patch16_384",
        "pretrained",
        "paper",
        {"replace": True},
    )
    assert name == "-".join(
        [values["data"], values["protocol"], *([] if values["protocol"] == "offline" else [values["setting"]])]
    )
    run = Experiment(Settings.checked(**values | SMALL | dict(training=ONE, share_base=False)), home / "outputs").run()
    n = 20 if values["data"] == "voc" else 150
    assert run.finished and run.protocol.dataset == values["data"] and run.confusion().n == n + 1
    recipe = run.card.recipe
    assert (recipe.epochs, recipe.lr_factor) == ((32, 0.1) if n == 20 else (64, 0.5))
    assert run.card.parts.output_weight == (25 if n == 20 else 50)
    assert (
        run.confusion().counts[0].sum() == 0 if n == 150 else run.confusion().counts[0].sum() > 0
    )  # the test of ADE20K leaves unlabelled pixels out


def test_through_papermill_as_documented(home, tmp_path):
    "The documented papermill command runs a file with changed parameters; `mbs run` gives the same run."
    import papermill

    file = find_runs_folder() / "protocols" / "voc-19-1-disjoint.yaml"
    parameters = read_parameters(file) | SMALL | dict(training=ONE, seed=3)
    papermill.execute_notebook(
        str(find_runs_folder() / "train.ipynb"),
        str(tmp_path / "out.ipynb"),
        parameters,
        kernel_name="python3",
        progress_bar=False,
    )
    run = load_run(home / "outputs" / "voc-19-1-disjoint-mbs-s3")
    assert run.finished and Path(tmp_path / "out.ipynb").is_file()
    assert run_notebook(prepare_experiment(Settings(**parameters))).folder == run.folder
    assert json.loads((run.folder / "run.json").read_text())["weights"] == {"source": "random initialisation"}


def test_clean_is_one_flag(home):
    "`recipe=clean` replaces the published recipe as a whole."
    settings = Settings.checked(**read_parameters("voc-15-1-overlapped") | SMALL | dict(recipe="clean"))
    recipe = Experiment(settings, home / "outputs").setup.recipe
    assert (
        recipe.selection,
        recipe.test,
        recipe.normalisation,
        recipe.crop,
        recipe.batch,
        recipe.epochs,
        recipe.lr,
    ) == ("last", "whole", "weights", 512, 16, 32, 1e-3)
