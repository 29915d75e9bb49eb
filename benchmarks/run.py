"""All benchmarks with one command, as ratios to the plain eager way, into benchmarks/RESULTS.md.

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

PARTS = ("objective", "attention", "step", "input", "evaluation")
HERE = Path(__file__).parent


def processor():
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def machine():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}, {gpu}; torch {torch.__version__}, Python {platform.python_version()}"


def line(r):
    memory = (
        f"{r['memory'][0]:,.1f} → {r['memory'][1]:,.1f} (1/{r['memory'][0] / r['memory'][1]:.1f})"
        if r.get("memory")
        else ""
    )
    return f"| {r['what']} | {r['baseline']:.4g} {r['unit']} | {r['ours']:.4g} {r['unit']} | **{r['ratio']:.1f}** ({r['low']:.1f} … {r['high']:.1f}) | {memory} |"


def on_gpu(repeats):
    "The table of absolute numbers, and what the time is made of; the same table without figures where there is no GPU."
    tasks = [
        (task, incremental, compile)
        for task in full_size.TASKS
        for incremental in (False, True)
        for compile in (False, True)
    ]
    if not torch.cuda.is_available():
        rows = [
            f"| {task} | {'incremental' if incremental else 'base'} | 16 | {'yes' if compile else 'no'} |  |  |  |  |  |"
            for task, incremental, compile in tasks
        ]
        return (
            "No GPU was at hand: nothing below was measured, and nothing is guessed. The same command fills the rows on a machine that has one.\n\n"
            + full_size.HEAD
            + "\n".join(rows)
        )
    rows = [
        full_size.line(full_size.absolute(task, incremental, 16, repeats, compile))
        for task, incremental, compile in tasks
    ]
    for task, (n_base, n_new) in full_size.TASKS.items():
        batch = full_size.largest_batch(n_base, n_new, True)
        rows.append(full_size.line(full_size.absolute(task, True, batch, repeats)))
    profiles = [
        f"### {task}, incremental, batch 16\n\n```\n{full_size.profile_table(task, 16)}\n```"
        for task in full_size.TASKS
    ]
    return (
        full_size.HEAD
        + "\n".join(rows)
        + "\n\nBytes are counted as if every operation went to memory.\n\n"
        + "\n\n".join(profiles)
    )


TEXT = """# Benchmarks

Measured by `python benchmarks/run.py` on {date} at commit {commit}: {machine}.

Medians of {repeats} rounds in one process, in which the plain and the fast way take turns; the ratio is that of each round, with the lowest and the highest.
On a CPU times are processor time, so that other programs on the machine change little.
Plain is `benchmarks/plain.py`: the formulas of the method written down one by one in eager PyTorch (float32, explicit attention, all tensors at full size);
all ways in float32 give the same numbers, or the command fails; bf16 is not held to that. Memory is the most that the tensors of one call take at once, in MiB, plain → ours.

| what | plain | ours | × faster | memory, MiB |
|---|---:|---:|---:|---:|
{rows}

A step in bf16 rounds more than float32, so it is not what a CPU does unless asked:
of the teacher alone (`training.teacher_precision=bf16`) or of both networks (`training.cpu_precision=bf16`). On a GPU bf16 is the default of both.

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
            rows.append(line(r))
            print(rows[-1], flush=True)
    facts = dict(
        date=datetime.date.today().isoformat(),
        commit=_read_git_commit() or "unknown",
        machine=machine(),
        repeats=options.repeats,
    )
    options.out.write_text(TEXT.format(rows="\n".join(rows), gpu=on_gpu(options.repeats), **facts), encoding="utf-8")


if __name__ == "__main__":
    main()
