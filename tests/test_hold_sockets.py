"What a command starts listens on this machine only, names its token in no process list, and ends with the command."

import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import psutil
import pytest
from test_safety import free_port

from mbs.run import trained_run

TOKEN = "0123456789abcdef" * 3
COMMANDS = {
    "explore": ["explore", "RUN", "--no-browser"],
    "app": ["explore", "RUN", "--app", "--no-browser"],
    "curves": ["curves", "RUN", "--port"],
}
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def list_family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def list_listening(family: list[psutil.Process]) -> dict[int, str]:
    "Return the ports on which processes listen, each with its address."
    found = {}
    for member in family:
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            for socket in member.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN or (socket.type == 2 and not socket.raddr):  # TCP, or UDP
                    found[socket.laddr.port] = socket.laddr.ip
    return found


@pytest.fixture
def started(tmp_path):
    "The processes of all commands at once, by name; JupyterLab may be run by root here."
    (tmp_path / "config").mkdir()
    (tmp_path / "config/jupyter_server_config.json").write_text(json.dumps(dict(ServerApp=dict(allow_root=True))))
    environment = os.environ | dict(MBS_HOME=str(tmp_path), JUPYTER_CONFIG_DIR=str(tmp_path / "config"))
    (tmp_path / "temporary").mkdir()
    environment |= dict(JUPYTER_TOKEN=TOKEN, MBS_TOKEN=TOKEN, OMP_NUM_THREADS="1", TMPDIR=str(tmp_path / "temporary"))
    processes = {}
    for name, words in COMMANDS.items():
        words = [str(trained_run("mbs").folder) if word == "RUN" else word for word in words]
        words += [str(free_port())] if name == "curves" else []
        command = [sys.executable, "-m", "mbs", *words]
        with open(tmp_path / name, "w") as said:
            options = dict(env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
            processes[name] = psutil.Popen(command, cwd=tmp_path, **options)
    yield processes
    for process in processes.values():
        for member in list_family(process) if process.is_running() else ():
            member.kill()


def wait_for_ports(process: psutil.Process, n: int, said) -> dict[int, str]:
    "Wait until a process and its children listen on `n` ports."
    deadline = time.monotonic() + 180
    while len(found := list_listening(list_family(process))) < n:
        assert process.poll() is None and time.monotonic() < deadline, said.read_text()
        time.sleep(0.3)
    return found


def test_servers_listen_on_this_machine_only_and_end_with_their_command(started, tmp_path):
    "JupyterLab with a kernel, voila and TensorBoard, looked at from outside."
    pytest.importorskip("voila")
    heard = {name: wait_for_ports(process, 1, tmp_path / name) for name, process in started.items()}
    port = next(iter(heard["explore"]))
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/kernels", b"{}", {"Authorization": f"token {TOKEN}"})
    assert urllib.request.urlopen(request, timeout=60).status == 201
    heard["explore"] = wait_for_ports(started["explore"], 5, tmp_path / "explore")
    families = {name: list_family(process) for name, process in started.items()}
    assert all(len(family) > 1 for family in families.values()) and len(families["explore"]) > 2
    assert {ip for ports in heard.values() for ip in ports.values()} <= LOOPBACK, heard
    shown = [" ".join(member.cmdline()) for family in families.values() for member in family]
    members = [member.environ() for family in families.values() for member in family]
    tokens = {names[name] for names in members for name in ("JUPYTER_TOKEN", "MBS_TOKEN") if name in names}
    assert len(tokens) > 1 and not [line for line in shown for token in tokens if token in line]
    assert list((tmp_path / "temporary").glob("mbs-curves-*"))
    for process in started.values():
        process.terminate()
    _, left = psutil.wait_procs([member for family in families.values() for member in family], 60)
    assert not left, [member.cmdline() for member in left]
    assert not list((tmp_path / "temporary").glob("mbs-curves-*"))
