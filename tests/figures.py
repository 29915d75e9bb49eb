"Figures of the stress tests, counted while they run; `make stress` makes docs/stress.md from them."

import json
import os
from pathlib import Path


def kept(what: str, n: float):
    "Add `n` to the figure `what` in the file that MBS_FIGURES names; do nothing if the variable is not set."
    if name := os.environ.get("MBS_FIGURES"):
        with open(Path(name), "a", encoding="utf-8") as file:
            file.write(json.dumps([what, n]) + "\n")
