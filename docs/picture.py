"""Draw the picture of background shift on the front page from the runs of the demo.

Run `make demo picture`, or `mbs demo` and then `python docs/picture.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from mbs import load_run
from mbs.folders import home
from mbs.viz import draw_class_legend, make_grid, overlay, show_picture

METHODS = "finetune", "kd", "mbs"
OUT = Path(__file__).parent / "images/background_shift.png"


def draw_picture(runs, n=2):
    "Draw the `n` test pictures with the most classes: ground truth, labels of each step, last prediction of each run."
    steps, names = len(runs[0].iterations), runs[0].names
    fig, axes = make_grid(n, 2 + steps + len(runs), 1.3)
    shown = []
    for k, row in enumerate(axes):
        photo, truth, _ = runs[0].samples()[k]
        labels = [np.where(np.isin(truth, list(runs[0].protocol[t].new_channels)), truth, 0) for t in range(steps)]
        predicted = [run.samples()[k].predictions[-1] for run in runs]
        titles = [
            "photo",
            "everything in it",
            *(f"labels of step {t}" for t in range(steps)),
            *(f"in the end:\n{run.settings.method}" for run in runs),
        ]
        pictures = [photo, *(overlay(photo, mask) for mask in [truth, *labels, *predicted])]
        for ax, content, title in zip(row, pictures, titles):
            show_picture(ax, content, "" if k else title)
        shown += [truth, *predicted]
    draw_class_legend(fig, shown, names)
    return fig


if __name__ == "__main__":
    fig = draw_picture([load_run(home("outputs", f"demo-{m}-s0")) for m in METHODS])
    fig.savefig(OUT, dpi=110, facecolor="white")
    plt.close(fig)
    Image.open(OUT).convert("RGB").quantize(256).save(OUT, optimize=True)  # reduces the file to a third
    print(f"{OUT}: {OUT.stat().st_size} bytes")
