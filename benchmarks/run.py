"""Run all benchmarks and write their ratios to plain eager PyTorch into benchmarks/RESULTS.md.

OMP_NUM_THREADS=1 python benchmarks/run.py [--repeats 3] [--only objective attention …] [--out FILE]
"""

import argparse
import datetime
import importlib
import os
import platform
import re
from pathlib import Path

import full_size
import torch

from mbs.run import _read_git_commit

PARTS = ("objective", "attention", "step", "input", "evaluation", "identity")
HERE = Path(__file__).parent


def _name_processor():
    "Return the name of the CPU."
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe_machine():
    "Describe processor, threads, GPU and versions in one line."
    n_threads = torch.get_num_threads()
    parts = [
        _name_processor(),
        f"{os.cpu_count()} cores",
        f"{n_threads} thread{'s' * (n_threads > 1)}",
        torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
    ]
    return f"{', '.join(parts)}; torch {torch.__version__}, Python {platform.python_version()}"


def _format_row(r):
    "Format a row of results as a line of a Markdown table."
    memory = ""
    if r.get("memory"):
        baseline, ours = r["memory"]
        memory = f"{baseline:,.1f} → {ours:,.1f} (1/{baseline / ours:.1f})"
    cells = [
        r["what"],
        f"{r['baseline']:.4g} {r['unit']}",
        f"{r['ours']:.4g} {r['unit']}",
        f"**{r['ratio']:.1f}** ({r['low']:.1f} … {r['high']:.1f})",
        memory,
    ]
    return f"| {' | '.join(cells)} |"


NO_GPU = """No GPU was available: nothing below was measured, and nothing is guessed. \
The same command fills the rows on a machine that has one.

"""


def _list_tasks():
    "List task, incremental or base step, compiled or not, of the table on a GPU."
    flags = (False, True)
    return [(task, incremental, compile) for task in full_size.TASKS for incremental in flags for compile in flags]


def _make_empty_rows():
    "Make the rows of the table on a GPU without numbers."
    return [
        f"| {task} | {'incremental' if incremental else 'base'} | 16 | {'yes' if compile else 'no'} |  |  |  |  |  |"
        for task, incremental, compile in _list_tasks()
    ]


def _measure_gpu(repeats):
    "Measure the absolute numbers and profiles on a GPU; without one, return the table with empty rows."
    if not torch.cuda.is_available():
        return NO_GPU + full_size.HEAD + "\n".join(_make_empty_rows())
    rows = [
        full_size.line(full_size.absolute(task, incremental, 16, repeats, compile))
        for task, incremental, compile in _list_tasks()
    ]
    for task, (n_base, n_new) in full_size.TASKS.items():
        batch = full_size.largest_batch(n_base, n_new, True)
        rows.append(full_size.line(full_size.absolute(task, True, batch, repeats)))
    profiles = [
        f"### {task}, incremental, batch 16\n\n```\n{full_size.profile_table(task, 16)}\n```"
        for task in full_size.TASKS
    ]
    counted = "Bytes are counted as if every operation went to memory."
    return "\n\n".join([full_size.HEAD + "\n".join(rows), counted, *profiles])


TEXT = """# Benchmarks

Measured by `python benchmarks/run.py` on {date} at commit {commit}: {machine}.

Medians of {repeats} rounds in one process, in which the plain and the fast implementation take turns. The ratio is the
median over the rounds, with the lowest and the highest in brackets. On a CPU, times are processor time, which other
programs on the machine hardly change.
Plain is `benchmarks/plain.py`: the formulas of the method one by one in eager PyTorch (float32, explicit attention, all
tensors at full size). All float32 implementations give the same numbers, or the command fails; bf16 is exempt. Memory
is the peak of the tensors of one call, in MiB, plain → ours.
The gain of the evaluation depends on the patch logits, because on a CPU only the channels that can win are upsampled:
those of the run that comes with `mbs` on generated scenes, regions with a clear winner each, and noise.

| what | plain | ours | × faster | memory, MiB |
|---|---:|---:|---:|---:|
{rows}

bf16 rounds more than float32, so on a CPU it is off by default; it can be chosen for the teacher only
(`training.teacher_precision=bf16`) or for both networks (`training.cpu_precision=bf16`). On a GPU, bf16 is the default
of both.

## On a GPU

{gpu}
"""


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args(words)
    rows = []
    for part in options.only:
        for r in importlib.import_module(part).measure(options.repeats):
            rows.append(_format_row(r))
            print(rows[-1], flush=True)
    facts = dict(
        date=datetime.date.today().isoformat(),
        commit=_read_git_commit() or "unknown",
        machine=describe_machine(),
        repeats=options.repeats,
    )
    text = TEXT.format(rows="\n".join(rows), gpu=_measure_gpu(options.repeats), **facts)
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
