"What a terminal shows: how runs end, how far they are, what is meant by a misspelt name."

import shlex
import sys

import pytest
from typer.testing import CliRunner

import mbs.cli
from mbs.cli import app


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("my home")


@pytest.fixture(scope="module")
def finished(home):
    "A finished run of the defaults, trained without a notebook."
    from mbs.experiment import Experiment
    from mbs.settings import Settings

    settings = Settings(name="brief", training=dict(iterations=11), scenes=dict(n_train=30, n_test=6, size=48))
    return Experiment(settings, home / "outputs").run()


WORDS = ["run", "name=brief", "training.iterations=11", "scenes.n_train=30", "scenes.n_test=6"]


def call(home, *words):
    answer = CliRunner().invoke(app, ["--home", str(home), *words], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return answer.output


def test_a_run_ends_with_its_folder_and_commands_to_paste(finished, home, monkeypatch, tmp_path):
    "Also a run that was finished already; the commands are words that lead to its folder."
    monkeypatch.setenv("MBS_HOME", str(home))  # restored after the command has set it
    monkeypatch.chdir(tmp_path)
    lines = call(home, *WORDS).splitlines()
    commands = [shlex.split(line) for line in lines[lines.index("Next:") + 1 :]]
    folder = str(home / "outputs" / "brief")
    assert commands == [["mbs", "--home", str(home), name, folder] for name in ("explore", "report")]
    assert f"Folder: {folder}" in lines
    assert not any(line.startswith("Notebook:") for line in lines)  # it was trained by a call of Python
    monkeypatch.chdir(home)
    assert "Folder: outputs/brief" in call(home, *WORDS).splitlines()


def test_a_command_names_the_program_that_was_called(monkeypatch, tmp_path):
    monkeypatch.setattr(mbs.cli, "_home_words", [])
    program = tmp_path / "bin" / "mbs"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert mbs.cli._write_command("report") == f"{program} report"
    monkeypatch.setenv("PATH", str(program.parent))
    assert mbs.cli._write_command("report") == "mbs report"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "mbs" / "__main__.py")])
    assert mbs.cli._write_command("report") == f"{sys.executable} -m mbs report"
