"""Check and measure everything on a GPU, and write benchmarks/GPU.md; `make gpu` calls it.

    python benchmarks/gpu.py [PART]... [--rehearse]

The parts are those of `PARTS`. Each writes its result as soon as it has it, with the seconds it took, and a part that
fails leaves its reason and does not stop the others. `--rehearse` runs the same code at small sizes on a CPU and writes
outputs/GPU-rehearsal.md: its numbers mean nothing.
"""

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import full_size
import torch
from floor import make_floor
from interleaved import seconds
from run import HERE, describe_machine

from mbs.draws import Draws, choose_workers, iterate_batches
from mbs.evaluation import evaluate
from mbs.folders import home
from mbs.protocol import Protocol
from mbs.recipe import make_recipe
from mbs.run import _read_git_commit
from mbs.settings import Settings
from mbs.setup import Setup, make_accelerator, make_test_view, make_train_view


class Size(NamedTuple):
    "How large everything is."

    batch: int = 16
    side: int = 512  # pixels
    network: dict = {}  # changes of the ViT-B/16
    repeats: int = 5
    pictures: int = 128  # of the generated scenes that are read, trained on and tested
    iterations: int = 100  # of the run by papermill, in the base step


FULL = Size()
SMALL = Size(batch=2, side=64, network=dict(embed_dim=32, depth=1, num_heads=2), repeats=2, pictures=8, iterations=10)


def check(size: Size) -> str:
    "Run the tests of the GPU path: tests/test_gpu.py, and that no iteration waits for the GPU."
    environment = os.environ | ({"MBS_REHEARSE": "1"} if size is SMALL else {})
    tests = ["tests/test_gpu.py", "tests/test_step.py", "-k", "test_gpu or wait_for_the_gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent)
    text = "\n".join(done.stdout.strip().splitlines()[-25:])
    if done.returncode:
        raise AssertionError(f"tests failed:\n{text}")
    return f"```\n{text}\n```"


def measure_steps(size: Size) -> str:
    "Measure an iteration of both steps at 21 and 151 classes, uncompiled and compiled."
    rows = []
    for compile in (False, True):
        for task in full_size.TASKS:
            for incremental in (False, True):
                options = dict(side=size.side, **size.network)
                r = full_size.absolute(task, incremental, size.batch, size.repeats, compile, **options)
                rows.append(full_size.line(r))
    counted = "Bytes are counted as if every operation went to memory."
    return full_size.HEAD + "\n".join(rows) + f"\n\n{counted}"


def measure_floor(size: Size) -> str:
    "Measure the products of an iteration alone, and how many times as long the whole iteration takes."
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    rows = []
    for task, (n_base, n_new) in full_size.TASKS.items():
        given = n_base, n_new, True, size.batch
        options = dict(side=size.side, **size.network)
        whole = full_size.iteration(*given, **options)
        floor = make_floor(whole, dtype)
        floor()
        times = {"floor": floor, "eager": whole, "compiled": full_size.iteration(*given, compile=True, **options)}
        times["compiled"](), times["compiled"]()
        spent = {name: [] for name in times}
        for _ in range(size.repeats):  # in turns
            for name, way in times.items():
                spent[name].append(seconds(way))
        middle = {name: statistics.median(values) for name, values in spent.items()}
        ratios = [f"{middle[name] / middle['floor']:.2f}" for name in ("eager", "compiled")]
        rows.append(f"| {task} | {1000 * middle['floor']:.1f} | {' | '.join(ratios)} |")
    head = "| incremental step of | floor, ms | eager, × the floor | compiled, × the floor |\n|---|---:|---:|---:|\n"
    return head + "\n".join(rows)


def measure_shares(size: Size) -> str:
    "Measure what reading and testing pictures costs beside training, with generated scenes as large as the crops."
    scenes = dict(n_train=size.pictures, n_test=size.pictures, size=size.side)
    setup = Setup(Settings(protocol="5-1", scenes=scenes, training=dict(crop=size.side, batch=size.batch)))
    device = make_accelerator(setup.recipe).device
    iteration = full_size.iteration(8, 1, True, size.batch, side=size.side, **size.network)
    model = iteration.model
    step = Protocol("7-1", 8)[1]
    normalisation = setup.normalisation(setup.model())
    view = make_train_view(setup.train, step, normalisation, setup.recipe, range(size.pictures))
    n = max(2, size.pictures // size.batch)
    batches = iterate_batches(Draws(view, size.batch), range(4 * n), choose_workers(512), device)
    next(batches)  # the workers have started
    read = seconds(lambda: [next(batches) for _ in range(2 * n)]) / (2 * n)
    batches.close()
    trained = statistics.median(seconds(iteration) for _ in range(size.repeats))
    test = make_test_view(setup.test, step, normalisation, setup.recipe)
    tested = seconds(lambda: evaluate(model, test, size.batch, device=device)) / size.pictures
    pictures, epochs, tests = 500, make_recipe().epochs, 1449
    share = tests * tested / (pictures * epochs * trained / size.batch)
    rows = [
        f"| train a batch of {size.batch} | {1000 * trained:.1f} ms |",
        f"| read and augment a batch, {choose_workers(512)} workers | {1000 * read:.1f} ms |",
        f"| read, segment and count a test picture | {1000 * tested:.2f} ms |",
        f"| test of {tests} pictures ÷ training of {pictures} pictures for {epochs} epochs | {share:.2f} |",
    ]
    return "| | |\n|---|---:|\n" + "\n".join(rows)


def list_kernels(size: Size) -> str:
    "List the ten kernels that take most of an incremental iteration at 21 and at 151 classes."
    options = dict(side=size.side, **size.network)
    tables = [f"{task}\n\n```\n{full_size.profile_table(task, size.batch, **options)}\n```" for task in full_size.TASKS]
    return "\n\n".join(tables)


def run_papermill(size: Size) -> str:
    "Run the demo's first method by papermill, and measure the time to its first iterations and to its end."
    words = [f"training.iterations={size.iterations}", f"training.new_iterations={size.iterations}", "protocol=7-1"]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-m", "mbs", "--home", folder, "run", "demo", "name=papermill", *words]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        log = Path(folder, "outputs/papermill/log.jsonl")
        while process.poll() is None and not log.is_file():
            time.sleep(0.05)
        first = time.perf_counter() - began
        reason = process.communicate()[1]
        if process.returncode:
            raise AssertionError(f"mbs run failed with exit code {process.returncode}: {reason[-2000:]}")
        whole = time.perf_counter() - began
    return f"First ten iterations after {first:.1f} s, both steps and tests after {whole:.1f} s."


PARTS = dict(
    tests=check,
    floor=measure_floor,
    shares=measure_shares,
    papermill=run_papermill,
    kernels=list_kernels,
    steps=measure_steps,
)


def write(path: Path, found: dict[str, tuple[str, float]], note: str):
    "Write what is known so far."
    head = (
        f"# On a GPU\n\n{note}Measured by `make gpu` on {datetime.date.today().isoformat()} at commit "
        f"{_read_git_commit() or 'unknown'}: {describe_machine()}.\n"
    )
    parts = [
        f"## {name}\n\n{PARTS[name].__doc__}\n\n{text}\n\n{spent:.0f} s\n" for name, (text, spent) in found.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *parts]), encoding="utf-8")


def main(words=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[*PARTS, []], default=[], help="all by default")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    if not torch.cuda.is_available() and not given.rehearse:
        print("make gpu needs a GPU: expected one that torch can use; `make gpu REHEARSE=1` tries the code without one")
        return 2
    size = SMALL if given.rehearse else FULL
    path = given.out or (home("outputs/GPU-rehearsal.md") if given.rehearse else HERE / "GPU.md")
    note = "A rehearsal at small sizes: the numbers mean nothing.\n\n" if given.rehearse else ""
    found, failed = {}, []
    for name in given.parts or PARTS:
        began = time.perf_counter()
        try:
            text = PARTS[name](size)
        except Exception:  # the other parts may still say something
            failed.append(name)
            text = f"```\n{traceback.format_exc()}\n```"
        found[name] = text, time.perf_counter() - began
        print(f"{name}: {'failed' if name in failed else 'done'} after {found[name][1]:.0f} s", flush=True)
        write(path, found, note)
    print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
