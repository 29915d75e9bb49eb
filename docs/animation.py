"""Record the animation of the explorer on the front page from a run of the demo: τ moves, then a pixel is picked.

Run `make demo picture`. It needs a Chromium that playwright finds, or the system's."""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from mbs import explore_pseudo_labels, load_run
from mbs.folders import home

OUT = Path(__file__).parent / "images/explorer.gif"
WIDTH, HEIGHT = 1000, 660
THRESHOLDS = [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.8, 0.7]
PICKS = [(0.5, 0.5), (0.3, 0.45), (0.62, 0.3), (0.5, 0.72)]  # share of the width and height of a panel


def record_frames(page) -> list[Image.Image]:
    "Move τ and pick pixels on a live page; return a picture of each state."
    frames = []

    def shoot():
        page.wait_for_timeout(120)
        frames.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))

    for tau in THRESHOLDS:
        page.evaluate(
            """(tau) => {
                const slider = document.getElementById("tau");
                slider.value = Math.round(tau * 20);
                slider.dispatchEvent(new Event("input"));
            }""",
            tau,
        )
        shoot()
    panel = page.locator(".mbs-explore canvas").first.bounding_box()
    for x, y in PICKS:
        page.mouse.click(panel["x"] + x * panel["width"], panel["y"] + y * panel["height"])
        shoot()
    return frames


if __name__ == "__main__":
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        explorer = explore_pseudo_labels(load_run(home("outputs", "demo-mbs-s0")), step=1)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=WIDTH, height=HEIGHT), color_scheme="light")
        page.goto(explorer.to_html(Path(folder) / "page.html").as_uri())
        page.wait_for_function("() => document.body.dataset.ready === '1'")
        page.evaluate("() => document.querySelectorAll('h1, body > p').forEach((e) => e.remove())")
        frames = record_frames(page)
        browser.close()
    palette = frames[0].quantize(256, method=Image.Quantize.MAXCOVERAGE)  # keeps the rare colours of the legend
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(OUT, save_all=True, append_images=others, duration=350, loop=0, optimize=True)
    print(f"{OUT}: {OUT.stat().st_size} bytes")
