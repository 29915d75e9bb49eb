"`python -m mbs` is the `mbs` command."

import os
import sys

if sys.path[0] == os.getcwd():  # where files of the user may be called like libraries
    del sys.path[0]

from mbs.cli import app

app()
