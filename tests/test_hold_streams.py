"A command that is started with closed streams works."

import os
import subprocess
import sys

import pytest

CODE = """import os, sys
from mbs.cli import _open_closed_streams
_open_closed_streams()
print("out")
print("err", file=sys.stderr)
sys.exit(os.open(os.devnull, os.O_RDONLY) < 3)"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_are_opened_again(closed):
    "What is opened next gets none of their numbers, and printing does not fail."

    def close():
        for number in closed:
            os.close(number)

    result = subprocess.run([sys.executable, "-c", CODE], preexec_fn=close, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("out\n" * (1 not in closed), "err\n" * (2 not in closed))
