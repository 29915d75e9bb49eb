"A run folder or a data set from a stranger runs nothing."

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

import mbs.cli
import mbs.curves
from mbs.cli import app
from mbs.curves import start_tensorboard
from mbs.explore.explorers import write_tour
from mbs.folders import find_package_folder
from mbs.guarded_tensorboard import guard_application
from mbs.lifeline import make_module_command, make_safe_environment, run_server
from mbs.run import load_run, trained_run

TRAP = "open('ran', 'w').write('')\n"
SERVERS = ("jupyterlab", "voila", "tensorboard", "ipywidgets", "mbs", "torch", "numpy", "IPython", "comm")


def code_of(notebook: Path) -> list[str]:
    "Return the code cells of a notebook, the parameters left out."
    cells = nbformat.read(notebook, 4).cells
    return [c.source for c in cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", [])]


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    "A run folder with a notebook, modules and settings of servers that leave a file behind when they run."
    monkeypatch.setenv("MBS_HOME", str(tmp_path / "home"))
    folder = tmp_path / "run"
    shutil.copytree(trained_run("mbs").folder, folder)
    for name in (*SERVERS, "sitecustomize", "jupyter_server_config", "jupyter_config"):
        (folder / f"{name}.py").write_text(TRAP)
    (folder / "voila.json").write_text('{"Voila": {"token": "known", "ip": "0.0.0.0"}}')
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(TRAP)]), folder / "explore.ipynb")
    return folder


@pytest.fixture
def served(monkeypatch):
    "What `mbs explore` and `mbs curves` would start: module, arguments, folder, and the notebook as it was then."
    seen = []

    @contextmanager
    def record(module, *arguments, environment=None, folder=None):
        notebooks = [code_of(Path(a)) for a in arguments if a.endswith(".ipynb")]
        seen.append((module, arguments, folder, notebooks))
        yield subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(mbs.cli, "run_server", record)
    return seen


@pytest.mark.parametrize("as_app", [False, True])
def test_only_the_tour_that_mbs_wrote_is_opened(stranger, served, monkeypatch, as_app):
    "The notebook of the run folder stays as it is and closed; a server starts in a folder that holds the tour alone."
    if as_app:
        pytest.importorskip("voila")
    before = (stranger / "explore.ipynb").read_bytes()
    monkeypatch.chdir(stranger)
    result = CliRunner().invoke(app, ["explore", ".", *["--app"] * as_app, "--no-browser"])
    assert result.exit_code == 0, result.output
    module, _, folder, (code,) = served[0]
    assert module == ("voila" if as_app else "jupyterlab")
    assert code == code_of(find_package_folder("tutorials") / "explore.ipynb")
    assert stranger not in (folder, *folder.parents) and (stranger / "explore.ipynb").read_bytes() == before
    assert folder.exists() != as_app, "an app leaves its copy behind, or a tour is lost"
    if not as_app:
        assert os.listdir(folder) == ["explore.ipynb"]


def test_an_app_runs_no_cell_that_was_added_to_a_tour(stranger, served):
    "Notes in a tour are kept for JupyterLab, which runs nothing by itself; an app gets a new copy."
    pytest.importorskip("voila")
    tour = write_tour(load_run(stranger))
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("mine = 1")]), tour)
    CliRunner().invoke(app, ["explore", str(stranger), "--app", "--no-browser"])
    CliRunner().invoke(app, ["explore", str(stranger), "--no-browser"])
    (*_, (in_app,)), (*_, (in_lab,)) = served
    assert in_app == code_of(find_package_folder("tutorials") / "explore.ipynb") and in_lab == ["mine = 1"]


def test_a_folder_in_place_of_a_tour_is_refused(stranger, tmp_path):
    (tmp_path / "tours/explore.ipynb").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"explore\.ipynb cannot be read: expected a notebook; remove the file"):
        write_tour(load_run(stranger), folder=tmp_path / "tours")


def test_tours_of_runs_of_one_name_are_two(stranger, tmp_path):
    "The folder of a tour depends on the whole path of the run, also of the second one."
    shutil.copytree(trained_run("mbs").folder, tmp_path / "b" / "run")
    one, other = load_run(stranger), load_run(tmp_path / "b" / "run")
    tours = [write_tour(one), write_tour(other), write_tour(one, other), write_tour(other, one)]
    assert len(set(tours)) == 4 and all(repr(str(stranger.resolve())) in p.read_text() for p in (tours[0], tours[3]))


@pytest.mark.parametrize("has_safe_path", [sys.version_info >= (3, 11), False])
def test_servers_take_no_module_of_the_folder_they_start_in(tmp_path, has_safe_path, monkeypatch):
    "`mbs --help` stands for a server: it imports itself and others. An empty entry of PYTHONPATH names no folder."
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", os.environ.get("PYTHONPATH", "")]))
    for name in ("mbs", "typer", "rich", "yaml", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    command = make_module_command("mbs.lifeline", "mbs", "--help", has_safe_path=has_safe_path)
    environment = make_safe_environment()
    if not has_safe_path:
        del environment["PYTHONSAFEPATH"]  # which Python 3.10 does not know
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "Usage: " in result.stdout and not (tmp_path / "ran").exists(), result.stderr


def ask(host, query="", cookie=""):
    "Return the status, headers and body that a guarded application answers."
    application = guard_application(lambda _, start: start("200 OK", []) or [b"curves"], "s3cret")
    seen = []
    environ = dict(SERVER_PORT="6006", PATH_INFO="/x", HTTP_HOST=host, QUERY_STRING=query, HTTP_COOKIE=cookie)
    body = b"".join(application(environ, lambda status, headers: seen.append((status[:3], dict(headers)))))
    return *seen[0], body


@pytest.mark.parametrize("host", ["localhost:6006", "127.0.0.1", "[::1]:6006"])
def test_tensorboard_answers_who_has_the_token(host):
    status, headers, body = ask(host, "token=s3cret")
    assert (status, headers["Location"], body) == ("302", "/x", b"")
    assert ask(host, cookie=headers["Set-Cookie"].split(";")[0]) == ("200", {}, b"curves")


@pytest.mark.parametrize(
    "host, query, cookie",
    [
        ("localhost:6006", "", ""),
        ("localhost:6006", "token=", "mbs-token-6006="),
        ("localhost:6006", "token=s3cre", ""),
        ("localhost:6006", "token=%C3%A9", "mbs-token-6006=\u00e9"),
        ("localhost:6006", "token=x&token=s3cret", ""),
        ("localhost:6006", "", "mbs-token-6007=s3cret"),
        ("localhost:6006", "", "=;;\x00"),
        ("evil.example:6006", "token=s3cret", "mbs-token-6006=s3cret"),
        ("localhost.evil.example", "", "mbs-token-6006=s3cret"),
        ("", "", "mbs-token-6006=s3cret"),
    ],
)
def test_tensorboard_answers_nobody_else(host, query, cookie):
    "Other users of the machine, and pages whose name points to it."
    status, _, body = ask(host, query, cookie)
    assert status == "403" and body != b"curves" and body.count(b"\n") == 1


def test_the_token_of_tensorboard_is_in_no_process_list(tmp_path, monkeypatch):
    seen = []

    @contextmanager
    def record(*arguments, environment, folder):
        seen.append((arguments, environment))
        yield

    monkeypatch.setattr(mbs.curves, "run_server", record)
    for _ in range(2):
        with start_tensorboard(tmp_path):
            pass
    (arguments, first), (_, second) = seen
    assert arguments[0] == "mbs.guarded_tensorboard" and "127.0.0.1" in arguments
    assert len(first["MBS_TOKEN"]) >= 32 and first != second and first["MBS_TOKEN"] not in " ".join(arguments)


def test_a_server_ends_with_the_block_and_with_its_parent(tmp_path):
    "A server lives no longer than the process that started it, even if that is killed."
    with run_server("http.server", "--bind", "127.0.0.1", "0", folder=tmp_path) as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGTERM
    code = (
        "import time; from mbs.lifeline import run_server\n"
        "with run_server('http.server', '--bind', '127.0.0.1', '0') as p: print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break  # ended; nobody of this container collects it
        time.sleep(0.1)
    else:
        assert time.monotonic() < deadline, "the server lives on"
