"A run folder or a data set from a stranger runs nothing."

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

import mbs.curves
import mbs.explore.tour
from mbs.cli import app
from mbs.curves import start_tensorboard
from mbs.explore.tour import _is_trusted, _prepare_tour, write_tour
from mbs.guarded_tensorboard import guard_application
from mbs.lifeline import make_module_command, make_safe_environment, run_server
from mbs.run import trained_run

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
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))  # of the signatures of trusted notebooks
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
    def record(module, *arguments, environment=None, folder=None, output=None):
        seen.append((module, arguments, folder))
        yield subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(mbs.explore.tour, "run_server", record)
    return seen


@pytest.mark.parametrize("as_app", [False, True])
def test_only_the_notebook_that_mbs_wrote_is_opened(stranger, served, monkeypatch, as_app):
    "The notebook of the run folder stays as it is and closed; a server starts in a folder that holds the tour alone."
    if as_app:
        pytest.importorskip("voila")
    before = (stranger / "explore.ipynb").read_bytes()
    monkeypatch.chdir(stranger)
    result = CliRunner().invoke(app, ["explore", ".", *["--app"] * as_app, "--no-browser"])
    assert result.exit_code == 0, result.output
    module, arguments, folder = served[0]
    assert module == ("voila" if as_app else "jupyterlab")
    assert (str(folder / "app.ipynb") if as_app else f"--ServerApp.root_dir={folder}") in arguments
    assert stranger not in (folder, *folder.parents) and (stranger / "explore.ipynb").read_bytes() == before
    name = "app" if as_app else "explore"
    assert sorted(os.listdir(folder)) == [f"{name}.ipynb", f"{name}.log"]
    assert not [source for source in code_of(folder / f"{name}.ipynb") if TRAP in source]


class FakeClient:
    "A kernel that only notes what it was asked to execute."

    def __init__(self):
        self.sources = []

    def execute_interactive(self, source, **_):
        self.sources.append(source)
        return dict(content=dict(status="ok", execution_count=len(self.sources)))


@pytest.fixture
def executed(monkeypatch):
    "The cells that `mbs explore` executes before it opens a tour."
    client = FakeClient()
    monkeypatch.setattr(mbs.explore.tour, "_start_kernel", lambda *_: nullcontext(client))
    return client.sources


def edit(tour, sources):
    "Replace the code cells after the parameters by cells of these sources, each with an output."
    notebook = nbformat.read(tour, 4)
    output = nbformat.v4.new_output("stream", text="mine")
    cells = [nbformat.v4.new_code_cell(source, outputs=[output]) for source in sources]
    notebook.cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])] + cells
    nbformat.write(notebook, tour)


def test_a_cell_that_was_added_to_a_tour_waits_for_the_user(stranger, executed):
    tour = write_tour([stranger])
    own = code_of(tour)
    edit(tour, [own[0], TRAP, *own[1:]])
    assert write_tour([stranger]) == tour and TRAP in code_of(tour)
    parameters = f"run_folder = {str(stranger.resolve())!r}\nother_folder = ''"
    assert _prepare_tour(tour, "", [parameters, *own]) and executed == [parameters, *own]
    assert not _is_trusted(nbformat.read(tour, 4)), "foreign outputs were signed"


def test_an_edited_tour_that_lacks_cells_is_not_executed(stranger, executed):
    tour = write_tour([stranger])
    own = code_of(tour)
    edit(tour, own[1:])
    before = tour.read_bytes()
    assert not _prepare_tour(tour, "", own) and executed == [] and tour.read_bytes() == before


def test_a_tour_that_mbs_executed_is_trusted(stranger, executed):
    tour = write_tour([stranger])
    assert not _is_trusted(nbformat.read(tour, 4))
    assert _prepare_tour(tour, "", code_of(tour)) and _is_trusted(nbformat.read(tour, 4))


def test_a_folder_in_place_of_a_tour_is_refused(stranger, tmp_path):
    (tmp_path / "tours/explore.ipynb").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"explore\.ipynb cannot be read: expected a notebook; remove the file"):
        write_tour([stranger], tmp_path / "tours")


def test_tours_of_runs_of_one_name_are_two(stranger, tmp_path):
    "The folder of a tour depends on the whole path of the run, also of the second one."
    one, other = stranger, tmp_path / "b" / "run"
    shutil.copytree(trained_run("mbs").folder, other)
    tours = [write_tour(folders) for folders in ([one], [other], [one, other], [other, one])]
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
