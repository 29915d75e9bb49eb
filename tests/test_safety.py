"Nothing that is read can run: no pickle, no code in parameters, pages show only text, servers demand a token."

import ast
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mbs.explore.tour
from mbs.cli import app
from mbs.explore.explorers import (
    explore_class_tokens,
    explore_confusions,
    explore_features,
    explore_pseudo_labels,
)
from mbs.lifeline import make_module_command, make_safe_environment

PACKAGE = Path(mbs.__file__).parent
RUNNING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


OPEN_SERVER = r"(?:token|password)=(?:''|\"\"|\s|$)|disable_check_xsrf|0\.0\.0\.0"


def dotted_name(node):
    "Return the dotted name that a node of a program is; empty for any other expression."
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return ""


def list_imports(node) -> list[str]:
    "Return the modules that a node of a program imports."
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return []


def find_dangers(source: str) -> list[str]:
    "Find the places in a program where data could run as code, or a server would be open."
    found = []
    for node in ast.walk(ast.parse(source)):
        imports = list_imports(node)
        found += [f"{node.lineno}: import of {name}" for name in imports if name.split(".")[0] in RUNNING]
        if not isinstance(node, ast.Call):
            continue
        called = dotted_name(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        bad = [
            called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
            called.startswith("yaml.") and "load" in called and called != "yaml.safe_load",
            called == "torch.load" and given.get("weights_only") != "True",
            called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False",
            given.get("allow_pickle") == "True",
            given.get("shell", "False") != "False",
            called.endswith(("extractall", "unpack_archive")),
            given.get("trust_remote_code", "False") != "False",
        ]
        if any(bad):
            found.append(f"{node.lineno}: {ast.unparse(node)[:80]}")
    found += [f"authentication off: {match}" for match in re.findall(OPEN_SERVER, source)]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_can_run_what_it_reads(path):
    assert find_dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "yaml.unsafe_load(f)",
        "eval(x)",
        "exec(x)",
        "subprocess.run(x, shell=True)",
        "tar.extractall(x)",
        "os.system(x)",
        "start(['--ServerApp.token=', '--IdentityProvider.token=\"\"'])",
        "run('--ip=0.0.0.0')",
    ],
)
def test_dangers_are_found(source):
    assert find_dangers(source)


# --- pages

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><svg onload=alert(1)>",
    "' onmouseover='alert(1)",
    "{{title}}",
    "&lt;b&gt;",
    "<b>bold</b>",
    "]]><!--",
]


class Elements(HTMLParser):
    "The names and the attributes of all elements of a page, in `found`."

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, tuple(sorted(k for k, _ in attrs))))


@pytest.mark.parametrize(
    "kind",
    [explore_pseudo_labels, explore_features, explore_class_tokens, explore_confusions],
    ids=lambda f: f.__name__,
)
def test_names_in_pages_make_no_elements(runs, tmp_path, monkeypatch, kind):
    "A page with hostile names of classes and folder has exactly the elements of a page with plain names."
    plain = Elements(kind(runs[0]).to_html(tmp_path / "plain.html").read_text(encoding="utf-8")).found
    monkeypatch.setattr(runs[0], "names", (HOSTILE * 2)[: len(runs[0].names)])
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.symlink_to(runs[0].folder)
    monkeypatch.setattr(runs[0], "folder", folder)
    page = kind(runs[0]).to_html(tmp_path / "hostile.html").read_text(encoding="utf-8")
    assert Elements(page).found == plain and "alert(1)" in page


# --- servers


def test_every_promise_names_its_tests():
    text = (PACKAGE.parent / "SECURITY.md").read_text(encoding="utf-8")
    written = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    promises = re.findall(r"^\| (?!promise)([^|-][^|]*) \| (.*) \|$", text, re.MULTILINE)
    named = {promise: re.findall(r"`(test_\w+)`", tests) for promise, tests in promises}
    assert len(named) > 9 and all(named.values()), named
    assert not [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in written]


def catch_start(words, monkeypatch):
    "Return command line and environment with which `mbs explore` would start a server."
    seen = []

    @contextmanager
    def record(module, *arguments, environment, folder, output):
        seen.append((make_module_command(module, *arguments), make_safe_environment(environment)))
        yield subprocess.Popen(["true"])

    monkeypatch.setattr(mbs.explore.tour, "run_server", record)
    result = CliRunner().invoke(app, ["explore", *map(str, words)])
    assert result.exit_code == 0, result.output
    return seen[0]


@pytest.mark.parametrize("as_app", [False, True])
@pytest.mark.parametrize("given", [None, ""])
def test_servers_listen_locally_and_demand_a_token(runs, tmp_path, monkeypatch, as_app, given):
    "A server gets a token even if the environment asks for none."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    monkeypatch.delenv("JUPYTER_TOKEN", raising=False)
    if given is not None:
        monkeypatch.setenv("JUPYTER_TOKEN", given)
    command, environment = catch_start([runs[0].folder, *["--app"] * as_app, "--no-browser"], monkeypatch)
    assert ("voila" if as_app else "jupyterlab") in command
    assert any(w.endswith(".ip=127.0.0.1") for w in command)
    assert not [w for w in command if re.search("(token|password)=(?!True)", w)]
    assert len(environment["JUPYTER_TOKEN"]) >= 32
    assert ("--Voila.auto_token=True" in command) == as_app


def free_port():
    "Return a port that no program listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def get_status(url, **headers):
    "Return the status of an answer, without following redirections."
    opener = urllib.request.build_opener(NoRedirect)
    request = urllib.request.Request(url, headers=headers)
    try:
        return opener.open(request, timeout=20).status
    except urllib.error.HTTPError as e:
        return e.code


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


@pytest.mark.parametrize("as_app", [False, True])
def test_servers_answer_only_with_the_token(runs, monkeypatch, tmp_path, as_app):
    "A real server refuses requests without the token and answers those with it."
    if as_app:
        pytest.importorskip("voila")
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    port = free_port()
    options = [*["--app"] * as_app, "--no-browser", "--allow-root", f"--port={port}"]
    command, environment = catch_start([runs[0].folder, *options], monkeypatch)
    token = "s3cret" * 8
    environment = environment | dict(JUPYTER_TOKEN=token)
    monkeypatch.undo()
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        limit = time.monotonic() + 120
        page = f"http://127.0.0.1:{port}/" + ("" if as_app else "api/contents")
        while True:
            try:
                code = get_status(page)
                break
            except OSError:
                assert time.monotonic() < limit and process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.3)
        assert code in (302, 403), code
        if not as_app:
            assert get_status(page, Authorization=f"token {token}") == 200
            assert get_status(page, Authorization="token wrong") == 403
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


# --- durability


def test_log_is_on_disk_before_a_checkpoint_relies_on_it(tmp_path, monkeypatch):
    "A power cut keeps only what was synchronised, so every line before a checkpoint or step must be synchronised."
    from test_faults import TINY

    from mbs.experiment import Experiment
    from mbs.settings import Settings

    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    relied_on = [0]  # lines of the log before each checkpoint or step
    synchronised = [0]  # lines of the log at each synchronisation
    real_replace, real_fsync = os.replace, os.fsync
    log = tmp_path / "outputs" / "run" / "log.jsonl"

    def count_lines(path):
        return len(Path(path).read_text().splitlines())

    def sync(handle):
        if log.exists() and os.fstat(handle).st_ino == log.stat().st_ino:
            synchronised.append(count_lines(log))
        return real_fsync(handle)

    def replace(source, target):
        if Path(target).suffix == ".safetensors" or Path(target).name.startswith("step-"):
            assert not log.exists() or synchronised[-1] == count_lines(log), target
            relied_on.append(synchronised[-1])
        if Path(target).name == "log.jsonl":
            synchronised.append(count_lines(source))
        return real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    run = Experiment(Settings(**TINY)).run()
    assert max(relied_on) == len(run.log()) == 6
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 2


def test_a_damaged_neighbour_does_not_stop_a_run(tmp_path, monkeypatch):
    "The search for a base step to share ignores folders that are no valid runs."
    from test_faults import TINY

    from mbs.experiment import Experiment
    from mbs.settings import Settings

    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    (tmp_path / "outputs" / "old").mkdir(parents=True)
    (tmp_path / "outputs" / "old" / "run.json").write_text("{}")
    assert Experiment(Settings(**TINY | dict(share_base=True))).run().finished
