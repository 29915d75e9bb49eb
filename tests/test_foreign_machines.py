"A machine as others keep it: other kernels, start-up files, long temporary folders, terminals without UTF-8."

import json
import os
import stat
import subprocess
import sys

import pytest

import mbs.notebooks
from mbs.notebooks import _choose_socket_folder
from mbs.run import load_run

SHORT = "name=r protocol=6-2 method=finetune samples=0 training.crop=32 training.batch=2 training.iterations=2".split()


@pytest.fixture
def hostile(tmp_path):
    "An environment in which a careless kernel of Jupyter fails in five ways."
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
    command = [sys.executable, "-m", "mbs", "run", *SHORT]
    done = subprocess.run(command, env=hostile, cwd=tmp_path, capture_output=True, check=False)
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
