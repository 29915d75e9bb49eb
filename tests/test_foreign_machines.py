"A machine as others keep it: other kernels, start-up files, files called like libraries, terminals without UTF-8."

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import mbs.notebooks
from mbs.launch import _make_program
from mbs.lifeline import make_module_command, start_child
from mbs.notebooks import RunFailed, _choose_socket_folder, execute_notebook
from mbs.run import load_run

SHORT = "name=r protocol=6-2 method=finetune samples=0 training.crop=32 training.batch=2 training.iterations=2".split()


PACKAGE = Path(mbs.__file__).parent
COMMAND = Path(sys.executable).with_name("mbs")


@pytest.fixture
def hostile(tmp_path, put_namesakes):
    "An environment in which a careless kernel of Jupyter fails in many ways."
    put_namesakes(tmp_path)
    kernel = tmp_path / "jupyter/kernels/python3"
    kernel.mkdir(parents=True)
    broken = dict(argv=["/bin/false", "{connection_file}"], display_name="Python 3", language="python")
    (kernel / "kernel.json").write_text(json.dumps(broken))
    startup = tmp_path / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00-first.py").write_text("import sys; sys.modules['numpy'] = None\n")
    config = "c.InteractiveShellApp.exec_lines = ['raise SystemExit(7)']\n"
    (tmp_path / "ipython/profile_default/ipython_config.py").write_text(config)
    long = tmp_path / ("long" * 25)
    long.mkdir()
    environment = dict(JUPYTER_PATH=str(tmp_path / "jupyter"), IPYTHONDIR=str(tmp_path / "ipython"), TMPDIR=str(long))
    return os.environ | environment | dict(PYTHONIOENCODING="latin-1", MBS_HOME=str(tmp_path / "home"))


def test_a_run_does_not_inherit_the_users_world(hostile, tmp_path):
    done = subprocess.run([COMMAND, "run", *SHORT], env=hostile, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_run(tmp_path / "home/outputs/r").finished
    shown = done.stdout.decode("latin-1")
    assert "?" in shown and "Traceback" not in shown + done.stderr.decode("latin-1")


def test_a_short_folder_is_found_for_sockets(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp")
    assert _choose_socket_folder() is None
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/" + 90 * "x")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/" + 90 * "y")
    assert _choose_socket_folder() == "/tmp" and stat.S_ISDIR(os.stat("/tmp").st_mode)
    monkeypatch.setattr(mbs.notebooks.os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=r"TMPDIR .* is too long for the sockets of a kernel"):
        _choose_socket_folder()


@pytest.mark.parametrize("has_safe_path", {False, sys.version_info >= (3, 11)})
def test_a_module_is_that_of_the_installation(tmp_path, put_namesakes, has_safe_path):
    put_namesakes(tmp_path)
    (tmp_path / "tabnanny.py").write_text("raise SystemExit(7)")
    command = make_module_command("tabnanny", "-v", "mbs.py", has_safe_path=has_safe_path)
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "'mbs.py': Clean bill of health." in said


def test_python_is_started_in_one_way_only():
    "No module writes its own command of Python, which would find modules in the current folder."
    texts = {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    counts = {name: text.count("sys.executable") for name, text in texts.items() if "sys.executable" in text}
    servers = {"cli", "curves"}  # of notebooks and of curves
    own = dict(lifeline=1, launch=1, slurm=3)  # the second: a user's program; the third: isolated, then with -P
    assert {name: n for name, n in counts.items() if name not in servers} == own


def execute_cells(folder, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in ("a = 0", *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "own.ipynb")
    execute_notebook(folder / "own.ipynb", folder / "out.ipynb", dict(a=1))


def test_modules_beside_a_users_notebook_replace_none(tmp_path, monkeypatch, put_namesakes):
    "A user's notebook may import files of the current folder; the notebooks of the package may not."
    put_namesakes(tmp_path)
    (tmp_path / "helper_of_mine.py").write_text("answer = 42")
    monkeypatch.chdir(tmp_path)
    execute_cells(tmp_path, "import random, mbs, helper_of_mine", "assert helper_of_mine.answer == 42 and mbs.__all__")
    monkeypatch.setattr(mbs.notebooks, "find_runs_folder", lambda: tmp_path)
    with pytest.raises(RunFailed, match="No module named 'helper_of_mine'"):
        execute_cells(tmp_path, "import random, mbs", "import helper_of_mine")


def test_a_users_program_finds_its_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("print('found')")
    (tmp_path / "program.py").write_text("import neighbour")
    command, environment = _make_program([str(tmp_path / "program.py")])
    assert start_child(command, environment).communicate()[0] == "found\n"
