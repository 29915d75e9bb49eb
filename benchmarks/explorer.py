"""What a move of τ costs in the pseudo-label explorer at 512 × 512 pixels with its whole layout: in the kernel, and to the changed picture in Chromium under JupyterLab.

python benchmarks/explorer.py [--classes 21 151] [--repeats 30] [--kernel]
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

from mbs.explore import Evidence, Pictures, ShiftExplorer, ShiftState
from mbs.methods import Method
from mbs.protocol import Protocol

SIDE, PATCH = 512, 16
TARGETS = {"kernel": (20, 20), "picture": (100, 200), "first": (3, 3)}  # ms, ms, s; at 21 classes and at more


class Blobs(Pictures):
    "Pictures with blobs of all classes, and two models that see them through a veil: no network, no data."

    def __init__(self, n_classes, n_pictures=4):
        def names():
            return ["background", *(f"class {c}" for c in range(1, n_classes))]

        new = max(1, n_classes // 20)
        protocol = Protocol(f"{n_classes - 1 - 2 * new}-{new}", n_classes - 1)
        card = dict(parts=vars(Method("mbs").parts), normalisation=None, names=names())
        self.run = SimpleNamespace(
            folder=Path("blobs"),
            names=names(),
            card=card,
            protocol=protocol,
            n_steps=3,
            settings=SimpleNamespace(method="mbs", protocol=str(n_classes), setting="overlapped"),
        )
        self.n_steps, self.own, self.items = 3, True, []
        for i in range(n_pictures):
            field = blobs(i, n_classes, 1.3)
            photo = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) // 4 + (
                blobs(i, 3, 1) * 40 + 90
            ).clip(0, 190).astype(np.uint8).transpose(1, 2, 0)
            self.items.append((photo, field.argmax(0).astype(np.uint8), []))
        self.known = {(t, i): self.seen(t, i) for t in range(3) for i in range(n_pictures)}

    def evidence(self, step, i):
        return self.known[step, i]

    def seen(self, step, i):
        n = self.run.protocol[step].n_channels
        side = SIDE // PATCH
        truth = F.one_hot(
            torch.from_numpy(self.items[i][1][PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].astype(int)),
            len(self.run.names),
        ).permute(2, 0, 1)[:n]
        logits = 5 * truth + torch.from_numpy(np.random.default_rng(100 * step + i).standard_normal((n, side, side)))
        p = F.interpolate(logits[None].float(), size=(SIDE, SIDE), mode="bilinear").softmax(1)[0]
        confidence, best = p.max(0)
        return Evidence(
            confidence.numpy(),
            best.numpy().astype(np.uint8),
            (p[0] < p[1:].sum(0)).numpy(),
            logits.float().numpy(),
            {},
            PATCH,
        )


def blobs(seed, n, background):
    "(n, SIDE, SIDE) smooth noise, the first one lifted."
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((1, n, 9, 9)))
    noise[:, 0] += background
    return F.interpolate(noise, size=(SIDE, SIDE), mode="bicubic")[0].numpy()


def explorer(n_classes):
    return ShiftExplorer([ShiftState(Blobs(n_classes), step=1)], SIDE, None)


def in_kernel(n_classes, repeats):
    "Milliseconds of each move of τ with the view built, and seconds to build what the front end gets."
    shown = explorer(n_classes)
    start = time.perf_counter()
    shown._repr_mimebundle_()
    first = time.perf_counter() - start
    assert shown.view is not None
    spent = []
    for tau in np.linspace(0.2, 0.9, repeats + 3):
        start = time.perf_counter()
        shown.state.tau = round(float(tau), 3)
        spent.append(1000 * (time.perf_counter() - start))
    assert sum(shown.state.counts.values()) == 2 * SIDE**2
    return spent[3:], first


def in_browser(page, lab, n_classes, repeats):
    "Milliseconds from the key to the changed picture, and seconds from running the cell to the first picture."
    import nbformat
    from browser import open_notebook

    here = str(Path(__file__).resolve().parent)
    notebook = nbformat.v4.new_notebook(
        metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    )
    notebook.cells = [
        nbformat.v4.new_code_cell(
            f"import sys; sys.path.insert(0, {here!r})\nfrom explorer import explorer\nex = explorer({n_classes})"
        ),
        nbformat.v4.new_code_cell("ex"),
    ]
    path = Path(tempfile.mkdtemp()) / f"blobs-{n_classes}.ipynb"
    nbformat.write(notebook, path)
    open_notebook(page, lab, path, run=False)
    page.evaluate(
        "() => { const w = window.jupyterapp.shell.currentWidget.content; w.activeCellIndex = 0; window.jupyterapp.commands.execute('notebook:run-cell-and-select-next') }"
    )
    page.wait_for_function("""() => { const w = window.jupyterapp.shell.currentWidget;
        return w.content.widgets[0].model.executionCount && w.sessionContext.session.kernel.status === 'idle' }""")
    first = (
        page.evaluate("""() => new Promise((done) => { const start = performance.now();
        window.jupyterapp.commands.execute('notebook:run-cell-and-select-next');
        const look = () => (document.querySelector('.mbs-explore')?.dataset.drawn ? done(performance.now() - start) : requestAnimationFrame(look)); look(); })""")
        / 1000
    )
    page.wait_for_timeout(1000)
    handle = page.locator(".noUi-handle").first
    handle.focus()
    spent = []
    for _ in range(repeats + 3):
        page.evaluate("""() => { const root = document.querySelector('.mbs-explore'), before = root.dataset.drawn; window.moved = new Promise((done) => {
            const timed = () => { const start = performance.now();
                const look = () => (root.dataset.drawn !== before ? done(performance.now() - start) : requestAnimationFrame(look)); look(); };
            document.addEventListener('keydown', timed, { once: true, capture: true }); }) }""")
        page.keyboard.press("ArrowLeft")
        spent.append(page.evaluate("() => window.moved"))
        page.wait_for_timeout(60)
    assert page.external == [] and page.errors == []
    return spent[3:], first


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[21, 151], help="background included")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--kernel", action="store_true", help="leave the browser out")
    options = parser.parse_args()
    print(
        f"{SIDE} × {SIDE} pixels, all panels; median (max) of {options.repeats} moves of τ, {torch.get_num_threads()} threads"
    )
    print(
        "| classes | kernel, ms | to the picture, ms | first view, s | of it in the kernel, s |\n|---:|---:|---:|---:|---:|"
    )
    lines = {}
    for n in options.classes:
        lines[n] = in_kernel(n, options.repeats)
    if options.kernel:
        seen = dict.fromkeys(options.classes, ([float("nan")], float("nan")))
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
        from browser import browser, jupyter_lab, page_of

        seen = {}
        with jupyter_lab(Path(tempfile.mkdtemp())) as lab, browser() as chrome:
            for n in options.classes:
                with page_of(chrome, 1200) as page:
                    seen[n] = in_browser(page, lab, n, options.repeats)
    for n, (moves, built) in lines.items():
        pictures, first = seen[n]
        print(
            f"| {n} | {statistics.median(moves):.1f} ({max(moves):.1f}) | {statistics.median(pictures):.0f} ({max(pictures):.0f}) | {first:.2f} | {built:.2f} |"
        )
    print("targets: " + ", ".join(f"{name} < {a} at 21, < {b} above" for name, (a, b) in TARGETS.items()))


if __name__ == "__main__":
    main()
