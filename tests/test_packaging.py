"sdist and wheel are complete: the run notebooks are inside, the requirements are those of settings.ini, and importing is quick."
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEPT = ["mbs", "nbs", "pyproject.toml", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "(sdist, wheel), built from a copy of the tree; the wheel is built from the sdist."
    tree = tmp_path_factory.mktemp("tree")
    for item in KEPT:
        if (ROOT / item).is_dir(): shutil.copytree(ROOT / item, tree / item, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else: shutil.copy(ROOT / item, tree)
    (tree / "nbs/runs/.ipynb_checkpoints").mkdir()  # what Jupyter leaves behind must stay outside
    shutil.copy(tree / "nbs/runs/train.ipynb", tree / "nbs/runs/.ipynb_checkpoints/train-checkpoint.ipynb")
    subprocess.run([sys.executable, "-m", "build", "-o", tree / "dist", tree], check=True, capture_output=True)
    return next((tree / "dist").glob("*.tar.gz")), next((tree / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "The wheel's content in a folder of its own, dependencies from the environment."
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, built[1]], check=True, capture_output=True)
    return folder


def python(code, folder):
    "Output of a fresh interpreter that sees the installed wheel first."
    environment = {k: v for k, v in os.environ.items() if k != "MBS_HOME"}
    return subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"], cwd=folder, env=environment,
                          capture_output=True, text=True, check=True).stdout.strip()


def test_data_files(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as z: inside = set(z.namelist())
    runs = {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs/runs").rglob("*") if p.is_file() and ".ipynb_checkpoints" not in p.parts}
    assert {n for n in inside if n.startswith("mbs/runs/")} == {f"mbs/{r}" for r in runs} and "runs/train.ipynb" in runs
    assert {"mbs/cli.py", "mbs/__main__.py"} <= inside
    trained = {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs/trained").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {n for n in inside if n.startswith("mbs/trained/")} == {f"mbs/{t}" for t in trained} and "trained/mbs/step-03/model.safetensors" in trained
    with tarfile.open(sdist) as t: names = {n.split("/", 1)[-1] for n in t.getnames()}
    assert {"settings.ini", "LICENSE"} | {f"nbs/{r}" for r in runs} <= names


def test_requirements(built):
    settings = ConfigParser(interpolation=None, default_section="")
    settings.read(ROOT / "settings.ini")
    with zipfile.ZipFile(built[1]) as z: metadata = Parser().parsestr(z.read(next(n for n in z.namelist() if n.endswith("METADATA"))).decode())
    required = {r.replace(" ", "").replace("'", '"') for r in metadata.get_all("Requires-Dist")}
    extras = {f'{r};extra=="{name}"' for name, text in settings["extras"].items() for r in text.split()}
    assert required == set(settings["DEFAULT"]["requirements"].split()) | extras
    assert set(metadata.get_all("Provides-Extra")) == set(settings["extras"])


def test_installed_wheel_works(installed):
    where, notebook = python("import mbs; from mbs.notebooks import runs_folder; print(mbs.__file__); print(runs_folder() / 'train.ipynb')", installed).splitlines()
    assert where.startswith(str(installed)) and notebook.startswith(str(installed)) and Path(notebook).is_file()
    out = subprocess.run([sys.executable, "-m", "mbs", "--help"], cwd=installed, capture_output=True, text=True, check=True).stdout
    assert "demo" in out and "run" in out


def test_import_is_quick_and_light(installed):
    seconds = [float(python("import time; t = time.perf_counter(); import mbs; print(time.perf_counter() - t)", installed)) for _ in range(3)]
    assert min(seconds) < .5
    assert python("import mbs; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])", installed) == "[]"


def test_public_names(installed):
    assert python("import mbs; print([n for n in mbs.__all__ if not hasattr(mbs, n)])", installed) == "[]"
