"The documentation site: it builds without a warning, every link leads somewhere, every name is in it, and a browser draws its pages without a network."

import importlib
import inspect
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))  # its programs are no package
DEMANDED = bool(os.environ.get("CI")) or os.environ.get("MBS_BROWSER") == "1"  # then a missing browser is a failure
MODULES = [f"mbs.{p.stem}" for p in sorted((ROOT / "mbs").glob("*.py")) if not p.stem.startswith("_")]
SIX = [
    "index.html",
    "reference.html",
    "reference/pseudo_labels.html",
    "reference/feature_distillation.html",
    "tutorials/background_shift.html",
    "equations.html",
]


class Page(HTMLParser):
    "Anchors, links, and what a page loads by itself."

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.anchors |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        elif tag == "link" and a.get("href"):
            self.loads.append(a["href"])
        elif a.get("src"):
            self.loads.append(a["src"])


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site, built once."
    out = tmp_path_factory.mktemp("docs")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, DOCS / "build.py", "--out", out], capture_output=True, text=True, timeout=600
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and not done.stderr, (
        done.stdout[-2000:] + done.stderr[-4000:]
    )  # Sphinx ends with an error when it warns
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120
    return out / "html"


@pytest.fixture(scope="session")
def pages(site):
    return {p: Page(p) for p in sorted(site.rglob("*.html"))}


def test_links_lead_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(site)}: no anchor {link}")
    assert not broken, "\n".join(broken[:20])
    assert sum(len(p.links) for p in pages.values()) > 5000 and site / "index.html" in pages


def test_pages_load_nothing_from_elsewhere(site, pages):
    assert [
        (p.relative_to(site), x)
        for p, page in pages.items()
        for x in page.loads
        if urlsplit(x).netloc or urlsplit(x).scheme not in ("", "data")
    ] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_name_is_explained(name, pages):
    "All of `__all__` is in the reference, functions and classes with a docstring of their own."
    module = importlib.import_module(name)
    anchors = set().union(*(page.anchors for page in pages.values()))
    for public in module.__all__ if hasattr(module, "__all__") else []:
        assert f"{name}.{public}" in anchors, f"{name}.{public} is not in the reference"
        value = getattr(module, public)
        if inspect.isfunction(value) or (inspect.isclass(value) and value.__module__ == name):
            assert (value.__doc__ or "").strip(), f"{name}.{public} has no docstring"


def test_reference_says_what_the_source_says(pages, site):
    "Signature, comments of parameters, fields of settings, methods; code in the text is a link."
    text = (site / "reference/pseudo_labels.html").read_text(encoding="utf-8")
    assert (
        "relabel where the teacher’s probability is at least this" in text
        and "training labels, dtype of" in text
        and "_modules/mbs/pseudo_labels.html#selective_pseudo_labels" in text
    )
    assert "of the run folder under outputs/" in (site / "reference/run.html").read_text(encoding="utf-8")
    assert {"mbs.run.Run.confusion", "mbs.protocol.Protocol.to_channels"} <= {
        a for page in pages.values() for a in page.anchors
    }
    assert "reference/protocol.html#mbs.protocol.Step.to_channels" in pages[site / "equations.html"].links
    assert "#| " not in text and "nbdev_export" not in text


def test_parameters_of_a_signature():
    import ast

    from reference import comments, function_entry, table

    source = (
        'def f(self, a, # first\n  b:int|None=None, c=2, # both\n  *rest, k:str="x", **more)->int: # out\n    "Doc."\n'
    )
    entry = function_entry(ast.parse(source).body[0], "mbs.m", comments(source), "C.")
    assert (
        "{py:method} C.f(a, b: int | None = None, c=2, *rest, k: str = 'x', **more) -> int" in entry
        and "**Returns** out" in entry
    )
    assert "| `a` |  | first |" in entry and "| `c` |  | both |" in entry and r"| `b` | `int \| None` |  |" in entry
    entry = function_entry(ast.parse(one := "def g(a:int)->'B': # out\n    'Doc.'\n").body[0], "mbs.m", comments(one))
    assert "{py:function} g(a: int) -> B" in entry and "**Returns** out" in entry and "| `a`" not in entry
    assert table([("a", "int", "", "")], "parameter") == ""


def test_readme_is_the_front_page():
    from readme import readme

    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "README.md is stale: run make readme"
    assert (DOCS / "images/background_shift.png").stat().st_size < 200_000


def test_a_link_out_of_the_site_is_refused(tmp_path):
    from build import Site

    with pytest.raises(ValueError, match="no page of the site"):
        Site(tmp_path).linked("[here](../mbs/run.py)", "docs/data.md")
    assert (
        Site(tmp_path).linked("`Protocol` and `x` in [`Protocol`](data.md)", "docs/data.md")
        == "{py:obj}`Protocol <mbs.protocol.Protocol>` and `x` in [`Protocol`](/data.md)"
    )


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not DEMANDED:
        pytest.importorskip("playwright", reason="playwright is not installed: pip install 'mbs[dev]'")
        if not found:
            pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    "A function that opens a file at a width; at the end, no complaint and no request to another host."
    complaints, contexts = [], []

    def open_page(path, query="", width=1280, **options):
        contexts.append(browser.new_context(viewport=dict(width=width, height=1000), **options))
        page = contexts[-1].new_page()
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                complaints.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None
            ),
        )
        page.goto(path.resolve().as_uri() + query, wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def colours(element):
    "How many different colours a part of the page shows."
    return len(np.unique(np.array(Image.open(io.BytesIO(element.screenshot())).convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.parametrize("name", SIX)
def test_page_is_drawn(opened, site, name):
    page = opened(site / name)
    pictures = page.locator("article img").all()
    assert all(picture.evaluate("p => p.complete && p.naturalWidth > 0") for picture in pictures)
    assert all(colours(picture) > 20 for picture in pictures[:3])
    assert bool(pictures) == (name not in ("reference.html", "equations.html"))
    formulae = page.locator("math")
    assert (formulae.count() > 0) == (
        name in ("reference/pseudo_labels.html", "reference/feature_distillation.html", "equations.html")
    )
    assert all(box["width"] > 3 and box["height"] > 3 for box in [f.bounding_box() for f in formulae.all()[:20]])
    assert "$" not in "".join(page.locator("article p").all_inner_texts())


@pytest.mark.parametrize("name", SIX)
def test_page_fits_a_telephone(opened, site, name):
    page = opened(site / name, width=390, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert (
        int(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]")) < 60
    )  # dark where dark is asked for


def test_search(opened, site):
    page = opened(site / "search.html", "?q=selective_pseudo_labels")
    page.wait_for_selector("#search-results li a")
    assert (
        page.locator("#search-results li a")
        .first.get_attribute("href")
        .endswith("reference/pseudo_labels.html#mbs.pseudo_labels.selective_pseudo_labels")
    )


def test_chart_is_drawn(opened, site, tmp_path):
    "A stored plotly chart becomes one that draws itself."
    import plotly.graph_objects as go
    from build import shown

    chart = json.loads(go.Figure(go.Bar(x=["old", "new"], y=[3, 1]), dict(title="</script>")).to_json())
    cell = new_code_cell(
        "fig", outputs=[new_output("display_data", {"application/vnd.plotly.v1+json": chart, "text/plain": "Figure"})]
    )
    (tmp_path / "pages").mkdir()
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(
        new_notebook(cells=[new_markdown_cell("# A chart"), shown(cell, "")], metadata=dict(kernelspec=kernel)),
        tmp_path / "pages/index.ipynb",
    )
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-c", DOCS, tmp_path / "pages", tmp_path / "html"], check=True
    )
    page = opened(tmp_path / "html/index.html")
    page.wait_for_selector(".plotly-chart svg.main-svg")
    assert page.locator(".plotly-chart .bars path").count() == 2 and colours(page.locator(".plotly-chart")) > 20
