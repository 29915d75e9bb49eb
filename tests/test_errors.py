"Invalid input gives one clear sentence and exit code 2, and leaves nothing half-written."

import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mbs.cli import app
from mbs.scenes import write_scenes


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "s", 12, 6, size=32)


def refused(*words):
    "Return the sentence with which `mbs run` refuses `words`."
    result = CliRunner().invoke(app, ["run", *words])
    assert result.exit_code == 2, result.output
    message = result.stderr.strip()
    assert message.startswith("mbs: ") and "Traceback" not in message and "\n" not in message
    return message


CHECK = """
import sys
from typer.testing import CliRunner
from mbs.cli import app
for word in sys.argv[1:]:
    result = CliRunner().invoke(app, ["run", "demo", *word.split()])
    assert result.exit_code == 2, result.output
    print(result.stderr.strip())
libraries = [name for name in ("torch", "timm", "accelerate", "matplotlib") if name in sys.modules]
print("loaded", libraries)
"""


def test_parameters_are_refused_before_pytorch_is_loaded(home):
    "A misspelt name or a wrong value of any kind that needs no data, in one process."
    wrong = {
        "methd=3": "parameter 'methd' is not known: did you mean 'method'?",
        "method=mbz": "method 'mbz' is not known: expected one of finetune, joint, kd",
        "protocol=5-x": "protocol '5-x' is not known",
        "seed=a": "parameter 'seed' cannot be 'a'",
        "training.epoch=3": "parameter 'epoch' is not known: did you mean 'epochs'?",
        "parts.tau=1": "parameter 'tau' is not known",
        "setting=joined": "setting 'joined' is not known",
        "method=kd parts.head=sigmoid": "parts.head=sigmoid does not go with",
        "memory.siez=3": "parameter 'siez' is not known: expected one of size",
        "recipe=fast": "recipe 'fast' is not known: expected one of clean, paper, own",
        "scenes.n=1": "scenes option 'n' is not known: expected one of n_train",
    }
    process = subprocess.run([sys.executable, "-c", CHECK, *wrong], capture_output=True, text=True)
    *said, loaded = process.stdout.splitlines()
    assert len(said) == len(wrong), process.stderr
    for line, expected in zip(said, wrong.values()):
        assert line.startswith(f"mbs: {expected}"), line
    assert loaded == "loaded []"


@pytest.mark.parametrize(
    "words,says",
    [
        (["metod=kd"], "'metod' is not known: did you mean 'method'"),
        (["training.epoch=3"], "'epoch' is not known: did you mean 'epochs'"),
        (["training.lr=-1"], "'lr' cannot be -1"),
        (["parts.tau=0.5"], "'tau' is not known"),
        (["parts.threshold=2"], "'threshold' cannot be 2"),
        (["method=magic"], "expected one of finetune, joint, kd, m"),
        (["protocol=9-1"], "cannot split 8 classes"),
        (["protocol=0-1"], "cannot split 8 classes"),
        (["protocol=5-0"], "cannot split 8 classes"),
        (["protocol=five"], "expected 'A-B'"),
        (["setting=joined"], "expected one of overlapped, disjoint"),
        (["classes=[unicorn]"], "class 'unicorn' is not known"),
        (["encoder=resnet9000"], "expected a network of timm"),
        (["encoder_options.depht=2"], "do not suit"),
        (["decoder.width=2"], "decoder option 'width' is not known"),
        (["weights=nowhere.safetensors"], "weight file nowhere.safetensors does not exist"),
        (["data=nowhere"], "expected 'scenes', 'voc', 'ade' or a folder"),
        (["name=../outside"], "'name' cannot be"),
        (["seed"], "parameter file seed does not exist"),
        (["seed=1", "method"], "'method' is not a parameter: expected name=value"),
    ],
)
def test_parameters(home, words, says):
    assert says in refused(*words)
    assert not (home / "outputs").exists()


def broken(scenes, tmp_path, change):
    "Copy the scenes and change one pair."
    root = tmp_path / "broken"
    shutil.copytree(scenes, root)
    change(root / "JPEGImages" / "train_00003.png", root / "SegmentationClassAug" / "train_00003.png")
    return root


CHANGES = {
    "is missing": lambda image, mask: mask.unlink(),
    "image": lambda image, mask: image.unlink(),
    "cannot be read": lambda image, mask: image.write_bytes(b"no picture"),
    "its end is missing": lambda image, mask: image.write_bytes(image.read_bytes()[:-200]),
    "mask": lambda image, mask: mask.write_bytes(mask.read_bytes()[:60]),
    "holds [77], which are no class ids": lambda image, mask: Image.fromarray(np.full((32, 32), 77, np.uint8)).save(
        mask
    ),
    "differ in size, 32×32 and 32×16": lambda image, mask: Image.fromarray(np.zeros((16, 32), np.uint8)).save(mask),
    "has mode RGB": lambda image, mask: Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(mask),
}


@pytest.mark.parametrize("says", CHANGES)
def test_pairs(home, scenes, tmp_path, says):
    root = broken(scenes, tmp_path, CHANGES[says])
    message = refused(f"data={root}")
    assert says in message and "train_00003" in message
    assert not (home / "outputs").exists()


def test_no_list(home, scenes, tmp_path):
    root = tmp_path / "empty"
    root.mkdir()
    assert "is no data set: expected the folders of VOC" in refused(f"data={root}")


def test_outputs_cannot_be_written(home, scenes):
    home.mkdir()
    (home / "outputs").write_text("a file where the folder should be")
    assert "cannot be written" in refused(f"data={scenes}")
    assert (home / "outputs").read_text() == "a file where the folder should be"


def test_one_invalid_run_stops_the_plan(home):
    "All runs are checked before the first one writes anything."
    result = CliRunner().invoke(app, ["demo", "--methods", "finetune,magic"])
    assert result.exit_code == 2 and "'magic' is not known" in result.stderr
    assert not (home / "outputs").exists()


def test_step_without_images(home, tmp_path):
    "Two scenes never hold all eight classes, so a one-class step has no image."
    root = write_scenes(tmp_path / "few", 1, 1, size=32)
    assert "sees no training image: expected at least one that holds" in refused(f"data={root}", "protocol=1-1")
    assert not (home / "outputs").exists()


def test_unknown_parameter_in_the_notebook(home, tmp_path):
    "papermill only warns about unknown names; the notebook refuses them before anything runs."
    import papermill

    from mbs.folders import find_runs_folder

    with pytest.raises(papermill.PapermillExecutionError, match="'metod' is not known"):
        papermill.execute_notebook(
            str(find_runs_folder() / "train.ipynb"),
            str(tmp_path / "out.ipynb"),
            dict(metod="kd"),
            kernel_name="python3",
            progress_bar=False,
        )
    assert not (home / "outputs").exists()
