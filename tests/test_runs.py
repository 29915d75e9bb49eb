"Complete runs: the command line on real and generated data, both recipes, and the claim of the demo."

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure

from mbs.experiment import Experiment
from mbs.folders import find_runs_folder
from mbs.run import load_run
from mbs.settings import Settings

VOC = Path(os.environ.get("MBS_VOC", Path(__file__).parents[2] / "shared/data/VOCdevkit/VOC2012"))


def mbs(home, *words, timeout=900):
    "Run the command in its own process and return its output."
    command = [sys.executable, "-m", "mbs", "--home", str(home), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | {"COLUMNS": "160"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_paper_recipe_selects_on_the_test_images(tmp_path):
    "The peculiarities of the released recipe are used: selection, centre crops, ImageNet statistics."
    short = dict(replace=True, crop=48, batch=8, iterations=4)
    run = Experiment(Settings(name="paper", recipe="paper", protocol="6-2", training=short), tmp_path).run()
    recipe = run.card.recipe
    assert (recipe.selection, recipe.test) == ("test", "crop")
    assert (recipe.normalisation, recipe.lr_factor) == ("imagenet", 0.1)
    assert run.card.normalisation.mean[0] == 0.485 and run.finished


@pytest.mark.skipif(not VOC.is_dir(), reason=f"no real VOC part at {VOC}; set MBS_VOC to a VOC2012 folder")
def test_voc_from_the_command_line(tmp_path):
    "Real photos, a permuted subset of classes and real weights, on a tenth of the pictures, a few iterations a step."
    part = tmp_path / "part"
    lists = part / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for folder in ("JPEGImages", "SegmentationClassAug"):
        (part / folder).symlink_to(VOC / folder)
    for name in ("trainaug.txt", "val.txt"):
        ids = (VOC / "ImageSets" / "Segmentation" / name).read_text().split()
        (lists / name).write_text("\n".join(ids[::10]))
    mbs(
        tmp_path,
        "run",
        "voc-animals",
        f"data={part}",
        "name=voc",
        "training.crop=64",
        "training.batch=4",
        "training.iterations=3",
        "training.new_iterations=2",
        "samples=2",
    )
    run = load_run(tmp_path / "outputs" / "voc")
    assert run.finished and run.names == ["background", "cat", "dog", "person", "horse", "sheep", "cow"]
    assert run.card.weights.sha256.startswith("57934424")
    assert run.card.normalisation == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert run.confusion().counts[4:].sum() > 0 and (tmp_path / "outputs/voc/train.ipynb").is_file()
    image = run.samples()[0].photo
    assert run.predict(image).shape == image.shape[:2]


def test_relative_paths_and_names_of_ablations(tmp_path, monkeypatch):
    "A relative data folder means the same to command and notebook; runs that differ in a part differ in name."
    from mbs.scenes import write_scenes

    write_scenes(tmp_path / "mine", 30, 6, size=32)
    monkeypatch.chdir(tmp_path)
    short = [
        "data=mine",
        "protocol=6-2",
        "training.crop=32",
        "training.batch=4",
        "training.iterations=2",
        "training.optimizer=sgd",
    ]
    mbs("home", "run", *short, "samples=1", "parts.orthogonality=false")
    mbs("home", "run", *short, "samples=1")
    assert {p.name for p in (tmp_path / "home/outputs").iterdir()} == {
        "mine-6-2-overlapped-mbs-s0",
        "mine-6-2-overlapped-mbs-orthogonality=False-s0",
    }


@pytest.mark.timeout(1800)
def test_demo_shows_the_claim(tmp_path):
    "In one seed of the demo, mbs is clearly above kd, kd above finetune, and the base step is at least 0.6."
    out = mbs(tmp_path, "demo", timeout=1500)
    runs = {m: load_run(tmp_path / "outputs" / f"demo-{m}-s0") for m in ("finetune", "kd", "mbs")}
    last = {m: run.metrics()["scores"]["all"] for m, run in runs.items()}
    assert last["mbs"] > last["kd"] + 0.1 and last["kd"] > last["finetune"] + 0.03, last
    assert runs["mbs"].metrics(0)["scores"]["all"] > 0.6
    assert (
        runs["finetune"].metrics()["shift"]["old->background"]
        > runs["kd"].metrics()["shift"]["old->background"]
        > runs["mbs"].metrics()["shift"]["old->background"]
    )
    assert {runs[m].metrics(0).get("base_from") for m in ("kd", "mbs")} == {"demo-finetune-s0"}, (
        "the base step was trained more than once"
    )
    assert "old → background" in out and (tmp_path / "outputs/demo/comparison.png").stat().st_size > 20_000
    assert "| mbs | 1 |" in (tmp_path / "outputs/demo/summary.md").read_text()
    notebook = json.loads((tmp_path / "outputs/demo-mbs-s0/train.ipynb").read_text())
    pictures = [o for c in notebook["cells"] for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 9 and np.ptp([len(p["data"]["image/png"]) for p in pictures]) > 0
    texts = [str(o.get("text", o.get("data"))) for c in notebook["cells"] for o in c.get("outputs", [])]
    assert not [text for text in texts if re.search(r"\bnan\b", text)]


@pytest.mark.parametrize("protocol, samples, n_figures", [("6-2", 27, 12), ("offline", 0, 7)])
def test_the_notebook_shows_the_result_first(tmp_path, monkeypatch, capsys, protocol, samples, n_figures):
    "Every sample is drawn, nothing is missing from a run of one step without samples, and no number is `nan`."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    tiny = dict(encoder_options=dict(patch_size=8, embed_dim=16, depth=1, num_heads=1), decoder=dict(depth=1))
    training = dict(crop=32, batch=4, iterations=2, optimizer="adamw")
    shown, headings, galleries = [], [], []
    monkeypatch.setattr("IPython.display.display", lambda *things: shown.extend(things))
    monkeypatch.setattr("mbs.viz.show_gallery", lambda pictures, names, first: galleries.append((first, len(pictures))))
    scope = {}
    for cell in nbformat.read(find_runs_folder() / "train.ipynb", 4).cells:
        if cell.cell_type == "markdown":
            headings += re.findall(r"^##+ (.*)", cell.source, re.MULTILINE)
            continue
        *body, last = ast.parse(cell.source).body
        exec(compile(ast.Module([*body], []), "cell", "exec"), scope)
        is_value = isinstance(last, ast.Expr)
        value = eval(ast.unparse(last), scope) if is_value else exec(ast.unparse(last), scope)
        shown += [] if value is None else [value]
        if "parameters" in cell.metadata.get("tags", []):
            scenes = dict(replace=True, n_train=40, n_test=30, size=32)
            scope |= dict(name="run", protocol=protocol, samples=samples, training=training, scenes=scenes) | tiny
    assert headings[:3] == ["Training", "Result", "What went wrong"]
    assert galleries == ([(0, 24), (24, 3)] if samples else [])
    figures = [thing for thing in shown if isinstance(thing, Figure)]
    assert len(figures) == n_figures
    tables = [thing.data for thing in shown if not isinstance(thing, Figure) and hasattr(thing, "data")]
    assert "<h3>Mean IoU</h3>" in tables[0] and "<h3>Time and memory</h3>" in tables[-1]
    text = "".join(tables) + capsys.readouterr().out
    assert not re.search(r"\bnan\b", text, re.I) and "{" not in text
