"""Write docs/stress.md: `python docs/stress.py FIGURES` adds up the figures that the tests of `make stress` have kept.

Each group of figures says when and where it was measured. Groups of which FIGURES holds nothing stay as they are, so
that a part of the tests can be run alone. It also prints the page."""

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
    "Changed files": ("changed files",),
    "Long lives: nothing grows": ("in one life",),
    "Kills of batches": ("kills of a batch",),
    "Kills and signals": ("kill", "signal", "of these"),
    "Faults of disks, data and processes": ("fault",),
    "Inputs": ("inputs tried", "refused in one sentence"),
    "Leaks: none found in": ("leak", "in one process", "nothing left"),
}
ABOUT = """# The stress test

`make stress` runs in full what the tests do in small numbers. It kills runs at every write, iteration, evaluation and \
save, makes single writes fail, removes disks, and gives changed files to every reader.
A run must end bit for bit like an undisturbed one. An input must be used correctly or refused in one sentence.
Nothing failed in the last runs, whose figures follow.
"""
REFUSED = "refused in one sentence"
INPUTS = {"Inputs": ("inputs tried", REFUSED), "Changed files": ("changed files tried", "changed files refused")}


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


def make_input_rows(figures: dict[str, float], tried: str, refused: str) -> list[tuple]:
    "Return a row of name and counts for each kind of input, and one for all."
    names = [name.removeprefix(f"{tried}: ") for name in figures if name.startswith(f"{tried}: ")]
    rows = [(name, figures[f"{tried}: {name}"], figures[f"{refused}: {name}"]) for name in names]
    return [*rows, ("all", *(sum(row[k] for row in rows) for k in (1, 2)))]


def make_section(title: str, figures: dict[str, float]) -> str:
    "Return the Markdown of a group of figures."
    measured = f"{date.today()}, commit {describe_commit()}, {describe_machine()}."
    plain, tables = dict(figures), ""
    if title in INPUTS:
        tables = make_table(("input", "tried", REFUSED), make_input_rows(figures, *INPUTS[title]))
        plain = {name: n for name, n in figures.items() if not name.startswith(INPUTS[title])}
    if plain:
        tables = "\n".join(filter(None, (tables, make_table(("what", "times"), list(plain.items())))))
    return f"{measured}\n\n{tables}"


def read_sections(page: str) -> dict[str, str]:
    "Return the groups of a page by their titles; those of a page with one date have that date."
    head, *parts = page.split("\n## ")
    date_line = head.strip().splitlines()[-1] if parts else ""
    sections = {}
    for part in parts:
        title, _, text = part.partition("\n\n")
        has_date = text.split("\n")[0].endswith(".")
        sections[title] = text.strip() + "\n" if has_date else f"{date_line}\n\n{text.strip()}\n"
    return sections


def make_page(figures: dict[str, float], page: str = "") -> str:
    "Return the Markdown of the figures, in groups; groups of `page` that were not measured stay."
    sections, left = read_sections(page), dict(figures)
    for title, words in {**GROUPS, "Other": ("",)}.items():
        found = {name: left.pop(name) for name in list(left) if any(word in name for word in words)}
        if found:
            sections[title] = make_section(title, found)
    order = [title for title in (*GROUPS, "Other") if title in sections]
    return "\n".join([ABOUT, *(f"## {title}\n\n{sections[title]}" for title in order)])


if __name__ == "__main__":
    figures = defaultdict(int)
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        what, n = json.loads(line)
        figures[what] += n
    file = HERE / "stress.md"
    page = make_page(figures, file.read_text(encoding="utf-8") if file.is_file() else "")
    file.write_text(page, encoding="utf-8")
    print(page)
