"Nothing that is read can run: no pickle, no code in parameters, pages that only show text, servers that ask who is there."

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
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mbs
from mbs.cli import app
from mbs.explore.explorers import explore_class_tokens, explore_features, explore_pseudo_labels

PACKAGE = Path(mbs.__file__).parent
RUNNING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def word(node):
    "A dotted name, as it stands."
    return (
        node.id
        if isinstance(node, ast.Name)
        else f"{word(node.value)}.{node.attr}"
        if isinstance(node, ast.Attribute)
        else ""
    )


def dangers(source: str) -> list[str]:
    "Places in a program where what is read could run."
    found = []
    for node in ast.walk(ast.parse(source)):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        found += [f"{node.lineno}: import of {name}" for name in names if name.split(".")[0] in RUNNING]
        if not isinstance(node, ast.Call):
            continue
        called, given = word(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
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
    found += [
        f"authentication off: {m}"
        for m in re.findall(r"(?:token|password)=(?:''|\"\"|\s|$)|disable_check_xsrf|0\.0\.0\.0", source)
    ]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.name)
def test_nothing_read_can_run(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


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
def test_what_would_be_found(source):
    assert dangers(source)


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
    "Names and attributes of all elements."

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, tuple(sorted(k for k, _ in attrs))))


@pytest.mark.parametrize("kind", [explore_pseudo_labels, explore_features, explore_class_tokens])
def test_names_in_pages_make_no_elements(runs, tmp_path, monkeypatch, kind):
    "A page with hostile names of classes, folder and method has the very elements of one with plain names."
    plain = Elements(kind(runs[0]).to_html(tmp_path / "plain.html").read_text(encoding="utf-8")).found
    monkeypatch.setattr(runs[0], "names", (HOSTILE * 2)[: len(runs[0].names)])
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.symlink_to(runs[0].folder)
    monkeypatch.setattr(runs[0], "folder", folder)
    page = kind(runs[0]).to_html(tmp_path / "hostile.html").read_text(encoding="utf-8")
    assert Elements(page).found == plain and "alert(1)" in page


# --- servers


def started(words, monkeypatch):
    "Command line and environment with which `mbs explore` would start a server."
    seen = []
    monkeypatch.setattr(subprocess, "call", lambda command, env: seen.append((command, env)) or 0)
    result = CliRunner().invoke(app, ["explore", *map(str, words)])
    assert result.exit_code == 0, result.output
    return seen[0]


@pytest.mark.parametrize("as_app", [False, True])
@pytest.mark.parametrize("given", [None, ""])
def test_servers_are_started_closed(runs, monkeypatch, as_app, given):
    "On the loopback, with a token, also where the environment says that none is wanted."
    monkeypatch.delenv("JUPYTER_TOKEN", raising=False)
    if given is not None:
        monkeypatch.setenv("JUPYTER_TOKEN", given)
    command, environment = started([runs[0].folder, *["--app"] * as_app, "--no-browser"], monkeypatch)
    assert (
        command[1:3] == ["-m", "voila" if as_app else "jupyterlab"]
        and any(w.endswith(".ip=127.0.0.1") for w in command)
        and not [w for w in command if re.search("(token|password)=(?!True)", w)]
    )
    assert len(environment["JUPYTER_TOKEN"]) >= 32 and ("--Voila.auto_token=True" in command) == as_app


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answer(url, **headers):
    try:
        return (
            urllib.request.build_opener(NoRedirect)
            .open(urllib.request.Request(url, headers=headers), timeout=20)
            .status
        )
    except urllib.error.HTTPError as e:
        return e.code


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


@pytest.mark.parametrize("as_app", [False, True])
def test_servers_ask_who_is_there(runs, monkeypatch, tmp_path, as_app):
    "Really started: without the token nothing is to be had, with it everything."
    if as_app:
        pytest.importorskip("voila")
    command, environment = started([runs[0].folder, *["--app"] * as_app, "--no-browser"], monkeypatch)
    port = free_port()
    command = [*command, f"--port={port}", *([] if as_app else ["--allow-root"])]
    monkeypatch.undo()
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command,
            env=environment | dict(JUPYTER_TOKEN="s3cret" * 8),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        base, limit = f"http://127.0.0.1:{port}", time.monotonic() + 120
        page = f"{base}/" if as_app else f"{base}/api/contents"
        while True:
            try:
                code = answer(page)
                break
            except OSError:
                assert time.monotonic() < limit and process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.3)
        assert code in (302, 403), code
        if not as_app:
            assert (
                answer(page, Authorization=f"token {'s3cret' * 8}") == 200
                and answer(page, Authorization="token wrong") == 403
            )
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


# --- durability


def test_the_log_is_on_the_disk_before_a_state_counts_on_it(tmp_path, monkeypatch):
    "After a power cut only what was synchronised is there: no line may be missing that a saved state or step has behind it."
    from test_faults import TINY

    from mbs.experiment import Experiment
    from mbs.settings import Settings

    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    lines, safe, replaced, synced = [0], [0], os.replace, os.fsync
    log = tmp_path / "outputs" / "run" / "log.jsonl"

    def sync(handle):
        if log.exists() and os.fstat(handle).st_ino == log.stat().st_ino:
            safe.append(len(log.read_text().splitlines()))
        return synced(handle)

    def replace(source, target):
        if Path(target).suffix == ".safetensors" or Path(target).name.startswith("step-"):
            assert not log.exists() or safe[-1] == len(log.read_text().splitlines()), target
            lines.append(safe[-1])
        if Path(target).name == "log.jsonl":
            safe.append(len(Path(source).read_text().splitlines()))
        return replaced(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    run = Experiment(Settings(**TINY)).run()
    assert max(lines) == len(run.log()) == 6 and json.loads(log.read_text().splitlines()[-1])["step"] == 2


def test_a_damaged_neighbour_does_not_stop_a_run(tmp_path, monkeypatch):
    "Who looks for a base step to share passes over folders that are no runs any more."
    from test_faults import TINY

    from mbs.experiment import Experiment
    from mbs.settings import Settings

    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    (tmp_path / "outputs" / "old").mkdir(parents=True)
    (tmp_path / "outputs" / "old" / "run.json").write_text("{}")
    assert Experiment(Settings(**TINY | dict(share_base=True))).run().finished
