"Crowded machines: few open files, a full /dev/shm, no memory, a reader that ends, a Ray that does not come up."

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
import typer
from typer.testing import CliRunner

import mbs.files
import mbs.run_folder
from mbs.cli import app, explain_errors
from mbs.draws import explain_worker_errors
from mbs.executors import Local, OnRay, _close_to_others, _connect_to_ray
from mbs.files import check_open_files, explain_exhaustion
from mbs.notebooks import RunFailed, _choose_socket_folder, _explain_failure, execute_notebook
from mbs.pictures import read_image
from mbs.run_folder import explain_unwritable


def limit_files(monkeypatch, soft, hard):
    "Let this process believe in a limit of open files; return the list of limits that are set."
    chosen = []
    monkeypatch.setattr(mbs.files.resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(mbs.files.resource, "setrlimit", lambda kind, limits: chosen.append(limits))
    return chosen


@pytest.mark.parametrize("start", [check_open_files, Local, lambda: execute_notebook(Path("a"), Path("b"), {})])
def test_too_few_open_files_are_refused_before_a_run(monkeypatch, start):
    limit_files(monkeypatch, 64, 64)
    with pytest.raises(ValueError, match=r"only 64 open files: expected at least 128; .* ulimit -n"):
        start()


def test_a_limit_that_may_be_raised_is_raised(monkeypatch):
    chosen = limit_files(monkeypatch, 64, 500)
    check_open_files()
    assert chosen == [(500, 500)]
    chosen = limit_files(monkeypatch, 64, resource.RLIM_INFINITY)
    check_open_files()
    assert chosen == [(4096, resource.RLIM_INFINITY)]
    chosen = limit_files(monkeypatch, 128, 500)
    check_open_files()
    assert chosen == []


def test_a_photo_is_not_blamed_for_open_files(monkeypatch, tmp_path, capsys):
    "Whatever sentence the error has become on its way, the command names the limit, with exit code 2."

    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.jpg")

    monkeypatch.setattr("mbs.pictures._open_photo", refuse)
    with pytest.raises(typer.Exit) as ended, explain_errors():
        read_image(tmp_path / "a.jpg")
    said = capsys.readouterr().err
    assert ended.value.exit_code == 2 and "ulimit -n" in said and "JPEG" not in said and said.count("\n") == 1


def test_a_command_explains_an_error_once(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("mbs.comparison.find_runs", refuse)
    result = CliRunner().invoke(app, ["report"])
    assert result.exit_code == 2 and result.stderr.count("ulimit -n") == result.stderr.count("\n") == 1


SENTENCES = {
    "/dev/shm has no room": [
        RuntimeError("unable to write to file </torch_7_1_0>: No space left on device (28)"),
        RuntimeError("unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
        OSError(errno.ENOSPC, "No space left on device", "/dev/shm/sem.mp-x"),
    ],
    "ulimit -n": [
        OSError(errno.EMFILE, "Too many open files"),
        RuntimeError("unable to open shared memory object </torch_7> in read-write mode: Too many open files (24)"),
        ImportError("[Errno 24] Too many open files: 'stack_data'"),
    ],
    "no memory left": [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: Error code 12 (Cannot allocate memory)"),
        ImportError("libtorch_cuda.so: failed to map segment from shared object"),
    ],
    "ulimit -u": [
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),  # of a thread in C++
        Exception("process 0 stopped with RuntimeError: Resource temporarily unavailable"),
    ],
    "set TMPDIR": [FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/']")],
    "": [
        Exception("BlockingIOError: [Errno 11] Resource temporarily unavailable"),
        OSError(errno.ENOSPC, "No space left on device", "outputs/a/run.json"),
        OSError(errno.ENOSPC, "No space left on device"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),  # of a lock
        ValueError("batch of 3 pictures"),
    ],
}


@pytest.mark.parametrize(("sentence", "error"), [(s, e) for s, errors in SENTENCES.items() for e in errors])
def test_what_is_used_up_is_named(sentence, error):
    said = explain_exhaustion(error)
    assert said.startswith(sentence) if sentence.startswith("/") else sentence in said
    assert bool(said) == bool(sentence)


def test_damaged_files_are_not_blamed_on_memory():
    "A damaged length makes readers ask for too much memory; what they say about the file stays."
    try:
        try:
            raise MemoryError
        except MemoryError:
            raise ValueError("a.npz cannot be read") from None
    except ValueError as e:
        assert explain_exhaustion(e) == ""


FULL = """
def refuse(*_):
    raise OSError(28, "No space left on device")"""


def test_no_room_for_semaphores_is_no_fault_of_the_run_folder():
    "Dataloader workers ask for semaphores in /dev/shm; the error of the operating system has no file name."
    place = dict(__name__="multiprocessing.synchronize")
    exec(FULL, place)  # a function of that module, as far as its errors tell
    with pytest.raises(ValueError, match=r"^/dev/shm has no room .* rerun the command"), explain_worker_errors():
        place["refuse"]()
    place["__name__"] = "mbs.files"
    with pytest.raises(OSError, match="No space left"), explain_worker_errors():
        place["refuse"]()


def test_the_place_without_room_is_named(monkeypatch, tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(mbs.run_folder, "has_no_room", lambda place: place == "/dev/shm")
    assert str(explain_unwritable(tmp_path, full)).startswith("/dev/shm cannot be")
    monkeypatch.setattr(mbs.run_folder, "has_no_room", lambda place: True)
    assert str(explain_unwritable(tmp_path, full)).startswith(f"run folder {tmp_path} cannot be written (No space")
    full.filename = str(tmp_path / "step-00" / "model.safetensors")
    assert str(explain_unwritable(tmp_path, full)).startswith(f"run folder {tmp_path} cannot be written (No space")
    broken = OSError(errno.EIO, "Input/output error", "/photos/a.jpg")
    said = str(explain_unwritable(tmp_path, broken))
    assert (
        said.startswith("/photos/a.jpg cannot be read or written (Input") and f"content of {tmp_path} is intact" in said
    )


def fail_in_cell(folder, *printed):
    "Return why a notebook failed whose cell left no error, only what it has printed to stderr."
    from papermill import PapermillExecutionError

    cell = nbformat.v4.new_code_cell("x", metadata=dict(papermill=dict(exception=True)))
    cell.outputs = [nbformat.v4.new_output("stream", name="stderr", text=text) for text in printed]
    (folder / "out.ipynb").write_text(json.dumps(nbformat.v4.new_notebook(cells=[cell])))
    error = PapermillExecutionError(0, 1, "x", "CellExecutionError", "", [])
    return _explain_failure(error, False, folder / "out.ipynb")


def test_an_error_without_message_is_found_in_what_was_printed(tmp_path):
    few = fail_in_cell(tmp_path, "Traceback\n", "OSError: [Errno 24] Too many open files: 'a.py'\n")
    assert isinstance(few, ValueError) and "ulimit -n" in str(few)
    other = fail_in_cell(tmp_path, "Traceback\nOSError: no such thing\n")
    assert isinstance(other, RunFailed) and "CellExecutionError: OSError: no such thing; its notebook" in str(other)
    assert "it left no message" in str(fail_in_cell(tmp_path))


def test_a_kernel_that_does_not_start_is_a_failed_run():
    "The program that talks to the kernel raises plain errors; its module tells that they are not ours."
    try:
        nbformat.reads("{", 4)
    except Exception as e:
        assert str(_explain_failure(e, False, Path("out.ipynb"))).startswith("the kernel of the run did not work (")
    assert _explain_failure(KeyError("of ours"), False, Path("out.ipynb")) is not None


HEAD = """import sys, typer
from mbs.cli import _outlive_readers
_outlive_readers()
for k in range(20_000):
    print("line", k)
    typer.echo(k, err=True)
print(sys.stdin.readline())
sys.exit(7)"""


def test_a_reader_that_ends_stops_nothing():
    "The command goes on to its own exit code, with both outputs in a pipe that is closed."
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen([sys.executable, "-c", HEAD], **options)
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 7


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"]])
def test_help_into_a_closed_pipe_is_no_failure(words):
    "`mbs --help | head -1`; help is printed before a command begins."
    receiver, sender = os.pipe()
    os.close(receiver)
    command = [sys.executable, "-m", "mbs", *words]
    done = subprocess.run(command, stdout=sender, stderr=subprocess.PIPE, text=True)
    os.close(sender)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_folder_for_temporary_files_no_kernel_starts(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [])
    with pytest.raises(ValueError, match=r"^no folder for temporary files can be written: .* set TMPDIR"):
        _choose_socket_folder()


def test_a_library_that_finds_no_memory_ends_a_command_with_a_sentence(monkeypatch):
    "Also where a module is imported, outside of what a command does itself."
    from typer.testing import CliRunner

    def refuse(*_):
        raise ImportError("libtorch_cuda.so: failed to map segment from shared object")

    monkeypatch.setattr("mbs.cli.read_parameters", refuse)
    monkeypatch.setattr("mbs.cli.parse_words", refuse)
    result = CliRunner().invoke(app, ["run", "protocol=4-2"])
    assert result.exit_code == 2 and result.output.startswith("mbs: there is no memory left")


@pytest.fixture
def ray_environment(monkeypatch):
    "A process that has not started Ray yet, whose changes of the environment are undone."
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_DEDUP_LOGS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def make_ray(error):
    "Return a module like ray that does not start."

    class Ray:
        ended = 0

        def init(**options):
            raise error

        def shutdown():
            Ray.ended += 1

    return Ray


@pytest.mark.parametrize(
    "error", [Exception("The current node timed out.\nSee"), AssertionError(), OSError(24, "Too many")]
)
def test_a_ray_that_does_not_start_is_one_sentence(monkeypatch, ray_environment, error):
    ray = make_ray(error)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ValueError, match=r"^Ray cannot be started on this machine ") as refused:
        _connect_to_ray(None)
    assert "\n" not in str(refused.value) and "None" not in str(refused.value) and ray.ended == 1
    with pytest.raises(ValueError, match=r"^Ray at head:1 cannot be used "):
        OnRay("head:1")


def test_a_ray_that_was_imported_too_early_is_refused(monkeypatch, ray_environment):
    monkeypatch.setitem(sys.modules, "ray", make_ray(Exception()))
    with pytest.raises(ValueError, match="expected a process that has not imported ray"):
        OnRay()


def test_each_ray_has_a_token_of_its_own(monkeypatch, ray_environment):
    monkeypatch.setitem(sys.modules, "ray", None)
    _close_to_others()
    token = os.environ.pop("RAY_AUTH_TOKEN")
    _close_to_others()
    assert len(token) == 64 and token != os.environ["RAY_AUTH_TOKEN"]
    assert os.environ["RAY_AUTH_MODE"] == "token"


RAY = """import os, sys
from mbs.executors import OnRay
executor = OnRay(cpus=1)
print("ready", os.environ["RAY_AUTH_TOKEN"], flush=True)
sys.stdin.readline()
executor.stop()"""


def test_a_local_ray_listens_on_the_loopback_only():
    pytest.importorskip("ray")
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", RAY], **options)
    try:
        words = next((line.split() for line in process.stdout if line.startswith("ready ")), None)
        if words is None:
            pytest.skip("Ray does not start on this machine now")
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        sockets = [socket for member in family for socket in member.net_connections("tcp")]
        heard = {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
        assert heard and heard <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        assert not any(words[1] in " ".join(member.cmdline()) for member in family)
        asked = [member.environ() for member in family if "gcs_server" in member.name() or "raylet" in member.name()]
        assert len(asked) > 1 and all(names["RAY_AUTH_MODE"] == "token" for names in asked)
        process.communicate("\n", timeout=60)
        assert not psutil.wait_procs(family, 30)[1]
    finally:
        process.kill()
        process.communicate()
