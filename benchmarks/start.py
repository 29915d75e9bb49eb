"""Measure how soon `mbs run demo` trains, and how soon it refuses a misspelt parameter, as a share of another checkout.

python benchmarks/start.py CHECKOUT [--rounds 5]

The other checkout, for example `git worktree add ../before COMMIT`, is run with this Python and its libraries. Both are
measured in turns, after one run of each that draws the scenes and compiles the modules to bytecode. The first iteration
is a machine's with two idle cores: the command and its kernel load PyTorch at the same time.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
ONE_ITERATION = ["training.iterations=1", "training.new_iterations=1"]  # the first is logged as soon as it is done


def start(checkout: Path, home: Path, *words: str) -> subprocess.Popen:
    "Start `mbs run demo` with the package of `checkout`."
    environment = os.environ | dict(PYTHONPATH=str(checkout), PYTHONSAFEPATH="1", MBS_HOME=str(home))
    command = [sys.executable, "-m", "mbs", "run", "demo", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def measure_first_iteration(checkout: Path, home: Path, name: str) -> float:
    "Return the seconds from the command to the first iteration, and end the run there."
    began = time.perf_counter()
    process = start(checkout, home, f"name={name}", "share_base=false", *ONE_ITERATION)
    log = home / "outputs" / name / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    if process.poll() is not None:
        raise SystemExit(f"the run of {checkout} ended without an iteration: {process.stderr.read()}")
    process.send_signal(signal.SIGTERM)
    process.communicate()
    return seconds


def measure_refusal(checkout: Path, home: Path, _: str) -> float:
    "Return the seconds in which a misspelt parameter is refused."
    began = time.perf_counter()
    said = start(checkout, home, "methd=3").communicate()[1]
    assert "'methd' is not known" in said, said
    return time.perf_counter() - began


def compare(measure, checkouts: dict[str, Path], rounds: int) -> str:
    "Measure in turns; the medians of both, and the median, lowest and highest ratio of a round."
    spent = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for k in range(rounds + 1):
            for name, checkout in checkouts.items():
                seconds = measure(checkout, Path(folder, name), f"run{k}")
                if k:
                    spent[name].append(seconds)
    ratios = sorted(here / there for here, there in zip(spent["here"], spent["there"]))
    there, here = (statistics.median(spent[name]) for name in ("there", "here"))
    return f"{there:.3f} s → {here:.3f} s, ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    checkouts = dict(there=chosen.checkout.absolute(), here=HERE)
    print("refusal of a misspelt parameter:", compare(measure_refusal, checkouts, chosen.rounds), flush=True)
    print("first iteration of mbs run demo:", compare(measure_first_iteration, checkouts, chosen.rounds))
