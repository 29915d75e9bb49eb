"""Measure how soon a run is opened, and the first view of an explorer, as a share of another checkout.

python benchmarks/opening.py CHECKOUT [--rounds 9] [--repeats 20] [--run FOLDER]

The other checkout, for example `git worktree add ../before COMMIT`, is run with this Python and its libraries. Both
open the same run, by default the trained one of the other checkout, in turns and each in fresh processes. Measured is
processor time on one thread, the median of the repeats in a process, or all of a process that does it once.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from start import HERE, compare

TARGET = 1.1
BEGIN = """import json, sys, time
import mbs.comparison, mbs.explore.explorers, mbs.run
def open_run():
    run = mbs.run.load_run(sys.argv[1])
    return run._repr_html_(), mbs.comparison.summarise_runs([run])
def show_explorer():
    return mbs.explore.explorers.explore_pseudo_labels(sys.argv[1])._repr_mimebundle_()
"""
REPEAT = """
spent = []
for _ in range(int(sys.argv[3]) + 1):
    began = time.process_time()
    assert globals()[sys.argv[2]]()
    spent.append(time.process_time() - began)
print(json.dumps(spent[1:]))
"""
ONCE = "\nassert globals()[sys.argv[2]]()\nprint(json.dumps([time.process_time()]))"
PARTS = {
    "a run and its tables": ("open_run", REPEAT),
    "the first view of an explorer": ("show_explorer", REPEAT),
    "a process that opens a run": ("open_run", ONCE),
    "a process that shows an explorer": ("show_explorer", ONCE),
}


def measure(checkout: Path, home: Path, _: str, run: Path, function: str, code: str, repeats: int) -> float:
    "Return the seconds of processor time that a function of `BEGIN` takes with the package of `checkout`."
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | dict(PYTHONPATH=str(checkout), PYTHONSAFEPATH="1", MBS_HOME=str(home))
    environment |= dict.fromkeys(names, "1") | dict(JPY_SESSION_NAME="a.ipynb")
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + code, str(run), function, str(repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout} cannot open {run}: {done.stderr}")
    spent = sorted(json.loads(done.stdout.splitlines()[-1]))
    return spent[len(spent) // 2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=20, help="in each process")
    parser.add_argument("--run", type=Path, help="folder of a run that both checkouts can open")
    chosen = parser.parse_args()
    checkouts = dict(there=chosen.checkout.absolute(), here=HERE)
    run = (chosen.run or checkouts["there"] / "nbs/trained/mbs").absolute()
    for name, (function, code) in PARTS.items():
        measured = partial(measure, run=run, function=function, code=code, repeats=chosen.repeats)
        print(f"{name}: {compare(measured, checkouts, chosen.rounds)}, target {TARGET}", flush=True)
