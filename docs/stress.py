"The page of what `make stress` has tried: `python docs/stress.py FIGURES` sums what the tests have kept there, prints it, and writes docs/stress.md."

import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

import torch

HERE = Path(__file__).parent
GROUPS = {
    "Kills and signals": ("kill", "signal", "of these"),
    "Faults of disks, data and processes": ("fault",),
    "Inputs": ("inputs tried",),
    "Leaks: none found in": ("leak", "in one process", "nothing left"),
}
ABOUT = """# What has been tried to break it

`make stress` does in full what the tests do a little of: it kills runs at every write, iteration, evaluation and save, lets single writes fail,
takes disks away, and feeds every reader with changed files. A run must end bit for bit like one that was left alone; an input must be used rightly or refused in one sentence.
These are the figures of the last time, in which nothing failed.
"""


def machine() -> str:
    "Processor, cores and versions."
    said = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in said if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def page(figures: dict[str, float]) -> str:
    "Markdown of the figures, grouped."
    commit = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True
    ).stdout.strip()
    text, left = f"{ABOUT}\n{date.today()}, commit {commit}, {machine()}.\n", dict(figures)
    refused = {
        name.partition(": ")[2]: left.pop(name) for name in list(left) if name.startswith("refused in one sentence: ")
    }
    for title, words in {**GROUPS, "Other": ("",)}.items():
        found = {name: left.pop(name) for name in list(left) if any(word in name for word in words)}
        if not found:
            continue
        rows = [
            (name.partition(": ")[2], n, refused[name.partition(": ")[2]])
            if name.startswith("inputs tried")
            else (name, n)
            for name, n in found.items()
        ]
        head = ("input", "tried", "refused in one sentence") if title == "Inputs" else ("what", "times")
        if title == "Inputs":
            rows.append(("all", *(sum(row[k] for row in rows) for k in (1, 2))))
        text += f"\n## {title}\n\n| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}\n" + "".join(
            f"| {row[0]} | {' | '.join(f'{n:,}' for n in row[1:])} |\n" for row in rows
        )
    return text


if __name__ == "__main__":
    figures = defaultdict(int)
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        what, n = json.loads(line)
        figures[what] += n
    (HERE / "stress.md").write_text(page(figures), encoding="utf-8")
    print(page(figures))
