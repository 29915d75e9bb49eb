"""The explorers in a real JupyterLab and Chromium: input reaches the kernel, and the page draws what the kernel has.

Skipped where there is no Chromium, unless CI or MBS_BROWSER=1 is set: then they fail."""

import io
import json
import os
import re
import signal
import subprocess
from base64 import b64decode, b64encode
from importlib.util import find_spec

import numpy as np
import pytest
from browser import (
    DEMANDED,
    SEPARATE,
    browser,
    canvas_pixels,
    jupyter_lab,
    kernel,
    missing,
    open_notebook,
    page_of,
    voila,
)
from PIL import Image

from mbs.explore.explorers import (
    explore_class_tokens,
    explore_confusions,
    explore_features,
    explore_pseudo_labels,
)
from mbs.explore.test_set import ORDERS, explore_test_set
from mbs.explore.tour import write_app, write_tour
from mbs.lifeline import make_module_command

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
PANELS = ("truth", "view", "pseudo", "predicted", "flow", "weight")
DRAWN = "(n) => [...document.querySelectorAll('.mbs-explore')].filter((e) => e.dataset.drawn).length === n"


@pytest.fixture(scope="module")
def chrome():
    with browser() as one:
        yield one


@pytest.fixture(scope="module")
def tour(identified, runs, chrome, tmp_path_factory):
    "The guided tour of two runs, the first with an identity, open in JupyterLab, every cell run."
    notebook = write_tour([identified.folder, runs[1].folder], tmp_path_factory.mktemp("tour"))
    with jupyter_lab(tmp_path_factory.mktemp("lab")) as lab, page_of(chrome) as page:
        open_notebook(page, lab, notebook)
        try:
            page.wait_for_function(DRAWN, arg=5)  # one run, two side by side, features, a picture of one's own
            page.wait_for_function(
                """() => window.jupyterapp.shell.currentWidget.content.widgets
                .filter((c) => c.model.type === 'code').every((c) => c.model.executionCount)"""
            )
        except Exception:
            page.screenshot(path=notebook.with_name("failed.png"))
            raise
        yield page


@pytest.fixture
def shift(tour):
    "The first explorer of the tour, at the same state for each test."
    kernel(
        tour,
        """
from mbs.explore.paint import make_class_style
start = dict(step=1, tau=.5, alpha=.55, hidden=[], flow_filter=[], source='prediction', colour_by='class',
             order='as stored', index=0, pick=(20, 20), predictor='both')
for name, value in start.items():
    setattr(shift.state, name, value)""",
    )
    explorer = Explorer(tour, 0, "shift")
    explorer.settled()
    explorer.root.scroll_into_view_if_needed()
    yield explorer
    assert tour.external == [] and tour.errors == []


class Explorer:
    "One canvas of the page and the variable that it shows."

    def __init__(self, page, position, variable):
        self.page, self.variable, self.root = page, variable, page.locator(".mbs-explore").nth(position)

    def panel(self, name, names=PANELS):
        return self.root.locator("canvas").nth(names.index(name))

    def pixels(self, names=PANELS):
        return {name: canvas_pixels(self.panel(name, names)) for name in names}

    def kernel(self, expression):
        return json.loads(kernel(self.page, f"import json; print(json.dumps({expression}))"))

    def state(self, name):
        return self.kernel(f"{self.variable}.state.{name}")

    def settled(self):
        "Wait until the page shows what the kernel has."
        drawn = self.kernel(f"{self.variable}.describe_panels({self.variable}.state)['drawn']")
        self.page.wait_for_function(
            "([e, drawn]) => e.dataset.drawn === drawn", arg=[self.root.element_handle(), drawn]
        )
        lines = self.kernel(f"{self.variable}.describe_pixel({self.variable}.state)['lines']")
        self.page.wait_for_function(
            "([e, text]) => e.innerText.includes(text)", arg=[self.root.locator(".mbs-card").element_handle(), lines[0]]
        )
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def painted(self, labels, style="make_class_style(run.names)"):
        "(H, W, 3): the labels, an expression with m and s, as the package's `paint` draws them."
        text = kernel(
            self.page,
            f"""
import base64
from mbs.explore.paint import FLOW_STYLE, make_class_style, paint
e = {self.variable}.state; m, s = e.moment, e.shift
darkened = None if not e.flow_filter else ~__import__('numpy').isin(s.flow, e.flow_filter)
hidden = e.hidden if {style!r} != 'FLOW_STYLE' else []
painted = paint(m.photo, {labels}, {style}, e.alpha, hidden, darkened)
print(base64.b64encode(painted.tobytes()).decode(), m.photo.shape[0])""",
        )
        data, height = text.split()
        return np.frombuffer(b64decode(data), np.uint8).reshape(int(height), -1, 3)

    def shows(self):
        "Assert that every picture and every number on the page is the kernel's."
        self.settled()
        seen, painted = (
            self.pixels(),
            dict(truth="m.truth", view="m.step_labels", pseudo="s.pseudo_labels", predicted="m.prediction"),
        )
        for name, labels in painted.items():
            assert close(seen[name], self.painted(labels)), name
        assert close(seen["flow"], self.painted("s.flow", "FLOW_STYLE"))
        counts = {name.replace("->", " → "): f"{n:,}" for name, n in self.state("counts").items()}
        shown = self.root.locator(".mbs-tables tr").evaluate_all(
            "(rows) => rows.map((r) => [r.cells[0].innerText.trim(), r.cells[1].innerText])"
        )
        assert dict(shown) == counts and len(shown) == len(counts)
        assert sum(int(n.replace(",", "")) for _, n in shown) == 2 * self.kernel("shift.state.moment.truth.size")
        card = self.root.locator(".mbs-card").inner_text()
        assert all(
            line in card for line in self.kernel(f"{self.variable}.describe_pixel({self.variable}.state)['lines']")
        )


def close(a, b):
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1


def changed(before, after):
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_the_tour_runs_through(tour):
    outputs = tour.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.widgets
        .flatMap((c) => c.model.type === 'code' ? c.model.outputs.toJSON() : []).map((o) => o.output_type)"""
    )
    assert "error" not in outputs and len(outputs) >= 8
    assert tour.locator(".js-plotly-plot").count() == 2
    assert tour.external == [] and tour.errors == []


def test_drag_the_threshold(shift):
    shift.shows()
    before = shift.pixels()
    handle, track = shift.page.locator(".noUi-handle").first, shift.page.locator(".noUi-base").first
    handle.scroll_into_view_if_needed()
    h, t = handle.bounding_box(), track.bounding_box()
    shift.page.mouse.move(h["x"] + h["width"] / 2, h["y"] + h["height"] / 2)
    shift.page.mouse.down()
    shift.page.mouse.move(t["x"] + 0.1 * t["width"], h["y"] + h["height"] / 2, steps=12)
    shift.page.mouse.up()
    shift.page.wait_for_function("() => /τ = 0\\.[01]/.test(document.querySelector('.mbs-explore').innerText)")
    assert 0.05 <= shift.state("tau") <= 0.15
    shift.shows()
    assert "pseudo" in changed(before, shift.pixels()) <= {"pseudo", "weight"}, (
        "the prediction's flow, the truth and the labels do not depend on τ"
    )
    assert f"τ = {shift.state('tau'):.2f}" in shift.root.inner_text()


def test_click_a_patch(shift):
    before = shift.pixels()
    box = shift.panel("flow").bounding_box()
    shift.page.mouse.click(box["x"] + 0.35 * box["width"], box["y"] + 0.8 * box["height"])
    shift.root.locator(".mbs-card", has_text=re.compile(r"pixel \(3[12], 1[34]\)")).wait_for()
    y, x = shift.state("pick")
    assert y in (31, 32) and x in (13, 14)
    shift.shows()
    assert changed(before, shift.pixels()) == set()
    marks = shift.root.locator(".mbs-mark").evaluate_all("(all) => all.map((m) => [m.style.top, m.style.left])")
    assert len(marks) == 6 and set(map(tuple, marks)) == {
        (f"{100 * (y // 8 * 8) / 40:g}%", f"{100 * (x // 8 * 8) / 40:g}%")
    }
    bars = shift.root.locator(".mbs-bars .mbs-number").all_inner_texts()
    new = shift.kernel("shift.state.probabilities[1].tolist()")
    assert len(bars) == 6 and {b.split(" → ")[1] for b in bars} <= {f"{p:.2f}" for p in new}


def test_point_at_a_pixel(shift):
    box = shift.panel("truth").bounding_box()
    shift.page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    tip = shift.root.locator(".mbs-tip").inner_text()
    y, x = map(int, re.match(r"\((\d+), (\d+)\)", tip).groups())
    assert (
        f"truth: {shift.kernel(f'make_class_style(run.names).names[int(shift.state.moment.truth[{y}, {x}])]')}" in tip
    )


def test_keys(shift):
    cells = "() => window.jupyterapp.shell.currentWidget.content.widgets.map((c) => c.model.type).join()"
    before, kinds = shift.pixels(), shift.page.evaluate(cells)
    shift.panel("pseudo").focus()
    press = shift.page.keyboard.press
    press("ArrowRight")
    press("ArrowDown")
    shift.root.locator(".mbs-card", has_text="pixel (28, 28)").wait_for()
    press("]")
    shift.page.wait_for_function("() => document.querySelector('.mbs-explore').innerText.includes('τ = 0.51')")
    assert shift.state("tau") == 0.51
    for _ in range(6):
        press("[")
    shift.page.wait_for_function("() => document.querySelector('.mbs-explore').innerText.includes('τ = 0.45')")
    shift.shows()
    press("m")
    shift.settled()
    photo = shift.painted(
        "m.truth * 0", "make_class_style(run.names)._replace(colours=0 * make_class_style(run.names).colours)"
    )
    assert all(close(p, photo) for name, p in shift.pixels().items() if name != "weight"), "colours are off"
    press("m")
    press("1")
    shift.page.wait_for_function("() => document.querySelector('.mbs-chip').getAttribute('aria-pressed') === 'false'")
    assert shift.state("hidden") == [0]
    shift.shows()
    press("1")
    press("?")
    assert shift.root.get_by_text("Arrow keys: move the picked pixel").is_visible()
    press("?")
    index, ranking = shift.state("index"), shift.state("ranking")
    press("n")
    shift.page.wait_for_function(
        "(i) => document.querySelector('.mbs-explore').dataset.drawn.includes(`picture ${i + 1} of `)", arg=ranking[1]
    )
    shift.shows()
    assert {"truth", "pseudo", "predicted"} <= changed(before, shift.pixels())
    press("p")
    shift.page.wait_for_function(
        "(i) => document.querySelector('.mbs-explore').dataset.drawn.includes(`picture ${i + 1} of `)", arg=index
    )
    assert shift.page.evaluate(cells) == kinds, "a key was taken for a shortcut of JupyterLab"
    assert shift.page.evaluate("() => document.activeElement.tagName") == "CANVAS"


def test_switch_picture_and_step(shift):
    before = shift.pixels()
    shift.page.get_by_role("button", name="▶").first.click()
    shift.page.wait_for_function(
        "() => document.querySelector('.mbs-explore').dataset.drawn.startsWith('step 1, picture 2 of ')"
    )
    assert shift.state("index") == 1
    shift.shows()
    middle = shift.pixels()
    assert {"truth", "pseudo"} <= changed(before, middle)
    shift.page.locator(".widget-dropdown select").first.select_option("2")
    shift.page.wait_for_function(
        "() => document.querySelector('.mbs-explore').dataset.drawn.startsWith('step 2, picture 2 of ')"
    )
    assert shift.state("step") == 2 and "labels of step 2" in shift.root.inner_text()
    shift.shows()
    assert "truth" not in changed(middle, shift.pixels())


def test_switch_predictor(shift):
    shift.shows()
    before = shift.pixels()
    switch = shift.page.locator(".widget-dropdown", has_text="prediction by").first.locator("select")
    for name in ("network", "identity"):
        switch.select_option(name)
        shift.page.wait_for_function(
            "(name) => document.querySelector('.mbs-explore').dataset.drawn.includes(`, ${name} `)", arg=name
        )
        assert shift.state("predictor") == name
        shift.shows()
        assert changed(before, shift.pixels()) <= {"predicted", "flow"}
        assert f"prediction ({name}) after step 1" in shift.root.inner_text()
        assert shift.panel("predicted").get_attribute("aria-label").startswith(f"prediction ({name}) after step 1: ")
    assert "identity, given the foreground: " in shift.root.locator(".mbs-card").inner_text()
    switch.select_option("both")
    shift.page.wait_for_function("() => !document.querySelector('.mbs-explore').dataset.drawn.includes(', identity ')")
    shift.settled()
    assert changed(before, shift.pixels()) == set()


def test_filter_by_flow_and_class(shift):
    row = shift.root.locator(".mbs-tables button").first
    row.click()
    shift.page.wait_for_function(
        "() => document.querySelector('.mbs-tables button').getAttribute('aria-pressed') === 'true'"
    )
    assert shift.state("flow_filter") == [0]
    shift.shows()
    row.click()
    chip = shift.root.locator(".mbs-chip:not(.mbs-group)").first
    chip.click()
    shift.page.wait_for_function(
        "() => document.querySelector('.mbs-chip:not(.mbs-group)').getAttribute('aria-pressed') === 'false'"
    )
    assert len(shift.state("hidden")) == 1
    shift.shows()


def test_set_from_code(shift):
    kernel(shift.page, "shift.state.tau = .13; shift.state.source = 'pseudo-label'; shift.state.alpha = .9")
    shift.page.wait_for_function(
        "() => document.querySelector('.mbs-explore').innerText.includes('Error map for the pseudo-labels')"
    )
    shift.page.wait_for_function("() => document.querySelector('.mbs-explore').innerText.includes('τ = 0.13')")
    shift.shows()


def test_two_runs_move_together(tour):
    first, second = Explorer(tour, 1, "pair"), Explorer(tour, 2, "pair")
    second.root.scroll_into_view_if_needed()
    box = second.panel("truth").bounding_box()
    tour.mouse.click(box["x"] + 0.1 * box["width"], box["y"] + 0.1 * box["height"])
    for one in (first, second):
        one.root.locator(".mbs-card", has_text=re.compile(r"pixel \([34], [34]\)")).wait_for()
    tau = second.state("tau") + 0.01  # read before the key, which reaches the kernel later
    second.panel("truth").focus()
    tour.keyboard.press("]")
    for one in (first, second):
        one.root.get_by_text(f"pseudo-labels, τ = {tau:.2f}").wait_for()
    titles = [one.root.locator(".mbs-heading").inner_text() for one in (first, second)]
    assert titles[0].startswith("analytic") and titles[1].startswith("kd") and tour.external == []


def test_features_follow_the_pick(tour):
    names = ("truth", "teacher", "student", "distance", "cosine_teacher", "cosine_student")
    explorer = Explorer(tour, 3, "features")
    explorer.root.scroll_into_view_if_needed()
    before = explorer.pixels(names)
    box = explorer.panel("teacher", names).bounding_box()
    tour.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])
    explorer.root.locator(".mbs-card", has_text="patch (0, 4)").wait_for()
    explorer.settled()
    after = explorer.pixels(names)
    assert changed(before, after) == {"cosine_teacher", "cosine_student"}
    cosines = np.array(explorer.kernel("[c.tolist() for c in features.state.cosines]"))
    low, high = np.percentile(cosines, (2, 98))
    ramp = np.frombuffer(
        b64decode(
            kernel(
                tour,
                "import base64; print(base64.b64encode(features.describe_picture(features.state)['ramp']).decode())",
            )
        ),
        np.uint8,
    ).reshape(256, 3)
    for name, c in zip(names[4:], cosines):
        expected = ramp[(255 * ((c - low) / (high - low)).clip(0, 1)).round().astype(int)]
        assert close(after[name], expected.repeat(8, 0).repeat(8, 1)), name
    tour.get_by_role("button", name="encoder").first.click()
    tour.wait_for_function("() => document.querySelectorAll('.mbs-explore')[3].dataset.drawn.includes('encoder')")
    assert "teacher" in changed(after, explorer.pixels(names)) and tour.external == [] and tour.errors == []


def test_the_test_set_computes_while_it_is_seen_and_opens_a_picture(tour):
    grid, count = tour.locator(".mbs-grid"), tour.locator(".mbs-explore").count()
    grid.evaluate("(e) => e.scrollIntoView()")
    tour.wait_for_function("() => document.querySelector('.mbs-grid').dataset.left === '0'")
    wanted = json.loads(kernel(tour, "import json; print(json.dumps([r.position for r in test_set.state.choose()]))"))
    assert len(wanted) == 8
    pictures = grid.locator(".mbs-grid-picture")
    assert [int(p.get_attribute("data-position")) for p in pictures.all()] == wanted
    pictures.nth(1).click()
    tour.wait_for_function(DRAWN, arg=count + 1)
    opened = f"test_set.opened.state.moment.photo == test_set.state.pictures.data[{wanted[1]}][0]"
    assert kernel(tour, f"print(({opened}).all())").strip() == "True"
    kernel(tour, "test_set.below.children = (); test_set.opened.close()")
    tour.wait_for_function(DRAWN, arg=count)
    assert tour.external == [] and tour.errors == []


def test_a_dropped_picture_is_shown(shift, runs):
    "A file dropped on a panel replaces the test pictures; without a truth there are no panels of it."
    file = io.BytesIO()
    Image.fromarray(runs[0].samples()[1].photo).save(file, "PNG")
    data = shift.page.evaluate_handle(
        """(text) => { const data = new DataTransfer();
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        data.items.add(new File([bytes], 'dropped.png', { type: 'image/png' })); return data; }""",
        b64encode(file.getvalue()).decode(),
    )
    count = "(n) => document.querySelector('.mbs-explore').querySelectorAll('canvas').length === n"
    try:
        shift.root.dispatch_event("drop", dict(dataTransfer=data))
        shift.page.wait_for_function(count, arg=3)
        assert shift.kernel("shift.state.moment.photo.tolist()") == runs[0].samples()[1].photo.tolist()
    finally:
        kernel(shift.page, "shift.show_images(None)")
        shift.page.wait_for_function(count, arg=6)


def test_everything_has_a_name(tour):
    "For screen readers: every canvas, slider, button and list says what it is."
    labels = tour.locator(".mbs-explore canvas").evaluate_all("(all) => all.map((c) => c.getAttribute('aria-label'))")
    assert len(labels) == 27 and all(label and ":" in label for label in labels)
    nameless = tour.evaluate("""() => {
        const hasName = (e) => e.innerText.trim() || e.title || e.getAttribute('aria-label')
            || e.getAttribute('aria-labelledby') || e.labels?.length
            || e.closest('.widget-inline-hbox, .widget-box')?.querySelector('label, .widget-label')?.innerText.trim();
        const controls = '.jp-OutputArea-output :is(button, select, input, [role=slider])';
        return [...document.querySelectorAll(controls)]
            .filter((e) => e.offsetParent && !hasName(e)).map((e) => e.outerHTML.slice(0, 120)); }""")
    assert nameless == []


@pytest.fixture
def offline(chrome):
    "A page without a network."
    with page_of(chrome, 1200) as page:
        page.context.set_offline(True)
        yield page
        assert page.external == [] and page.errors == []


def test_a_saved_page_is_live(runs, tmp_path, offline):
    explorer = explore_pseudo_labels(*runs, step=1, index=0, tau=0.5)
    offline.goto(explorer.to_html(tmp_path / "page.html").as_uri())
    offline.wait_for_function("() => document.body.dataset.ready")
    offline.wait_for_function(DRAWN, arg=2)
    one = Explorer(offline, 0, "")
    for tau in (0.5, 0, 1, 0.25):
        offline.locator("#tau").evaluate(
            "(s, k) => { s.value = k; s.dispatchEvent(new Event('input')); }",
            [f["tau"] for f in explorer.describe_saved(explorer.state)["frames"]].index(tau),
        )
        offline.wait_for_function(
            "(t) => [...document.querySelectorAll('.mbs-explore')].every((e) => e.dataset.drawn.includes(` ${t} `))",
            arg=f"{tau:.2f}",
        )
        explorer.state.tau = tau
        shown = dict(
            one.root.locator(".mbs-tables tr").evaluate_all(
                "(rows) => rows.map((r) => [r.cells[0].innerText.trim(), r.cells[1].innerText])"
            )
        )
        assert shown == {name.replace("->", " → "): f"{n:,}" for name, n in explorer.state.counts.items()}
    before = one.pixels()
    one.root.locator(".mbs-tables button").first.click()
    offline.wait_for_timeout(200)
    assert {"truth", "flow"} <= changed(before, one.pixels())
    one.panel("truth").click(position=dict(x=5, y=5))
    offline.get_by_text("Everything else about this pixel needs the notebook").first.wait_for()


def test_saved_features_follow_the_pick(runs, tmp_path, offline):
    names = ("truth", "teacher", "student", "distance", "cosine_teacher", "cosine_student")
    explorer = explore_features(runs[0], step=1, pick=(20, 20))
    offline.goto(explorer.to_html(tmp_path / "page.html").as_uri())
    offline.wait_for_function(DRAWN, arg=1)
    one = Explorer(offline, 0, "")
    before = one.pixels(names)
    one.panel("truth", names).click(position=dict(x=3, y=3))
    offline.wait_for_timeout(300)
    assert changed(before, one.pixels(names)) == {"cosine_teacher", "cosine_student"}


def test_pictures_zoom_together_and_the_mark_stays_on_its_pixel(runs, tmp_path, offline):
    "Wheel, keys, drag and double-click; a page scrolls until a panel has the focus."
    explorer = explore_pseudo_labels(*runs, step=1, index=0)
    offline.goto(explorer.to_html(tmp_path / "page.html").as_uri())
    offline.wait_for_function(DRAWN, arg=2)
    frames, mouse = offline.locator(".mbs-frame"), offline.mouse
    box = frames.first.bounding_box()
    x, y = box["x"] + 0.7 * box["width"], box["y"] + 0.3 * box["height"]

    def find_marks():
        "Place of the dot on the first panel of each run, in CSS pixels of the panel."
        return offline.evaluate("""() => [...document.querySelectorAll('.mbs-explore')].map((root) => {
            const mark = root.querySelector('.mbs-mark'), dot = getComputedStyle(mark, '::after');
            const frame = root.querySelector('.mbs-frame').getBoundingClientRect();
            const box = mark.getBoundingClientRect();
            const zoom = box.width / mark.offsetWidth;
            const [x, y] = [box.left - frame.left, box.top - frame.top];
            return [x + parseFloat(dot.left) * zoom, y + parseFloat(dot.top) * zoom]; })""")

    mouse.move(x, y)
    mouse.wheel(0, -300)
    offline.wait_for_timeout(100)
    assert offline.locator("[style*='--zoom']").count() == 0
    mouse.click(x, y)
    read = "() => +document.querySelector('.mbs-pair').style.getPropertyValue('--zoom')"
    for _ in range(4):
        mouse.wheel(0, -200)
    offline.wait_for_function(f"({read})() > 4")
    mouse.move(x + 1, y)
    tip = offline.locator(".mbs-tip").first.inner_text()
    place = [[x - box["x"], y - box["y"]]] * 2
    one_pixel = box["width"] / explorer.state.moment.truth.shape[1] * offline.evaluate(read)
    assert np.abs(np.array(find_marks()) - place).max() < one_pixel, "a dot left its pixel"
    assert re.match(r"\(\d+, \d+\)", tip)[0] in offline.locator(".mbs-card").first.inner_text()
    mouse.down()
    mouse.move(x - 40, y + 25, steps=4)
    mouse.up()
    assert np.abs(np.array(find_marks()) - place - [-41, 25]).max() < one_pixel + 1
    mouse.move(x - 40, y + 25)
    assert offline.locator(".mbs-tip").first.inner_text()[:8] == tip[:8], (
        "a drag picks no pixel and moves with the mouse"
    )
    mouse.dblclick(x, y)
    assert offline.evaluate(read) == 1
    offline.keyboard.press("+")
    assert offline.evaluate(read) == 1.5
    offline.keyboard.press("-")
    assert offline.evaluate(read) == 1


def test_a_saved_test_set_sorts_and_filters_like_python(runs, tmp_path, offline):
    explorer = explore_test_set(runs[0])
    offline.goto(explorer.to_html(tmp_path / "page.html").as_uri())
    offline.wait_for_function("() => document.querySelector('.mbs-grid').dataset.left === '0'")

    def shown():
        return offline.locator("[data-position]").evaluate_all("(all) => all.map((e) => +e.dataset.position)")

    for explorer.state.order in ORDERS:
        offline.get_by_label("Sort by").select_option(explorer.state.order)
        assert shown() == [record.position for record in explorer.state.choose()]
    explorer.state.contains, explorer.state.place = 1, "truth"
    offline.get_by_label("Contains").select_option("1")
    offline.get_by_label("in", exact=True).select_option("truth")
    assert 0 < len(shown()) < 8 and shown() == [record.position for record in explorer.state.choose()]
    offline.wait_for_function("() => [...document.querySelectorAll('.mbs-grid img')].every((e) => e.naturalWidth)")


def test_a_saved_chart_is_drawn(runs, tmp_path, offline):
    offline.goto(explore_class_tokens(*runs).to_html(tmp_path / "page.html").as_uri())
    offline.locator(".js-plotly-plot .heatmaplayer image").first.wait_for()
    assert offline.locator(".js-plotly-plot .heatmaplayer image").count() == 4


def test_the_step_of_a_saved_chart_can_be_chosen(runs, tmp_path, offline):
    "The slider changes titles and cells; the mouse reads a cell."
    explorer = explore_confusions(*runs)
    offline.goto(explorer.to_html(tmp_path / "page.html").as_uri())
    matrices = offline.locator(".js-plotly-plot .heatmaplayer image")
    matrices.first.wait_for()
    rail = offline.locator(".slider-rail-touch-rect").bounding_box()
    offline.mouse.click(rail["x"] + 2, rail["y"] + rail["height"] / 2)
    offline.wait_for_function("() => document.querySelector('.annotation-text').textContent.includes('after step 0')")
    box = matrices.nth(1).bounding_box()
    cell = box["width"] / 9
    offline.mouse.move(box["x"] + cell / 2, box["y"] + 1.5 * cell)
    said = offline.locator(".hovertext").text_content()
    counts, name = runs[1].confusion(0).counts, runs[1].names[1]
    share = f"{100 * counts[1, 0] / counts[1].sum():.1f} % of the true class"
    assert said == f"true {name}, predicted background: {share}, {counts[1, 0]:,} pixels"


def test_the_app(runs, chrome, tmp_path, monkeypatch):
    "`mbs explore RUN --app` shows all views without code; a second run and a picture of one's own can be chosen."
    if find_spec("voila") is None and not DEMANDED:
        pytest.skip("voila is not installed: pip install 'mbs[app]'")
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    notebook = write_app([runs[1].folder])
    with voila(notebook, tmp_path) as address, page_of(chrome, dark=True) as page:
        page.goto(address)
        page.wait_for_function(DRAWN, arg=1)
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", colour)[:3])) < 80, "the page is dark as the browser asks"
        one = Explorer(page, 0, "")
        before = one.pixels()
        handle = page.locator(".noUi-handle").first
        handle.focus()
        for _ in range(40):
            page.keyboard.press("ArrowLeft")
        page.wait_for_function("() => /τ = 0\\.3/.test(document.querySelector('.mbs-explore').innerText)")
        assert "pseudo" in changed(before, one.pixels())
        shown = page.locator("body").inner_text()
        assert "ExplorerApp" not in shown and "JupyterLab" not in shown and "{" not in shown
        page.get_by_label("Compare with").select_option(runs[0].folder.name)
        page.wait_for_function(DRAWN, arg=2)
        photo = tmp_path / "photo.png"
        Image.fromarray(runs[1].samples()[0].photo).save(photo)
        with page.expect_file_chooser() as chooser:
            page.get_by_text("Your pictures").click()
        chooser.value.set_files(photo)
        count = "(e) => e.querySelectorAll('canvas').length"
        page.wait_for_function(f"() => [...document.querySelectorAll('.mbs-explore')].map({count}).join() === '3,3'")
        assert "ground truth" in page.locator("body").inner_text()
        page.get_by_text("Confusions", exact=True).click()
        page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for()
        assert page.errors == []
        assert [
            url for url in page.external if "font" not in url.lower()
        ] == []  # voila's own template asks for an icon font


def test_mbs_explore_opens_a_tour_that_is_live_and_leaves_pictures(runs, chrome, tmp_path):
    "The printed link leads to the executed notebook; when the server has ended, pictures stand in place of the views."
    folders = {name: str(tmp_path / name.lower()) for name in SEPARATE}
    command = make_module_command("mbs", "explore", str(runs[0].folder), "--no-browser", "--allow-root")
    environment = os.environ | folders | dict(MBS_HOME=str(tmp_path), PYTHONUNBUFFERED="1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            lines = []
            while not (lines and lines[-1].startswith("Ctrl-C")):
                lines.append(process.stdout.readline())
                assert lines[-1], lines
            said = "".join(lines)
            link = re.search(r"^Open (http://127\.0\.0\.1:(\d+)/lab/tree/explore\.ipynb\?token=\w+)$", said, re.M)
            assert f"ssh -N -L {link[2]}:127.0.0.1:{link[2]} " in said
            with page_of(chrome, dark=True) as page:
                page.goto(link[1])
                page.wait_for_function(DRAWN, arg=3)
                assert "model not found" not in page.locator("body").inner_text()
                page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")  # as the browser asks
                assert not page.locator(".jp-FileBrowser").is_visible()
                settings = json.loads(page.locator("#jupyter-config-data").text_content())
                assert any("announcements" in str(extension) for extension in settings["disabledExtensions"])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    (path,) = tmp_path.glob("tours/*/explore.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    data = [output["data"] for cell in cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in one for one in data) >= 5
    assert not [mime for one in data for mime in one if "widget-view" in mime]
