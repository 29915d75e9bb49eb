"""Write docs/stress.md: `python docs/stress.py FIGURES` adds up the figures that the tests of `make stress` have kept.

It also prints the page."""

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
ABOUT = """# The stress test

`make stress` runs in full what the tests do in small numbers. It kills runs at every write, iteration, evaluation and \
save, makes single writes fail, removes disks, and gives changed files to every reader.
A run must end bit for bit like an undisturbed one. An input must be used correctly or refused in one sentence.
Nothing failed in the last run, whose figures follow.
"""
REFUSED = "refused in one sentence"


def describe_machine() -> str:
    "Return processor, cores and versions in words."
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{processor}, {os.cpu_count()} cores, {versions}"


def describe_commit() -> str:
    "Return the commit of the working tree, with a plus sign if the tree has changes."
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def make_table(head: tuple, rows: list[tuple]) -> str:
    "Return a Markdown table whose first column is text and whose other columns are counts."
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {row[0]} | {' | '.join(f'{n:,}' for n in row[1:])} |" for row in rows]
    return "\n".join(lines) + "\n"


def make_page(figures: dict[str, float]) -> str:
    "Return the Markdown of the figures, in groups."
    text = f"{ABOUT}\n{date.today()}, commit {describe_commit()}, {describe_machine()}.\n"
    left = dict(figures)
    refused = {name.partition(": ")[2]: left.pop(name) for name in list(left) if name.startswith(f"{REFUSED}: ")}
    for title, words in {**GROUPS, "Other": ("",)}.items():
        found = {name: left.pop(name) for name in list(left) if any(word in name for word in words)}
        if not found:
            continue
        head, rows = ("what", "times"), list(found.items())
        if title == "Inputs":
            inputs = {name.partition(": ")[2]: n for name, n in found.items()}
            head, rows = ("input", "tried", REFUSED), [(name, n, refused[name]) for name, n in inputs.items()]
            rows.append(("all", *(sum(row[k] for row in rows) for k in (1, 2))))
        text += f"\n## {title}\n\n{make_table(head, rows)}"
    return text


if __name__ == "__main__":
    figures = defaultdict(int)
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        what, n = json.loads(line)
        figures[what] += n
    (HERE / "stress.md").write_text(make_page(figures), encoding="utf-8")
    print(make_page(figures))
