"""Measure what a move of τ costs in the pseudo-label explorer with all its panels.

Measured are the time in the kernel, and the time to the changed picture in Chromium under JupyterLab.

python benchmarks/explorer.py [--side 512] [--classes 21 151] [--repeats 30] [--runs 2] [--kernel]
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from mbs.explore.evidence import RUN_PREDICTOR, Evidence
from mbs.explore.explorers import ShiftExplorer
from mbs.explore.states import Pictures, ShiftState
from mbs.methods import Method
from mbs.protocol import Protocol
from mbs.run import Sample

PATCH = 16
TARGETS = {"kernel": (20, 20), "picture": (100, 200), "first": (3, 3)}  # ms, ms, s; 512 pixels; 21 classes and more
TARGET_OF_TWO = 120  # ms to the picture, for two runs of 21 classes
RUN_FIRST_CELL = """() => {
    window.jupyterapp.shell.currentWidget.content.activeCellIndex = 0;
    window.jupyterapp.commands.execute('notebook:run-cell-and-select-next') }"""
FIRST_CELL_DONE = """() => {
    const notebook = window.jupyterapp.shell.currentWidget;
    const isIdle = notebook.sessionContext.session.kernel.status === 'idle';
    return notebook.content.widgets[0].model.executionCount && isIdle }"""
TIME_FIRST_PICTURE = """() => new Promise((done) => {
    const start = performance.now();
    window.jupyterapp.commands.execute('notebook:run-cell-and-select-next');
    const look = () => {
        if (document.querySelector('.mbs-explore')?.dataset.drawn) done(performance.now() - start);
        else requestAnimationFrame(look); };
    look(); })"""
TIME_NEXT_KEY = """() => {
    const roots = [...document.querySelectorAll('.mbs-explore')];
    const before = roots.map((root) => root.dataset.drawn);
    window.moved = new Promise((done) => {
        const measure = () => {
            const start = performance.now();
            const look = () => {
                if (roots.every((root, i) => root.dataset.drawn !== before[i])) done(performance.now() - start);
                else requestAnimationFrame(look); };
            look(); };
        document.addEventListener('keydown', measure, { once: true, capture: true }); }) }"""


class BlobPictures(Pictures):
    "Pictures with blobs of all classes, and the noisy evidence of two models: no network, no data."

    def __init__(self, n_classes, side, n_pictures=4, seed=0):
        names = ["background", *(f"class {c}" for c in range(1, n_classes))]
        n_new = max(1, n_classes // 20)
        self.run = SimpleNamespace(
            folder=Path("blobs"),
            names=names,
            card=SimpleNamespace(parts=Method("mbs").parts, normalisation=None),
            protocol=Protocol(f"{n_classes - 1 - 2 * n_new}-{n_new}", n_classes - 1),
            n_steps=3,
            settings=SimpleNamespace(method="mbs", protocol=str(n_classes), setting_and_shots="overlapped"),
        )
        self.n_steps = 3
        self.is_own = True
        self.seed = seed  # of the noise
        self.samples = [draw_sample(i, n_classes, side) for i in range(n_pictures)]
        self.known = {(step, i): self.make_evidence(step, i) for step in range(3) for i in range(n_pictures)}

    def get_evidence(self, step, index, predictor=RUN_PREDICTOR):
        return self.known[step, index]

    def make_evidence(self, step, index):
        "Make evidence from the truth and noise, for the channels of `step`."
        n, pixels = self.run.protocol[step].n_channels, self.samples[index].truth.shape
        side = pixels[0] // PATCH
        centres = torch.from_numpy(self.samples[index].truth[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].astype(int))
        truth = F.one_hot(centres, len(self.run.names)).permute(2, 0, 1)[:n]
        noise = torch.from_numpy(np.random.default_rng([self.seed, step, index]).standard_normal((n, side, side)))
        logits = (5 * truth + noise).float()
        probability = F.interpolate(logits[None], size=pixels, mode="bilinear").softmax(1)[0]
        confidence, best = probability.max(0)
        doubt = probability[0] < probability[1:].sum(0)
        return Evidence(confidence.numpy(), best.numpy().astype(np.uint8), doubt.numpy(), logits.numpy(), {}, PATCH)


def draw_blobs(seed, n, background, side):
    "(n, side, side) smooth noise; `background` is added to the first."
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((1, n, 9, 9)))
    noise[:, 0] += background
    return F.interpolate(noise, size=(side, side), mode="bicubic")[0].numpy()


def draw_sample(seed, n_classes, side):
    "Draw a photo and its truth."
    truth = draw_blobs(seed, n_classes, 1.3, side).argmax(0).astype(np.uint8)
    grain = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8) // 4
    colours = (draw_blobs(seed, 3, 1, side) * 40 + 90).clip(0, 190).astype(np.uint8).transpose(1, 2, 0)
    return Sample(grain + colours, truth, [])


def make_explorer(n_classes, side, n_runs=1):
    states = [ShiftState(BlobPictures(n_classes, side, seed=seed), step=1) for seed in range(n_runs)]
    return ShiftExplorer(states, side, None)


def measure_kernel(n_classes, side, n_runs, repeats):
    "Return milliseconds of each move of τ with the view built, and seconds to build what the front end gets."
    explorer = make_explorer(n_classes, side, n_runs)
    start = time.perf_counter()
    explorer._repr_mimebundle_()
    first = time.perf_counter() - start
    assert explorer.view is not None
    moves = []
    for tau in np.linspace(0.2, 0.9, repeats + 3):
        start = time.perf_counter()
        explorer.state.tau = round(float(tau), 3)
        moves.append(1000 * (time.perf_counter() - start))
    assert sum(explorer.state.counts.values()) == 2 * side**2
    return moves[3:], first


def write_notebook(n_classes, side, n_runs):
    "Write a notebook whose second cell shows the explorer; return its path."
    import nbformat

    here = str(Path(__file__).resolve().parent)
    imports = f"import sys; sys.path.insert(0, {here!r})\nfrom explorer import make_explorer"
    kernel = dict(display_name="python3", language="python", name="python3")
    notebook = nbformat.v4.new_notebook(metadata=dict(kernelspec=kernel))
    notebook.cells = [
        nbformat.v4.new_code_cell(f"{imports}\nex = make_explorer({n_classes}, {side}, {n_runs})"),
        nbformat.v4.new_code_cell("ex"),
    ]
    path = Path(tempfile.mkdtemp()) / f"blobs-{n_classes}.ipynb"
    nbformat.write(notebook, path)
    return path


def measure_browser(page, lab, n_classes, side, n_runs, repeats):
    "Return milliseconds from the key to the changed picture, and seconds from running the cell to the first picture."
    from browser import open_notebook

    open_notebook(page, lab, write_notebook(n_classes, side, n_runs), run=False)
    page.evaluate(RUN_FIRST_CELL)
    page.wait_for_function(FIRST_CELL_DONE)
    first = page.evaluate(TIME_FIRST_PICTURE) / 1000
    page.wait_for_timeout(1000)
    page.locator(".noUi-handle").first.focus()
    moves = []
    for _ in range(repeats + 3):
        page.evaluate(TIME_NEXT_KEY)
        page.keyboard.press("ArrowLeft")
        moves.append(page.evaluate("() => window.moved"))
        page.wait_for_timeout(60)
    assert page.external == [] and page.errors == []
    return moves[3:], first


def measure_pictures(classes, side, n_runs, repeats):
    "Measure each number of classes in a browser."
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from browser import browser, jupyter_lab, page_of

    measured = {}
    with jupyter_lab(Path(tempfile.mkdtemp())) as lab, browser() as chrome:
        for n in classes:
            with page_of(chrome, 1200) as page:
                measured[n] = measure_browser(page, lab, n, side, n_runs, repeats)
    return measured


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="of the pictures, pixels")
    parser.add_argument("--classes", type=int, nargs="+", default=[21, 151], help="background included")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--runs", type=int, default=1, choices=(1, 2), help="side by side")
    parser.add_argument("--kernel", action="store_true", help="leave the browser out")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    measured = f"{options.runs} runs, median (max) of {options.repeats} moves of τ, {threads} threads"
    print(f"{options.side} × {options.side} pixels, all panels; {measured}")
    print("| classes | kernel, ms | to the picture, ms | first view, s | of it in the kernel, s |")
    print("|---:|---:|---:|---:|---:|")
    kernel = {n: measure_kernel(n, options.side, options.runs, options.repeats) for n in options.classes}
    if options.kernel:
        browser = dict.fromkeys(options.classes, ((float("nan"),), float("nan")))
    else:
        browser = measure_pictures(options.classes, options.side, options.runs, options.repeats)
    for n, (moves, built) in kernel.items():
        pictures, first = browser[n]
        in_kernel = f"{statistics.median(moves):.1f} ({max(moves):.1f})"
        in_browser = f"{statistics.median(pictures):.0f} ({max(pictures):.0f})"
        print(f"| {n} | {in_kernel} | {in_browser} | {first:.2f} | {built:.2f} |")
    targets = [f"{name} < {a} at 21, < {b} above" for name, (a, b) in TARGETS.items()]
    print("targets of one run: " + ", ".join(targets) + f"; of two: picture < {TARGET_OF_TWO} at 21")


if __name__ == "__main__":
    main()
