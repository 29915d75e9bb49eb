"Figures of the stress tests: counted while they run, kept for `make stress`, which makes docs/stress.md of them."

import json
import os
from pathlib import Path


def kept(what: str, n: float):
    "Add `n` to the figure `what`, in the file that MBS_FIGURES names; nothing where it names none."
    if name := os.environ.get("MBS_FIGURES"):
        with open(Path(name), "a", encoding="utf-8") as file:
            file.write(json.dumps([what, n]) + "\n")
