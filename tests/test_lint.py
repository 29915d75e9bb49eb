"Code and notebooks pass the linter and are formatted."

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {"check": ["check", "."], "format": ["format", "--check", "."]}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_ruff_finds_nothing(command):
    ruff = Path(sys.executable).with_name("ruff")
    done = subprocess.run([ruff, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
